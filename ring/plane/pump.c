/* Lending lanes to a worker: the mailbox, and what of the contract concerns workers.
 *
 * Everything a lane has belongs to the worker while it is attached, and to the caller while it is not; no
 * field is locked. Hand-over goes through one mailbox: the caller puts a command in, wakes the worker and
 * waits; the worker takes it between two bursts, where it holds nothing - no popped chain, no translation -
 * and answers. So "paused" is simply "detached", and it takes no longer than a burst.
 *
 * A worker that does not answer in time is given up. It cannot be ended from outside, and should it go on one day it
 * must not touch rings that somebody else may run by then: it finishes the burst it is in, and ends.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "worker.h"

#define SLICES 10 /* of the time a worker is given for a command */
#define MORE_MS 900 /* and so much on top, if it does not come to use them */

static void wake(struct pump *p)
{
    uint64_t one = 1;
    ssize_t ignored = write(p->wake, &one, sizeof(one));

    (void)ignored;
}

/* Put a command in; the mailbox is locked. */
static void post(struct pump *p, enum verb verb)
{
    __atomic_store_n(&p->verb, verb, __ATOMIC_RELAXED);
    wake(p);
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

/* Processor time of the worker, in nanoseconds. */
static int64_t used_by(const struct pump *p)
{
    struct timespec used = {0};
    clockid_t clock;

    if (pthread_getcpuclockid(p->thread, &clock) == 0)
        clock_gettime(clock, &used);
    return used.tv_sec * INT64_C(1000000000) + used.tv_nsec;
}

/* -> the command's status; RING_E_BUSY when the worker did not take it in time (it will later) or still
 * has an earlier one.
 *
 * The time comes in slices, and a slice of which the worker had little does not count, nor does it use up more than one
 * if all of the process was not let run for a while (SIGSTOP, cpu.max): on a busy machine a worker waits for a processor,
 * and is not to be lost for that. One that is blocked in the kernel looks the same, so there is an end to it. */
static int command(struct pump *p, enum verb verb, struct lane *l, int timeout_ms)
{
    int status = RING_E_BUSY;

    pthread_mutex_lock(&p->lock);
    if (p->verb == NOTHING) {
        p->subject = l;
        post(p, verb);
        int slice_ms = (timeout_ms + SLICES - 1) / SLICES, most = SLICES + MORE_MS / (slice_ms ? slice_ms : 1);
        for (int waits = 0, slices = 0; waits < most && slices < SLICES && p->verb != NOTHING; waits++) {
            struct timespec until = after(slice_ms);
            int64_t before = used_by(p);
            int late = 0;
            while (p->verb != NOTHING && late != ETIMEDOUT)
                late = pthread_cond_timedwait(&p->answered, &p->lock, &until);
            slices += used_by(p) - before > slice_ms * INT64_C(1000000) / 2;
        }
        if (p->verb == NOTHING)
            status = p->status;
    }
    pthread_mutex_unlock(&p->lock);
    return status;
}

/* ----------------------------------------------------------------------------------------- contract */

/* Start the thread, which may look and wait at once. -> 0, or an errno. */
static int start(struct pump *p)
{
    sigset_t all, before;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&p->thread, NULL, worker, p);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error)
        return error;
    pthread_mutex_lock(&p->lock);
    while (p->verb == STARTING)
        pthread_cond_wait(&p->answered, &p->lock);
    error = p->status;
    pthread_mutex_unlock(&p->lock);
    if (error)
        pthread_join(p->thread, NULL);
    return error;
}

static void release(struct pump *p)
{
    if (p->epoll >= 0)
        close(p->epoll);
    if (p->wake >= 0)
        close(p->wake);
    pthread_cond_destroy(&p->answered);
    pthread_mutex_destroy(&p->lock);
    free(p);
}

struct pump *pump_new(const struct pump_config *config)
{
    struct pump *p = calloc(1, sizeof(*p));
    struct epoll_event woken = {.events = EPOLLIN};
    pthread_condattr_t attributes;

    if (!p)
        return NULL;
    p->cpu = config->cpu;
    p->polling.most = config->poll_us == POLL_ALWAYS ? UINT64_MAX : 1000 * (uint64_t)config->poll_us;
    p->polling.budget = p->polling.most;
    p->verb = STARTING;
    p->epoll = epoll_create1(EPOLL_CLOEXEC);
    p->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    pthread_mutex_init(&p->lock, NULL);
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&p->answered, &attributes);
    pthread_condattr_destroy(&attributes);
    int error = 0;
    if (p->epoll < 0 || p->wake < 0 || epoll_ctl(p->epoll, EPOLL_CTL_ADD, p->wake, &woken) < 0)
        error = errno;
    else
        error = start(p);
    if (error == 0)
        return p;
    release(p);
    errno = error;
    return NULL;
}

void pump_free(struct pump *p)
{
    pthread_mutex_lock(&p->lock);
    post(p, STOP_THREAD);
    pthread_mutex_unlock(&p->lock);
    pthread_join(p->thread, NULL);
    release(p);
}

void pump_give_up(struct pump *p)
{
    __atomic_store_n(&p->given_up, true, __ATOMIC_RELEASE);
    pthread_detach(p->thread);
    wake(p);
}

int pump_attach(struct pump *p, struct lane *l, int timeout_ms)
{
    if (l->attached)
        return RING_E_BUSY;
    l->attached = p;
    int status = command(p, ATTACH, l, timeout_ms);
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
