/*
 * What the files of core/ and plane/ share and callers never see: the memory table, the accessors for
 * shared memory, the SIGBUS guard's entry, and the device's half of a virtqueue.
 */
#pragma once

#include <setjmp.h>
#include <stdbool.h>
#include <string.h>
#include <sys/uio.h>

#include "include.h"

_Static_assert(sizeof(struct piece) == sizeof(struct iovec), "a piece is handed to readv/writev");
_Static_assert(offsetof(struct piece, len) == offsetof(struct iovec, iov_len), "as struct iovec");

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)
/* What is done for every frame: only where all of it is inlined do a chain and its walk live in registers. */
#define INLINED static inline __attribute__((always_inline))
/* And what would take registers from it. */
#define OUTLINED static __attribute__((noinline))

/* ------------------------------------------------------------------------------- shared memory
 *
 * Every load and store of memory the driver can write goes through these. Each is done exactly once
 * (volatile or atomic: the compiler may not turn one read into two) and its order is named where it is
 * used, together with the driver's access it pairs with. All fields are little-endian (VERSION_1).
 */
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "big-endian hosts would need byte swapping in the accessors below"
#endif

static inline uint16_t load16(const uint16_t *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
static inline uint16_t load16_acquire(const uint16_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
static inline uint32_t load32(const uint32_t *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
static inline uint64_t load64(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }
static inline void store16(uint16_t *p, uint16_t v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); }
static inline void store16_release(uint16_t *p, uint16_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
static inline void store32(uint32_t *p, uint32_t v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); }
static inline void store64(uint64_t *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); }
static inline void or8_release(uint8_t *p, uint8_t v) { __atomic_fetch_or(p, v, __ATOMIC_RELEASE); }

/* A load whose value decides nothing, so whatever it races with does not matter: ThreadSanitizer does not look at it. */
#if defined(__SANITIZE_THREAD__)
__attribute__((noinline, unused, no_sanitize("thread")))
#else
inline
#endif
static uint64_t glance64(const uint64_t *p) { return *(const volatile uint64_t *)p; }

/* The one full barrier: orders our earlier stores before our later loads, which neither release nor
 * acquire does. ThreadSanitizer does not know fences, there a read-modify-write stands in; its cell is each
 * file's own, so that it orders nothing between the driver's half and the device's. */
static inline void full_barrier(void)
{
#if defined(__SANITIZE_THREAD__)
    static int cell;
    __atomic_fetch_add(&cell, 0, __ATOMIC_SEQ_CST);
#else
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
#endif
}

/* -------------------------------------------------------------------------------- guest memory */

struct guestmem {
    int32_t *owner; /* the guard sets it to 1 when memory vanished */
    uint32_t count;
    struct guest_region regions[]; /* [count] sorted by gpa, and again [count] sorted by hva */
};

/* The region that holds gpa, or NULL. `hint` remembers the last hit of the caller. */
static inline const struct guest_region *guestmem_find(const struct guestmem *mem, uint64_t gpa, uint32_t *hint)
{
    const struct guest_region *r = &mem->regions[*hint];

    if (likely(gpa - r->gpa < r->size))
        return r;
    uint32_t low = 0, high = mem->count;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        r = &mem->regions[middle];
        if (gpa < r->gpa) {
            high = middle;
        } else if (gpa - r->gpa < r->size) {
            *hint = middle;
            return r;
        } else {
            low = middle + 1;
        }
    }
    return NULL;
}

/* The region that has `hva`, or NULL. */
const struct guest_region *guestmem_region_at(const struct guestmem *mem, const uint8_t *hva);

/* Does all of [gpa, gpa+len) lie in the region of the last hit, as nearly everything does? Then it is one piece. */
INLINED bool guestmem_run(const struct guestmem *mem, uint32_t hint, uint64_t gpa, uint64_t len, struct piece *out)
{
    const struct guest_region *r = &mem->regions[hint];
    uint64_t offset = gpa - r->gpa;

    if (unlikely(offset >= r->size || len > r->size - offset))
        return false;
    *out = (struct piece){r->hva + offset, len};
    return true;
}

/* guestmem_pieces with a caller's hint; see ring.h. */
static inline int guestmem_translate(const struct guestmem *mem, uint32_t *hint, uint64_t gpa, uint64_t len,
                                     struct piece *out, uint32_t max)
{
    uint32_t n = 0;

    while (len > 0) {
        const struct guest_region *r = guestmem_find(mem, gpa, hint);
        if (unlikely(!r))
            return RING_E_UNMAPPED;
        if (unlikely(n == max))
            return RING_E_PIECES;
        uint64_t offset = gpa - r->gpa, part = r->size - offset;
        if (part > len)
            part = len;
        out[n].base = r->hva + offset;
        out[n].len = part;
        n++;
        len -= part;
        gpa += part; /* cannot wrap: a region's end is checked when the table is made, and with len left
                      * over at the very end of the address space gpa is 0, which is looked up anew */
    }
    return (int)n;
}

