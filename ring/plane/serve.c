/* Serving one direction of a lane: is there anything to serve, by which ring format, and the fence around it -
 * the SIGBUS guard, and what follows when guest memory vanishes. */
#include "batch.h"

/* A function of its own: a jump lands here and meets no changed local. */
__attribute__((noinline)) bool guarded(struct lane *l, void (*step)(struct lane *))
{
    if (guard_enter())
        return false;
    step(l);
    guard_leave();
    return true;
}

/* Run a step over the lane's own ring. It may find out by itself that memory is gone. */
static void run(struct lane *l, void (*step)(struct lane *))
{
    if (!guarded(l, step))
        l->memory_gone = true;
}

static bool can_serve(const struct lane *l, const struct flow_config *flow)
{
    return flow->queue && !flow->queue->broken && !l->memory_gone;
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

/* The time stamp counter; 0 where there is none that is cheap to read. */
static uint64_t time_stamp(void)
{
#if defined(__x86_64__) || defined(__i386__)
    return __builtin_ia32_rdtsc();
#else
    return 0;
#endif
}

/* A number that changes whenever a chain or a frame is dealt with. */
static uint64_t dealt_with(const struct flow_stats *stats)
{
    uint64_t sum = stats->frames + stats->bad_chains;

    for (int i = 0; i < DROP_REASONS; i++)
        sum += stats->dropped[i];
    return sum;
}

/* From the guest to a switch: fabric.c tells the steps. */
static void forward(struct lane *l, const struct directions *steps)
{
    for (int i = 0; i < BURSTS && l->work & WORK_FROM_GUEST; i++) {
        run(l, steps->gather);
        if (l->memory_gone)
            fabric_discard(l->batch);
        else
            l->memory_gone = !fabric_deliver(l);
        if (l->memory_gone)
            return;
        run(l, steps->settle);
    }
}

/* What is measured of a turn: it counts if something was done in it. */
struct turn {
    uint64_t dealt_with, begun;
};

static struct turn begin_turn(const struct flow_stats *stats)
{
    return (struct turn){dealt_with(stats), time_stamp()};
}

/* -> something was done */
static bool end_turn(struct flow_stats *stats, const struct turn *t)
{
    if (dealt_with(stats) == t->dealt_with)
        return false;
    stats->cycles += time_stamp() - t->begun;
    return true;
}

static bool serve_uplink(struct lane *l)
{
    struct turn t = begin_turn(&l->stats.from_guest);

    uplink_read(l);
    return end_turn(&l->stats.from_guest, &t);
}

static bool serve(struct lane *l, struct vq *q, struct flow_stats *stats, void (*direction)(struct lane *),
                  uint32_t written)
{
    struct turn t = begin_turn(stats);

    stats->bursts++;
    if (l->config.member)
        forward(l, directions_of(q));
    else
        run(l, direction);
    after(l, q, written);
    return end_turn(stats, &t);
}

bool serve_from_guest(struct lane *l)
{
    const struct flow_config *flow = &l->config.from_guest;

    l->resting &= ~(uint32_t)WORK_FROM_GUEST;
    if (l->blocked || l->waiting & WORK_FROM_GUEST || !can_serve(l, flow)) {
        l->work &= ~(uint32_t)WORK_FROM_GUEST;
        return false;
    }
    return serve(l, flow->queue, &l->stats.from_guest, directions_of(flow->queue)->from_guest, 0);
}

bool serve_to_guest(struct lane *l)
{
    const struct flow_config *flow = &l->config.to_guest;

    l->resting &= ~(uint32_t)WORK_TO_GUEST;
    if (l->config.member && l->config.from_port >= 0 && !l->port_gone)
        return serve_uplink(l);
    if (l->config.member || !flow->enabled || l->config.from_port < 0 || l->waiting & WORK_TO_GUEST || !can_serve(l, flow)) {
        l->work &= ~(uint32_t)WORK_TO_GUEST;
        return false;
    }
    return serve(l, flow->queue, &l->stats.to_guest, directions_of(flow->queue)->to_guest,
                 sizeof(l->pieces) / sizeof(*l->pieces));
}

static __attribute__((noinline)) void guarded_look(struct lane *l, const struct vq *q, uint32_t direction, bool ask)
{
    if (guard_enter()) {
        l->memory_gone = true;
        return;
    }
    directions_of(q)->look(l, direction, ask);
    guard_leave();
}

void look_at_resting(struct lane *l, bool ask)
{
    for (uint32_t direction = WORK_FROM_GUEST; direction <= WORK_TO_GUEST; direction <<= 1) {
        const struct flow_config *flow = direction == WORK_FROM_GUEST ? &l->config.from_guest : &l->config.to_guest;
        if (!(l->resting & direction) || !can_serve(l, flow))
            continue;
        guarded_look(l, flow->queue, direction, ask);
        after(l, flow->queue, 0);
    }
}
