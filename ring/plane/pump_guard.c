/* The fence around one direction of a lane: the SIGBUS guard, and what follows when guest memory vanishes. */
#include "flow.h"

/* Run one direction under the guard. A function of its own: a jump lands here and meets no changed local. */
static __attribute__((noinline)) void guarded(struct lane *l, void (*serve)(struct lane *))
{
    if (guard_enter()) {
        l->memory_gone = true;
        return;
    }
    serve(l);
    guard_leave();
}

void serve_guarded(struct lane *l, const struct flow_config *flow, struct flow_stats *stats, uint32_t work,
                   void (*direction)(struct lane *))
{
    if (!flow->queue || flow->queue->broken || l->memory_gone) {
        l->work &= ~work;
        return;
    }
    stats->bursts++;
    guarded(l, direction);
    if (l->memory_gone) {
        __atomic_store_n(flow->queue->mem->owner, 1, __ATOMIC_RELAXED);
        vq_break(flow->queue, RING_E_MEMORY_GONE, 0);
        lane_event(l, LANE_MEMORY_GONE);
        l->work = 0;
    }
}
