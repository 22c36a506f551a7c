/* Checksums and segmentation in software under sanitizers, on good frames and on what becomes of them when any byte
 * of their headers is another one. That the segments are the right ones: tests/test_ring_offload.py. */
#include "cut.h"

#define PAYLOAD 150
#define FRAME_MAX (OFFLOAD_HEADERS + PAYLOAD)

struct frame {
    struct net_header header;
    uint32_t length, headers;
    uint8_t bytes[FRAME_MAX];
};

static uint8_t *put(uint8_t *to, const char *bytes, size_t length)
{
    return (uint8_t *)memcpy(to, bytes, length) + length;
}
#define PUT(to, literal) ((to) = put((to), (literal), sizeof(literal) - 1))
#define ADDRESSES_4 "\x0a\x09\x00\x01\x0a\x09\x00\x02"
#define ADDRESSES_6 "\xfd\x00\x00\x09\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01" \
                    "\xfd\x00\x00\x09\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02"
#define TCP_20 "\x12\x34\x56\x78\xff\xff\xff\x80\x00\x00\x00\x01\x50\x99\x20\x00\x00\x00\x00\x00"
#define TCP_32 "\x12\x34\x56\x78\xff\xff\xff\x80\x00\x00\x00\x01\x80\x99\x20\x00\x00\x00\x00\x00" \
               "\x01\x01\x08\x0a\x01\x02\x03\x04\x05\x06\x07\x08"
#define UDP_8 "\x12\x34\x56\x78\x00\x00\x00\x00"

/* Frames with everything a header can have; IP says no length, which UDP then has to. */
static struct frame good(int which)
{
    struct frame f = {.header = {.flags = F_NEEDS_CSUM, .gso_size = 70}};
    uint8_t *at = f.bytes;
    bool ipv6 = which & 1, tagged = which & 2, tcp = which < 4;

    PUT(at, "\x52\x54\x00\x00\x00\x02\x52\x54\x00\x00\x00\x01");
    if (tagged)
        PUT(at, "\x88\xa8\x00\x05\x81\x00\x00\x07");
    if (ipv6) {
        PUT(at, "\x86\xdd\x60\x00\x00\x00\x00\x00\x00\x40" ADDRESSES_6); /* first a hop-by-hop header */
        PUT(at, "\x2b\x00\x1e\x04\x01\x02\x03\x04");
        PUT(at, "\x3c\x02\x00\x01\x00\x00\x00\x00" "\xfd\x00\x00\x09\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x03");
        PUT(at, "\x06\x00\x1e\x04\x01\x02\x03\x04");
        at[-8] = tcp ? 6 : 17;
    } else {
        PUT(at, "\x08\x00\x46\x00\x00\x00\xff\xff\x40\x00\x40\x06\x00\x00" ADDRESSES_4 "\x94\x04\x00\x00");
        at[-15] = tcp ? 6 : 17;
    }
    uint8_t *transport = at;
    if (tcp)
        PUT(at, TCP_32);
    else
        PUT(at, UDP_8);
    f.headers = (uint32_t)(at - f.bytes);
    f.length = f.headers + PAYLOAD;
    for (uint32_t i = 0; i < PAYLOAD; i++)
        f.bytes[f.headers + i] = (uint8_t)(i * 37);
    if (!tcp)
        transport[4] = (8 + PAYLOAD) >> 8, transport[5] = (uint8_t)(8 + PAYLOAD);
    f.header.gso_type = !tcp ? (which < 8 ? GSO_UDP_L4 : GSO_UDP) : ipv6 ? GSO_TCPV6 : GSO_TCPV4;
    f.header.csum_start = (uint16_t)(transport - f.bytes);
    f.header.csum_offset = tcp ? 16 : 6;
    return f;
}
#define GOOD 12

static int cut_copy(const struct frame *f, uint32_t length)
{
    uint8_t *frame = exactly(f->bytes, length);
    int count = cut(&f->header, frame, length);

    free(frame);
    return count;
}

static uint32_t next_random(uint32_t *state) { return *state = *state * 1664525 + 1013904223; }

/* ------------------------------------------------------------------------------------------------ sums */

