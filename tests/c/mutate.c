/* Rings rewritten at full speed by another thread while the device works: whatever it reads, it stays inside the
 * bytes of the rings, of the buffers and of its own arrays. The races are the point: no ThreadSanitizer here. */
#define _GNU_SOURCE
#include <pthread.h>

#include "wire.h"

#define SIZE 16
#define TABLE 24
#define DATA 3000
#define MRG_RXBUF (1ull << 15)

struct target {
    struct guest g;
    struct vring_desc *table;
    uint8_t *data;
    uint64_t table_at, data_at;
    uint16_t usual; /* flags of a descriptor that is all right here */
};

static void target_init(struct target *t, uint64_t features, uint16_t usual)
{
    t->usual = usual;
    guest_init(&t->g, SIZE, features, 0);
    t->table_at = guest_block(&t->g, TABLE * sizeof(*t->table), &t->table);
    t->data_at = guest_block(&t->g, DATA, &t->data);
    guest_start(&t->g);
}

/* After a broken ring: a new one, nothing outstanding. */
static void target_restart(struct target *t)
{
    int status;

    vq_free(t->g.q);
    t->g.config.base = load16(&t->g.avail->idx);
    store16(&t->g.used->idx, (uint16_t)t->g.config.base);
    t->g.q = vq_new(t->g.mem, &t->g.config, &status);
    CHECK(t->g.q);
}

struct mutator {
    pthread_t thread;
    struct target *targets[2];
    int kick[2];
    int stop; /* atomic */
    uint64_t changes;
};

/* One change to descriptors, table or rings: mostly something that can be followed. */
static void change(struct target *t, uint64_t *random)
{
    uint64_t what = next_random(random), n = next_random(random);
    struct vring_desc *d = what & 16 ? &t->table[n % TABLE] : &t->g.desc[n % SIZE];

    switch (what % 16) {
    case 0 ... 3:
        *d = (struct vring_desc){t->data_at + (n >> 8) % DATA / 2, 26 + (uint32_t)((n >> 32) % (DATA / 4)), t->usual, 0};
        break;
    case 4:
        d->addr = t->data_at + (n >> 8) % (DATA + 8);
        d->len = (uint32_t)((n >> 32) % (DATA / 2));
        break;
    case 5 ... 6:
        d->flags = (uint16_t)(t->usual | DESC_F_NEXT);
        d->next = (uint16_t)((n >> 16) % SIZE);
        break;
    case 7:
        d->flags = (uint16_t)(n >> 8 & 7);
        d->next = (uint16_t)((n >> 16) % (TABLE + 1));
        break;
    case 8:
        d->addr = t->table_at + (n >> 8) % 18;
        d->len = (uint32_t)((n >> 16) % (TABLE + 2)) * 16;
        d->flags = DESC_F_INDIRECT;
        break;
    case 9:
        *(uint64_t *)(void *)d = n;
        break;
    case 10 ... 11:
        store16(&t->g.avail->ring[n % SIZE], (uint16_t)((n >> 8) % (n >> 52 ? SIZE : SIZE + 1)));
        break;
    case 12 ... 13:
        if (n >> 52 == 0) /* rarely, for it mostly breaks the ring */
            store16(&t->g.avail->idx, (uint16_t)(n >> 8));
        else if ((uint16_t)(load16(&t->g.avail->idx) - load16(&t->g.used->idx)) < SIZE / 2)
            store16(&t->g.avail->idx, (uint16_t)(load16(&t->g.avail->idx) + 1));
        break;
    case 14:
        /* not its idx, from which this thread takes how far the device is; R34 has a test of its own */
        memset((uint8_t *)t->g.used + 4 + n % (2 + 8 * SIZE), (int)(n >> 32), 1);
        break;
    default:
        store16(&t->g.avail->ring[SIZE], (uint16_t)n); /* used_event */
        t->data[n % DATA] = (uint8_t)(n >> 60 ? 0 : n >> 32); /* a header of zeros is a good one */
        break;
    }
}

static void *mutate(void *argument)
{
    struct mutator *m = argument;
    uint64_t random = 42, one = 1;

    while (!__atomic_load_n(&m->stop, __ATOMIC_RELAXED)) {
        int side = m->targets[1] ? (int)(next_random(&random) & 1) : 0;
        change(m->targets[side], &random);
        if (m->kick[side] && ++m->changes % 32 == 0) { /* at a pace the pump, and its control, can follow */
            ssize_t r = write(m->kick[side], &one, sizeof(one));
            (void)r;
            usleep(1);
        }
    }
    return NULL;
}

static void mutator_stop(struct mutator *m)
{
    __atomic_store_n(&m->stop, 1, __ATOMIC_RELAXED);
    CHECK(pthread_join(m->thread, NULL) == 0);
}

