/*
 * What walking a chain has in common in both ring formats: taking a buffer over, and entering an indirect
 * table. Included by split.inl and packed.inl.
 */
#pragma once

#include "internal.h"

/* Where one buffer lies, which is seldom asked: not all of it in the region of the last hit. -> as guestmem_translate */
OUTLINED int walk_translate(struct vq *q, uint64_t gpa, uint32_t len, bool writable, struct piece *out, uint32_t max)
{
    if (q->config.iotlb)
        return iotlb_translate(q, gpa, len, writable, out, max);
    return guestmem_translate(q->mem, &q->region_hint, gpa, len, out, max);
}

/* Take one buffer of the chain over: its order, its place, its length. -> RING_OK or the rule broken. */
INLINED int walk_buffer(struct vq *q, struct walk *w, struct chain *c, uint64_t gpa, uint32_t len, bool writable,
                        struct piece *pieces, uint32_t max)
{
    if (writable)
        w->writable_seen = true;
    else if (unlikely(w->writable_seen))
        return RING_E_ORDER;
    if (unlikely(len == 0)) /* the address of an empty buffer means nothing */
        return RING_OK;
    uint32_t used = c->readable + c->writable;
    int n = 1;
    if (unlikely(q->config.iotlb || used >= max || !guestmem_run(q->mem, q->region_hint, gpa, len, pieces + used))) {
        n = walk_translate(q, gpa, len, writable, pieces + used, max - used);
        if (n < 0)
            return n;
    }
    if (writable) {
        c->writable += (uint32_t)n;
        c->writable_len += len;
    } else {
        c->readable += (uint32_t)n;
        c->readable_len += len;
    }
    return unlikely(c->writable_len + c->readable_len > UINT32_MAX) ? RING_E_LENGTH : RING_OK;
}

/* Copy a whole indirect table into private memory, so that it cannot change while it is walked, and go on
 * there. It may lie at any address and cross regions, even inside one descriptor.
 * -> RING_MORE, RING_E_INDIRECT_LENGTH, or as a buffer's translation. */
static inline int walk_enter(struct vq *q, struct walk *w, uint64_t gpa, uint32_t len)
{
    uint32_t entries = len / (uint32_t)sizeof(struct vring_desc);
    uint8_t *to = (uint8_t *)q->table;
    uint64_t left = len;

    if (unlikely(entries == 0 || len % sizeof(struct vring_desc) || entries > q->table_limit))
        return RING_E_INDIRECT_LENGTH;
    if (unlikely(q->config.iotlb)) {
        int status = iotlb_copy(q, gpa, to, left);
        if (status != RING_OK)
            return status;
        left = 0;
    }
    while (left > 0) {
        const struct guest_region *r = guestmem_find(q->mem, gpa, &q->region_hint);
        if (unlikely(!r))
            return RING_E_UNMAPPED;
        uint64_t part = r->size - (gpa - r->gpa);
        if (part > left)
            part = left;
        memcpy(to, r->hva + (gpa - r->gpa), part);
        to += part;
        gpa += part;
        left -= part;
    }
    w->indirect = true;
    w->next = 0;
    w->entries = w->steps_left = entries;
    return RING_MORE;
}
