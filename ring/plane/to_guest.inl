/* From the port to the guest: one burst of a receiveq.
 *
 * How long the next frame is, nobody knows before it is read. So chains are popped for as much as the last
 * frame suggests, and the frame is read straight into them, with a private header before and a private tail
 * behind: readv([header][pieces...][tail]). A short one is read into private memory and copied instead. A frame that reached into the tail is gathered in private memory
 * and put into more chains; chains too many are given back. The header, cleaned, with the number of buffers,
 * is written last. A frame for which the guest has too few buffers is held in private memory until it posts
 * more, and the port is not read meanwhile: back-pressure, not loss.
 *
 * Each buffer gets a used entry of its own, with VIRTIO_F_IN_ORDER too: skipping an entry would claim that its
 * buffer was filled completely (2.7.9), which is true of a frame's inner buffers only.
 *
 * The guard is armed once a burst; see from_guest.inl for what happens when memory vanishes.
 */
#include "flow.h"

#define PIECES_MAX (RING_PIECES_MAX - 1) /* beside our header the tail, too, is a piece of its own */

/* The chains a frame is being put into. */
struct intake {
    uint32_t chains;    /* in l->filled; filled[].written is their capacity until the frame is placed */
    uint32_t slots;     /* of the ring */
    uint32_t pieces;    /* in l->pieces + 1 */
    uint64_t capacity;  /* bytes, header included */
};

/* Pop one more chain for the frame in hand.
 * -> RING_OK; RING_EMPTY; RING_E_MISS; RING_E_* with the queue broken; RING_MORE: a bad chain was met, everything popped
 * for this frame went back used with length 0 (the order of the ring allows nothing else), start again. */
static int take_chain(struct lane *l, struct vq *q, struct intake *in)
{
    struct chain c = {0};
    struct piece *pieces = l->pieces + 1 + in->pieces;

    if (in->chains == q->size)
        return RING_EMPTY;
    int status = RING(pop)(q, &c, pieces, PIECES_MAX - in->pieces);
    if (status == RING_EMPTY || q->broken)
        return status;
    /* not the chain's fault: its translation is missing, or the frame is spread over too many pieces */
    if (status == RING_E_MISS || (status == RING_E_PIECES && in->pieces > 0)) {
        RING(unpop)(q, c.slots);
        return status;
    }
    bool too_short = c.writable_len < (in->chains == 0 ? NET_HEADER : 1);
    if (unlikely(status < 0 || c.readable || too_short)) {
        count_bad_chain(l, &l->stats.to_guest, status);
        for (uint32_t i = 0; i < in->chains; i++)
            RING(push)(q, l->filled[i].head, l->filled[i].slots, 0);
        RING(push)(q, c.head, c.slots, 0);
        *in = (struct intake){0};
        return RING_MORE;
    }
    l->filled[in->chains++] = (struct filled){c.head, c.slots, (uint32_t)c.writable_len};
    in->slots += c.slots;
    in->pieces += c.writable;
    in->capacity += c.writable_len;
    return RING_OK;
}

/* Pop chains until `wanted` bytes fit, or, without mergeable buffers, one. -> as take_chain. With RING_EMPTY or
 * RING_E_PIECES or RING_E_MISS `in` has some, but not enough; RING_MORE: one bad chain after the other, go on later. */
static int take_chains(struct lane *l, struct vq *q, struct intake *in, uint64_t wanted)
{
    bool mergeable = l->config.features >> NET_F_MRG_RXBUF & 1;
    uint32_t bad = 0;

    while (in->capacity < wanted && (mergeable || in->chains == 0)) {
        int status = take_chain(l, q, in);
        if (status == RING_MORE && ++bad <= q->size)
            continue;
        if (status != RING_OK)
            return status;
    }
    return RING_OK;
}

