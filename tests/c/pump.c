/* The pump against the load generator, both under sanitizers: every frame goes out through one end of a socket
 * pair, comes back through the other, and is checked byte by byte. Under ThreadSanitizer the two threads have
 * nothing but the ring's own ordering between them: what it does not order is reported as a race. */
#define _GNU_SOURCE
#include "loop.h"

static void by_flags(uint64_t ring) { loop(ring, SOURCE(.batch = 64), SINK(.batch = 64)); }
static void by_events(uint64_t ring) { loop(ring | EVENT_IDX, SOURCE(.batch = 64), SINK(.batch = 64)); }
static void one_by_one(uint64_t ring) { loop(ring | EVENT_IDX, SOURCE(.batch = 1), SINK(.batch = 1)); }
static void one_by_one_by_flags(uint64_t ring) { loop(ring, SOURCE(.batch = 1), SINK(.batch = 1)); }
static void R39_busy_poll(uint64_t ring) { loop(ring | EVENT_IDX, SOURCE(.busy_poll = 1), SINK(.busy_poll = 1)); }
static void R39_busy_poll_by_flags(uint64_t ring) { loop(ring, SOURCE(.busy_poll = 1), SINK(.busy_poll = 1)); }
static void pieces(uint64_t ring) { loop(ring | EVENT_IDX, SOURCE(.pieces = 5), SINK(.pieces = 3)); }
static void tiny_rings(uint64_t ring) { loop(ring | EVENT_IDX, SOURCE(.size = 2), SINK(.size = 1)); }
static void indirect(uint64_t ring)
{
    loop(ring | EVENT_IDX | INDIRECT, SOURCE(.pieces = 7, .indirect = 1), SINK(.pieces = 2, .indirect = 1));
}
static void mergeable(uint64_t ring)
{
    loop(ring | EVENT_IDX | MRG_RXBUF, SOURCE(.frame_bytes = 9000), SINK(.frame_bytes = 1000));
}
static void mergeable_by_flags(uint64_t ring)
{
    loop(ring | MRG_RXBUF, SOURCE(.frame_bytes = 4000), SINK(.frame_bytes = 500, .pieces = 2));
}
static void longest_frames(uint64_t ring)
{
    loop(ring | EVENT_IDX | MRG_RXBUF, SOURCE(.frames = 200, .frame_bytes = 65550, .size = 8),
         SINK(.frame_bytes = 4000));
}
EACH_RING(by_flags)
EACH_RING(by_events)
EACH_RING(one_by_one)
EACH_RING(one_by_one_by_flags)
EACH_RING(R39_busy_poll)
EACH_RING(R39_busy_poll_by_flags)
EACH_RING(pieces)
EACH_RING(tiny_rings)
EACH_RING(indirect)
EACH_RING(mergeable)
EACH_RING(mergeable_by_flags)
EACH_RING(longest_frames)

static void odd_sizes(uint64_t ring) { loop(ring | EVENT_IDX, SOURCE(.size = 7), SINK(.size = 5, .pieces = 2)); }
TEST(odd_sizes_packed) { odd_sizes(PACKED); }
TEST(odd_sizes_packed_in_order) { odd_sizes(PACKED | IN_ORDER); }

/* What the device alone changes: used.idx, or which descriptors of a packed ring are available no longer. */
struct outstanding {
    uint16_t used_idx;
    bool available[64];
};

static bool is_available(const struct packed_desc *d)
{
    uint16_t flags = load16(&d->flags);

    return !(flags & PACKED_F_AVAIL) != !(flags & PACKED_F_USED);
}

static void note(const struct guest *g, struct outstanding *o)
{
    if (!g->is_packed)
        o->used_idx = load16(&g->used->idx);
    else
        for (uint32_t i = 0; i < g->config.size; i++)
            o->available[i] = is_available(&g->packed[i]);
}

static void check_untouched(const struct guest *g, const struct outstanding *o)
{
    if (!g->is_packed)
        CHECK_EQ(load16(&g->used->idx), o->used_idx);
    else
        for (uint32_t i = 0; i < g->config.size; i++)
            CHECK(!o->available[i] || is_available(&g->packed[i]));
}

static void F20_taken_back_and_lent_again(uint64_t ring)
{
    struct guest from, to;
    struct wire w;
    uint64_t features = ring | EVENT_IDX | MRG_RXBUF;
    struct driver_config transmit = SOURCE(.features = features, .batch = 3), receive = SINK(.features = features);

    wire_init(&w, features);
    struct driver *source = driver_on(&from, w.kick[0], w.call[0], &transmit);
    struct driver *sink = driver_on(&to, w.kick[1], w.call[1], &receive);
    w.config.from_port = w.far;
    CHECK_EQ(driver_start(sink), 0);
    CHECK_EQ(driver_start(source), 0);
    for (unsigned i = 0; i < 300; i++) {
        struct outstanding before[2];
        wire_attach(&w, from.q, to.q);
        usleep(i % 5 * 100);
        wire_detach(&w);
        note(&from, &before[0]);
        note(&to, &before[1]);
        usleep(i % 3 * 100);
        check_untouched(&from, &before[0]); /* taken back: not one byte is written any more */
        check_untouched(&to, &before[1]);
    }
    driver_stop(source);
    driver_stop(sink);
    check_flowed(source, sink);
    driver_free(source);
    driver_free(sink);
    wire_end(&w);
    guest_end(&from);
    guest_end(&to);
}
EACH_RING(F20_taken_back_and_lent_again)
