/* The split ring's device side, under sanitizers: no access outside the bytes a ring, a table, a buffer or the
 * caller's array has, whatever the driver wrote. What the rules are is tested from Python (test_ring_hostile.py). */
#include "guest.h"

static int followed, refused; /* chains, since the program started */

/* Serve everything that waits; every device-writable byte is written, every readable one read.
 * -> chains served, or the code that broke the ring. */
static int serve(struct guest *g, struct piece *pieces, uint32_t max)
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

TEST(full_rings_touch_nothing_beside_themselves)
{
    for (uint32_t size = 1; size <= RING_QUEUE_SIZE_MAX; size *= 2) {
        struct guest g;
        struct piece pieces[1];
        guest_init(&g, size, EVENT_IDX, (uint16_t)(0xFFFF - size / 2));
        guest_start(&g);
        for (uint32_t i = 0; i < size; i++)
            guest_offer(&g, (uint16_t)i);
        CHECK_EQ(serve(&g, pieces, 1), size);
        CHECK_EQ(vq_arm(g.q), 0);
        CHECK_EQ(vq_disarm(g.q), RING_OK);
        CHECK_EQ(g.used->idx, g.avail->idx);
        guest_end(&g);
    }
}

TEST(pieces_of_the_caller_are_not_overrun)
{
    struct guest g;
    uint8_t *data;
    guest_init(&g, 8, 0, 0);
    uint64_t gpa = guest_block(&g, 64, &data);
    guest_start(&g);
    for (uint16_t i = 0; i < 8; i++)
        g.desc[i] = (struct vring_desc){gpa + i, 1, DESC_F_NEXT, (uint16_t)(i + 1)};
    g.desc[7].flags = 0;
    for (uint32_t max = 0; max <= 8; max++) {
        struct piece *pieces = malloc(max * sizeof(*pieces));
        struct chain c;
        guest_offer(&g, 0);
        CHECK_EQ(vq_pop(g.q, &c, pieces, max), max == 8 ? RING_OK : RING_E_PIECES);
        CHECK_EQ(c.readable, max);
        free(pieces);
    }
    guest_end(&g);
}

TEST(R15_buffers_end_where_their_region_ends)
{
    struct guest g;
    uint8_t *data;
    struct piece pieces[4];
    guest_init(&g, 2, 0, 0);
    uint64_t gpa = guest_block(&g, 100, &data);
    guest_start(&g);
    static const struct { uint64_t offset; uint32_t len; bool inside; } cases[] = {
        {0, 100, true}, {99, 1, true}, {0, 101, false}, {99, 2, false}, {100, 1, false}, {(uint64_t)-1, 1, false},
        {(uint64_t)-1, 2, false}, {50, UINT32_MAX, false},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        struct chain c;
        g.desc[0] = (struct vring_desc){gpa + cases[i].offset, cases[i].len, DESC_F_WRITE, 0};
        guest_offer(&g, 0);
        CHECK_EQ(vq_pop(g.q, &c, pieces, 4), cases[i].inside ? RING_OK : RING_E_UNMAPPED);
        if (cases[i].inside)
            memset(pieces[0].base, 1, pieces[0].len);
    }
    g.desc[0] = (struct vring_desc){UINT64_MAX, 1, 0, 0};
    guest_offer(&g, 0);
    CHECK_EQ(serve(&g, pieces, 4), 1);
    guest_end(&g);
}

