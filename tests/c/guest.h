/* A guest in the same process: memory on the heap, each ring part in a block of exactly its size.
 *
 * So AddressSanitizer sees the first byte too many, in either direction, of every access to a ring part, a buffer
 * or an indirect table; and ThreadSanitizer, which watches addresses, sees both halves of a ring use the same
 * ones. gpa and uva are the same here; regions are pages apart.
 */
#pragma once

#include "check.h"
#include "../../ring/core/internal.h"

#define REGIONS_MAX 16
#define MRG_RXBUF (1ull << 15)
#define INDIRECT (1ull << FEATURE_INDIRECT_DESC)
#define EVENT_IDX (1ull << FEATURE_EVENT_IDX)
#define PACKED (1ull << FEATURE_RING_PACKED)
#define IN_ORDER (1ull << FEATURE_IN_ORDER)

/* Make TESTs of a function that takes a ring's features, one a format, or each of them in order too. */
#define EACH_FORMAT(name)             \
    TEST(name##_split) { name(0); }   \
    TEST(name##_packed) { name(PACKED); }
#define EACH_RING(name)                             \
    EACH_FORMAT(name)                               \
    TEST(name##_split_in_order) { name(IN_ORDER); } \
    TEST(name##_packed_in_order) { name(PACKED | IN_ORDER); }

struct guest {
    struct guest_region regions[REGIONS_MAX];
    uint32_t count;
    int32_t gone;
    struct guestmem *mem;

    struct vq_config config;
    bool is_packed;
    union { /* split | packed */
        struct vring_desc *desc;
        struct packed_desc *packed;
    };
    union {
        struct vring_avail *avail;
        struct packed_event *driver_event;
    };
    union {
        struct vring_used *used;
        struct packed_event *device_event;
    };
    uint32_t next; /* descriptor to fill next, in the packed format with... */
    bool wrap;     /* ...this wrap counter */
    struct vq *q;
};

/* A region of `size` bytes of its own. -> its gpa; *at is where it lies. Before guest_start. */
static inline uint64_t guest_block(struct guest *g, size_t size, void *at)
{
    struct guest_region *r = &g->regions[g->count];

    CHECK(g->count < REGIONS_MAX);
    r->gpa = r->uva = 0x10000000ull * ++g->count;
    r->size = size;
    r->hva = calloc(1, size);
    CHECK(r->hva);
    *(void **)at = r->hva;
    return r->gpa;
}

/* The base of a packed ring that starts at this slot, with nothing in flight. */
static inline uint32_t packed_base(uint32_t slot, bool wrap)
{
    return (slot | (wrap ? 0x8000u : 0)) * 0x10001u;
}

/* Make the ring parts. */
static inline void guest_init(struct guest *g, uint32_t size, uint64_t features, uint32_t base)
{
    *g = (struct guest){.config = {.size = size, .features = features, .base = base}, .is_packed = features & PACKED};
    g->config.desc = guest_block(g, sizeof(struct vring_desc) * size, &g->desc);
    if (g->is_packed) {
        g->config.avail = guest_block(g, sizeof(*g->driver_event), &g->driver_event);
        g->config.used = guest_block(g, sizeof(*g->device_event), &g->device_event);
        g->next = base & 0x7fff;
        g->wrap = base & 0x8000;
    } else {
        g->config.avail = guest_block(g, 6 + 2 * (size_t)size, &g->avail);
        g->config.used = guest_block(g, 6 + 8 * (size_t)size, &g->used);
        g->avail->idx = g->used->idx = (uint16_t)base;
    }
}

/* Let the device in. */
static inline void guest_start(struct guest *g)
{
    int status;

    CHECK_EQ(guard_install(), RING_OK);
    g->mem = guestmem_new(g->regions, g->count, &g->gone, &status);
    CHECK(g->mem);
    g->q = vq_new(g->mem, &g->config, &status);
    CHECK(g->q);
}

static inline void guest_end(struct guest *g)
{
    vq_free(g->q);
    guestmem_free(g->mem);
    for (uint32_t i = 0; i < g->count; i++)
        free(g->regions[i].hva);
}

/* Make the chain available that begins at this descriptor of a split ring's table. */
static inline void guest_offer(struct guest *g, uint16_t head)
{
    uint16_t idx = g->avail->idx;

    g->avail->ring[idx & (g->config.size - 1)] = head;
    store16_release(&g->avail->idx, (uint16_t)(idx + 1));
}

/* Make one descriptor of a packed ring available, whatever its flags. */
static inline void guest_put(struct guest *g, struct packed_desc d)
{
    struct packed_desc *to = &g->packed[g->next];
    uint16_t flags = d.flags | (g->wrap ? PACKED_F_AVAIL : PACKED_F_USED);

    to->addr = d.addr;
    to->len = d.len;
    to->id = d.id;
    store16_release(&to->flags, flags);
    if (++g->next == g->config.size) {
        g->next = 0;
        g->wrap = !g->wrap;
    }
}

/* Make a chain of these buffers available, in the next descriptors: of `flags` WRITE and INDIRECT matter. */
static inline void guest_chain(struct guest *g, const struct vring_desc *buffers, uint32_t count)
{
    uint16_t head = (uint16_t)g->next;

    for (uint32_t i = 0; i < count; i++) {
        uint16_t flags = (uint16_t)(buffers[i].flags | (i + 1 < count ? DESC_F_NEXT : 0));
        if (g->is_packed) {
            guest_put(g, (struct packed_desc){buffers[i].addr, buffers[i].len, head, flags});
        } else {
            uint32_t at = g->next;
            g->next = (at + 1) % g->config.size;
            g->desc[at] = (struct vring_desc){buffers[i].addr, buffers[i].len, flags, (uint16_t)g->next};
        }
    }
    if (!g->is_packed)
        guest_offer(g, head);
}

/* Write an indirect table of these buffers, which may lie at any address. */
static inline void guest_table(const struct guest *g, uint8_t *to, const struct vring_desc *buffers, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        struct vring_desc d = buffers[i];
        if (!g->is_packed && i + 1 < count) {
            d.flags |= DESC_F_NEXT;
            d.next = (uint16_t)(i + 1);
        }
        if (g->is_packed)
            d = (struct vring_desc){d.addr, d.len, 0, d.flags}; /* id, then flags */
        memcpy(to + i * sizeof(d), &d, sizeof(d));
    }
}

/* xorshift64*: the same numbers on every machine. */
static inline uint64_t next_random(uint64_t *state)
{
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * 0x2545F4914F6CDD1Dull;
}
