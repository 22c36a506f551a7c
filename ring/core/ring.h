/*
 * The contract of the virtqueue core: everything a caller may see, and word for word the cffi
 * definition of the extension module (ring/_build.py feeds this very file to ffi.cdef). That is why it
 * holds only declarations, comments, plain integer #defines, enums and plain structs: no guard, no
 * #include, no static inline. A drift between header and binding is thereby impossible.
 *
 * Words: the device is our side, the driver is the guest's. An address is a gpa (guest-physical), a uva
 * (front-end virtual, what SET_VRING_ADDR carries) or an hva (ours). Behind an IOMMU the driver's addresses, those of
 * the ring parts included, are iovas.
 *
 * Specification: virtio 1.2, 2.7 "Split Virtqueues" and 2.8 "Packed Virtqueues".
 */

/* ------------------------------------------------------------------------------------- status */

/* What a verb answers. Zero and above is fine, below zero a rule was broken. Every code has one row in
 * ring/errors.py, which gives the words a person reads. */
enum ring_status {
    RING_OK = 0,
    RING_EMPTY = 1, /* the driver has made nothing (more) available */
    RING_MORE = 2,  /* the chain goes on: call vq_walk again */

    /* The chain cannot be followed: it goes back used with length 0, the ring goes on. */
    RING_E_NEXT_RANGE = -1,       /* next names a descriptor outside the table */
    RING_E_LOOP = -2,             /* more descriptors than the table has: a cycle */
    RING_E_PIECES = -3,           /* more pieces than one readv/writev can take */
    RING_E_ORDER = -4,            /* a device-readable descriptor after a device-writable one */
    RING_E_INDIRECT_OFF = -5,     /* INDIRECT without the feature */
    RING_E_INDIRECT_NEXT = -6,    /* INDIRECT and NEXT in one descriptor */
    RING_E_INDIRECT_NESTED = -7,  /* INDIRECT inside an indirect table */
    RING_E_INDIRECT_LENGTH = -8,  /* table length zero, not a multiple of 16, or beyond the limit */
    RING_E_UNMAPPED = -9,         /* a buffer (or indirect table) outside guest memory */
    RING_E_LENGTH = -10,          /* the chain's lengths add up to 4 GiB or more */
    RING_E_DENIED = -11,          /* the IOMMU does not let the device use a buffer in this way; vq_denied tells */

    /* The ring itself has lost its meaning: it stops until the front-end sets it up again. */
    RING_E_AVAIL_AHEAD = -32,     /* available index ahead by more than the queue size */
    RING_E_HEAD_RANGE = -33,      /* an available entry names a descriptor outside the table */
    RING_E_MEMORY_GONE = -34,     /* the memory under the ring or a buffer vanished (SIGBUS) */
    RING_E_ENDLESS = -35,         /* packed: a chain goes once around the ring without an end */
    RING_E_LOG_GONE = -36,        /* the memory of the dirty log vanished (SIGBUS) */
    RING_E_POSITION = -37,        /* packed: neither base nor journal fit the descriptors at the start */

    /* Nobody's mistake: a translation is not known yet, vq_missing tells which. The chain is given back (vq_unpop),
     * and the ring looked at again when the translation is there. */
    RING_E_MISS = -48,

    /* A request of our own control plane that cannot be met. */
    RING_E_QUEUE_SIZE = -64,      /* zero, above 32768, or (split) not a power of two */
    RING_E_RING_ALIGNMENT = -65,  /* split: descriptor table 16, available 2, used 4 bytes; packed: 16, 4, 4 */
    RING_E_RING_UNMAPPED = -66,   /* a ring part is not wholly inside one region */
    RING_E_REGION = -67,          /* size zero, overflow, overlap, or a file too short */
    RING_E_NOMEM = -68,           /* malloc or mmap failed: errno says why */
    RING_E_BUSY = -69,            /* the queue is lent to a pump */
    RING_E_GUARD = -70,           /* the SIGBUS guard is not installed or not effective */
    RING_E_BASE = -71,            /* packed: the base names a slot outside the ring */
};

#define RING_QUEUE_SIZE_MAX 32768
/* One less than the kernel's UIO_MAXIOV: the private net header is a piece of its own. */
#define RING_PIECES_MAX 1023

/* -------------------------------------------------------------------------------- guest memory */

