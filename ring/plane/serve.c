/* Serving one direction of a lane: is there anything to serve, by which ring format, and the fence around it -
 * the SIGBUS guard, and what follows when guest memory vanishes. */
#include "lane.h"

/* Run one direction under the guard. A function of its own: a jump lands here and meets no changed local. */
static __attribute__((noinline)) void guarded(struct lane *l, void (*direction)(struct lane *))
{
    if (guard_enter()) {
        l->memory_gone = true;
        return;
    }
    direction(l);
    guard_leave();
}

static bool can_serve(const struct lane *l, const struct flow_config *flow)
{
    return flow->queue && !flow->queue->broken && !l->memory_gone;
}

static const struct directions *directions_of(const struct vq *q)
{
    return q->is_packed ? &packed_directions : &split_directions;
}

/* `written`: how many of the lane's pieces may name buffers that were written. */
static void after(struct lane *l, struct vq *q, uint32_t written)
{
    if (!l->memory_gone)
        return;
    if (vq_vanished(q, l->pieces, written) == RING_E_LOG_GONE) {
        lane_event(l, LANE_LOG_GONE);
    } else {
        __atomic_store_n(q->mem->owner, 1, __ATOMIC_RELAXED);
        lane_event(l, LANE_MEMORY_GONE);
    }
    l->work = 0;
}

void serve_from_guest(struct lane *l)
{
    const struct flow_config *flow = &l->config.from_guest;

    if (l->blocked || l->waiting & WORK_FROM_GUEST || !can_serve(l, flow)) {
        l->work &= ~(uint32_t)WORK_FROM_GUEST;
        return;
    }
    l->stats.from_guest.bursts++;
    guarded(l, directions_of(flow->queue)->from_guest);
    after(l, flow->queue, 0);
}

void serve_to_guest(struct lane *l)
{
    const struct flow_config *flow = &l->config.to_guest;

    if (!flow->enabled || l->config.from_port < 0 || l->waiting & WORK_TO_GUEST || !can_serve(l, flow)) {
        l->work &= ~(uint32_t)WORK_TO_GUEST;
        return;
    }
    l->stats.to_guest.bursts++;
    guarded(l, directions_of(flow->queue)->to_guest);
    after(l, flow->queue, sizeof(l->pieces) / sizeof(*l->pieces));
}
