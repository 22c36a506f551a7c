/* From a switch to the guest: the frames of a sender's batch into one receiveq, for one ring format.
 *
 * It runs in the sender's worker, inside the door of the lane. Chains are popped until the frame fits, its bytes
 * copied from the sender's pieces, and the header written last. What has been popped for the frame in hand is noted in
 * the lane before the sender's memory is touched, for that can vanish: see take_back.
 */
#include "batch.h"

#define AHEAD 8

/* Copy `length` bytes that lie in `from` behind the first `skip` bytes of `to`; both have as many. */
static void copy_frame(const struct piece *to, uint64_t skip, const struct piece *from, uint64_t length)
{
    while (to->len <= skip)
        skip -= (to++)->len;
    uint8_t *at = to->base + skip;
    uint64_t room = to->len - skip;
    const uint8_t *source = from->base;
    uint64_t there = from->len;
    for (;;) {
        uint64_t part = room < there ? room : there;
        if (part >= length) {
            memcpy(at, source, length);
            return;
        }
        memcpy(at, source, part);
        length -= part;
        at += part;
        source += part;
        if (!(room -= part)) {
            at = (++to)->base;
            room = to->len;
        }
        if (!(there -= part)) {
            source = (++from)->base;
            there = from->len;
        }
    }
}

/* What nearly every frame is: in one piece, for a guest whose next buffer is one too, with room for all of it. -> false:
 * it is not, and nothing was done. */
INLINED bool place_simply(struct lane *l, struct vq *q, const struct net_header *header, const struct piece *piece,
                          uint64_t length)
{
    struct delivery *d = &l->delivery;
    struct piece *to = l->pieces + 1;
    struct chain c = {0};
    uint64_t bytes = NET_HEADER + length;

    if (piece->len < length)
        return false;
    int status = RING(pop)(q, &c, to, 1);
    if (status != RING_OK || c.writable != 1 || c.readable || c.writable_len < bytes) {
        if (status != RING_EMPTY && !q->broken)
            RING(unpop)(q, c.slots);
        return false;
    }
    d->slots = c.slots;
    d->pieces = 1;
    __asm__ volatile("" ::: "memory"); /* noted, whatever becomes of the copy */
    memcpy(to->base + NET_HEADER, piece->base, length);
    put_header(to->base, header, 1);
    wrote_pieces(q, to, 1, 0, bytes);
    RING(push)(q, c.head, c.slots, (uint32_t)bytes);
    __asm__ volatile("" ::: "memory");
    d->slots = d->pieces = 0;
    count_received(&l->stats.to_guest, header, length);
    return true;
}

/* Deliver one frame, of which `header` is fit for this guest, or count it as lost. */
static void place(struct lane *l, struct vq *q, struct net_header *header, const struct piece *pieces, uint64_t length)
{
    struct flow_stats *stats = &l->stats.to_guest;
    struct delivery *d = &l->delivery;
    struct intake in = {0};
    uint64_t before = NET_HEADER + l->hash_header;

    if (likely(!l->hash_header && place_simply(l, q, header, pieces, length)))
        return;
    int status = take_chains(l, q, &in, before + length);
    if (unlikely(q->broken))
        return count_drop(stats, DROP_STOPPED);
    if (unlikely(in.capacity < before + length)) {
        bool never = can_never_fit(l, q, &in, status);
        give_back(q, &in);
        if (status == RING_E_MISS) {
            d->waiting = true;
            lane_event(l, LANE_MISS);
            return count_drop(stats, DROP_STOPPED);
        }
        return count_drop(stats, never ? DROP_TOO_SMALL : DROP_NO_BUFFERS);
    }
    d->slots = in.slots;
    d->pieces = in.pieces;
    __asm__ volatile("" ::: "memory"); /* noted, whatever becomes of the copy */
    copy_frame(l->pieces + 1, before, pieces, length);
    if (unlikely(l->hash_header))
        pieces_copy(l->pieces + 1, in.pieces, NET_HEADER, (uint8_t *)&d->hash, sizeof(d->hash), true);
    wrote_pieces(q, l->pieces + 1, in.pieces, NET_HEADER, before - NET_HEADER + length);
    complete(l, q, &in, header, length);
    d->slots = d->pieces = 0;
}

