/*
 * A step of split_walk. Shown, beside what walk.h says of every step: `next` stays in the table that is walked; a
 * step takes one from steps_left or enters an indirect table, which it does once, so a walk ends; no step moves the
 * ring's indices.
 */
#include "walk.h"

static void step(struct vq *q, struct piece *pieces, struct start from)
{
    struct chain c = any_chain(from.used, from.writable, 1);
    uint32_t left = from.walk.steps_left;

    q->broken = RING_OK;
    q->region_hint = 0;
    q->walk = from.walk;
    q->next_avail = 7;
    q->next_used = 5;
    choose_descriptor(q, from.address, from.length);
    int status = vq_walk(q, &c, pieces, PIECES);
    check_step(q, &c, pieces, from.used, status);
    //@ check q->next_avail == 7 && q->next_used == 5;
    //@ check status != RING_E_ENDLESS && c.slots == 1;
    //@ check status == RING_MORE && !q->walk.indirect ==> q->walk.entries == q->size && q->walk.next < q->size;
    //@ check status == RING_MORE && q->walk.indirect == from.walk.indirect ==> q->walk.steps_left == left - 1;
    //@ check status == RING_MORE && from.walk.indirect ==> q->walk.indirect;
    //@ check left == 0 && status != RING_E_MEMORY_GONE ==> status == RING_E_LOOP;
}

/* Every descriptor, in the ring's table (`table` 0) or in an indirect one of so many entries; and every number of
 * steps left, for one descriptor that lets the walk go on. */
static void all_steps(struct vq *q, struct piece *pieces, uint32_t table)
{
    uint32_t entries = table ? table : q->size;
    struct start from = {
        .walk = {.indirect = table > 0, .writable_seen = any_bool(), .entries = entries, .steps_left = 1,
                 .next = (uint32_t)any_between(0, entries - 1)},
        .slots = 1,
        .writable = table % 2 == 1,
    };

    for_all_descriptors(q, pieces, from);
    from.address = from.length = from.used = 0;
    //@ loop unroll 10;
    for (from.walk.steps_left = 0; from.walk.steps_left <= entries; from.walk.steps_left++)
        step(q, pieces, from);
}

int main(void)
{
    struct guestmem *data = data_memory();
    struct piece *pieces = any_pieces();
    struct vq *with = any_queue(8, INDIRECT, data), *without = any_queue(1, 0, data);

    set_table_limit(with);
    set_table_limit(without);
    all_steps(without, pieces, 0);
    all_steps(with, pieces, 0);
    all_steps(with, pieces, TABLE_LIMIT);
    return 0;
}