/* pieces_read and pieces_write without a guard of their own, for callers that hold one. */
size_t pieces_copy(const struct piece *pieces, uint32_t count, uint64_t offset, uint8_t *private, size_t len,
                   bool to_guest);

/* --------------------------------------------------------------------------------- SIGBUS guard
 *
 * guard.c tells the theory. Use:
 *
 *     if (guard_enter()) { memory vanished; q->mem->owner says whose; guard_leave() was done }
 *     ... touch shared memory ...
 *     guard_leave();
 *
 * Guards do not nest: the outermost one is a burst of the pump or one step call. Between enter and leave
 * locals that change must not be relied on after the jump; progress belongs in memory.
 */
struct guard {
    sigjmp_buf jump;
    volatile int armed;
};
extern _Thread_local struct guard guard_of_thread;

#define guard_enter() (guard_of_thread.armed = 1, sigsetjmp(guard_of_thread.jump, 0))
#define guard_leave() ((void)(guard_of_thread.armed = 0))

/* Called once by a thread that will run rings: the handler is there, the thread-local page touched, the
 * fault signals unblocked. -> RING_OK or RING_E_GUARD. */
int guard_thread(void);
int guard_add(uint8_t *base, size_t length, int32_t *owner);
void guard_remove(uint8_t *base);

/* ------------------------------------------------------------------------------------ virtqueue */

#define FEATURE_INDIRECT_DESC 28
#define FEATURE_EVENT_IDX 29
#define FEATURE_RING_PACKED 34
#define FEATURE_IN_ORDER 35

#define DESC_F_NEXT 1
#define DESC_F_WRITE 2
#define DESC_F_INDIRECT 4
#define AVAIL_F_NO_INTERRUPT 1
#define USED_F_NO_NOTIFY 1

#define PACKED_F_AVAIL 0x0080
#define PACKED_F_USED 0x8000
#define PACKED_EVENT_ENABLE 0
#define PACKED_EVENT_DISABLE 1
#define PACKED_EVENT_DESC 2
#define PACKED_EVENT_MASK 3

/* virtio 1.2, 2.7.5 "The Virtqueue Descriptor Table" */
struct vring_desc {
    uint64_t addr;  /* gpa */
    uint32_t len;
    uint16_t flags; /* DESC_F_* */
    uint16_t next;
};
_Static_assert(sizeof(struct vring_desc) == 16, "as the specification lays it out");

/* 2.7.6: written by the driver, except that the trailing used_event is read by us */
struct vring_avail {
    uint16_t flags;
    uint16_t idx;
    uint16_t ring[]; /* [size], then used_event */
};

/* 2.7.8: written by us; the trailing avail_event too */
struct vring_used_elem {
    uint32_t id;
    uint32_t len;
};
struct vring_used {
    uint16_t flags;
    uint16_t idx;
    struct vring_used_elem ring[]; /* [size], then uint16_t avail_event */
};

/* 2.8.13 "The Virtqueue Descriptor Format": available and used descriptors in one ring */
struct packed_desc {
    uint64_t addr;  /* gpa */
    uint32_t len;
    uint16_t id;    /* of the buffer; the last one's of a chain counts */
    uint16_t flags; /* DESC_F_*, PACKED_F_* */
};
_Static_assert(sizeof(struct packed_desc) == sizeof(struct vring_desc), "one private copy serves both formats");

/* 2.8.14 "Event Suppression Structure Format" */
struct packed_event {
    union {
        struct {
            uint16_t off_wrap; /* slot, and its wrap counter in bit 15 */
            uint16_t flags;    /* PACKED_EVENT_* */
        };
        uint32_t both; /* in one access: flags in the upper half */
    };
};
_Static_assert(sizeof(struct packed_event) == 4, "as the specification lays it out");

/* Slots of a packed ring that somebody else completed, to be passed over (journal.c). */
struct gap {
    uint16_t from, to;
    bool from_wrap, to_wrap;
    bool there;
};

/* Where the walker stands in a chain. */
struct walk {
    bool indirect;       /* in q->table, the private copy, rather than in the ring's table */
    bool writable_seen;  /* a device-writable descriptor was met: no readable one may follow */
    uint32_t next;       /* index to read, in the table it is in (packed: only in an indirect one) */
    uint32_t entries;    /* of that table */
    uint32_t steps_left; /* bounds the walk by a number the driver cannot write (a packed ring: chain.slots does) */
};

struct vq {
    /* configuration: fixed while the ring runs */
    const struct guestmem *mem;
    union { /* split | packed */
        struct vring_desc *desc;
        struct packed_desc *packed;
    };
    union {
        struct vring_avail *avail;
        struct packed_event *driver_event;
    };
    union {
        struct vring_used *used;
        struct packed_event *device_event;
    };
    struct vq_config config;
    uint32_t size;
    uint16_t mask; /* split */
    bool is_packed;
    bool indirect;
    bool event_idx;
    bool in_order;
    bool log_buffers, log_ring; /* see vq_log; both false without a log */

