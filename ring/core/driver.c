/* The load generator: a driver as a thread. The contract is driver.h, the ring's half driver_ring.inl, times and paces
 * driver_pace.inl.
 *
 * What it checks is the driver's side of each promise the device makes: order, lengths, every chain back
 * exactly once, a notification whenever one is due. A lost kick shows as DRIVER_E_STALL, a lost call as
 * DRIVER_E_CALL, memory read too early or written too late as DRIVER_E_STAMP or _BODY.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/eventfd.h>

#include "driver_ring.inl"
#include "driver_pace.inl"

#define FEATURE_MRG_RXBUF 15
#define NUM_BUFFERS 10 /* offset of that field in the header, 5.1.6 */
#define FRAME_MAX 65550

struct stamp {
    uint64_t sequence;
    uint32_t length; /* of the frame */
    uint32_t check;
};

/* ----------------------------------------------------------------------------------------- frames */

static uint32_t checksum(uint64_t sequence, uint32_t length)
{
    uint64_t x = (sequence + length) * 0x9E3779B97F4A7C15u;

    return (uint32_t)(x >> 32) ^ (uint32_t)length;
}

/* The body of frame `sequence`, a different one in every word: written to `to`, or compared with it. */
static bool body(uint8_t *to, uint32_t length, uint64_t sequence, bool write)
{
    uint64_t word = (sequence + 1) * 0xD1B54A32D192ED03u;

    while (length > 0) {
        uint32_t part = length < sizeof(word) ? length : (uint32_t)sizeof(word);
        if (write)
            memcpy(to, &word, part);
        else if (memcmp(to, &word, part) != 0)
            return false;
        word += 0x9E3779B97F4A7C15u;
        to += part;
        length -= part;
    }
    return true;
}

static void make_frame(struct driver *d, uint8_t *at)
{
    const struct driver_config *c = &d->config;
    struct stamp stamp = {d->sequence, c->frame_bytes, checksum(d->sequence, c->frame_bytes)};
    uint8_t *frame = at + HEADER;

    memcpy(at, c->header, HEADER);
    memcpy(frame, c->prefix, c->prefix_bytes);
    memcpy(frame + c->prefix_bytes, &stamp, sizeof(stamp));
    if (c->full) {
        uint32_t before = c->prefix_bytes + (uint32_t)sizeof(stamp);
        body(frame + before, c->frame_bytes - before, d->sequence, true);
    }
    d->sequence++;
}

/* Judge one received frame and count it. */
static void check_frame(struct driver *d, const uint8_t *frame, uint32_t length)
{
    const struct driver_config *c = &d->config;
    uint32_t before = c->prefix_bytes + (uint32_t)sizeof(struct stamp);
    struct stamp stamp;

    if (length < before || memcmp(frame, c->prefix, c->prefix_bytes) != 0) {
        count(&d->stats.foreign, 1);
        return;
    }
    memcpy(&stamp, frame + c->prefix_bytes, sizeof(stamp));
    if (stamp.length != length || stamp.check != checksum(stamp.sequence, length))
        error(d, DRIVER_E_STAMP);
    else if (stamp.sequence < d->sequence)
        error(d, DRIVER_E_ORDER);
    else {
        note_arrival(d, stamp.sequence);
        count(&d->stats.lost, stamp.sequence - d->sequence);
        d->sequence = stamp.sequence + 1;
        if (c->full && !body((uint8_t *)frame + before, length - before, stamp.sequence, false)) {
            error(d, DRIVER_E_BODY);
            return;
        }
        count(&d->stats.frames, 1);
        count(&d->stats.bytes, length);
    }
}

/* ---------------------------------------------------------------------------------------- receive */

/* Take one frame; at least one chain is pending, `n` in all. -> chains it took, or -1. */
static int receive_frame(struct driver *d, int n)
{
    uint32_t room = HEADER + d->config.frame_bytes, length = 0;
    uint16_t buffers = 1;

    for (uint16_t i = 0; i < buffers; i++) {
        uint32_t written;
        int64_t slot = take_used(d, &written);
        if (slot < 0)
            return -1;
        if (written > room || written < (i == 0 ? HEADER : 1)) {
            error(d, DRIVER_E_LENGTH);
            return -1;
        }
        const uint8_t *at = buffer(d, (uint32_t)slot);
        uint32_t skip = 0;
        if (i == 0) {
            memcpy(&buffers, at + NUM_BUFFERS, sizeof(buffers));
            if (buffers == 0 || buffers > n || (buffers > 1 && !d->mergeable)) {
                error(d, DRIVER_E_MERGE);
                return -1;
            }
            skip = HEADER;
        }
        uint32_t part = written - skip;
        if (part > FRAME_MAX - length)
            part = FRAME_MAX - length; /* longer than any frame of ours: the stamp tells */
        memcpy(d->frame + length, at + skip, part);
        length += part;
        offer(d, (uint32_t)slot);
    }
    check_frame(d, d->frame, length);
    return buffers;
}

