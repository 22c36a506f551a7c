/* The driver's half of a split ring: chains out, used elements in, notifications both ways, waiting. What
 * the load generator (driver.c) stands on.
 *
 * It is written against the device, not with it: its own indices, its own idea of what is outstanding,
 * nothing shared with split.inl but the layout of the ring (internal.h).
 *
 * Descriptors are shared out for good: a slot is one frame's `pieces` descriptors of the ring (or one, and
 * a table in the slot's memory) and one buffer. They are still written anew for each frame, as a real
 * driver does, so that a device which reads them too early reads something old.
 *
 * Ordering (virtio 1.2, 2.7.13, 2.7.14). Four accesses pair with the device's:
 *     publish      store-release avail.idx    device: load-acquire avail.idx (split_see)
 *     kick_is_due  full barrier, then flags   device: store flags/avail_event, full barrier, look again (split_arm)
 *     pending      load-acquire used.idx      device: store-release used.idx (split_publish)
 *     want_calls   store used_event, full     device: store used.idx, full barrier, load used_event (split_decide)
 *                  barrier, look again
 */
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <time.h>
#include <unistd.h>

#include "driver_include.h"
#include "internal.h"

#define HEADER 12
#define ALIGNMENT 64
#define SPINS 256          /* looks at used.idx between two yields */
#define CALL_GRACE_MS 1000 /* twice this without a call that is due, and it counts as lost */

struct driver {
    struct driver_config config;
    struct driver_stats stats;
    struct vring_desc *desc;
    struct vring_avail *avail;
    struct vring_used *used;
    bool event_idx;
    bool mergeable;

    uint16_t next_avail; /* next entry to fill */
    uint16_t published;
    uint16_t kick_decided; /* `published` at the last kick decision */
    uint16_t next_used;
    uint64_t sequence; /* next to send, or expected */
    uint64_t left;     /* frames still to be offered (transmit) */

    uint32_t slots, outstanding;
    uint64_t stride;
    uint32_t free_count;
    uint32_t *free_slots;
    bool *busy;
    uint8_t *frame; /* a received frame put together */

    pthread_t thread;
    bool running;
    bool stopping;   /* atomic */
    int stop, ended; /* eventfds */
};

static void count(uint64_t *counter, uint64_t n)
{
    __atomic_store_n(counter, *counter + n, __ATOMIC_RELAXED); /* one writer; readers may look any time */
}

static void error(struct driver *d, enum driver_error what)
{
    count(&d->stats.errors[what], 1);
}

