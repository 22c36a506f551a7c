/* What the fuzzers share: input read byte by byte, and the checks and the guest of tests/c.
 *
 * libFuzzer calls LLVMFuzzerTestOneInput with inputs that it mutates towards code not yet reached. A sanitizer's
 * report and a CHECK that fails both end the program, and libFuzzer keeps the input. An input that has ended goes on
 * in zeroes, so every prefix of one means something.
 */
#pragma once

#define CHECKS_ONLY
#include "../c/guest.h"

struct input {
    const uint8_t *at, *end;
};

static inline bool input_left(const struct input *in) { return in->at < in->end; }
static inline uint8_t input8(struct input *in) { return in->at < in->end ? *in->at++ : 0; }

static inline uint16_t input16(struct input *in)
{
    uint16_t low = input8(in);

    return (uint16_t)(low | input8(in) << 8);
}

static inline uint32_t input_below(struct input *in, uint32_t limit) { return input8(in) % limit; }

/* Where a ring stands, counted on from where it started and never wrapping: indices of a split ring, slots of a packed
 * one, of which 0 is slot 0 in a round whose wrap counter is 0. */
static inline uint32_t slot_at(const struct guest *g, uint64_t at) { return (uint32_t)(at % g->config.size); }
static inline bool wrap_at(const struct guest *g, uint64_t at) { return at / g->config.size & 1; }

/* As memory and SET_VRING_BASE have it: an index, or a slot with its wrap counter. */
static inline uint16_t field_at(const struct guest *g, uint64_t at)
{
    return (uint16_t)(g->is_packed ? slot_at(g, at) | (wrap_at(g, at) ? 0x8000u : 0) : at);
}

/* Make the parts of a ring that starts anywhere. -> where */
static inline uint64_t input_ring(struct input *in, struct guest *g, uint32_t size, uint64_t features)
{
    uint16_t base = input16(in);
    uint64_t at = 0x10000 + base;

    if (features & PACKED)
        at = 2 * size + base % (2 * size);
    *g = (struct guest){.config.size = size, .is_packed = features & PACKED};
    base = field_at(g, at);
    guest_init(g, size, features, features & PACKED ? packed_base(base & 0x7fff, base & 0x8000) : base);
    return at;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