/* Where guest memory lies. `hva` is filled by guestmem_map. gpa, uva, size in bytes. */
struct guest_region {
    uint64_t gpa;
    uint64_t uva;
    uint64_t size;
    uint8_t *hva;
};

/* A run of our own address space, laid out as struct iovec. */
struct piece {
    uint8_t *base;
    size_t len;
};

/* An immutable table of regions, sorted by gpa. It does not own the mappings; ring/guestmem.py does. */
struct guestmem;

/* mmap `size` bytes of `fd` from `offset` (page alignment is taken care of), shared, readable and
 * writable, kept out of core dumps. The mapping is entered into the SIGBUS guard's table with `owner`,
 * an int the guard sets to 1 when memory of that owner vanishes.
 * -> RING_OK and *hva, *base, *length (what guestmem_unmap takes); RING_E_NOMEM with errno. */
int guestmem_map(int fd, uint64_t size, uint64_t offset, int32_t *owner, uint8_t **hva, uint8_t **base,
                 size_t *length);
void guestmem_unmap(uint8_t *base, size_t length);
/* Put `empty`, a file without a byte, in the place of such a mapping, which stays in the guard's table: for whoever
 * uses it the memory has vanished. -> RING_OK; RING_E_NOMEM with errno. */
int guestmem_sever(uint8_t *base, size_t length, int empty);

/* -> a table, or NULL with *status RING_E_REGION (overlap, overflow, zero) or RING_E_NOMEM. `owner` is
 * the int given to guestmem_map; the rings read it to learn that their memory is gone. */
struct guestmem *guestmem_new(const struct guest_region *regions, uint32_t count, int32_t *owner,
                              int *status);
void guestmem_free(struct guestmem *mem);

/* Translate [gpa, gpa+len) into pieces. -> number of pieces (> 0; 0 for len 0), RING_E_UNMAPPED, or
 * RING_E_PIECES when more than `max` would be needed. */
int guestmem_pieces(const struct guestmem *mem, uint64_t gpa, uint64_t len, struct piece *out,
                    uint32_t max);
/* Translate [uva, uva+len), which must lie inside one region. -> hva or NULL. */
uint8_t *guestmem_uva(const struct guestmem *mem, uint64_t uva, uint64_t len);

/* Copy between pieces and private memory under the guard, starting `offset` bytes into the pieces.
 * -> bytes copied (short when the pieces end), or RING_E_MEMORY_GONE. */
int64_t pieces_read(const struct piece *pieces, uint32_t count, uint64_t offset, uint8_t *to, size_t len);
int64_t pieces_write(const struct piece *pieces, uint32_t count, uint64_t offset, const uint8_t *from,
                     size_t len);

/* -------------------------------------------------------------------------------------- IOTLB */

/* What a device may do with memory, as vhost-user encodes it. */
#define IOTLB_READ 1
#define IOTLB_WRITE 2
/* Entries of one table. */
#define IOTLB_ENTRIES_MAX 8192

/* The translations from iova a front-end has sent: iotlb.c tells the rules. It belongs to whoever owns the queues that
 * translate through it, and changes only while none of them is lent to a pump. */
struct iotlb;

/* A use of memory that could not be translated. */
struct iotlb_fault {
    uint64_t iova;
    uint32_t access; /* IOTLB_READ | IOTLB_WRITE: what was wanted; 0: there is no such fault */
};

/* -> NULL when out of memory */
struct iotlb *iotlb_new(void);
void iotlb_free(struct iotlb *t);
uint32_t iotlb_count(const struct iotlb *t);
/* [iova, iova+size) is at `uva`, for `access`. It replaces what it overlaps; of a full table another entry goes.
 * -> RING_OK; RING_E_REGION: size 0, overflow, no access, or not wholly inside one region. */
int iotlb_update(struct iotlb *t, const struct guestmem *mem, uint64_t iova, uint64_t size, uint64_t uva,
                 uint32_t access);
/* Does the table say so already? */
int iotlb_has(const struct iotlb *t, const struct guestmem *mem, uint64_t iova, uint64_t size, uint64_t uva,
              uint32_t access);
/* Forget [iova, iova+size), up to the end of the address space where that is beyond; size 0 is 2^64.
 * -> how many entries were touched */
uint32_t iotlb_invalidate(struct iotlb *t, uint64_t iova, uint64_t size);
/* Where [iova, iova+len) lies, if that is one run inside one region, for `access`. -> RING_OK and *hva;
 * RING_E_MISS or RING_E_DENIED and *fault; RING_E_RING_UNMAPPED: it is not one run. */
