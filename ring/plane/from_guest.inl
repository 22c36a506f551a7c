/* From the guest to the port: one burst of a transmitq.
 *
 * Chains are popped in groups, and what each begins with is fetched into the cache meanwhile: the driver has just
 * written it, on another processor. Then each chain's first 12 bytes are copied to private memory, checked and cleaned
 * (header.c), and that copy goes to the port: together with the rest of the chain, straight from guest memory,
 * writev([header][pieces...]), or, if the frame is short, with a copy of it. Then the chain is pushed, length 0. Used
 * entries are published once a burst, after the writes: if we die in between, a frame may leave twice, never not at all.
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

/* Chains popped at once: enough to fetch as many lines as a processor has under way at a time. */
#define GROUP 16

enum { MAC = 6 }; /* bytes of an address; a frame begins with where it goes to and where it comes from */

/* A chain of the group. */
struct taken {
    struct piece *pieces;  /* before them one is free for the header */
    uint64_t readable_len; /* bytes */
    uint32_t readable;     /* pieces */
    int32_t status;        /* RING_OK, the rule it broke, or HAS_WRITABLE */
    uint32_t head;
    uint32_t slots;
};
#define HAS_WRITABLE 1

struct group {
    struct taken taken[GROUP];
    uint32_t count;
};

/* Pop up to `max` chains, and have what each begins with on its way to the cache while the others are popped.
 * -> RING_OK; or why there are no more: RING_EMPTY, RING_E_MISS, RING_E_* with the queue broken */
OUTLINED int take_group(struct lane *l, struct vq *q, struct group *g, uint32_t max)
{
    struct piece *pieces = l->pieces + 1;
    uint32_t left = RING_PIECES_MAX, n = 0;
    int end = RING_OK;
    struct chain c = {0};

    do {
        int status = RING(pop)(q, &c, pieces, left);
        if (likely(status == RING_OK)) {
            fetch_to_read(pieces->base);
            status = c.writable ? HAS_WRITABLE : RING_OK;
        } else if (status == RING_EMPTY || q->broken) {
            end = status;
            break;
        } else if (status == RING_E_MISS || (status == RING_E_PIECES && n > 0)) {
            /* not the chain's fault: its translation is missing, or the others have left it too little room */
            RING(unpop)(q, c.slots);
            end = status == RING_E_MISS ? status : RING_OK;
            break;
        }
        g->taken[n++] = (struct taken){pieces, c.readable_len, c.readable, status, c.head, c.slots};
        uint32_t used = c.readable + c.writable + 1;
        if (unlikely(used >= left))
            break;
        pieces += used;
        left -= used;
    } while (n < max);
    g->count = n;
    return end;
}

enum sent { SENT, BLOCKED, MEMORY_GONE };

/* Write a frame to the port in one piece: a copy of it behind `header`. -> as write */
static ssize_t write_staged(struct lane *l, const struct taken *t, const struct net_header *header, uint64_t length)
{
    memcpy(l->staged, header, NET_HEADER);
    pieces_copy(t->pieces, t->readable, NET_HEADER, l->staged + NET_HEADER, length, false);
    return write(l->config.to_port, l->staged + NET_HEADER - l->config.port_header, length + l->config.port_header);
}

/* Write it straight from the guest's memory. -> as writev */
static ssize_t write_pieces(struct lane *l, const struct taken *t, const struct net_header *header)
{
    struct piece *pieces = t->pieces;
    uint32_t first = 0, skip = NET_HEADER;

    while (pieces[first].len <= skip)
        skip -= (uint32_t)pieces[first++].len;
    pieces[first].base += skip;
    pieces[first].len -= skip;
    const struct piece *from = pieces + first;
    uint32_t count = t->readable - first;
    if (l->config.port_header) {
        pieces[(int)first - 1] = (struct piece){(uint8_t *)header, NET_HEADER};
        from--;
        count++;
    }
    return writev(l->config.to_port, (const struct iovec *)from, (int)count);
}

