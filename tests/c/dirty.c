/* The dirty log under sanitizers: which bits, none outside the log, and none lost to a front-end that takes them out
 * while the device marks. Under ThreadSanitizer the bit alone orders the device's stores before the front-end's copy. */
#define _GNU_SOURCE
#include <pthread.h>

#include "threads.h"
#include "wire.h"

#define SIZE 64

static struct dirty_log log_new(uint64_t size, int32_t *owner)
{
    struct dirty_log log = {.bits = calloc(1, size), .size = size, .owner = owner};

    CHECK(log.bits);
    return log;
}

/* What the specification says, one bit at a time: page p is bit p % 8 of byte p / 8. */
static void model_mark(uint8_t *bits, uint64_t size, uint64_t gpa, uint64_t len)
{
    for (uint64_t page = gpa / DIRTY_PAGE; len > 0 && page <= (gpa + len - 1) / DIRTY_PAGE; page++)
        if (page / 8 < size)
            bits[page / 8] |= (uint8_t)(1 << page % 8);
}

TEST(P89_any_range_of_any_piece)
{
    struct guest g;
    uint8_t *data[2];
    uint64_t gpa[2], random = 88172645463325252ull;
    const uint64_t bytes = 70 * DIRTY_PAGE + 123;
    int32_t gone = 0;

    guest_init(&g, SIZE, 0, 0);
    for (int i = 0; i < 2; i++)
        gpa[i] = guest_block(&g, bytes, &data[i]);
    guest_start(&g);
    uint64_t size = gpa[1] / DIRTY_PAGE / 8 + 7; /* the last region reaches beyond it */
    uint8_t *wanted = malloc(size);
    for (int i = 0; i < 200; i++) {
        struct dirty_log log = log_new(size, &gone);
        struct piece pieces[3];
        uint64_t offset = next_random(&random) % (2 * bytes), len = next_random(&random) % (3 * bytes), at = 0;
        uint8_t private; /* memory beside the guest's is passed over */
        memset(wanted, 0, size);
        for (int p = 0; p < 3; p++) {
            int block = (int)(next_random(&random) % 3);
            uint64_t start = next_random(&random) % bytes;
            pieces[p] = block == 2 ? (struct piece){&private, 1}
                                   : (struct piece){data[block] + start, 1 + next_random(&random) % (bytes - start)};
            uint64_t from = offset > at ? offset - at : 0, left = at + from - offset;
            if (from < pieces[p].len && left < len && block != 2)
                model_mark(wanted, size, gpa[block] + start + from,
                           pieces[p].len - from < len - left ? pieces[p].len - from : len - left);
            at += pieces[p].len;
        }
        vq_log(g.q, &log, 1, 0, 0);
        CHECK_EQ(vq_mark(g.q, pieces, 3, offset, len), RING_OK);
        CHECK(memcmp(log.bits, wanted, size) == 0);
        free(log.bits);
    }
    free(wanted);
    guest_end(&g);
}

TEST(P93_used_ring_anywhere)
{
    struct guest g;
    int32_t gone = 0;

    guest_init(&g, SIZE, EVENT_IDX, 0);
    guest_start(&g);
    for (uint64_t size = 1; size < 6; size++) {
        struct dirty_log log = log_new(size, &gone);
        for (uint64_t used = 0; used < 7 * 8 * DIRTY_PAGE; used += 511) {
            for (int end = 0; end < 2; end++) {
                vq_log(g.q, &log, 0, 1, end ? UINT64_MAX - used : used);
                CHECK_EQ(vq_push(g.q, 0, 1, 0), RING_OK);
                CHECK_EQ(vq_publish(g.q), RING_OK);
                CHECK(vq_arm(g.q) >= 0);
            }
        }
        CHECK(log.skipped > 0 && log.bits[size - 1] == 0xff);
        free(log.bits);
    }
    guest_end(&g);
}

