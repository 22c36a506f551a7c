/*
 * The contract of the offloads done in software: checksums completed, frames cut into segments, for a receiver that
 * did not negotiate what the sender used (virtio 1.2, 5.1.6.2 and 5.1.6.4). Word for word part of the cffi
 * definition, after pump.h.
 *
 * Pure functions over the caller's memory: no ring, no lane, no allocation, no thread. What is looked at to decide
 * something has to be private: the first bytes of a frame, given as `headers`. Everything behind them is only added up,
 * so it may lie in guest memory, under the caller's guard, and in pieces. A guest that changes it between the sum and
 * the copy spoils the checksum of its own frame, no more.
 */

/* A frame's headers, from Ethernet to the end of TCP's or UDP's, end within so many bytes, or it is not segmented. It
 * is enough for two VLAN tags, IPv6 with 128 bytes of extension headers, and TCP with all options it can have. */
#define OFFLOAD_HEADERS 256
/* The longest header of a segment: an IPv6 fragment header may have come in. */
#define SEGMENT_HEADER_MAX 264

/* Why nothing can be done with a frame: what its net header claims does not fit what is in it. All but the last are
 * the sender's mistake, for the switch DROP_BAD_HEADER. */
enum offload_status {
    OFFLOAD_OK = 0,
    OFFLOAD_E_KIND = -1,      /* gso_type is none that is cut here */
    OFFLOAD_E_HEADERS = -2,   /* the headers end beyond the frame, or beyond OFFLOAD_HEADERS */
    OFFLOAD_E_ETHERTYPE = -3, /* not the IP that gso_type names, or more than two VLAN tags */
    OFFLOAD_E_IP = -4,        /* version, or lengths that do not fit each other or the frame */
    OFFLOAD_E_FRAGMENT = -5,  /* a fragment of a datagram: it has no transport header of its own */
    OFFLOAD_E_PROTOCOL = -6,  /* not the protocol that gso_type names, or behind an extension header that may not
                               * stand there or is not known */
    OFFLOAD_E_TRANSPORT = -7, /* TCP's data offset or UDP's length does not fit the datagram */
    OFFLOAD_E_CHECKSUM = -8,  /* csum_start and csum_offset are outside the headers or, of a frame to be cut, do not
                               * name its checksum; or, without NEEDS_CSUM, the end of an IPv6 route that the
                               * checksum covers is not known */
    OFFLOAD_E_SIZE = -9,      /* gso_size 0, or too large or small for what IP can name; or the frame longer than
                               * FRAME_ROOM */
    OFFLOAD_E_ROOM = -10      /* segmenter_write: the caller's buffer is too small */
};

/* --------------------------------------------------------------------------------------------- sums */

/* A running ones' complement sum of 16-bit words (RFC 1071), in memory order; begins as zeroes. */
struct offload_sum {
    uint64_t sum;
    uint32_t odd; /* 1 after an odd number of bytes: the next one is the second of its word */
};

/* Add `length` bytes. A range may be added in parts of any lengths. */
void offload_sum_add(struct offload_sum *s, const uint8_t *data, uint64_t length);

/* Complete the checksum of a frame with VIRTIO_NET_HDR_F_NEEDS_CSUM: over everything from csum_start to the frame's
 * end, the sum of the pseudo header being in the field already. `frame`: its first `given` bytes, in which the field
 * is written; `rest`: the sum of all bytes behind these, NULL where there are none. The protocol is not looked at: what
 * comes out as 0 is written as 0xffff, which is the same to each and does not say "none" to UDP (RFC 768).
 * -> OFFLOAD_OK; OFFLOAD_E_CHECKSUM when the field does not lie in `given`; nothing is written then. */
int offload_checksum(uint8_t *frame, uint32_t given, const struct offload_sum *rest, uint32_t csum_start,
                     uint32_t csum_offset);

/* ----------------------------------------------------------------------------------------- segments */

/* A frame on its way to become segments: the state between two of them. A caller reads nothing but what
 * segmenter_next puts into a struct segment; it needs no ending and may be dropped or copied at any time. */