TEST(sum_of_any_length_from_anywhere)
{
    uint32_t state = 1;

    for (uint32_t length = 0; length < 300; length++)
        for (uint32_t first = 0; first < 9; first++) {
            uint8_t *block = malloc(first + length);
            for (uint32_t i = 0; i < first + length; i++)
                block[i] = length % 3 ? (uint8_t)(next_random(&state) >> 24) : 0xff; /* carries everywhere */
            struct offload_sum whole = {0}, parts = sum_in_parts(block + first, length);
            offload_sum_add(&whole, block + first, length);
            CHECK_EQ(whole.odd, length & 1);
            CHECK_EQ(parts.odd, length & 1);
            uint8_t checksums[2][2] = {{0}};
            offload_checksum(checksums[0], 2, &whole, 0, 0);
            offload_checksum(checksums[1], 2, &parts, 0, 0);
            uint32_t wanted = 0xffff & ~plain_sum(block + first, length);
            CHECK_EQ(big16(checksums[0]), wanted ? wanted : 0xffff);
            CHECK_EQ(big16(checksums[1]), wanted ? wanted : 0xffff);
            free(block);
        }
}

TEST(N01_N02_checksum_of_every_start_and_place)
{
    enum { LENGTH = 40 };
    uint8_t bytes[LENGTH];

    for (uint32_t i = 0; i < LENGTH; i++)
        bytes[i] = (uint8_t)(i * 59 + 1);
    for (uint32_t given = 0; given <= LENGTH; given++)
        for (uint32_t start = 0; start <= LENGTH; start++)
            for (uint32_t offset = 0; offset <= LENGTH; offset++) {
                uint8_t *frame = exactly(bytes, given);
                struct offload_sum rest = sum_in_parts(bytes + given, LENGTH - given);
                int status = offload_checksum(frame, given, &rest, start, offset);
                CHECK_EQ(status, start + offset + 2 > given ? OFFLOAD_E_CHECKSUM : OFFLOAD_OK);
                uint32_t wanted = start <= LENGTH ? 0xffff & ~plain_sum(bytes + start, LENGTH - start) : 0;
                if (status == OFFLOAD_OK)
                    CHECK_EQ(big16(frame + start + offset), wanted);
                else
                    CHECK(given == 0 || memcmp(frame, bytes, given) == 0);
                free(frame);
            }
    CHECK_EQ(offload_checksum(bytes, LENGTH, NULL, UINT32_MAX, UINT32_MAX), OFFLOAD_E_CHECKSUM);
    CHECK_EQ(offload_checksum(bytes, LENGTH, NULL, 2, UINT32_MAX), OFFLOAD_E_CHECKSUM);
}

/* -------------------------------------------------------------------------------------------- segments */

TEST(good_frames_are_cut)
{
    for (int which = 0; which < GOOD; which++) {
        struct frame f = good(which);
        bool fragments = which >= 8, ipv6 = which & 1;
        CHECK_EQ(cut_copy(&f, f.length), fragments ? ((ipv6 ? 16 : 8) + PAYLOAD + 63) / 64 : (PAYLOAD + 69) / 70);
        f.header.gso_size = 8;
        int segments = (PAYLOAD + 7) / 8;
        CHECK_EQ(cut_copy(&f, f.length), !fragments ? segments : ipv6 ? OFFLOAD_E_SIZE : 1 + segments);
        f.header.gso_size = UINT16_MAX;
        CHECK_EQ(cut_copy(&f, f.length), 1);
    }
}

TEST(N08_frames_of_every_length)
{
    for (int which = 0; which < GOOD; which++) {
        struct frame f = good(which);
        for (uint32_t length = 0; length < f.length; length++) {
            int count = cut_copy(&f, length);
            if (length < f.headers)
                CHECK_EQ(count, OFFLOAD_E_HEADERS);
            else /* UDP knows how long it is */
                CHECK(which < 4 ? count > 0 : count == OFFLOAD_E_TRANSPORT);
        }
    }
}

TEST(N08_any_byte_of_the_headers_is_any_other)
{
    for (int which = 0; which < GOOD; which++) {
        struct frame f = good(which);
        for (uint32_t at = 0; at < f.headers; at++) {
            uint8_t before = f.bytes[at];
            for (int value = 0; value < 256; value++) {
                f.bytes[at] = (uint8_t)value;
                cut_copy(&f, f.length);
            }
            f.bytes[at] = before;
        }
    }
}