static bool received_all(const struct driver *d)
{
    return d->config.frames && d->sequence >= d->config.frames;
}

static void post_all(struct driver *d)
{
    while (d->free_count > 0)
        offer(d, take_slot(d));
    submit(d);
}

/* Take up to a batch of the frames in `n` pending chains, and post their buffers again. -> false: nonsense. */
static bool receive_batch(struct driver *d, int n)
{
    for (uint32_t done = 0; n > 0 && done < d->config.batch; done++) {
        int taken = receive_frame(d, n);
        if (taken < 0)
            return false;
        n -= taken;
    }
    submit(d);
    return true;
}

static void receive(struct driver *d)
{
    post_all(d);
    while (!received_all(d) && !stopped(d)) {
        int n = pending(d);
        if (n < 0 || (n == 0 && !wait_used(d, 1)) || !receive_batch(d, n))
            return;
    }
}

/* As a partner: take what is there and ask to be called for more. -> false: nonsense. */
static bool receive_some(struct driver *d)
{
    int n = pending(d);

    if (n <= 0)
        return n == 0;
    take_calls(d);
    do
        if (!receive_batch(d, n))
            return false;
    while ((n = want_calls(d, 1)) > 0);
    return n == 0;
}

/* --------------------------------------------------------------------------------------- transmit */

/* Take back everything used. -> false: the ring is nonsense. */
static bool reclaim(struct driver *d, int n)
{
    for (; n > 0; n--) {
        uint32_t written;
        int64_t slot = take_used(d, &written);
        if (slot < 0)
            return false;
        if (written != 0) {
            error(d, DRIVER_E_LENGTH);
            return false;
        }
        give_slot(d, (uint32_t)slot);
        count(&d->stats.frames, 1);
        count(&d->stats.bytes, d->config.frame_bytes);
    }
    return n == 0;
}

/* Wait until the next batch is due. -> false: it never will be. */
static bool pace(struct driver *d)
{
    const struct driver_config *c = &d->config;
    uint64_t now;

    if (c->interval_ns == 0)
        return true;
    do
        if (stopped(d) || (c->partner && !receive_some(c->partner)))
            return false;
    while ((now = now_ns()) < d->due);
    d->due = (now - d->due > CATCH_UP_NS ? now : d->due) + c->interval_ns;
    return true;
}

static void transmit(struct driver *d)
{
    if (d->config.partner) {
        post_all(d->config.partner);
        if (want_calls(d->config.partner, 1) < 0)
            return;
    }
    while (d->left > 0 || d->outstanding > 0) {
        if (!pace(d))
            return;
        for (uint32_t i = 0; i < d->config.batch && d->left > 0 && d->free_count > 0; i++) {
            uint32_t slot = take_slot(d);
            note_sending(d);
            make_frame(d, buffer(d, slot));
            offer(d, slot);
            d->left--;
        }
        submit(d);
        int n = pending(d);
        if (n < 0 || !reclaim(d, n) || stopped(d))
            return;
        if (n > 0 || d->config.interval_ns > 0 || (d->left > 0 && d->free_count > 0))
            continue;
        /* Nothing to do before something is used: sleep until half of it is, or all at the end. */
        uint32_t wanted = d->left > 0 ? (d->outstanding + 1) / 2 : d->outstanding;
        if (!wait_used(d, (uint16_t)wanted))
            return;
    }
}

/* ----------------------------------------------------------------------------------------- contract */

static void *run(void *argument)
{
    struct driver *d = argument;
    uint64_t one = 1;

    refuse_calls(d);
    if (d->config.role == DRIVER_TRANSMIT)
        transmit(d);
    else
        receive(d);
    take_calls(d);
    ssize_t r = write(d->ended, &one, sizeof(one));
    (void)r;
    return NULL;
}

