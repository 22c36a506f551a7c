/*
 * The journal: where a ring stood when the process that served it died (contract: ring.h, "journal").
 *
 * The problem. A split ring tells how far the device has come: used.idx. A packed ring keeps no index in memory
 * (virtio 1.2, 2.8), and QEMU, left by a back-end that died, hands its successor the base of the last start. So
 * the device writes down what it does, in memory that outlives the process: a mapped file. Who is killed has done
 * every store before one instruction and none after it, so the order of the program is all that counts
 * (journal_order); no disk is waited for, because a machine that goes down takes the guests with it.
 *
 * What is written. A used descriptor overwrites the chain it completes: its length, id and flags. Of a batch only
 * the flags of the first one are held back (packed_push), so a batch that was never published has destroyed chains
 * the driver still counts as the device's. Hence, before a used descriptor is written to a slot, packed_note notes
 * what stood there and how far the chain reaches (`was`, `slots`: entry of that slot), then that the batch reaches
 * so far (`progress`: from, to; one store). Publishing needs no note of its own, the ring itself tells:
 *
 *     The driver made the descriptor at `from` available: USED there differs from the wrap counter. It equals the
 *     counter from the publication on, also when the driver offers the slot again in the next round, for which
 *     USED stays as it is (2.8.1).
 *
 * Taking over. Walk the entries from `from` while USED equals the counter: these chains are completed. The walk
 * ends at `to`: the batch was published, go on there. Or at once: it was not; put back what stood in its slots and
 * go on at `from`. (In the middle: QEMU found the first chain and published it, see below; go on in the middle.)
 * So there is no instant at which the position is unknown. Chains of a batch that was put back are served again: a
 * transmitted frame may leave twice, as many as a batch has, but never not at all, because frames go to the port
 * before their chains are pushed. tests/test_ring_restart.py goes through every state a killed device can leave.
 *
 * QEMU meanwhile. While no back-end is there, QEMU takes the guest's transmitq over, from the base it holds for
 * true, and completes what looks available there; its next base tells how far it came. A split ring is not harmed.
 * In a packed one it may begin in the middle of what is outstanding, and what lies before it stays outstanding: we
 * serve that, then pass over the part it completed (`gap`). The line keeps the gap, should we die before it.
 *
 * When it is believed. `binding` says which ring in whose memory (ring/journal.py). The base tells whether the
 * front-end has moved: it is that of the last start, or the slots from there to the base are completed. And the
 * descriptors must agree, or the ring is refused: a ring served from the wrong slot would be silent, or worse.
 * One case is told beforehand: a driver that was reset while nobody was there has a ring without traces.
 *
 * The file is ours, and the ring is the driver's: neither is trusted for more than numbers that are checked.
 */
#include "internal.h"
#include "packed.inl"

struct place {
    uint16_t slot;
    bool wrap;
};

#define GAP_THERE (1ull << 32)

static struct place place_of(uint64_t code)
{
    return (struct place){code & 0x7fff, code >> 15 & 1};
}

static bool same(struct place a, struct place b)
{
    return a.slot == b.slot && a.wrap == b.wrap;
}

static struct place beyond(const struct vq *q, struct place p, uint32_t slots)
{
    packed_advance(q, &p.slot, &p.wrap, slots);
    return p;
}

/* Slots from a to b, going forward; less than two rounds. */
static uint32_t distance(const struct vq *q, struct place a, struct place b)
{
    uint32_t one = a.slot + (a.wrap ? 0 : q->size), other = b.slot + (b.wrap ? 0 : q->size);

    return (other + 2 * q->size - one) % (2 * q->size);
}

static uint16_t flags_at(const struct vq *q, struct place p)
{
    return load16_acquire(&q->packed[p.slot].flags);
}

/* 2.8.1: did the device use the descriptor at p in the round of p? The driver may have offered it again since. */
static bool device_was_at(const struct vq *q, struct place p)
{
    return !!(flags_at(q, p) & PACKED_F_USED) == p.wrap;
}

static bool is_used(const struct vq *q, struct place p)
{
    return device_was_at(q, p) && !!(flags_at(q, p) & PACKED_F_AVAIL) == p.wrap;
}

/* ------------------------------------------------------------------------------------- reading it */

/* What a line and the ring say together. */
struct found {
    struct place at; /* go on here */
    struct place to; /* slots from `at` to here hold used descriptors that nobody saw */
};

static bool in_ring(const struct vq *q, struct place p)
{
    return p.slot < q->size;
}

/* The entry of the slot at p -> its number of slots, 0: it cannot be. */
static uint32_t entry_slots(const struct vq *q, const struct journal_line *line, struct place p)
{
    uint32_t slots = line->entries[p.slot].slots;

    return slots <= q->size ? slots : 0;
}

/* moved: a front-end has completed slots since, perhaps these again, a round later.
 * -> false when the line contradicts itself or the ring. */
