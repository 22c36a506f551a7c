/* A device that serves whatever waits, and looks whether what it was given can be touched. */
#pragma once

#include "guest.h"

static int followed, refused; /* chains, since the program started */

/* Serve everything that waits; every device-writable byte is written, every readable one read.
 * -> chains served, or the code that broke the ring. */
static inline int serve(struct guest *g, struct piece *pieces, uint32_t max)
{
    struct chain c;
    int served = 0;
    volatile uint8_t sink = 0;

    for (;;) {
        int status = vq_pop(g->q, &c, pieces, max);
        if (status == RING_EMPTY)
            return served;
        if (g->q->broken)
            return g->q->broken;
        *(status == RING_OK ? &followed : &refused) += 1;
        if (status == RING_OK) {
            CHECK(c.readable + c.writable <= max);
            uint64_t sum = 0;
            for (uint32_t i = 0; i < c.readable + c.writable; i++) {
                CHECK(pieces[i].len > 0);
                sum += pieces[i].len;
                if (i < c.readable)
                    sink = (uint8_t)(sink + pieces[i].base[0] + pieces[i].base[pieces[i].len - 1]);
                else
                    memset(pieces[i].base, 0xA5, pieces[i].len);
            }
            CHECK_EQ(sum, c.readable_len + c.writable_len);
        }
        CHECK_EQ(vq_push(g->q, c.head, c.slots, status == RING_OK ? (uint32_t)c.writable_len : 0), RING_OK);
        CHECK_EQ(vq_publish(g->q), RING_OK);
        CHECK(vq_decide(g->q) >= 0);
        served++;
    }
}
