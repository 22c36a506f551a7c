/* The hash by which a receiveq is selected, and which bytes of a packet go into it. Pure functions over private
 * memory: rss_hash.c, rss_fields.c, rss_tunnel.c. */
#pragma once

#include <stdbool.h>
#include <string.h>

#include "include.h"

/* The longest input: two addresses and two ports of IPv6. */
#define RSS_INPUT 36
/* A packet is looked into so far, with inner headers and without. What does not end there is not there. Both are
 * enough for two VLAN tags and, of IPv6, some 160 bytes of extension headers. */
#define RSS_LOOK 256
#define RSS_LOOK_INNER 640

#define RSS_TYPE_IPV4 0x0800
#define RSS_TYPE_IPV6 0x86dd

/* A key, prepared: what each half byte of the input adds. */
struct toeplitz {
    uint32_t of[2 * RSS_INPUT][16];
};

/* `key`: RSS_KEY bytes. */
void toeplitz_init(struct toeplitz *t, const uint8_t *key);
uint32_t toeplitz_hash(const struct toeplitz *t, const uint8_t *input, uint32_t length);

/* The first bytes of a frame, as far as they are looked into. */
struct seen {
    const uint8_t *bytes;
    uint32_t end;
};

/* An IP packet. Addresses point into what was seen. */
struct ip_packet {
    uint32_t type;              /* RSS_TYPE_* */
    const uint8_t *source, *destination;
    const uint8_t *home, *route; /* IPv6: what stands in their place in extension headers, or they themselves */
    bool extended;              /* IPv6: there are extension headers */
    uint32_t protocol;          /* that of the header at `transport` */
    uint32_t transport;         /* 0: that is not there: a fragment, or headers that end beyond what was seen */
    struct seen within;         /* what was seen, up to the packet's end */
};

/* Where the network header of a frame begins that begins at `at`, behind VLAN tags. -> the Ethertype there; 0: the frame
 * ends before */
uint32_t rss_ethernet(struct seen s, uint32_t *at);
/* The packet at `at`. -> false: none of this `type`, which is an Ethertype, is there */
bool rss_ip(struct seen s, uint32_t type, uint32_t at, struct ip_packet *p);
/* Is `outer` of an encapsulation that is one of `tunnel_types`? Then the packet inside is looked for.
 * -> 1: `inner` is it; 0: it is not; -1: it is, but has no IP packet inside. */
int rss_inner(const struct ip_packet *outer, uint32_t tunnel_types, struct ip_packet *inner);

/* Hash a frame whose first bytes were seen (virtio 1.2, 5.1.6.4.3). -> VIRTIO_NET_HASH_REPORT_*, with *value; 0: none
 * of the types that are on says so */
uint32_t rss_hash(const struct toeplitz *t, uint32_t hash_types, uint32_t tunnel_types, struct seen s, uint32_t *value);

static inline uint32_t rss_big16(const uint8_t *at)
{
    return (uint32_t)at[0] << 8 | at[1];
}
