/*
 * A step of packed_walk. Shown, beside what walk.h says of every step: the ring's position stays in the ring; a step
 * counts a slot to the chain, of which there are no more than the ring has, or goes one entry on in an indirect
 * table, or enters one, which it does once, so a walk ends; a chain without an end breaks the ring and nothing else
 * does; no step moves the place of the next used entry.
 */
#include "walk.h"

static void step(struct vq *q, struct piece *pieces, struct start from)
{
    struct chain c = any_chain(from.used, from.writable, from.slots);
    uint32_t next = from.walk.next;

    q->broken = RING_OK;
    q->region_hint = 0;
    q->walk = from.walk;
    q->next_avail = (uint16_t)any_between(0, q->size - 1);
    q->avail_wrap = any_bool();
    q->next_used = 0;
    q->used_wrap = true;
    choose_descriptor(q, from.address, from.length);
    int status = vq_walk(q, &c, pieces, PIECES);
    check_step(q, &c, pieces, from.used, status);
    //@ check q->next_avail < q->size;
    //@ check q->next_used == 0 && q->used_wrap;
    //@ check from.slots <= c.slots <= q->size;
    //@ check status == RING_MORE && !q->walk.indirect ==> c.slots == from.slots + 1;
    //@ check status == RING_MORE && from.walk.indirect ==> q->walk.indirect && q->walk.next == next + 1;
    //@ check from.walk.indirect ==> c.slots == from.slots;
    //@ check status == RING_E_ENDLESS ==> c.slots == q->size;
}

/* Every descriptor as the first of a chain, as a later one and in indirect tables; and after every number of slots,
 * for one descriptor. */
static void all_steps(struct vq *q, struct piece *pieces)
{
    struct start direct = {.walk = {.writable_seen = any_bool()}};

    for_all_descriptors(q, pieces, direct);
    //@ loop unroll 10;
    for (direct.slots = 0; direct.slots <= q->size; direct.slots++)
        step(q, pieces, direct);
    if (!q->indirect)
        return;
    direct.slots = 1;
    for_all_descriptors(q, pieces, direct);
    //@ loop unroll TABLE_LIMIT;
    for (uint32_t next = 0; next < TABLE_LIMIT; next++)
        for_all_descriptors(q, pieces, (struct start){
            .walk = {.indirect = true, .writable_seen = any_bool(), .entries = TABLE_LIMIT, .next = next},
            .slots = 1, .writable = true});
}

int main(void)
{
    struct guestmem *data = data_memory();
    struct piece *pieces = any_pieces();
    struct vq *with = any_queue(3, RING_PACKED | INDIRECT, data), *without = any_queue(1, RING_PACKED, data);

    set_table_limit(with);
    set_table_limit(without);
    all_steps(without, pieces);
    all_steps(with, pieces);
    return 0;
}
