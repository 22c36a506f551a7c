/*
 * What is done once, with numbers the front-end chose: the table of regions, the parts of a ring, its base.
 *
 * Shown: guestmem_new reads only the regions it is given, and makes a table or says why not; vq_new and vq_move,
 * given any size, base and addresses, access only memory of the regions, and a ring that comes out has a size that is
 * in order. For the sizes that fit into this memory: all bytes of each part of such a ring lie in one region.
 */
#include "world.h"

#define REGION 80
#define LARGEST 5 /* packed; a split ring of 4 fits as well */

static void any_table(uint32_t count)
{
    struct guest_region regions[3];
    int status;

    for (uint32_t i = 0; i < count; i++)
        regions[i] = (struct guest_region){any_between(0, UINT64_MAX), any_between(0, UINT64_MAX),
                                           any_between(0, UINT64_MAX), block(1)};
    struct guestmem *mem = guestmem_new(regions, count, &gone, &status);
    //@ check mem == \null ==> status == RING_E_REGION || status == RING_E_NOMEM;
    //@ check mem != \null ==> status == RING_OK && mem->count == count && count > 0;
}

static struct guestmem *two_regions(void)
{
    int status;
    struct guest_region regions[] = {{0x1000, UVA, REGION, block(REGION)}, {0x9000, 2 * UVA, REGION, block(REGION)}};
    struct guestmem *mem = guestmem_new(regions, 2, &gone, &status);

    if (!mem)
        exit(0);
    return mem;
}

/* A ring somewhere in this memory, or not. */
static struct vq *any_ring(const struct guestmem *mem, uint32_t size, bool packed)
{
    struct vq_config config = {
        .size = size, .base = any32(), .desc = any_between(0, UINT64_MAX), .avail = any_between(0, UINT64_MAX),
        .used = any_between(0, UINT64_MAX),
        .features = packed ? RING_PACKED | EVENT_IDX | INDIRECT : 0,
    };
    int status;
    struct vq *q = vq_new(mem, &config, &status);

    //@ check q == \null ==> status < RING_OK;
    if (!q)
        return NULL;
    //@ check status == RING_OK && 1 <= q->size <= RING_QUEUE_SIZE_MAX;
    //@ check q->is_packed == packed && q->mem == mem;
    //@ check 1024 <= q->table_limit <= RING_QUEUE_SIZE_MAX && q->broken == RING_OK;
    vq_base(q);
    status = vq_move(q, mem);
    //@ check status == RING_OK || RING_E_RING_UNMAPPED <= status <= RING_E_QUEUE_SIZE;
    return q;
}

static void ring_of(const struct guestmem *mem, uint32_t size, bool packed)
{
    struct vq *q = any_ring(mem, size, packed);
    uint32_t avail = packed ? 4 : 6 + 2 * size, used = packed ? 4 : 6 + 8 * size;

    if (!q)
        return;
    //@ check \valid((uint8_t *)q->desc + (0 .. 16 * size - 1));
    //@ check \valid((uint8_t *)q->avail + (0 .. avail - 1));
    //@ check \valid((uint8_t *)q->used + (0 .. used - 1));
}

int main(void)
{
    const struct guestmem *mem = two_regions();

    //@ loop unroll 3;
    for (uint32_t count = 1; count <= 3; count++)
        any_table(count);
    any_ring(mem, any32(), false);
    any_ring(mem, any32(), true);
    //@ loop unroll LARGEST;
    for (uint32_t size = 1; size <= LARGEST; size++) {
        ring_of(mem, size, false);
        ring_of(mem, size, true);
    }
    return 0;
}
