/* Rings rewritten at full speed by another thread while the device works: whatever it reads, it stays inside the
 * bytes of the rings, of the buffers and of its own arrays. The races are the point: no ThreadSanitizer here. */
#define _GNU_SOURCE
#include <pthread.h>

#include "wire.h"

#define SIZE 16
#define TABLE 24
#define DATA 3000

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
    guest_init(&t->g, SIZE, features, features & PACKED ? packed_base(0, true) : 0);
    t->table_at = guest_block(&t->g, TABLE * sizeof(*t->table), &t->table);
    t->data_at = guest_block(&t->g, DATA, &t->data);
    guest_start(&t->g);
}

/* After a broken ring: a new one, nothing outstanding. */
static void target_restart(struct target *t)
{
    int status;

    vq_free(t->g.q);
    if (!t->g.is_packed) {
        t->g.config.base = load16(&t->g.avail->idx);
        store16(&t->g.used->idx, (uint16_t)t->g.config.base);
    }
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

static void change_buffer(struct vring_desc *d, uint64_t addr, uint64_t len)
{
    d->addr = addr;
    d->len = (uint32_t)len;
}

/* Flags, and next or id. In a packed ring what makes a descriptor available changes too, often to what it takes. */
static void change_flags(const struct target *t, struct vring_desc *d, uint64_t flags, uint64_t other, uint64_t n)
{
    if (t->g.is_packed) {
        struct packed_desc *p = (struct packed_desc *)(void *)d;
        p->id = (uint16_t)other;
        p->flags = (uint16_t)(flags | (n & 1 ? PACKED_F_AVAIL : 0) | (n & 2 ? PACKED_F_USED : 0));
    } else {
        d->flags = (uint16_t)flags;
        d->next = (uint16_t)other;
    }
}

/* One change to a descriptor of the ring, or of the indirect table: mostly to something that can be followed. */
static void change_descriptor(struct target *t, uint64_t what, uint64_t n)
{
    struct vring_desc *d = what & 16 ? &t->table[n % TABLE] : &t->g.desc[n % SIZE];
    uint64_t turn = n >> 60;

    switch (what % 16) {
    case 0 ... 4:
        change_buffer(d, t->data_at + (n >> 8) % DATA / 2, 26 + (n >> 32) % (DATA / 4));
        change_flags(t, d, t->usual, (n >> 16) % SIZE, turn);
        break;
    case 5:
        change_buffer(d, t->data_at + (n >> 8) % (DATA + 8), (n >> 32) % (DATA / 2));
        break;
    case 6 ... 7:
        change_flags(t, d, t->usual | DESC_F_NEXT, (n >> 16) % SIZE, turn);
        break;
    case 8:
        change_flags(t, d, n >> 8 & 7, (n >> 16) % (TABLE + 1), turn);
        break;
    case 9:
        change_buffer(d, t->table_at + (n >> 8) % 18, (n >> 16) % (TABLE + 2) * 16);
        change_flags(t, d, DESC_F_INDIRECT, (n >> 24) % SIZE, turn);
        break;
    default:
        d->addr = n;
        break;
    }
}

static void change_split(struct target *t, uint64_t what, uint64_t n)
{
    struct guest *g = &t->g;

    switch (what % 6) {
    case 0 ... 1:
        store16(&g->avail->ring[n % SIZE], (uint16_t)((n >> 8) % (n >> 52 ? SIZE : SIZE + 1)));
        break;
    case 2 ... 3:
        if (n >> 52 == 0) /* rarely, for it mostly breaks the ring */
            store16(&g->avail->idx, (uint16_t)(n >> 8));
        else if ((uint16_t)(load16(&g->avail->idx) - load16(&g->used->idx)) < SIZE / 2)
            store16(&g->avail->idx, (uint16_t)(load16(&g->avail->idx) + 1));
        break;
    case 4:
        /* not its idx, from which this thread takes how far the device is; R34 has a test of its own */
        memset((uint8_t *)g->used + 4 + n % (2 + 8 * SIZE), (int)(n >> 32), 1);
        break;
    default:
        store16(n & 1 ? &g->avail->flags : &g->avail->ring[SIZE], (uint16_t)(n >> 8)); /* flags or used_event */
        break;
    }
}

static void change_packed(struct target *t, uint64_t what, uint64_t n)
{
    struct guest *g = &t->g;

    switch (what % 6) {
    case 0:
        store32(&g->driver_event->both, (uint32_t)n);
        break;
    case 1:
        store16(&g->driver_event->flags, n % 4);
        break;
    case 2:
        store32(&g->device_event->both, (uint32_t)n);
        break;
    case 3: /* rarely, for it breaks the ring: a chain without an end */
        for (int i = 0; i < SIZE && n >> 57 == 0; i++)
            change_flags(t, &g->desc[i], t->usual | DESC_F_NEXT, 0, n);
        break;
    default: /* all that is left of the device's first round is available, or of its second */
        for (int i = 0; i < SIZE; i++)
            change_flags(t, &g->desc[i], t->usual, n, n & 64 ? 1 : 2);
        break;
    }
}

/* One change to anything the driver may write. */
static void change(struct target *t, uint64_t *random)
{
    uint64_t what = next_random(random), n = next_random(random);

    switch (what % 16) {
    case 0 ... 9:
        change_descriptor(t, what >> 8, n);
        break;
    case 10:
        t->data[n % DATA] = (uint8_t)(n >> 60 ? 0 : n >> 32); /* a header of zeros is a good one */
        break;
    default:
        (t->g.is_packed ? change_packed : change_split)(t, what >> 8, n);
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

/* Make available what lies where the device stands. */
static void offer_next(struct target *t)
{
    const struct vq *q = t->g.q;

    if (!t->g.is_packed) {
        store16(&t->g.avail->idx, (uint16_t)(q->next_avail + 1));
        return;
    }
    uint16_t *flags = &t->g.packed[q->next_avail].flags, rest = DESC_F_NEXT | DESC_F_WRITE | DESC_F_INDIRECT;
    store16(flags, (uint16_t)((load16(flags) & rest) | (q->avail_wrap ? PACKED_F_AVAIL : PACKED_F_USED)));
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
    while (followed < 20000 || refused < 20000 || broken < 10) {
        struct chain c;
        int status = vq_pop(t.g.q, &c, pieces, 40);
        if (status == RING_EMPTY) {
            offer_next(&t);
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

static void R28_R29_R31_R35_step_calls(uint64_t ring) { pop_under_mutation(ring | EVENT_IDX); }
static void R26_R28_R29_R31_step_calls_indirect(uint64_t ring) { pop_under_mutation(ring | INDIRECT); }
EACH_FORMAT(R28_R29_R31_R35_step_calls)
EACH_FORMAT(R26_R28_R29_R31_step_calls_indirect)

/* Has each direction seen enough of both kinds? */
static bool enough(const struct wire *w)
{
    struct lane_stats s;

    lane_stats_get(w->lane, &s);
    return s.from_guest.frames > 500 && s.to_guest.frames > 50 && s.from_guest.bad_chains > 500 &&
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

static void R03_R35_R51_pump(uint64_t ring) { pump_under_mutation(ring | EVENT_IDX); }
static void R03_R26_R50_R51_pump_mergeable_indirect(uint64_t ring)
{
    pump_under_mutation(ring | EVENT_IDX | INDIRECT | MRG_RXBUF);
}
EACH_RING(R03_R35_R51_pump)
EACH_RING(R03_R26_R50_R51_pump_mergeable_indirect)

/* One frame takes chain after chain while the driver makes ever more available: without a bound of our own it would
 * take more than the ring has. */
static void *run_ahead(void *argument)
{
    struct mutator *m = argument;
    struct guest *g = &m->targets[0]->g;

    while (!__atomic_load_n(&m->stop, __ATOMIC_RELAXED)) {
        uint16_t next = __atomic_load_n(&g->q->next_avail, __ATOMIC_RELAXED);
        if (!g->is_packed) {
            store16(&g->avail->idx, (uint16_t)(next + SIZE / 2));
            continue;
        }
        bool wrap = __atomic_load_n(&g->q->avail_wrap, __ATOMIC_RELAXED);
        for (uint32_t i = next; i < next + SIZE / 2u; i++)
            store16(&g->packed[i % SIZE].flags, DESC_F_WRITE | (wrap ^ (i >= SIZE) ? PACKED_F_AVAIL : PACKED_F_USED));
    }
    return NULL;
}

static void R03_R50_frame_that_chases_the_driver(uint64_t ring)
{
    static struct target to;
    struct wire w;
    struct lane_stats stats = {0};
    static const uint8_t frame[12 + 2000];
    uint64_t one = 1;

    wire_init(&w, ring | MRG_RXBUF);
    target_init(&to, ring | MRG_RXBUF, DESC_F_WRITE);
    for (uint16_t i = 0; i < SIZE; i++) {
        to.g.desc[i] = (struct vring_desc){to.data_at, 12, 0, 0};
        if (!to.g.is_packed) {
            to.g.desc[i].flags = DESC_F_WRITE;
            to.g.avail->ring[i] = i;
        }
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
EACH_FORMAT(R03_R50_frame_that_chases_the_driver)