TEST(R24_R41_indirect_tables_at_any_address)
{
    for (uint32_t shift = 0; shift < 16; shift++) {
        struct guest g;
        uint8_t *table, *data;
        struct piece pieces[8];
        struct chain c;
        guest_init(&g, 4, INDIRECT, 0);
        uint64_t at = guest_block(&g, shift + 3 * sizeof(struct vring_desc), &table) + shift;
        uint64_t gpa = guest_block(&g, 3, &data);
        for (uint16_t i = 0; i < 3; i++) {
            struct vring_desc d = {gpa + i, 1, i < 2 ? DESC_F_NEXT : DESC_F_WRITE, (uint16_t)(i + 1)};
            memcpy(table + shift + i * sizeof(d), &d, sizeof(d));
        }
        guest_start(&g);
        g.desc[0] = (struct vring_desc){at, 3 * sizeof(struct vring_desc), DESC_F_INDIRECT, 0};
        guest_offer(&g, 0);
        CHECK_EQ(vq_pop(g.q, &c, pieces, 8), RING_OK);
        CHECK(c.readable == 2 && c.writable == 1 && c.descriptors == 4);
        g.desc[0].addr++; /* now it ends one byte behind its region */
        guest_offer(&g, 0);
        CHECK_EQ(vq_pop(g.q, &c, pieces, 8), RING_E_UNMAPPED);
        guest_end(&g);
    }
}

TEST(R26_longest_indirect_table_fits_its_private_copy)
{
    for (uint32_t size = 1; size <= RING_QUEUE_SIZE_MAX; size *= 8) {
        struct guest g;
        struct vring_desc *table;
        struct piece pieces[1];
        struct chain c;
        uint32_t limit = size > 1024 ? size : 1024;
        guest_init(&g, size, INDIRECT, 0);
        uint64_t at = guest_block(&g, (limit + 1) * sizeof(*table), &table);
        for (uint32_t i = 0; i <= limit; i++)
            table[i] = (struct vring_desc){0, 0, i < limit - 1 ? DESC_F_NEXT : 0, (uint16_t)(i + 1)};
        guest_start(&g);
        for (uint32_t entries = limit - 1; entries <= limit + 1; entries++) {
            g.desc[0] = (struct vring_desc){at, entries * (uint32_t)sizeof(*table), DESC_F_INDIRECT, 0};
            guest_offer(&g, 0);
            CHECK_EQ(vq_pop(g.q, &c, pieces, 1), entries < limit ? RING_E_NEXT_RANGE : entries == limit ? RING_OK
                                                                                   : RING_E_INDIRECT_LENGTH);
        }
        guest_end(&g);
    }
}

/* A number that often lies in or near [0, size). */
static uint32_t near(uint64_t *random, uint32_t size)
{
    uint64_t n = next_random(random);

    return (uint32_t)(n & 7 ? (n >> 8) % size : (n >> 8) % (2ull * size));
}

TEST(any_ring_contents)
{
    uint64_t random = 88172645463325252ull;

    for (int i = 0; i < 20000; i++) {
        struct guest g;
        struct vring_desc *table;
        uint8_t *data;
        struct piece pieces[12];
        uint32_t size = 1u << next_random(&random) % 5;
        guest_init(&g, size, (next_random(&random) & 3) << FEATURE_INDIRECT_DESC, (uint16_t)next_random(&random));
        uint64_t table_at = guest_block(&g, 20 * sizeof(*table), &table), data_at = guest_block(&g, 77, &data);
        for (uint32_t n = 0; n < size + 20; n++) {
            struct vring_desc *d = n < size ? &g.desc[n] : &table[n - size];
            bool names_table = next_random(&random) % 4 == 0;
            *d = (struct vring_desc){
                .addr = names_table ? table_at + (next_random(&random) & 1) : data_at + near(&random, 80),
                .len = names_table ? near(&random, 20) * 16 : near(&random, 77),
                .flags = (uint16_t)(names_table ? DESC_F_INDIRECT | (next_random(&random) & 3)
                                                : next_random(&random) & 3),
                .next = (uint16_t)near(&random, n < size ? size : 20),
            };
        }
        guest_start(&g);
        for (uint32_t n = 0; n < size; n++)
            g.avail->ring[n] = (uint16_t)(next_random(&random) % 16 ? near(&random, size) % size : near(&random, size));
        g.avail->idx = (uint16_t)(g.config.base + near(&random, size + 1));
        int served = serve(&g, pieces, 12);
        CHECK(served >= 0 || served == RING_E_HEAD_RANGE || served == RING_E_AVAIL_AHEAD);
        CHECK(served <= (int)size);
        guest_end(&g);
    }
    CHECK(followed > 10000 && refused > 10000); /* or the numbers are badly chosen */
}