int iotlb_run(const struct iotlb *t, const struct guestmem *mem, uint64_t iova, uint64_t len, uint32_t access,
              uint8_t **hva, struct iotlb_fault *fault);

/* ------------------------------------------------------------------------------- SIGBUS guard */

/* Install the handler (again, if something replaced it) and, when it is new, prove it: a private file is
 * truncated under a mapping and touched. -> RING_OK, RING_E_GUARD, or RING_E_NOMEM where there can be no such
 * file. Threads that run rings call it implicitly. */
int guard_install(void);

/* ----------------------------------------------------------------------------------- virtqueue */

/* The device's half of one virtqueue. Not thread safe: one owner at a time. */
struct vq;

struct vq_config {
    uint32_t size;     /* descriptors; up to 32768, for a split ring a power of two */
    uint32_t base;     /* where to go on, as SET_VRING_BASE encodes it; see vq_base */
    uint64_t desc;     /* uva of the descriptor table, or of the packed descriptor ring */
    uint64_t avail;    /* uva of the available ring, or of the driver event suppression structure */
    uint64_t used;     /* uva of the used ring, or of the device event suppression structure */
    uint64_t features; /* negotiated: INDIRECT_DESC (28), EVENT_IDX (29), RING_PACKED (34), IN_ORDER (35) matter */
    const struct iotlb *iotlb; /* NULL: no IOMMU. Else desc, avail and used are iovas, as the driver's addresses are */
};

/* A part of a ring: how many bytes it has, and what the device does with them. */
struct vq_part {
    uint64_t len;
    uint32_t access; /* IOTLB_READ | IOTLB_WRITE */
};

/* One chain of descriptors, translated. pieces[0, readable) is for the device to read,
 * pieces[readable, readable+writable) for it to write. */
struct chain {
    uint32_t head;         /* what the used entry names: the first descriptor's index (split), the buffer id (packed) */
    uint32_t slots;        /* entries of the ring it takes: 1 (split), its descriptors in the ring (packed) */
    uint32_t descriptors;  /* descriptors walked, indirect ones included */
    uint32_t readable;
    uint32_t writable;
    uint64_t readable_len; /* bytes */
    uint64_t writable_len; /* bytes */
    int32_t status;        /* RING_OK, or the rule the chain broke */
    uint32_t bad;          /* the descriptor that broke it (index in its table) */
};

/* Why a used-buffer notification is sent or not: what `vdev step` answers to "why no interrupt?". */
enum call_reason {
    CALL_NOTHING_NEW = 0,     /* nothing published since the last decision */
    CALL_FLAG_WANTS = 1,      /* avail.flags is 0; packed: the driver's flags are ENABLE */
    CALL_FLAG_SUPPRESSED = 2, /* avail.flags has NO_INTERRUPT; packed: DISABLE */
    CALL_EVENT_REACHED = 3,   /* used_event (packed: the driver's offset) lies in what was just published */
    CALL_EVENT_AHEAD = 4,     /* it has not been reached */
    CALL_FIRST = 5            /* first publication since start: the driver may have missed one */
};

/* What the ring looks like from our side. Split: indices are free-running modulo 65536. Packed: indices are
 * slots, each with its wrap counter. */
struct vq_state {
    uint32_t packed;
    uint32_t size;
    uint32_t next_avail;  /* where the next available entry is taken */
    uint32_t avail_wrap;
    uint32_t known;       /* how far the driver is known to have come: available index as last read (split),
                           * the slot at which nothing was found (packed) */
    uint32_t known_wrap;
    uint32_t next_used;   /* where the next used entry is written */
    uint32_t used_wrap;
    uint32_t published;   /* as next_used, for what the driver can see */
    uint32_t kicks_wanted;
    uint32_t walk_at;     /* the descriptor vq_walk reads next: an index in its table; packed, in the ring: a slot */
    uint32_t walk_in_table; /* that table is an indirect one */
    int32_t broken;       /* RING_OK or the code that stopped the ring */
    uint32_t broken_at;   /* what it was about: an index, a head or a descriptor */
};

/* Resolve the ring parts and, for a split ring, read used.idx once (after a crash of a predecessor it is the
 * truth). -> NULL with *status RING_E_QUEUE_SIZE, _BASE, _RING_ALIGNMENT, _RING_UNMAPPED, _MEMORY_GONE or _NOMEM. */
