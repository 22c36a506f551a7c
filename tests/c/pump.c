/* The pump against the load generator, both under sanitizers: every frame goes out through one end of a socket
 * pair, comes back through the other, and is checked byte by byte. Under ThreadSanitizer the two threads have
 * nothing but the ring's own ordering between them: what it does not order is reported as a race. */
#define _GNU_SOURCE
#include "wire.h"
#include "../../ring/core/driver_include.h"

#define MRG_RXBUF (1ull << 15)
#define FRAMES 3000

/* The load generator on a queue of its own; what `c` leaves out is filled in. */
static struct driver *driver_on(struct guest *g, const struct wire *w, int side, struct driver_config *c)
{
    uint8_t *area;

    c->size = c->size ? c->size : 64;
    c->frame_bytes = c->frame_bytes ? c->frame_bytes : 1514;
    c->batch = c->batch ? c->batch : 16;
    c->pieces = c->pieces ? c->pieces : 1;
    c->prefix_bytes = 14;
    guest_init(g, c->size, c->features, 0xFFF0);
    c->area_gpa = guest_block(g, driver_area_bytes(c), &area);
    c->area = area;
    c->base = 0xFFF0;
    c->desc = (void *)g->desc;
    c->avail = (void *)g->avail;
    c->used = (void *)g->used;
    c->kick = w->kick[side];
    c->call = w->call[side];
    c->stall_ms = 20000;
    c->full = 1;
    guest_start(g);
    struct driver *d = driver_new(c);
    CHECK(d);
    return d;
}

static void check_stats(const struct driver *d, uint64_t frames)
{
    struct driver_stats s;

    driver_stats_get(d, &s);
    for (int i = 0; i < DRIVER_ERRORS; i++)
        CHECK_EQ(s.errors[i], 0);
    CHECK_EQ(s.lost, 0);
    CHECK_EQ(s.frames, frames);
}

static void loop(uint64_t features, struct driver_config transmit, struct driver_config receive)
{
    struct guest from, to;
    struct wire w;

    wire_init(&w, features);
    uint64_t frames = transmit.frames ? transmit.frames : FRAMES;
    transmit.frames = receive.frames = frames;
    transmit.features = receive.features = features;
    struct driver *source = driver_on(&from, &w, 0, &transmit), *sink = driver_on(&to, &w, 1, &receive);
    w.config.from_port = w.far;
    wire_attach(&w, from.q, to.q);
    CHECK_EQ(driver_start(sink), 0);
    CHECK_EQ(driver_start(source), 0);
    int stopped = driver_wait(source, 60000) + driver_wait(sink, 60000);
    wire_detach(&w);
    driver_stop(source);
    driver_stop(sink);
    CHECK_EQ(stopped, 2);
    check_stats(source, frames);
    check_stats(sink, frames);
    struct lane_stats stats;
    lane_stats_get(w.lane, &stats);
    CHECK_EQ(stats.from_guest.frames, frames);
    CHECK_EQ(stats.to_guest.frames, frames);
    for (int i = 0; i < DROP_REASONS; i++)
        CHECK_EQ(stats.from_guest.dropped[i] + stats.to_guest.dropped[i], 0);
    driver_free(source);
    driver_free(sink);
    wire_end(&w);
    guest_end(&from);
    guest_end(&to);
}

#define SOURCE(...) ((struct driver_config){.role = DRIVER_TRANSMIT, __VA_ARGS__})
#define SINK(...) ((struct driver_config){.role = DRIVER_RECEIVE, __VA_ARGS__})

TEST(plain) { loop(0, SOURCE(.batch = 64), SINK(.batch = 64)); }
TEST(event_idx) { loop(EVENT_IDX, SOURCE(.batch = 64), SINK(.batch = 64)); }
TEST(one_by_one) { loop(EVENT_IDX, SOURCE(.batch = 1), SINK(.batch = 1)); }
TEST(one_by_one_by_flags) { loop(0, SOURCE(.batch = 1), SINK(.batch = 1)); }
TEST(busy_poll) { loop(EVENT_IDX, SOURCE(.busy_poll = 1), SINK(.busy_poll = 1)); }
TEST(pieces) { loop(EVENT_IDX, SOURCE(.pieces = 5), SINK(.pieces = 3)); }
TEST(indirect) { loop(EVENT_IDX | INDIRECT, SOURCE(.pieces = 7, .indirect = 1), SINK(.pieces = 2, .indirect = 1)); }
TEST(mergeable) { loop(EVENT_IDX | MRG_RXBUF, SOURCE(.frame_bytes = 9000), SINK(.frame_bytes = 1000)); }
TEST(mergeable_by_flags) { loop(MRG_RXBUF, SOURCE(.frame_bytes = 4000), SINK(.frame_bytes = 500, .pieces = 2)); }
TEST(tiny_rings) { loop(EVENT_IDX, SOURCE(.size = 2), SINK(.size = 1)); }
TEST(longest_frames)
{
    loop(EVENT_IDX | MRG_RXBUF, SOURCE(.frames = 300, .frame_bytes = 65550, .size = 8), SINK(.frame_bytes = 4000));
}

TEST(F20_taken_back_and_lent_again)
{
    struct guest from, to;
    struct wire w;
    uint64_t features = EVENT_IDX | MRG_RXBUF;
    struct driver_config transmit = SOURCE(.features = features, .batch = 3), receive = SINK(.features = features);

    wire_init(&w, features);
    struct driver *source = driver_on(&from, &w, 0, &transmit), *sink = driver_on(&to, &w, 1, &receive);
    w.config.from_port = w.far;
    CHECK_EQ(driver_start(sink), 0);
    CHECK_EQ(driver_start(source), 0);
    for (unsigned i = 0; i < 500; i++) {
        wire_attach(&w, from.q, to.q);
        usleep(i % 5 * 100);
        wire_detach(&w);
        uint16_t used[2] = {load16(&from.used->idx), load16(&to.used->idx)};
        usleep(i % 3 * 100);
        CHECK_EQ(load16(&from.used->idx), used[0]); /* taken back: not one byte is written any more */
        CHECK_EQ(load16(&to.used->idx), used[1]);
    }
    driver_stop(source);
    driver_stop(sink);
    struct driver_stats sent, arrived;
    driver_stats_get(source, &sent);
    driver_stats_get(sink, &arrived);
    for (int i = 0; i < DRIVER_ERRORS; i++)
        CHECK_EQ(sent.errors[i] + arrived.errors[i], 0);
    CHECK_EQ(arrived.lost, 0);
    CHECK(arrived.frames > 0);
    driver_free(source);
    driver_free(sink);
    wire_end(&w);
    guest_end(&from);
    guest_end(&to);
}
