/*
 * The contract of the load generator: a driver's half of one virtqueue as a thread in C, which sends
 * or receives stamped frames as fast as the device lets it and checks everything the device does. Word for
 * word the cffi definition of its module ring._driver (ring/_build_driver.py), so only declarations.
 * Never part of a daemon.
 *
 * A frame, behind its 12-byte virtio_net_hdr:
 *     prefix      the caller's, an Ethernet header at least; a frame with another one is foreign
 *     stamp       16 bytes: sequence number (u64), length (u32), checksum of both (u32)
 *     body        up to the frame's length; computed from the sequence number when `full` is set
 */

enum driver_role {
    DRIVER_TRANSMIT = 0, /* send `frames` frames on a transmitq */
    DRIVER_RECEIVE = 1   /* keep a receiveq full and check what arrives */
};

/* What the device did wrong, by kind; the first five end the thread, for nothing after them has meaning. */
enum driver_error {
    DRIVER_E_AHEAD = 0,    /* used.idx ahead of ours by more than the queue size; packed: flags out of turn */
    DRIVER_E_HEAD = 1,     /* a used element names a chain that is not outstanding */
    DRIVER_E_LENGTH = 2,   /* used.len larger than the buffer, or not 0 on a transmitq, or less than a header;
                            * packed: a length without WRITE, or WRITE without a length */
    DRIVER_E_MERGE = 3,    /* num_buffers 0, or more than 1 without MRG_RXBUF, or more than were used */
    DRIVER_E_STALL = 4,    /* no progress within stall_ms: a lost kick, or a device that stands still */
    DRIVER_E_CALL = 5,     /* used chains waited and the call that was due did not come */
    DRIVER_E_STAMP = 6,    /* the checksum or the length is wrong */
    DRIVER_E_BODY = 7,     /* the body is not the one that belongs to the sequence number */
    DRIVER_E_ORDER = 8,    /* a sequence number seen before: repeated or reordered */
    DRIVER_E_EVENT = 9,    /* packed: the device event suppression structure means nothing */
    DRIVER_ERRORS = 10
};

struct driver;

struct driver_config {
    int32_t role;        /* enum driver_role */
    uint32_t size;       /* descriptors; of a split ring a power of two */
    uint32_t base;       /* where both sides start, as SET_VRING_BASE encodes it (packed: the low half counts) */
    uint64_t features;   /* negotiated; RING_PACKED, IN_ORDER, EVENT_IDX and MRG_RXBUF matter */
    uint8_t *desc;       /* the ring's parts, where this process has them */
    uint8_t *avail;      /* packed: the driver's and... */
    uint8_t *used;       /* ...the device's event suppression structure */
    uint8_t *area;       /* buffers, driver_area_bytes() long */
    uint64_t area_gpa;   /* where the device finds them */
    int32_t kick;        /* eventfds; they stay the caller's */
    int32_t call;

    uint64_t frames;     /* to send or to receive; 0: until stopped */
    uint32_t frame_bytes;  /* sent: length of a frame; received: room of one buffer without the header */
    uint32_t batch;      /* sent: frames made visible at once */
    uint32_t pieces;     /* descriptors of a frame, 1 to DRIVER_PIECES_MAX; 2 or more: the header has its own */
    int32_t indirect;    /* put them into an indirect table */
    int32_t busy_poll;   /* never sleep, ask for no calls */
    int32_t full;        /* write, or check, the whole body */
    uint32_t stall_ms;
    uint32_t interval_ns;   /* sent: from one batch to the next; 0: as fast as the device takes them */
    struct driver *partner; /* sent with an interval: a receiving driver that is not started itself, or NULL. This thread
                             * takes its frames while it waits, asks for calls as a driver does that sleeps, and notes
                             * how long each frame was on its way */
    uint8_t header[12];  /* the virtio_net_hdr that is sent */
    uint8_t prefix[64];
    uint32_t prefix_bytes; /* 14 to 64 */
};

#define DRIVER_PIECES_MAX 16
#define DRIVER_LATENCIES 1024

/* Only ever grow; may be read while the thread runs. */
struct driver_stats {
    uint64_t frames;       /* sent and used by the device, or received and right */
    uint64_t bytes;        /* of these, without the net header */
    uint64_t lost;         /* sequence numbers that never came */
    uint64_t foreign;      /* received frames that are not ours */
    uint64_t buffers;      /* chains the device has used */
    uint64_t publications; /* stores of avail.idx; packed: of flags that had been held back */
    uint64_t kicks;        /* notifications sent */
    uint64_t calls;        /* notifications received */
    uint64_t sleeps;
    uint64_t errors[10];   /* by enum driver_error */
};

/* Bytes of guest memory for the buffers (and indirect tables) of this configuration. */
uint64_t driver_area_bytes(const struct driver_config *config);
/* -> NULL with errno EINVAL: a number out of its range, or a frame too short for prefix and stamp; ENOMEM. */
struct driver *driver_new(const struct driver_config *config);
/* Start the thread. -> 0 or an errno. */
int driver_start(struct driver *d);
/* -> 1: the thread has ended, all frames done or a ring error; 0: not within timeout_ms. */
int driver_wait(struct driver *d, int timeout_ms);
/* Ask the thread to end, and wait until it has. What is outstanding stays with the device. */
void driver_stop(struct driver *d);
void driver_stats_get(const struct driver *d, struct driver_stats *out);
/* A partner's: how many frames were on their way for how long, in classes that grow with the time; `out` has
 * DRIVER_LATENCIES counts. All zero for a driver that is nobody's partner. */
void driver_latencies_get(const struct driver *d, uint64_t *out);
/* -> nanoseconds with which that class begins; each is at most a sixteenth longer than that. */
uint64_t driver_latency_ns(uint32_t index);
/* Stops it first. */
void driver_free(struct driver *d);
/* Digest of the C sources this module was built from: a stale build is detected by comparing. */
const char *driver_sources_digest(void);