struct segmenter {
    uint32_t left;      /* segments not handed out yet */
    uint32_t at, end;   /* the payload not handed out yet, [at, end) of the frame */
    uint32_t part;      /* payload bytes of the next segment, if it is not the last one */
    uint32_t size;      /* and of those behind it */
    uint32_t network;   /* in `header`, where these begin: IP */
    uint32_t transport; /* TCP or UDP */
    uint32_t length;    /* bytes of `header` */
    uint32_t repeated;  /* and of those that stand before every fragment, not only the first */
    uint32_t offset;    /* of the next fragment in its datagram, bytes */
    uint32_t sequence;  /* of the next TCP segment */
    uint32_t covered;   /* bytes the checksum in hand covers; 0: it has none */
    uint16_t id;        /* of the next IPv4 packet */
    uint16_t pseudo;    /* the sum of the pseudo header without the length, in memory order */
    uint8_t is_tcp, is_ipv6;
    uint8_t fragments;  /* 1: one datagram in fragments, 0: segments with a transport header each */
    uint8_t tcp_flags;  /* that the next segment may have */
    uint8_t header[264]; /* SEGMENT_HEADER_MAX */
};

/* One segment: a whole frame, made of `header_length` bytes at `header`, which are the segmenter's and stay until the
 * next one is made, and of bytes [payload_at, payload_at + payload_length) of the frame that is cut. */
struct segment {
    const uint8_t *header;
    uint32_t header_length;
    uint32_t payload_at;
    uint32_t payload_length;
    /* What has to be added up for the checksum in the header: bytes [sum_at, sum_at + sum_length) of the frame. It is
     * the payload, but for the first fragment of a UDP datagram everything behind its header, and for the others
     * nothing. */
    uint32_t sum_at;
    uint32_t sum_length;
};

/* Begin to cut a frame of `length` bytes whose first `given` ones are at `headers` (private; at least the smaller of
 * `length` and OFFLOAD_HEADERS of them; they are copied and may go). `h` has passed header_from_guest or came from
 * the kernel; of it are used gso_type, gso_size and, with NEEDS_CSUM, csum_start and csum_offset. hdr_len, a hint, is
 * not: the headers are read anew. A frame that fits into one segment becomes one, with its checksum completed.
 *
 *   GSO_TCPV4, GSO_TCPV6   TCP segments. Sequence numbers go on; FIN and PSH stay with the last one, CWR with the
 *                          first (RFC 3168, 6.1.2; with or without GSO_ECN).
 *   GSO_UDP_L4             UDP datagrams of gso_size bytes each, over IPv4 or IPv6.
 *   GSO_UDP                one UDP datagram in IP fragments of gso_size bytes, rounded down to eights, over IPv4 (with
 *                          DF, too) or IPv6 (RFC 791; RFC 8200, 4.5). `fragment_id` is then their identification over
 *                          IPv6, another one for each frame.
 *
 * Lengths and the IPv4 header checksum are made anew, the IPv4 identification counts up from segment to segment.
 * Options and extension headers stand in each segment; before each fragment IPv4's options and what RFC 8200 calls the
 * Per-Fragment headers. The checksum of TCP and UDP is always made, also without NEEDS_CSUM. What lies behind the IP
 * datagram, padding, is left out; an IP length of 0 means all of the frame.
 *
 * -> how many segments there will be, at least 1, or OFFLOAD_E_*. */
int segmenter_start(struct segmenter *s, const struct net_header *h, const uint8_t *headers, uint32_t given,
                    uint32_t length, uint32_t fragment_id);

/* Make the next segment's header, all but the checksum of TCP or UDP. -> 1; 0: there is no other, `out` is as it was. */
int segmenter_next(struct segmenter *s, struct segment *out);

/* Complete the header in hand; for every segment, `payload` being the sum of the bytes that its struct segment asks
 * for: zeroes where these are none. */
void segmenter_seal(struct segmenter *s, const struct offload_sum *payload);

/* segmenter_next and segmenter_seal for a frame that lies in one piece, the one that was given to segmenter_start: the
 * next segment, complete, in the `room` bytes at `to`, which may not overlap it.
 * -> its length; 0: there is no other; OFFLOAD_E_ROOM: it is longer than that, and lost. */
int segmenter_write(struct segmenter *s, const uint8_t *frame, uint8_t *to, uint32_t room);