/* The same, if it is not too long for the guest. `head`: HEAD_BYTES that begin it. */
static void place_fitting(struct lane *l, struct vq *q, struct net_header *header, const uint8_t *head,
                          const struct piece *pieces, uint64_t length)
{
    struct piece begins = {(uint8_t *)head, HEAD_BYTES};
    uint64_t had = l->stats.to_guest.frames;

    if (unlikely(length > l->config.max_frame || above_mtu(l, header, &begins, 1, length)))
        return count_drop(&l->stats.to_guest, DROP_BAD_LENGTH);
    place(l, q, header, pieces, length);
    if (l->stats.to_guest.frames != had)
        count_header(&l->stats.to_guest_headers, header, length);
}

/* Cut the frame, which lies in l->room, into segments that need nothing of the guest. */
static void deliver_segments(struct lane *l, struct vq *q, const struct frame *f)
{
    struct delivery *d = &l->delivery;
    struct segmenter s;
    struct segment part;

    d->fragment_id += 0x9E3779B1u; /* odd: another one each time, and the next one not at sight */
    if (segmenter_start(&s, &f->header, l->room, f->length, f->length, d->fragment_id) < 0)
        return count_drop(&l->stats.to_guest, DROP_BAD_HEADER);
    while (!q->broken && !d->waiting && segmenter_next(&s, &part)) {
        struct piece pieces[2] = {{(uint8_t *)part.header, part.header_length},
                                  {l->room + part.payload_at, part.payload_length}};
        struct offload_sum sum = {0};
        struct net_header header = {0};
        offload_sum_add(&sum, l->room + part.sum_at, part.sum_length);
        segmenter_seal(&s, &sum);
        place_fitting(l, q, &header, f->head, pieces, part.header_length + part.payload_length);
    }
}

/* A frame that is too much for this receiver: what it did not negotiate is made up for, in a private copy. */
static __attribute__((noinline)) void deliver_made_up(struct lane *l, struct vq *q, const struct frame *f)
{
    const struct net_header *h = &f->header;
    struct piece piece = {l->room, f->length};
    struct net_header header = {0};

    pieces_copy(f->pieces, f->count, 0, l->room, f->length, false);
    __asm__ volatile("" ::: "memory"); /* decide on this copy, not on a second read of its source */
    if (h->gso_type)
        return deliver_segments(l, q, f);
    if (offload_checksum(l->room, f->length, NULL, h->csum_start, h->csum_offset) < 0)
        return count_drop(&l->stats.to_guest, DROP_BAD_HEADER);
    place_fitting(l, q, &header, f->head, &piece, f->length);
}

static void deliver_frame(struct lane *l, struct vq *q, const struct frame *f)
{
    struct net_header header = f->header;

    l->delivery.hash = f->hash;
    if (unlikely(!header_is_zero(&header) && header_to_guest(&header, l->config.features)))
        return deliver_made_up(l, q, f);
    place_fitting(l, q, &header, f->head, f->pieces, f->length);
}

/* Fetch where the frame after so many others will be written to. */
INLINED void fetch_ahead(const struct vq *q, uint32_t ahead)
{
    const uint8_t *begin = q->config.iotlb ? NULL : RING(ahead)(q, ahead);

    if (begin)
        fetch_to_write(begin);
}

static void deliver(struct lane *l)
{
    const struct flow_config *flow = &l->config.to_guest;
    struct delivery *d = &l->delivery;
    struct vq *q = flow->queue;

    if (unlikely(q->gap.there)) /* a part of the ring that somebody else completed is passed over here */
        RING(arm)(q);
    RING(disarm)(q);
    l->stats.to_guest.bursts++;
    for (uint32_t i = 0; i < AHEAD; i++)
        fetch_ahead(q, i);
    while (d->left) {
        fetch_ahead(q, AHEAD);
        const struct frame *f = &d->batch->frames[__builtin_ctzll(d->left)];
        if (unlikely(q->broken || d->waiting))
            count_drop(&l->stats.to_guest, DROP_STOPPED);
        else
            deliver_frame(l, q, f);
        d->left &= d->left - 1;
    }
    publish(l, q, flow, &l->stats.to_guest);
    if (unlikely(q->broken))
        break_queue(l, flow, LANE_TO_GUEST_BROKEN);
}

/* The sender's memory vanished in the middle: the frame in hand was never there, and those before it arrive. */
static void take_back(struct lane *l)
{
    const struct flow_config *flow = &l->config.to_guest;
    struct delivery *d = &l->delivery;
    struct vq *q = flow->queue;

    wrote_pieces(q, l->pieces + 1, d->pieces, 0, UINT64_MAX); /* how far the copy came is not known */
    RING(unpop)(q, d->slots);
    publish(l, q, flow, &l->stats.to_guest);
}
