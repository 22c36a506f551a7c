/*
 * What both directions of the fd pump need: making used entries visible, counting what is lost, telling
 * the end of a port from the loss of a frame. Inlined into pump_from_guest.c and pump_to_guest.c, together
 * with the ring's micro-steps.
 */
#pragma once

#include <errno.h>

#include "../core/split.inl"
#include "lane.h"

/* A burst ends, and becomes visible, after so many frames; a direction yields after BURSTS of them. */
#define BURST_FRAMES 64
#define BURSTS 4

/* Run one direction of a lane under the guard, if its queue can be served at all. `work` is its bit, cleared
 * when not. Guest memory that vanishes sets memory_gone and is reported. */
void serve_guarded(struct lane *l, const struct flow_config *flow, struct flow_stats *stats, uint32_t work,
                   void (*direction)(struct lane *));

static inline void break_queue(struct lane *l, const struct flow_config *flow, uint32_t event)
{
    lane_event(l, event);
    if (flow->err >= 0)
        signal_descriptor(flow->err);
}

/* Make what was pushed visible, and notify the driver if it asked for that. */
static inline void publish(struct vq *q, const struct flow_config *flow, struct flow_stats *stats)
{
    if (q->next_used == q->published)
        return;
    split_publish(q);
    if (call_is_due(split_decide(q))) {
        if (flow->call >= 0) {
            signal_descriptor(flow->call);
            stats->calls++;
        }
    } else {
        stats->calls_saved++;
    }
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

static inline void count_drop(struct flow_stats *stats, enum drop_reason why)
{
    stats->dropped[why]++;
}
