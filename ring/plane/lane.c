/* The contract of a lane: what a caller may do with one that it has, and read of any. */
#include <stdlib.h>

#include "batch.h"
#include "coalesce.h"

struct lane *lane_new(int report)
{
    struct lane *l = calloc(1, sizeof(*l));

    if (l) {
        l->config = (struct lane_config){.from_guest = {.kick = -1, .call = -1, .err = -1},
                                         .to_guest = {.kick = -1, .call = -1, .err = -1},
                                         .to_port = -1,
                                         .from_port = -1};
        l->coalescing_from_guest.timer = l->coalescing_to_guest.timer = -1;
        l->expect = SMALL_FRAME;
        l->report = report;
    }
    return l;
}

void lane_free(struct lane *l)
{
    if (l) {
        coalesce_free(l);
        free(l->filled);
        free(l->batch);
    }
    free(l);
}

static bool call_changed(const struct flow_config *old, const struct flow_config *new)
{
    return old->queue && old->queue == new->queue && old->call != new->call;
}

int lane_configure(struct lane *l, const struct lane_config *config)
{
    if (l->attached)
        return RING_E_BUSY;
    const struct vq *q = config->to_guest.queue;
    if (q && q->size > l->filled_room) {
        struct filled *more = realloc(l->filled, q->size * sizeof(*more));
        if (!more)
            return RING_E_NOMEM;
        l->filled = more;
        l->filled_room = q->size;
    }
    if (config->member && !l->batch) {
        l->batch = calloc(1, sizeof(*l->batch) + (config->from_port < 0 ? 0 : UPLINK_ROOM));
        if (!l->batch)
            return RING_E_NOMEM;
    }
    /* A signal may have gone to the old descriptor in the meantime: the driver is called once more. */
    l->call_from_guest |= call_changed(&l->config.from_guest, &config->from_guest);
    l->call_to_guest |= call_changed(&l->config.to_guest, &config->to_guest);
    l->port_gone = l->memory_gone = false; /* may be mended; if not, the first frame tells */
    l->mac_due = true;
    l->hash_header = config->member && config->features >> NET_F_HASH_REPORT & 1 ? sizeof(struct hash_header) : 0;
    l->config = *config;
    if (l->config.max_frame > FRAME_ROOM - NET_HEADER)
        l->config.max_frame = FRAME_ROOM - NET_HEADER; /* a longer one would not fit the private buffer */
    return RING_OK;
}

void lane_stats_get(const struct lane *l, struct lane_stats *out)
{
    *out = l->stats;
}

int lane_guest_mac(struct lane *l, uint8_t *mac)
{
    int known = l->mac_known;

    memcpy(mac, l->guest_mac, sizeof(l->guest_mac));
    l->mac_known = false;
    return known;
}

uint32_t lane_events(struct lane *l)
{
    return __atomic_exchange_n(&l->events, 0, __ATOMIC_RELAXED);
}

int lane_held(const struct lane *l, uint8_t *out)
{
    if (l->attached)
        return RING_E_BUSY;
    if (!l->held)
        return 0;
    memcpy(out, &l->held_header, NET_HEADER);
    memcpy(out + NET_HEADER, l->room + NET_HEADER, l->held);
    return (int)(NET_HEADER + l->held);
}

int lane_hold(struct lane *l, const uint8_t *frame, uint32_t length)
{
    if (l->attached)
        return RING_E_BUSY;
    l->held = length - NET_HEADER;
    memcpy(&l->held_header, frame, NET_HEADER);
    memcpy(l->room + NET_HEADER, frame + NET_HEADER, l->held);
    return RING_OK;
}
