/* The switch against load generators, under sanitizers: every frame is stamped, and each that arrives is checked byte
 * by byte and for its order. Each that does not arrive must be counted. Under ThreadSanitizer workers, drivers and the
 * thread that attaches and detaches have nothing between them but the rings' ordering and the doors. */
#define _GNU_SOURCE
#include <pthread.h>

#include "station.h"
#include "../../ring/plane/batch.h"

#define FRAMES 3000
#define SOURCE(...) ((struct driver_config){.role = DRIVER_TRANSMIT, __VA_ARGS__})
#define SINK(ring_size, ...) ((struct driver_config){.role = DRIVER_RECEIVE, .size = ring_size, __VA_ARGS__})

static void check_driver(const struct driver *d)
{
    struct driver_stats s;

    driver_stats_get(d, &s);
    for (int i = 0; i < DRIVER_ERRORS; i++)
        CHECK_EQ(s.errors[i], 0);
}

/* What arrived, right or for somebody else's sink. */
static uint64_t arrived(const struct station *s)
{
    struct driver_stats sink;

    driver_stats_get(s->sink, &sink);
    return sink.frames + sink.foreign;
}

/* Wait until the sink has looked at all that its device says it delivered, and hold the books against each other:
 * `sent` frames were meant for this station. */
static void check_books(struct station *s, uint64_t sent)
{
    struct lane_stats stats;

    lane_stats_get(s->lane, &stats);
    CHECK_EQ(stats.to_guest.frames + station_lost(s), sent);
    for (int i = 0; i < 10000 && arrived(s) < stats.to_guest.frames; i++)
        usleep(1000);
    CHECK_EQ(arrived(s), stats.to_guest.frames);
    CHECK(arrived(s) > 0);
    check_driver(s->sink);
}

static void make_source(struct station *s, struct driver_config c, uint64_t features, uint8_t from, uint8_t to)
{
    c.features = features;
    station_prefix(&c, from, to);
    station_driver(s, &c);
}

static void make_sink(struct station *s, struct driver_config c, uint64_t features, uint8_t from, uint8_t to)
{
    c.features = features;
    station_prefix(&c, from, to);
    station_driver(s, &c);
}

/* One station sends to another, whose rings have another format. */
static void one_way(uint64_t sends, uint64_t gets, struct driver_config source, struct driver_config sink)
{
    struct fabric *f = fabric_new(1);
    struct station a, b;

    source.frames = source.frames ? source.frames : FRAMES;
    station_init(&a, f);
    station_init(&b, f);
    make_source(&a, source, sends, 1, 2);
    make_sink(&b, sink, gets, 1, 2);
    station_attach(&b);
    CHECK_EQ(driver_start(b.sink), 0);
    station_attach(&a);
    CHECK_EQ(driver_start(a.source), 0);
    CHECK_EQ(driver_wait(a.source, 60000), 1);
    station_detach(&a);
    station_detach(&b);
    struct lane_stats stats;
    lane_stats_get(a.lane, &stats);
    CHECK_EQ(stats.from_guest.frames, source.frames);
    check_driver(a.source);
    check_books(&b, source.frames);
    station_end(&a);
    station_end(&b);
    fabric_free(f);
}

static void to_split(uint64_t ring) { one_way(ring | EVENT_IDX, EVENT_IDX, SOURCE(.batch = 32), SINK(256)); }
static void to_packed(uint64_t ring) { one_way(ring | EVENT_IDX, PACKED | EVENT_IDX, SOURCE(.batch = 32), SINK(256)); }
static void by_flags(uint64_t ring) { one_way(ring, ring, SOURCE(.batch = 7), SINK(256)); }
static void busy_poll(uint64_t ring) { one_way(ring, ring, SOURCE(.busy_poll = 1), SINK(256, .busy_poll = 1)); }
static void pieces(uint64_t ring) { one_way(ring, ring, SOURCE(.pieces = 5), SINK(256, .pieces = 3)); }
static void tiny_rings(uint64_t ring) { one_way(ring, ring, SOURCE(.size = 2), SINK(1)); }
static void indirect(uint64_t ring)
{
    one_way(ring | INDIRECT, ring | INDIRECT, SOURCE(.pieces = 7, .indirect = 1), SINK(256, .pieces = 2, .indirect = 1));
}
static void merged(uint64_t ring)
{
    one_way(ring, ring | MRG_RXBUF, SOURCE(.frame_bytes = 9000), SINK(256, .frame_bytes = 1000));
}
static void longest(uint64_t ring)
{
    one_way(ring, ring | MRG_RXBUF, SOURCE(.frames = 200, .frame_bytes = 65550, .size = 8), SINK(256, .frame_bytes = 4000));
}
EACH_RING(to_split)
EACH_RING(to_packed)
EACH_RING(by_flags)
EACH_RING(busy_poll)
EACH_RING(pieces)
EACH_RING(tiny_rings)
EACH_RING(indirect)
EACH_RING(merged)
EACH_RING(longest)

