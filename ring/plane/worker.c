/* The worker's thread: it waits on descriptors, serves lanes, and looks at rings where that beats waiting.
 *
 * A round serves every lane that has work for a bounded number of frames; as long as any has work left, the wait does
 * not block. So no lane starves another, and a flood of kicks is one wake-up.
 *
 * Polling. To sleep and be woken takes a driver's kick, the scheduler and us some microseconds each; for a guest that
 * sends again within that time it is cheaper to go on looking. So for a while after the last work (its budget) a worker
 * does not wait: it looks at the rings that are at rest, which is a load each, and now and then (LOOK_NS, GLANCE_NS) at
 * the descriptors, which is a system call. Meanwhile no driver is asked for kicks, or it would pay for what nobody needs.
 *
 * Before it does sleep it asks for them again, ring by ring, each time looking once more after asking: what a driver
 * makes available before it sees the wish is seen here, what comes later is kicked for. That is the same step (arm) with
 * which a ring comes to rest without polling, so nothing is lost between looking and sleeping.
 *
 * The budget adapts. When work comes after a sleep, the time since the work before tells whether looking all the time
 * would have met it. If so, the budget doubles, up to what was allowed; if not, it is halved, and is 0 at last. At 0 the
 * worker sleeps at once, as without polling, and still measures: so an idle guest costs nothing, one that begins to talk
 * fast is polled for soon, and one that sends every now and then does not burn a processor in between.
 *
 * The thread blocks all signals but those a faulty memory access raises (guard.c), never calls Python, and tells what
 * happened through `events` of the lane and its report descriptor.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

#include "coalesce.h"
#include "worker.h"

#define EVENTS_MAX 64
#define KICKLESS_MS 1 /* a queue without a kick descriptor is looked at this often */
#define LOOK_NS 2000  /* between looks at descriptors while ports are among them... */
#define GLANCE_NS 50000 /* ...and while there are only kicks, which tell nothing that the rings do not */
#define STEPS 8       /* the least budget above 0 is this part of the most */

static bool given_up(const struct pump *p)
{
    return __atomic_load_n(&p->given_up, __ATOMIC_ACQUIRE);
}

/* --------------------------------------------------------------------------------------- mailbox */

static void call_once(struct flow_config *flow, bool *due, struct flow_stats *stats)
{
    if (*due && flow->queue && flow->call >= 0) {
        signal_descriptor(flow->call);
        stats->calls++;
    }
    *due = false;
}

static int attach(struct pump *p, struct lane *l)
{
    struct lane_config *c = &l->config;

    if (p->count == LANES_MAX)
        return RING_E_NOMEM;
    p->lanes[p->count++] = l;
    l->kick_from_guest = (struct source){.lane = l, .work = WORK_FROM_GUEST, .kick = true};
    l->kick_to_guest = (struct source){.lane = l, .work = WORK_TO_GUEST, .kick = true};
    l->port_in = (struct source){.lane = l};
    l->port_out = (struct source){.lane = l};
    watch_kick(p, &l->kick_from_guest, c->from_guest.kick);
    watch_kick(p, &l->kick_to_guest, c->to_guest.kick);
    call_once(&c->from_guest, &l->call_from_guest, &l->stats.from_guest);
    call_once(&c->to_guest, &l->call_to_guest, &l->stats.to_guest);
    coalesce_open(l);
    l->timer_from_guest = (struct source){.lane = l, .work = WORK_FROM_GUEST, .timer = true};
    l->timer_to_guest = (struct source){.lane = l, .work = WORK_TO_GUEST, .timer = true};
    watch_timer(p, &l->timer_from_guest, l->coalescing_from_guest.timer);
    watch_timer(p, &l->timer_to_guest, l->coalescing_to_guest.timer);
    l->blocked = l->starved = false;
    l->waiting = l->resting = 0;
    l->work = WORK_FROM_GUEST | WORK_TO_GUEST; /* look once without a kick */
    watch_ports(p, l);
    lane_open(l);
    return RING_OK;
}

static void detach(struct pump *p, struct lane *l)
{
    lane_shut(l);
    coalesce_shut(l);
    look_at_resting(l, true); /* whoever has the ring next finds it as if we had slept */
    lane_report(l);
    unwatch(p, &l->kick_from_guest);
    unwatch(p, &l->kick_to_guest);
    unwatch(p, &l->port_in);
    unwatch(p, &l->port_out);
    unwatch(p, &l->timer_from_guest);
    unwatch(p, &l->timer_to_guest);
    for (uint32_t i = 0; i < p->count; i++)
        if (p->lanes[i] == l) {
            p->lanes[i] = p->lanes[--p->count];
            break;
        }
}

/* -> false when the thread has to end. */
static bool obey(struct pump *p)
{
    bool go_on = true;

    pthread_mutex_lock(&p->lock);
    switch (p->verb) {
    case NOTHING:
    case STARTING:
        break;
    case ATTACH:
        p->status = attach(p, p->subject);
        break;
    case DETACH:
        detach(p, p->subject);
        p->status = RING_OK;
        break;
    case STOP_THREAD:
        go_on = false;
        break;
    }
    __atomic_store_n(&p->verb, NOTHING, __ATOMIC_RELAXED);
    pthread_cond_signal(&p->answered);
    pthread_mutex_unlock(&p->lock);
    return go_on;
}

/* --------------------------------------------------------------------------------------- polling */

