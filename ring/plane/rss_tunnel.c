/* A packet inside another one: where the inner header begins (virtio 1.3, "Inner Header Hash").
 *
 * An outer header matches an encapsulation type by what its RFC says of a packet on the wire:
 *
 *   GRE_2784   GRE over IPv4 with neither key nor sequence number        GRE_2890   the same with one of them, or both
 *   GRE_7676   GRE over IPv6, or with IPv6 inside                       NVGRE      GRE with a key alone, Ethernet inside
 *   GRE_UDP    GRE behind UDP to port 4754 (RFC 8086)                   IPIP       IPv4 in IPv4 (RFC 2003)
 *   VXLAN      UDP to port 4789 (RFC 7348)                              VXLAN_GPE  UDP to port 4790
 *   GENEVE     UDP to port 6081 (RFC 8926)
 *
 * so that one packet may match several. One level is looked into, no more.
 */
#include "rss.h"

#define PROTOCOL_IPIP 4
#define PROTOCOL_UDP 17
#define PROTOCOL_GRE 47
#define PORT_VXLAN 4789
#define PORT_VXLAN_GPE 4790
#define PORT_GENEVE 6081
#define PORT_GRE_UDP 4754
#define TYPE_ETHERNET 0x6558 /* a frame, where a protocol is named by an Ethertype */
#define UDP_HEADER 8
#define VXLAN_HEADER 8
#define GENEVE_HEADER 8
#define GRE_HEADER 4

/* GRE's flags */
#define GRE_CHECKSUM 0x8000
#define GRE_KEY 0x2000
#define GRE_SEQUENCE 0x1000
#define GRE_KNOWN (GRE_CHECKSUM | GRE_KEY | GRE_SEQUENCE)
#define GRE_MUST_BE_ZERO 0x4c07 /* routing, the next two bits that RFC 1701 gave a meaning, version */

/* Bits of tunnel_types. */
enum {
    GRE_2784 = 1 << 0,
    GRE_2890 = 1 << 1,
    GRE_7676 = 1 << 2,
    GRE_UDP = 1 << 3,
    VXLAN = 1 << 4,
    VXLAN_GPE = 1 << 5,
    GENEVE = 1 << 6,
    IPIP = 1 << 7,
    NVGRE = 1 << 8
};

/* What is inside: where it begins, and its Ethertype. */
struct payload {
    uint32_t types; /* the encapsulation types that match; 0: none */
    uint32_t at;
    uint32_t type;
};

static struct payload gre(const struct ip_packet *outer, uint32_t at, bool in_udp)
{
    struct seen s = outer->within;
    struct payload in = {0};

    if (s.end - at < GRE_HEADER)
        return in;
    uint32_t flags = rss_big16(s.bytes + at), options = flags & GRE_KNOWN;
    if (flags & GRE_MUST_BE_ZERO)
        return in;
    in.type = rss_big16(s.bytes + at + 2);
    in.at = at + GRE_HEADER + 4u * (uint32_t)__builtin_popcount(options);
    if (in.at > s.end)
        return in;
    if (in_udp)
        in.types = GRE_UDP;
    else if (outer->type == RSS_TYPE_IPV4)
        in.types = options & (GRE_KEY | GRE_SEQUENCE) ? GRE_2890 : GRE_2784;
    if (!in_udp && (outer->type == RSS_TYPE_IPV6 || in.type == RSS_TYPE_IPV6))
        in.types |= GRE_7676;
    if (!in_udp && options == GRE_KEY && in.type == TYPE_ETHERNET)
        in.types |= NVGRE;
    return in;
}

/* A VXLAN header with the I flag, and nothing that a later version of it may have made of the others. */
static struct payload vxlan(struct seen s, uint32_t at)
{
    bool is_one = s.end - at >= VXLAN_HEADER && s.bytes[at] & 0x08;

    return (struct payload){is_one ? VXLAN : 0, at + VXLAN_HEADER, TYPE_ETHERNET};
}

static struct payload vxlan_gpe(struct seen s, uint32_t at)
{
    static const uint32_t inside[] = {0, RSS_TYPE_IPV4, RSS_TYPE_IPV6, TYPE_ETHERNET}; /* by next protocol */
    struct payload in = {VXLAN_GPE, at + VXLAN_HEADER, TYPE_ETHERNET};

    /* version 0, an identifier, no operation or maintenance */
    if (s.end - at < VXLAN_HEADER || (s.bytes[at] & 0x39) != 0x08)
        return (struct payload){0};
    if (s.bytes[at] & 0x04)
        in.type = s.bytes[at + 3] < 4 ? inside[s.bytes[at + 3]] : 0;
    return in;
}

static struct payload geneve(struct seen s, uint32_t at)
{
    if (s.end - at < GENEVE_HEADER || s.bytes[at] >> 6)
        return (struct payload){0};
    uint32_t options = 4u * (s.bytes[at] & 0x3f);
    if (options > s.end - at - GENEVE_HEADER)
        return (struct payload){0};
    return (struct payload){GENEVE, at + GENEVE_HEADER + options, rss_big16(s.bytes + at + 2)};
}

static struct payload in_udp(const struct ip_packet *outer)
{
    struct seen s = outer->within;
    uint32_t at = outer->transport;

    if (s.end - at < UDP_HEADER)
        return (struct payload){0};
    switch (rss_big16(s.bytes + at + 2)) {
    case PORT_VXLAN:
        return vxlan(s, at + UDP_HEADER);
    case PORT_VXLAN_GPE:
        return vxlan_gpe(s, at + UDP_HEADER);
    case PORT_GENEVE:
        return geneve(s, at + UDP_HEADER);
    case PORT_GRE_UDP:
        return gre(outer, at + UDP_HEADER, true);
    default:
        return (struct payload){0};
    }
}

static struct payload payload_of(const struct ip_packet *outer)
{
    if (!outer->transport)
        return (struct payload){0};
    switch (outer->protocol) {
    case PROTOCOL_IPIP:
        return (struct payload){outer->type == RSS_TYPE_IPV4 ? IPIP : 0, outer->transport, RSS_TYPE_IPV4};
    case PROTOCOL_GRE:
        return gre(outer, outer->transport, false);
    case PROTOCOL_UDP:
        return in_udp(outer);
    default:
        return (struct payload){0};
    }
}

int rss_inner(const struct ip_packet *outer, uint32_t tunnel_types, struct ip_packet *inner)
{
    struct payload in = payload_of(outer);
    struct seen s = outer->within;

    if (!(in.types & tunnel_types))
        return 0;
    if (in.type == TYPE_ETHERNET)
        in.type = rss_ethernet(s, &in.at);
    return rss_ip(s, in.type, in.at, inner) ? 1 : -1;
}
