/* The dirty log: which pages of guest memory the device has changed (vhost-user, "Migration").
 *
 * While a guest moves to another host its memory is copied under its feet. The front-end learns from the log what
 * to copy once more: it takes a word of bits out, leaving zeros, then copies those pages. A page that changed and
 * stays unmarked is stale on the other host, and nobody notices until the guest does. Hence the one rule: the pages
 * changed are a subset of the pages marked. To mark a page too many costs a copy of it.
 *
 * Data first, then the bit. If the front-end takes the bit, it copies after our store and sees it; if it came a
 * moment too early, the bit is set for the next time. So every store to guest memory is followed by its mark, and the
 * read-modify-write that sets the bit has release order. That covers what readv wrote as well: the kernel copied it
 * in this thread. The front-end's half of the pair is an atomic exchange, then the copy.
 *
 * The bit is not looked at first, to save the atomic operation where it is set already. We would store to the page and
 * then load the bit, while the front-end stores zero to the bit and then loads the page. On x86 as on arm64 a load
 * may be served while an earlier store waits in its buffer: we see the old bit, it copies the old page. Only full
 * barriers on both sides forbid that. Ours would cost what it saves (on x86 both are one locked instruction). That the
 * front-end has one the protocol does not say: on x86 every exchange is one, on arm64 an exchange with acquire order
 * is not. A read-modify-write works on the newest value of the bit, so it asks for nothing more than atomicity there.
 *
 * What is marked:
 *
 *     buffers      header and payload, as many bytes as were written; also of a frame that was dropped after the
 *                  kernel wrote it, and of chains that were given back (to_guest.inl, vq_mark)
 *     ring         each used entry, index and event field as it is stored (split.inl, packed.inl). The used ring has
 *                  an address for the log of its own, which need not be in guest memory. A packed ring's used
 *                  descriptors overwrite available ones, and are marked where they are: the address for the log is
 *                  that of the device event suppression structure, for this is what QEMU calls its used ring
 *     a restart    who was killed may have stored to the ring and not marked it, so the successor marks all of the
 *                  device's half, as soon as it has both the ring and a log, whichever comes first (QEMU starts rings
 *                  before it sends the log). A buffer needs no such care: it is marked before its chain is used
 *     a fault      when memory vanishes in the middle of a burst, all that may have been written (vq_vanished)
 *
 * Pieces carry no gpa, which the data path has no use for: it is looked up when something is marked. With the log off
 * a frame pays one branch that never goes the other way, an entry and a publication one each; with it on, one locked
 * instruction for each of these and for eight pages.
 *
 * The log is as hostile as the memory: its size bounds every mark (a page beyond it is skipped and counted), and it
 * can be truncated, which the guard turns into RING_E_LOG_GONE. A device that cannot log must not go on as if it did.
 *
 * On and off, another log, another address: swapped by vq_log between two bursts; there is no other state.
 */
#include "internal.h"

#define PAGES_IN_BYTE 8

static void skip(struct dirty_log *log, uint64_t pages)
{
    __atomic_fetch_add(&log->skipped, pages, __ATOMIC_RELAXED); /* queues of several threads may share a log */
}

/* Mark the pages of [gpa, gpa + len). */
static void mark(struct dirty_log *log, uint64_t gpa, uint64_t len)
{
    uint64_t page = gpa / DIRTY_PAGE, last;

    if (len == 0)
        return;
    if (__builtin_add_overflow(gpa, len - 1, &last))
        last = UINT64_MAX;
    last /= DIRTY_PAGE;
    while (page <= last) {
        uint64_t byte = page / PAGES_IN_BYTE, end = page | (PAGES_IN_BYTE - 1);
        if (byte >= log->size) {
            skip(log, last - page + 1);
            return;
        }
        if (end > last)
            end = last;
        unsigned from = page % PAGES_IN_BYTE, count = (unsigned)(end - page) + 1;
        /* Release: pairs with the front-end's exchange, after which it copies the page. */
        or8_release(&log->bits[byte], (uint8_t)(((1u << count) - 1) << from));
        page = end + 1;
    }
}

/* Mark `len` bytes that lie `offset` bytes behind gpa `base`, which nobody has checked. */
static void mark_behind(struct dirty_log *log, uint64_t base, uint64_t offset, uint64_t len)
{
    if (base > UINT64_MAX - offset)
        skip(log, 1);
    else
        mark(log, base + offset, len);
}

void dirty_used(const struct vq *q, const void *at, uint64_t len)
{
    mark_behind(q->log, q->log_used, (uint64_t)((const uint8_t *)at - (const uint8_t *)q->used), len);
}

void dirty_descriptors(const struct vq *q, const void *at, uint64_t len)
{
    mark_behind(q->log, q->desc_gpa, (uint64_t)((const uint8_t *)at - (const uint8_t *)q->desc), len);
}

void dirty_pieces(const struct vq *q, const struct piece *pieces, uint32_t count, uint64_t offset, uint64_t len)
{
    for (uint32_t i = 0; i < count && len > 0; i++) {
        if (offset >= pieces[i].len) {
            offset -= pieces[i].len;
            continue;
        }
        const uint8_t *at = pieces[i].base + offset;
        uint64_t part = pieces[i].len - offset;
        if (part > len)
            part = len;
        const struct guest_region *r = guestmem_region_at(q->mem, at);
        if (r) /* or it is private memory beside the buffers */
            mark_behind(q->log, r->gpa, (uint64_t)(at - r->hva), part);
        len -= part;
        offset = 0;
    }
}

/* All that the device ever writes of its ring. */
static void dirty_ring(const struct vq *q)
{
    if (q->is_packed) {
        dirty_descriptors(q, q->packed, q->size * sizeof(*q->packed));
        dirty_used(q, q->device_event, sizeof(*q->device_event));
    } else {
        const uint16_t *avail_event = (const uint16_t *)&q->used->ring[q->size];
        dirty_used(q, q->used, (uint64_t)((const uint8_t *)(avail_event + 1) - (const uint8_t *)q->used));
    }
}

void dirty_inherited(struct vq *q)
{
    if (q->log_ring && q->inherited) {
        dirty_ring(q);
        q->inherited = false;
    }
}

/* ----------------------------------------------------------------------------------------- contract */

void vq_log(struct vq *q, struct dirty_log *log, int32_t buffers, int32_t ring, uint64_t used)
{
    q->log = log;
    q->log_buffers = log && buffers;
    q->log_ring = log && ring;
    /* behind an IOMMU log_guest_addr is an iova: the used ring is marked where it is */
    q->log_used = q->config.iotlb ? q->used_gpa : used;
    if (guard_enter()) {
        vq_vanished(q, NULL, 0);
        return;
    }
    dirty_inherited(q);
    guard_leave();
}

int vq_mark(const struct vq *q, const struct piece *pieces, uint32_t count, uint64_t offset, uint64_t len)
{
    if (guard_enter())
        return RING_E_LOG_GONE;
    wrote_pieces(q, pieces, count, offset, len);
    guard_leave();
    return RING_OK;
}

int vq_vanished(struct vq *q, const struct piece *written, uint32_t count)
{
    if (q->log && !guard_enter()) { /* marking in the log that vanished faults again */
        wrote_pieces(q, written, count, 0, UINT64_MAX);
        if (q->log_ring)
            dirty_ring(q);
        guard_leave();
    }
    bool log_gone = q->log && __atomic_load_n(q->log->owner, __ATOMIC_RELAXED);
    return vq_break(q, log_gone ? RING_E_LOG_GONE : RING_E_MEMORY_GONE, 0);
}
