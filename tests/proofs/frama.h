/*
 * What Frama-C has to be told before it reads the core: the compiler's built-ins in plain C, and that the driver
 * may write guest memory at any instant.
 *
 * Every load of shared memory goes through an __atomic built-in. Here it is a load from a volatile object, of which
 * Eva assumes that it answers any value, another one each time: a driver that rewrites everything between any
 * two of our loads. Whether the address may be read at all is checked as for any load. memcpy from guest memory
 * takes the bytes as they lie, so a harness makes them unknown first; the copy is private afterwards.
 *
 * To follow an address exactly, Eva has to be given it exactly. So a harness goes through classes of descriptors and
 * says which one is read next: narrow() gives the private copy an address and a length of that class, where the load
 * would have answered any. Only the next copy is narrowed. Every later one, so also a second read of the same
 * descriptor, holds anything: it cannot profit from a check of the first.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <setjmp.h>

#include "__fc_builtin.h"

#define _Static_assert(...) struct nothing /* Frama-C does not take sizeof in one at file scope */
#define _Thread_local
#define __builtin_expect(value, usually) (value)
#define __builtin_add_overflow(a, b, sum) (*(sum) = (a) + (b), *(sum) < (a))
#define __builtin_bswap16(value) ((uint16_t)((value) << 8 | (value) >> 8))
#define MAP_NORESERVE 0
#define MADV_DONTDUMP 0
int madvise(void *at, size_t length, int advice);

static uint64_t any_between(uint64_t low, uint64_t high) { return Frama_C_unsigned_long_interval(low, high); }
static uint32_t any32(void) { return Frama_C_unsigned_int_interval(0, UINT32_MAX); }
static uint16_t any16(void) { return (uint16_t)Frama_C_unsigned_int_interval(0, UINT16_MAX); }
static bool any_bool(void) { return (bool)Frama_C_unsigned_int_interval(0, 1); }

#define __atomic_load_n(from, order) (*(volatile __typeof__(*(from)) *)(from))
#define __atomic_store_n(to, value, order) (*(to) = (value))
#define __atomic_fetch_or(at, bits, order) (*(at) |= (bits))
#define __atomic_fetch_add(at, value, order) (*(at) += (value))
#define __atomic_thread_fence(order) ((void)0)

/* A fault may have happened or not: both returns are followed, from the state the guard was entered in. */
#undef sigsetjmp
#define sigsetjmp(jump, mask) Frama_C_nondet(0, 1)

/* Frama-C knows qsort by a contract that says nothing of the result. In the order of our own addresses nothing is
 * sorted: where blocks of memory lie is not known here. */
static int by_hva(const void *a, const void *b);
static void insertion_sort(void *base, size_t count, size_t size, int (*compare)(const void *, const void *))
{
    uint8_t *items = base, held[64];

    if (compare == by_hva)
        return;
    for (size_t i = 1; i < count; i++) {
        size_t to = i;
        memcpy(held, items + i * size, size);
        for (; to > 0 && compare(items + (to - 1) * size, held) > 0; to--)
            memcpy(items + to * size, items + (to - 1) * size, size);
        memcpy(items + to * size, held, size);
    }
}
#define qsort insertion_sort

#include "core/internal.h"

static struct {
    bool armed;
    uint64_t addr;
    uint32_t len_low, len_high;
} next_descriptor;

static inline void narrow(void *copy, size_t size)
{
    if (next_descriptor.armed && size == sizeof(struct vring_desc)) {
        struct vring_desc *d = copy; /* a packed one begins alike */
        d->addr = next_descriptor.addr;
        d->len = (uint32_t)any_between(next_descriptor.len_low, next_descriptor.len_high);
        next_descriptor.armed = false;
    }
}
#define memcpy(to, from, size) (memcpy(to, from, size), narrow(to, size))

/* The product's code, all of it but the guard; and of the search in that order only what it finds. */
#define guestmem_region_at guestmem_region_searched
#include "core/guestmem.c"
#undef guestmem_region_at
const struct guest_region *guestmem_region_at(const struct guestmem *mem, const uint8_t *hva)
{
    for (uint32_t i = 0; i < mem->count; i++) {
        const struct guest_region *r = &mem->regions[i];
        if (any_bool()) {
            //@ admit \base_addr(hva) == \base_addr(r->hva);
            return r;
        }
        //@ admit \base_addr(hva) != \base_addr(r->hva);
    }
    return NULL;
}
#include "core/dirty.c"
#include "core/virtqueue.c"
#include "core/verbs.c"

struct guard guard_of_thread;
/*@ assigns \nothing; */
int guard_add(uint8_t *base, size_t length, int32_t *owner);
/*@ assigns \nothing; */
void guard_remove(uint8_t *base);
