/* Workers that poll, and several of them: frames go round as in pump.c, and none waits for a notification that was saved
 * when it was needed. The drivers of most tests here have one chain at a time and sleep until they are called, so the
 * worker goes to sleep, or nearly, for each frame. */
#define _GNU_SOURCE
#include "loop.h"

/* Ping-pong between the worker and two drivers that have one buffer each. */
static void one_chain_at_a_time(uint64_t ring, uint32_t poll_us)
{
    const struct pump_config worker = {.cpu = -1, .poll_us = poll_us};

    loop_on(&worker, ring, SOURCE(.size = 1), SINK(.size = 1));
    loop_on(&worker, ring | EVENT_IDX, SOURCE(.size = 1), SINK(.size = 1));
}

/* About as long as a frame takes, so that looking ends and sleeping begins at any moment of it; and longer. */
static void polling_for_1_us(uint64_t ring) { one_chain_at_a_time(ring, 1); }
static void polling_for_20_us(uint64_t ring) { one_chain_at_a_time(ring, 20); }
static void polling_for_100_us(uint64_t ring) { one_chain_at_a_time(ring, 100); }
static void polling_for_5_ms(uint64_t ring) { one_chain_at_a_time(ring, 5000); }
static void polling_always(uint64_t ring) { one_chain_at_a_time(ring, POLL_ALWAYS); }
EACH_RING(polling_for_1_us)
EACH_RING(polling_for_20_us)
EACH_RING(polling_for_100_us)
EACH_RING(polling_for_5_ms)
EACH_RING(polling_always)

/* Two chains of room are too few for a frame: it is held until the driver has posted more. */
static void polling_for_buffers(uint64_t ring)
{
    const struct pump_config worker = {.cpu = -1, .poll_us = 20};

    loop_on(&worker, ring | EVENT_IDX | MRG_RXBUF, SOURCE(.frames = 500, .size = 4, .frame_bytes = 9000),
            SINK(.size = 32, .frame_bytes = 400));
    loop_on(&worker, ring | MRG_RXBUF, SOURCE(.frames = 500, .size = 4, .frame_bytes = 9000),
            SINK(.size = 32, .frame_bytes = 400));
}
EACH_RING(polling_for_buffers)

/* Taken back and lent again while the worker looks at the rings. */
static void taken_back_while_polling(uint64_t ring)
{
    struct guest from, to;
    struct wire w;
    uint64_t features = ring | EVENT_IDX | MRG_RXBUF;
    struct driver_config transmit = SOURCE(.features = features), receive = SINK(.features = features);

    wire_init_on(&w, features, &(struct pump_config){.cpu = -1, .poll_us = POLL_ALWAYS});
    struct driver *source = driver_on(&from, w.kick[0], w.call[0], &transmit);
    struct driver *sink = driver_on(&to, w.kick[1], w.call[1], &receive);
    w.config.from_port = w.far;
    CHECK_EQ(driver_start(sink), 0);
    CHECK_EQ(driver_start(source), 0);
    for (unsigned i = 0; i < 100; i++) {
        wire_attach(&w, from.q, to.q);
        usleep(i % 5 * 100);
        wire_detach(&w);
        usleep(i % 3 * 100);
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
EACH_RING(taken_back_while_polling)

/* One worker sends what the guest sends, another brings what comes: they share nothing but the port. */
static void directions_apart(uint64_t ring, uint32_t poll_us)
{
    struct guest from, to;
    struct wire w;
    uint64_t features = ring | EVENT_IDX;
    struct pump_config worker = {.cpu = -1, .poll_us = poll_us};
    struct driver_config transmit = SOURCE(.features = features, .frames = FRAMES);
    struct driver_config receive = SINK(.features = features, .frames = FRAMES);

    wire_init_on(&w, features, &worker);
    struct pump *other = pump_new(&worker);
    struct lane *inward = lane_new(w.report);
    CHECK(other && inward);
    struct driver *source = driver_on(&from, w.kick[0], w.call[0], &transmit);
    struct driver *sink = driver_on(&to, w.kick[1], w.call[1], &receive);
    struct lane_config config = w.config;
    config.to_guest.queue = to.q;
    config.from_guest = (struct flow_config){.kick = -1, .call = -1, .err = -1};
    config.from_port = w.far;
    config.to_port = -1;
    CHECK_EQ(lane_configure(inward, &config), RING_OK);
    CHECK_EQ(pump_attach(other, inward, 10000), RING_OK);
    w.config.from_port = -1;
    wire_attach(&w, from.q, NULL);
    CHECK_EQ(driver_start(sink), 0);
    CHECK_EQ(driver_start(source), 0);
    CHECK_EQ(driver_wait(source, 60000) + driver_wait(sink, 60000), 2);
    wire_detach(&w);
    CHECK_EQ(pump_detach(other, inward, 10000), RING_OK);
    check_stats(source, FRAMES);
    check_stats(sink, FRAMES);
    driver_free(source);
    driver_free(sink);
    pump_free(other);
    lane_free(inward);
    wire_end(&w);
    guest_end(&from);
    guest_end(&to);
}
static void apart(uint64_t ring) { directions_apart(ring, 0); }
static void apart_and_polling(uint64_t ring) { directions_apart(ring, 20); }
EACH_RING(apart)
EACH_RING(apart_and_polling)