static bool follow(const struct vq *q, const struct journal_line *line, bool moved, struct found *f)
{
    struct place from = place_of(line->progress), to = place_of(line->progress >> 16);

    if (!in_ring(q, from) || !in_ring(q, to))
        return false;
    *f = (struct found){.at = from, .to = to};
    bool seen = true; /* by the driver, up to p */
    for (struct place p = from; !same(p, to);) {
        uint32_t slots = entry_slots(q, line, p);
        if (slots == 0 || slots > distance(q, p, to))
            return false;
        seen = seen && (device_was_at(q, p) || (moved && is_used(q, (struct place){p.slot, !p.wrap})));
        p = beyond(q, p, slots);
        if (seen)
            f->at = p;
    }
    /* of a batch that nobody saw, the driver has not touched the first chain */
    return seen || packed_is_available(q, f->at.slot, f->at.wrap);
}

/* Put back what stood in the slots of a batch that was not published; a slot that does not hold what we wrote is left
 * alone. May be done again. */
static void put_back(struct vq *q, const struct journal_line *line, const struct found *f)
{
    for (struct place p = f->at; !same(p, f->to); p = beyond(q, p, entry_slots(q, line, p))) {
        const struct journal_entry *e = &line->entries[p.slot];
        uint64_t *now = packed_second_half(&q->packed[p.slot]);
        if ((uint32_t)load64(now) == e->wrote)
            store64(now, e->was);
    }
}

/* Did a front-end complete the slots from a to b? -> chains, 0: it did not. What it wrote tells no chain's length,
 * so slots between that it left alone are taken as the rest of a chain. */
static uint32_t completed(const struct vq *q, struct place a, struct place b)
{
    uint32_t chains = 0, slots = distance(q, a, b);

    if (slots > q->size || !is_used(q, a))
        return 0;
    for (; slots > 0; slots--, a = beyond(q, a, 1)) {
        if (is_used(q, a))
            chains++;
        else if (!packed_is_available(q, a.slot, a.wrap))
            return 0;
    }
    return chains;
}

/* Do chains that are available lie from a to exactly b? */
static bool outstanding(const struct vq *q, struct place a, struct place b)
{
    uint32_t slots = distance(q, a, b);
    bool inside = false; /* a chain */

    if (slots > q->size)
        return false;
    for (; slots > 0; slots--, a = beyond(q, a, 1)) {
        if (!packed_is_available(q, a.slot, a.wrap))
            return false;
        inside = flags_at(q, a) & DESC_F_NEXT;
    }
    return !inside;
}

static bool avail_flag(const struct vq *q, uint16_t slot)
{
    return load16_acquire(&q->packed[slot].flags) & PACKED_F_AVAIL;
}

/* Where the driver makes descriptors available next: AVAIL is its counter in all slots before, and is not in those
 * behind. -> false when they are in no order, as while it writes a chain, whose first flags come last, or when it
 * passed slot 0 while we looked: slots behind would be compared with what slot 0 was. */
static bool driver_at(const struct vq *q, struct place *driver)
{
    bool before = avail_flag(q, 0);
    uint16_t slot = 1;

    while (slot < q->size && avail_flag(q, slot) == before)
        slot++;
    *driver = slot == q->size ? (struct place){0, !before} : (struct place){slot, before};
    for (; slot < q->size; slot++)
        if (avail_flag(q, slot) == before)
            return false;
    return avail_flag(q, 0) == before;
}

/* Is p in the first round of a ring whose slots were all completed up to p, and none behind? Then the device stands
 * at p, whatever was written down. */
static bool without_traces(const struct vq *q, struct place p)
{
    if (!p.wrap)
        return false;
    for (struct place at = {0, true}; at.slot < q->size; at.slot++)
        if (at.slot < p.slot ? !is_used(q, at) : device_was_at(q, at))
            return false;
    return true;
}

/* ----------------------------------------------------------------------------------- taking over */

static void go_on_at(struct vq *q, struct place p)
{
    q->next_avail = q->known = q->next_used = q->published = q->decided = p.slot;
    q->avail_wrap = q->known_wrap = q->used_wrap = q->published_wrap = p.wrap;
}

static void set_gap(struct vq *q, struct place from, struct place to)
{
    q->gap = (struct gap){from.slot, to.slot, from.wrap, to.wrap, true};
}

/* May the device stand at p? Then all that the driver has made available since is still available. */
static bool plausible(const struct vq *q, struct place p)
{
    struct place driver;

    if (is_used(q, p))
        return false;
    return !driver_at(q, &driver) || outstanding(q, p, driver);
}

/* The front-end's base for want of anything better. */
static int trust_base(const struct vq *q, struct place base)
{
    return plausible(q, base) ? TAKEOVER_BASE : RING_E_POSITION;
}

