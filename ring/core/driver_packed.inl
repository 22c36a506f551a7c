/* The packed ring, driver side (virtio 1.2, 2.8 "Packed Virtqueues"). Part of driver_ring.inl.
 *
 * A position is a slot of the ring and a wrap counter in one number: it counts on through two laps, in the
 * first the counter is 1. All chains take the same number of descriptors here, so the position of every used
 * descriptor is known in advance.
 *
 * Ordering (2.8.21, 2.8.22). Four accesses pair with the device's:
 *     packed_publish      store-release the flags of    device: load-acquire them (packed_see)
 *                         the first descriptor
 *     packed_kick_is_due  full barrier, then the        device: store its event structure, full barrier, look
 *                         device event structure        again (packed_arm)
 *     packed_pending      load-acquire flags            device: store-release the flags of the first used
 *                                                       descriptor (packed_publish)
 *     packed_want_calls   store the driver event        device: store used flags, full barrier, load the
 *                         structure, full barrier,      driver event structure (packed_decide)
 *                         look again
 */
#pragma once

#define PACKED_TURN (PACKED_F_AVAIL | PACKED_F_USED)

static uint32_t laps(const struct driver *d) { return 2 * d->config.size; }

static uint16_t moved(const struct driver *d, uint16_t position, uint32_t by)
{
    return (uint16_t)((position + by) % laps(d));
}

static struct packed_desc *at(const struct driver *d, uint16_t position)
{
    return &d->packed[position % d->config.size];
}

static bool wrap_counter(const struct driver *d, uint16_t position) { return position < d->config.size; }

/* AVAIL is equal to the wrap counter and USED is not (2.8.1). */
static uint16_t available_flags(const struct driver *d, uint16_t position)
{
    return wrap_counter(d, position) ? PACKED_F_AVAIL : PACKED_F_USED;
}

static uint16_t used_flags(const struct driver *d, uint16_t position)
{
    return wrap_counter(d, position) ? PACKED_TURN : 0;
}

static uint16_t off_wrap(const struct driver *d, uint16_t position)
{
    return (uint16_t)(position % d->config.size | (wrap_counter(d, position) ? 0x8000 : 0));
}

/* Both fields of an event suppression structure belong together: one access. */
static void store_event(struct packed_event *e, uint16_t off_wrap, uint16_t flags)
{
    store32(&e->both, off_wrap | (uint32_t)flags << 16);
}

static void packed_put(struct driver *d, struct part part, uint16_t id)
{
    struct packed_desc *to = at(d, d->next_avail);
    uint16_t flags = part.flags | available_flags(d, d->next_avail);

    to->addr = part.gpa;
    to->len = part.len;
    to->id = id;
    if (d->holding) {
        /* Relaxed: the release store of the first flags orders it. */
        store16(&to->flags, flags);
    } else {
        d->holding = true;
        d->held_flags = flags;
    }
    d->next_avail = moved(d, d->next_avail, 1);
}

/* -> the buffer id */
static uint32_t packed_offer(struct driver *d, uint32_t slot)
{
    const struct driver_config *c = &d->config;
    struct packed_desc *to = (void *)table(d, slot);

    for (uint32_t i = 0; i < c->pieces; i++) {
        struct part part = part_of(d, slot, i);
        if (c->indirect) /* consecutive entries, no flag but WRITE (2.8.19) */
            to[i] = (struct packed_desc){.addr = part.gpa, .len = part.len, .flags = part.flags & DESC_F_WRITE};
        else
            packed_put(d, part, (uint16_t)slot);
    }
    if (c->indirect)
        packed_put(d, (struct part){table_gpa(d, slot), (uint32_t)table_bytes(c), DESC_F_INDIRECT}, (uint16_t)slot);
    return slot;
}

static void packed_publish(struct driver *d)
{
    /* Release: everything else before the flags that open the batch (2.8.21.1). */
    store16_release(&at(d, d->published)->flags, d->held_flags);
    d->holding = false;
    d->published = d->next_avail;
}

static bool packed_kick_is_due(struct driver *d)
{
    uint32_t by = (d->published + laps(d) - d->kick_decided) % laps(d);

    d->kick_decided = d->published;
    /* Full: the flags visible before the device's wish is read (2.8.21.3.1). The device does the mirror image. */
    full_barrier();
    uint32_t wish = load32(&d->device_event->both);
    uint16_t flags = (uint16_t)(wish >> 16), slot = wish & 0x7fff;
    if (flags == PACKED_EVENT_DISABLE)
        return false;
    if (flags == PACKED_EVENT_ENABLE)
        return true;
    if (flags != PACKED_EVENT_DESC || !d->event_idx || slot >= d->config.size) {
        error(d, DRIVER_E_EVENT);
        return true;
    }
    uint32_t position = slot + (wish & 0x8000 ? 0 : d->config.size);
    uint32_t behind = (d->published + laps(d) - position) % laps(d);
    return behind >= 1 && behind <= by;
}

static int packed_pending(struct driver *d)
{
    while (d->known < d->outstanding) {
        /* Acquire: id, length and buffer contents are read after the flags that cover them (2.8.22). */
        struct packed_desc *used = at(d, d->looked);
        uint16_t turn = load16_acquire(&used->flags) & PACKED_TURN;
        uint32_t chains = 1;
        if (turn == available_flags(d, d->looked))
            break;
        if (turn != used_flags(d, d->looked)) {
            error(d, DRIVER_E_AHEAD);
            return -1;
        }
        if (d->in_order) {
            int64_t slot = find_slot(d, load16(&used->id));
            if (slot < 0)
                return -1;
            chains = batch_of(d, (uint32_t)slot, (d->first_slot + d->known) % d->slots);
            if (chains > d->outstanding - d->known) { /* it was used before */
                error(d, DRIVER_E_HEAD);
                return -1;
            }
        }
        d->known += chains;
        d->looked = moved(d, d->looked, chains * d->per_slot);
    }
    return (int)d->known;
}

static int packed_want_calls(struct driver *d, uint16_t more)
{
    /* At known + 1 what comes next is at `looked`. */
    uint32_t by = more > d->known ? (more - d->known - 1) * d->per_slot : 0;

    if (d->event_idx)
        store_event(d->driver_event, off_wrap(d, moved(d, d->looked, by)), PACKED_EVENT_DESC);
    else
        store_event(d->driver_event, 0, PACKED_EVENT_ENABLE);
    /* Full: the wish before the look (2.8.22). */
    full_barrier();
    return packed_pending(d);
}

static void packed_refuse_calls(struct driver *d)
{
    store_event(d->driver_event, 0, PACKED_EVENT_DISABLE);
}

/* Read the next used descriptor; one is pending. -> the slot of the chain it names, or -1. */
static int64_t packed_read_used(struct driver *d)
{
    /* Relaxed: ordered after the acquire load of the flags in packed_pending. */
    struct packed_desc *used = at(d, d->next_used);
    int64_t slot = find_slot(d, load16(&used->id));

    d->batch_written = load32(&used->len);
    if (slot >= 0 && (d->batch_written > 0) != !!(load16(&used->flags) & DESC_F_WRITE)) {
        error(d, DRIVER_E_LENGTH);
        return -1;
    }
    return slot;
}

static void packed_taken(struct driver *d)
{
    d->next_used = moved(d, d->next_used, d->per_slot);
    d->known--;
}
