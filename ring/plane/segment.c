/*
 * Segmentation in software. See offload.h for what is promised.
 *
 * segmenter_start reads the headers once, in a private copy, and notes where each begins. Every offset it moves on by
 * is checked against the end of that copy before it is read through, so nothing it decides rests on hdr_len, csum_start
 * or a length field alone. segmenter_next then only changes fields at these offsets: the copy becomes the header of
 * one segment after the other. IP and TCP count in network order; sums are made in memory order, which ones'
 * complement arithmetic allows (RFC 1071, 2 B).
 *
 * The pseudo header's sum is taken from the checksum field where the sender put it there (NEEDS_CSUM), less the length
 * of the whole. So the sum for a segment is right for a route, too, whose end only the sender's routing header knows
 * (RFC 8200, 8.1).
 */
#include <arpa/inet.h>
#include <stdbool.h>
#include <string.h>

#include "checksum.h"
#include "header.h"

#define TYPE_AT 12 /* of an Ethernet frame */
#define TAG 4
#define TAGS_MAX 2
#define TYPE_IPV4 0x0800
#define TYPE_IPV6 0x86dd
#define TYPE_TAG 0x8100
#define TYPE_SERVICE_TAG 0x88a8

#define IPV4_HEADER 20
#define IPV4_MORE 0x2000
#define IPV4_FRAGMENT 0x3fff /* MF, and where the fragment lies */
#define IPV6_HEADER 40
#define IPV6_UNIT 8 /* extension headers and fragments are so many bytes, or some times that */
#define IP_LENGTH_MAX 65535

#define PROTOCOL_HOP_BY_HOP 0
#define PROTOCOL_TCP 6
#define PROTOCOL_UDP 17
#define PROTOCOL_ROUTING 43
#define PROTOCOL_FRAGMENT 44
#define PROTOCOL_DESTINATION 60

#define TCP_HEADER 20
#define TCP_CHECKSUM 16
#define TCP_FLAGS 13
#define TCP_FIN 0x01
#define TCP_PSH 0x08
#define TCP_CWR 0x80
#define UDP_HEADER 8
#define UDP_CHECKSUM 6

_Static_assert(SEGMENT_HEADER_MAX == OFFLOAD_HEADERS + IPV6_UNIT, "a fragment header has room");
_Static_assert(sizeof((struct segmenter){0}.header) == SEGMENT_HEADER_MAX, "as the contract says");

static uint32_t get16(const uint8_t *at) { return (uint32_t)at[0] << 8 | at[1]; }
static uint32_t get32(const uint8_t *at) { return get16(at) << 16 | get16(at + 2); }

static void put16(uint8_t *at, uint32_t value)
{
    at[0] = (uint8_t)(value >> 8);
    at[1] = (uint8_t)value;
}

static void put32(uint8_t *at, uint32_t value)
{
    put16(at, value >> 16);
    put16(at + 2, value);
}

static uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }

/* ---------------------------------------------------------------------------------------------- headers */

/* What reading the headers needs to know beside the segmenter. */
struct reading {
    uint32_t have;     /* bytes of header[] that are there, and belong to the datagram once its end is known */
    uint32_t next_at;  /* the field that names what follows the headers before every fragment */
    uint8_t protocol;
    bool routed;       /* the IPv6 destination is not the last one */
};

static int read_ethernet(struct segmenter *s, const struct reading *r, uint8_t kind)
{
    uint32_t at = TYPE_AT, type = TYPE_TAG;

    for (int tags = 0; tags <= TAGS_MAX && (type == TYPE_TAG || type == TYPE_SERVICE_TAG); tags++, at += TAG) {
        if (at + 2 > r->have)
            return OFFLOAD_E_HEADERS;
        type = get16(s->header + at);
    }
    s->network = at + 2 - TAG;
    s->is_ipv6 = type == TYPE_IPV6;
    if ((type != TYPE_IPV4 || kind == GSO_TCPV6) && (type != TYPE_IPV6 || kind == GSO_TCPV4))
        return OFFLOAD_E_ETHERTYPE;
    return OFFLOAD_OK;
}