static uint64_t now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Work came after a sleep, so long after the work before. */
static void adapt(struct polling *y, uint64_t apart)
{
    uint64_t least = (y->most + STEPS - 1) / STEPS;

    if (y->most == UINT64_MAX)
        return;
    if (apart > y->most)
        y->budget = y->budget / 2 < least ? 0 : y->budget / 2;
    else if (y->budget < least)
        y->budget = least;
    else
        y->budget = y->budget < y->most / 2 ? 2 * y->budget : y->most;
}

/* What became of a round. */
struct outcome {
    bool moved;    /* frames, or chains at least */
    bool left;     /* a lane has work left */
    bool kickless; /* a queue has no kick descriptor */
    bool ports;    /* a lane waits for its port */
};

/* Is it worth looking on, rather than to sleep? */
static bool looks_on(struct pump *p, const struct outcome *round)
{
    struct polling *y = &p->polling;

    if (!y->most)
        return false;
    y->now = now();
    y->patience = round->ports ? LOOK_NS : GLANCE_NS;
    if (round->moved) {
        if (!y->on)
            adapt(y, y->now - y->last_work);
        y->last_work = y->now;
    }
    y->on = p->count && (y->now - y->last_work < y->budget || (y->on && round->left));
    return y->on;
}

/* Ask for kicks where that was saved. -> there is work, it came before. */
static bool ask(struct pump *p)
{
    bool found = false;

    for (uint32_t i = 0; i < p->count; i++) {
        look_at_resting(p->lanes[i], true);
        found |= p->lanes[i]->work != 0;
    }
    return found;
}

/* Are the descriptors to be looked at again? */
static bool descriptors_are_due(const struct pump *p)
{
    const struct polling *y = &p->polling;

    return !y->on || y->now - y->last_wait >= y->patience || given_up(p) ||
           __atomic_load_n(&p->verb, __ATOMIC_RELAXED) != NOTHING;
}

/* ---------------------------------------------------------------------------------------- rounds */

static bool is_kickless(const struct flow_config *flow)
{
    return flow->queue && flow->kick < 0;
}

static void serve(struct pump *p, struct lane *l, struct outcome *round)
{
    bool kickless_from = is_kickless(&l->config.from_guest), kickless_to = is_kickless(&l->config.to_guest);

    if (p->polling.on) {
        look_at_resting(l, false);
    } else {
        if (kickless_from)
            l->work |= WORK_FROM_GUEST;
        if (kickless_to && l->starved)
            l->work |= WORK_TO_GUEST;
    }
    l->looked_at = p->polling.budget > 0;
    if (l->work & WORK_FROM_GUEST)
        round->moved |= serve_from_guest(l);
    if (l->work & WORK_TO_GUEST)
        round->moved |= serve_to_guest(l);
    watch_ports(p, l);
    round->left |= l->work != 0;
    round->kickless |= kickless_from || kickless_to;
    round->ports |= l->port_in.armed || l->port_out.armed;
    lane_report(l);
}

/* Serve every lane that has work. -> how long the next wait may block, in ms; -1: for ever. */
static int round_of_work(struct pump *p)
{
    struct outcome round = {0};

    for (uint32_t i = 0; i < p->count && !given_up(p); i++)
        serve(p, p->lanes[i], &round);
    if (given_up(p) || looks_on(p, &round) || round.left || (p->polling.most && ask(p)))
        return 0;
    return round.kickless ? KICKLESS_MS : -1;
}

/* Wait, and do what is asked for. -> false when the thread has to end. */
static bool wait_for_news(struct pump *p, int timeout_ms)
{
    struct epoll_event ready[EVENTS_MAX];
    bool woken = false;
    int n = epoll_wait(p->epoll, ready, EVENTS_MAX, timeout_ms);

    if (given_up(p))
        return false;
    p->polling.last_wait = p->polling.now;
    for (int i = 0; i < n; i++) {
        const struct source *s = ready[i].data.ptr;
        if (s)
            on_ready(s->lane, s, ready[i].events);
        else
            woken = true;
    }
    if (woken) {
        uint64_t ignored;
        ssize_t r = read(p->wake, &ignored, sizeof(ignored));
        (void)r;
        return obey(p);
    }
    return true;
}

/* -> 0, or an errno: this thread cannot run there. */
static int place(int cpu)
{
    if (cpu < 0)
        return 0;
    size_t number = (size_t)cpu, bytes = CPU_ALLOC_SIZE(number + 1);
    cpu_set_t *only = CPU_ALLOC(number + 1);
    if (!only)
        return ENOMEM;
    CPU_ZERO_S(bytes, only);
    CPU_SET_S(number, bytes, only);
    int error = sched_setaffinity(0, bytes, only) < 0 ? errno : 0; /* 0: this thread; the sandbox allows no other */
    CPU_FREE(only);
    return error;
}

static bool begin(struct pump *p)
{
    int error = place(p->cpu);

    guard_thread();
    pthread_mutex_lock(&p->lock);
    p->status = error;
    __atomic_store_n(&p->verb, NOTHING, __ATOMIC_RELAXED);
    pthread_cond_signal(&p->answered);
    pthread_mutex_unlock(&p->lock);
    return error == 0;
}

void *worker(void *argument)
{
    struct pump *p = argument;
    int timeout_ms = -1;

    if (!begin(p))
        return NULL;
    for (;;) {
        if (descriptors_are_due(p)) {
            if (!wait_for_news(p, timeout_ms))
                return NULL;
        } else {
            relax();
        }
        timeout_ms = round_of_work(p);
    }
}
