/* What virtio 1.2 says of a chain, as a model: a descriptor gets its contents when the model first reads it, as one of
 * many choices, and running the model until no choice is left runs it over every chain there is.
 *
 * It shares nothing with the walker. Rules stand side by side, in no order: of a descriptor that breaks several, the
 * device may name any. A descriptor that the model never reads does not exist for the device either: it holds junk
 * that would be refused, and enumerate.c has AddressSanitizer forbid it. So one run stands for all rings that differ
 * in such descriptors only.
 */
#pragma once

#include "guest.h"

/* ------------------------------------------------------------------------------------------------ choices
 *
 * Depth first: each run takes the branches of the last one again, but the next one at its last fork.
 */
#define FORKS_MAX 64
static struct {
    uint16_t taken[FORKS_MAX], of[FORKS_MAX];
    uint32_t depth, at;
} tree;

static inline uint32_t choose(uint32_t of)
{
    CHECK(tree.at < FORKS_MAX && of > 0 && of <= UINT16_MAX);
    if (tree.at == tree.depth) {
        tree.taken[tree.depth] = 0;
        tree.of[tree.depth++] = (uint16_t)of;
    }
    CHECK_EQ(tree.of[tree.at], of);
    return tree.taken[tree.at++];
}

/* Instead of a choice: one of them, spread over them all, and the same one after the same choices. */
static inline uint32_t spread(uint32_t of)
{
    uint64_t sum = 0x9E3779B97F4A7C15ull + tree.at;

    for (uint32_t i = 0; i < tree.at; i++)
        sum = (sum ^ tree.taken[i]) * 0x2545F4914F6CDD1Dull;
    return (uint32_t)((sum >> 33) % of);
}

/* -> false when every run has been. */
static inline bool next_run(void)
{
    while (tree.depth > 0 && ++tree.taken[tree.depth - 1] == tree.of[tree.depth - 1])
        tree.depth--;
    tree.at = 0;
    return tree.depth > 0;
}

/* ----------------------------------------------------------------------------------------- guest memory
 *
 *     A   16..20   buffers, side by side with B in the guest's memory but not in ours
 *     B   20..23
 *     S   tables, side by side with T: a table may lie in S, or begin in S and end in T
 *     T
 *     H   4 GiB less one byte: what no chain may be longer than
 */
#define A_AT 0x1010ull
#define A_BYTES 4
#define B_BYTES 3
#define S_AT 0x2008ull /* any address will do for a table */
#define S_BYTES 50
#define T_BYTES 46
#define H_AT 0x100000000ull
#define TABLE_MAX 3 /* entries that the device takes: longer tables are refused */

struct place {
    uint64_t addr;
    uint32_t len;
};

/* Every class of address with every class of length. */
static const struct place BUFFERS[] = {
    /* inside A */ {A_AT + 1, 0}, {A_AT + 1, 2}, {A_AT + 1, 5}, {A_AT + 1, 7},
    /* A's last byte */ {A_AT + 3, 0}, {A_AT + 3, 1}, {A_AT + 3, 4}, {A_AT + 3, 5},
    /* a gap */ {A_AT - 1, 0}, {A_AT - 1, 1}, {A_AT - 1, 2}, {A_AT - 1, UINT32_MAX},
    /* the end of the address space */ {UINT64_MAX, 0}, {UINT64_MAX, 1}, {UINT64_MAX, 2}, {UINT64_MAX, UINT32_MAX},
    /* the longest */ {H_AT, UINT32_MAX},
};
#define BUFFERS_COUNT (sizeof(BUFFERS) / sizeof(*BUFFERS))

/* The same for a table of so many entries. */
#define TABLES_COUNT 11
static inline struct place table_place(uint32_t which, uint32_t entries)
{
    uint32_t len = entries * 16;
    const struct place places[TABLES_COUNT] = {
        /* inside S, across the border inside an entry, all but a byte in T */
        {S_AT, len}, {S_AT + S_BYTES - 9, len}, {S_AT + S_BYTES - 1, len},
        /* no entry, not a whole entry, one more than the device takes, the most a field can say */
        {S_AT, 0}, {S_AT, len + 1}, {S_AT, (TABLE_MAX + 1) * 16}, {S_AT, UINT32_MAX},
        /* one byte beyond T, in a gap, at the end of the address space: its last byte, and beyond it */
        {S_AT + S_BYTES + T_BYTES - len + 1, len}, {S_AT - 1, len}, {UINT64_MAX, len}, {UINT64_MAX - 15, len},
    };

    return places[which];
}