/* The datagram has `length` bytes from the IP header on, or, 0, as many as there are. */
static int end_datagram(struct segmenter *s, struct reading *r, uint32_t length)
{
    if (length > s->end - s->network)
        return OFFLOAD_E_IP;
    if (length)
        s->end = s->network + length;
    r->have = smaller(r->have, s->end);
    return OFFLOAD_OK;
}

static int read_ipv4(struct segmenter *s, struct reading *r)
{
    const uint8_t *ip = s->header + s->network;

    if (s->network + IPV4_HEADER > r->have)
        return OFFLOAD_E_HEADERS;
    uint32_t header = (ip[0] & 15u) * 4, length = get16(ip + 2);
    if (ip[0] >> 4 != 4 || header < IPV4_HEADER || (length && length < header))
        return OFFLOAD_E_IP;
    if (get16(ip + 6) & IPV4_FRAGMENT)
        return OFFLOAD_E_FRAGMENT;
    s->id = (uint16_t)get16(ip + 4);
    s->transport = s->repeated = s->network + header;
    r->protocol = ip[9];
    return end_datagram(s, r, length);
}

static int read_ipv6(struct segmenter *s, struct reading *r)
{
    const uint8_t *ip = s->header + s->network;
    uint32_t at = s->network + IPV6_HEADER, next_at = s->network + 6;

    if (at > r->have)
        return OFFLOAD_E_HEADERS;
    uint32_t length = get16(ip + 4);
    if (ip[0] >> 4 != 6)
        return OFFLOAD_E_IP;
    int status = end_datagram(s, r, length ? IPV6_HEADER + length : 0);
    if (status)
        return status;
    s->repeated = at;
    r->next_at = next_at;
    for (;;) {
        r->protocol = s->header[next_at];
        bool first_only = r->protocol == PROTOCOL_HOP_BY_HOP && next_at == s->network + 6;
        if (!first_only && r->protocol != PROTOCOL_ROUTING && r->protocol != PROTOCOL_DESTINATION)
            break;
        if (at + IPV6_UNIT > r->have)
            return OFFLOAD_E_HEADERS;
        if (r->protocol == PROTOCOL_ROUTING && s->header[at + 3])
            r->routed = true;
        next_at = at;
        at += IPV6_UNIT * (1u + s->header[at + 1]);
        if (at > r->have)
            return OFFLOAD_E_HEADERS;
        if (r->protocol != PROTOCOL_DESTINATION) { /* RFC 8200, 4.5: what stands before every fragment */
            s->repeated = at;
            r->next_at = next_at;
        }
    }
    s->transport = at;
    return r->protocol == PROTOCOL_FRAGMENT ? OFFLOAD_E_FRAGMENT : OFFLOAD_OK;
}

static int read_transport(struct segmenter *s, const struct reading *r)
{
    uint32_t length = s->is_tcp ? TCP_HEADER : UDP_HEADER;

    if (r->protocol != (s->is_tcp ? PROTOCOL_TCP : PROTOCOL_UDP))
        return OFFLOAD_E_PROTOCOL;
    if (s->transport + length > r->have)
        return OFFLOAD_E_HEADERS;
    const uint8_t *header = s->header + s->transport;
    if (s->is_tcp) {
        length = (header[12] >> 4) * 4u;
        if (length < TCP_HEADER)
            return OFFLOAD_E_TRANSPORT;
        s->sequence = get32(header + 4);
        s->tcp_flags = header[TCP_FLAGS];
    } else if (get16(header + 4) != s->end - s->transport) {
        return OFFLOAD_E_TRANSPORT;
    }
    s->length = s->transport + length;
    return s->length > r->have ? OFFLOAD_E_HEADERS : OFFLOAD_OK;
}

