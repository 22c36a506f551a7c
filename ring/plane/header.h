/*
 * struct virtio_net_hdr as it lies before every frame (virtio 1.2, 5.1.6 "Device Operation"): its layout,
 * and what may stand in it. Both functions work on a private copy; the guest's bytes are never handed on.
 */
#pragma once

#include <stdint.h>

#define NET_HEADER 12
#define ETHERNET_HEADER 14

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

struct net_header {
    uint8_t flags;
    uint8_t gso_type;
    uint16_t hdr_len;     /* a hint, never relied upon */
    uint16_t gso_size;
    uint16_t csum_start;
    uint16_t csum_offset;
    uint16_t num_buffers;
};
_Static_assert(sizeof(struct net_header) == NET_HEADER, "as the specification lays it out");

/* Check what the driver said about its frame of `length` bytes and make it fit for the kernel: unknown
 * flags dropped, hdr_len no longer than the frame, num_buffers zero.
 * -> 0, or the enum drop_reason DROP_BAD_HEADER. */
int header_from_guest(struct net_header *h, uint64_t length, uint64_t features, uint32_t gso_size_min);

/* Make a port's header fit for the driver: what it did not negotiate is taken out where that changes
 * nothing, num_buffers becomes 1. -> 0, or DROP_OFFLOAD when the frame needs what is missing. */
int header_to_guest(struct net_header *h, uint64_t features);