static uint64_t stride(const struct driver_config *c)
{
    uint64_t bytes = table_bytes(c) + HEADER + c->frame_bytes;

    return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

static uint32_t per_slot(const struct driver_config *c)
{
    return c->indirect ? 1 : c->pieces;
}

static uint32_t slots(const struct driver_config *c)
{
    return c->size / per_slot(c);
}

static bool is_packed(const struct driver_config *c)
{
    return c->features >> FEATURE_RING_PACKED & 1;
}

static bool sensible(const struct driver_config *c)
{
    return (c->role == DRIVER_TRANSMIT || c->role == DRIVER_RECEIVE) && c->size > 0 &&
           c->size <= RING_QUEUE_SIZE_MAX && c->batch > 0 && c->pieces > 0 && c->pieces <= DRIVER_PIECES_MAX &&
           slots(c) > 0 && c->frame_bytes <= FRAME_MAX &&
           (is_packed(c) ? (c->base & 0x7fff) < c->size : (c->size & (c->size - 1)) == 0) &&
           c->prefix_bytes >= 14 && c->prefix_bytes <= sizeof(c->prefix) && c->frame_bytes >= c->pieces &&
           (c->role == DRIVER_RECEIVE || c->frame_bytes >= c->prefix_bytes + sizeof(struct stamp)) &&
           (!c->partner || (c->role == DRIVER_TRANSMIT && c->interval_ns > 0 &&
                            c->partner->config.role == DRIVER_RECEIVE));
}

uint64_t driver_area_bytes(const struct driver_config *config)
{
    return sensible(config) ? slots(config) * stride(config) : 0;
}

struct driver *driver_new(const struct driver_config *config)
{
    if (!sensible(config)) {
        errno = EINVAL;
        return NULL;
    }
    struct driver *d = calloc(1, sizeof(*d));
    if (!d)
        return NULL;
    d->config = *config;
    d->desc = (void *)config->desc;
    d->avail = (void *)config->avail;
    d->used = (void *)config->used;
    d->is_packed = is_packed(config);
    d->event_idx = config->features >> FEATURE_EVENT_IDX & 1;
    d->in_order = config->features >> FEATURE_IN_ORDER & 1;
    d->mergeable = config->features >> FEATURE_MRG_RXBUF & 1;
    uint32_t base = config->base;
    if (d->is_packed) /* the position of slot and wrap counter */
        base = (base & 0x7fff) + (base & 0x8000 ? 0 : config->size);
    d->next_avail = d->published = d->kick_decided = d->next_used = d->looked = (uint16_t)base;
    d->left = config->frames ? config->frames : UINT64_MAX;
    d->slots = slots(config);
    d->per_slot = per_slot(config);
    d->stride = stride(config);
    d->free_slots = calloc(d->slots, sizeof(*d->free_slots));
    d->busy = calloc(d->slots, sizeof(*d->busy));
    d->name = calloc(d->slots, sizeof(*d->name));
    d->slot_of = calloc(config->size, sizeof(*d->slot_of));
    d->frame = malloc(FRAME_MAX);
    d->stop = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    d->ended = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (!take_partner(config->partner) || !d->free_slots || !d->busy || !d->name || !d->slot_of || !d->frame || d->stop < 0 || d->ended < 0) {
        driver_free(d);
        errno = ENOMEM;
        return NULL;
    }
    for (uint32_t i = 0; i < d->slots; i++)
        d->free_slots[d->free_count++] = d->slots - 1 - i;
    return d;
}

int driver_start(struct driver *d)
{
    sigset_t all, before;

    if (d->running)
        return EBUSY;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed = pthread_create(&d->thread, NULL, run, d);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    d->running = failed == 0;
    return failed;
}

int driver_wait(struct driver *d, int timeout_ms)
{
    struct pollfd p = {.fd = d->ended, .events = POLLIN};

    return poll(&p, 1, timeout_ms) == 1;
}

void driver_stop(struct driver *d)
{
    uint64_t one = 1;

    if (!d->running)
        return;
    __atomic_store_n(&d->stopping, true, __ATOMIC_RELAXED);
    ssize_t r = write(d->stop, &one, sizeof(one)); /* in case it sleeps */
    (void)r;
    pthread_join(d->thread, NULL);
    d->running = false;
}

void driver_stats_get(const struct driver *d, struct driver_stats *out)
{
    const uint64_t *from = (const uint64_t *)&d->stats;
    uint64_t *to = (uint64_t *)out;

    for (size_t i = 0; i < sizeof(*out) / sizeof(*to); i++)
        to[i] = __atomic_load_n(&from[i], __ATOMIC_RELAXED);
}

void driver_free(struct driver *d)
{
    if (!d)
        return;
    driver_stop(d);
    if (d->stop >= 0)
        close(d->stop);
    if (d->ended >= 0)
        close(d->ended);
    free(d->free_slots);
    free(d->busy);
    free(d->name);
    free(d->slot_of);
    free(d->frame);
    free(d->sent_at);
    free(d->latency);
    free(d);
}

const char *driver_sources_digest(void)
{
#ifdef RING_SOURCES_DIGEST
    return RING_SOURCES_DIGEST;
#else
    return "";
#endif
}
