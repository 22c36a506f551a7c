/*
 * One step of a walk, from any state a walk can be in to whatever the driver says next.
 *
 * That one step is safe, and leads to a state a walk can be in, proves walks of any length (induction). The first
 * state is vq_take's, shown in verbs_split.c and verbs_packed.c. What a step does with an address and a length is
 * shown in memory.c for all of them; here a few stand for the rest.
 */
#pragma once

#include "world.h"

static const uint64_t addresses[] = {
    A_GPA, B_GPA - 4, B_GPA, B_GPA + B_SIZE, T_GPA + T_SIZE - 1, UINT64_MAX,
};
#define ADDRESSES (sizeof(addresses) / sizeof(*addresses))

/* Lengths: none, less than a table's entry, one, two, not a multiple of one, and what no table or memory here holds. */
static const struct { uint32_t low, high; } lengths[] = {
    {0, 0}, {7, 7}, {16, 16}, {32, 32}, {33, 33}, {48, UINT32_MAX},
};
#define LENGTHS (sizeof(lengths) / sizeof(*lengths))

/* What the driver says next: in the ring if it is asked there, in the private copy if the walk is there. */
static inline void choose_descriptor(struct vq *q, uint32_t address, uint32_t length)
{
    next_descriptor.addr = addresses[address];
    next_descriptor.len_low = lengths[length].low;
    next_descriptor.len_high = lengths[length].high;
    next_descriptor.armed = !q->walk.indirect;
    //@ loop unroll TABLE_LIMIT;
    for (uint32_t i = 0; i < TABLE_LIMIT; i++)
        q->table[i] = (struct vring_desc){
            addresses[address], (uint32_t)any_between(lengths[length].low, lengths[length].high), any16(), any16()};
}

#define SUM (1ull << 60) /* no number of 32-bit lengths that a walk may add up comes near it */

/* A chain of which `used` pieces are known: all of them readable or all writable, for only the sum decides where the
 * next ones go. */
static inline struct chain any_chain(uint32_t used, bool writable, uint32_t slots)
{
    return (struct chain){.head = any32(), .slots = slots, .descriptors = any32(), .readable = writable ? 0 : used,
                          .writable = writable ? used : 0, .readable_len = any_between(0, SUM),
                          .writable_len = any_between(0, SUM)};
}

/* What holds after every step, in either format. */
static inline void check_step(const struct vq *q, const struct chain *c, const struct piece *pieces, uint32_t used,
                              int status)
{
    /*@ check RING_E_LENGTH <= status <= RING_OK || status == RING_MORE || status == RING_E_ENDLESS ||
              status == RING_E_MEMORY_GONE; */
    //@ check RING_E_LENGTH <= status < RING_OK ==> c->status == status;
    //@ check status >= RING_OK ==> c->status == RING_OK;
    //@ check q->broken == RING_OK || q->broken == status;
    //@ check status == RING_E_ENDLESS || status == RING_E_MEMORY_GONE ==> q->broken == status;
    //@ check used <= c->readable + c->writable <= PIECES;
    //@ check q->region_hint < DATA_REGIONS;
    //@ check status == RING_MORE && q->walk.indirect ==> q->walk.next < q->walk.entries <= TABLE_LIMIT;
    //@ loop unroll PIECES;
    for (uint32_t i = used; i < c->readable + c->writable; i++) {
        //@ check pieces[i].len > 0;
        //@ check \valid(pieces[i].base + (0 .. pieces[i].len - 1));
        /*@ check \base_addr(pieces[i].base) == \base_addr(data_a) ||
                  \base_addr(pieces[i].base) == \base_addr(data_b) ||
                  \base_addr(pieces[i].base) == \base_addr(data_t); */
    }
}

/* Where a step starts, and what the driver says then. */
struct start {
    struct walk walk;
    uint32_t slots; /* of the chain so far */
    uint32_t used;  /* pieces so far */
    bool writable;  /* and what they are */
    uint32_t address, length;
};

static void step(struct vq *q, struct piece *pieces, struct start from);

/* Every address with every number of pieces so far, then every length. */
static inline void for_all_descriptors(struct vq *q, struct piece *pieces, struct start from)
{
    from.length = 1;
    //@ loop unroll ADDRESSES;
    for (from.address = 0; from.address < ADDRESSES; from.address++)
        //@ loop unroll PIECES + 1;
        for (from.used = 0; from.used <= PIECES; from.used++)
            step(q, pieces, from);
    from.address = 1;
    from.used = 0;
    //@ loop unroll LENGTHS;
    for (from.length = 0; from.length < LENGTHS; from.length++)
        step(q, pieces, from);
}