static uint32_t checksum_at(const struct segmenter *s)
{
    return s->transport + (s->is_tcp ? TCP_CHECKSUM : UDP_CHECKSUM);
}

static int read_checksum(struct segmenter *s, const struct reading *r, const struct net_header *h)
{
    uint32_t at = checksum_at(s);
    uint64_t sum;

    if (h->flags & F_NEEDS_CSUM) {
        uint16_t field, length = sum_fold(htonl(s->end - s->transport));
        if (h->csum_start != s->transport || h->csum_start + h->csum_offset != at)
            return OFFLOAD_E_CHECKSUM;
        memcpy(&field, s->header + at, sizeof(field));
        sum = (uint64_t)field + (uint16_t)~length;
    } else {
        if (r->routed)
            return OFFLOAD_E_CHECKSUM;
        uint32_t addresses = s->is_ipv6 ? 8 : 12;
        sum = sum_bytes(s->header + s->network + addresses, s->is_ipv6 ? 32 : 8) + htons(r->protocol);
    }
    s->pseudo = sum_fold(sum);
    return OFFLOAD_OK;
}

/* ---------------------------------------------------------------------------------------------- segments */

/* Put an IPv6 fragment header behind the headers that stand before every fragment. */
static void insert_fragment_header(struct segmenter *s, const struct reading *r, uint32_t id)
{
    uint8_t *at = s->header + s->repeated;

    for (uint32_t i = s->length; i > s->repeated; i--)
        s->header[i - 1 + IPV6_UNIT] = s->header[i - 1];
    at[0] = s->header[r->next_at];
    at[1] = 0;
    put32(at + 4, id);
    s->header[r->next_at] = PROTOCOL_FRAGMENT;
    s->repeated += IPV6_UNIT;
    s->transport += IPV6_UNIT;
    s->length += IPV6_UNIT;
}

/* Where the frame is cut. */
static int plan(struct segmenter *s, const struct reading *r, uint8_t kind, uint32_t gso_size, uint32_t fragment_id)
{
    uint32_t payload = s->end - s->length, in_first = s->length - s->repeated, datagram = in_first + payload;
    uint32_t uncounted = s->network + (s->is_ipv6 ? IPV6_HEADER : 0); /* by the length field of IP */

    s->at = s->length;
    s->fragments = kind == GSO_UDP && datagram > gso_size;
    if (gso_size == 0 || (kind == GSO_UDP && s->end - uncounted > IP_LENGTH_MAX))
        return OFFLOAD_E_SIZE;
    if (!s->fragments) {
        s->size = s->part = gso_size;
        s->left = payload ? (payload - 1) / s->size + 1 : 1;
        return s->length + smaller(s->size, payload) - uncounted > IP_LENGTH_MAX ? OFFLOAD_E_SIZE : OFFLOAD_OK;
    }
    s->size = gso_size / IPV6_UNIT * IPV6_UNIT;
    if (s->size == 0 || s->size < in_first) /* RFC 7112: all headers in the first one */
        return OFFLOAD_E_SIZE;
    s->part = s->size - in_first;
    s->left = (datagram - 1) / s->size + 1;
    if (s->is_ipv6)
        insert_fragment_header(s, r, fragment_id);
    return s->repeated + s->size - uncounted > IP_LENGTH_MAX ? OFFLOAD_E_SIZE : OFFLOAD_OK;
}

