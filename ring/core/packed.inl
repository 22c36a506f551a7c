/*
 * The packed virtqueue, device side, as micro-steps (virtio 1.2, 2.8 "Packed Virtqueues").
 *
 *     shared memory                         driver writes            device (here)
 *     descriptor ring                       available descriptors    packed_see, packed_take, packed_walk
 *                                                                    packed_push, packed_publish: used ones
 *     driver event suppression structure    when to be called        packed_decide
 *     device event suppression structure                             packed_arm, packed_disarm: when to be kicked
 *
 * One ring holds both: the driver turns its descriptors available in order, the device overwrites the first
 * slots of what it has used. Each side goes round the ring and keeps a wrap counter, 1 at first, that flips
 * with every round. A descriptor is available when its AVAIL flag equals the device's wrap counter and USED
 * does not; it is used when both equal it (2.8.1). An index is a slot here, with its counter beside it.
 *
 * Only the first descriptor of a chain tells that the chain is available: the driver writes its flags last
 * (2.8.6). In the other direction the first used descriptor of a batch is flipped last (2.8.9), which makes
 * all of the batch visible at once, merged receive buffers included.
 *
 * The rules of split.inl hold here too: everything is read once into private memory, every loop is bounded by
 * a number the driver cannot write, callers hold a guard.
 */
#pragma once

#include "internal.h"
#include "walk.inl"

INLINED void packed_advance(const struct vq *q, uint16_t *slot, bool *wrap, uint32_t by)
{
    uint32_t next = *slot + by;

    if (unlikely(next >= q->size)) {
        /* A batch can be longer than a round: a driver may offer slots again that it has not got back. */
        *wrap ^= next / q->size & 1;
        next %= q->size;
    }
    *slot = (uint16_t)next;
}

INLINED bool packed_is_available(const struct vq *q, uint16_t slot, bool wrap)
{
    /* Acquire: pairs with the driver's barrier between writing the chain and the flags of its first
     * descriptor. */
    uint16_t flags = load16_acquire(&q->packed[slot].flags);

    return !!(flags & PACKED_F_AVAIL) == wrap && !!(flags & PACKED_F_USED) != wrap;
}

INLINED int packed_see(struct vq *q)
{
    if (packed_is_available(q, q->next_avail, q->avail_wrap))
        return 1;
    q->known = q->next_avail;
    q->known_wrap = q->avail_wrap;
    return 0;
}

INLINED int packed_take(struct vq *q, struct walk *w, struct chain *c)
{
    if (!packed_see(q))
        return RING_EMPTY;
    *c = (struct chain){0};
    *w = (struct walk){0};
    return RING_OK;
}

/* As split_ahead. `n` counts descriptors, which are as many where chains have one each; where they have more, this may be
 * the middle of one, which the driver may be writing yet. */
INLINED const uint8_t *packed_ahead(const struct vq *q, uint32_t n)
{
    uint16_t slot = q->next_avail;
    bool wrap = q->avail_wrap;
    struct piece begin;

    packed_advance(q, &slot, &wrap, n);
    if (!packed_is_available(q, slot, wrap))
        return NULL;
    return guestmem_run(q->mem, q->region_hint, glance64(&q->packed[slot].addr), 1, &begin) ? begin.base : NULL;
}

/* One snapshot of a descriptor; ordered after the acquire load of the chain's first flags. */
INLINED struct packed_desc packed_read_descriptor(const struct packed_desc *from)
{
    struct packed_desc d;
    uint64_t half[2];

    half[0] = load64((const void *)&from->addr);
    half[1] = load64((const void *)&from->len);
    memcpy(&d, half, sizeof(d));
    return d;
}

/* Read the next descriptor of the ring and count it to the chain; the id of the last one names the chain.
 * -> false when the chain has gone once around the ring. */
INLINED bool packed_next(struct vq *q, struct chain *c, struct packed_desc *d)
{
    if (unlikely(c->slots == q->size))
        return false;
    *d = packed_read_descriptor(&q->packed[q->next_avail]);
    packed_advance(q, &q->next_avail, &q->avail_wrap, 1);
    c->slots++;
    c->head = d->id;
    return true;
}

/* Pass over the rest of a chain that broke `rule`, to know its id and its slots. Out of the way of the chains that
 * break none. */
static __attribute__((noinline, cold)) int packed_skip(struct vq *q, struct chain *c, int rule)
{
    struct packed_desc d;

    do
        if (!packed_next(q, c, &d))
            return vq_break(q, RING_E_ENDLESS, c->bad);
    while (d.flags & DESC_F_NEXT);
    return rule;
}