/* The reverse of translation, over more regions than a front-end may send. */
TEST(region_of_an_address)
{
    enum { COUNT = 600 };
    static struct guest_region regions[COUNT];
    uint8_t *space = malloc(COUNT * 64);
    int32_t gone = 0;
    int status;

    for (uint64_t i = 0; i < COUNT; i++) /* in another order than gpas; 64 bytes apart, 1 to 64 long */
        regions[i] = (struct guest_region){.gpa = i * 64, .uva = i * 64, .size = 1 + i % 64,
                                           .hva = space + i * 7 % COUNT * 64};
    struct guestmem *mem = guestmem_new(regions, COUNT, &gone, &status);
    CHECK(mem);
    for (uint64_t i = 0; i < COUNT; i++)
        for (uint64_t at = 0; at < 64; at++) {
            const struct guest_region *r = guestmem_region_at(mem, regions[i].hva + at);
            CHECK_EQ(r ? r->gpa : UINT64_MAX, at < regions[i].size ? regions[i].gpa : UINT64_MAX);
        }
    CHECK(!guestmem_region_at(mem, space - 1) && !guestmem_region_at(mem, space + COUNT * 64));
    guestmem_free(mem);
    free(space);
}

/* ------------------------------------------------------------------------------- two threads, one bit */

#define END UINT64_MAX

/* A device and a front-end that work in rounds; each waits for the other's number. */
struct rounds {
    struct guest g;
    struct dirty_log log;
    struct piece page;
    uint64_t *word;       /* of the log, with the bit of the page */
    uint64_t round, done; /* atomic: begun by the front-end, ended by the device */
    bool can_meet;        /* there is a processor for each of them */
};

static void rounds_init(struct rounds *r)
{
    static int32_t gone;

    *r = (struct rounds){.page.len = DIRTY_PAGE, .can_meet = processors() > 1};
    guest_init(&r->g, SIZE, 0, 0);
    uint64_t gpa = guest_block(&r->g, DIRTY_PAGE, &r->page.base);
    guest_start(&r->g);
    r->log = log_new(gpa / DIRTY_PAGE / 8 + 8, &gone);
    r->word = (uint64_t *)(void *)(r->log.bits + gpa / DIRTY_PAGE / 8);
    vq_log(r->g.q, &r->log, 1, 1, gpa); /* the used ring counts as part of the page */
}

static void rounds_end(struct rounds *r)
{
    free(r->log.bits);
    guest_end(&r->g);
}

/* Wait until `number` is no more what it was. -> what it is now */
static uint64_t wait_for_other(const uint64_t *number, uint64_t than)
{
    uint64_t now;

    for (int spins = 0; (now = __atomic_load_n(number, __ATOMIC_ACQUIRE)) == than; spins++)
        if (spins > 1000)
            sched_yield();
    return now;
}

static void *write_and_mark(void *argument)
{
    struct rounds *r = argument;

    for (uint64_t round = 0; (round = wait_for_other(&r->round, round)) != END;) {
        CHECK_EQ(pieces_write(&r->page, 1, 0, (const uint8_t *)&round, sizeof(round)), sizeof(round));
        CHECK_EQ(vq_mark(r->g.q, &r->page, 1, 0, sizeof(round)), RING_OK);
    }
    return NULL;
}

/* Whoever took the bit may read the page: nothing else tells it that the device has written. */
TEST(VU_LOG_B_06_bit_comes_after_the_data)
{
    static struct rounds r;
    pthread_t device;

    rounds_init(&r);
    CHECK(pthread_create(&device, NULL, write_and_mark, &r) == 0);
    for (uint64_t round = 1; round <= 5000; round++) {
        uint64_t copy;
        __atomic_store_n(&r.round, round, __ATOMIC_RELEASE);
        wait_for_other(r.word, 0);
        CHECK(__atomic_exchange_n(r.word, 0, __ATOMIC_ACQUIRE) == 1);
        memcpy(&copy, r.page.base, sizeof(copy));
        CHECK_EQ(copy, round);
    }
    __atomic_store_n(&r.round, END, __ATOMIC_RELEASE);
    CHECK(pthread_join(device, NULL) == 0);
    rounds_end(&r);
}

static void pause_up_to(uint64_t *random, uint64_t most)
{
    for (volatile uint64_t left = next_random(random) % most; left > 0; left--)
        ;
}

#define PUBLICATIONS 8 /* a round */