/* Our address of a byte of guest memory, or NULL; *left: so many bytes are there in one run. */
static inline uint8_t *byte_at(const struct guest *g, uint64_t gpa, uint64_t *left)
{
    for (uint32_t i = 0; i < g->count; i++)
        if (gpa >= g->regions[i].gpa && gpa < g->regions[i].gpa + g->regions[i].size) {
            *left = g->regions[i].gpa + g->regions[i].size - gpa;
            return g->regions[i].hva + (gpa - g->regions[i].gpa);
        }
    *left = 0;
    return NULL;
}

/* -> in how many runs these bytes lie, up to the first that is not there; *whole: all of them are. */
static inline uint32_t runs_of(const struct guest *g, struct place p, bool *whole)
{
    uint32_t runs = 0;
    uint64_t left, done = 0;

    while (done < p.len && byte_at(g, p.addr + done, &left)) {
        done += left;
        runs++;
    }
    *whole = done >= p.len;
    return runs;
}

/* -------------------------------------------------------------------------------------------------- model */

#define RULE(status) (1u << -(status)) /* the chain's rules are -1 to -10 */

struct cell {
    bool read; /* the model has read it, so it has contents */
    uint16_t flags, next;
    struct place at;
};

struct table {
    uint32_t entries;
    bool indirect;
    struct place at; /* where an indirect one lies */
    struct cell cells[4];
};

/* One chain: what has to become of it. */
struct model {
    const struct guest *g;
    struct table *ring, *table; /* the indirect table that this run has, if any */
    uint32_t budget;            /* descriptors whose place is chosen freely; beyond it, spread */
    uint32_t max;               /* pieces the caller has room for */
    bool endless;

    uint32_t rules; /* broken by the descriptor `bad`: RULE()s; 0: the chain is complete */
    uint32_t bad;
    uint32_t head, slots, steps, pieces;
    bool writable_seen;
    uint64_t readable_len, writable_len;
    uint32_t count;
    struct {
        struct place at;
        bool writable;
    } buffers[8]; /* in order */
};

static inline bool negotiated_indirect(const struct model *m) { return m->g->config.features & INDIRECT; }

/* The contents of a descriptor: chosen when it is read first. */
static inline const struct cell *read_cell(struct model *m, struct table *t, uint32_t at)
{
    struct cell *c = &t->cells[at];
    bool free = m->steps <= m->budget;

    if (c->read)
        return c;
    c->read = true;
    c->flags = (uint16_t)choose(8); /* NEXT, WRITE, INDIRECT */
    if (c->flags & DESC_F_NEXT && !m->g->is_packed)
        c->next = (uint16_t)choose(t->entries + 1);
    if (c->flags & DESC_F_INDIRECT && !t->indirect && negotiated_indirect(m)) {
        uint32_t room = m->budget > m->steps ? m->budget - m->steps : 1;
        m->table->entries = 1 + choose(room < TABLE_MAX ? room : TABLE_MAX);
        c->at = m->table->at = table_place(choose(TABLES_COUNT), m->table->entries);
    } else {
        c->at = BUFFERS[free ? choose(BUFFERS_COUNT) : spread(BUFFERS_COUNT)];
    }
    return c;
}

static inline void take_buffer(struct model *m, struct place at, bool writable)
{
    bool whole;

    /* 2.7.4.2, 2.8.17: device-writable descriptors come after device-readable ones */
    if (!writable && m->writable_seen)
        m->rules |= RULE(RING_E_ORDER);
    m->writable_seen |= writable;
    m->pieces += runs_of(m->g, at, &whole);
    if (!whole)
        m->rules |= RULE(RING_E_UNMAPPED);
    if (m->pieces > m->max)
        m->rules |= RULE(RING_E_PIECES);
    *(writable ? &m->writable_len : &m->readable_len) += at.len;
    /* 2.7.5.2 has 4 GiB; a used length says a byte less */
    if (m->readable_len + m->writable_len > UINT32_MAX)
        m->rules |= RULE(RING_E_LENGTH);
    m->buffers[m->count].at = at;
    m->buffers[m->count++].writable = writable;
}

