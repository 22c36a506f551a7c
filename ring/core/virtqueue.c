/* Making, moving and asking a virtqueue: what is done once, outside the data path. */
#include <stdlib.h>

#include "internal.h"

#define INDIRECT_MIN 1024 /* some drivers use tables longer than their queue; up to the pieces' limit */

/* virtio 1.2, 2.7: sizes of the three parts, in bytes, event fields included */
static uint64_t desc_bytes(uint32_t size) { return sizeof(struct vring_desc) * (uint64_t)size; }
static uint64_t avail_bytes(uint32_t size) { return sizeof(struct vring_avail) + 2 * (uint64_t)size + 2; }
static uint64_t used_bytes(uint32_t size)
{
    return sizeof(struct vring_used) + sizeof(struct vring_used_elem) * (uint64_t)size + 2;
}

struct parts {
    struct vring_desc *desc;
    struct vring_avail *avail;
    struct vring_used *used;
};

static int resolve(const struct guestmem *mem, const struct vq_config *c, struct parts *out)
{
    if (c->size == 0 || c->size > RING_QUEUE_SIZE_MAX || (c->size & (c->size - 1)))
        return RING_E_QUEUE_SIZE;
    if (c->desc % 16 || c->avail % 2 || c->used % 4)
        return RING_E_RING_ALIGNMENT;
    uint8_t *desc = guestmem_uva(mem, c->desc, desc_bytes(c->size));
    uint8_t *avail = guestmem_uva(mem, c->avail, avail_bytes(c->size));
    uint8_t *used = guestmem_uva(mem, c->used, used_bytes(c->size));
    if (!desc || !avail || !used)
        return RING_E_RING_UNMAPPED;
    /* a region may start at any offset of its file: what we dereference must be aligned as well */
    if ((uintptr_t)desc % 8 || (uintptr_t)avail % 2 || (uintptr_t)used % 4)
        return RING_E_RING_ALIGNMENT;
    *out = (struct parts){(void *)desc, (void *)avail, (void *)used};
    return RING_OK;
}

static void adopt(struct vq *q, const struct guestmem *mem, const struct parts *parts)
{
    q->mem = mem;
    q->desc = parts->desc;
    q->avail = parts->avail;
    q->used = parts->used;
    q->region_hint = 0;
}

struct vq *vq_new(const struct guestmem *mem, const struct vq_config *config, int *status)
{
    struct parts parts;
    struct vq *q;

    *status = resolve(mem, config, &parts);
    if (*status != RING_OK)
        return NULL;
    *status = RING_E_NOMEM;
    q = calloc(1, sizeof(*q));
    if (!q)
        return NULL;
    q->table_limit = config->size > INDIRECT_MIN ? config->size : INDIRECT_MIN;
    q->table = malloc(q->table_limit * sizeof(*q->table));
    if (!q->table)
        goto refuse;
    adopt(q, mem, &parts);
    q->config = *config;
    q->size = config->size;
    q->mask = (uint16_t)(config->size - 1);
    q->indirect = config->features >> FEATURE_INDIRECT_DESC & 1;
    q->event_idx = config->features >> FEATURE_EVENT_IDX & 1;
    q->first_decision = true;
    q->kicks_wanted = true; /* a fresh used ring is zero: the driver kicks */
    q->next_avail = q->avail_seen = (uint16_t)config->base;
    *status = RING_E_MEMORY_GONE;
    if (guard_enter())
        goto refuse;
    /* The only time used.idx is read: a predecessor that died may have published more than the front-end
     * knows of. Afterwards it is ours alone. */
    q->next_used = q->published = q->decided = load16(&q->used->idx);
    guard_leave();
    *status = RING_OK;
    return q;
refuse:
    vq_free(q);
    return NULL;
}

void vq_free(struct vq *q)
{
    if (q)
        free(q->table);
    free(q);
}

int vq_move(struct vq *q, const struct guestmem *mem)
{
    struct parts parts;
    int status = resolve(mem, &q->config, &parts);

    if (status == RING_OK)
        adopt(q, mem, &parts);
    return status;
}

void vq_fail(struct vq *q, int status)
{
    vq_break(q, status, 0);
}

void vq_state(const struct vq *q, struct vq_state *out)
{
    *out = (struct vq_state){
        .size = q->size,
        .next_avail = q->next_avail,
        .avail_seen = q->avail_seen,
        .next_used = q->next_used,
        .published = q->published,
        .kicks_wanted = q->kicks_wanted,
        .broken = q->broken,
        .broken_at = q->broken_at,
    };
}

uint32_t vq_base(const struct vq *q)
{
    return q->next_avail;
}

int call_is_due(int reason)
{
    return reason == CALL_FLAG_WANTS || reason == CALL_EVENT_REACHED || reason == CALL_FIRST;
}

const char *ring_sources_digest(void)
{
#ifdef RING_SOURCES_DIGEST
    return RING_SOURCES_DIGEST;
#else
    return "";
#endif
}