static void *publish_often(void *argument)
{
    struct rounds *r = argument;

    if (r->can_meet)
        settle(1);
    for (uint64_t round = 0; (round = wait_for_other(&r->round, round)) != END;) {
        for (int i = 0; i < PUBLICATIONS; i++) {
            CHECK_EQ(vq_push(r->g.q, 0, 1, 0), RING_OK);
            CHECK_EQ(vq_publish(r->g.q), RING_OK);
        }
        __atomic_store_n(&r->done, round, __ATOMIC_RELEASE);
    }
    return NULL;
}

/* The front-end takes the bit out, and copies used.idx if it was set. -> was it? */
static bool take(const struct rounds *r, uint16_t *copy)
{
    if (!__atomic_exchange_n(r->word, 0, __ATOMIC_SEQ_CST))
        return false;
    *copy = load16(&r->g.used->idx);
    return true;
}

/* Once somewhere among the device's publications and once after them: what the front-end has then is the last one. */
TEST(VU_LOG_B_06_no_mark_is_lost)
{
    static struct rounds r;
    pthread_t device;
    uint64_t meetings = 0, random = 7;
    uint16_t copy = 0;

    rounds_init(&r);
    CHECK(pthread_create(&device, NULL, publish_often, &r) == 0);
    if (r.can_meet)
        settle(0);
    for (uint64_t round = 1; round <= (number ? number : 20000); round++) {
        __atomic_store_n(&r.round, round, __ATOMIC_RELEASE);
        pause_up_to(&random, 200);
        meetings += take(&r, &copy) && __atomic_load_n(&r.done, __ATOMIC_RELAXED) != round;
        wait_for_other(&r.done, round - 1);
        take(&r, &copy);
        CHECK_EQ(copy, (uint16_t)(round * PUBLICATIONS));
    }
    __atomic_store_n(&r.round, END, __ATOMIC_RELEASE);
    CHECK(pthread_join(device, NULL) == 0);
    CHECK(meetings > 0 || !r.can_meet);
    rounds_end(&r);
}

struct marker {
    struct guest *g;
    struct piece page;
    uint8_t *byte, mine;
};

static void *mark_again_and_again(void *argument)
{
    struct marker *m = argument;

    for (int i = 0; i < 100000; i++) {
        __atomic_fetch_and(m->byte, (uint8_t)~m->mine, __ATOMIC_RELAXED);
        CHECK_EQ(vq_mark(m->g->q, &m->page, 1, 0, 1), RING_OK);
        CHECK(__atomic_load_n(m->byte, __ATOMIC_RELAXED) & m->mine);
    }
    return NULL;
}

TEST(VU_LOG_B_06_two_threads_share_a_byte)
{
    static struct guest g;
    uint8_t *data;
    int32_t gone = 0;
    pthread_t other;

    guest_init(&g, SIZE, 0, 0);
    uint64_t gpa = guest_block(&g, 2 * DIRTY_PAGE, &data);
    guest_start(&g);
    struct dirty_log log = log_new(gpa / DIRTY_PAGE / 8 + 8, &gone);
    uint8_t *byte = log.bits + gpa / DIRTY_PAGE / 8;
    vq_log(g.q, &log, 1, 0, 0);
    struct marker first = {&g, {data, 1}, byte, 1}, second = {&g, {data + DIRTY_PAGE, 1}, byte, 2};
    CHECK(pthread_create(&other, NULL, mark_again_and_again, &second) == 0);
    mark_again_and_again(&first);
    CHECK(pthread_join(other, NULL) == 0);
    CHECK_EQ(*byte, 3);
    free(log.bits);
    guest_end(&g);
}

/* --------------------------------------------------------------------------- a guest on its way elsewhere */

struct migration {
    struct guest *g;
    struct dirty_log *log;
    uint8_t *copies[REGIONS_MAX]; /* of the regions, as the other host has them */
    pthread_t thread;
    int stop;        /* atomic */
    uint64_t copied; /* pages */
};

/* Take bits out a word at a time, and copy those pages. */
static void synchronize(struct migration *m)
{
    for (uint32_t i = 0; i < m->g->count; i++) {
        const struct guest_region *r = &m->g->regions[i];
        for (uint64_t page = r->gpa / DIRTY_PAGE; page <= (r->gpa + r->size - 1) / DIRTY_PAGE; page += 64) {
            uint64_t bits = __atomic_exchange_n((uint64_t *)(void *)(m->log->bits + page / 8), 0, __ATOMIC_SEQ_CST);
            for (; bits; bits &= bits - 1) {
                uint64_t at = (page + (uint64_t)__builtin_ctzll(bits)) * DIRTY_PAGE - r->gpa;
                CHECK(at < r->size);
                memcpy(m->copies[i] + at, r->hva + at, r->size - at < DIRTY_PAGE ? r->size - at : DIRTY_PAGE);
                m->copied++;
            }
        }
    }
}

