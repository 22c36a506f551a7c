/*
 * The split virtqueue, device side, as micro-steps (virtio 1.2, 2.7 "Split Virtqueues").
 *
 *     driver writes             device (here)
 *     descriptor table          split_walk   reads each descriptor once, into private memory
 *     available ring            split_see    reads idx once; split_take reads one entry
 *       .used_event             split_decide
 *     used ring                 split_push   writes elements, split_publish stores idx
 *       .avail_event / .flags   split_arm, split_disarm
 *
 * Indices are free-running 16-bit numbers; the slot is the index modulo the queue size. Everything read
 * from guest memory is copied once, checked, and only the copy is used: the driver can change any byte at
 * any instant. What the driver cannot write bounds every loop: the queue size, the table's length.
 *
 * The step engine calls these one by one (verbs.c), the pumps inline them: one piece of code is both the
 * lesson and the product. Callers hold a guard (internal.h); nothing here does.
 */
#pragma once

#include "internal.h"
#include "walk.inl"

static inline uint16_t *split_used_event(const struct vq *q) { return &q->avail->ring[q->size]; }
static inline uint16_t *split_avail_event(const struct vq *q) { return (uint16_t *)&q->used->ring[q->size]; }

INLINED int split_see(struct vq *q)
{
    /* Acquire: pairs with the driver's barrier between writing descriptors and entries and storing idx. */
    uint16_t idx = load16_acquire(&q->avail->idx);
    uint16_t ahead = (uint16_t)(idx - q->next_avail);

    if (unlikely(ahead > q->size))
        return vq_break(q, RING_E_AVAIL_AHEAD, idx);
    q->avail_seen = idx;
    return ahead;
}

INLINED int split_take(struct vq *q, struct walk *w, struct chain *c)
{
    if (q->next_avail == q->avail_seen)
        return RING_EMPTY;
    /* Relaxed: ordered after the acquire load of idx that showed this entry. */
    uint16_t head = load16(&q->avail->ring[q->next_avail & q->mask]);
    if (unlikely(head >= q->size))
        return vq_break(q, RING_E_HEAD_RANGE, head);
    q->next_avail++;
    *c = (struct chain){.head = head, .slots = 1};
    *w = (struct walk){.next = head, .entries = q->size, .steps_left = q->size};
    return RING_OK;
}

/* Where the chain probably begins that is taken `n` chains from now: what a prefetch needs. It is read again when it is
 * taken. -> NULL: not known */
INLINED const uint8_t *split_ahead(const struct vq *q, uint32_t n)
{
    struct piece begin;

    if (n >= (uint16_t)(q->avail_seen - q->next_avail))
        return NULL;
    uint16_t head = load16(&q->avail->ring[(q->next_avail + n) & q->mask]) & q->mask;
    return guestmem_run(q->mem, q->region_hint, load64(&q->desc[head].addr), 1, &begin) ? begin.base : NULL;
}

/* One snapshot of a descriptor: two loads of eight bytes; the table is 16-byte aligned. */
INLINED struct vring_desc split_read_descriptor(const struct vring_desc *from)
{
    struct vring_desc d;
    uint64_t half[2];

    half[0] = load64((const void *)&from->addr);
    half[1] = load64((const void *)&from->len);
    memcpy(&d, half, sizeof(d));
    return d;
}

INLINED int split_bad(struct chain *c, int rule, uint32_t descriptor)
{
    c->status = rule;
    c->bad = descriptor;
    return rule;
}

/* 2.7.5.3: zero or more direct descriptors may come before the one that names a table, none after it. */
static inline int split_enter_indirect(struct vq *q, struct walk *w, const struct vring_desc *d)
{
    if (unlikely(!q->indirect))
        return RING_E_INDIRECT_OFF;
    if (unlikely(w->indirect))
        return RING_E_INDIRECT_NESTED;
    if (unlikely(d->flags & DESC_F_NEXT))
        return RING_E_INDIRECT_NEXT;
    return walk_enter(q, w, d->addr, d->len);
}

INLINED int split_walk(struct vq *q, struct walk *w, struct chain *c, struct piece *pieces, uint32_t max)
{
    uint32_t at = w->next;

    /* as many steps as the table has entries: a longer chain is a cycle (2.7.5.2: MUST NOT loop) */
    if (unlikely(w->steps_left == 0))
        return split_bad(c, RING_E_LOOP, at);
    w->steps_left--;
    struct vring_desc d = w->indirect ? q->table[at] : split_read_descriptor(&q->desc[at]);
    c->descriptors++;
    bool indirect = d.flags & DESC_F_INDIRECT; /* WRITE is ignored there, 2.7.5.3.2 */
    int rule = indirect ? split_enter_indirect(q, w, &d)
                        : walk_buffer(q, w, c, d.addr, d.len, d.flags & DESC_F_WRITE, pieces, max);
    if (unlikely(rule < 0))
        return split_bad(c, rule, at);
    if (indirect || !(d.flags & DESC_F_NEXT))
        return rule;
    if (unlikely(d.next >= w->entries))
        return split_bad(c, RING_E_NEXT_RANGE, at);
    w->next = d.next;
    return RING_MORE;
}

