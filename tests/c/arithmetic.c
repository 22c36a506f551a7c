/*
 * The arithmetic of indices, over whole ranges of numbers rather than a few: going round a packed ring, the
 * positions a base may name, and whether an event index was passed. What should come out is counted step by step
 * where the core calculates.
 */
#include "guest.h"
#include "../../ring/core/packed.inl"
#include "../../ring/core/split.inl"

#if defined(__SANITIZE_ADDRESS__)
#define EVERY_SIZE_STEP 251 /* under a sanitizer a part of them is enough: it is not the numbers that it watches */
#else
#define EVERY_SIZE_STEP 1
#endif

/* --------------------------------------------------------------------------------- going round */

TEST(one_slot_on_in_a_packed_ring_of_every_size)
{
    struct vq q = {0};

    for (q.size = 1; q.size <= RING_QUEUE_SIZE_MAX; q.size += EVERY_SIZE_STEP) {
        uint16_t slot = 0;
        bool wrap = true;
        for (uint32_t n = 1; n < q.size; n++) {
            packed_advance(&q, &slot, &wrap, 1);
            CHECK(slot == n && wrap);
        }
        packed_advance(&q, &slot, &wrap, 1);
        CHECK(slot == 0 && !wrap);
    }
}

TEST(many_slots_on_and_back_are_as_many_times_one)
{
    struct vq q = {0};

    for (q.size = 1; q.size <= 40; q.size++)
        for (uint32_t first = 0; first < 2 * q.size; first++) {
            uint16_t there = (uint16_t)(first % q.size);
            bool there_wrap = first < q.size;
            for (uint32_t by = 0; by <= 5 * q.size; by++) {
                uint16_t slot = (uint16_t)(first % q.size);
                bool wrap = first < q.size;
                packed_advance(&q, &slot, &wrap, by);
                CHECK(slot == there && wrap == there_wrap);
                q.next_avail = slot;
                q.avail_wrap = wrap;
                packed_unpop(&q, by);
                CHECK(q.next_avail == first % q.size && q.avail_wrap == (first < q.size));
                if (++there == q.size) {
                    there = 0;
                    there_wrap = !there_wrap;
                }
            }
        }
}

/* --------------------------------------------------------------------------------------- bases */

/* A queue of this size started from `base`, or why not. */
static int start(struct guest *g, uint32_t base)
{
    int status;

    vq_free(g->q);
    g->config.base = base;
    g->q = vq_new(g->mem, &g->config, &status);
    CHECK(!g->q == (status != RING_OK));
    return status;
}

static void bases_of(uint32_t size, uint32_t step)
{
    struct guest g;

    guest_init(&g, size, PACKED, 0);
    guest_start(&g);
    for (uint32_t avail = 0; avail <= 0xffff; avail += step) {
        const uint32_t used_positions[] = {0, 1, avail, size - 1, size, 0x8000, 0x8000 | (size - 1), 0xffff};
        for (size_t i = 0; i < sizeof(used_positions) / sizeof(*used_positions); i++) {
            uint32_t used = used_positions[i] & 0xffff;
            int status = start(&g, avail | used << 16);
            if (used == 0) /* the low half stands for both */
                used = avail;
            bool inside = (avail & 0x7fff) < size && (used & 0x7fff) < size;
            CHECK_EQ(status, inside ? RING_OK : RING_E_BASE);
            if (!inside)
                continue;
            CHECK(g.q->next_avail < size && g.q->next_used < size && g.q->published < size && g.q->known < size);
            CHECK_EQ(vq_base(g.q), avail | used << 16);
        }
    }
    guest_end(&g);
}

TEST(packed_bases)
{
    for (uint32_t size = 1; size <= 5; size++)
        bases_of(size, EVERY_SIZE_STEP);
    bases_of(1000, EVERY_SIZE_STEP);
    bases_of(RING_QUEUE_SIZE_MAX - 1, EVERY_SIZE_STEP);
    bases_of(RING_QUEUE_SIZE_MAX, EVERY_SIZE_STEP);
}

TEST(split_bases)
{
    struct guest g;

    guest_init(&g, 4, 0, 0);
    guest_start(&g);
    for (uint32_t base = 0; base <= 0x1ffff; base += EVERY_SIZE_STEP) {
        g.used->idx = (uint16_t)(base - 3); /* what a device before us had published */
        CHECK_EQ(start(&g, base), RING_OK);
        CHECK_EQ(vq_base(g.q), base & 0xffff);
        CHECK(g.q->next_used == g.used->idx && g.q->published == g.used->idx);
    }
    guest_end(&g);
}

