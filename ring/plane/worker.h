/*
 * A worker: what its thread (worker.c), the descriptors it waits for (watch.c) and its mailbox (pump.c) share.
 */
#pragma once

#include <pthread.h>

#include "lane.h"

#define LANES_MAX 4096

enum verb { NOTHING, STARTING, ATTACH, DETACH, STOP_THREAD };

/* Looking instead of sleeping: worker.c tells the theory. Times are those of CLOCK_MONOTONIC in nanoseconds. */
struct polling {
    uint64_t most;      /* how long to look after the last work at most; 0: never, UINT64_MAX: for ever */
    uint64_t budget;    /* how long it is worth now */
    uint64_t now;       /* as last read: the clock is asked once a round */
    uint64_t last_work;
    uint64_t last_wait; /* when the descriptors were looked at... */
    uint64_t patience;  /* ...and for how long that is enough */
    bool on;            /* rings are looked at now, and their drivers asked for no kicks */
};

struct pump {
    pthread_t thread;
    int epoll, wake;
    int cpu; /* -1: any */
    uint32_t count;
    struct lane *lanes[LANES_MAX];
    struct polling polling;

    pthread_mutex_t lock; /* guards the mailbox; `verb` may be looked at without */
    pthread_cond_t answered;
    enum verb verb;
    struct lane *subject;
    int status;
    bool given_up; /* atomic; no lane may be touched any more */
};

/* The thread of `argument`, a struct pump. It answers STARTING with 0, or with an errno and ends. */
void *worker(void *argument);

/* Ask for kicks through fd, if there is one, and forget those that were signalled so far. */
void watch_kick(struct pump *p, struct source *s, int fd);
/* Wait for a timer, if there is one: it tells once each time it goes off. */
void watch_timer(struct pump *p, struct source *s, int fd);
/* Wait for the lane's port as its state demands; called after everything that changes it. */
void watch_ports(struct pump *p, struct lane *l);
void unwatch(struct pump *p, struct source *s);
/* What epoll reported. */
void on_ready(struct lane *l, const struct source *s, uint32_t events);
