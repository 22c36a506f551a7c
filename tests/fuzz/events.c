/* When the driver is to be called and when it kicks: the device's arithmetic of 16 bits, or of slots and wrap counters,
 * against a model that counts with numbers that never wrap and looks at positions one by one.
 *
 * An input: features, size and base, then moves until it ends. A move is the driver's (the event fields, what is
 * available) or one verb of the device, with an argument of one byte.
 */
#include "fuzz.h"

#define MOVES 64

struct model {
    struct guest g;
    bool event_idx;
    uint64_t taken, known, used, published, decided;
    bool decided_once, kicks_wanted;
};

/* ------------------------------------------------------------------------------------------------- driver */

static uint16_t *used_event(struct guest *g) { return &g->avail->ring[g->config.size]; }
static uint16_t avail_event(const struct guest *g) { return *(const uint16_t *)&g->used->ring[g->config.size]; }

/* An event about the positions that were just used, or anything. */
static void set_event(struct model *m, struct input *in)
{
    uint8_t n = input8(in);
    uint16_t event = n < 128 ? field_at(&m->g, m->published + n - 64) : input16(in);

    if (m->g.is_packed)
        m->g.driver_event->off_wrap = event;
    else
        *used_event(&m->g) = event;
}

static void set_flags(struct model *m, struct input *in)
{
    uint16_t flags = input8(in);

    if (m->g.is_packed)
        m->g.driver_event->flags = flags;
    else
        m->g.avail->flags = flags;
}

/* Chains of one empty buffer each. */
static void make_available(struct model *m, struct input *in)
{
    uint8_t n = input8(in);

    if (m->g.is_packed) {
        struct packed_desc *d = &m->g.packed[slot_at(&m->g, m->taken + (n >> 2))];
        memset(d, 0, sizeof(*d));
        d->flags = (uint16_t)((n & 1 ? PACKED_F_AVAIL : 0) | (n & 2 ? PACKED_F_USED : 0));
    } else {
        m->g.avail->idx = (uint16_t)(m->taken + (n < 255 ? n : input16(in)));
    }
}

/* ------------------------------------------------------------------------------------------------- device */

/* How many chains a device at this position finds: of a packed ring no more than 1; -1: it makes no sense. */
static int waiting(const struct model *m, uint64_t at)
{
    if (m->g.is_packed) { /* 2.8.1 */
        uint16_t flags = m->g.packed[slot_at(&m->g, at)].flags;
        return !!(flags & PACKED_F_AVAIL) == wrap_at(&m->g, at) && !!(flags & PACKED_F_USED) != wrap_at(&m->g, at);
    }
    uint16_t ahead = (uint16_t)(m->g.avail->idx - m->taken);
    return ahead > m->g.config.size ? -1 : (int)(m->taken + ahead - at);
}

/* The ring stops where its index makes no sense. -> whether it goes on */
static bool goes_on(const struct model *m, int status)
{
    struct chain c;
    struct vq *q = m->g.q;

    if (m->g.is_packed || waiting(m, m->taken) >= 0)
        return true;
    CHECK_EQ(status, RING_E_AVAIL_AHEAD);
    CHECK_EQ(vq_pop(q, &c, NULL, 0), RING_E_AVAIL_AHEAD);
    CHECK_EQ(vq_publish(q), RING_E_AVAIL_AHEAD);
    CHECK_EQ(vq_decide(q), RING_E_AVAIL_AHEAD);
    return false;
}

static bool see(struct model *m)
{
    int seen = vq_see(m->g.q), n = waiting(m, m->taken);

    if (!goes_on(m, seen))
        return false;
    CHECK_EQ(seen, n);
    if (!m->g.is_packed || n == 0)
        m->known = m->taken + (uint64_t)n;
    return true;
}

static bool pop(struct model *m)
{
    struct chain c;
    bool looks = m->g.is_packed || m->taken == m->known;
    int status = vq_pop(m->g.q, &c, NULL, 0);

    if (looks) {
        if (!goes_on(m, status))
            return false;
        int n = waiting(m, m->taken);
        if (!m->g.is_packed || n == 0)
            m->known = m->taken + (uint64_t)n;
        CHECK_EQ(status, n ? RING_OK : RING_EMPTY);
    } else {
        CHECK_EQ(status, RING_OK);
    }
    m->taken += status == RING_OK;
    return true;
}

/* A device asks for a kick once it has taken all it knows of; on a packed ring it knows where nothing was. */
static bool arm(struct model *m)
{
    int more = vq_arm(m->g.q), n = waiting(m, m->known);
    uint16_t field = field_at(&m->g, m->known);

    m->kicks_wanted = true;
    if (m->g.is_packed && m->event_idx)
        CHECK_EQ(m->g.device_event->both, field | (uint32_t)PACKED_EVENT_DESC << 16);
    else if (m->g.is_packed)
        CHECK_EQ(m->g.device_event->flags, PACKED_EVENT_ENABLE);
    else if (m->event_idx)
        CHECK_EQ(avail_event(&m->g), field);
    else
        CHECK_EQ(m->g.used->flags, 0);
    if (!goes_on(m, more))
        return false;
    CHECK_EQ(more, m->g.is_packed ? n : (uint16_t)n);
    if (!m->g.is_packed)
        m->known += (uint64_t)(int64_t)n;
    return true;
}