/* -------------------------------------------------------------------------------------- events */

/* 2.7.7.2: a split ring. All 65536 event indices, for numbers of entries published at once that are as small and as
 * large as they come. */
TEST(split_event_index)
{
    static const uint16_t firsts[] = {0, 1, 5, 32767, 32768, 65500, 65535};
    static const uint16_t counts[] = {1, 2, 3, 4, 64, 255, 256, 1000, 32767, 32768, 65535};
    static bool passed[65536];
    struct guest g;

    guest_init(&g, 4, EVENT_IDX, 0);
    guest_start(&g);
    g.q->first_decision = false;
    for (size_t f = 0; f < sizeof(firsts) / sizeof(*firsts); f++)
        for (size_t n = 0; n < sizeof(counts) / sizeof(*counts); n++) {
            memset(passed, 0, sizeof(passed));
            for (uint32_t i = 0; i < counts[n]; i++)
                passed[(uint16_t)(firsts[f] + i)] = true;
            for (uint32_t event = 0; event <= 0xffff; event += EVERY_SIZE_STEP) {
                g.q->decided = firsts[f];
                g.q->published = (uint16_t)(firsts[f] + counts[n]);
                *split_used_event(g.q) = (uint16_t)event;
                CHECK_EQ(vq_decide(g.q), passed[event] ? CALL_EVENT_REACHED : CALL_EVENT_AHEAD);
                CHECK_EQ(vq_decide(g.q), CALL_NOTHING_NEW);
            }
        }
    guest_end(&g);
}

/* Every position and wish of a packed ring of this size, after every number of slots up to more than two rounds: the
 * driver is called if its position was among them (2.8.10). After more than a round it may be called too often. */
static void packed_events(uint32_t size)
{
    struct guest g;

    guest_init(&g, size, PACKED | EVENT_IDX, packed_base(0, true));
    guest_start(&g);
    g.q->first_decision = false;
    for (uint32_t first = 0; first < 2 * size; first++)
        for (uint32_t moved = 1; moved <= 2 * size + 1; moved++) {
            uint32_t now = (first + moved) % (2 * size);
            bool passed[2 * RING_QUEUE_SIZE_MAX];
            memset(passed, 0, 2 * size * sizeof(*passed));
            for (uint32_t i = 0; i < moved; i++)
                passed[(first + i) % (2 * size)] = true;
            for (uint32_t event = 0; event < 2 * size; event++) {
                bool wrap = event < size;
                g.driver_event->flags = PACKED_EVENT_DESC;
                g.driver_event->off_wrap = (uint16_t)(event % size | (wrap ? 0x8000u : 0));
                g.q->undecided = moved;
                g.q->published = (uint16_t)(now % size);
                g.q->published_wrap = now < size;
                int reason = vq_decide(g.q);
                CHECK(reason == CALL_EVENT_REACHED || (reason == CALL_EVENT_AHEAD && !passed[event]));
                CHECK(reason == CALL_EVENT_AHEAD || passed[event] || moved > size);
            }
        }
    guest_end(&g);
}

TEST(packed_event_positions)
{
    for (uint32_t size = 1; size <= 12; size++)
        packed_events(size);
    packed_events(33);
}

/* What the driver writes into its structure may be nonsense: there is an answer to each, and it is the only one. */
TEST(packed_event_structures)
{
    struct guest g;

    guest_init(&g, 3, PACKED | EVENT_IDX, packed_base(0, true));
    guest_start(&g);
    g.q->first_decision = false;
    for (uint32_t flags = 0; flags <= 0xffff; flags += EVERY_SIZE_STEP)
        for (uint32_t off_wrap = 0; off_wrap <= 0xffff; off_wrap += 4093) {
            g.driver_event->both = off_wrap | flags << 16;
            g.q->undecided = 1;
            int reason = vq_decide(g.q);
            switch (flags & PACKED_EVENT_MASK) {
            case PACKED_EVENT_DISABLE:
                CHECK_EQ(reason, CALL_FLAG_SUPPRESSED);
                break;
            case PACKED_EVENT_DESC:
                CHECK(reason == CALL_EVENT_REACHED || reason == CALL_EVENT_AHEAD);
                break;
            default:
                CHECK_EQ(reason, CALL_FLAG_WANTS);
            }
        }
    guest_end(&g);
}
