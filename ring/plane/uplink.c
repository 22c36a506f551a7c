/* An uplink of a switch: a descriptor, as of a TAP, in the place of a guest.
 *
 * Its lane has no queues. What it reads goes to private room, is routed as a guest's frames are, and forwarded from
 * there. What goes to it is written by the sender's worker, straight from the sender's buffers; the kernel takes
 * several writers at once, so its counters are atomic, and an address that vanished is an answer (EFAULT).
 */
#include "batch.h"
#include "flow.h"

static void add(uint64_t *counter, uint64_t n)
{
    __atomic_fetch_add(counter, n, __ATOMIC_RELAXED);
}

/* -> the reason for which this frame did not leave, or -1; -2: the sender's memory vanished */
static int write_frame(struct lane *l, struct frame *f)
{
    uint32_t header = l->config.port_header;
    const struct piece *from = f->pieces;
    uint32_t count = f->count;

    if (header) {
        f->pieces[-1] = (struct piece){f->head, NET_HEADER};
        from--;
        count++;
    } else {
        struct net_header mine = f->header;
        if (header_to_guest(&mine, 0)) /* a port without a header is told of no offload */
            return DROP_OFFLOAD;
    }
    ssize_t written = writev(l->config.to_port, (const struct iovec *)from, (int)count);
    if (likely(written == (ssize_t)(f->length + header)))
        return -1;
    if (written < 0 && errno == EFAULT)
        return -2;
    if (written < 0 && errno == EAGAIN)
        return DROP_NO_BUFFERS;
    if (written < 0 && port_is_dead(errno)) {
        lane_event(l, LANE_PORT_GONE);
        return DROP_NO_PORT;
    }
    return DROP_PORT;
}

bool uplink_write(struct lane *l, struct batch *b, uint64_t frames)
{
    struct flow_stats *stats = &l->stats.to_guest;

    add(&stats->bursts, 1);
    for (; frames; frames &= frames - 1) {
        struct frame *f = &b->frames[__builtin_ctzll(frames)];
        int lost = write_frame(l, f);
        if (lost == -2)
            return false;
        if (lost >= 0) {
            add(&stats->dropped[lost], 1);
            continue;
        }
        add(&stats->frames, 1);
        add(&stats->bytes, f->length);
        add(&stats->gso_frames, f->header.gso_type != 0);
    }
    lane_report(l);
    return true;
}

/* -> false: there is nothing more to be read */
static bool read_frame(struct lane *l, struct batch *b, uint32_t *used)
{
    struct flow_stats *stats = &l->stats.from_guest;
    struct frame *f = &b->frames[b->count];
    uint32_t header = l->config.port_header;
    uint8_t *at = b->room + *used;

    f->header = (struct net_header){0};
    struct iovec into[2] = {{&f->header, header}, {at, FRAME_ROOM}};
    ssize_t got = readv(l->config.from_port, into, 2);
    if (got < (ssize_t)(header + ETHERNET_HEADER)) {
        if (got == 0 || (got < 0 && port_is_dead(errno)))
            port_lost(l);
        if (got <= 0)
            return false;
        return count_drop(stats, DROP_BAD_LENGTH), true;
    }
    f->length = (uint32_t)got - header;
    f->pieces = b->pool + b->used + 1;
    f->pieces[0] = (struct piece){at, f->length};
    f->count = 1;
    memcpy(f->ethernet, at, ETHERNET_HEADER);
    int dropped = fabric_route(l->config.member, b, b->count);
    if (dropped)
        return count_drop(stats, (enum drop_reason)dropped), true;
    stats->frames++;
    stats->bytes += f->length;
    stats->gso_frames += f->header.gso_type != 0;
    b->used += 2;
    b->count++;
    *used += f->length;
    return true;
}

void uplink_read(struct lane *l)
{
    struct batch *b = l->batch;

    for (int i = 0; i < BURSTS; i++) {
        uint32_t used = 0;
        bool more = true;

        l->stats.from_guest.bursts++;
        fabric_begin(b);
        for (int tried = 0; more && tried < BURST_FRAMES && used <= UPLINK_ROOM - FRAME_ROOM; tried++)
            more = read_frame(l, b, &used);
        fabric_deliver(l); /* from private memory, which does not vanish */
        if (!more) {
            l->work &= ~(uint32_t)WORK_TO_GUEST;
            return;
        }
    }
}
