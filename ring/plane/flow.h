/*
 * What both directions of the fd pump need: making used entries visible, counting what is lost, telling
 * the end of a port from the loss of a frame. Part of pump_split.c and pump_packed.c, each of which has said
 * which micro-steps RING(verb) means; and of uplink.c, which has no rings.
 */
#pragma once

#include <errno.h>
#include <sys/uio.h>
#include <unistd.h>

#include "coalesce.h"
#include "lane.h"

static inline void break_queue(struct lane *l, const struct flow_config *flow, uint32_t event)
{
    lane_event(l, event);
    if (flow->err >= 0)
        signal_descriptor(flow->err);
}

#ifdef RING
/* Notify the driver of what was made visible, if it asked for that. */
static inline void tell(struct vq *q, const struct flow_config *flow, struct flow_stats *stats)
{
    int reason = RING(decide)(q);
    if (reason == CALL_NOTHING_NEW)
        return;
    if (call_is_due(reason)) {
        if (flow->call >= 0) {
            signal_descriptor(flow->call);
            stats->calls++;
        }
    } else {
        stats->calls_saved++;
    }
}

/* Make what was pushed visible, and notify the driver, now or later. */
static inline void publish(struct lane *l, struct vq *q, const struct flow_config *flow, struct flow_stats *stats)
{
    RING(publish)(q);
    if (unlikely(flow->call_packets) && coalesce_puts_off(coalescing_of(l, flow), flow, stats))
        return;
    tell(q, flow, stats);
}

/* struct directions, tell_from_guest and tell_to_guest. */
static void tell_from_guest(struct lane *l)
{
    tell(l->config.from_guest.queue, &l->config.from_guest, &l->stats.from_guest);
}

static void tell_to_guest(struct lane *l)
{
    tell(l->config.to_guest.queue, &l->config.to_guest, &l->stats.to_guest);
}

/* There is nothing to do in this direction. A worker that will not look at the ring asks for a kick; what the driver has
 * made available meanwhile is seen now, or it kicks. -> false: there is more after all. */
static __attribute__((noinline)) bool come_to_rest(struct lane *l, struct vq *q, uint32_t direction)
{
    if (!l->looked_at && RING(arm)(q) > 0) {
        RING(disarm)(q);
        return false;
    }
    l->resting |= direction;
    return true;
}

/* struct directions, look. */
static void look(struct lane *l, uint32_t direction, bool ask)
{
    bool sends = direction == WORK_FROM_GUEST;
    const struct flow_config *flow = sends ? &l->config.from_guest : &l->config.to_guest;
    struct vq *q = flow->queue;
    int more;

    if (ask && q->kicks_wanted)
        return;
    more = ask ? RING(arm)(q) : RING(look)(q);
    if (more > 0)
        l->work |= direction;
    if (q->broken)
        break_queue(l, flow, sends ? LANE_FROM_GUEST_BROKEN : LANE_TO_GUEST_BROKEN);
}
#endif

/* Have what a frame begins with on its way to the cache, the net header and the Ethernet header behind it, often two
 * lines: the driver had them last. `at` may be anything. */
INLINED void fetch_to_read(const uint8_t *at)
{
    __builtin_prefetch(at);
    __builtin_prefetch((const void *)((uintptr_t)at + NET_HEADER + ETHERNET_HEADER - 1));
}

/* The same for what will be written. */
INLINED void fetch_to_write(const uint8_t *at)
{
#if defined(__x86_64__)
    __asm__ volatile("prefetchw %0" :: "m"(*at));
    __asm__ volatile("prefetchw %0" :: "m"(*(const uint8_t *)((uintptr_t)at + NET_HEADER + ETHERNET_HEADER - 1)));
#else
    __builtin_prefetch(at, 1);
    __builtin_prefetch((const void *)((uintptr_t)at + NET_HEADER + ETHERNET_HEADER - 1), 1);
#endif
}

static inline void port_lost(struct lane *l)
{
    l->port_gone = true;
    lane_event(l, LANE_PORT_GONE);
}

/* Is this errno the end of the port, rather than of one frame? */
static inline bool port_is_dead(int error)
{
    return error == EBADFD || error == EBADF || error == EPIPE || error == ECONNRESET || error == ENOTCONN ||
           error == ECONNREFUSED || error == ENODEV || error == ENXIO;
}

/* A chain of the guest's broke a rule. */
static inline void count_bad_chain(struct lane *l, struct flow_stats *stats, int status)
{
    stats->bad_chains++;
    if (status == RING_E_DENIED)
        lane_event(l, LANE_DENIED);
}

static inline void count_drop(struct flow_stats *stats, enum drop_reason why)
{
    stats->dropped[why]++;
}