/* Write the frame of so many bytes that follows the guest's header to the port, with `header` in its place. */
OUTLINED enum sent write_frame(struct lane *l, const struct taken *t, const struct net_header *header, uint64_t length)
{
    struct flow_stats *stats = &l->stats.from_guest;
    ssize_t written = length <= STAGED_MAX ? write_staged(l, t, header, length) : write_pieces(l, t, header);

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

/* A chain that broke no rule of the ring, of so many readable bytes: does it hold a frame that is to be sent?
 * -> -1, or the enum drop_reason */
INLINED int refused(struct lane *l, bool writable, uint64_t readable_len)
{
    if (!l->config.from_guest.enabled)
        return DROP_DISABLED;
    if (unlikely(writable)) /* 5.1.6.2: a transmitted packet is device-readable only */
        return l->stats.from_guest.bad_chains++, DROP_BAD_CHAIN;
    if (readable_len < NET_HEADER + ETHERNET_HEADER || readable_len > NET_HEADER + (uint64_t)l->config.max_frame)
        return DROP_BAD_LENGTH;
    return -1;
}

/* May the driver say this of its frame of `length` bytes? See header_from_guest. */
INLINED bool may_say(const struct lane *l, struct net_header *header, uint64_t length)
{
    return header_is_zero(header) || !header_from_guest(header, length, l->config.features, l->config.gso_size_min);
}

/* Give the frame of one chain to the port. */
INLINED enum sent send_frame(struct lane *l, const struct taken *t)
{
    struct flow_stats *stats = &l->stats.from_guest;
    struct net_header header;

    if (unlikely(t->status < 0)) {
        count_bad_chain(l, stats, t->status);
        return count_drop(stats, DROP_BAD_CHAIN), SENT;
    }
    int why = refused(l, t->status == HAS_WRITABLE, t->readable_len);
    if (unlikely(why >= 0))
        return count_drop(stats, (enum drop_reason)why), SENT;
    uint64_t length = t->readable_len - NET_HEADER;
    if (likely(t->pieces->len >= NET_HEADER))
        memcpy(&header, t->pieces->base, NET_HEADER);
    else
        pieces_copy(t->pieces, t->readable, 0, (uint8_t *)&header, NET_HEADER, false);
    __asm__ volatile("" : "+m"(header)); /* decide on this copy, not on a second read of its source */
    if (!may_say(l, &header, length))
        return count_drop(stats, DROP_BAD_HEADER), SENT;
    if (l->config.to_port < 0) {
        /* As whoever drops a frame has looked at it: what a null port is measured for is not to be had for less. */
        uint8_t first;
        if (likely(t->pieces->len > NET_HEADER))
            first = t->pieces->base[NET_HEADER];
        else
            pieces_copy(t->pieces, t->readable, NET_HEADER, &first, sizeof(first), false);
        __asm__ volatile("" :: "r"(first));
        return count_drop(stats, DROP_NULL), SENT;
    }
    if (l->port_gone)
        return count_drop(stats, DROP_NO_PORT), SENT;
    if (unlikely(l->mac_due)) {
        pieces_copy(t->pieces, t->readable, NET_HEADER + MAC, l->guest_mac, MAC, false);
        l->mac_due = false;
        l->mac_known = true;
    }
    return write_frame(l, t, &header, length);
}

/* Chains that one used entry will complete. */
struct completion {
    uint32_t head; /* of the last one */
    uint32_t chains;
    uint32_t slots;
};

INLINED void finish(struct vq *q, struct completion *done, uint32_t head, uint32_t slots)
{
    if (q->in_order)
        *done = (struct completion){head, done->chains + 1, done->slots + slots};
    else
        RING(push)(q, head, slots, 0);
}

static void flush(struct vq *q, const struct completion *done)
{
    if (done->chains)
        RING(push_batch)(q, done->head, done->chains, done->slots);
}

/* Give the chains of a group back, from this one on. */
static void give_back_from(struct vq *q, const struct group *g, uint32_t first)
{
    uint32_t slots = 0;

    for (uint32_t i = first; i < g->count; i++)
        slots += g->taken[i].slots;
    RING(unpop)(q, slots);
}

enum burst {
    BURST_FULL,  /* its budget is used up */
    BURST_EMPTY, /* the driver has made nothing more available */
    BURST_STOP   /* broken, blocked, waiting or memory gone */
};

static enum burst burst_from_guest(struct lane *l, struct vq *q)
{
    struct completion done = {0};
    enum burst end = BURST_FULL;
    uint32_t budget = BURST_FRAMES;
    struct group g;

    for (; budget > 0 && end == BURST_FULL; budget -= g.count) {
        int status = take_group(l, q, &g, budget < GROUP ? budget : GROUP);
        if (status != RING_OK)
            end = status == RING_EMPTY ? BURST_EMPTY : BURST_STOP;
        for (uint32_t i = 0; i < g.count; i++) {
            enum sent sent = send_frame(l, &g.taken[i]);
            if (unlikely(sent == MEMORY_GONE)) {
                l->memory_gone = true;
                return BURST_STOP;
            }
            if (unlikely(sent == BLOCKED)) {
                give_back_from(q, &g, i);
                l->blocked = true;
                end = BURST_STOP;
                break;
            }
            finish(q, &done, g.taken[i].head, g.taken[i].slots);
        }
        if (unlikely(status == RING_E_MISS && !l->blocked))
            lane_wait(l, WORK_FROM_GUEST);
    }
    flush(q, &done);
    publish(l, q, &l->config.from_guest, &l->stats.from_guest);
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