struct vq *vq_new(const struct guestmem *mem, const struct vq_config *config, int *status);
void vq_free(struct vq *q);
void vq_state(const struct vq *q, struct vq_state *out);
/* The value GET_VRING_BASE answers. Split: the next available index. Packed: bits 0-14 next available slot, 15
 * its wrap counter, 16-30 next used slot, 31 its wrap counter. A front-end that sends only the low half of a
 * packed base means the same position for both. */
uint32_t vq_base(const struct vq *q);
/* Put a ring nobody is serving onto another memory table. -> as vq_new; on failure the ring is unchanged. */
int vq_move(struct vq *q, const struct guestmem *mem);
/* The parts of a ring of this size with these features: out[0] is desc, [1] avail, [2] used. */
void vq_parts(uint32_t size, uint64_t features, struct vq_part *out);
/* What the last RING_E_MISS and the last RING_E_DENIED of this queue were about, once each; may be asked while a pump
 * has the queue. */
void vq_missing(struct vq *q, struct iotlb_fault *out);
void vq_denied(struct vq *q, struct iotlb_fault *out);
/* There is no translation for `iova`: the next chain that misses it breaks RING_E_UNMAPPED. Not while a pump has it. */
void vq_refuse(struct vq *q, uint64_t iova);
/* Declare the ring broken for a reason found outside it (a RING_E_* code): nothing touches its memory again. */
void vq_fail(struct vq *q, int status);

/* ------------------------------------------------------------------------------------ dirty log */

/* Guest memory one bit of the log stands for, in bytes (vhost-user: VHOST_LOG_PAGE). */
#define DIRTY_PAGE 4096

/* Which pages the device has changed: one bit each, page p in bit p % 8 of byte p / 8, in memory shared with the
 * front-end, which clears bits as it likes. dirty.c tells the rules. One log may serve many queues and threads. */
struct dirty_log {
    uint8_t *bits;      /* those of gpa 0 come first */
    uint64_t size;      /* bytes */
    uint64_t skipped;   /* how often a page was to be marked that lies beyond the log */
    int32_t *owner;     /* the guard sets it to 1 when the log's memory vanished */
};

/* What a queue marks from now on; not while it is lent to a pump. NULL: nothing.
 * buffers     the device-writable buffers it writes (VHOST_F_LOG_ALL)
 * ring        what it writes of the ring itself (VHOST_VRING_F_LOG): the used ring, and the device event
 *             suppression structure of a packed ring, as lying at gpa `used`, wherever that is (log_guest_addr);
 *             a packed ring's used descriptors where they are
 * After vq_take_over this marks what a predecessor may have left unmarked; a log that vanishes then breaks the queue. */
void vq_log(struct vq *q, struct dirty_log *log, int32_t buffers, int32_t ring, uint64_t used);
/* Mark `len` bytes from `offset` bytes into these device-writable pieces, if the queue logs its buffers: after
 * pieces_write, even after one that failed. -> RING_OK or RING_E_LOG_GONE */
int vq_mark(const struct vq *q, const struct piece *pieces, uint32_t count, uint64_t offset, uint64_t len);

/* The verbs, one visible phase each. All may answer RING_E_MEMORY_GONE, those that write RING_E_LOG_GONE too; a
 * broken ring answers the code that broke it.
 *
 * vq_see      look whether the driver has made chains available. -> how many as far as one look tells: all of
 *             them (split: avail.idx is read once), 1 (packed: the next descriptor's flags), 0: none;
 *             RING_E_AVAIL_AHEAD
 * vq_take     take the next chain. -> RING_OK, RING_EMPTY (see first), RING_E_HEAD_RANGE
 * vq_walk     read the next descriptor of the chain (an indirect table: the whole table).
 *             -> RING_MORE, RING_OK (chain complete), or the rule that the chain broke
 * vq_pop      see if needed + take + walk to the end. -> RING_OK, RING_EMPTY, or the rule broken;
 *             after a chain rule (-1 .. -31) c->head and c->slots are valid and must be pushed with length 0
 * vq_unpop    give back the most recently popped chains, unused: `slots` is the sum of theirs
 * vq_push     write one used entry for a chain of so many slots; not visible to the driver yet. That the chain was
 *             popped is the caller's word: only its own position counts, which no entry can lead out of the ring
 * vq_push_batch  VIRTIO_F_IN_ORDER only: one used entry for several chains, in the order they were taken;
 *             `head` is the last one's, each counts as completely used
 * vq_publish  everything pushed becomes visible: used.idx is stored (split), or the flags of the first entry
 *             pushed, which were held back (packed)
 * vq_decide   full barrier, then: must the driver be notified? -> enum call_reason
 * vq_arm      ask for a kick when more comes than is known, full barrier, look once more. -> how many chains came
 *             beyond those known, as far as one look tells; 0: none, and a kick will tell
 * vq_disarm   tell the driver that kicks are not needed
 * vq_conclude the one verb for a ring that broke, as long as the driver's indices are what broke it: chains popped
 *             before still get their used entries. Pushes one for several chains (as vq_push_batch; chains 0: none),
 *             then publishes all that was pushed and decides. -> enum call_reason, or the code that broke the ring
 */