/* Chains that end with `status` are too few for a frame: will they be with any more that the driver may post? */
static bool can_never_fit(const struct lane *l, const struct vq *q, const struct intake *in, int status)
{
    return in->chains == q->size || status == RING_E_PIECES ||
           (in->chains && !(l->config.features >> NET_F_MRG_RXBUF & 1));
}

static void give_back(struct vq *q, struct intake *in)
{
    RING(unpop)(q, in->slots);
    *in = (struct intake){0};
}

INLINED void count_received(struct flow_stats *stats, const struct net_header *header, uint64_t length)
{
    stats->frames++;
    stats->bytes += length;
    stats->gso_frames += header->gso_type != 0;
}

/* Write the header of a frame that lies in so many buffers. In two parts: a load of all of it would have to wait for a
 * store of a part, and that for the whole frame, for stores come to memory in their order. */
INLINED void put_header(uint8_t *to, const struct net_header *header, uint16_t buffers)
{
    memcpy(to, header, offsetof(struct net_header, num_buffers));
    memcpy(to + offsetof(struct net_header, num_buffers), &buffers, sizeof(buffers));
}

/* Finish a frame whose bytes are all in guest memory: lengths, surplus chains, header, used entries. */
static void complete(struct lane *l, struct vq *q, struct intake *in, struct net_header *header, uint64_t length)
{
    struct flow_stats *stats = &l->stats.to_guest;
    uint64_t left = NET_HEADER + l->hash_header + length;
    uint32_t used = 0, slots = 0;

    while (left > 0) {
        struct filled *f = &l->filled[used++];
        if (f->written > left)
            f->written = (uint32_t)left;
        left -= f->written;
        slots += f->slots;
    }
    if (unlikely(in->slots > slots))
        RING(unpop)(q, in->slots - slots);
    if (likely(l->pieces[1].len >= NET_HEADER)) {
        put_header(l->pieces[1].base, header, (uint16_t)used);
    } else {
        header->num_buffers = (uint16_t)used;
        pieces_copy(l->pieces + 1, in->pieces, 0, (uint8_t *)header, NET_HEADER, true);
    }
    wrote_pieces(q, l->pieces + 1, in->pieces, 0, NET_HEADER);
    for (uint32_t i = 0; i < used; i++)
        RING(push)(q, l->filled[i].head, l->filled[i].slots, l->filled[i].written);
    count_received(stats, header, length);
    l->expect = length > 1514 ? LARGE_FRAME : SMALL_FRAME;
}

enum received {
    RECEIVED, /* or dropped: the next one, please */
    IDLE,     /* the port has nothing */
    STARVED,  /* the guest has too few buffers */
    WAITING,  /* the translation of the next buffer is missing */
    STOP      /* the queue broke, or memory is gone */
};

/* What to do where take_chains ended with `status` and too little. */
static enum received short_of(int status)
{
    if (status == RING_E_MISS)
        return WAITING;
    return status == RING_MORE ? RECEIVED : STARVED;
}

/* Put a frame that lies in l->room into chains, or hold it there until the guest posts enough. */
static enum received place_from_room(struct lane *l, struct vq *q, const struct net_header *header, uint32_t length)
{
    struct net_header mine = *header;
    struct intake in = {0};
    uint64_t wanted = NET_HEADER + (uint64_t)length;
    int status = take_chains(l, q, &in, wanted);

    l->held = 0;
    if (q->broken)
        return count_drop(&l->stats.to_guest, DROP_BAD_CHAIN), STOP;
    if (in.capacity >= wanted) {
        pieces_copy(l->pieces + 1, in.pieces, NET_HEADER, l->room + NET_HEADER, length, true);
        wrote_pieces(q, l->pieces + 1, in.pieces, NET_HEADER, length);
        complete(l, q, &in, &mine, length);
        return RECEIVED;
    }
    bool never = can_never_fit(l, q, &in, status);
    give_back(q, &in);
    if (never) {
        count_drop(&l->stats.to_guest, DROP_TOO_SMALL);
        return RECEIVED;
    }
    l->held = length;
    l->held_header = mine;
    return short_of(status);
}

