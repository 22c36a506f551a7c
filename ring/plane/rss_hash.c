/* The Toeplitz hash, and of which fields it is made (virtio 1.2, 5.1.6.4.3 "Hash calculation for incoming packets").
 *
 * Each bit of the input that is set adds 32 bits of the key, those that begin at the same place. What four bits add is
 * worked out once a key, so that a byte of the input costs two look-ups; the tables are as large as a tenth of a cache.
 */
#include "rss.h"

#define PROTOCOL_TCP 6
#define PROTOCOL_UDP 17
#define TCP_HEADER 20
#define UDP_HEADER 8
#define PORTS 4 /* bytes of both */

/* Bits of hash_types by number; a report is one more. */
enum { IPV4, TCPV4, UDPV4, IPV6, TCPV6, UDPV6, IP_EX, TCP_EX, UDP_EX };

/* 32 bits of the key from this one on. */
static uint32_t key_at(const uint8_t *key, uint32_t bit)
{
    uint64_t bits = 0;

    for (uint32_t i = 0; i < 5; i++) {
        uint32_t at = bit / 8 + i;
        bits = bits << 8 | (at < RSS_KEY ? key[at] : 0);
    }
    return (uint32_t)(bits >> (8 - bit % 8));
}

void toeplitz_init(struct toeplitz *t, const uint8_t *key)
{
    for (uint32_t nibble = 0; nibble < 2 * RSS_INPUT; nibble++)
        for (uint32_t value = 0; value < 16; value++) {
            uint32_t sum = 0;
            for (uint32_t bit = 0; bit < 4; bit++)
                if (value & 8u >> bit)
                    sum ^= key_at(key, 4 * nibble + bit);
            t->of[nibble][value] = sum;
        }
}

uint32_t toeplitz_hash(const struct toeplitz *t, const uint8_t *input, uint32_t length)
{
    uint32_t hash = 0;

    for (uint32_t i = 0; i < length; i++)
        hash ^= t->of[2 * i][input[i] >> 4] ^ t->of[2 * i + 1][input[i] & 0xf];
    return hash;
}

static bool has_header(const struct ip_packet *p, uint32_t protocol, uint32_t length)
{
    return p->transport && p->protocol == protocol && p->within.end - p->transport >= length;
}

/* Of three types that begin with `ip`: the first that is on and has its header. -> its number, or -1 */
static int choose(const struct ip_packet *p, uint32_t hash_types, int ip)
{
    bool tcp = has_header(p, PROTOCOL_TCP, TCP_HEADER), udp = has_header(p, PROTOCOL_UDP, UDP_HEADER);

    if (tcp && hash_types >> (ip + 1) & 1)
        return ip + 1;
    if (udp && hash_types >> (ip + 2) & 1)
        return ip + 2;
    return hash_types >> ip & 1 ? ip : -1;
}

static uint32_t append(uint8_t *input, uint32_t at, const uint8_t *bytes, uint32_t count)
{
    memcpy(input + at, bytes, count);
    return at + count;
}

static uint32_t hash_packet(const struct toeplitz *t, uint32_t hash_types, const struct ip_packet *p, uint32_t *value)
{
    bool is_ipv6 = p->type == RSS_TYPE_IPV6;
    uint32_t address = is_ipv6 ? 16 : 4, length = 0;
    uint8_t input[RSS_INPUT];
    int type = is_ipv6 && p->extended ? choose(p, hash_types, IP_EX) : -1;

    if (type < 0)
        type = choose(p, hash_types, is_ipv6 ? IPV6 : IPV4);
    if (type < 0)
        return 0;
    length = append(input, length, type >= IP_EX ? p->home : p->source, address);
    length = append(input, length, type >= IP_EX ? p->route : p->destination, address);
    if (type % 3)
        length = append(input, length, p->within.bytes + p->transport, PORTS);
    *value = toeplitz_hash(t, input, length);
    return (uint32_t)type + 1;
}

uint32_t rss_hash(const struct toeplitz *t, uint32_t hash_types, uint32_t tunnel_types, struct seen s, uint32_t *value)
{
    uint32_t at = 0;
    struct ip_packet outer, inner;
    uint32_t type = rss_ethernet(s, &at);

    *value = 0;
    if (!type || !rss_ip(s, type, at, &outer))
        return 0;
    int inside = tunnel_types ? rss_inner(&outer, tunnel_types, &inner) : 0;
    if (inside < 0)
        return 0;
    return hash_packet(t, hash_types, inside ? &inner : &outer, value);
}
