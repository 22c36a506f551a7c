/* The device's side of either ring format, under sanitizers: no access outside the bytes that a ring, a table, a
 * buffer or the caller's array has. What the rules are is tested from Python (test_ring_hostile.py). */
#include "serve.h"

/* Every entry of the ring has gone back to the driver. */
static bool all_used(const struct guest *g)
{
    if (!g->is_packed)
        return g->used->idx == g->avail->idx;
    for (uint32_t i = 0; i < g->config.size; i++)
        if (!(g->packed[i].flags & PACKED_F_AVAIL) != !(g->packed[i].flags & PACKED_F_USED))
            return false;
    return true;
}

static void full_rings_touch_nothing_beside_themselves(uint64_t ring)
{
    static const uint32_t sizes[] = {1, 2, 3, 4, 7, 64, 100, 1024, 4097, RING_QUEUE_SIZE_MAX - 1, RING_QUEUE_SIZE_MAX};
    static const struct vring_desc nothing;

    for (size_t i = 0; i < sizeof(sizes) / sizeof(*sizes); i++) {
        struct guest g;
        struct piece pieces[1];
        uint32_t size = sizes[i];
        if (!(ring & PACKED) && size & (size - 1))
            continue;
        guest_init(&g, size, ring | EVENT_IDX, ring & PACKED ? packed_base(size / 2, false) : 0xFFFF - size / 2);
        guest_start(&g);
        for (uint32_t lap = 0; lap < 3; lap++) {
            for (uint32_t n = 0; n < size; n++)
                guest_chain(&g, &nothing, 1);
            CHECK_EQ(serve(&g, pieces, 1), size);
            CHECK_EQ(vq_arm(g.q), 0);
            CHECK_EQ(vq_disarm(g.q), RING_OK);
            CHECK(all_used(&g));
        }
        guest_end(&g);
    }
}
EACH_FORMAT(full_rings_touch_nothing_beside_themselves)

static void pieces_of_the_caller_are_not_overrun(uint64_t ring)
{
    struct guest g;
    struct vring_desc buffers[8];
    uint8_t *data;

    guest_init(&g, 8, ring, ring & PACKED ? packed_base(7, true) : 0);
    uint64_t gpa = guest_block(&g, 64, &data);
    guest_start(&g);
    for (uint32_t i = 0; i < 8; i++)
        buffers[i] = (struct vring_desc){gpa + i, 1, 0, 0};
    for (uint32_t max = 0; max <= 8; max++) {
        struct piece *pieces = malloc(max * sizeof(*pieces));
        struct chain c;
        guest_chain(&g, buffers, 8);
        CHECK_EQ(vq_pop(g.q, &c, pieces, max), max == 8 ? RING_OK : RING_E_PIECES);
        CHECK_EQ(c.readable, max);
        free(pieces);
    }
    guest_end(&g);
}
EACH_FORMAT(pieces_of_the_caller_are_not_overrun)

static void R15_buffers_end_where_their_region_ends(uint64_t ring)
{
    struct guest g;
    uint8_t *data;
    struct piece pieces[4];

    guest_init(&g, 2, ring, ring & PACKED ? packed_base(0, true) : 0);
    uint64_t gpa = guest_block(&g, 100, &data);
    guest_start(&g);
    static const struct { uint64_t offset; uint32_t len; bool inside; } cases[] = {
        {0, 100, true}, {99, 1, true}, {0, 101, false}, {99, 2, false}, {100, 1, false}, {(uint64_t)-1, 1, false},
        {(uint64_t)-1, 2, false}, {50, UINT32_MAX, false},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        struct chain c;
        guest_chain(&g, &(struct vring_desc){gpa + cases[i].offset, cases[i].len, DESC_F_WRITE, 0}, 1);
        CHECK_EQ(vq_pop(g.q, &c, pieces, 4), cases[i].inside ? RING_OK : RING_E_UNMAPPED);
        if (cases[i].inside)
            memset(pieces[0].base, 1, pieces[0].len);
    }
    guest_chain(&g, &(struct vring_desc){UINT64_MAX, 1, 0, 0}, 1);
    CHECK_EQ(serve(&g, pieces, 4), 1);
    guest_end(&g);
}
EACH_FORMAT(R15_buffers_end_where_their_region_ends)

static void R24_R41_indirect_tables_at_any_address(uint64_t ring)
{
    for (uint32_t shift = 0; shift < 16; shift++) {
        struct guest g;
        struct vring_desc buffers[3];
        uint8_t *table, *data;
        struct piece pieces[8];
        struct chain c;
        guest_init(&g, 4, ring | INDIRECT, ring & PACKED ? packed_base(3, false) : 0);
        uint64_t at = guest_block(&g, shift + sizeof(buffers), &table) + shift;
        uint64_t gpa = guest_block(&g, 3, &data);
        for (uint32_t i = 0; i < 3; i++)
            buffers[i] = (struct vring_desc){gpa + i, 1, i < 2 ? 0 : DESC_F_WRITE, 0};
        guest_table(&g, table + shift, buffers, 3);
        guest_start(&g);
        guest_chain(&g, &(struct vring_desc){at, sizeof(buffers), DESC_F_INDIRECT, 0}, 1);
        CHECK_EQ(vq_pop(g.q, &c, pieces, 8), RING_OK);
        CHECK(c.readable == 2 && c.writable == 1 && c.descriptors == 4);
        /* now it ends one byte behind its region */
        guest_chain(&g, &(struct vring_desc){at + 1, sizeof(buffers), DESC_F_INDIRECT, 0}, 1);
        CHECK_EQ(vq_pop(g.q, &c, pieces, 8), RING_E_UNMAPPED);
        guest_end(&g);
    }
}
EACH_FORMAT(R24_R41_indirect_tables_at_any_address)