INLINED int packed_bad(struct vq *q, struct chain *c, int rule, uint32_t at, bool goes_on)
{
    c->status = rule;
    c->bad = at;
    struct chain bad = *c; /* the caller's own may stay in registers */
    rule = goes_on ? packed_skip(q, &bad, rule) : rule;
    *c = bad;
    return rule;
}

INLINED int packed_walk(struct vq *q, struct walk *w, struct chain *c, struct piece *pieces, uint32_t max)
{
    struct packed_desc d;

    if (w->indirect) { /* consecutive entries of which only WRITE counts (2.8.7) */
        const struct packed_desc *entry = (const struct packed_desc *)q->table + w->next;
        int rule = walk_buffer(q, w, c, entry->addr, entry->len, entry->flags & DESC_F_WRITE, pieces, max);
        c->descriptors++;
        if (unlikely(rule < 0))
            return packed_bad(q, c, rule, w->next, false);
        return ++w->next == w->entries ? RING_OK : RING_MORE;
    }
    uint32_t at = q->next_avail;
    if (unlikely(!packed_next(q, c, &d)))
        return vq_break(q, RING_E_ENDLESS, at);
    c->descriptors++;
    if (d.flags & DESC_F_INDIRECT) { /* WRITE is ignored there (2.8.7) */
        int rule = RING_E_INDIRECT_OFF;
        if (likely(q->indirect)) {
            /* unlike a split ring's, an indirect descriptor stands alone (2.8.19) */
            rule = d.flags & DESC_F_NEXT || c->slots > 1 ? RING_E_INDIRECT_NEXT : walk_enter(q, w, d.addr, d.len);
        }
        return unlikely(rule < 0) ? packed_bad(q, c, rule, at, d.flags & DESC_F_NEXT) : RING_MORE;
    }
    int rule = walk_buffer(q, w, c, d.addr, d.len, d.flags & DESC_F_WRITE, pieces, max);
    if (unlikely(rule < 0))
        return packed_bad(q, c, rule, at, d.flags & DESC_F_NEXT);
    return d.flags & DESC_F_NEXT ? RING_MORE : RING_OK;
}

INLINED int packed_pop(struct vq *q, struct chain *c, struct piece *pieces, uint32_t max)
{
    struct walk w;
    int status = packed_take(q, &w, c);

    if (status != RING_OK)
        return status;
    status = packed_walk(q, &w, c, pieces, max); /* apart, as in split_pop */
    while (status == RING_MORE)
        status = packed_walk(q, &w, c, pieces, max);
    return status;
}

static inline void packed_unpop(struct vq *q, uint32_t slots)
{
    /* two rounds forward change nothing, so going on by the rest of them is going back */
    packed_advance(q, &q->next_avail, &q->avail_wrap, 2 * q->size - slots % (2 * q->size));
}

/* Length, id and flags: what a used descriptor overwrites. */
static inline uint64_t *packed_second_half(struct packed_desc *d)
{
    return (uint64_t *)(void *)&d->len;
}

/* A slot and its wrap counter, as an event suppression structure and the journal have them. */
static inline uint64_t packed_code(uint16_t slot, bool wrap)
{
    return slot | (wrap ? 0x8000u : 0);
}

/* Note in the journal what the next used descriptor will overwrite, and that the batch reaches to `to` with it. */
INLINED void packed_note(struct vq *q, uint32_t slots, uint32_t written, uint64_t to)
{
    struct journal_entry *e = &q->line->entries[q->next_used];

    e->was = load64(packed_second_half(&q->packed[q->next_used]));
    e->wrote = written;
    e->slots = slots;
    journal_order();
    q->line->progress = packed_code(q->published, q->published_wrap) | to << 16;
    journal_order();
}

INLINED void packed_push(struct vq *q, uint32_t head, uint32_t slots, uint32_t written)
{
    struct packed_desc *d = &q->packed[q->next_used];
    uint16_t flags = written ? DESC_F_WRITE : 0;
    uint16_t to = q->next_used;
    bool to_wrap = q->used_wrap;

    packed_advance(q, &to, &to_wrap, slots);
    if (q->line)
        packed_note(q, slots, written, packed_code(to, to_wrap));
    if (q->used_wrap)
        flags |= PACKED_F_AVAIL | PACKED_F_USED;
    if (likely(q->holding)) {
        /* In one store: a vectorised driver loads several descriptors at once, and may see these flags before the
         * first one's; id and length must be there with them. */
        store64(packed_second_half(d), written | (uint64_t)(uint16_t)head << 32 | (uint64_t)flags << 48);
    } else { /* the first of the batch: until packed_publish */
        store32(&d->len, written);
        store16(&d->id, (uint16_t)head);
        q->holding = true;
        q->held_flags = flags;
    }
    wrote_descriptors(q, d, sizeof(*d));
    q->next_used = to;
    q->used_wrap = to_wrap;
}