int vq_see(struct vq *q);
int vq_take(struct vq *q, struct chain *c);
int vq_walk(struct vq *q, struct chain *c, struct piece *pieces, uint32_t max);
int vq_pop(struct vq *q, struct chain *c, struct piece *pieces, uint32_t max);
int vq_unpop(struct vq *q, uint32_t slots);
int vq_push(struct vq *q, uint32_t head, uint32_t slots, uint32_t written);
int vq_push_batch(struct vq *q, uint32_t head, uint32_t chains, uint32_t slots);
int vq_publish(struct vq *q);
int vq_decide(struct vq *q);
int vq_arm(struct vq *q);
int vq_disarm(struct vq *q);
int vq_conclude(struct vq *q, uint32_t head, uint32_t chains, uint32_t slots);
/* Look ahead: walk the next chain, give it back, and tell in out[0, max) all the translations it lacks, not the first
 * alone (those that an indirect table would show are not seen while the table's own is missing). -> how many, or what
 * broke the ring. `pieces` is room for RING_PIECES_MAX. */
int vq_scout(struct vq *q, struct piece *pieces, struct iotlb_fault *out, uint32_t max);

/* ------------------------------------------------------------------------------------- journal */

/* What a device writes down of one ring, in memory that outlives its process; journal.c tells the theory. All of
 * it zero: nothing is known. */
struct journal_entry { /* of a packed ring's slot that a used descriptor was written to */
    uint64_t was;   /* length, id and flags before */
    uint32_t wrote; /* the length in the used descriptor */
    uint32_t slots; /* of the chains it completes */
};
struct journal_line {
    uint64_t binding;  /* which ring it is about; 0: none */
    uint64_t progress; /* bits 0-15: where the last batch begins, 16-31: where it ends; packed: slot and counter */
    uint64_t gap;      /* packed: as progress, with bit 32: slots a front-end completed, not passed over yet */
    uint32_t base;     /* the front-end's, of the last start */
    uint32_t reserved[9];
    struct journal_entry entries[RING_QUEUE_SIZE_MAX]; /* packed: by slot, [queue size] are used */
};

enum takeover {
    TAKEOVER_BASE = 0,   /* go on at the base */
    TAKEOVER_JOURNAL = 1 /* the base is out of date: go on where the predecessor stood */
};

/* Take a new queue, made with the front-end's base, over from a predecessor that may have died on this ring. line:
 * what that one wrote, or NULL; believed when its binding is `binding` and the ring does not contradict.
 * *completed: chains that were completed by somebody else since. -> enum takeover; the code that broke the queue:
 * RING_E_POSITION, RING_E_MEMORY_GONE, RING_E_LOG_GONE. */
int vq_take_over(struct vq *q, const struct journal_line *line, uint64_t binding, uint32_t *completed);
/* From now on write down in `line` what is done to the ring. base: what the front-end said last. The queue's entries
 * of `line` must be backed by memory; binding is not 0. */
void vq_record(struct vq *q, struct journal_line *line, uint64_t binding, uint32_t base);
/* A process that lives has handed the ring over with nothing in flight, and q, new, stands where its queue stood: write
 * on in `line` where that one ended, if it wrote there. */
void vq_write_on(struct vq *q, struct journal_line *line, uint64_t binding);

/* Does `reason` (enum call_reason) mean that the driver is to be notified? */
int call_is_due(int reason);
/* Digest of the C sources this module was built from: a stale build is detected by comparing. */
const char *ring_sources_digest(void);
