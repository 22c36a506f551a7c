/* Notification coalescing (virtio 1.2, 5.1.6.5.9; by queue: virtio 1.3).
 *
 * Theory of operation
 * -------------------
 * A call is due once so many packets were published, or so much time has passed since the first of them. Until then the
 * ring is not asked whether its driver wants one (RING(decide)): that question is about all that was published since it
 * was asked last, so it may be asked late, and the driver's suppression has the last word, whenever that is.
 *
 * The time runs in a timer descriptor of the queue, which the worker that has the lane waits for as for kicks. Whoever
 * publishes sets it, with the first packet of a period: at a receiveq of a switch that is a sender's worker, inside the
 * door. When it goes off, the lane's own worker enters the door to ask and to call. A period that ended by its packets
 * leaves its timer running; the next one sets it anew, and if it goes off in between there is nothing to be told.
 *
 * A ring that is full of what its driver was not told of is told at once: nothing more could come. When the lane is
 * taken back, all that was put off is told before, so that nothing is called for a queue that was stopped, and settings
 * that change are obeyed at once.
 */
#include <sys/timerfd.h>
#include <unistd.h>

#include "batch.h"
#include "coalesce.h"

#define AGAIN_US 100 /* the door is taken when the timer goes off */

static void set_timer(int timer, uint64_t us)
{
    struct itimerspec once = {.it_value = {.tv_sec = (time_t)(us / 1000000), .tv_nsec = (long)(us % 1000000) * 1000}};

    timerfd_settime(timer, 0, &once, NULL);
}

/* Slots that were published and not asked about. */
static uint32_t untold(const struct vq *q)
{
    return q->is_packed ? q->undecided : (uint16_t)(q->published - q->decided);
}

bool coalesce_puts_off(struct coalescing *c, const struct flow_config *flow, const struct flow_stats *stats)
{
    uint32_t waiting = untold(flow->queue);

    if (!waiting)
        return true;
    if (c->timer < 0 || stats->frames - c->told >= flow->call_packets || waiting >= flow->queue->size) {
        c->told = stats->frames;
        c->running = false;
        return false;
    }
    if (!c->running)
        set_timer(c->timer, flow->call_usecs);
    c->running = true;
    return true;
}

static void open_timer(struct coalescing *c, const struct flow_config *flow, const struct flow_stats *stats)
{
    if (flow->call_packets && c->timer < 0)
        c->timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC); /* none: calls come at once */
    c->told = stats->frames;
    c->running = false;
}

void coalesce_open(struct lane *l)
{
    open_timer(&l->coalescing_from_guest, &l->config.from_guest, &l->stats.from_guest);
    open_timer(&l->coalescing_to_guest, &l->config.to_guest, &l->stats.to_guest);
}

/* Ask the driver, and call it if it wants that. For whoever has the queue. */
static void tell(struct lane *l, uint32_t direction)
{
    bool sent = direction == WORK_FROM_GUEST;
    const struct flow_config *flow = sent ? &l->config.from_guest : &l->config.to_guest;
    struct coalescing *c = coalescing_of(l, flow);
    struct vq *q = flow->queue;

    if (!c->running || !q || q->broken || l->memory_gone)
        return;
    c->running = false;
    c->told = (sent ? &l->stats.from_guest : &l->stats.to_guest)->frames;
    if (!guarded(l, sent ? directions_of(q)->tell_from_guest : directions_of(q)->tell_to_guest))
        lane_event(l, vq_vanished(q, NULL, 0) == RING_E_LOG_GONE ? LANE_LOG_GONE : LANE_MEMORY_GONE);
}

void coalesce_shut(struct lane *l)
{
    tell(l, WORK_FROM_GUEST);
    tell(l, WORK_TO_GUEST);
}

void coalesce_free(struct lane *l)
{
    if (l->coalescing_from_guest.timer >= 0)
        close(l->coalescing_from_guest.timer);
    if (l->coalescing_to_guest.timer >= 0)
        close(l->coalescing_to_guest.timer);
}

void coalesce_due(struct lane *l, uint32_t direction)
{
    const struct lane_config *c = &l->config;

    if (direction == WORK_FROM_GUEST || !c->member || c->door < 0) {
        tell(l, direction);
        return;
    }
    struct door *d = &c->member->doors[c->door];
    if (!door_enter(d)) { /* whoever is inside publishes, but perhaps too little */
        set_timer(l->coalescing_to_guest.timer, AGAIN_US);
        return;
    }
    tell(l, direction);
    door_leave(d);
}