int segmenter_start(struct segmenter *s, const struct net_header *h, const uint8_t *headers, uint32_t given,
                    uint32_t length, uint32_t fragment_id)
{
    uint8_t kind = h->gso_type & (uint8_t)~GSO_ECN;
    struct reading r = {.have = smaller(smaller(given, length), OFFLOAD_HEADERS)};
    int status;

    *s = (struct segmenter){.end = length, .is_tcp = kind == GSO_TCPV4 || kind == GSO_TCPV6};
    if (!s->is_tcp && kind != GSO_UDP && kind != GSO_UDP_L4)
        return OFFLOAD_E_KIND;
    if (length > FRAME_ROOM)
        return OFFLOAD_E_SIZE;
    memcpy(s->header, headers, r.have);
    if ((status = read_ethernet(s, &r, kind)) || (status = s->is_ipv6 ? read_ipv6(s, &r) : read_ipv4(s, &r)) ||
        (status = read_transport(s, &r)) || (status = read_checksum(s, &r, h)) ||
        (status = plan(s, &r, kind, h->gso_size, fragment_id))) {
        s->left = 0;
        return status;
    }
    return (int)s->left;
}

static void write_ip(struct segmenter *s, uint32_t length, bool last)
{
    uint8_t *ip = s->header + s->network;

    if (s->is_ipv6) {
        put16(ip + 4, length - IPV6_HEADER);
        if (s->fragments) /* the last field of the header at the end of what is repeated */
            put16(s->header + s->repeated - IPV6_UNIT + 2, s->offset | !last);
        return;
    }
    put16(ip + 2, length);
    put16(ip + 4, s->id);
    if (s->fragments)
        put16(ip + 6, s->offset / IPV6_UNIT | (last ? 0 : IPV4_MORE));
    else
        s->id++;
    put16(ip + 10, 0);
    sum_write(ip + 10, sum_bytes(ip, (ip[0] & 15u) * 4));
}

static void write_transport(struct segmenter *s, uint32_t payload, bool last)
{
    uint8_t *header = s->header + s->transport;

    if (!s->is_tcp) {
        put16(header + 4, s->length - s->transport + payload);
        return;
    }
    put32(header + 4, s->sequence);
    header[TCP_FLAGS] = s->tcp_flags & (uint8_t)~(last ? 0 : TCP_FIN | TCP_PSH);
    s->sequence += payload;
    s->tcp_flags &= (uint8_t)~TCP_CWR;
}

int segmenter_next(struct segmenter *s, struct segment *out)
{
    if (s->left == 0)
        return 0;
    bool last = --s->left == 0;
    uint32_t payload = last ? s->end - s->at : s->part, summed = payload;

    if (!s->fragments) {
        write_transport(s, payload, last);
    } else if (s->offset) {
        s->length = s->repeated;
        summed = 0;
    } else {
        summed = s->end - s->at;
    }
    write_ip(s, s->length - s->network + payload, last);
    *out = (struct segment){s->header, s->length, s->at, payload, s->at, summed};
    s->covered = s->offset ? 0 : s->length - s->transport + summed;
    if (s->fragments)
        s->offset += s->length - s->repeated + payload;
    s->at += payload;
    s->part = s->size;
    return 1;
}

void segmenter_seal(struct segmenter *s, const struct offload_sum *payload)
{
    uint8_t *header = s->header + s->transport, *field = s->header + checksum_at(s);

    if (!s->covered)
        return;
    put16(field, 0);
    uint64_t sum = sum_plus(sum_bytes(header, s->length - s->transport), payload->sum);
    sum = sum_plus(sum, s->pseudo + (uint64_t)htonl(s->covered));
    (s->is_tcp ? sum_write : sum_write_nonzero)(field, sum);
}

int segmenter_write(struct segmenter *s, const uint8_t *frame, uint8_t *to, uint32_t room)
{
    struct offload_sum sum = {0};
    struct segment out;

    if (!segmenter_next(s, &out))
        return 0;
    if (out.header_length + (uint64_t)out.payload_length > room)
        return OFFLOAD_E_ROOM;
    offload_sum_add(&sum, frame + out.sum_at, out.sum_length);
    segmenter_seal(s, &sum);
    memcpy(to, out.header, out.header_length);
    memcpy(to + out.header_length, frame + out.payload_at, out.payload_length);
    return (int)(out.header_length + out.payload_length);
}
