/* The driver's half of a virtqueue: chains out, used chains in, notifications both ways, waiting. What the
 * load generator (driver.c) stands on; the two formats are driver_split.inl and driver_packed.inl.
 *
 * It is written against the device, not with it: its own indices, its own idea of what is outstanding,
 * nothing shared with split.inl and packed.inl but the layout of the ring (internal.h).
 *
 * A slot is one frame's buffer (and indirect table). Each offer describes it anew, as a real driver does, so
 * that a device which reads descriptors too early reads something old. A chain goes by its name: the index of
 * its first descriptor (split), its buffer id (packed).
 *
 * In order (VIRTIO_F_IN_ORDER) slots are taken and come back in turn, and one used entry may complete a
 * batch: it names the last chain, those before it count as completely used (virtio 1.2, 2.7.9, 2.8.8).
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
#define SPINS 256          /* looks at the ring between two yields */
#define CALL_GRACE_MS 1000 /* twice this without a call that is due, and it counts as lost */

struct driver {
    struct driver_config config;
    struct driver_stats stats;
    union { /* split | packed */
        struct vring_desc *desc;
        struct packed_desc *packed;
    };
    union {
        struct vring_avail *avail;
        struct packed_event *driver_event;
    };
    union {
        struct vring_used *used;
        struct packed_event *device_event;
    };
    bool is_packed;
    bool event_idx;
    bool in_order;
    bool mergeable;

    /* Split: free-running indices. Packed: positions, which count on through two laps of the ring; in the
     * first the wrap counter is 1. */
    uint16_t next_avail; /* next entry to fill */
    uint16_t published;
    uint16_t kick_decided; /* `published` at the last kick decision */
    uint16_t next_used;
    uint16_t next_desc;    /* split, in order: next descriptor of the table */
    bool holding;          /* packed: the first descriptor not published yet waits for its flags... */
    uint16_t held_flags;   /* ...these */
    uint16_t looked;       /* packed: up to here used descriptors were counted... */
    uint32_t known;        /* ...so many chains, not taken yet */
    uint64_t sequence; /* next to send, or expected */
    uint64_t left;     /* frames still to be offered (transmit) */

    uint32_t slots, outstanding;
    uint32_t per_slot; /* descriptors of the ring that a slot takes */
    uint64_t stride;
    uint32_t free_count;
    uint32_t *free_slots; /* not in order: a stack */
    uint32_t next_slot;   /* in order: next to take */
    uint32_t first_slot;  /* in order: the one that has been outstanding for the longest time */
    uint32_t *name;       /* [slots]: of the chain that is outstanding there */
    uint32_t *slot_of;    /* [size]: by name */
    bool *busy;
    uint32_t batch;         /* chains left of the used entry being taken */
    uint32_t batch_written; /* what it says of the last */
    uint32_t batch_slot;
    uint8_t *frame; /* a received frame put together */
    uint64_t due;       /* when the next batch is to be sent; by now_ns() */
    uint64_t *sent_at;  /* [SENT_AT] a partner's: when the frames of the latest sequence numbers were sent... */
    uint64_t *latency;  /* [DRIVER_LATENCIES] ...and how long frames took */

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

static uint64_t now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

static uint64_t now_ms(void) { return now_ns() / 1000000; }

/* ---------------------------------------------------------------------------------------- slots */

static uint64_t table_bytes(const struct driver_config *c)
{
    return c->indirect ? sizeof(struct vring_desc) * c->pieces : 0;
}

static uint64_t table_gpa(const struct driver *d, uint32_t slot)
{
    return d->config.area_gpa + slot * d->stride;
}

static uint8_t *table(const struct driver *d, uint32_t slot)
{
    return d->config.area + slot * d->stride;
}

static uint8_t *buffer(struct driver *d, uint32_t slot)
{
    return table(d, slot) + table_bytes(&d->config);
}

/* Take a free slot; there is one. */
static uint32_t take_slot(struct driver *d)
{
    d->free_count--;
    if (!d->in_order)
        return d->free_slots[d->free_count];
    uint32_t slot = d->next_slot;
    d->next_slot = (slot + 1) % d->slots;
    return slot;
}

static void give_slot(struct driver *d, uint32_t slot)
{
    if (!d->in_order)
        d->free_slots[d->free_count] = slot;
    d->free_count++;
}

/* Piece i of a slot's buffer as a descriptor has it: the header, then the frame in equal parts. */
struct part {
    uint64_t gpa;
    uint32_t len;
    uint16_t flags; /* WRITE and NEXT */
};
static struct part part_of(const struct driver *d, uint32_t slot, uint32_t i)
{
    const struct driver_config *c = &d->config;
    uint64_t gpa = table_gpa(d, slot) + table_bytes(c);
    uint16_t write = c->role == DRIVER_RECEIVE ? DESC_F_WRITE : 0;

