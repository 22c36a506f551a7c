/*
 * The contract of the fd pump: a worker thread that moves frames between virtqueues and file
 * descriptors. Word for word part of the cffi definition, like core/ring.h.
 *
 * A lane is one queue pair joined to one queue of a port; or one of its directions, the other queue left out. It belongs to exactly one side at a time:
 * to its pump while attached, to the caller while detached. Only a detached lane may be configured,
 * and its virtqueues answer step calls only then. Frames have a virtio_net_hdr of 12 bytes on the
 * guest's side, and `port_header` bytes (12 or 0) on the port's.
 */

/* The numbers of the data plane that the step engine (vdev/step.py) shares. Bytes, unless said otherwise. */
#define NET_HEADER 12
#define ETHERNET_HEADER 14
/* Largest frame with its header that a port can hand us. */
#define FRAME_ROOM 66048
/* What the next frame is taken to need, with its header, after an ordinary one and after a longer one. */
#define SMALL_FRAME 1526
#define LARGE_FRAME 65562
/* A burst ends, and becomes visible, after so many frames or so much to the guest, which then works while we go
 * on; a direction yields after so many bursts. */
#define BURST_FRAMES 64
#define BURST_BYTES 262144
#define BURSTS 4

struct pump; /* one worker thread */
struct lane; /* one queue pair at one port, or one direction of it */

/* Why a frame was lost. Each lost frame is counted in exactly one of these. */
enum drop_reason {
    DROP_BAD_CHAIN = 0,     /* the chain broke a rule of the ring */
    DROP_BAD_HEADER = 1,    /* the net header is inconsistent or uses what was not negotiated */
    DROP_BAD_LENGTH = 2,    /* shorter than an Ethernet header, or longer than a frame can be */
    DROP_DISABLED = 3,      /* the queue is disabled: consumed and discarded as the protocol demands */
    DROP_PORT = 4,          /* the port refused the frame (link down, EINVAL, short write) */
    DROP_NO_PORT = 5,       /* the port is gone */
    DROP_TOO_SMALL = 6,     /* the guest's buffers are too small for the frame */
    DROP_OFFLOAD = 7,       /* the frame needs an offload the guest did not negotiate; not at a switch */
    DROP_NULL = 8,          /* the port is null: */
    /* A switch (fabric.h). Those of the sender: what is left over went to the switch. */
    DROP_FILTERED = 9,      /* no switch forwards it: from a group address, to a bridge, or to where it came from */
    DROP_NO_RECEIVER = 10,  /* no other member of the switch is up */
    /* Those of a receiver: each frame that a sender counts as gone to the switch is, for every member that was to get
     * it, either a frame to the guest or lost for one of these reasons, or one of the older ones. One that is cut into
     * segments for the receiver counts there as so many; one that cannot be cut is a DROP_BAD_HEADER. */
    DROP_BUSY = 11,         /* others were sending to the same receiveq for too long */
    DROP_NO_BUFFERS = 12,   /* the guest has posted too few buffers, or the uplink takes no more for now */
    DROP_STOPPED = 13,      /* the receiveq stands still: paused, broken, or it waits for a translation */
    DROP_UNWANTED = 14,     /* the guest's own receive filter refuses it */
    DROP_REASONS = 15
};

/* One direction's counters since the lane was made; only ever grow. */
struct flow_stats {
    uint64_t frames;
    uint64_t bytes;          /* without the net header */
    uint64_t gso_frames;
    uint64_t dropped[15];    /* by enum drop_reason */
    uint64_t bad_chains;     /* returned with length 0 because they broke a rule */
    uint64_t kicks;          /* wake-ups by the driver */
    uint64_t calls;          /* notifications sent to the driver */
    uint64_t calls_saved;    /* publications that needed none */
    uint64_t bursts;         /* times the ring was served */
    uint64_t cycles;         /* of the processor's time stamp counter, while serving the ring got something done; 0
                              * where there is none that is cheap to read */
};

/* What the headers of the frames said that are counted in flow_stats.frames; counted at a switch only. */
struct header_stats {
    uint64_t needs_csum; /* a checksum is left to the receiver */
    uint64_t data_valid; /* it was validated */
    uint64_t gso_bytes;  /* of the frames that are to be segmented, without the net header */
};

struct lane_stats {
    struct flow_stats from_guest;
    struct flow_stats to_guest;
    struct header_stats from_guest_headers;
    struct header_stats to_guest_headers;
};

/* What happened that the control plane has to know. Bits of lane_events(). */
enum lane_event {
    LANE_FROM_GUEST_BROKEN = 1, /* vq_state() of that queue tells the rule */
    LANE_TO_GUEST_BROKEN = 2,
    LANE_MEMORY_GONE = 4,       /* guest memory vanished: the device must be closed */
    LANE_PORT_GONE = 8,
    LANE_KICKED = 16,           /* a kick came while watch_kicks was set */
    LANE_LOG_GONE = 32,         /* the dirty log vanished: the device must be closed */
    LANE_MISS = 64,             /* a queue waits for a translation, vq_missing() tells which; it is looked at again
                                 * when the lane is attached anew */
    LANE_DENIED = 128           /* a chain was dropped for the IOMMU's sake, vq_denied() tells why */
};

