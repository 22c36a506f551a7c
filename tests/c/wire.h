/* A pump between a guest on the heap (guest.h) and a socket pair: what pump.c and mutate.c stand on. */
#pragma once

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "guest.h"
#include "../../ring/plane/include.h"

struct wire {
    int near, far; /* near: the port; far: the network */
    int report;
    int kick[2], call[2], err[2]; /* of from_guest, to_guest */
    struct pump *pump;
    struct lane *lane;
    struct lane_config config;
};

/* As wire_init, with a worker of this kind. */
static inline void wire_init_on(struct wire *w, uint64_t features, const struct pump_config *worker)
{
    int ends[2];

    CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends) == 0);
    *w = (struct wire){.near = ends[0], .far = ends[1], .report = eventfd(0, EFD_NONBLOCK)};
    for (int i = 0; i < 2; i++) {
        w->kick[i] = eventfd(0, EFD_NONBLOCK);
        w->call[i] = eventfd(0, EFD_NONBLOCK);
        w->err[i] = eventfd(0, EFD_NONBLOCK);
    }
    w->config = (struct lane_config){
        .from_guest = {.enabled = 1, .kick = w->kick[0], .call = w->call[0], .err = w->err[0]},
        .to_guest = {.enabled = 1, .kick = w->kick[1], .call = w->call[1], .err = w->err[1]},
        .to_port = w->near,
        .from_port = w->near,
        .port_header = 12,
        .max_frame = 65550,
        .gso_size_min = 48,
        .features = features,
    };
    CHECK_EQ(guard_install(), RING_OK);
    w->pump = pump_new(worker);
    w->lane = lane_new(w->report);
    CHECK(w->pump && w->lane);
}

static inline void wire_init(struct wire *w, uint64_t features)
{
    wire_init_on(w, features, &(struct pump_config){.cpu = -1});
}

static inline void wire_attach(struct wire *w, struct vq *from_guest, struct vq *to_guest)
{
    w->config.from_guest.queue = from_guest;
    w->config.to_guest.queue = to_guest;
    CHECK_EQ(lane_configure(w->lane, &w->config), RING_OK);
    CHECK_EQ(pump_attach(w->pump, w->lane, 10000), RING_OK);
}

static inline void wire_detach(struct wire *w)
{
    CHECK_EQ(pump_detach(w->pump, w->lane, 10000), RING_OK);
}

static inline void wire_end(struct wire *w)
{
    pump_free(w->pump);
    lane_free(w->lane);
    close(w->near);
    close(w->far);
    close(w->report);
    for (int i = 0; i < 2; i++) {
        close(w->kick[i]);
        close(w->call[i]);
        close(w->err[i]);
    }
}
