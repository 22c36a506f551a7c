/*
 * What may stand in a virtio_net_hdr depends on these features (virtio 1.2, 5.1.3 "Feature bits"). The header and
 * its two checks are part of the contract: pump.h.
 */
#pragma once

#include <stdbool.h>
#include <string.h>

#include "include.h"

/* The numbers of the features that decide what a header may say. */
#define NET_F_CSUM 0
#define NET_F_GUEST_CSUM 1
#define NET_F_GUEST_TSO4 7
#define NET_F_GUEST_TSO6 8
#define NET_F_GUEST_ECN 9
#define NET_F_GUEST_UFO 10
#define NET_F_HOST_TSO4 11
#define NET_F_HOST_TSO6 12
#define NET_F_HOST_ECN 13
#define NET_F_HOST_UFO 14
#define NET_F_MRG_RXBUF 15
#define NET_F_GUEST_USO4 54
#define NET_F_GUEST_USO6 55
#define NET_F_HOST_USO 56
#define NET_F_HASH_REPORT 57

/* What flags and gso_type may hold (virtio 1.2, 5.1.6). */
#define F_NEEDS_CSUM 1
#define F_DATA_VALID 2
#define GSO_NONE 0
#define GSO_TCPV4 1
#define GSO_UDP 3
#define GSO_TCPV6 4
#define GSO_UDP_L4 5
#define GSO_ECN 0x80

/* Does the header say nothing at all? Then both checks would leave it as it is, but for the number of buffers. */
static inline bool header_is_zero(const struct net_header *h)
{
    uint64_t low;
    uint32_t high;

    memcpy(&low, h, sizeof(low));
    memcpy(&high, (const uint8_t *)h + sizeof(low), sizeof(high));
    return (low | high) == 0;
}

_Static_assert(sizeof(struct net_header) == NET_HEADER, "as the specification lays it out");