static uint64_t now_ms(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

/* ----------------------------------------------------------------------------------------- the ring */

static uint16_t *used_event(struct driver *d) { return &d->avail->ring[d->config.size]; }
static uint16_t *avail_event(struct driver *d) { return (uint16_t *)&d->used->ring[d->config.size]; }

/* Was index `event` passed when an index moved from `old` to `new`? (2.7.10) */
static bool passed(uint16_t event, uint16_t new, uint16_t old)
{
    return (uint16_t)(new - event - 1) < (uint16_t)(new - old);
}

static uint64_t table_bytes(const struct driver_config *c)
{
    return c->indirect ? sizeof(struct vring_desc) * c->pieces : 0;
}

static uint8_t *buffer(struct driver *d, uint32_t slot)
{
    return d->config.area + slot * d->stride + table_bytes(&d->config);
}

/* Describe the slot's buffer: the header, then the frame in equal parts. */
static void write_descriptors(struct driver *d, uint32_t slot)
{
    const struct driver_config *c = &d->config;
    uint64_t table = c->area_gpa + slot * d->stride, gpa = table + table_bytes(c);
    uint32_t first = c->indirect ? 0 : slot * c->pieces;
    struct vring_desc *to = c->indirect ? (void *)(c->area + slot * d->stride) : d->desc;
    uint32_t left = HEADER + c->frame_bytes;

    for (uint32_t i = 0; i < c->pieces; i++) {
        bool last = i == c->pieces - 1;
        uint32_t part = last ? left : i == 0 ? HEADER : c->frame_bytes / (c->pieces - 1);
        to[first + i] = (struct vring_desc){
            .addr = gpa,
            .len = part,
            .flags = (uint16_t)((c->role == DRIVER_RECEIVE ? DESC_F_WRITE : 0) | (last ? 0 : DESC_F_NEXT)),
            .next = (uint16_t)(last ? 0 : first + i + 1),
        };
        gpa += part;
        left -= part;
    }
    if (c->indirect)
        d->desc[slot] = (struct vring_desc){
            .addr = table, .len = (uint32_t)table_bytes(c), .flags = DESC_F_INDIRECT};
}

static void offer(struct driver *d, uint32_t slot)
{
    uint32_t head = d->config.indirect ? slot : slot * d->config.pieces;

    write_descriptors(d, slot);
    /* Relaxed: the release store of idx orders it. */
    store16(&d->avail->ring[d->next_avail & (d->config.size - 1)], (uint16_t)head);
    d->next_avail++;
    d->busy[slot] = true;
    d->outstanding++;
}

static void publish(struct driver *d)
{
    /* Release: descriptors, entries and buffer contents before idx (2.7.13.3). */
    store16_release(&d->avail->idx, d->next_avail);
    d->published = d->next_avail;
    count(&d->stats.publications, 1);
}

static bool kick_is_due(struct driver *d)
{
    uint16_t before = d->kick_decided;

    d->kick_decided = d->published;
    /* Full: idx visible before the device's wish is read (2.7.13.4). The device does the mirror image. */
    full_barrier();
    if (d->event_idx)
        return passed(load16(avail_event(d)), d->published, before);
    return d->published != before && !(load16(&d->used->flags) & USED_F_NO_NOTIFY);
}

static void submit(struct driver *d)
{
    uint64_t one = 1;

    if (d->published == d->next_avail)
        return;
    publish(d);
    if (kick_is_due(d) && write(d->config.kick, &one, sizeof(one)) == sizeof(one))
        count(&d->stats.kicks, 1);
}

/* -> used chains that wait, or -1: the device moved used.idx too far. */
static int pending(struct driver *d)
{
    /* Acquire: elements and buffer contents are read after idx that covers them (2.7.14). */
    uint16_t n = (uint16_t)(load16_acquire(&d->used->idx) - d->next_used);

    if (n > d->config.size) {
        error(d, DRIVER_E_AHEAD);
        return -1;
    }
    return n;
}

/* Ask for a call after `more` used chains. -> pending(): a call may not come for what is there already. */
static int want_calls(struct driver *d, uint16_t more)
{
    if (d->event_idx)
        store16(used_event(d), (uint16_t)(d->next_used + more - 1));
    else
        store16(&d->avail->flags, 0);
    /* Full: the wish before the look (2.7.14). */
    full_barrier();
    return pending(d);
}

/* With EVENT_IDX the event left behind is the refusal; flags must stay 0 there (2.7.10). */
static void refuse_calls(struct driver *d)
{
    if (!d->event_idx)
        store16(&d->avail->flags, AVAIL_F_NO_INTERRUPT);
}

/* Take the next used element; one is pending. -> the slot, or -1 for one that is not outstanding. */
static int64_t take_used(struct driver *d, uint32_t *written)
{
    /* Relaxed: ordered after the acquire load of idx. */
    struct vring_used_elem *e = &d->used->ring[d->next_used & (d->config.size - 1)];
    uint32_t head = __atomic_load_n(&e->id, __ATOMIC_RELAXED);
    uint32_t per_slot = d->config.indirect ? 1 : d->config.pieces;
    uint32_t slot = head / per_slot;

    *written = __atomic_load_n(&e->len, __ATOMIC_RELAXED);
    if (head % per_slot || slot >= d->slots || !d->busy[slot]) {
        error(d, DRIVER_E_HEAD);
        return -1;
    }
    d->next_used++;
    d->busy[slot] = false;
    d->outstanding--;
    count(&d->stats.buffers, 1);
    return slot;
}

/* --------------------------------------------------------------------------------------- waiting */

static bool stopped(const struct driver *d)
{
    return __atomic_load_n(&d->stopping, __ATOMIC_RELAXED);
}

static void take_calls(struct driver *d)
{
    uint64_t n;

    if (read(d->config.call, &n, sizeof(n)) == sizeof(n))
        count(&d->stats.calls, n);
}

static bool spin(struct driver *d, uint16_t wanted, uint64_t deadline)
{
    for (uint64_t i = 1;; i++) {
        int n = pending(d);
        if (n < 0 || n >= wanted)
            return n > 0;
        if (i % SPINS == 0) {
            sched_yield();
            if (stopped(d))
                return false;
            if (deadline && now_ms() > deadline)
                return error(d, DRIVER_E_STALL), false;
        }
    }
}

static bool sleep_for_call(struct driver *d, uint16_t wanted, uint64_t deadline)
{
    bool overdue = false;

    for (;;) {
        struct pollfd p[2] = {{.fd = d->config.call, .events = POLLIN}, {.fd = d->stop, .events = POLLIN}};
        int n = want_calls(d, wanted);
        if (n < 0)
            return false;
        if (n >= wanted && !overdue) {
            refuse_calls(d);
            return true;
        }
        count(&d->stats.sleeps, 1);
        int ready = poll(p, 2, CALL_GRACE_MS);
        if (p[1].revents)
            return false;
        if (p[0].revents & POLLIN) {
            take_calls(d);
            overdue = false;
            continue;
        }
        n = pending(d);
        if (ready == 0 && n >= wanted) {
            if (overdue) {
                error(d, DRIVER_E_CALL);
                return true;
            }
            overdue = true;
        } else if (deadline && now_ms() > deadline) {
            return error(d, DRIVER_E_STALL), false;
        }
    }
}

/* Wait until `wanted` used chains are there. -> false: stopped, stalled or the ring is nonsense. */
static bool wait_used(struct driver *d, uint16_t wanted)
{
    uint64_t deadline = d->config.stall_ms ? now_ms() + d->config.stall_ms : 0;

    return d->config.busy_poll ? spin(d, wanted, deadline) : sleep_for_call(d, wanted, deadline);
}