static inline void packed_push_batch(struct vq *q, uint32_t head, uint32_t chains, uint32_t slots)
{
    (void)chains;
    packed_push(q, head, slots, 0);
}

static inline void packed_publish(struct vq *q)
{
    if (!q->holding)
        return;
    /* Release: everything else of the batch before these flags; pairs with the driver's barrier after
     * reading them. */
    store16_release(&q->packed[q->published].flags, q->held_flags);
    wrote_descriptors(q, &q->packed[q->published], sizeof(*q->packed));
    q->holding = false;
    if (q->undecided <= q->size)
        q->undecided += q->next_used - q->published + (q->next_used > q->published ? 0 : q->size);
    q->published = q->next_used;
    q->published_wrap = q->used_wrap;
}

static inline int packed_decide(struct vq *q)
{
    uint32_t moved = q->undecided;
    uint16_t now = q->published;

    if (!moved)
        return CALL_NOTHING_NEW;
    q->undecided = 0;
    /* Full: the used flags before the look at the driver's wish, as in split_decide. */
    full_barrier();
    /* In one load: of a driver that stores the offset before the flags nothing is seen half done. */
    uint32_t event = load32(&q->driver_event->both);
    uint16_t wish = event >> 16 & PACKED_EVENT_MASK;
    bool first = q->first_decision;
    q->first_decision = false;
    if (wish == PACKED_EVENT_DISABLE)
        return CALL_FLAG_SUPPRESSED;
    if (wish != PACKED_EVENT_DESC || !q->event_idx)
        return CALL_FLAG_WANTS;
    if (first)
        return CALL_FIRST;
    /* 2.8.10: due when the descriptor at this offset and wrap was written or passed over, as it was in more
     * than a lap */
    uint16_t off = event & 0x7fff;
    if (!!(event & 0x8000) != q->published_wrap)
        off = (uint16_t)(off - q->size);
    return moved > q->size || (uint16_t)(now - off - 1) < moved ? CALL_EVENT_REACHED : CALL_EVENT_AHEAD;
}

static inline int packed_arm(struct vq *q)
{
    if (unlikely(q->gap.there) && q->next_used == q->gap.from && q->used_wrap == q->gap.from_wrap &&
        q->next_avail == q->next_used && q->avail_wrap == q->used_wrap && !q->holding) {
        journal_pass(q);
        return 1; /* look again from there, and tell the driver: its wish may lie in what was passed over */
    }
    if (q->event_idx) /* in one store: the driver never sees one half of the wish */
        store32(&q->device_event->both, q->known | (q->known_wrap ? 0x8000u : 0) | (uint32_t)PACKED_EVENT_DESC << 16);
    else
        store16(&q->device_event->flags, PACKED_EVENT_ENABLE);
    wrote_used(q, q->device_event, sizeof(*q->device_event));
    q->kicks_wanted = true;
    q->silent = false;
    /* Full: the wish before the look; see split_arm. */
    full_barrier();
    return packed_is_available(q, q->known, q->known_wrap);
}

/* For a device that looks by itself, without a wish to be kicked: has the driver made anything available where nothing
 * was found? -> 1, 0. */
static inline int packed_look(struct vq *q)
{
    if (unlikely(q->gap.there)) /* arm alone passes over it */
        return packed_arm(q);
    if (unlikely(!q->silent)) {
        /* A stale offset would be reached again in the second round. */
        store16(&q->device_event->flags, PACKED_EVENT_DISABLE);
        wrote_used(q, q->device_event, sizeof(*q->device_event));
        q->silent = true;
        q->kicks_wanted = false;
    }
    return packed_is_available(q, q->known, q->known_wrap);
}

static inline void packed_disarm(struct vq *q)
{
    /* With EVENT_IDX the stale offset is the suppression, as on a split ring. */
    if (!q->event_idx && q->kicks_wanted) {
        store16(&q->device_event->flags, PACKED_EVENT_DISABLE);
        wrote_used(q, q->device_event, sizeof(*q->device_event));
    }
    q->kicks_wanted = false;
}
