/* The addresses a switch has learned. table.c tells how it works. */
#pragma once

#include <stdint.h>

#include "include.h"

#define TABLE_WAYS 8 /* of a set: one cache line */

struct table {
    uint64_t words[FABRIC_ADDRESSES] __attribute__((aligned(64)));
    uint64_t factor; /* odd: spreads addresses over the sets */
    uint32_t epoch;  /* ticks, atomic */
};

void table_init(struct table *t, uint64_t seed);
/* `mac`: 48 bits, as mac_at reads them. -> the number of the member, or -1. */
int table_find(const struct table *t, uint64_t mac);
/* A frame came from `mac` at member `number`. */
void table_learn(struct table *t, uint64_t mac, uint32_t number);
/* A tick passes. */
void table_tick(struct table *t);
/* Forget all that is behind member `number`. */
void table_forget(struct table *t, uint32_t number);
uint32_t table_count(const struct table *t);

static inline uint64_t mac_at(const uint8_t *bytes)
{
    uint32_t low;
    uint16_t high;

    /* Put together in a register: six bytes stored and eight loaded would have to wait for the store. */
    __builtin_memcpy(&low, bytes, sizeof(low));
    __builtin_memcpy(&high, bytes + sizeof(low), sizeof(high));
    return low | (uint64_t)high << 32;
}
