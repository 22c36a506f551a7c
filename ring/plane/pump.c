/* The worker: one thread that waits on descriptors and serves lanes.
 *
 * Everything a lane has belongs to the worker while it is attached, and to the caller while it is not; no
 * field is locked. Hand-over goes through one mailbox: the caller puts a command in, wakes the worker and
 * waits; the worker takes it between two bursts, where it holds nothing - no popped chain, no translation -
 * and answers. So "paused" is simply "detached", and it takes no longer than a burst.
 *
 * Waiting is level triggered for ports (what is left over is reported again) and edge triggered for kicks:
 * each write of the driver wakes us once, and the eventfd never has to be read. A round serves every lane
 * that has work for a bounded number of frames; as long as any has work left, the wait does not block. So
 * no lane starves another, and a flood of kicks is one wake-up.
 *
 * The thread blocks all signals but those a faulty memory access raises (guard.c), never calls Python, and
 * tells what happened through `events` of the lane and one eventfd.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "lane.h"

#define LANES_MAX 512
#define EVENTS_MAX 64
#define SLICES 10   /* of the time a worker is given for a command */
#define POLL_MS 1 /* a queue without a kick descriptor is looked at this often */

enum verb { NOTHING, ATTACH, DETACH, STOP_THREAD };

struct pump {
    pthread_t thread;
    int epoll, wake, report;
    uint32_t count;
    struct lane *lanes[LANES_MAX];

    pthread_mutex_t lock; /* guards the mailbox */
    pthread_cond_t answered;
    enum verb verb;
    struct lane *subject;
    int status;
};

void signal_descriptor(int fd)
{
    struct pollfd writable = {.fd = fd, .events = POLLOUT};
    uint64_t one = 1;

    /* The other side can clear O_NONBLOCK and fill the counter: ask first. A full counter is a delivered
     * signal, and so is a pipe nobody reads any more (signals are blocked here: no SIGPIPE). */
    if (poll(&writable, 1, 0) == 1 && writable.revents & POLLOUT) {
        ssize_t ignored = write(fd, &one, sizeof(one));
        (void)ignored;
    }
}

/* Forget kicks that were signalled so far: whoever attaches looks at the rings anyway, and only a new kick
 * shall count as one. */
static void drain(int fd)
{
    struct pollfd readable = {.fd = fd, .events = POLLIN};
    uint64_t count;

    if (poll(&readable, 1, 0) == 1 && readable.revents & POLLIN) {
        ssize_t ignored = read(fd, &count, sizeof(count));
        (void)ignored;
    }
}

/* ----------------------------------------------------------------------------------- descriptors */

static void watch(struct pump *p, struct source *s, int fd, uint32_t events)
{
    struct epoll_event e = {.events = events, .data.ptr = s};

    if (events == s->armed)
        return;
    if (events == 0)
        epoll_ctl(p->epoll, EPOLL_CTL_DEL, fd, NULL);
    else if (epoll_ctl(p->epoll, s->armed ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, fd, &e) < 0)
        events = s->armed;
    s->fd = fd;
    s->armed = events;
}

static void watch_kick(struct pump *p, struct source *s, int fd)
{
    if (fd >= 0) {
        drain(fd);
        watch(p, s, fd, EPOLLIN | EPOLLET);
    }
}

/* What the lane's ports are waited on for, derived from its state; called after everything that changes it. */
static void watch_ports(struct pump *p, struct lane *l)
{
    const struct lane_config *c = &l->config;
    bool wants_in = !l->port_gone && !l->memory_gone && !l->starved && !(l->waiting & WORK_TO_GUEST) &&
                    c->to_guest.enabled && c->to_guest.queue && !c->to_guest.queue->broken;
    bool wants_out = !l->port_gone && l->blocked;

    if (c->from_port >= 0 && c->from_port == c->to_port) {
        watch(p, &l->port_in, c->from_port, (wants_in ? EPOLLIN : 0u) | (wants_out ? EPOLLOUT : 0u));
        return;
    }
    if (c->from_port >= 0)
        watch(p, &l->port_in, c->from_port, wants_in ? EPOLLIN : 0u);
    if (c->to_port >= 0)
        watch(p, &l->port_out, c->to_port, wants_out ? EPOLLOUT : 0u);
}

static void unwatch(struct pump *p, struct source *s)
{
    watch(p, s, s->fd, 0);
}