static void *migrate(void *argument)
{
    struct migration *m = argument;

    while (!__atomic_load_n(&m->stop, __ATOMIC_RELAXED)) {
#ifndef __SANITIZE_THREAD__ /* the copy races with the device, and is made once more for that reason */
        synchronize(m);
#endif
        sched_yield();
    }
    return NULL;
}

/* Are all the chains back that filled the ring? */
static bool all_used(const struct guest *g, uint32_t rounds)
{
    if (!g->is_packed)
        return load16_acquire(&g->used->idx) == (uint16_t)(rounds * SIZE);
    uint16_t used = PACKED_F_AVAIL | PACKED_F_USED, wanted = g->wrap ? 0 : used; /* by now the driver's is flipped */
    for (uint32_t slot = 0; slot < SIZE; slot++)
        if ((load16_acquire(&g->packed[slot].flags) & used) != wanted)
            return false;
    return true;
}

/* Post a buffer for each descriptor of the ring and send a frame for each. */
static void post_and_send(struct guest *g, struct wire *w, uint64_t data_at, uint32_t buffer, uint64_t *random)
{
    uint8_t frame[NET_HEADER + 1500] = {0};
    uint64_t one = 1;

    for (uint32_t i = 0; i < SIZE; i++)
        guest_chain(g, &(struct vring_desc){.addr = data_at + i * buffer, .len = buffer, .flags = DESC_F_WRITE}, 1);
    for (int i = 0; i < SIZE; i++) {
        for (size_t at = NET_HEADER; at < sizeof(frame); at += 100)
            frame[at] = (uint8_t)next_random(random);
        while (send(w->far, frame, sizeof(frame), 0) < 0)
            usleep(10);
        ssize_t r = write(w->kick[1], &one, sizeof(one));
        (void)r;
    }
}

static void VU_LOG_B_06_copy_of_a_working_guest_is_whole(uint64_t ring)
{
    static struct guest g;
    static struct migration m;
    struct wire w;
    const uint64_t features = ring | EVENT_IDX | MRG_RXBUF;
    const uint32_t buffer = 1700; /* so that buffers share pages */
    uint64_t random = 42;
    int32_t gone = 0;
    uint8_t *data;

    wire_init(&w, features);
    guest_init(&g, SIZE, features, ring & PACKED ? packed_base(0, true) : 0);
    uint64_t data_at = guest_block(&g, SIZE * buffer, &data);
    guest_start(&g);
    struct dirty_log log = log_new((g.count + 1) * 0x10000000ull / DIRTY_PAGE / 8, &gone);
    vq_log(g.q, &log, 1, 1, g.config.used);
    m = (struct migration){.g = &g, .log = &log};
    for (uint32_t i = 0; i < g.count; i++)
        m.copies[i] = calloc(1, g.regions[i].size);
    CHECK(pthread_create(&m.thread, NULL, migrate, &m) == 0);
    wire_attach(&w, NULL, g.q);
    for (uint32_t round = 1; round <= 100; round++) {
        post_and_send(&g, &w, data_at, buffer, &random);
        while (!all_used(&g, round))
            usleep(10);
    }
    wire_detach(&w);
    __atomic_store_n(&m.stop, 1, __ATOMIC_RELAXED);
    CHECK(pthread_join(m.thread, NULL) == 0);
    synchronize(&m);
    /* the guest's own stores, to the first two parts of its ring, are not for the device to mark */
    for (uint32_t i = 2; i < g.count; i++)
        CHECK(memcmp(m.copies[i], g.regions[i].hva, g.regions[i].size) == 0);
    CHECK(m.copied > 0 && log.skipped == 0);
    for (uint32_t i = 0; i < g.count; i++)
        free(m.copies[i]);
    free(log.bits);
    wire_end(&w);
    guest_end(&g);
}
EACH_FORMAT(VU_LOG_B_06_copy_of_a_working_guest_is_whole)
