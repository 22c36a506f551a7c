/*
 * Translation and the copy of an indirect table: every address of a small memory and every other one, any length.
 *
 * Shown: a piece lies in one region, bytes [0, len) of it; no more than `max` of them are written; the copy stays
 * in the table and in the regions; a region's hint always names a region.
 */
#include "world.h"

/* The classes of addresses: each one inside a region by itself, and the three stretches outside. */
#define INSIDE (A_SIZE + B_SIZE + T_SIZE)
#define ADDRESSES (INSIDE + 3)

static uint64_t address(uint32_t class)
{
    if (class < A_SIZE + B_SIZE)
        return A_GPA + class;
    if (class < INSIDE)
        return T_GPA + (class - A_SIZE - B_SIZE);
    if (class == INSIDE)
        return any_between(0, A_GPA - 1);
    if (class == INSIDE + 1)
        return any_between(B_GPA + B_SIZE, T_GPA - 1);
    return UINT64_MAX;
}

static void translate(const struct guestmem *mem, uint64_t gpa, uint32_t hint, struct piece *pieces, uint32_t max)
{
    int n = guestmem_translate(mem, &hint, gpa, any_between(0, UINT64_MAX), pieces, max);

    //@ check hint < DATA_REGIONS;
    //@ check n == RING_E_UNMAPPED || n == RING_E_PIECES || 0 <= n <= max;
    for (int i = 0; i < n; i++) {
        //@ check pieces[i].len > 0;
        //@ check \valid(pieces[i].base + (0 .. pieces[i].len - 1));
        /*@ check \base_addr(pieces[i].base) == \base_addr(data_a) ||
                  \base_addr(pieces[i].base) == \base_addr(data_b) ||
                  \base_addr(pieces[i].base) == \base_addr(data_t); */
    }
}

static void enter(struct vq *q, uint64_t gpa, uint32_t hint, uint32_t len)
{
    q->region_hint = hint;
    int status = walk_enter(q, &q->walk, gpa, len);

    //@ check q->region_hint < DATA_REGIONS;
    //@ check status == RING_MORE || status == RING_E_INDIRECT_LENGTH || status == RING_E_UNMAPPED;
    //@ check status == RING_MORE ==> q->walk.indirect && q->walk.next < q->walk.entries <= q->table_limit;
    //@ check status == RING_MORE ==> q->walk.steps_left == q->walk.entries;
}

static void by_uva(const struct guestmem *mem)
{
    uint64_t uva = any_between(0, UINT64_MAX);

    //@ loop unroll A_SIZE + 2;
    for (uint64_t len = 0; len <= A_SIZE + 1; len++) {
        uint8_t *at = guestmem_uva(mem, uva, len);
        //@ check at == \null || \valid(at + (0 .. len - 1));
    }
    uint8_t *at = guestmem_uva(mem, uva, any_between(A_SIZE + 1, UINT64_MAX));
    //@ check at == \null;
}

int main(void)
{
    const struct guestmem *mem = data_memory();
    struct piece *pieces = any_pieces();
    struct vq q = {.mem = mem, .table_limit = TABLE_LIMIT};

    q.table = (struct vring_desc *)block(TABLE_LIMIT * sizeof(*q.table));
    by_uva(mem);
    //@ loop unroll ADDRESSES;
    for (uint32_t class = 0; class < ADDRESSES; class++) {
        uint64_t gpa = address(class);
        //@ loop unroll DATA_REGIONS;
        for (uint32_t hint = 0; hint < DATA_REGIONS; hint++) {
            //@ loop unroll PIECES + 1;
            for (uint32_t max = 0; max <= PIECES; max++)
                translate(mem, gpa, hint, pieces + (PIECES - max), max); /* the last `max` of the array */
            //@ loop unroll TABLE_LIMIT + 1;
            for (uint32_t entries = 0; entries <= TABLE_LIMIT; entries++) {
                enter(&q, gpa, hint, 16 * entries);
                enter(&q, gpa, hint, (uint32_t)any_between(16 * entries + 1, 16 * entries + 15));
            }
            enter(&q, gpa, hint, (uint32_t)any_between(16 * (TABLE_LIMIT + 1), UINT32_MAX));
        }
    }
    return 0;
}
