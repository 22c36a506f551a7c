/* Ones' complement sums in memory order, which serve for those in network order (RFC 1071, 2 B). */
#pragma once

#include <stdbool.h>
#include <string.h>

#include "include.h"

/* What is carried out comes in again. */
static inline uint64_t sum_plus(uint64_t a, uint64_t b)
{
    a += b;
    return a + (a < b);
}

static inline uint16_t sum_fold(uint64_t sum)
{
    sum = (sum & UINT32_MAX) + (sum >> 32);
    sum = (sum & UINT32_MAX) + (sum >> 32);
    sum = (sum & UINT16_MAX) + (sum >> 16);
    sum = (sum & UINT16_MAX) + (sum >> 16);
    return (uint16_t)sum;
}

/* The sum of `length` bytes, not folded; an odd one at the end counts as if a zero followed. */
uint64_t sum_bytes(const uint8_t *at, uint64_t length);

/* Write the checksum that belongs to this sum, its complement. */
static inline void sum_write(uint8_t *at, uint64_t sum)
{
    uint16_t checksum = (uint16_t)~sum_fold(sum);

    memcpy(at, &checksum, sizeof(checksum));
}

/* The same where a checksum of 0 would say that there is none (RFC 768): 0xffff stands for it. */
static inline void sum_write_nonzero(uint8_t *at, uint64_t sum)
{
    sum_write(at, sum_fold(sum) == UINT16_MAX ? 0 : sum);
}