/* Two workers send to one receiveq at once, and a third one gets a copy of each frame. */
static void two_to_one(uint64_t ring)
{
    struct fabric *f = fabric_new(2);
    struct station s[4];

    for (int i = 0; i < 4; i++)
        station_init(&s[i], f);
    make_source(&s[0], SOURCE(.frames = FRAMES, .batch = 8), ring, 1, 255);
    make_source(&s[1], SOURCE(.frames = FRAMES, .batch = 8), ring, 2, 255);
    make_sink(&s[2], SINK(256), ring, 1, 255);
    make_sink(&s[3], SINK(256), ring, 2, 255);
    for (int i = 3; i >= 0; i--)
        station_attach(&s[i]);
    for (int i = 2; i < 4; i++)
        CHECK_EQ(driver_start(s[i].sink), 0);
    for (int i = 0; i < 2; i++)
        CHECK_EQ(driver_start(s[i].source), 0);
    for (int i = 0; i < 2; i++)
        CHECK_EQ(driver_wait(s[i].source, 60000), 1);
    for (int i = 0; i < 4; i++)
        station_detach(&s[i]);
    for (int i = 2; i < 4; i++)
        check_books(&s[i], 2 * FRAMES);
    for (int i = 0; i < 4; i++)
        station_end(&s[i]);
    fabric_free(f);
}
EACH_RING(two_to_one)

/* The receiver is taken back and lent again all the time: its frames are lost then, nobody else's, and none twice. */
static void detached_under_traffic(uint64_t ring)
{
    struct fabric *f = fabric_new(3);
    struct station s[3];

    for (int i = 0; i < 3; i++)
        station_init(&s[i], f);
    make_source(&s[0], SOURCE(.frames = FRAMES, .batch = 3), ring, 1, 255);
    make_sink(&s[1], SINK(256), ring, 1, 255);
    make_sink(&s[2], SINK(256), ring, 1, 255);
    for (int i = 0; i < 3; i++)
        station_attach(&s[i]);
    CHECK_EQ(driver_start(s[1].sink), 0);
    CHECK_EQ(driver_start(s[2].sink), 0);
    CHECK_EQ(driver_start(s[0].source), 0);
    while (!driver_wait(s[0].source, 0)) {
        CHECK_EQ(pump_detach(s[1].pump, s[1].lane, 10000), RING_OK);
        usleep(100);
        CHECK_EQ(lane_configure(s[1].lane, &s[1].config), RING_OK);
        CHECK_EQ(pump_attach(s[1].pump, s[1].lane, 10000), RING_OK);
        usleep(300);
    }
    for (int i = 0; i < 3; i++)
        station_detach(&s[i]);
    check_books(&s[1], FRAMES);
    check_books(&s[2], FRAMES);
    for (int i = 0; i < 3; i++)
        station_end(&s[i]);
    fabric_free(f);
}
EACH_RING(detached_under_traffic)

/* Somebody is stuck inside a receiver's door: its frames are lost as busy, the sender goes on, and so does another
 * receiver. Once the door is left, frames come again. */
static void stuck_inside(uint64_t ring)
{
    struct fabric *f = fabric_new(4);
    struct station s[3];
    struct member_missed missed;
    struct lane_stats stats;

    for (int i = 0; i < 3; i++)
        station_init(&s[i], f);
    make_source(&s[0], SOURCE(.batch = 32), ring, 1, 255); /* until it is stopped */
    make_sink(&s[1], SINK(256), ring, 1, 255);
    make_sink(&s[2], SINK(256), ring, 1, 255);
    for (int i = 0; i < 3; i++)
        station_attach(&s[i]);
    __atomic_store_n(&s[1].member->doors[0].users, 1, __ATOMIC_SEQ_CST);
    CHECK_EQ(driver_start(s[1].sink), 0);
    CHECK_EQ(driver_start(s[2].sink), 0);
    CHECK_EQ(driver_start(s[0].source), 0);
    do
        member_missed(s[1].member, &missed);
    while (missed.busy < FRAMES / 2);
    __atomic_store_n(&s[1].member->doors[0].users, 0, __ATOMIC_SEQ_CST);
    while (arrived(&s[1]) < 100)
        usleep(100);
    driver_stop(s[0].source);
    for (int i = 0; i < 3; i++)
        station_detach(&s[i]);
    lane_stats_get(s[0].lane, &stats);
    check_books(&s[1], stats.from_guest.frames);
    check_books(&s[2], stats.from_guest.frames);
    for (int i = 0; i < 3; i++)
        station_end(&s[i]);
    fabric_free(f);
}
EACH_FORMAT(stuck_inside)

