/* Stations at a switch: guests on the heap (guest.h), each with a worker and a load generator at either end. */
#pragma once

#include <sys/eventfd.h>
#include <unistd.h>

#include "load.h"
#include "../../ring/plane/include.h"

struct station {
    struct guest sends, gets;
    struct driver *source, *sink;
    int report, kick[2], call[2], err[2]; /* of from_guest, to_guest */
    struct pump *pump;
    struct lane *lane;
    struct member *member;
    struct lane_config config;
};

/* The address of station n. */
static inline void station_mac(uint8_t *mac, uint8_t n)
{
    memcpy(mac, (uint8_t[]){2, 0, 0, 0, 0, n}, 6);
}

/* What frames from station `from` to station `to` (255: all) begin with. */
static inline void station_prefix(struct driver_config *c, uint8_t from, uint8_t to)
{
    if (to == 255)
        memset(c->prefix, 0xff, 6);
    else
        station_mac(c->prefix, to);
    station_mac(c->prefix + 6, from);
    c->prefix[12] = 0x88; /* IEEE 802: local experiments */
    c->prefix[13] = 0xB5;
}

static inline void station_init(struct station *s, struct fabric *f)
{
    *s = (struct station){.report = eventfd(0, EFD_NONBLOCK)};
    for (int i = 0; i < 2; i++) {
        s->kick[i] = eventfd(0, EFD_NONBLOCK);
        s->call[i] = eventfd(0, EFD_NONBLOCK);
        s->err[i] = eventfd(0, EFD_NONBLOCK);
    }
    s->member = fabric_join(f, 0);
    s->config = (struct lane_config){
        .from_guest = {.enabled = 1, .kick = s->kick[0], .call = s->call[0], .err = s->err[0]},
        .to_guest = {.enabled = 1, .kick = s->kick[1], .call = s->call[1], .err = s->err[1]},
        .member = s->member,
        .to_port = -1,
        .from_port = -1,
        .max_frame = 65550,
        .gso_size_min = 48,
    };
    CHECK_EQ(guard_install(), RING_OK);
    s->pump = pump_new(&(struct pump_config){.cpu = -1});
    s->lane = lane_new(s->report);
    CHECK(s->member && s->pump && s->lane);
}

/* A load generator on the transmitq or the receiveq of the station; the prefix is the caller's. */
static inline struct driver *station_driver(struct station *s, struct driver_config *c)
{
    bool sends = c->role == DRIVER_TRANSMIT;
    struct guest *g = sends ? &s->sends : &s->gets;
    struct driver *d = driver_on(g, s->kick[!sends], s->call[!sends], c);

    s->config.features = c->features; /* both rings of a device have the same */
    *(sends ? &s->source : &s->sink) = d;
    (sends ? &s->config.from_guest : &s->config.to_guest)->queue = g->q;
    return d;
}

static inline void station_attach(struct station *s)
{
    s->config.door = s->config.to_guest.queue ? 0 : -1;
    member_spread(s->member, s->config.to_guest.queue ? 1 : 0);
    CHECK_EQ(lane_configure(s->lane, &s->config), RING_OK);
    CHECK_EQ(pump_attach(s->pump, s->lane, 10000), RING_OK);
}

static inline void station_detach(struct station *s)
{
    CHECK_EQ(pump_detach(s->pump, s->lane, 10000), RING_OK);
}

/* Everything of it must be detached; guests without a queue were never started. */
static inline void station_end(struct station *s)
{
    if (s->source)
        driver_free(s->source);
    if (s->sink)
        driver_free(s->sink);
    pump_free(s->pump);
    lane_free(s->lane);
    fabric_leave(s->member);
    if (s->config.from_guest.queue)
        guest_end(&s->sends);
    if (s->config.to_guest.queue)
        guest_end(&s->gets);
    close(s->report);
    for (int i = 0; i < 2; i++) {
        close(s->kick[i]);
        close(s->call[i]);
        close(s->err[i]);
    }
}

/* What became of the frames for this station. */
static inline uint64_t station_lost(const struct station *s)
{
    struct lane_stats stats;
    struct member_missed missed;
    uint64_t lost = 0;

    lane_stats_get(s->lane, &stats);
    member_missed(s->member, &missed);
    for (int i = 0; i < DROP_REASONS; i++)
        lost += stats.to_guest.dropped[i];
    return lost + missed.busy + missed.stopped;
}
