/* Every small ring: whatever a driver may have written into a ring of up to 4 descriptors and into an indirect table,
 * the device pops exactly what model.h says of it. The classes of contents are there, with what makes them few.
 *
 * One chain a run is enough. What a ring carries over from chain to chain is where it stands (each base is tried)
 * and the region that was found last (any: spread). The last descriptors of long chains have their places spread
 * rather than tried one by one: NUMBER is the largest ring and so many descriptors of a chain whose places are
 * tried in every combination. docs/proofs.md says what follows from all this.
 */
#include <inttypes.h>
#include <sanitizer/asan_interface.h>
#include <sys/mman.h>

#include "model.h"

#define USUAL 3 /* without a NUMBER */
#define PLENTY 16

struct bench {
    struct guest g;
    struct vq fresh; /* the queue as it was made */
    struct piece *pieces[3]; /* room for as many as... */
    uint64_t runs, complete, refused, broken;
};
static const uint32_t ROOM[] = {PLENTY, 1, 2}; /* ...this */

static void add_region(struct guest *g, uint64_t gpa, size_t bytes)
{
    void *at;

    guest_block(g, bytes, &at);
    g->regions[g->count - 1].gpa = g->regions[g->count - 1].uva = gpa;
}

static void bench_start(struct bench *b, uint32_t size, uint64_t features, uint32_t base)
{
    struct guest *g = &b->g;

    guest_init(g, size, features, base);
    add_region(g, A_AT, A_BYTES);
    add_region(g, A_AT + A_BYTES, B_BYTES);
    add_region(g, S_AT, S_BYTES);
    add_region(g, S_AT + S_BYTES, T_BYTES);
    void *far = mmap(NULL, UINT32_MAX, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(far != MAP_FAILED);
    g->regions[g->count++] = (struct guest_region){H_AT, H_AT, UINT32_MAX, far};
    guest_start(g);
    /* the private copy of a table in a block of exactly its size as well */
    g->q->table_limit = TABLE_MAX;
    g->q->table = realloc(g->q->table, TABLE_MAX * sizeof(*g->q->table));
    b->fresh = *g->q;
    for (int i = 0; i < 3; i++)
        b->pieces[i] = malloc(ROOM[i] * sizeof(struct piece));
}

static void bench_end(struct bench *b)
{
    ASAN_UNPOISON_MEMORY_REGION(b->g.desc, b->g.config.size * sizeof(*b->g.desc));
    munmap(b->g.regions[--b->g.count].hva, UINT32_MAX);
    guest_end(&b->g);
    for (int i = 0; i < 3; i++)
        free(b->pieces[i]);
}

/* A cell as the driver writes it; what was never read would be refused. */
static struct vring_desc written(const struct guest *g, const struct cell *c, uint16_t id, uint16_t turn)
{
    static const struct cell junk = {.flags = DESC_F_NEXT | DESC_F_INDIRECT, .next = 0xFFFF, .at = {UINT64_MAX, 1}};

    c = c->read ? c : &junk;
    if (g->is_packed) /* id, then flags */
        return (struct vring_desc){c->at.addr, c->at.len, id, (uint16_t)(c->flags | turn)};
    return (struct vring_desc){c->at.addr, c->at.len, c->flags, c->next};
}

static void write_ring(struct guest *g, const struct table *ring, uint16_t first_turn)
{
    for (uint32_t i = 0; i < ring->entries; i++) {
        ASAN_UNPOISON_MEMORY_REGION(&g->desc[i], sizeof(g->desc[i]));
        bool first = i == (g->config.base & 0x7fff);
        uint16_t turn = first ? first_turn : (uint16_t)((i & 1 ? PACKED_F_AVAIL : 0) | (i & 2 ? PACKED_F_USED : 0));
        g->desc[i] = written(g, &ring->cells[i], packed_id(i), turn);
        if (!ring->cells[i].read && !(g->is_packed && first))
            ASAN_POISON_MEMORY_REGION(&g->desc[i], sizeof(g->desc[i]));
    }
}

static void write_table(const struct guest *g, const struct table *t)
{
    struct vring_desc entries[TABLE_MAX];
    const uint8_t *from = (const uint8_t *)entries;

    for (uint32_t i = 0; i < t->entries; i++)
        entries[i] = written(g, &t->cells[i], 0, 0);
    for (uint64_t done = 0, left; done < t->entries * sizeof(*entries); done += left) {
        uint8_t *to = byte_at(g, t->at.addr + done, &left);
        if (!to) /* a place where the device finds no table either */
            return;
        if (left > t->entries * sizeof(*entries) - done)
            left = t->entries * sizeof(*entries) - done;
        memcpy(to, from + done, left);
    }
}

/* The same from the verbs one by one, with their number bounded. */
static int pop_by_steps(struct vq *q, struct chain *c, struct piece *pieces, uint32_t max)
{
    int status = vq_see(q);

    if (status <= 0)
        return status < 0 ? status : RING_EMPTY;
    status = vq_take(q, c);
    if (status != RING_OK)
        return status;
    for (uint32_t steps = 0; (status = vq_walk(q, c, pieces, max)) == RING_MORE; steps++)
        CHECK(steps < q->size + q->table_limit);
    return status;
}

/* Pieces one by one: each lies where the model's bytes lie. */
static void check_pieces(const struct model *m, const struct chain *c, const struct piece *p)
{
    for (uint32_t writable = 0; writable < 2; writable++) {
        const struct piece *end = p + (writable ? c->writable : c->readable);
        for (uint32_t i = 0; i < m->count; i++) {
            struct place at = m->buffers[i].at;
            if (m->buffers[i].writable != writable)
                continue;
            for (uint64_t done = 0, left; done < at.len; done += p++->len) {
                CHECK(p < end && p->len > 0 && p->len <= at.len - done);
                CHECK(p->base == byte_at(m->g, at.addr + done, &left));
                CHECK(p->len <= left);
            }
        }
        CHECK(p == end);
    }
}

/* Where the ring stands after `slots`, as vq_base encodes it. */
static uint32_t moved(const struct guest *g, uint32_t slots)
{
    uint32_t base = g->config.base;

    if (!g->is_packed)
        return (base + slots) & 0xFFFF;
    uint32_t at = (base & 0x7FFF) + slots;
    uint32_t flip = at >= g->config.size ? 0x8000 : 0;
    return (base & 0xFFFF0000) | (((base & 0x8000) ^ flip) | (at % g->config.size));
}

static void check_chain(struct bench *b, const struct model *m, int status, const struct chain *c,
                        const struct piece *pieces)
{
    CHECK(c->readable + c->writable <= m->max);
    CHECK_EQ(c->slots, m->slots);
    CHECK_EQ(c->head, m->head);
    CHECK_EQ(c->descriptors, m->steps);
    CHECK_EQ(b->g.q->broken, m->endless ? RING_E_ENDLESS : RING_OK);
    if (m->endless) {
        CHECK_EQ(status, RING_E_ENDLESS);
        b->broken++;
    } else if (m->rules) {
        CHECK(status < 0 && status >= RING_E_LENGTH && m->rules & RULE(status));
        CHECK_EQ(c->status, status);
        CHECK_EQ(c->bad, m->bad);
        b->refused++;
    } else {
        CHECK_EQ(status, RING_OK);
        CHECK_EQ(c->status, RING_OK);
        CHECK_EQ(c->readable_len, m->readable_len);
        CHECK_EQ(c->writable_len, m->writable_len);
        check_pieces(m, c, pieces);
        b->complete++;
    }
}

/* What the ring itself says, before any chain. -> the status without a chain, or RING_OK and the chain's start. */
static int choose_split(struct bench *b, uint32_t *head)
{
    struct guest *g = &b->g;
    uint32_t size = g->config.size;
    const uint32_t ahead[] = {1 + spread(size), 0, size + 1, 0xFFFF};
    uint32_t which = choose(4);
    /* renumbering all descriptors changes nothing */
    uint32_t heads = size <= 2 ? size : 1, chosen = choose(heads + 1);

    *head = chosen == heads ? size : chosen;
    g->avail->idx = (uint16_t)(g->config.base + ahead[which]);
    memset(g->avail->ring, 0xFF, 2 * size);
    g->avail->ring[g->config.base % size] = (uint16_t)*head;
    if (which > 0)
        return which == 1 ? RING_EMPTY : RING_E_AVAIL_AHEAD;
    return *head == size ? RING_E_HEAD_RANGE : RING_OK;
}

static int choose_packed(const struct bench *b, uint32_t *slot, uint16_t *turn)
{
    static const uint16_t turns[] = {0, PACKED_F_AVAIL, PACKED_F_USED, PACKED_F_AVAIL | PACKED_F_USED};
    uint32_t base = b->g.config.base;

    *slot = base & 0x7FFF;
    *turn = turns[choose(4)];
    return *turn == (base & 0x8000 ? PACKED_F_AVAIL : PACKED_F_USED) ? RING_OK : RING_EMPTY; /* 2.8.1 */
}

static void run(struct bench *b, uint32_t budget)
{
    struct guest *g = &b->g;
    struct table table = {.indirect = true}, ring = {.entries = g->config.size};
    uint32_t room = choose(3), start;
    struct model m = {.g = g, .ring = &ring, .table = &table, .budget = budget, .max = ROOM[room], .slots = 1};
    struct chain c = {0};
    uint16_t turn = 0;

    *g->q = b->fresh;
    g->q->region_hint = spread(g->count);
    int wanted = g->is_packed ? choose_packed(b, &start, &turn) : choose_split(b, &start);
    if (wanted == RING_OK && g->is_packed) {
        model_packed(&m, start, 1);
    } else if (wanted == RING_OK) {
        m.head = start;
        model_split(&m, &ring, start, 1);
    }
    write_ring(g, &ring, turn);
    if (table.entries)
        write_table(g, &table);
    int status = (b->runs & 1 ? vq_pop : pop_by_steps)(g->q, &c, b->pieces[room], m.max);
    if (wanted == RING_OK) {
        check_chain(b, &m, status, &c, b->pieces[room]);
    } else {
        CHECK_EQ(status, wanted);
        CHECK_EQ(g->q->broken, wanted < 0 ? wanted : RING_OK);
        b->broken += wanted < 0;
    }
    CHECK_EQ(vq_base(g->q), moved(g, wanted == RING_OK ? m.slots : 0));
    b->runs++;
}

static void every_ring(uint64_t format)
{
    uint32_t largest = number ? (uint32_t)number : USUAL;
    struct bench b = {0};

    for (uint32_t size = 1; size <= largest; size += format & PACKED ? 1 : size)
        for (uint32_t indirect = 0; indirect < 2; indirect++)
            for (uint32_t at = 0; at < (format & PACKED ? 2 * size : 2); at++) {
                uint32_t base = format & PACKED ? packed_base(at / 2, at % 2) : at ? 0xFFFF : 0;
                bench_start(&b, size, format | (indirect ? INDIRECT : 0), base);
                do
                    run(&b, largest);
                while (next_run());
                bench_end(&b);
            }
    printf("%" PRIu64 " rings: %" PRIu64 " chains complete, %" PRIu64 " refused; %" PRIu64 " rings broken\n", b.runs,
           b.complete, b.refused, b.broken);
    CHECK(b.complete && b.refused && b.broken);
}
EACH_FORMAT(every_ring)
