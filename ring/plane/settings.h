/*
 * What a driver has set about what it receives: filters, hash, steering (virtio 1.2, 5.1.6.5 "Control Virtqueue"). Part
 * of the cffi definition, after fabric.h. receive.c tells what becomes of it.
 *
 * The settings are those of a member of a switch. They name doors, not queues: whoever makes them knows which
 * receiveq is behind which.
 */

/* Addresses that are told apart. Who wants more has to let all of their kind in. */
#define RECEIVE_MACS 64
/* Bytes of the key: it does for the longest input, two addresses and two ports of IPv6. */
#define RSS_KEY 40
/* Entries of the indirection table. */
#define RSS_TABLE 128
/* No door: what is sent there is lost, as `stopped`. */
#define RECEIVE_NO_DOOR 0xffff

/* Bits of receive_settings.modes. The first two say that there is a filter; the others, the modes of 5.1.6.5.1, mean
 * nothing without RECEIVE_BY_ADDRESS, but for RECEIVE_ALL. */
enum receive_mode {
    RECEIVE_BY_ADDRESS = 1,
    RECEIVE_BY_VLAN = 2,   /* tagged frames (802.1Q) with an id that is not in `vlan` are refused */
    RECEIVE_ALL = 4,       /* whatever the other bits say, RECEIVE_BY_VLAN too */
    RECEIVE_ALL_MULTICAST = 8,
    RECEIVE_ALL_UNICAST = 16,
    RECEIVE_NO_MULTICAST = 32, /* these three win over those before */
    RECEIVE_NO_UNICAST = 64,
    RECEIVE_NO_BROADCAST = 128
};

struct receive_settings {
    uint32_t modes;            /* enum receive_mode */
    uint32_t macs;             /* how many of mac there are */
    uint8_t mac[64][6];        /* [RECEIVE_MACS] addresses that are let in: the device's own, and the driver's tables */
    uint64_t vlan[64];         /* a bit for each of 4096 ids: id % 64 of vlan[id / 64] */

    uint32_t hash_types;       /* bits: VIRTIO_NET_RSS_HASH_TYPE_* (5.1.6.4.3); 0: no hash is made */
    uint32_t tunnel_types;     /* bits: VIRTIO_NET_HASH_TUNNEL_TYPE_* (virtio 1.3): frames whose inner header is hashed */
    uint8_t key[40];           /* [RSS_KEY] */

    uint32_t rss;              /* 1: the hash selects the door; 0: what belongs to one flow goes to one door */
    uint32_t mask;             /* entries of `table` less one; they are a power of two */
    uint16_t table[128];       /* [RSS_TABLE] doors */
    uint16_t unclassified;     /* the door of frames for which no hash is made */
};

/* Pure functions, as the switch uses them: is this frame, whose first `given` bytes are at `frame`, refused? -> 1 or 0 */
int receive_refuses(const struct receive_settings *s, const uint8_t *frame, uint32_t given);
/* -> VIRTIO_NET_HASH_REPORT_*, with the hash in *value; 0: none is made of it */
uint32_t receive_hash(const struct receive_settings *s, const uint8_t *frame, uint32_t given, uint32_t *value);
/* The Toeplitz hash of at most 36 bytes with this key of RSS_KEY bytes. */
uint32_t receive_toeplitz(const uint8_t *key, const uint8_t *input, uint32_t length);

/* What the driver of this member has set from now on; NULL: nothing. To be called while its lanes are detached. When it
 * returns, no frame is on its way to it that was looked at by what held before, unless nothing was set. -> RING_OK,
 * RING_E_NOMEM; RING_E_BUSY: a sender has been busy with frames for it for longer than timeout_ms, and is still. */
int member_receive(struct member *m, const struct receive_settings *s, int timeout_ms);