INLINED int split_pop(struct vq *q, struct chain *c, struct piece *pieces, uint32_t max)
{
    struct walk w;
    int status = split_take(q, &w, c);

    if (status == RING_EMPTY) {
        status = split_see(q);
        if (status <= 0)
            return status < 0 ? status : RING_EMPTY;
        status = split_take(q, &w, c);
    }
    if (unlikely(status != RING_OK))
        return status;
    /* The first one apart: of most chains it is the only one, and with so much known of it the rest is short. */
    status = split_walk(q, &w, c, pieces, max);
    while (status == RING_MORE)
        status = split_walk(q, &w, c, pieces, max);
    return status;
}

static inline void split_unpop(struct vq *q, uint32_t slots)
{
    q->next_avail = (uint16_t)(q->next_avail - slots);
}

INLINED void split_push(struct vq *q, uint32_t head, uint32_t slots, uint32_t written)
{
    struct vring_used_elem *e = &q->used->ring[q->next_used & q->mask];

    store32(&e->id, head);
    store32(&e->len, written);
    wrote_used(q, e, sizeof(*e));
    q->next_used = (uint16_t)(q->next_used + slots);
}

/* 2.7.9: the one element of an in-order batch lies where the first one's would. */
static inline void split_push_batch(struct vq *q, uint32_t head, uint32_t chains, uint32_t slots)
{
    (void)chains;
    split_push(q, head, slots, 0);
}

static inline void split_publish(struct vq *q)
{
    if (q->published == q->next_used)
        return;
    if (q->line) {
        q->line->progress = q->published | (uint64_t)q->next_used << 16;
        journal_order();
    }
    /* Release: elements and buffer contents before idx; pairs with the driver's barrier after reading it. */
    store16_release(&q->used->idx, q->next_used);
    wrote_used(q, &q->used->idx, sizeof(q->used->idx));
    q->published = q->next_used;
}

static inline int split_decide(struct vq *q)
{
    uint16_t before = q->decided, now = q->published;

    if (before == now)
        return CALL_NOTHING_NEW;
    q->decided = now;
    /* Full: our store of used.idx before our load of used_event or flags. The driver does the mirror
     * image (stores used_event, barrier, loads used.idx), so one of the two sees the other. */
    full_barrier();
    if (!q->event_idx)
        return load16(&q->avail->flags) & AVAIL_F_NO_INTERRUPT ? CALL_FLAG_SUPPRESSED : CALL_FLAG_WANTS;
    uint16_t event = load16(split_used_event(q));
    if (q->first_decision) {
        q->first_decision = false;
        return CALL_FIRST;
    }
    /* 2.7.7.2: due when an index in [before, now) equals used_event, across 65536 too */
    return (uint16_t)(now - event - 1) < (uint16_t)(now - before) ? CALL_EVENT_REACHED : CALL_EVENT_AHEAD;
}

static inline int split_arm(struct vq *q)
{
    /* avail_seen, not next_avail: the driver does not kick again for chains it has already announced, so
     * asking from one that was popped and given back would ask for nothing (2.7.10). */
    uint16_t known = q->avail_seen;
    uint16_t *wish = q->event_idx ? split_avail_event(q) : &q->used->flags;

    store16(wish, q->event_idx ? known : 0);
    wrote_used(q, wish, sizeof(*wish));
    q->kicks_wanted = true;
    q->silent = false;
    /* Full: the wish before the look. The driver stores avail.idx, barrier, loads avail_event or flags:
     * either it kicks, or we see its chain here. */
    full_barrier();
    int ahead = split_see(q);
    return ahead < 0 ? ahead : (uint16_t)(q->avail_seen - known);
}

/* For a device that looks by itself, without a wish to be kicked: has the driver made more available than was announced?
 * -> how many; RING_E_*. */
static inline int split_look(struct vq *q)
{
    uint16_t known = q->avail_seen;

    if (unlikely(!q->silent)) {
        uint16_t *wish = q->event_idx ? split_avail_event(q) : &q->used->flags;
        /* With EVENT_IDX an index just passed: it is reached again in 65536 chains. */
        store16(wish, q->event_idx ? (uint16_t)(known - 1) : USED_F_NO_NOTIFY);
        wrote_used(q, wish, sizeof(*wish));
        q->silent = true;
        q->kicks_wanted = false;
    }
    int ahead = split_see(q);
    return ahead < 0 ? ahead : (uint16_t)(q->avail_seen - known);
}

static inline void split_disarm(struct vq *q)
{
    /* With EVENT_IDX the stale avail_event is the suppression; flags must stay 0 there (2.7.10). */
    if (!q->event_idx && q->kicks_wanted) {
        store16(&q->used->flags, USED_F_NO_NOTIFY);
        wrote_used(q, &q->used->flags, sizeof(q->used->flags));
    }
    q->kicks_wanted = false;
}
