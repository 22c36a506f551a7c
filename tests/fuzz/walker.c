/* The device's verbs on a ring and an indirect table with any contents, in any order that a device may use, the driver
 * writing between them.
 *
 * An input: features and size, the base, descriptors of ring and table, then moves until it ends. A descriptor is four
 * bytes (any_descriptor), a move one and its arguments. What the device may not do whatever it reads:
 *
 *   - touch a byte outside the ring's parts, the buffers' regions and its own arrays (exact blocks, AddressSanitizer)
 *   - hand out a piece that lies in no region, or more pieces than there is room for
 *   - walk further than the ring and a table are long
 *   - move its position but by the slots of a chain that it took
 *   - go on with a ring that it has called broken
 */
#include "fuzz.h"

#define MOVES 48
#define CHAINS 32 /* popped and not used */
#define TABLE 6
#define A_BYTES 40
#define B_BYTES 24
#define PIECES 5

struct bench {
    struct guest g;
    struct guestmem *tables[2]; /* with all regions, and without the last one */
    uint32_t now;               /* which of them */
    uint64_t a_at, table_at;
    struct vring_desc *table;
    struct piece *pieces;
    uint32_t room;
    uint64_t taken, used; /* where the ring has to stand */
    bool walking;
    struct chain chain; /* the one in hand */
    struct chain popped[CHAINS];
    uint32_t count;
    int broken;
};

/* ------------------------------------------------------------------------------------------------- driver */

/* Buffers at A and B and about their ends, tables, the ring itself, the end of the address space. */
static uint64_t any_address(const struct bench *b, uint8_t n)
{
    uint64_t offset = n & 63;

    switch (n >> 6) {
    case 0: return b->a_at - 1 + offset;
    case 1: return b->table_at - 4 + 2 * offset;
    case 2: return b->g.config.desc + 4 * offset;
    default: return UINT64_MAX - offset;
    }
}

static struct vring_desc any_descriptor(const struct bench *b, struct input *in)
{
    uint64_t addr = any_address(b, input8(in));
    uint8_t len = input8(in), flags = input8(in), other = input8(in);
    uint32_t bytes = len < 128 ? len : len == 255 ? UINT32_MAX : (len - 128u) * 16;
    uint16_t next = other == 255 ? UINT16_MAX : other & 15;
    uint16_t turn = (uint16_t)((flags & 8 ? PACKED_F_AVAIL : 0) | (flags & 16 ? PACKED_F_USED : 0));

    if (b->g.is_packed) /* id, then flags */
        return (struct vring_desc){addr, bytes, next, (flags & 7) | turn};
    return (struct vring_desc){addr, bytes, flags & 7, next};
}

static void write_available(struct bench *b, struct input *in)
{
    uint8_t n = input8(in), what = input8(in);

    if (b->g.is_packed)
        return;
    b->g.avail->ring[n % b->g.config.size] = what == 255 ? UINT16_MAX : what & 15;
    b->g.avail->idx = (uint16_t)(b->taken + (n >> 4));
}

/* ------------------------------------------------------------------------------------------------- device */

/* -> whether this verb did what it is for: a broken ring says so again and again. */
static bool works(struct bench *b, int status)
{
    if (b->broken) {
        CHECK_EQ(status, b->broken);
        return false;
    }
    b->broken = b->g.q->broken;
    if (!b->broken)
        return true;
    CHECK_EQ(status, b->broken);
    CHECK(status == (b->g.is_packed ? RING_E_ENDLESS : RING_E_HEAD_RANGE) ||
          (!b->g.is_packed && status == RING_E_AVAIL_AHEAD));
    return false;
}

static bool is_inside(const struct bench *b, const struct piece *p)
{
    for (uint32_t i = 0; i < b->g.count - b->now; i++) {
        const struct guest_region *r = &b->g.regions[i];
        if (p->base >= r->hva && p->len <= r->size && (uint64_t)(p->base - r->hva) <= r->size - p->len)
            return true;
    }
    return false;
}

/* Use the buffers, as a device would. */
static void touch(struct bench *b)
{
    const struct chain *c = &b->chain;
    uint64_t sum = 0;
    volatile uint8_t sink = 0;

    CHECK(c->readable + c->writable <= b->room);
    for (uint32_t i = 0; i < c->readable + c->writable; i++) {
        CHECK(b->pieces[i].len > 0 && is_inside(b, &b->pieces[i]));
        sum += b->pieces[i].len;
        if (i < c->readable)
            sink = (uint8_t)(sink + b->pieces[i].base[0] + b->pieces[i].base[b->pieces[i].len - 1]);
        else
            memset(b->pieces[i].base, (int)sum, b->pieces[i].len);
    }
    CHECK_EQ(sum, c->readable_len + c->writable_len);
}

/* A chain came to its end, or broke a rule: it can be used. */
static void keep(struct bench *b, int status)
{
    CHECK_EQ(b->chain.status, status);
    CHECK(b->chain.slots > 0 && b->chain.slots <= b->g.config.size);
    if (status == RING_OK)
        touch(b);
    else
        CHECK(status < 0 && status >= RING_E_LENGTH);
    b->walking = false;
    if (b->count < CHAINS)
        b->popped[b->count++] = b->chain;
}

static void see(struct bench *b)
{
    int status = vq_see(b->g.q);

    if (works(b, status))
        CHECK(status >= 0 && status <= (int)b->g.config.size);
}

static void take(struct bench *b)
{
    if (b->walking)
        return;
    int status = vq_take(b->g.q, &b->chain);
    if (!works(b, status))
        return;
    CHECK(status == RING_OK || status == RING_EMPTY);
    b->walking = status == RING_OK;
    b->taken += b->walking && !b->g.is_packed;
}

