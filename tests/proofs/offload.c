/*
 * Reading the headers of a frame that is to be cut: any bytes, behind any net header, of any length, of which little or
 * much is given. And completing a checksum: any place of it, in a frame of up to GIVEN bytes.
 *
 * Shown: nothing is read but what is given, nothing written but the segmenter and the checksum; reading ends; of a
 * frame that is accepted, the headers begin and end where the segmenter's copy of them has room for them.
 */
#include "world.h"
#include "plane/checksum.c"
#include "plane/segment.c"

#define GIVEN 20

static void any_frame(uint32_t given)
{
    struct segmenter s;
    struct net_header h;
    uint8_t *headers = block(given);

    Frama_C_make_unknown((char *)&h, sizeof(h));
    int status = segmenter_start(&s, &h, headers, given, any32(), any32());
    //@ check status >= 0 ==> s.network == 14 || s.network == 18 || s.network == 22;
    //@ check status >= 0 ==> s.network + 20 <= s.transport <= SEGMENT_HEADER_MAX - 8;
    //@ check status >= 0 ==> s.network + 20 <= s.repeated <= SEGMENT_HEADER_MAX;
    //@ check status >= 0 ==> 42 <= s.length <= SEGMENT_HEADER_MAX;
    //@ check status >= 0 ==> 0 < s.size <= 65535;
}

static void any_checksum(uint32_t given)
{
    struct offload_sum sum = {any_between(0, UINT64_MAX), any32()}, *rest = any_bool() ? &sum : NULL;
    uint8_t *frame = block(given);

    //@ loop unroll GIVEN + 1;
    for (uint32_t start = 0; start <= given; start++) {
        int status = offload_checksum(frame, given, rest, start, any32());
        //@ check status == OFFLOAD_OK || status == OFFLOAD_E_CHECKSUM;
    }
    int status = offload_checksum(frame, given, rest, (uint32_t)any_between(given + 1, UINT32_MAX), any32());
    //@ check status == OFFLOAD_E_CHECKSUM;
}

int main(void)
{
    static const uint32_t sizes[] = {0, 13, 14, 60, OFFLOAD_HEADERS};

    //@ loop unroll 5;
    for (int i = 0; i < 5; i++)
        any_frame(sizes[i]);
    //@ loop unroll GIVEN + 1;
    for (uint32_t given = 0; given <= GIVEN; given++)
        any_checksum(given);
    return 0;
}
