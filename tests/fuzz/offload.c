/* Any frame behind any net header: checksum completed, cut into segments.
 *
 * An input: flags and gso_type, gso_size, csum_start and csum_offset (which begin where TCP of a plain frame has them),
 * how many times 16 zeroes follow the frame, and the frame. What must hold is in tests/c/cut.h; nothing is accessed
 * beside the frame, the given part of it and the room for each segment, blocks of exactly their sizes.
 */
#define CHECKS_ONLY
#include "../c/cut.h"
#include "fuzz.h"

#define SEGMENTS 128

/* The field has the checksum, whether the frame was given whole or in part; nothing else has changed. */
static void complete(const struct net_header *h, const uint8_t *frame, uint32_t length, uint32_t given)
{
    uint8_t *part = exactly(frame, given), *whole = exactly(frame, length);
    struct offload_sum rest = sum_in_parts(frame + given, length - given);
    uint64_t field = (uint64_t)h->csum_start + h->csum_offset;

    int status = offload_checksum(part, given, &rest, h->csum_start, h->csum_offset);
    CHECK_EQ(status, field + 2 > given ? OFFLOAD_E_CHECKSUM : OFFLOAD_OK);
    if (status == OFFLOAD_OK) {
        CHECK_EQ(offload_checksum(whole, length, NULL, h->csum_start, h->csum_offset), OFFLOAD_OK);
        uint32_t wanted = 0xffff & ~plain_sum(frame + h->csum_start, length - h->csum_start);
        CHECK_EQ(big16(part + field), wanted ? wanted : 0xffff);
        CHECK(memcmp(part, whole, given) == 0 && memcmp(whole, frame, field) == 0);
        CHECK(memcmp(whole + field + 2, frame + field + 2, length - field - 2) == 0);
    }
    free(part);
    free(whole);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, data + size};
    struct net_header h = {.flags = input8(&in), .gso_type = input8(&in), .gso_size = input16(&in)};

    h.csum_start = (uint16_t)(34 + input8(&in));
    h.csum_offset = (uint16_t)(16 ^ input8(&in));
    uint32_t zeroes = input16(&in) % (FRAME_ROOM / 16) * 16, rest = (uint32_t)(in.end - in.at), length = rest + zeroes;
    uint8_t *frame = calloc(1, length);
    memcpy(frame, in.at, rest);
    complete(&h, frame, length, h.gso_size % (length + 1));
    if (h.gso_size >= length / SEGMENTS)
        cut(&h, frame, length);
    free(frame);
    return 0;
}
