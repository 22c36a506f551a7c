/* The load generator on a queue of a guest on the heap (guest.h). */
#pragma once

#include "guest.h"
#include "../../ring/core/driver_include.h"

/* A queue and a driver for it; what `c` leaves out is filled in. */
static inline struct driver *driver_on(struct guest *g, int kick, int call, struct driver_config *c)
{
    uint8_t *area;

    c->size = c->size ? c->size : 64;
    c->frame_bytes = c->frame_bytes ? c->frame_bytes : 1514;
    c->batch = c->batch ? c->batch : 16;
    c->pieces = c->pieces ? c->pieces : 1;
    c->prefix_bytes = 14;
    c->base = c->features & PACKED ? packed_base(c->size - 1, true) : 0xFFF0;
    guest_init(g, c->size, c->features, c->base);
    c->area_gpa = guest_block(g, driver_area_bytes(c), &area);
    c->area = area;
    c->desc = (void *)g->desc;
    c->avail = (void *)g->avail;
    c->used = (void *)g->used;
    c->kick = kick;
    c->call = call;
    c->stall_ms = 20000;
    c->full = 1;
    guest_start(g);
    struct driver *d = driver_new(c);
    CHECK(d);
    return d;
}
