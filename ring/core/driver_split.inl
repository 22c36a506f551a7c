/* The split ring, driver side (virtio 1.2, 2.7 "Split Virtqueues"). Part of driver_ring.inl.
 *
 * Ordering (2.7.13, 2.7.14). Four accesses pair with the device's:
 *     split_publish      store-release avail.idx    device: load-acquire avail.idx (split_see)
 *     split_kick_is_due  full barrier, then flags   device: store flags/avail_event, full barrier, look again
 *                        or avail_event             (split_arm)
 *     split_pending      load-acquire used.idx      device: store-release used.idx (split_publish)
 *     split_want_calls   store used_event, full     device: store used.idx, full barrier, load used_event
 *                        barrier, look again        (split_decide)
 */
#pragma once

static uint16_t *used_event(struct driver *d) { return &d->avail->ring[d->config.size]; }
static uint16_t *avail_event(struct driver *d) { return (uint16_t *)&d->used->ring[d->config.size]; }

/* Was index `event` passed when an index moved from `old` to `new`? (2.7.10) */
static bool passed(uint16_t event, uint16_t new, uint16_t old)
{
    return (uint16_t)(new - event - 1) < (uint16_t)(new - old);
}

/* -> the head */
static uint32_t split_offer(struct driver *d, uint32_t slot)
{
    const struct driver_config *c = &d->config;
    /* Each slot has descriptors of its own; in order they are taken round the table (2.7.5). */
    uint32_t head = d->in_order ? d->next_desc : slot * d->per_slot;
    uint32_t first = c->indirect ? 0 : head, size = c->indirect ? c->pieces : c->size;
    struct vring_desc *to = c->indirect ? (void *)table(d, slot) : d->desc;

    for (uint32_t i = 0; i < c->pieces; i++) {
        struct part part = part_of(d, slot, i);
        to[(first + i) % size] = (struct vring_desc){
            .addr = part.gpa,
            .len = part.len,
            .flags = part.flags,
            .next = (uint16_t)(part.flags & DESC_F_NEXT ? (first + i + 1) % size : 0),
        };
    }
    if (c->indirect)
        d->desc[head] = (struct vring_desc){
            .addr = table_gpa(d, slot), .len = (uint32_t)table_bytes(c), .flags = DESC_F_INDIRECT};
    d->next_desc = (uint16_t)((head + d->per_slot) % c->size);
    /* Relaxed: the release store of idx orders it. */
    store16(&d->avail->ring[d->next_avail & (c->size - 1)], (uint16_t)head);
    d->next_avail++;
    return head;
}

static void split_publish(struct driver *d)
{
    /* Release: descriptors, entries and buffer contents before idx (2.7.13.3). */
    store16_release(&d->avail->idx, d->next_avail);
    d->published = d->next_avail;
}

static bool split_kick_is_due(struct driver *d)
{
    uint16_t before = d->kick_decided;

    d->kick_decided = d->published;
    /* Full: idx visible before the device's wish is read (2.7.13.4). The device does the mirror image. */
    full_barrier();
    if (d->event_idx)
        return passed(load16(avail_event(d)), d->published, before);
    return d->published != before && !(load16(&d->used->flags) & USED_F_NO_NOTIFY);
}

static int split_pending(struct driver *d)
{
    /* Acquire: elements and buffer contents are read after idx that covers them (2.7.14). */
    uint16_t n = (uint16_t)(load16_acquire(&d->used->idx) - d->next_used);

    if (n > d->config.size) {
        error(d, DRIVER_E_AHEAD);
        return -1;
    }
    return n;
}

static int split_want_calls(struct driver *d, uint16_t more)
{
    if (d->event_idx)
        store16(used_event(d), (uint16_t)(d->next_used + more - 1));
    else
        store16(&d->avail->flags, 0);
    /* Full: the wish before the look (2.7.14). */
    full_barrier();
    return split_pending(d);
}

/* With EVENT_IDX the event left behind is the refusal; flags must stay 0 there (2.7.7.1). */
static void split_refuse_calls(struct driver *d)
{
    if (!d->event_idx)
        store16(&d->avail->flags, AVAIL_F_NO_INTERRUPT);
}

/* Read the next used element; one is pending. -> the slot it names, or -1. */
static int64_t split_read_used(struct driver *d)
{
    /* Relaxed: ordered after the acquire load of idx. */
    struct vring_used_elem *e = &d->used->ring[d->next_used & (d->config.size - 1)];
    int64_t slot = find_slot(d, load32(&e->id));

    d->batch_written = load32(&e->len);
    if (slot >= 0 && (int)batch_of(d, (uint32_t)slot, d->first_slot) > split_pending(d)) {
        error(d, DRIVER_E_AHEAD); /* the batch goes on beyond used.idx */
        return -1;
    }
    return slot;
}