static void R26_longest_indirect_table_fits_its_private_copy(uint64_t ring)
{
    static const uint32_t sizes[] = {1, 8, 512, 4096, RING_QUEUE_SIZE_MAX};

    for (size_t i = 0; i < sizeof(sizes) / sizeof(*sizes); i++) {
        struct guest g;
        uint8_t *table;
        struct piece pieces[1];
        struct chain c;
        uint32_t limit = sizes[i] > 1024 ? sizes[i] : 1024;
        struct vring_desc *nothing = calloc(limit + 1, sizeof(*nothing));
        guest_init(&g, sizes[i], ring | INDIRECT, ring & PACKED ? packed_base(0, true) : 0);
        uint64_t at = guest_block(&g, (limit + 1) * sizeof(*nothing), &table);
        guest_table(&g, table, nothing, limit);
        free(nothing);
        guest_start(&g);
        for (uint32_t entries = limit - 1; entries <= limit + 1; entries++) {
            uint32_t len = entries * (uint32_t)sizeof(struct vring_desc);
            /* a split ring's table that is cut off goes on behind its end */
            int cut_off = ring & PACKED ? RING_OK : RING_E_NEXT_RANGE;
            guest_chain(&g, &(struct vring_desc){at, len, DESC_F_INDIRECT, 0}, 1);
            CHECK_EQ(vq_pop(g.q, &c, pieces, 1),
                     entries < limit ? cut_off : entries == limit ? RING_OK : RING_E_INDIRECT_LENGTH);
        }
        guest_end(&g);
    }
}
EACH_FORMAT(R26_longest_indirect_table_fits_its_private_copy)

static uint32_t below(uint64_t *random, uint32_t size)
{
    return (uint32_t)(next_random(random) % size);
}

/* A number that often lies in or near [0, size). */
static uint32_t near(uint64_t *random, uint32_t size)
{
    uint64_t n = next_random(random);

    return (uint32_t)(n & 7 ? (n >> 8) % size : (n >> 8) % (2ull * size));
}

#define TABLE 20
#define DATA 77

/* A descriptor that mostly means something, in the format of the split ring. */
static struct vring_desc any_descriptor(uint64_t *random, uint64_t table, uint64_t data, uint32_t size)
{
    bool names_table = below(random, 4) == 0;

    return (struct vring_desc){
        .addr = names_table ? table + below(random, 2) : data + near(random, DATA + 3),
        .len = names_table ? near(random, TABLE) * 16 : near(random, DATA),
        .flags = (uint16_t)(below(random, 4) | (names_table ? DESC_F_INDIRECT : 0)),
        .next = (uint16_t)near(random, size),
    };
}

/* The same as a packed ring has it: mostly available to a device with this wrap counter. */
static struct packed_desc any_packed(uint64_t *random, bool wrap, uint64_t table, uint64_t data, uint32_t size)
{
    struct vring_desc d = any_descriptor(random, table, data, size);
    uint16_t turn = wrap ? PACKED_F_AVAIL : PACKED_F_USED;

    if (below(random, 8) == 0)
        turn = (uint16_t)(next_random(random) & (PACKED_F_AVAIL | PACKED_F_USED));
    return (struct packed_desc){d.addr, d.len, d.next, d.flags | turn};
}

static void fill(struct guest *g, void *to, uint32_t entries, uint64_t table, uint64_t data, uint64_t *random)
{
    for (uint32_t n = 0; n < entries; n++)
        if (g->is_packed)
            ((struct packed_desc *)to)[n] = any_packed(random, g->wrap, table, data, entries);
        else
            ((struct vring_desc *)to)[n] = any_descriptor(random, table, data, entries);
}

static void any_ring_contents(uint64_t ring)
{
    uint64_t random = 88172645463325252ull;

    for (int i = 0; i < 20000; i++) {
        struct guest g;
        uint8_t *table, *data;
        struct piece pieces[12];
        uint32_t size = ring & PACKED ? below(&random, 17) + 1 : 1u << below(&random, 5);
        uint32_t base = ring & PACKED ? packed_base(below(&random, size), i & 1) : below(&random, 1 << 16);
        guest_init(&g, size, ring | (next_random(&random) & 3) << FEATURE_INDIRECT_DESC, base);
        uint64_t table_at = guest_block(&g, TABLE * sizeof(struct vring_desc), &table);
        uint64_t data_at = guest_block(&g, DATA, &data);
        fill(&g, g.desc, size, table_at, data_at, &random);
        fill(&g, table, TABLE, table_at, data_at, &random);
        guest_start(&g);
        if (!g.is_packed) {
            for (uint32_t n = 0; n < size; n++)
                g.avail->ring[n] = (uint16_t)(below(&random, 16) ? below(&random, size) : near(&random, size));
            g.avail->idx = (uint16_t)(base + near(&random, size + 1));
        }
        int served = serve(&g, pieces, 12);
        CHECK(served >= 0 || served == (g.is_packed ? RING_E_ENDLESS : RING_E_HEAD_RANGE) ||
              (!g.is_packed && served == RING_E_AVAIL_AHEAD));
        CHECK(served <= (int)size);
        guest_end(&g);
    }
    CHECK(followed > 5000 && refused > 5000); /* or the numbers are badly chosen */
}
EACH_FORMAT(any_ring_contents)
