/* Which bytes of a packet say who talks to whom: addresses, ports, and what IPv6 extension headers put in their place.
 *
 * Nothing that the packet claims of its own length is believed beyond what was seen of it.
 */
#include "rss.h"

#define TYPE_VLAN 0x8100
#define TYPE_VLAN_OUTER 0x88a8
#define VLAN_TAG 4
#define IPV4_HEADER 20
#define IPV6_HEADER 40
#define IPV6_ADDRESS 16

/* IPv6 extension headers (IANA "IPv6 Extension Header Types"), but for those that are experiments */
enum {
    HOP_BY_HOP = 0,
    ROUTING = 43,
    FRAGMENT = 44,
    ESP = 50,
    AUTHENTICATION = 51,
    DESTINATION = 60,
    MOBILITY = 135,
    HIP = 139,
    SHIM6 = 140
};

#define HOME_ADDRESS 0xc9 /* RFC 6275, 6.3: an option of the destination options */
#define PAD1 0

uint32_t rss_ethernet(struct seen s, uint32_t *at)
{
    uint32_t next = *at + ETHERNET_HEADER, type = 0;

    if (next > s.end)
        return 0;
    type = rss_big16(s.bytes + next - 2);
    for (int tags = 0; tags < 2 && (type == TYPE_VLAN || type == TYPE_VLAN_OUTER); tags++) {
        next += VLAN_TAG;
        if (next > s.end)
            return 0;
        type = rss_big16(s.bytes + next - 2);
    }
    *at = next;
    return type;
}

/* The end of a datagram of `length` bytes at `at`; 0 means all there is. */
static uint32_t ends(struct seen s, uint32_t at, uint32_t length)
{
    return length && length < s.end - at ? at + length : s.end;
}

static bool is_ipv4(struct seen s, uint32_t at, struct ip_packet *p)
{
    const uint8_t *ip = s.bytes + at;

    if (s.end - at < IPV4_HEADER || ip[0] >> 4 != 4)
        return false;
    uint32_t header = 4u * (ip[0] & 0xf), fragment = rss_big16(ip + 6) & 0x3fff; /* more of them, or an offset */
    if (header < IPV4_HEADER)
        return false;
    p->within.end = ends(s, at, rss_big16(ip + 2));
    p->source = p->home = ip + 12;
    p->destination = p->route = ip + 16;
    p->protocol = ip[9];
    if (!fragment && header <= p->within.end - at)
        p->transport = at + header;
    return true;
}

/* Look for the home address among `length` bytes of options. */
static void look_for_home(const uint8_t *options, uint32_t length, struct ip_packet *p)
{
    for (uint32_t at = 0; at < length;) {
        if (options[at] == PAD1) {
            at++;
            continue;
        }
        if (length - at < 2 || options[at + 1] > length - at - 2)
            return;
        if (options[at] == HOME_ADDRESS && options[at + 1] == IPV6_ADDRESS) {
            p->home = options + at + 2;
            return;
        }
        at += 2u + options[at + 1];
    }
}

/* RFC 6275, 6.4: a routing header of type 2 has one address, and it is still ahead. */
static void look_for_route(const uint8_t *header, uint32_t length, struct ip_packet *p)
{
    if (header[2] == 2 && header[3] == 1 && length == 8 + IPV6_ADDRESS)
        p->route = header + 8;
}

/* Follow the extension headers from `at` on. The transport header is noted, if it is reached. */
static void follow(struct ip_packet *p, uint32_t at)
{
    const uint8_t *bytes = p->within.bytes;

    for (;;) {
        const uint8_t *header = bytes + at;
        uint32_t left = p->within.end - at, length;
        switch (p->protocol) {
        case HOP_BY_HOP:
        case ROUTING:
        case DESTINATION:
        case MOBILITY:
        case HIP:
        case SHIM6:
        case FRAGMENT:
        case AUTHENTICATION:
            p->extended = true;
            if (left < 8)
                return;
            break;
        case ESP: /* what follows is encrypted */
            p->extended = true;
            return;
        default:
            p->transport = at;
            return;
        }
        length = p->protocol == AUTHENTICATION ? 4u * (header[1] + 2u) : 8u * (header[1] + 1u);
        if (p->protocol == FRAGMENT)
            length = 8;
        if (length > left)
            return;
        if (p->protocol == FRAGMENT && rss_big16(header + 2) & 0xfff9) /* an offset, or more of them */
            return;
        if (p->protocol == DESTINATION)
            look_for_home(header + 2, length - 2, p);
        if (p->protocol == ROUTING)
            look_for_route(header, length, p);
        p->protocol = header[0];
        at += length;
    }
}

static bool is_ipv6(struct seen s, uint32_t at, struct ip_packet *p)
{
    const uint8_t *ip = s.bytes + at;

    if (s.end - at < IPV6_HEADER || ip[0] >> 4 != 6)
        return false;
    uint32_t payload = rss_big16(ip + 4);
    p->within.end = ends(s, at, payload ? IPV6_HEADER + payload : 0);
    p->source = p->home = ip + 8;
    p->destination = p->route = ip + 24;
    p->protocol = ip[6];
    follow(p, at + IPV6_HEADER);
    return true;
}

bool rss_ip(struct seen s, uint32_t type, uint32_t at, struct ip_packet *p)
{
    *p = (struct ip_packet){.type = type, .within = s};
    if (at > s.end)
        return false;
    if (type == RSS_TYPE_IPV4)
        return is_ipv4(s, at, p);
    return type == RSS_TYPE_IPV6 && is_ipv6(s, at, p);
}
