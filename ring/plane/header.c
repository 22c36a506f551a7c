/* What may stand in a virtio_net_hdr, both ways. See pump.h. */
#include <stdbool.h>

#include "header.h"

static bool has(uint64_t features, unsigned bit)
{
    return features >> bit & 1;
}

/* 5.1.6.2: which feature of the guest allows it to send a frame of this kind */
static bool may_send(uint8_t kind, uint64_t features)
{
    switch (kind) {
    case GSO_TCPV4:
        return has(features, NET_F_HOST_TSO4);
    case GSO_TCPV6:
        return has(features, NET_F_HOST_TSO6);
    case GSO_UDP:
        return has(features, NET_F_HOST_UFO);
    case GSO_UDP_L4:
        return has(features, NET_F_HOST_USO);
    default:
        return false;
    }
}

/* 5.1.6.4: which feature of the guest allows us to hand it such a frame */
static bool may_receive(uint8_t kind, uint64_t features)
{
    switch (kind) {
    case GSO_TCPV4:
        return has(features, NET_F_GUEST_TSO4);
    case GSO_TCPV6:
        return has(features, NET_F_GUEST_TSO6);
    case GSO_UDP:
        return has(features, NET_F_GUEST_UFO);
    case GSO_UDP_L4: /* the header does not tell IPv4 from IPv6: both or none */
        return has(features, NET_F_GUEST_USO4) && has(features, NET_F_GUEST_USO6);
    default:
        return false;
    }
}

int header_from_guest(struct net_header *h, uint64_t length, uint64_t features, uint32_t gso_size_min)
{
    uint8_t kind = h->gso_type & (uint8_t)~GSO_ECN;

    h->flags &= F_NEEDS_CSUM; /* 5.1.6.2.2: MUST ignore flags it does not know; DATA_VALID says nothing here */
    h->num_buffers = 0;
    if (h->hdr_len > length)
        h->hdr_len = (uint16_t)length;
    if (h->flags & F_NEEDS_CSUM) {
        if (!has(features, NET_F_CSUM) || h->csum_start < ETHERNET_HEADER ||
            (uint64_t)h->csum_start + h->csum_offset + 2 > length)
            return DROP_BAD_HEADER;
    } else {
        h->csum_start = h->csum_offset = 0; /* 5.1.6.2.2: MUST NOT be used */
    }
    if (h->gso_type == GSO_NONE) {
        h->gso_size = 0;
        return 0;
    }
    if (!may_send(kind, features) || (h->gso_type & GSO_ECN && !has(features, NET_F_HOST_ECN)))
        return DROP_BAD_HEADER;
    /* A tiny segment size would make the kernel cut one frame into thousands. */
    if (h->gso_size < gso_size_min || h->gso_size == 0)
        return DROP_BAD_HEADER;
    return 0;
}

int header_to_guest(struct net_header *h, uint64_t features)
{
    uint8_t kind = h->gso_type & (uint8_t)~GSO_ECN;

    h->flags &= F_NEEDS_CSUM | F_DATA_VALID;
    h->num_buffers = 1;
    if (!has(features, NET_F_GUEST_CSUM)) {
        if (h->flags & F_NEEDS_CSUM)
            return DROP_OFFLOAD;
        h->flags = 0; /* 5.1.6.4.1: MUST be zero then */
    }
    if (!(h->flags & F_NEEDS_CSUM))
        h->csum_start = h->csum_offset = 0;
    if (h->gso_type == GSO_NONE) {
        h->gso_size = h->hdr_len = 0;
        return 0;
    }
    if (!may_receive(kind, features) || (h->gso_type & GSO_ECN && !has(features, NET_F_GUEST_ECN)))
        return DROP_OFFLOAD;
    return 0;
}