/* Place a frame that was held. The lane may have been detached meanwhile, and another driver, which negotiated
 * less, may have taken over. */
static enum received place_held(struct lane *l, struct vq *q)
{
    if (header_to_guest(&l->held_header, l->config.features)) {
        l->held = 0;
        return count_drop(&l->stats.to_guest, DROP_OFFLOAD), RECEIVED;
    }
    return place_from_room(l, q, &l->held_header, l->held);
}

/* 5.1.4: is a frame without segmentation longer than the MTU the driver was told? A VLAN tag is not counted;
 * only where that decides is the frame, which lies in `pieces`, looked into. */
static bool above_mtu(const struct lane *l, const struct net_header *header, const struct piece *pieces,
                      uint32_t count, uint64_t length)
{
    uint64_t limit = ETHERNET_HEADER + (uint64_t)l->config.mtu;
    uint8_t type[2];

    if (likely(!l->config.mtu) || header->gso_type || length <= limit)
        return false;
    pieces_copy(pieces, count, NET_HEADER + 12, type, sizeof(type), false);
    return length > limit + 4 || type[0] != 0x81 || type[1] != 0x00;
}

/* Read a frame into private memory in one piece, header and all, and copy as much of it as fits into the chains. What
 * does not fit stays where it is, as the tail. -> as read */
static ssize_t read_staged(struct lane *l, const struct intake *in, struct net_header *header)
{
    struct piece *pieces = l->pieces + 1;
    uint32_t before = l->config.port_header;

    fetch_to_write(pieces->base); /* while the kernel is at work */
    ssize_t got = read(l->config.from_port, l->room + NET_HEADER - before, before + FRAME_ROOM);
    uint64_t fits = in->capacity - NET_HEADER < FRAME_ROOM ? in->capacity - NET_HEADER : FRAME_ROOM;

    pieces[in->pieces] = (struct piece){l->room + NET_HEADER + fits, FRAME_ROOM - fits};
    if (got > (ssize_t)before) {
        uint64_t length = (uint64_t)got - before;
        memcpy(header, l->room, before);
        pieces_copy(pieces, in->pieces, NET_HEADER, l->room + NET_HEADER, length < fits ? length : fits, true);
    }
    return got;
}

/* Read a frame straight into the chains. -> as readv */
static ssize_t read_pieces(struct lane *l, const struct intake *in, struct net_header *header)
{
    /* [header][chains without the room for their header][tail]; the first chain may keep its header's
     * room over several pieces */
    struct piece saved[NET_HEADER];
    struct piece *pieces = l->pieces + 1;
    uint32_t first = 0, skip = NET_HEADER;
    while (first < in->pieces && pieces[first].len <= skip) {
        saved[first] = pieces[first];
        skip -= (uint32_t)pieces[first++].len;
    }
    if (skip) {
        saved[first] = pieces[first];
        pieces[first].base += skip;
        pieces[first].len -= skip;
    }
    struct piece *from = pieces + first;
    struct piece before = {0};
    if (l->config.port_header) {
        from--;
        before = *from;
        *from = (struct piece){(uint8_t *)header, NET_HEADER};
    }
    pieces[in->pieces] = (struct piece){l->room + NET_HEADER, FRAME_ROOM};
    ssize_t got = readv(l->config.from_port, (const struct iovec *)from, (int)(pieces + in->pieces + 1 - from));
    if (l->config.port_header)
        *from = before;
    for (uint32_t i = 0; i < first + (skip ? 1 : 0); i++)
        pieces[i] = saved[i];
    return got;
}

/* Read one frame from the port and deliver it. */
static enum received receive_frame(struct lane *l, struct vq *q)
{
    struct flow_stats *stats = &l->stats.to_guest;
    struct net_header header = {0};
    struct intake in = {0};
    int status = take_chains(l, q, &in, l->expect);

