/* A guest in the same process: memory on the heap, each ring part in a block of exactly its size.
 *
 * So AddressSanitizer sees the first byte too many, in either direction, of every access to the descriptor table,
 * either ring, a buffer or an indirect table. gpa and uva are the same here; regions are pages apart.
 */
#pragma once

#include "check.h"
#include "../../ring/core/internal.h"

#define REGIONS_MAX 16
#define INDIRECT (1ull << FEATURE_INDIRECT_DESC)
#define EVENT_IDX (1ull << FEATURE_EVENT_IDX)

struct guest {
    struct guest_region regions[REGIONS_MAX];
    uint32_t count;
    int32_t gone;
    struct guestmem *mem;

    struct vq_config config;
    struct vring_desc *desc;
    struct vring_avail *avail;
    struct vring_used *used;
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

/* Make the ring parts. */
static inline void guest_init(struct guest *g, uint32_t size, uint64_t features, uint16_t base)
{
    *g = (struct guest){.config = {.size = size, .features = features, .base = base}};
    g->config.desc = guest_block(g, sizeof(struct vring_desc) * size, &g->desc);
    g->config.avail = guest_block(g, 6 + 2 * (size_t)size, &g->avail);
    g->config.used = guest_block(g, 6 + 8 * (size_t)size, &g->used);
    g->avail->idx = g->used->idx = base;
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

static inline void guest_offer(struct guest *g, uint16_t head)
{
    uint16_t idx = g->avail->idx;

    g->avail->ring[idx & (g->config.size - 1)] = head;
    __atomic_store_n(&g->avail->idx, (uint16_t)(idx + 1), __ATOMIC_RELEASE);
}

/* xorshift64*: the same numbers on every machine. */
static inline uint64_t next_random(uint64_t *state)
{
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * 0x2545F4914F6CDD1Dull;
}
