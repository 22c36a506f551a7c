/* Frames that are to be cut into segments, and what must hold of the segments whatever was in the frame. */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "check.h"
#include "../../ring/plane/header.h"

static inline uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }
static inline uint32_t big16(const uint8_t *at) { return (uint32_t)at[0] << 8 | at[1]; }

/* A copy in a block of exactly its size: beside it AddressSanitizer sees every access. */
static inline uint8_t *exactly(const uint8_t *from, uint32_t length)
{
    uint8_t *block = malloc(length);

    if (length)
        memcpy(block, from, length);
    return block;
}

/* The sum as RFC 1071 has it, one word after the other, in network order. */
static inline uint32_t plain_sum(const uint8_t *at, uint32_t length)
{
    uint32_t sum = 0;

    for (uint32_t i = 0; i < length; i++) {
        sum += i & 1 ? at[i] : (uint32_t)at[i] << 8;
        sum = (sum & 0xffff) + (sum >> 16);
    }
    return sum;
}

/* A range of the frame, added up in parts of odd lengths. */
static inline struct offload_sum sum_in_parts(const uint8_t *at, uint32_t length)
{
    struct offload_sum sum = {0};
    uint32_t part = 1;

    for (; length; at += part, length -= part, part += 2) {
        part = smaller(part, length);
        offload_sum_add(&sum, at, part);
    }
    return sum;
}

/* What is in every segment: an IP header whose length and checksum are right. */
static inline void check_ip(const uint8_t *segment, uint32_t length)
{
    uint32_t at = 12, header;

    while (big16(segment + at) == 0x8100 || big16(segment + at) == 0x88a8)
        at += 4;
    bool ipv6 = big16(segment + at) == 0x86dd;
    at += 2;
    if (ipv6) {
        CHECK_EQ(big16(segment + at + 4), length - at - 40);
        return;
    }
    header = (segment[at] & 15u) * 4;
    CHECK_EQ(big16(segment + at + 2), length - at);
    CHECK_EQ(plain_sum(segment + at, header), 0xffff);
}

/* Cut the frame, which lies in a block of its own, both ways that there are. -> as segmenter_start. */
static inline int cut(const struct net_header *h, const uint8_t *frame, uint32_t length)
{
    uint32_t given = smaller(length, OFFLOAD_HEADERS);
    uint8_t *headers = exactly(frame, given);
    struct segmenter s, whole;
    struct segment out = {0};
    int count = segmenter_start(&s, h, headers, given, length, 7);

    free(headers);
    whole = s;
    CHECK(count > 0 || (count < 0 && count > OFFLOAD_E_ROOM));
    for (int i = 0; i < count; i++) {
        uint32_t at = out.payload_at + out.payload_length;
        CHECK_EQ(segmenter_next(&s, &out), 1);
        CHECK(i == 0 ? out.payload_at <= length : out.payload_at == at);
        CHECK(out.payload_length <= h->gso_size && out.payload_length <= length - out.payload_at);
        CHECK(out.sum_at <= length && out.sum_length <= length - out.sum_at);
        CHECK(out.header_length <= SEGMENT_HEADER_MAX);
        uint32_t total = out.header_length + out.payload_length;
        struct offload_sum sum = sum_in_parts(frame + out.sum_at, out.sum_length);
        segmenter_seal(&s, &sum);
        uint8_t *room = malloc(total);
        CHECK_EQ(segmenter_write(&whole, frame, room, total), total);
        CHECK(memcmp(room, out.header, out.header_length) == 0);
        CHECK(memcmp(room + out.header_length, frame + out.payload_at, out.payload_length) == 0);
        check_ip(room, total);
        free(room);
    }
    CHECK_EQ(segmenter_next(&s, &out), 0);
    return count;
}