static void on_ready(struct lane *l, const struct source *s, uint32_t events)
{
    if (s->kick) {
        if (l->config.watch_kicks)
            lane_event(l, LANE_KICKED);
        bool from_guest = s->work & WORK_FROM_GUEST;
        (from_guest ? &l->stats.from_guest : &l->stats.to_guest)->kicks++;
        /* buffers for the guest matter only when frames wait for them */
        if (from_guest || l->starved)
            l->work |= s->work;
        return;
    }
    if (events & (EPOLLOUT | EPOLLERR | EPOLLHUP)) {
        l->blocked = false;
        l->work |= WORK_FROM_GUEST;
    }
    if (events & (EPOLLIN | EPOLLERR | EPOLLHUP))
        l->work |= WORK_TO_GUEST;
    /* An error is level triggered and would wake us for ever. Unless reading or writing finds out what it
     * is, because the guest lets us do neither, the port counts as gone. */
    if (events & (EPOLLERR | EPOLLHUP) && !(events & EPOLLIN) && !l->port_gone) {
        l->port_gone = true;
        lane_event(l, LANE_PORT_GONE);
    }
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
    l->blocked = l->starved = false;
    l->waiting = 0;
    l->work = WORK_FROM_GUEST | WORK_TO_GUEST; /* look once without a kick */
    watch_ports(p, l);
    return RING_OK;
}

static void detach(struct pump *p, struct lane *l)
{
    unwatch(p, &l->kick_from_guest);
    unwatch(p, &l->kick_to_guest);
    unwatch(p, &l->port_in);
    unwatch(p, &l->port_out);
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
    p->verb = NOTHING;
    pthread_cond_signal(&p->answered);
    pthread_mutex_unlock(&p->lock);
    return go_on;
}

/* ------------------------------------------------------------------------------------------ rounds */

static bool polled(const struct flow_config *flow)
{
    return flow->queue && flow->kick < 0;
}

/* Serve every lane that has work. -> how long the next wait may block, in ms; -1: for ever. */
static int round_of_work(struct pump *p)
{
    int wait = -1;
    bool news = false;

    for (uint32_t i = 0; i < p->count; i++) {
        struct lane *l = p->lanes[i];
        if (polled(&l->config.from_guest))
            l->work |= WORK_FROM_GUEST;
        if (polled(&l->config.to_guest) && l->starved)
            l->work |= WORK_TO_GUEST;
        if (l->work & WORK_FROM_GUEST)
            serve_from_guest(l);
        if (l->work & WORK_TO_GUEST)
            serve_to_guest(l);
        watch_ports(p, l);
        if (l->work)
            wait = 0;
        else if (wait < 0 && (polled(&l->config.from_guest) || polled(&l->config.to_guest)))
            wait = POLL_MS;
        news |= __atomic_load_n(&l->events, __ATOMIC_RELAXED) != 0;
    }
    if (news)
        signal_descriptor(p->report);
    return wait;
}

static void *worker(void *argument)
{
    struct pump *p = argument;
    struct epoll_event ready[EVENTS_MAX];
    int wait = -1;

    guard_thread();
    for (;;) {
        bool woken = false;
        int n = epoll_wait(p->epoll, ready, EVENTS_MAX, wait);
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
            if (!obey(p))
                return NULL;
        }
        wait = round_of_work(p);
    }
}

/* timeout_ms from now. */
static struct timespec after(int timeout_ms)
{
    struct timespec until;

    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += timeout_ms / 1000;
    until.tv_nsec += timeout_ms % 1000 * 1000000L;
    if (until.tv_nsec >= 1000000000L) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000L;
    }
    return until;
}

/* -> the command's status; RING_E_BUSY when the worker did not take it in time (it will later) or still
 * has an earlier one.
 *
 * The time comes in slices. A process that was not let run for a while (SIGSTOP, cpu.max) finds it over when it
 * goes on, though its worker had nothing of it: that costs one slice, not all of them. */
static int command(struct pump *p, enum verb verb, struct lane *l, int timeout_ms)
{
    uint64_t one = 1;
    int status = RING_E_BUSY;

    pthread_mutex_lock(&p->lock);
    if (p->verb == NOTHING) {
        p->verb = verb;
        p->subject = l;
        ssize_t r = write(p->wake, &one, sizeof(one));
        (void)r;
        for (int slice = 0; slice < SLICES && p->verb != NOTHING; slice++) {
            struct timespec until = after((timeout_ms + SLICES - 1) / SLICES);
            int late = 0;
            while (p->verb != NOTHING && late != ETIMEDOUT)
                late = pthread_cond_timedwait(&p->answered, &p->lock, &until);
        }
        if (p->verb == NOTHING)
            status = p->status;
    }
    pthread_mutex_unlock(&p->lock);
    return status;
}

/* ----------------------------------------------------------------------------------------- contract */

struct pump *pump_new(int report)
{
    struct pump *p = calloc(1, sizeof(*p));
    struct epoll_event wake = {.events = EPOLLIN};
    pthread_condattr_t attributes;
    sigset_t all, before;