    /* Our own view; guest memory is never read back for any of it. Split: free-running indices. Packed:
     * slots, each with its wrap counter. Volatile is not needed: after a fault the ring is broken for good. */
    uint16_t next_avail;
    uint16_t next_used;
    uint16_t published;
    uint16_t decided; /* `published` at the last decision */
    union {
        uint16_t avail_seen; /* split: avail.idx as last read */
        uint16_t known;      /* packed: the slot at which nothing was found */
    };
    bool avail_wrap, used_wrap, published_wrap, known_wrap;
    bool holding;        /* packed: the first used entry of the batch waits for its flags... */
    uint16_t held_flags; /* ...these */
    uint32_t undecided;  /* packed: slots published since the last decision; no more than two laps are counted */
    bool first_decision;
    bool kicks_wanted;
    bool silent; /* the driver was told that kicks are not wanted, more than by what is stale */
    int broken;
    uint32_t broken_at;
    uint32_t region_hint;
    struct walk walk;    /* of vq_take and vq_walk, which stop between two descriptors; vq_pop has one of its own */
    struct journal_line *line; /* NULL: nothing is written down */
    struct gap gap;
    uint32_t table_limit;
    struct vring_desc *table; /* [table_limit]: private copy of an indirect table */

    struct iotlb_fault missing, denied; /* see vq_missing */
    struct iotlb_fault *scouted;        /* where vq_scout notes what is missing; else NULL */
    uint32_t scouted_count, scouted_room;
    struct iotlb_fault refused;         /* the next miss there is the chain's fault; access 0: none */

    struct dirty_log *log;
    uint64_t log_used; /* gpa as which the used ring, or the device event suppression structure, is marked */
    uint64_t desc_gpa; /* of the descriptor table or ring */
    bool inherited; /* what was stored to the ring before us may lack its mark: see dirty_inherited */
    uint64_t used_gpa; /* of the used ring, or the device event suppression structure */
};

/* What the journal notes before this is stored before what the ring gets after it. The reader comes when the writer
 * is dead, which has then done every instruction before one: only the compiler has to be held back. */
static inline void journal_order(void)
{
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
}

/* A packed ring stands before its gap, with nothing in flight: go on behind it. */
void journal_pass(struct vq *q);

static inline int vq_break(struct vq *q, int status, uint32_t at)
{
    q->broken = status;
    q->broken_at = at;
    return status;
}

/* Memory vanished under a burst or a call: break the ring for it. What was written until then is not known, so all
 * that may have been is marked: the device's half of the ring, and `written`. -> RING_E_MEMORY_GONE, or
 * RING_E_LOG_GONE when it was the log's. */
int vq_vanished(struct vq *q, const struct piece *written, uint32_t count);

/* ---------------------------------------------------------------------------------------- IOTLB
 *
 * As guestmem_translate, and the copy of an indirect table, for a queue whose driver is behind an IOMMU; callers hold a
 * guard. Both may answer RING_E_MISS and RING_E_DENIED too. See iotlb.c.
 */
int iotlb_translate(struct vq *q, uint64_t iova, uint64_t len, bool writable, struct piece *out, uint32_t max);
int iotlb_copy(struct vq *q, uint64_t iova, uint8_t *to, uint64_t len);

/* ------------------------------------------------------------------------------------ dirty log
 *
 * Marking what was written, after it was written; callers hold a guard. See dirty.c.
 */
void dirty_pieces(const struct vq *q, const struct piece *pieces, uint32_t count, uint64_t offset, uint64_t len);
void dirty_used(const struct vq *q, const void *at, uint64_t len);
void dirty_descriptors(const struct vq *q, const void *at, uint64_t len);

/* A predecessor may have died between its last store and the mark of it, and vq_take_over stores to the ring as well:
 * mark all of the device's half, once, when there is a log. */
void dirty_inherited(struct vq *q);

/* We wrote to these bytes of pieces. */
static inline void wrote_pieces(const struct vq *q, const struct piece *pieces, uint32_t count, uint64_t offset,
                                uint64_t len)
{
    if (unlikely(q->log_buffers))
        dirty_pieces(q, pieces, count, offset, len);
}

/* We wrote to the used ring, or to the device event suppression structure. */
static inline void wrote_used(const struct vq *q, const void *at, uint64_t len)
{
    if (unlikely(q->log_ring))
        dirty_used(q, at, len);
}

/* We wrote to the packed descriptor ring. */
static inline void wrote_descriptors(const struct vq *q, const void *at, uint64_t len)
{
    if (unlikely(q->log_ring))
        dirty_descriptors(q, at, len);
}
