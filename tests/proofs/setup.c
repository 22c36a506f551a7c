/*
 * What is done once, with numbers the front-end chose: the table of regions, the parts of a ring, its base.
 *
 * Shown: guestmem_new reads only the regions it is given, and makes a table or says why not; vq_new and vq_move,
 * given any size, base, features and addresses, access only memory of the regions, and a ring that comes out has a
 * size and positions that are in order.
 */
#include "world.h"

static void any_table(uint32_t count)
{
    struct guest_region regions[3];
    int status;

    for (uint32_t i = 0; i < count; i++)
        regions[i] = (struct guest_region){any_between(0, UINT64_MAX), any_between(0, UINT64_MAX),
                                           any_between(0, UINT64_MAX), data_a};
    struct guestmem *mem = guestmem_new(regions, count, &gone, &status);
    //@ check mem == \null ==> status == RING_E_REGION || status == RING_E_NOMEM;
    //@ check mem != \null ==> status == RING_OK && mem->count == count && count > 0;
}

/* A ring somewhere in this memory, or not: room enough for the parts of small rings and of few big ones. */
static void any_ring(const struct guestmem *mem, bool packed)
{
    struct vq_config config = {
        .size = any32(), .base = any32(), .desc = any_between(0, UINT64_MAX), .avail = any_between(0, UINT64_MAX),
        .used = any_between(0, UINT64_MAX),
        .features = packed ? RING_PACKED | EVENT_IDX | INDIRECT : 0,
    };
    int status;
    struct vq *q = vq_new(mem, &config, &status);

    //@ check q == \null ==> status < RING_OK;
    if (!q)
        return;
    //@ check status == RING_OK && 1 <= q->size <= RING_QUEUE_SIZE_MAX;
    //@ check q->is_packed == packed && q->mem == mem;
    //@ check 1024 <= q->table_limit <= RING_QUEUE_SIZE_MAX && q->broken == RING_OK;
    vq_base(q);
    status = vq_move(q, mem);
    //@ check status == RING_OK || RING_E_RING_UNMAPPED <= status <= RING_E_QUEUE_SIZE;
    vq_free(q);
}

int main(void)
{
    const struct guestmem *mem = data_memory();

    //@ loop unroll 3;
    for (uint32_t count = 1; count <= 3; count++)
        any_table(count);
    any_ring(mem, false);
    any_ring(mem, true);
    return 0;
}
