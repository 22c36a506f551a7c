/* Frames on their way through a switch, and the switch as its C files see it. */
#pragma once

#include "lane.h"
#include "receive.h"
#include "table.h"

#define HEAD_BYTES (NET_HEADER + ETHERNET_HEADER)
#define UPLINK_ROOM (BURST_BYTES + FRAME_ROOM) /* a burst ends when the next frame might not fit */
/* Room for one chain of any shape; a burst ends when the next one might not fit. */
#define BATCH_PIECES (2 * (RING_PIECES_MAX + 1))

_Static_assert(BURST_FRAMES == 64, "the frames of a batch are the bits of a word");
_Static_assert(FABRIC_MEMBERS == 64, "so are the members of a fabric");

/* One frame. What decides over it is read once, into `head`; the rest stays where the sender has it. */
struct frame {
    union {
        uint8_t head[HEAD_BYTES];
        struct {
            struct net_header header; /* checked */
            uint8_t ethernet[ETHERNET_HEADER];
        };
    };
    uint32_t chain_head; /* the chain it came in, to be given back; not of an uplink's */
    uint32_t slots;
    struct piece *pieces; /* of the frame without its net header; pieces[-1] is free for one */
    uint32_t count;
    uint32_t length; /* bytes in them */
    uint32_t flow;   /* a hash that all frames of one flow have in common */
    struct hash_header hash; /* for the member in hand; zeroes: none was made, as for most members */
    bool writable;   /* the chain has device-writable buffers */
    bool lost;       /* counted; the chain goes back all the same */
};

/* One burst of a sender. It belongs to the worker of the lane. */
struct batch {
    uint32_t count;
    uint32_t used;                 /* of pool */
    uint64_t source, destination;  /* addresses of the frame routed last, ~0: none: most follow one of their kind */
    uint64_t chosen;               /* bits: who got it; or... */
    int why_none;                  /* ...the enum drop_reason for which nobody did */
    uint64_t members;              /* bits: who gets any of the frames */
    uint64_t to[FABRIC_MEMBERS];   /* bits: which of the frames; all zero between two bursts */
    struct sorting sorting;        /* for the member in hand */
    struct frame frames[BURST_FRAMES];
    struct piece pool[BATCH_PIECES];
    uint8_t room[];                /* [UPLINK_ROOM] of an uplink */
};

/* A receiveq, or the descriptor of an uplink, as senders find it. */
struct door {
    uint32_t users;    /* atomic: who is inside; a receiveq lets in one at a time */
    uint32_t stuck;    /* atomic: somebody could not get in in time, and nobody has since */
    struct lane *lane; /* atomic: NULL: closed */
    uint64_t busy, stopped; /* atomic: frames lost before they came in */
    uint8_t line[32]; /* senders at other doors shall not share this one's cache line */
};
_Static_assert(sizeof(struct door) == 64, "a cache line");

struct member {
    struct fabric *fabric;
    uint32_t number;
    uint32_t spread; /* atomic: doors that flows are spread over; 0: down */
    bool uplink;     /* atomic */
    struct receiver *receiver; /* atomic: what its driver has set; NULL: nothing */
    uint32_t users;            /* atomic: senders that are looking at that, or have what it lets in in hand */
    uint64_t unwanted;         /* atomic: frames that it refuses */
    struct door doors[FABRIC_DOORS] __attribute__((aligned(64)));
};

struct fabric {
    struct table table;
    uint64_t up;     /* atomic, bits: members that get frames */
    uint64_t spread; /* atomic, bits: those with several doors */
    uint64_t taken;  /* bits, the control thread's */
    bool is_wire;    /* learns nothing and passes everything on */
    struct member members[FABRIC_MEMBERS];
};

static inline void count_header(struct header_stats *stats, const struct net_header *h, uint64_t length)
{
    if (likely(!(h->flags | h->gso_type)))
        return;
    stats->needs_csum += (h->flags & F_NEEDS_CSUM) != 0;
    stats->data_valid += (h->flags & F_DATA_VALID) != 0;
    stats->gso_bytes += h->gso_type ? length : 0;
}

/* A new burst begins: the batch is empty. */
void fabric_begin(struct batch *b);

/* Decide who gets frame `i` of a batch, and note it there; callers hold a guard over its pieces. -> 0, or the enum
 * drop_reason for which nobody does. */
int fabric_route(const struct member *from, struct batch *b, uint32_t i);

/* Hand the frames of the lane's batch to whom they were routed; callers hold no guard. -> false: the sender's memory
 * vanished. */
bool fabric_deliver(const struct lane *from);

/* Be a door's only user, if that can be had soon. -> false: it cannot */
bool door_enter(struct door *d);
void door_leave(struct door *d);

/* Take frames of the lane's batch through one door; `shared`: an uplink's. -> false: the sender's memory vanished */
bool fabric_through(struct door *d, const struct lane *from, uint64_t frames, bool shared);

/* Nobody gets the frames of this batch. */
void fabric_discard(struct batch *b);

/* A burst from an uplink's descriptor; and frames of `b` to it, which holds its door. -> false: memory vanished */
void uplink_read(struct lane *l);
bool uplink_write(struct lane *l, struct batch *b, uint64_t frames);

/* See flow_hash.c. */
uint32_t flow_hash(const struct piece *pieces, uint32_t count, uint32_t length);