static void disarm(struct model *m)
{
    CHECK_EQ(vq_disarm(m->g.q), RING_OK);
    if (!m->event_idx && m->kicks_wanted)
        CHECK_EQ(m->g.is_packed ? m->g.device_event->flags : m->g.used->flags,
                 m->g.is_packed ? PACKED_EVENT_DISABLE : USED_F_NO_NOTIFY);
    m->kicks_wanted = false;
}

/* Use so many entries, as one batch. No device uses more than a ring before it tells, nor 65536 before it decides. */
static void push(struct model *m, struct input *in)
{
    uint8_t n = input8(in);
    uint32_t slots = 1 + (n < 128 ? n : (n - 127u) * 256), size = m->g.config.size;
    uint64_t used = m->used + slots;

    if (used - m->published > size || used - m->decided > UINT16_MAX)
        return;
    CHECK_EQ(vq_push_batch(m->g.q, 0, slots, slots), RING_OK);
    m->used = used;
}

static void publish(struct model *m)
{
    uint64_t first = m->published;

    CHECK_EQ(vq_publish(m->g.q), RING_OK);
    m->published = m->used;
    if (!m->g.is_packed)
        CHECK_EQ(m->g.used->idx, (uint16_t)m->used);
    else if (m->used > first)
        CHECK_EQ(m->g.packed[slot_at(&m->g, first)].flags, wrap_at(&m->g, first) ? PACKED_F_AVAIL | PACKED_F_USED : 0);
}

/* Was the position that the driver named among those used since the last decision? (2.7.7.2, 2.8.10) */
static bool is_reached(struct model *m)
{
    uint16_t event = m->g.is_packed ? m->g.driver_event->off_wrap : *used_event(&m->g);

    for (uint64_t at = m->decided; at < m->published; at++)
        if (field_at(&m->g, at) == event)
            return true;
    return false;
}

/* -> the reason the model has, or -1 where both answers are right: a call that was not needed does no harm. */
static int reason(struct model *m)
{
    bool first = !m->decided_once, packed = m->g.is_packed;

    if (m->decided == m->published)
        return CALL_NOTHING_NEW;
    m->decided_once = true;
    if (packed && (m->g.driver_event->flags & 3) == PACKED_EVENT_DISABLE)
        return CALL_FLAG_SUPPRESSED;
    if (packed && (!m->event_idx || (m->g.driver_event->flags & 3) != PACKED_EVENT_DESC))
        return CALL_FLAG_WANTS;
    if (!m->event_idx)
        return m->g.avail->flags & AVAIL_F_NO_INTERRUPT ? CALL_FLAG_SUPPRESSED : CALL_FLAG_WANTS;
    if (first)
        return CALL_FIRST;
    if (is_reached(m))
        return CALL_EVENT_REACHED;
    uint32_t size = m->g.config.size;
    if (packed && ((m->g.driver_event->off_wrap & 0x7fffu) >= size || m->published - m->decided > size))
        return -1;
    return CALL_EVENT_AHEAD;
}

static void decide(struct model *m)
{
    int wanted = reason(m), decided = vq_decide(m->g.q);

    if (wanted < 0)
        CHECK(decided == CALL_EVENT_REACHED || decided == CALL_EVENT_AHEAD);
    else
        CHECK_EQ(decided, wanted);
    m->decided = m->published;
}

static bool move(struct model *m, struct input *in)
{
    switch (input_below(in, 10)) {
    case 0: set_event(m, in); return true;
    case 1: set_flags(m, in); return true;
    case 2: make_available(m, in); return true;
    case 3: return see(m);
    case 4: return pop(m);
    case 5: return arm(m);
    case 6: disarm(m); return true;
    case 7: push(m, in); return true;
    case 8: publish(m); return true;
    default: decide(m); return true;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const uint32_t sizes[] = {1, 2, 4, 8, 64, 1024, 32768, 3, 5, 7, 100, 1023, 32767};
    struct input in = {data, data + size};
    uint8_t kind = input8(&in);
    uint64_t features = (kind & 1 ? PACKED : 0) | (kind & 2 ? EVENT_IDX : 0);
    uint32_t entries = sizes[input_below(&in, kind & 1 ? 13 : 7)];
    struct model m = {.event_idx = kind & 2, .kicks_wanted = true};

    m.taken = m.known = m.used = m.published = m.decided = input_ring(&in, &m.g, entries, features);
    guest_start(&m.g);
    for (int i = 0; i < MOVES && input_left(&in); i++)
        if (!move(&m, &in))
            break;
    guest_end(&m.g);
    return 0;
}