/* Not inlined: its variables would live in the frame that the guard jumps back to. */
static __attribute__((noinline)) int take_over_packed(struct vq *q, const struct journal_line *line, uint64_t binding,
                                                      uint32_t *completed_chains)
{
    const struct place told = {q->next_avail, q->avail_wrap};
    struct found f;

    if (!line || line->binding != binding || q->next_used != q->next_avail || q->used_wrap != q->avail_wrap)
        return trust_base(q, told);
    struct place start = place_of(line->base);
    if (!in_ring(q, start))
        return RING_E_POSITION;
    /* A front-end that asked where we stood, and says so, has moved no further than one that did not ask. */
    const struct place base = follow(q, line, line->gap & GAP_THERE, &f) && same(f.at, told) ? start : told;
    struct place gap_from = base;
    uint32_t chains = same(start, base) ? 0 : completed(q, start, base);
    if (without_traces(q, base)) {
        /* nothing was published, so the base is right; but the first chain of a batch may have lost its length */
        if (same(place_of(line->progress), base) && follow(q, line, false, &f))
            put_back(q, line, &f);
        *completed_chains = chains;
        return TAKEOVER_BASE;
    }
    if (!same(start, base)) {
        if (chains == 0) /* it did not go on from there, it was told another position */
            return trust_base(q, base);
        gap_from = start;
    }
    if (line->gap & GAP_THERE && same(place_of(line->gap >> 16), start)) { /* an earlier one, not reached yet */
        struct place from = place_of(line->gap);
        if (in_ring(q, from) && completed(q, from, base))
            gap_from = from;
    }
    if (!follow(q, line, !same(gap_from, base), &f))
        return RING_E_POSITION;
    put_back(q, line, &f);
    if (same(f.at, gap_from)) {
        f.at = base; /* the same, where there is no gap */
    } else if (!same(gap_from, base) && !same(f.at, base)) {
        if (!outstanding(q, f.at, gap_from))
            return RING_E_POSITION;
        set_gap(q, gap_from, base);
    }
    if (!plausible(q, q->gap.there ? base : f.at))
        return RING_E_POSITION;
    go_on_at(q, f.at);
    *completed_chains = chains;
    return same(f.at, told) ? TAKEOVER_BASE : TAKEOVER_JOURNAL;
}

/* The ring says where it stood; the line only tells whether a front-end that names its last start's base is out of
 * date, and how many chains were completed by somebody else. */
static int take_over_split(struct vq *q, const struct journal_line *line, uint64_t binding, uint32_t *completed_chains)
{
    if (!line || line->binding != binding)
        return TAKEOVER_BASE;
    uint16_t from = (uint16_t)line->progress, to = (uint16_t)(line->progress >> 16), now = q->next_used;
    bool published = (uint16_t)(now - from) >= (uint16_t)(to - from);
    *completed_chains = (uint16_t)(now - (published ? to : from));
    if (q->next_avail == now || q->next_avail != (uint16_t)line->base)
        return TAKEOVER_BASE;
    q->next_avail = q->avail_seen = now;
    return TAKEOVER_JOURNAL;
}

int vq_take_over(struct vq *q, const struct journal_line *line, uint64_t binding, uint32_t *completed_chains)
{
    *completed_chains = 0;
    if (q->broken)
        return q->broken;
    /* with no journal it is not known whether somebody died on this ring */
    q->inherited = !line || line->binding == binding;
    if (guard_enter())
        return vq_vanished(q, NULL, 0);
    int answer = q->is_packed ? take_over_packed(q, line, binding, completed_chains)
                              : take_over_split(q, line, binding, completed_chains);
    dirty_inherited(q);
    guard_leave();
    return answer < 0 ? vq_break(q, answer, q->next_avail) : answer;
}

/* ---------------------------------------------------------------------------------------- writing */

void vq_record(struct vq *q, struct journal_line *line, uint64_t binding, uint32_t base)
{
    uint64_t at = packed_code(q->published, q->is_packed && q->published_wrap), gap = 0;

    if (q->gap.there)
        gap = GAP_THERE | packed_code(q->gap.from, q->gap.from_wrap) | packed_code(q->gap.to, q->gap.to_wrap) << 16;
    /* What is known of this ring stays known between any two of these stores: take_over_packed comes to the same
     * end with a line that is still half the old one. */
    if (line->binding != binding)
        line->binding = 0;
    journal_order();
    line->progress = at | at << 16;
    journal_order();
    line->gap = gap;
    journal_order();
    line->base = base;
    journal_order();
    line->binding = binding;
    q->line = line;
}

void vq_write_on(struct vq *q, struct journal_line *line, uint64_t binding)
{
    struct place from = place_of(line->gap), to = place_of(line->gap >> 16);

    if (line->binding != binding)
        return;
    if (q->is_packed && line->gap & GAP_THERE && in_ring(q, from) && in_ring(q, to))
        set_gap(q, from, to);
    vq_record(q, line, binding, line->base);
}

void journal_pass(struct vq *q)
{
    struct place to = {q->gap.to, q->gap.to_wrap};

    q->undecided += distance(q, (struct place){q->gap.from, q->gap.from_wrap}, to);
    go_on_at(q, to);
    q->gap.there = false;
    if (q->line)
        vq_record(q, q->line, q->line->binding, q->line->base);
}
