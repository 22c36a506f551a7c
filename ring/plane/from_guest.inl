/* From the guest to the port: one burst of a transmitq.
 *
 * A chain is popped, its first 12 bytes copied to private memory, checked and cleaned (header.c), and that
 * copy goes to the port together with the rest of the chain, straight from guest memory:
 * writev([header][pieces...]). Then the chain is pushed, length 0. Used entries are published once a burst,
 * after the writes: if we die in between, a frame may leave twice, never not at all.
 *
 * A port that takes no more gets its chain back into the ring, and the lane waits until it is writable. A
 * disabled queue, a port that is gone and a null port are drained: the guest must not be held up by them.
 *
 * With VIRTIO_F_IN_ORDER one used entry completes a whole burst (2.7.9, 2.8.8): a transmitted chain is
 * always completely used, so skipping its entry tells the driver the truth.
 *
 * The guard is armed once a burst. Guest memory that vanishes ends the burst: the lane is dead then and the
 * control thread closes the device, so nothing of the burst's progress has to be trusted.
 */
#include "flow.h"

enum { MAC = 6 }; /* bytes of an address; a frame begins with where it goes to and where it comes from */

enum sent { SENT, BLOCKED, MEMORY_GONE };

/* Write a frame of so many bytes to the port, behind its header, which is in `count` pieces too. pieces[-1] is free
 * for our copy of it. */
static __attribute__((noinline)) enum sent write_frame(struct lane *l, const struct net_header *header, uint32_t count,
                                                       uint64_t length)
{
    struct flow_stats *stats = &l->stats.from_guest;
    struct piece *pieces = l->pieces + 1;
    uint32_t first = 0, skip = NET_HEADER;

    while (pieces[first].len <= skip)
        skip -= (uint32_t)pieces[first++].len;
    pieces[first].base += skip;
    pieces[first].len -= skip;
    const struct piece *from = pieces + first;
    count -= first;
    if (l->config.port_header) {
        pieces[(int)first - 1] = (struct piece){(uint8_t *)header, NET_HEADER};
        from--;
        count++;
    }
    ssize_t written = writev(l->config.to_port, (const struct iovec *)from, (int)count);
    if (likely(written == (ssize_t)(length + l->config.port_header))) {
        stats->frames++;
        stats->bytes += length;
        stats->gso_frames += header->gso_type != 0;
        return SENT;
    }
    if (written < 0 && errno == EAGAIN)
        return BLOCKED;
    if (written < 0 && errno == EFAULT)
        return MEMORY_GONE;
    if (written < 0 && port_is_dead(errno)) {
        port_lost(l);
        return count_drop(stats, DROP_NO_PORT), SENT;
    }
    return count_drop(stats, DROP_PORT), SENT;
}

/* Give the frame of one chain to the port. */
INLINED enum sent send_frame(struct lane *l, const struct chain *c)
{
    struct flow_stats *stats = &l->stats.from_guest;
    struct net_header header;
    struct piece *pieces = l->pieces + 1;

    if (!l->config.from_guest.enabled)
        return count_drop(stats, DROP_DISABLED), SENT;
    if (c->writable) /* 5.1.6.2: a transmitted packet is device-readable only */
        return count_drop(stats, DROP_BAD_CHAIN), stats->bad_chains++, SENT;
    if (c->readable_len < NET_HEADER + ETHERNET_HEADER || c->readable_len > NET_HEADER + (uint64_t)l->config.max_frame)
        return count_drop(stats, DROP_BAD_LENGTH), SENT;
    uint64_t length = c->readable_len - NET_HEADER;
    if (likely(pieces->len >= NET_HEADER))
        memcpy(&header, pieces->base, NET_HEADER);
    else
        pieces_copy(pieces, c->readable, 0, (uint8_t *)&header, NET_HEADER, false);
    __asm__ volatile("" : "+m"(header)); /* decide on this copy, not on a second read of its source */
    if (!header_is_zero(&header) && header_from_guest(&header, length, l->config.features, l->config.gso_size_min))
        return count_drop(stats, DROP_BAD_HEADER), SENT;
    if (l->config.to_port < 0)
        return count_drop(stats, DROP_NULL), SENT;
    if (l->port_gone)
        return count_drop(stats, DROP_NO_PORT), SENT;
    if (unlikely(l->mac_due)) {
        pieces_copy(pieces, c->readable, NET_HEADER + MAC, l->guest_mac, MAC, false);
        l->mac_due = false;
        l->mac_known = true;
    }
    return write_frame(l, &header, c->readable, length);
}

/* Chains that one used entry will complete. */
struct completion {
    uint32_t head; /* of the last one */
    uint32_t chains;
    uint32_t slots;
};

INLINED void finish(struct vq *q, struct completion *done, const struct chain *c)
{
    if (q->in_order)
        *done = (struct completion){c->head, done->chains + 1, done->slots + c->slots};
    else
        RING(push)(q, c->head, c->slots, 0);
}

static void flush(struct vq *q, const struct completion *done)
{
    if (done->chains)
        RING(push_batch)(q, done->head, done->chains, done->slots);
}

enum burst {
    BURST_FULL,  /* its budget is used up */
    BURST_EMPTY, /* the driver has made nothing more available */
    BURST_STOP   /* broken, blocked, waiting or memory gone */
};

static enum burst burst_from_guest(struct lane *l, struct vq *q)
{
    struct flow_stats *stats = &l->stats.from_guest;
    struct completion done = {0};
    enum burst end = BURST_FULL;
    struct chain c;

    for (int i = 0; i < BURST_FRAMES && end == BURST_FULL; i++) {
        int status = RING(pop)(q, &c, l->pieces + 1, RING_PIECES_MAX);
        if (likely(status == RING_OK)) {
            switch (send_frame(l, &c)) {
            case SENT:
                finish(q, &done, &c);
                break;
            case BLOCKED:
                RING(unpop)(q, c.slots);
                l->blocked = true;
                end = BURST_STOP;
                break;
            case MEMORY_GONE:
                l->memory_gone = true;
                return BURST_STOP;
            }
        } else if (status == RING_EMPTY) {
            end = BURST_EMPTY;
        } else if (q->broken) {
            end = BURST_STOP;
        } else if (status == RING_E_MISS) {
            RING(unpop)(q, c.slots);
            lane_wait(l, WORK_FROM_GUEST);
            end = BURST_STOP;
        } else {
            count_bad_chain(l, stats, status);
            count_drop(stats, DROP_BAD_CHAIN);
            finish(q, &done, &c);
        }
    }
    flush(q, &done);
    publish(q, &l->config.from_guest, stats);
    return end;
}

static void from_guest(struct lane *l)
{
    const struct flow_config *flow = &l->config.from_guest;
    struct vq *q = flow->queue;

    RING(disarm)(q);
    for (int i = 0; i < BURSTS; i++) {
        enum burst end = burst_from_guest(l, q);
        if (end == BURST_FULL)
            continue;
        if (end == BURST_EMPTY && !come_to_rest(l, q, WORK_FROM_GUEST))
            continue;
        l->work &= ~(uint32_t)WORK_FROM_GUEST;
        if (q->broken)
            break_queue(l, flow, LANE_FROM_GUEST_BROKEN);
        return;
    }
}
