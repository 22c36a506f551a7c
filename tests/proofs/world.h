/*
 * A guest of which nothing is known but where its memory lies: the ring parts in blocks of exactly their size, and
 * three small regions for buffers and indirect tables, small enough to try every address of them.
 *
 *     gpa     0x1000              0x1014          0x1024          2^64-5       2^64-1
 *     ......... | region A: 20 bytes | B: 16 bytes | .............. | T: 4 bytes | .
 *
 * A and B are neighbours in the guest's address space and not in ours, so a buffer across their border makes two
 * pieces, and two descriptors' worth of table (32 bytes) fit only across it.
 */
#pragma once

#include "frama.h"

#define A_GPA 0x1000ull
#define A_SIZE 20
#define B_GPA (A_GPA + A_SIZE)
#define B_SIZE 16
#define T_SIZE 4
#define T_GPA (UINT64_MAX - T_SIZE)
#define DATA_REGIONS 3
#define UVA 0x700000000000ull /* uva - gpa, and where the ring parts are */

#define TABLE_LIMIT 2 /* entries of an indirect table, so that the limit bites within 36 bytes of memory */
#define PIECES 2      /* of the caller's array */

#define INDIRECT (1ull << FEATURE_INDIRECT_DESC)
#define EVENT_IDX (1ull << FEATURE_EVENT_IDX)
#define RING_PACKED (1ull << FEATURE_RING_PACKED)

static uint8_t *data_a, *data_b, *data_t;
static int32_t gone;

static uint8_t *block(size_t size)
{
    uint8_t *at = malloc(size);

    if (!at)
        exit(0); /* nothing to prove then */
    Frama_C_make_unknown((char *)at, size);
    return at;
}

static struct guestmem *data_memory(void)
{
    int status;
    struct guest_region regions[DATA_REGIONS] = {
        {T_GPA, 0x2000, T_SIZE, data_t = block(T_SIZE)},
        {A_GPA, UVA + A_GPA, A_SIZE, data_a = block(A_SIZE)},
        {B_GPA, UVA + B_GPA, B_SIZE, data_b = block(B_SIZE)},
    };
    struct guestmem *mem = guestmem_new(regions, DATA_REGIONS, &gone, &status);

    if (!mem)
        exit(0);
    return mem;
}

/* A ring of `size` descriptors, started from any base, with its parts in blocks of their own. The memory its
 * descriptors speak of is `data`. */
static struct vq *any_queue(uint32_t size, uint64_t features, const struct guestmem *data)
{
    bool packed = features & RING_PACKED;
    struct guest_region regions[] = {
        {1, UVA, 16 * size, block(16 * size)},
        {0x10000000, 2 * UVA, packed ? 4 : 6 + 2 * size, block(packed ? 4 : 6 + 2 * size)},
        {0x20000000, 3 * UVA, packed ? 4 : 6 + 8 * size, block(packed ? 4 : 6 + 8 * size)},
    };
    struct vq_config config = {.size = size, .base = any32(), .desc = UVA, .avail = 2 * UVA, .used = 3 * UVA,
                               .features = features};
    int status;
    struct guestmem *rings = guestmem_new(regions, 3, &gone, &status);
    struct vq *q = rings ? vq_new(rings, &config, &status) : NULL;

    if (!q)
        exit(0);
    q->mem = data;
    return q;
}

/* Tables so short that their limit bites within this memory. */
static void set_table_limit(struct vq *q)
{
    free(q->table);
    q->table_limit = TABLE_LIMIT;
    q->table = (struct vring_desc *)block(TABLE_LIMIT * sizeof(*q->table));
}

/* The caller's array, of exactly PIECES; what lies in it is whatever an earlier chain left. */
static struct piece *any_pieces(void)
{
    return (struct piece *)block(PIECES * sizeof(struct piece));
}