    if (q->broken)
        return STOP;
    if (in.chains == 0)
        return short_of(status);

    bool staged = l->expect == SMALL_FRAME;
    struct piece *pieces = l->pieces + 1;
    ssize_t got = staged ? read_staged(l, &in, &header) : read_pieces(l, &in, &header);
    int error = errno;
    if (got > (ssize_t)l->config.port_header) /* whatever becomes of the frame */
        wrote_pieces(q, pieces, in.pieces, NET_HEADER, (uint64_t)got - l->config.port_header);

    if (got < (ssize_t)(l->config.port_header + ETHERNET_HEADER)) {
        give_back(q, &in);
        if (got < 0 && (error == EAGAIN || error == EINTR))
            return IDLE;
        if (got < 0 && error == EFAULT) {
            l->memory_gone = true;
            return STOP;
        }
        if (got == 0 || (got < 0 && port_is_dead(error))) {
            port_lost(l);
            return IDLE;
        }
        if (got < 0)
            return IDLE;
        return count_drop(stats, DROP_BAD_LENGTH), RECEIVED;
    }
    uint64_t length = (uint64_t)got - l->config.port_header;
    uint64_t room_used = length > in.capacity - NET_HEADER ? length - (in.capacity - NET_HEADER) : 0;
    if (header_to_guest(&header, l->config.features)) {
        give_back(q, &in);
        return count_drop(stats, DROP_OFFLOAD), RECEIVED;
    }
    if (length > l->config.max_frame || above_mtu(l, &header, pieces, in.pieces + 1, length)) {
        give_back(q, &in);
        return count_drop(stats, DROP_BAD_LENGTH), RECEIVED;
    }
    if (likely(room_used == 0)) {
        complete(l, q, &in, &header, length);
        return RECEIVED;
    }
    /* Longer than expected: gather the frame in the room and place it as if it had been held. */
    if (!staged) {
        memmove(l->room + NET_HEADER + (length - room_used), l->room + NET_HEADER, room_used);
        pieces_copy(pieces, in.pieces, NET_HEADER, l->room + NET_HEADER, length - room_used, false);
    }
    give_back(q, &in);
    l->expect = LARGE_FRAME;
    return place_from_room(l, q, &header, (uint32_t)length);
}

/* -> what ended the burst; RECEIVED: its budget. */
static enum received burst_to_guest(struct lane *l, struct vq *q)
{
    uint64_t until = l->stats.to_guest.bytes + BURST_BYTES;

    for (int i = 0; i < BURST_FRAMES && l->stats.to_guest.bytes < until; i++) {
        enum received r;
        if (unlikely(l->held))
            r = place_held(l, q);
        else
            r = l->port_gone ? IDLE : receive_frame(l, q);
        if (r != RECEIVED)
            return r;
    }
    return RECEIVED;
}

static void to_guest(struct lane *l)
{
    const struct flow_config *flow = &l->config.to_guest;
    struct vq *q = flow->queue;

    RING(disarm)(q);
    l->starved = false;
    for (int i = 0; i < BURSTS; i++) {
        enum received end = burst_to_guest(l, q);
        if (l->memory_gone)
            return;
        publish(l, q, flow, &l->stats.to_guest);
        if (end == STARVED) {
            /* Ask for a kick; what the driver has posted since is seen now, or it kicks. */
            if (!come_to_rest(l, q, WORK_TO_GUEST))
                continue;
            l->starved = !q->broken;
        }
        if (end == WAITING)
            lane_wait(l, WORK_TO_GUEST);
        if (end == RECEIVED)
            continue;
        l->work &= ~(uint32_t)WORK_TO_GUEST;
        if (q->broken)
            break_queue(l, flow, LANE_TO_GUEST_BROKEN);
        return;
    }
}
