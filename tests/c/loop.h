/* A load generator that sends, one that receives, and a pump between them. */
#pragma once

#include "load.h"
#include "wire.h"

#if defined(__SANITIZE_THREAD__)
#define FRAMES 500 /* several times round every ring: what it looks for does not take a coincidence */
#else
#define FRAMES 2000
#endif

static inline void check_stats(const struct driver *d, uint64_t frames)
{
    struct driver_stats s;

    driver_stats_get(d, &s);
    for (int i = 0; i < DRIVER_ERRORS; i++)
        CHECK_EQ(s.errors[i], 0);
    CHECK_EQ(s.lost, 0);
    CHECK_EQ(s.frames, frames);
}

/* Source and sink, stopped at any time: frames have arrived, and nothing of them is wrong. */
static inline void check_flowed(struct driver *source, struct driver *sink)
{
    struct driver_stats sent, arrived;

    driver_stats_get(source, &sent);
    driver_stats_get(sink, &arrived);
    for (int i = 0; i < DRIVER_ERRORS; i++)
        CHECK_EQ(sent.errors[i] + arrived.errors[i], 0);
    CHECK_EQ(arrived.lost, 0);
    CHECK(arrived.frames > 0);
}

/* All frames of a source to a sink, through a port that leads from one to the other. */
static inline void loop_on(const struct pump_config *worker, uint64_t features, struct driver_config transmit,
                           struct driver_config receive)
{
    struct guest from, to;
    struct wire w;

    wire_init_on(&w, features, worker);
    uint64_t frames = transmit.frames ? transmit.frames : FRAMES;
    transmit.frames = receive.frames = frames;
    transmit.features = receive.features = features;
    struct driver *source = driver_on(&from, w.kick[0], w.call[0], &transmit);
    struct driver *sink = driver_on(&to, w.kick[1], w.call[1], &receive);
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

static inline void loop(uint64_t features, struct driver_config transmit, struct driver_config receive)
{
    loop_on(&(struct pump_config){.cpu = -1}, features, transmit, receive);
}
