/* Checksums in software. See offload.h for what is promised. */
#include "checksum.h"

static inline uint64_t word(const uint8_t *at)
{
    uint64_t value;

    memcpy(&value, at, sizeof(value));
    return value;
}

/* A sum of 64-bit words is, folded, that of 16-bit words. Four at a time, so that no addition waits for another. */
uint64_t sum_bytes(const uint8_t *at, uint64_t length)
{
    uint64_t a = 0, b = 0, c = 0, d = 0, rest = 0;

    for (; length >= 32; at += 32, length -= 32) {
        a = sum_plus(a, word(at));
        b = sum_plus(b, word(at + 8));
        c = sum_plus(c, word(at + 16));
        d = sum_plus(d, word(at + 24));
    }
    for (; length >= 8; at += 8, length -= 8)
        a = sum_plus(a, word(at));
    if (length)
        memcpy(&rest, at, length);
    return sum_plus(sum_plus(a, b), sum_plus(sum_plus(c, d), rest));
}

/* Add the sum of something that begins at an odd byte, or at an even one. */
static uint64_t plus_at(uint64_t sum, uint64_t part, bool odd)
{
    return sum_plus(sum, odd ? __builtin_bswap16(sum_fold(part)) : part);
}

void offload_sum_add(struct offload_sum *s, const uint8_t *data, uint64_t length)
{
    s->sum = plus_at(s->sum, sum_bytes(data, length), s->odd);
    s->odd ^= length & 1;
}

int offload_checksum(uint8_t *frame, uint32_t given, const struct offload_sum *rest, uint32_t csum_start,
                     uint32_t csum_offset)
{
    if ((uint64_t)csum_start + csum_offset + 2 > given)
        return OFFLOAD_E_CHECKSUM;
    uint64_t sum = sum_bytes(frame + csum_start, given - csum_start);
    if (rest)
        sum = plus_at(sum, rest->sum, (given - csum_start) & 1);
    sum_write_nonzero(frame + csum_start + csum_offset, sum);
    return OFFLOAD_OK;
}
