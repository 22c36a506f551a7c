/*
 * What a lane is made of: shared by the worker (worker.c) and the code that moves frames (from_guest.inl, to_guest.inl).
 * All of it belongs to whoever owns the lane, except `events`, `stats` and `attached`, which may be read
 * from the control thread at any time.
 */
#pragma once

#include <stdbool.h>

#include "../core/internal.h"
#include "header.h"
#include "include.h"

/* A frame up to here is copied on its way to or from the port, for the kernel takes longer over a call with several
 * pieces than we over the copy. Bytes, without the header. */
#define STAGED_MAX 1522

/* What a lane has to do next. */
enum work {
    WORK_FROM_GUEST = 1,
    WORK_TO_GUEST = 2,
};

/* One buffer of the guest that a frame is spread over. */
struct filled {
    uint32_t head;
    uint32_t slots;
    uint32_t written;
};

/* A descriptor the worker waits on; epoll hands back its address. */
struct source {
    struct lane *lane;
    uint32_t armed; /* the epoll events asked for; 0: not registered */
    uint32_t work;  /* enum work bits that its readiness means */
    int fd;
    bool kick;
    bool timer;
};

struct batch;

/* What follows the header of each frame, both ways, with HASH_REPORT (virtio 1.2, 5.1.6). */
struct hash_header {
    uint32_t value;
    uint16_t report; /* VIRTIO_NET_HASH_REPORT_* */
    uint16_t padding;
};

/* What a sender is doing at a receiveq of a switch. It belongs to whoever is inside the lane's door, as the queue and
 * to_guest's counters do. */
struct delivery {
    const struct batch *batch;
    uint64_t left;          /* bits: frames that are neither delivered nor counted as lost */
    uint32_t slots, pieces; /* popped for the frame in hand; pieces: in lane.pieces + 1 */
    bool waiting;           /* for a translation, until the lane is attached anew */
    struct hash_header hash; /* of the frame in hand */
    uint32_t fragment_id;   /* of the last datagram that was cut into fragments */
};

/* Calls that one queue's driver has had put off: coalesce.c. It belongs to whoever has the queue. */
struct coalescing {
    int timer;      /* a timer descriptor, fixed while the lane is attached; -1: there is none */
    bool running;   /* it has been set, and something was put off */
    uint64_t told;  /* frames up to which the driver was asked */
};

struct lane {
    struct lane_config config;
    struct lane_stats stats;
    uint32_t events; /* enum lane_event, atomic */
    struct pump *attached; /* NULL: the caller's */
    int report;            /* an eventfd: there are events */
    bool news;             /* atomic: an event that was not reported yet */

    uint32_t work;
    uint32_t resting; /* enum work bits of the rings at rest: an empty transmitq, a receiveq without enough buffers */
    bool looked_at;   /* the worker looks at rings that come to rest: they need not ask for kicks */
    bool call_from_guest; /* the call descriptor of a running queue changed: signal it once */
    bool call_to_guest;
    bool blocked;    /* the port takes no more: a chain was given back, wait until it is writable */
    bool starved;    /* the guest has no buffers: the port is not read until it kicks */
    uint32_t waiting; /* enum work bits of the directions that wait for a translation */
    bool port_gone;
    bool memory_gone;

    /* from_guest: where the guest's frames come from, looked at once for each configuration */
    uint8_t guest_mac[6];
    bool mac_known;
    bool mac_due;

    struct source kick_from_guest, kick_to_guest, port_in, port_out, timer_from_guest, timer_to_guest;
    struct coalescing coalescing_from_guest, coalescing_to_guest;

    /* to_guest */
    uint32_t expect;      /* bytes the next frame probably has, with its header */
    uint32_t held;        /* bytes of a frame in `room` that waits for buffers, 0: none */
    struct net_header held_header;
    struct filled *filled; /* [queue size] */
    uint32_t filled_room;

    /* at a switch */
    uint32_t hash_header;     /* bytes of a struct hash_header before each frame: of one, or none */
    struct batch *batch;      /* of the sender */
    int gathered;             /* enum burst: how its last one ended */
    struct delivery delivery; /* to the receiver */

    struct piece pieces[RING_PIECES_MAX + 3]; /* a private header before, a private tail behind */
    uint8_t staged[NET_HEADER + STAGED_MAX]; /* from_guest: a frame that is written in one piece */
    uint8_t room[NET_HEADER + FRAME_ROOM]; /* to_guest: header and frame that lie in private memory */
};

/* One direction each, for one ring format; called under the guard, with a queue that is not broken. */
struct directions {
    void (*from_guest)(struct lane *l);
    void (*to_guest)(struct lane *l);
    /* `direction` (enum work) is at rest: is there more than it knew of? Then it has work. Kicks are asked for before,
     * or no longer. */
    void (*look)(struct lane *l, uint32_t direction, bool ask);
    void (*gather)(struct lane *l); /* the three steps of fabric.c */
    void (*deliver)(struct lane *l);
    void (*settle)(struct lane *l);
    void (*take_back)(struct lane *l); /* instead of the rest of deliver, when the sender's memory vanished */
    /* What was put off: ask the driver now whether it wants a call. */
    void (*tell_from_guest)(struct lane *l);
    void (*tell_to_guest)(struct lane *l);
};
extern const struct directions split_directions, packed_directions;

static inline const struct directions *directions_of(const struct vq *q)
{
    return q->is_packed ? &packed_directions : &split_directions;
}

/* Run a step under the guard. -> false: memory vanished */
bool guarded(struct lane *l, void (*step)(struct lane *));

/* Serve one direction until it is idle, blocked, or its budget is used up (then the work bit stays set).
 * Guest memory that vanishes sets memory_gone and is reported. The worker's thread is prepared for guards.
 * -> something was done. */
bool serve_from_guest(struct lane *l);
bool serve_to_guest(struct lane *l);
/* Look at the rings at rest, instead of waiting for kicks; or with `ask` before doing that. */
void look_at_resting(struct lane *l, bool ask);

/* Note an event for the control thread; the worker reports it after the round. */
static inline void lane_event(struct lane *l, uint32_t event)
{
    uint32_t before = __atomic_fetch_or(&l->events, event, __ATOMIC_RELAXED);

    if (!(before & event))
        __atomic_store_n(&l->news, true, __ATOMIC_RELAXED);
}

/* A chain was met whose translation is missing, and given back: leave its direction alone until the lane is attached
 * anew. */
static inline void lane_wait(struct lane *l, uint32_t direction)
{
    l->waiting |= direction;
    lane_event(l, LANE_MISS);
}

/* Let senders at a switch in, and out for good: by the worker that the lane is attached to. */
void lane_open(struct lane *l);
void lane_shut(struct lane *l);

/* While waiting for another thread: let this core's second one have it for a moment. */
static inline void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Signal an eventfd or pipe without ever blocking on its other side. */
void signal_descriptor(int fd);

/* Tell the control thread what it does not know yet of the lane's events: the lane's worker, or a sender inside its
 * door. */
static inline void lane_report(struct lane *l)
{
    if (unlikely(__atomic_load_n(&l->news, __ATOMIC_RELAXED)) && __atomic_exchange_n(&l->news, false, __ATOMIC_RELAXED))
        signal_descriptor(l->report);
}