TEST(N08_any_net_header)
{
    uint32_t state = 2;

    for (int round = 0; round < 20000; round++) {
        struct frame f = good((int)(next_random(&state) >> 8) % GOOD);
        uint8_t *at = (uint8_t *)&f.header;
        at[next_random(&state) % sizeof(f.header)] = (uint8_t)(next_random(&state) >> 24);
        f.header.gso_type = (uint8_t)(next_random(&state) >> 24 & 0x87);
        cut_copy(&f, f.length);
    }
}

TEST(N08_several_bytes_of_a_frame_are_others)
{
    uint32_t state = 3;

    for (int round = 0; round < 50000; round++) {
        struct frame f = good((int)(next_random(&state) >> 8) % GOOD);
        for (uint32_t n = 1 + (next_random(&state) >> 16) % 6; n; n--)
            f.bytes[(next_random(&state) >> 8) % f.headers] = (uint8_t)(next_random(&state) >> 24);
        f.header.flags = round & 1;
        cut_copy(&f, f.headers + (next_random(&state) >> 8) % PAYLOAD);
    }
}

/* A frame whose extension headers say 256 bytes and more: nothing is read beyond what was given. */
TEST(N08_headers_longer_than_what_is_looked_at)
{
    for (uint32_t extra = 0; extra < 40; extra++) {
        struct frame f = good(1);
        uint8_t frame[1024] = {0};
        memcpy(frame, f.bytes, 14 + 40);
        frame[14 + 40] = 6;
        frame[14 + 41] = (uint8_t)extra;
        uint32_t transport = 14 + 40 + 8 * (extra + 1);
        memcpy(frame + transport, TCP_20, 20);
        f.header.csum_start = (uint16_t)transport;
        uint8_t *block = exactly(frame, transport + 20 + PAYLOAD);
        int count = cut(&f.header, block, transport + 20 + PAYLOAD);
        CHECK_EQ(count, transport + 20 <= OFFLOAD_HEADERS ? (PAYLOAD + 69) / 70 : OFFLOAD_E_HEADERS);
        struct segmenter *s = malloc(sizeof(*s)); /* the same where more is given */
        CHECK_EQ(segmenter_start(s, &f.header, block, transport + 20 + PAYLOAD, transport + 20 + PAYLOAD, 0), count);
        free(s);
        free(block);
    }
}

TEST(longest_headers_of_fragments_have_room)
{
    struct frame f = good(9);
    uint8_t frame[1024] = {0};
    uint32_t fragmentable = 14 + 40 + 8, extension = (OFFLOAD_HEADERS - 8 - fragmentable) / 8 * 8;
    uint32_t transport = fragmentable + extension;

    memcpy(frame, f.bytes, fragmentable);
    frame[14 + 40] = 60; /* hop-by-hop, then destination options up to UDP */
    frame[fragmentable] = 17;
    frame[fragmentable + 1] = (uint8_t)(extension / 8 - 1);
    memcpy(frame + transport, UDP_8, 8);
    frame[transport + 4] = (8 + PAYLOAD) >> 8;
    frame[transport + 5] = (uint8_t)(8 + PAYLOAD);
    f.header.csum_start = (uint16_t)transport;
    f.header.gso_size = (uint16_t)(extension + 8);
    uint8_t *block = exactly(frame, transport + 8 + PAYLOAD);
    CHECK_EQ(cut(&f.header, block, transport + 8 + PAYLOAD), (extension + 8 + PAYLOAD - 1) / (extension + 8) + 1);
    free(block);
}

TEST(segment_without_room_is_lost_and_the_next_is_not)
{
    struct frame f = good(0);
    struct segmenter s;
    uint8_t room[FRAME_MAX];

    CHECK_EQ(segmenter_start(&s, &f.header, f.bytes, f.length, f.length, 0), 3);
    CHECK_EQ(segmenter_write(&s, f.bytes, room, f.headers + 69), OFFLOAD_E_ROOM);
    CHECK_EQ(segmenter_write(&s, f.bytes, room, f.headers + 70), f.headers + 70);
    CHECK_EQ(segmenter_write(&s, f.bytes, room, f.headers + 70), f.headers + PAYLOAD - 140);
    CHECK_EQ(segmenter_write(&s, f.bytes, room, 0), 0);
}
