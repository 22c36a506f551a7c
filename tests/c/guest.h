/* A guest's memory for the C tests, with both halves of its queues in one mapping: ThreadSanitizer watches
 * addresses, and would see no race between two mappings of one file. Unmapped pages lie on both sides. */
#pragma once

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include "core/driver_include.h"
#include "plane/include.h"

#define GUEST_GPA 0x40000000u
#define GUEST_UVA 0x7f5000000000u
#define GUEST_BYTES (64u << 20)
#define GUEST_EDGE (1u << 20)
#define BIT(n) ((uint64_t)1 << (n))
#define RING_PACKED 34

#define MUST(condition)                                                                   \
    do {                                                                                  \
        if (!(condition)) {                                                               \
            fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition); \
            exit(1);                                                                      \
        }                                                                                 \
    } while (0)

struct guest {
    uint8_t *memory;
    uint64_t taken;
    int32_t gone;
    struct guestmem *table;
};

/* One queue: its parts, and the eventfds of its two directions. */
struct queue {
    uint64_t features;
    uint32_t size;
    uint32_t base;
    uint8_t *desc, *avail, *used;
    int kick, call;
};

static inline void guest_open(struct guest *g)
{
    int status;

    *g = (struct guest){0};
    uint8_t *all = mmap(NULL, GUEST_BYTES + 2 * GUEST_EDGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    MUST(all != MAP_FAILED);
    g->memory = all + GUEST_EDGE;
    MUST(mprotect(g->memory, GUEST_BYTES, PROT_READ | PROT_WRITE) == 0);
    struct guest_region region = {.gpa = GUEST_GPA, .uva = GUEST_UVA, .size = GUEST_BYTES, .hva = g->memory};
    g->table = guestmem_new(&region, 1, &g->gone, &status);
    MUST(g->table);
}

static inline uint8_t *guest_take(struct guest *g, uint64_t bytes)
{
    uint8_t *taken = g->memory + g->taken;

    g->taken += (bytes + 63) / 64 * 64;
    MUST(g->taken <= GUEST_BYTES);
    return taken;
}

static inline uint64_t guest_gpa(const struct guest *g, const uint8_t *at)
{
    return GUEST_GPA + (uint64_t)(at - g->memory);
}

static inline uint64_t guest_uva(const struct guest *g, const uint8_t *at)
{
    return GUEST_UVA + (uint64_t)(at - g->memory);
}

/* Parts large enough for either format, zeroed. */
static inline struct queue queue_make(struct guest *g, uint64_t features, uint32_t size)
{
    return (struct queue){
        .features = features,
        .size = size,
        .base = features & BIT(RING_PACKED) ? 0x80008000u : 0,
        .desc = guest_take(g, 16 * (uint64_t)size),
        .avail = guest_take(g, 6 + 2 * (uint64_t)size),
        .used = guest_take(g, 6 + 8 * (uint64_t)size),
        .kick = eventfd(0, EFD_NONBLOCK),
        .call = eventfd(0, EFD_NONBLOCK),
    };
}

/* The device's half. */
static inline struct vq *queue_device(const struct guest *g, const struct queue *q)
{
    struct vq_config config = {.size = q->size,
                               .base = q->base,
                               .desc = guest_uva(g, q->desc),
                               .avail = guest_uva(g, q->avail),
                               .used = guest_uva(g, q->used),
                               .features = q->features};
    int status;
    struct vq *made = vq_new(g->table, &config, &status);

    MUST(made);
    return made;
}

/* What the driver's half needs, for a caller to fill in the rest. */
static inline struct driver_config queue_driver(const struct queue *q, enum driver_role role)
{
    struct driver_config c = {.role = role,
                              .size = q->size,
                              .base = q->base,
                              .features = q->features,
                              .desc = q->desc,
                              .avail = q->avail,
                              .used = q->used,
                              .kick = q->kick,
                              .call = q->call,
                              .frame_bytes = 200,
                              .batch = 16,
                              .pieces = 1,
                              .full = 1,
                              .stall_ms = 20000,
                              .prefix_bytes = 14};
    return c;
}

static inline struct driver *driver_make(struct guest *g, struct driver_config c)
{
    c.area = guest_take(g, driver_area_bytes(&c));
    c.area_gpa = guest_gpa(g, c.area);
    struct driver *made = driver_new(&c);

    MUST(made);
    return made;
}