/* ------------------------------------------------------------------------------------------ hostile drivers */

#if defined(__SANITIZE_THREAD__)
#define THREADS_ARE_WATCHED 1
#else
#define THREADS_ARE_WATCHED 0
#endif

struct scribbler {
    struct guest *g;
    int kick;
    pthread_t thread;
    bool stop;
};

/* Make random chains available: any addresses inside and around guest memory, any lengths, any flags. */
static void *scribble(void *argument)
{
    struct scribbler *s = argument;
    struct guest *g = s->g;
    uint64_t random = 7;

    while (!__atomic_load_n(&s->stop, __ATOMIC_RELAXED)) {
        const struct guest_region *r = &g->regions[next_random(&random) % g->count];
        uint64_t addr = r->gpa + next_random(&random) % (r->size + 64);
        uint32_t len = (uint32_t)(next_random(&random) % 2000), at = g->next;
        uint16_t flags = (uint16_t)(next_random(&random) % 8);
        if (at == 0)
            CHECK_EQ(eventfd_write(s->kick, 1), 0);
        if (g->is_packed) {
            const struct packed_desc *to = &g->packed[at];
            uint16_t now = load16(&to->flags);
            if (!(now & PACKED_F_AVAIL) == !(now & PACKED_F_USED))
                guest_put(g, (struct packed_desc){addr, len, (uint16_t)at, flags});
        } else {
            g->desc[at] = (struct vring_desc){addr, len, flags, (uint16_t)(next_random(&random) % (g->config.size + 1))};
            if ((uint16_t)(g->avail->idx - load16(&g->used->idx)) < g->config.size)
                guest_offer(g, (uint16_t)at);
            g->next = (at + 1) % g->config.size;
        }
    }
    return NULL;
}

/* A driver that posts anything as buffers, and one that sends anything, beside two that are honest. */
static void hostile_beside_honest(uint64_t ring)
{
    struct fabric *f = fabric_new(5);
    struct station s[4];
    struct scribbler scribblers[2];
    struct lane_stats gets, sends;

    if (THREADS_ARE_WATCHED) /* a race with memory that such a driver writes at any time is no mistake */
        return fabric_free(f);
    for (int i = 0; i < 4; i++)
        station_init(&s[i], f);
    make_source(&s[0], SOURCE(.frames = FRAMES, .batch = 32), ring, 1, 255);
    make_sink(&s[1], SINK(256), ring, 1, 255);
    make_sink(&s[2], SINK(64), ring | INDIRECT | MRG_RXBUF, 1, 255);
    make_source(&s[3], SOURCE(.batch = 1), ring | INDIRECT, 2, 255);
    for (int i = 0; i < 4; i++)
        station_attach(&s[i]);
    scribblers[0] = (struct scribbler){.g = &s[2].gets, .kick = s[2].kick[1]};
    scribblers[1] = (struct scribbler){.g = &s[3].sends, .kick = s[3].kick[0]};
    for (int i = 0; i < 2; i++)
        CHECK_EQ(pthread_create(&scribblers[i].thread, NULL, scribble, &scribblers[i]), 0);
    CHECK_EQ(driver_start(s[1].sink), 0);
    CHECK_EQ(driver_start(s[0].source), 0);
    CHECK_EQ(driver_wait(s[0].source, 60000), 1);
    do {
        lane_stats_get(s[2].lane, &gets);
        lane_stats_get(s[3].lane, &sends);
    } while ((!gets.to_guest.bad_chains && !s[2].gets.q->broken) ||
             (!sends.from_guest.bad_chains && !s[3].sends.q->broken)); /* it was heard of both */
    for (int i = 0; i < 2; i++) {
        __atomic_store_n(&scribblers[i].stop, true, __ATOMIC_RELAXED);
        CHECK_EQ(pthread_join(scribblers[i].thread, NULL), 0);
    }
    for (int i = 0; i < 4; i++)
        station_detach(&s[i]);
    check_driver(s[0].source);
    check_driver(s[1].sink);
    CHECK(arrived(&s[1]) > 0);
    for (int i = 0; i < 4; i++)
        station_end(&s[i]);
    fabric_free(f);
}
EACH_FORMAT(hostile_beside_honest)