    if (!p)
        return NULL;
    p->report = report;
    p->epoll = epoll_create1(EPOLL_CLOEXEC);
    p->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    pthread_mutex_init(&p->lock, NULL);
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&p->answered, &attributes);
    pthread_condattr_destroy(&attributes);
    if (p->epoll >= 0 && p->wake >= 0 && epoll_ctl(p->epoll, EPOLL_CTL_ADD, p->wake, &wake) == 0) {
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        int error = pthread_create(&p->thread, NULL, worker, p);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        if (error == 0)
            return p;
        errno = error;
    }
    int error = errno;
    if (p->epoll >= 0)
        close(p->epoll);
    if (p->wake >= 0)
        close(p->wake);
    free(p);
    errno = error;
    return NULL;
}

void pump_free(struct pump *p)
{
    uint64_t one = 1;

    pthread_mutex_lock(&p->lock);
    p->verb = STOP_THREAD;
    ssize_t r = write(p->wake, &one, sizeof(one));
    (void)r;
    pthread_mutex_unlock(&p->lock);
    pthread_join(p->thread, NULL);
    close(p->epoll);
    close(p->wake);
    pthread_cond_destroy(&p->answered);
    pthread_mutex_destroy(&p->lock);
    free(p);
}

struct lane *lane_new(void)
{
    struct lane *l = calloc(1, sizeof(*l));

    if (l) {
        l->config = (struct lane_config){.from_guest = {.kick = -1, .call = -1, .err = -1},
                                         .to_guest = {.kick = -1, .call = -1, .err = -1},
                                         .to_port = -1,
                                         .from_port = -1};
        l->expect = SMALL_FRAME;
    }
    return l;
}

void lane_free(struct lane *l)
{
    if (l)
        free(l->filled);
    free(l);
}

static bool call_changed(const struct flow_config *old, const struct flow_config *new)
{
    return old->queue && old->queue == new->queue && old->call != new->call;
}

int lane_configure(struct lane *l, const struct lane_config *config)
{
    if (l->attached)
        return RING_E_BUSY;
    const struct vq *q = config->to_guest.queue;
    if (q && q->size > l->filled_room) {
        struct filled *more = realloc(l->filled, q->size * sizeof(*more));
        if (!more)
            return RING_E_NOMEM;
        l->filled = more;
        l->filled_room = q->size;
    }
    /* A signal may have gone to the old descriptor in the meantime: the driver is called once more. */
    l->call_from_guest |= call_changed(&l->config.from_guest, &config->from_guest);
    l->call_to_guest |= call_changed(&l->config.to_guest, &config->to_guest);
    l->port_gone = l->memory_gone = false; /* may be mended; if not, the first frame tells */
    l->mac_due = true;
    l->config = *config;
    if (l->config.max_frame > FRAME_ROOM - NET_HEADER)
        l->config.max_frame = FRAME_ROOM - NET_HEADER; /* a longer one would not fit the private buffer */
    return RING_OK;
}

void lane_stats_get(const struct lane *l, struct lane_stats *out)
{
    *out = l->stats;
}

int lane_guest_mac(struct lane *l, uint8_t *mac)
{
    int known = l->mac_known;

    memcpy(mac, l->guest_mac, sizeof(l->guest_mac));
    l->mac_known = false;
    return known;
}

uint32_t lane_events(struct lane *l)
{
    return __atomic_exchange_n(&l->events, 0, __ATOMIC_RELAXED);
}

int lane_held(const struct lane *l, uint8_t *out)
{
    if (l->attached)
        return RING_E_BUSY;
    if (!l->held)
        return 0;
    memcpy(out, &l->held_header, NET_HEADER);
    memcpy(out + NET_HEADER, l->room, l->held);
    return (int)(NET_HEADER + l->held);
}

int lane_hold(struct lane *l, const uint8_t *frame, uint32_t length)
{
    if (l->attached)
        return RING_E_BUSY;
    l->held = length - NET_HEADER;
    memcpy(&l->held_header, frame, NET_HEADER);
    memcpy(l->room, frame + NET_HEADER, l->held);
    return RING_OK;
}

int pump_attach(struct pump *p, struct lane *l)
{
    if (l->attached)
        return RING_E_BUSY;
    l->attached = p;
    int status = command(p, ATTACH, l, 1000);
    if (status == RING_E_NOMEM)
        l->attached = NULL;
    return status;
}

int pump_detach(struct pump *p, struct lane *l, int timeout_ms)
{
    if (l->attached != p)
        return RING_E_BUSY;
    int status = command(p, DETACH, l, timeout_ms);
    if (status == RING_OK)
        l->attached = NULL;
    return status;
}
