/* Making, moving and asking a virtqueue: what is done once, outside the data path. */
#include <stdlib.h>

#include "internal.h"

#define INDIRECT_MIN 1024 /* some drivers use tables longer than their queue; up to the pieces' limit */

/* Where the three parts of a ring lie and how long they are, in bytes, event fields included. */
struct extent {
    uint64_t desc, avail, used;
};

/* virtio 1.2, 2.7 and 2.8.10.1 */
static struct extent part_bytes(uint32_t size, bool packed)
{
    if (packed)
        return (struct extent){sizeof(struct packed_desc) * (uint64_t)size, sizeof(struct packed_event),
                               sizeof(struct packed_event)};
    return (struct extent){sizeof(struct vring_desc) * (uint64_t)size,
                           sizeof(struct vring_avail) + 2 * (uint64_t)size + 2,
                           sizeof(struct vring_used) + sizeof(struct vring_used_elem) * (uint64_t)size + 2};
}

void vq_parts(uint32_t size, uint64_t features, struct vq_part *out)
{
    bool packed = features >> FEATURE_RING_PACKED & 1;
    struct extent bytes = part_bytes(size, packed);

    out[0] = (struct vq_part){bytes.desc, packed ? IOTLB_READ | IOTLB_WRITE : IOTLB_READ};
    out[1] = (struct vq_part){bytes.avail, IOTLB_READ};
    out[2] = (struct vq_part){bytes.used, IOTLB_READ | IOTLB_WRITE}; /* used.idx is read at the start */
}

struct parts {
    uint8_t *desc, *avail, *used;
};

static bool is_packed(const struct vq_config *c)
{
    return c->features >> FEATURE_RING_PACKED & 1;
}

/* Where a part of the ring lies, or NULL. */
static uint8_t *part_at(const struct guestmem *mem, const struct vq_config *c, uint64_t address, uint64_t len,
                        uint32_t access)
{
    struct iotlb_fault fault;
    uint8_t *hva;

    if (!c->iotlb)
        return guestmem_uva(mem, address, len);
    return iotlb_run(c->iotlb, mem, address, len, access, &hva, &fault) == RING_OK ? hva : NULL;
}

static int resolve(const struct guestmem *mem, const struct vq_config *c, struct parts *out)
{
    bool packed = is_packed(c);

    if (c->size == 0 || c->size > RING_QUEUE_SIZE_MAX || (!packed && (c->size & (c->size - 1))))
        return RING_E_QUEUE_SIZE;
    /* 2.7, 2.8.10.1: alignment in the guest's memory */
    struct extent align = packed ? (struct extent){16, 4, 4} : (struct extent){16, 2, 4};
    if (c->desc % align.desc || c->avail % align.avail || c->used % align.used)
        return RING_E_RING_ALIGNMENT;
    struct vq_part part[3];
    vq_parts(c->size, c->features, part);
    out->desc = part_at(mem, c, c->desc, part[0].len, part[0].access);
    out->avail = part_at(mem, c, c->avail, part[1].len, part[1].access);
    out->used = part_at(mem, c, c->used, part[2].len, part[2].access);
    if (!out->desc || !out->avail || !out->used)
        return RING_E_RING_UNMAPPED;
    /* a region may start at any offset of its file: what we dereference must be aligned as well */
    if ((uintptr_t)out->desc % 8 || (uintptr_t)out->avail % align.avail || (uintptr_t)out->used % 4)
        return RING_E_RING_ALIGNMENT;
    return RING_OK;
}

/* The gpa of what lies at `hva`, which is in guest memory. */
static uint64_t gpa_of(const struct guestmem *mem, const uint8_t *hva)
{
    const struct guest_region *r = guestmem_region_at(mem, hva);

    return r->gpa + (uint64_t)(hva - r->hva);
}

static void adopt(struct vq *q, const struct guestmem *mem, const struct parts *parts)
{
    q->mem = mem;
    q->desc = (void *)parts->desc; /* or the packed parts: the same three pointers */
    q->avail = (void *)parts->avail;
    q->used = (void *)parts->used;
    q->desc_gpa = gpa_of(mem, parts->desc);
    q->used_gpa = gpa_of(mem, parts->used);
    q->region_hint = 0;
}

/* Take the position over that SET_VRING_BASE gave, and for a split ring the used index from memory, under
 * the guard. -> RING_OK, RING_E_BASE, RING_E_MEMORY_GONE */
static int start_at(struct vq *q, uint32_t base)
{
    if (q->is_packed) {
        uint32_t avail = base & 0xffff, used = base >> 16;
        /* DPDK's virtio-user sends the low half alone. No position of our own looks like that, unless both
         * are slot 0 in an odd round: rings are stopped with nothing in flight. */
        if (used == 0)
            used = avail;
        if ((avail & 0x7fff) >= q->size || (used & 0x7fff) >= q->size)
            return RING_E_BASE;
        q->next_avail = q->known = avail & 0x7fff;
        q->avail_wrap = q->known_wrap = avail >> 15;
        q->next_used = q->published = q->decided = used & 0x7fff;
        q->used_wrap = q->published_wrap = used >> 15;
        return RING_OK;
    }
    q->next_avail = q->avail_seen = (uint16_t)base;
    if (guard_enter())
        return RING_E_MEMORY_GONE;
    /* The only time used.idx is read: a predecessor that died may have published more than the front-end
     * knows of. Afterwards it is ours alone. */
    q->next_used = q->published = q->decided = load16(&q->used->idx);
    guard_leave();
    return RING_OK;
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
    q->is_packed = is_packed(config);
    q->indirect = config->features >> FEATURE_INDIRECT_DESC & 1;
    q->event_idx = config->features >> FEATURE_EVENT_IDX & 1;
    q->in_order = config->features >> FEATURE_IN_ORDER & 1;
    q->first_decision = true;
    q->kicks_wanted = true; /* fresh memory is zero: the driver kicks */
    *status = start_at(q, config->base);
    if (*status == RING_OK)
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
        .packed = q->is_packed,
        .size = q->size,
        .next_avail = q->next_avail,
        .avail_wrap = q->avail_wrap,
        .known = q->known,
        .known_wrap = q->known_wrap,
        .next_used = q->next_used,
        .used_wrap = q->used_wrap,
        .published = q->published,
        .kicks_wanted = q->kicks_wanted,
        .walk_at = q->is_packed && !q->walk.indirect ? q->next_avail : q->walk.next,
        .walk_in_table = q->walk.indirect,
        .broken = q->broken,
        .broken_at = q->broken_at,
    };
}

uint32_t vq_base(const struct vq *q)
{
    if (!q->is_packed)
        return q->next_avail;
    uint32_t avail = q->next_avail | (q->avail_wrap ? 0x8000u : 0);
    uint32_t used = q->next_used | (q->used_wrap ? 0x8000u : 0);
    return avail | used << 16;
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