/* 2.7.5.3.1, 2.8.7: what may be wrong with the table that a descriptor names */
static inline void check_table(struct model *m, struct place at)
{
    bool whole;

    if (at.len == 0 || at.len % 16 || at.len / 16 > TABLE_MAX)
        m->rules |= RULE(RING_E_INDIRECT_LENGTH);
    runs_of(m->g, at, &whole);
    if (!whole)
        m->rules |= RULE(RING_E_UNMAPPED);
}

/* 2.7.5: the chain from descriptor `at` of this table on, the nth of this table. */
static inline void model_split(struct model *m, struct table *t, uint32_t at, uint32_t nth)
{
    m->bad = at;
    if (nth > t->entries) { /* 2.7.5.2: no loop */
        m->rules = RULE(RING_E_LOOP);
        return;
    }
    m->steps++;
    const struct cell *d = read_cell(m, t, at);
    if (d->flags & DESC_F_INDIRECT) {
        if (!negotiated_indirect(m))
            m->rules |= RULE(RING_E_INDIRECT_OFF);
        if (t->indirect)
            m->rules |= RULE(RING_E_INDIRECT_NESTED);
        if (d->flags & DESC_F_NEXT)
            m->rules |= RULE(RING_E_INDIRECT_NEXT);
        if (!m->rules)
            check_table(m, d->at);
        if (!m->rules)
            model_split(m, m->table, 0, 1);
        return;
    }
    take_buffer(m, d->at, d->flags & DESC_F_WRITE);
    if (d->flags & DESC_F_NEXT && d->next >= t->entries)
        m->rules |= RULE(RING_E_NEXT_RANGE);
    if (!m->rules && d->flags & DESC_F_NEXT)
        model_split(m, t, d->next, nth + 1);
}

/* 2.8.7: consecutive entries of which WRITE counts. */
static inline void model_packed_table(struct model *m)
{
    for (uint32_t i = 0; i < m->table->entries && !m->rules; i++) {
        m->steps++;
        m->bad = i;
        const struct cell *d = read_cell(m, m->table, i);
        take_buffer(m, d->at, d->flags & DESC_F_WRITE);
    }
}

/* The id that enumerate.c gives the descriptor in this slot. */
static inline uint16_t packed_id(uint32_t slot) { return (uint16_t)(0x8001 + slot * 0x101); }

/* 2.8.6: the chain from this slot on, the nth of the chain. Where a rule was broken, what is left is passed over. */
static inline void model_packed(struct model *m, uint32_t slot, uint32_t nth)
{
    if (nth > m->ring->entries) { /* 2.8.17: no longer than the ring */
        m->endless = true;
        return;
    }
    bool passing = m->rules;
    const struct cell *d;
    if (passing) { /* only NEXT counts */
        struct cell *c = &m->ring->cells[slot];
        if (!c->read)
            *c = (struct cell){.read = true, .at = BUFFERS[spread(BUFFERS_COUNT)],
                               .flags = (uint16_t)((spread(4) << 1) | choose(2))};
        d = c;
    } else {
        m->steps++;
        m->bad = slot;
        d = read_cell(m, m->ring, slot);
    }
    m->slots = nth;
    m->head = packed_id(slot);
    bool next = d->flags & DESC_F_NEXT;
    if (!passing && d->flags & DESC_F_INDIRECT) {
        if (!negotiated_indirect(m)) {
            m->rules |= RULE(RING_E_INDIRECT_OFF);
        } else {
            if (next || nth > 1) /* 2.8.19 */
                m->rules |= RULE(RING_E_INDIRECT_NEXT);
            check_table(m, d->at);
            if (!m->rules)
                model_packed_table(m);
        }
    } else if (!passing) {
        take_buffer(m, d->at, d->flags & DESC_F_WRITE);
    }
    if (next)
        model_packed(m, (slot + 1) % m->ring->entries, nth + 1);
}
