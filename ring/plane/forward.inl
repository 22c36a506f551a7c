/* From the guest to a switch: the sender's two steps around a delivery, for one ring format.
 *
 * Chains are popped into one pool of pieces, all before the first is looked into, so that their first bytes can come
 * near meanwhile. They stay where they are: frames are copied from there, by fabric.c. Only then do chains go back, all
 * at once. The order of used entries is that of the chains, bad ones included.
 */
#include "batch.h"

/* What is wrong with the frame of a chain, or who gets it. Until now its pieces and its length are those of the chain,
 * net header included. -> -1, or the enum drop_reason */
static int take_frame(struct lane *l, uint32_t i)
{
    struct flow_stats *stats = &l->stats.from_guest;
    struct frame *f = &l->batch->frames[i];
    struct piece *pieces = f->pieces;
    uint32_t first = 0, before = NET_HEADER + l->hash_header, skip = before;

    int dropped = refused(l, f->writable, (uint64_t)f->length - l->hash_header); /* shorter: it wraps */
    if (unlikely(dropped >= 0))
        return dropped;
    if (likely(pieces->len >= HEAD_BYTES && !l->hash_header)) { /* each by itself, as they are read again at once */
        memcpy(&f->header, pieces->base, NET_HEADER);
        memcpy(f->ethernet, pieces->base + NET_HEADER, ETHERNET_HEADER);
    } else {
        pieces_copy(pieces, f->count, 0, (uint8_t *)&f->header, NET_HEADER, false);
        pieces_copy(pieces, f->count, before, f->ethernet, ETHERNET_HEADER, false);
    }
    __asm__ volatile("" : "+m"(f->head)); /* decide on this copy, not on a second read of its source */
    f->length -= before;
    if (!may_say(l, &f->header, f->length))
        return DROP_BAD_HEADER;
    if (unlikely(l->mac_due)) {
        memcpy(l->guest_mac, f->ethernet + MAC, MAC);
        l->mac_due = false;
        l->mac_known = true;
    }
    while (pieces[first].len <= skip)
        skip -= (uint32_t)pieces[first++].len;
    pieces[first].base += skip;
    pieces[first].len -= skip;
    f->pieces += first;
    f->count -= first;
    dropped = fabric_route(l->config.member, l->batch, i);
    if (unlikely(dropped))
        return dropped;
    stats->frames++;
    stats->bytes += f->length;
    stats->gso_frames += f->header.gso_type != 0;
    count_header(&l->stats.from_guest_headers, &f->header, f->length);
    return -1;
}

/* Pop the next chain into the batch. -> false: the burst ends before it, l->gathered tells why */
static bool take_transmitted(struct lane *l, struct vq *q)
{
    struct flow_stats *stats = &l->stats.from_guest;
    struct batch *b = l->batch;
    struct frame *f = &b->frames[b->count];
    struct chain c = {0};

    f->pieces = b->pool + b->used + 1;
    int status = RING(pop)(q, &c, f->pieces, RING_PIECES_MAX);
    if (unlikely(status != RING_OK)) {
        l->gathered = status == RING_EMPTY ? BURST_EMPTY : BURST_STOP;
        if (status == RING_EMPTY || q->broken)
            return false;
        if (status == RING_E_MISS) {
            RING(unpop)(q, c.slots);
            lane_wait(l, WORK_FROM_GUEST);
            return false;
        }
        l->gathered = BURST_FULL;
        count_bad_chain(l, stats, status);
        count_drop(stats, DROP_BAD_CHAIN);
    }
    f->chain_head = c.head;
    f->slots = c.slots;
    f->lost = status != RING_OK;
    f->writable = c.writable;
    f->count = c.readable;
    f->length = (uint32_t)c.readable_len; /* the walk has seen to it that it fits */
    fetch_to_read(f->pieces->base);
    b->used += f->lost ? 0 : 1 + c.readable + c.writable;
    b->count++;
    return true;
}

static void gather(struct lane *l)
{
    struct vq *q = l->config.from_guest.queue;
    struct batch *b = l->batch;
    uint64_t bytes = 0;

    RING(disarm)(q);
    fabric_begin(b);
    l->gathered = BURST_FULL;
    while (b->count < BURST_FRAMES && BATCH_PIECES - b->used > RING_PIECES_MAX && bytes < BURST_BYTES &&
           take_transmitted(l, q))
        bytes += b->frames[b->count - 1].length;
    for (uint32_t i = 0; i < b->count; i++) {
        if (b->frames[i].lost)
            continue;
        int dropped = take_frame(l, i);
        if (unlikely(dropped >= 0))
            count_drop(&l->stats.from_guest, (enum drop_reason)dropped);
    }
}

static void settle(struct lane *l)
{
    const struct flow_config *flow = &l->config.from_guest;
    struct vq *q = flow->queue;
    const struct batch *b = l->batch;
    struct completion done = {0};

    for (uint32_t i = 0; i < b->count; i++)
        finish(q, &done, b->frames[i].chain_head, b->frames[i].slots);
    flush(q, &done);
    publish(l, q, flow, &l->stats.from_guest);
    if (l->gathered == BURST_FULL)
        return;
    if (l->gathered == BURST_EMPTY && !come_to_rest(l, q, WORK_FROM_GUEST))
        return;
    l->work &= ~(uint32_t)WORK_FROM_GUEST;
    if (q->broken)
        break_queue(l, flow, LANE_FROM_GUEST_BROKEN);
}