/* The device through the step calls. */
static void pop_under_mutation(uint64_t features)
{
    static struct target t;
    struct mutator m = {.targets = {&t}};
    struct piece *pieces = malloc(40 * sizeof(*pieces));
    uint8_t private[64];
    int followed = 0, refused = 0, broken = 0;

    target_init(&t, features, 0);
    CHECK(pthread_create(&m.thread, NULL, mutate, &m) == 0);
    while (followed < 20000 || refused < 20000 || broken < 20) {
        struct chain c;
        int status = vq_pop(t.g.q, &c, pieces, 40);
        if (status == RING_EMPTY) {
            store16(&t.g.avail->idx, (uint16_t)(t.g.q->next_avail + 1));
            continue;
        }
        if (t.g.q->broken) {
            broken++;
            target_restart(&t);
            continue;
        }
        if (status == RING_OK) {
            followed++;
            CHECK(pieces_read(pieces, c.readable, 0, private, sizeof(private)) >= 0);
            for (uint32_t n = c.readable; n < c.readable + c.writable; n++)
                memset(pieces[n].base, 0xA5, pieces[n].len);
        } else {
            refused++;
        }
        vq_push(t.g.q, c.head, c.slots, 0);
        vq_publish(t.g.q);
        CHECK(vq_decide(t.g.q) >= 0);
        vq_arm(t.g.q);
    }
    mutator_stop(&m);
    free(pieces);
    guest_end(&t.g);
}

TEST(R26_R28_R29_R31_step_calls) { pop_under_mutation(EVENT_IDX); }
TEST(R26_R28_R29_R31_step_calls_indirect) { pop_under_mutation(EVENT_IDX | INDIRECT); }

/* Has each direction seen enough of both kinds? */
static bool enough(const struct wire *w)
{
    struct lane_stats s;

    lane_stats_get(w->lane, &s);
    return s.from_guest.frames > 500 && s.to_guest.frames > 200 && s.from_guest.bad_chains > 500 &&
           s.to_guest.bad_chains > 500;
}

/* The pump, both directions, with traffic on the wire. */
static void pump_under_mutation(uint64_t features)
{
    static struct target from, to;
    struct wire w;
    static uint8_t frame[70000];
    int broken = 0;
    uint64_t random = 7;

    wire_init(&w, features);
    target_init(&from, features, 0);
    target_init(&to, features, DESC_F_WRITE);
    struct mutator m = {.targets = {&from, &to}, .kick = {w.kick[0], w.kick[1]}};
    CHECK(pthread_create(&m.thread, NULL, mutate, &m) == 0);
    for (int round = 0; !enough(&w) || broken < 5; round++) {
        CHECK(round < 5000);
        wire_attach(&w, from.g.q, to.g.q);
        for (int i = 0; i < 30; i++) {
            size_t length = 12 + 14 + next_random(&random) % (i % 10 ? 400 : 65000);
            frame[0] = frame[1] = 0;
            ssize_t ignored = send(w.far, frame, length, 0);
            while ((ignored = recv(w.far, frame, sizeof(frame), 0)) > 0)
                CHECK(ignored >= 12 + 14);
            usleep(20);
        }
        wire_detach(&w);
        uint32_t events = lane_events(w.lane);
        CHECK(!(events & (LANE_MEMORY_GONE | LANE_PORT_GONE)));
        if (events & LANE_FROM_GUEST_BROKEN)
            target_restart(&from);
        if (events & LANE_TO_GUEST_BROKEN)
            target_restart(&to);
        broken += events != 0;
    }
    mutator_stop(&m);
    wire_end(&w);
    guest_end(&from.g);
    guest_end(&to.g);
}

TEST(R03_R51_pump) { pump_under_mutation(EVENT_IDX); }
TEST(R03_R50_R51_pump_mergeable_indirect) { pump_under_mutation(EVENT_IDX | INDIRECT | MRG_RXBUF); }

/* One frame takes chain after chain while the driver makes ever more available: without a bound of our own it would
 * take more than the ring has. */
static void *run_ahead(void *argument)
{
    struct mutator *m = argument;
    struct guest *g = &m->targets[0]->g;

    while (!__atomic_load_n(&m->stop, __ATOMIC_RELAXED))
        store16(&g->avail->idx, (uint16_t)(__atomic_load_n(&g->q->next_avail, __ATOMIC_RELAXED) + SIZE / 2));
    return NULL;
}

TEST(R03_R50_frame_that_chases_the_available_index)
{
    static struct target to;
    struct wire w;
    struct lane_stats stats = {0};
    static const uint8_t frame[12 + 2000];
    uint64_t one = 1;

    wire_init(&w, MRG_RXBUF);
    target_init(&to, MRG_RXBUF, DESC_F_WRITE);
    for (uint16_t i = 0; i < SIZE; i++) {
        to.g.desc[i] = (struct vring_desc){to.data_at, 12, DESC_F_WRITE, 0};
        to.g.avail->ring[i] = i;
    }
    /* Both threads have to meet; where the processors are busy with others, that takes many rounds. */
    for (int round = 0; stats.to_guest.dropped[DROP_TOO_SMALL] < 10; round++) {
        struct mutator m = {.targets = {&to}};
        CHECK(round < 200000);
        CHECK(pthread_create(&m.thread, NULL, run_ahead, &m) == 0);
        wire_attach(&w, NULL, to.g.q);
        for (int i = 0; i < 5; i++) {
            ssize_t ignored = send(w.far, frame, sizeof(frame), 0);
            ignored = write(w.kick[1], &one, sizeof(one));
            (void)ignored;
            usleep(20);
        }
        wire_detach(&w);
        mutator_stop(&m);
        lane_stats_get(w.lane, &stats);
        target_restart(&to); /* giving back what was too little may leave the index too far ahead */
    }
    CHECK_EQ(stats.to_guest.frames, 0);
    wire_end(&w);
    guest_end(&to.g);
}
