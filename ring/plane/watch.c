/* The descriptors of lanes: what a worker waits for, what it makes of their readiness, and signalling one without ever
 * waiting for its other side.
 *
 * Ports are level triggered (what is left over is reported again), kicks edge triggered: each write of the driver is
 * told once, and the eventfd never has to be read.
 */
#include <poll.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "coalesce.h"
#include "worker.h"

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

void watch_kick(struct pump *p, struct source *s, int fd)
{
    if (fd >= 0) {
        drain(fd);
        watch(p, s, fd, EPOLLIN | EPOLLET);
    }
}

void watch_timer(struct pump *p, struct source *s, int fd)
{
    if (fd >= 0)
        watch(p, s, fd, EPOLLIN | EPOLLET);
}

/* What the lane's ports are waited on for, derived from its state; called after everything that changes it. */
void watch_ports(struct pump *p, struct lane *l)
{
    const struct lane_config *c = &l->config;
    bool wants_in = !l->port_gone && (c->member || (!l->memory_gone && !l->starved && !(l->waiting & WORK_TO_GUEST) &&
                                                    c->to_guest.enabled && c->to_guest.queue &&
                                                    !c->to_guest.queue->broken));
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

void unwatch(struct pump *p, struct source *s)
{
    watch(p, s, s->fd, 0);
}

void on_ready(struct lane *l, const struct source *s, uint32_t events)
{
    if (s->timer) {
        coalesce_due(l, s->work);
        return;
    }
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