struct flow_config {
    struct vq *queue;  /* NULL: not started */
    int32_t enabled;
    int32_t kick;      /* eventfds, -1 for none; they stay the caller's. A started queue with kick -1 is polled */
    int32_t call;
    int32_t err;
    /* A call is put off until so many frames have been made used, or so many microseconds have passed since the first of
     * them, whichever comes first. 0 in both: no call is put off; they are 0 both or neither. */
    uint32_t call_packets;
    uint32_t call_usecs;
};

struct lane_config {
    struct flow_config from_guest; /* transmitq */
    struct flow_config to_guest;   /* receiveq */
    struct member *member;         /* of a switch, to which frames from the guest go and from which those to it come;
                                    * to_port and from_port are -1 then, or the queues NULL: an uplink, whose
                                    * from_guest is what was read and whose to_guest is what was written.
                                    * NULL: no switch */
    int32_t door;                  /* of the member: where to_guest is found; -1: it gets nothing */
    int32_t to_port;               /* descriptor written, -1: discard */
    int32_t from_port;             /* descriptor read, -1: nothing comes */
    uint32_t port_header;
    uint32_t max_frame;            /* bytes without header */
    uint32_t gso_size_min;         /* smaller segment sizes from the guest are refused */
    uint32_t mtu;                  /* frames to the guest without GSO are no longer than this and their
                                    * Ethernet header; 0: no limit (MTU was not negotiated) */
    int32_t watch_kicks;           /* report kicks, even of a queue that is not started */
    uint64_t features;             /* negotiated */
};

/* struct virtio_net_hdr, as it lies before every frame (virtio 1.2, 5.1.6). Both checks work on a private copy;
 * the guest's bytes are never handed on. */
struct net_header {
    uint8_t flags;
    uint8_t gso_type;
    uint16_t hdr_len;     /* a hint, never relied upon */
    uint16_t gso_size;
    uint16_t csum_start;
    uint16_t csum_offset;
    uint16_t num_buffers;
};

/* Check what the driver said about its frame of `length` bytes and make it fit for the kernel: unknown
 * flags dropped, hdr_len no longer than the frame, num_buffers zero.
 * -> 0, or the enum drop_reason DROP_BAD_HEADER. */
int header_from_guest(struct net_header *h, uint64_t length, uint64_t features, uint32_t gso_size_min);

/* Make a port's header fit for the driver: what it did not negotiate is taken out where that changes
 * nothing, num_buffers becomes 1. -> 0, or DROP_OFFLOAD when the frame needs what is missing. */
int header_to_guest(struct net_header *h, uint64_t features);

#define POLL_ALWAYS 0xffffffff

/* How a worker lives. */
struct pump_config {
    int32_t cpu;      /* the processor it runs on, -1: any */
    uint32_t poll_us; /* microseconds to look at the rings after the last work, before it sleeps, at most: it adapts.
                       * 0: it sleeps at once. POLL_ALWAYS: while it has a lane it never sleeps. No driver is asked for
                       * kicks meanwhile */
};

/* -> NULL with errno: EINVAL where the thread may not run on that processor. */
struct pump *pump_new(const struct pump_config *config);
/* All lanes must be detached. Waits for the thread to end. */
void pump_free(struct pump *p);
/* For a worker that did not answer in time: it touches no lane again once it is through with the burst it is in, and
 * ends. Its lanes stay attached; neither they nor `p` may ever be freed or used. */
void pump_give_up(struct pump *p);

/* `report` is an eventfd of the caller, written when the lane has events; -1: none. */
struct lane *lane_new(int report);
void lane_free(struct lane *l);
/* -> RING_OK, RING_E_BUSY when attached. */
int lane_configure(struct lane *l, const struct lane_config *config);
void lane_stats_get(const struct lane *l, struct lane_stats *out);
/* The source address (6 bytes) of a frame that the guest has sent lately, and forgets it; not while attached. -> 1,
 * or 0: none is known. */
int lane_guest_mac(struct lane *l, uint8_t *mac);
/* The events since the last call, and forgets them. */
uint32_t lane_events(struct lane *l);

/* The frame that waits in a detached lane for buffers of the guest, behind its net header: `out` has room for
 * FRAME_ROOM bytes. -> its length with the header; 0: none waits; RING_E_BUSY. */
int lane_held(const struct lane *l, uint8_t *out);
/* Have a frame wait so, in place of what waits now: with the header more than NET_HEADER and at most FRAME_ROOM bytes.
 * -> RING_OK, RING_E_BUSY. */
int lane_hold(struct lane *l, const uint8_t *frame, uint32_t length);

/* Hand over; each queue is looked at once without a kick and its driver is called once.
 * -> RING_OK, RING_E_NOMEM, or RING_E_BUSY when it is attached or the worker does not answer within timeout_ms (the lane
 * then stays the pump's). Lanes of one pump have no port descriptor in common. */
int pump_attach(struct pump *p, struct lane *l, int timeout_ms);
/* Take back: returns when the worker has left the lane and given back what it had popped.
 * -> RING_OK, or RING_E_BUSY when that takes longer than timeout_ms (the lane then stays the pump's). */
int pump_detach(struct pump *p, struct lane *l, int timeout_ms);