    if (c->pieces == 1)
        return (struct part){gpa, HEADER + c->frame_bytes, write};
    if (i == 0)
        return (struct part){gpa, HEADER, (uint16_t)(write | DESC_F_NEXT)};
    uint32_t each = c->frame_bytes / (c->pieces - 1), at = each * (i - 1);
    if (i < c->pieces - 1)
        return (struct part){gpa + HEADER + at, each, (uint16_t)(write | DESC_F_NEXT)};
    return (struct part){gpa + HEADER + at, c->frame_bytes - at, write};
}

/* -> the slot of the outstanding chain that goes by this name, or -1. */
static int64_t find_slot(struct driver *d, uint32_t name)
{
    uint32_t slot = name < d->config.size ? d->slot_of[name] : 0;

    if (name >= d->config.size || !d->busy[slot] || d->name[slot] != name) {
        error(d, DRIVER_E_HEAD);
        return -1;
    }
    return slot;
}

/* How many chains a used entry completes that names the one in `slot`, the first of them in `first`. */
static uint32_t batch_of(const struct driver *d, uint32_t slot, uint32_t first)
{
    return d->in_order ? (slot + d->slots - first) % d->slots + 1 : 1;
}

/* -------------------------------------------------------------------------------------- the ring */

#include "driver_packed.inl"
#include "driver_split.inl"

/* Make a slot's chain available; visible to the device after publish. */
static void offer(struct driver *d, uint32_t slot)
{
    uint32_t name = d->is_packed ? packed_offer(d, slot) : split_offer(d, slot);

    d->name[slot] = name;
    d->slot_of[name] = slot;
    d->busy[slot] = true;
    d->outstanding++;
}

static void submit(struct driver *d)
{
    uint64_t one = 1;

    if (d->published == d->next_avail)
        return;
    if (d->is_packed)
        packed_publish(d);
    else
        split_publish(d);
    count(&d->stats.publications, 1);
    bool due = d->is_packed ? packed_kick_is_due(d) : split_kick_is_due(d);
    if (due && write(d->config.kick, &one, sizeof(one)) == sizeof(one))
        count(&d->stats.kicks, 1);
}

/* -> used chains that wait, or -1: the ring is nonsense. All that is offered must be published. */
static int pending(struct driver *d)
{
    return d->is_packed ? packed_pending(d) : split_pending(d);
}

/* Ask for a call after `more` used chains. -> pending(): a call may not come for what is there already. */
static int want_calls(struct driver *d, uint16_t more)
{
    if (d->is_packed)
        return packed_want_calls(d, more);
    return split_want_calls(d, more);
}

static void refuse_calls(struct driver *d)
{
    if (d->is_packed)
        packed_refuse_calls(d);
    else
        split_refuse_calls(d);
}

/* Take the next used chain; one is pending. -> its slot, or -1: the used entry is nonsense. */
static int64_t take_used(struct driver *d, uint32_t *written)
{
    if (d->batch == 0) {
        int64_t named = d->is_packed ? packed_read_used(d) : split_read_used(d);
        if (named < 0)
            return -1;
        d->batch_slot = (uint32_t)named;
        d->batch = batch_of(d, d->batch_slot, d->first_slot);
    }
    uint32_t slot = d->in_order ? d->first_slot : d->batch_slot;
    uint32_t all = d->config.role == DRIVER_RECEIVE ? HEADER + d->config.frame_bytes : 0;
    d->batch--;
    *written = d->batch == 0 ? d->batch_written : all;
    d->first_slot = (slot + 1) % d->slots;
    if (d->is_packed)
        packed_taken(d);
    else
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
