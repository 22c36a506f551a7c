/* Which frames belong together: those of one flow have one hash, whatever lies between.
 *
 * A receiver with several receiveqs gets the frames of a flow on one of them, in their order (virtio 1.2, 5.1.6.5.5
 * asks for no more). A flow is two IP addresses with, for TCP and UDP, their ports; fragments have none behind the
 * first, so all of them go by addresses. Anything else goes by its two MAC addresses.
 *
 * What a frame claims of itself only spreads it: nothing here is relied upon but the length of what was copied.
 */
#include "batch.h"

#define VLAN_TAG 4
#define TYPE_IPV4 0x0800
#define TYPE_IPV6 0x86dd
#define TYPE_VLAN 0x8100
#define TYPE_VLAN_OUTER 0x88a8
#define PROTOCOL_TCP 6
#define PROTOCOL_UDP 17
#define PORTS 4 /* bytes of both */

/* Two tags, the longest IPv4 header, ports */
#define LOOK (ETHERNET_HEADER + 2 * VLAN_TAG + 60 + PORTS)

static uint32_t big16(const uint8_t *at)
{
    return (uint32_t)at[0] << 8 | at[1];
}

static uint32_t mix(uint32_t hash, const uint8_t *bytes, uint32_t count)
{
    while (count >= 4) {
        uint32_t word;
        memcpy(&word, bytes, sizeof(word));
        hash = (hash ^ word) * 0x9E3779B1u;
        hash ^= hash >> 15;
        bytes += 4;
        count -= 4;
    }
    return hash;
}

uint32_t flow_hash(const struct piece *pieces, uint32_t count, uint32_t length)
{
    uint8_t seen[LOOK] = {0};
    uint32_t got = (uint32_t)pieces_copy(pieces, count, 0, seen, length < LOOK ? length : LOOK, false);
    uint32_t at = ETHERNET_HEADER;
    uint32_t type = big16(seen + 12);

    for (int tags = 0; tags < 2 && (type == TYPE_VLAN || type == TYPE_VLAN_OUTER); tags++) {
        type = big16(seen + at + 2);
        at += VLAN_TAG;
    }
    const uint8_t *ip = seen + at;
    uint32_t addresses = 0, bytes = 0, ports = 0, protocol = 0;
    if (type == TYPE_IPV4 && at + 20 <= got) {
        addresses = 12;
        bytes = 8;
        protocol = ip[9];
        if (!(big16(ip + 6) & 0x3fff)) /* no fragment: neither more of them nor an offset */
            ports = 4u * (ip[0] & 0xf);
    } else if (type == TYPE_IPV6 && at + 40 <= got) {
        addresses = 8;
        bytes = 32;
        protocol = ip[6];
        ports = 40;
    }
    if (!bytes)
        return mix(mix(0, seen, 4), seen + 4, 8);
    uint32_t hash = mix(protocol, ip + addresses, bytes);
    if (ports && (protocol == PROTOCOL_TCP || protocol == PROTOCOL_UDP) && at + ports + PORTS <= got)
        hash = mix(hash, ip + ports, PORTS);
    return hash;
}