static void walk(struct bench *b)
{
    uint32_t before = b->chain.slots;

    if (!b->walking)
        return;
    int status = vq_walk(b->g.q, &b->chain, b->pieces, b->room);
    if (b->broken)
        CHECK_EQ(b->chain.slots, before);
    b->taken += b->chain.slots - before;
    CHECK(b->chain.descriptors <= b->g.config.size + TABLE);
    if (works(b, status) && status != RING_MORE)
        keep(b, status);
}

static void pop(struct bench *b)
{
    if (b->walking)
        return;
    b->chain.slots = 0;
    int status = vq_pop(b->g.q, &b->chain, b->pieces, b->room);
    b->taken += b->chain.slots;
    CHECK(b->chain.descriptors <= b->g.config.size + TABLE);
    if (works(b, status) && status != RING_EMPTY)
        keep(b, status);
}

/* Give the chain in hand back, or the last one that was popped. */
static void unpop(struct bench *b)
{
    uint32_t slots = b->walking ? b->chain.slots : b->count ? b->popped[b->count - 1].slots : 0;

    if (!works(b, vq_unpop(b->g.q, slots)))
        return;
    b->taken -= slots;
    b->count -= !b->walking && b->count;
    b->walking = false;
}

/* Use any chain, with any length. */
static void push(struct bench *b, struct input *in)
{
    uint32_t written = input8(in);

    if (!b->count)
        return;
    uint32_t which = input_below(in, b->count);
    struct chain c = b->popped[which];
    if (!works(b, vq_push(b->g.q, c.head, c.slots, written)))
        return;
    b->used += c.slots;
    b->popped[which] = b->popped[--b->count];
}

/* Use all chains at once, then tell the driver: of a ring that broke as well. */
static void conclude(struct bench *b)
{
    uint32_t slots = 0;

    for (uint32_t i = 0; i < b->count; i++)
        slots += b->popped[i].slots;
    uint32_t head = b->count ? b->popped[b->count - 1].head : 0;
    CHECK(vq_conclude(b->g.q, head, b->count, slots) >= 0);
    b->used += slots;
    b->count = 0;
}

static void move_memory(struct bench *b)
{
    if (b->walking) /* a translation does not outlive its table */
        return;
    b->now = !b->now;
    CHECK_EQ(vq_move(b->g.q, b->tables[b->now]), RING_OK);
}

static void move(struct bench *b, struct input *in)
{
    switch (input_below(in, 14)) {
    case 0: b->g.desc[input_below(in, b->g.config.size)] = any_descriptor(b, in); break;
    case 1: b->table[input_below(in, TABLE)] = any_descriptor(b, in); break;
    case 2: write_available(b, in); break;
    case 3: see(b); break;
    case 4: take(b); break;
    case 5: walk(b); break;
    case 6: pop(b); break;
    case 7: unpop(b); break;
    case 8: push(b, in); break;
    case 9: works(b, vq_publish(b->g.q)); break;
    case 10: works(b, vq_decide(b->g.q)); break;
    case 11: works(b, vq_arm(b->g.q)); works(b, vq_disarm(b->g.q)); break;
    case 12: conclude(b); break;
    default: move_memory(b); break;
    }
}

/* After every move: the ring stands where it has to. */
static void check_position(const struct bench *b)
{
    struct vq_state s;

    vq_state(b->g.q, &s);
    CHECK_EQ(vq_base(b->g.q) & 0xffff, field_at(&b->g, b->taken));
    CHECK_EQ(s.next_used | (s.used_wrap ? 0x8000u : 0), field_at(&b->g, b->used));
    CHECK_EQ(s.broken, b->broken);
}

static void bench_start(struct bench *b, struct input *in)
{
    uint8_t kind = input8(in), *at;
    uint32_t size = 1 + (kind >> 4) % 8;
    uint64_t features = (kind & 1 ? PACKED : 0) | (kind & 2 ? INDIRECT : 0) | (kind & 4 ? EVENT_IDX : 0);
    int status;

    while (!(kind & 1) && size & (size - 1)) /* a split ring's is a power of two */
        size &= size - 1;
    b->taken = b->used = input_ring(in, &b->g, size, features);
    b->room = kind & 8 ? PIECES : 1;
    b->pieces = malloc(b->room * sizeof(*b->pieces));
    b->table_at = guest_block(&b->g, TABLE * sizeof(*b->table), &b->table);
    b->a_at = guest_block(&b->g, A_BYTES, &at);
    guest_block(&b->g, B_BYTES, &at);
    b->g.regions[b->g.count - 1].gpa = b->a_at + A_BYTES; /* side by side with A, in the guest only */
    guest_start(&b->g);
    b->tables[0] = b->g.mem;
    b->tables[1] = guestmem_new(b->g.regions, b->g.count - 1, &b->g.gone, &status);
    CHECK(b->tables[1]);
    b->g.q->table_limit = TABLE; /* the private copy in a block of exactly its size as well */
    b->g.q->table = realloc(b->g.q->table, TABLE * sizeof(*b->table));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, data + size};
    struct bench b = {0};

    bench_start(&b, &in);
    for (uint32_t i = 0; i < b.g.config.size; i++)
        b.g.desc[i] = any_descriptor(&b, &in);
    for (uint32_t i = 0; i < TABLE; i++)
        b.table[i] = any_descriptor(&b, &in);
    for (int i = 0; i < MOVES && input_left(&in); i++) {
        move(&b, &in);
        check_position(&b);
    }
    guestmem_free(b.tables[1]);
    guest_end(&b.g);
    free(b.pieces);
    return 0;
}
