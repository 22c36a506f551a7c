/* The IOTLB: translations from iova, for a driver behind an IOMMU (vhost-user, "IOMMU support").
 *
 * With ACCESS_PLATFORM negotiated (virtio 1.2, chapter 6) the addresses in descriptors are those of the guest's IOMMU,
 * whose tables only the front-end can read. It sends translations (iova -> uva) when it is asked, and takes them back.
 * So an address has three answers here: where it is, that the device may not use it so, and that nobody knows yet.
 *
 *     known    pieces, as guestmem_translate
 *     DENIED   an entry is there and lacks the access wanted. The chain cannot be followed: it goes back with length 0
 *     MISS     there is no entry. It is not the chain's fault: whoever popped it gives it back, remembers that the ring
 *              waits, and has the front-end asked. When the translation comes, the ring is looked at again
 *
 * If the front-end says that there is none, asking again would go on for ever: vq_refuse turns the next miss of that
 * address, once, into RING_E_UNMAPPED. It is not kept for longer, as a driver may map an address that was not mapped
 * without telling anybody.
 *
 * The table is sorted by iova and its entries do not overlap. An entry holds where the memory is for us, which was
 * checked to be inside one region; so the table belongs to one memory table, and is emptied when that changes. It has
 * no lock and no reference count: it changes only while no pump has a queue that translates through it. A burst gives
 * back what it popped before it lets go of a queue, so no translation outlives the change that removes it - but those
 * of the ring parts, which the owner of the queue has to resolve anew.
 *
 * It is as long as it needs to be, up to a limit. In a full table any entry may go, as a translation that is missing is
 * asked for again; which one goes rotates, so that a guest that uses more than fits still gets on.
 */
#include <stdlib.h>

#include "internal.h"

#define SCOUT_PAGE 4096 /* the least that an IOMMU translates at a time */

struct entry {
    uint64_t iova, last; /* inclusive: the last byte of the address space is one too */
    uint8_t *hva;
    uint32_t access;
};

struct iotlb {
    uint32_t count;
    uint32_t victim; /* the entry that goes next when the table is full */
    struct entry entries[IOTLB_ENTRIES_MAX + 1]; /* room for both halves of an entry that is cut in two */
};

struct iotlb *iotlb_new(void)
{
    return calloc(1, sizeof(struct iotlb));
}

void iotlb_free(struct iotlb *t)
{
    free(t);
}

uint32_t iotlb_count(const struct iotlb *t)
{
    return t->count;
}

/* The first entry that ends at or behind `iova`, as an index. */
static uint32_t first_from(const struct iotlb *t, uint64_t iova)
{
    uint32_t low = 0, high = t->count;

    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (t->entries[middle].last < iova)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* The entry that has `iova`, or NULL. */
static const struct entry *find(const struct iotlb *t, uint64_t iova)
{
    uint32_t i = first_from(t, iova);

    return i < t->count && t->entries[i].iova <= iova ? &t->entries[i] : NULL;
}

static void take_out(struct iotlb *t, uint32_t from, uint32_t to)
{
    memmove(&t->entries[from], &t->entries[to], (t->count - to) * sizeof(*t->entries));
    t->count -= to - from;
}

static void put_in(struct iotlb *t, uint32_t at, struct entry e)
{
    memmove(&t->entries[at + 1], &t->entries[at], (t->count - at) * sizeof(*t->entries));
    t->entries[at] = e;
    t->count++;
}

static void make_room(struct iotlb *t)
{
    if (t->count < IOTLB_ENTRIES_MAX)
        return;
    t->victim = (t->victim + 1) % t->count;
    take_out(t, t->victim, t->victim + 1);
}

/* The part of `e` from `iova` on. */
static struct entry from(struct entry e, uint64_t iova)
{
    e.hva += iova - e.iova;
    e.iova = iova;
    return e;
}

uint32_t iotlb_invalidate(struct iotlb *t, uint64_t iova, uint64_t size)
{
    uint64_t last;
    uint32_t touched = 0, i = first_from(t, iova);

    if (size == 0 || __builtin_add_overflow(iova, size - 1, &last))
        last = UINT64_MAX;
    while (i < t->count && t->entries[i].iova <= last) {
        struct entry old = t->entries[i];
        touched++;
        take_out(t, i, i + 1);
        if (old.last > last)
            put_in(t, i, from(old, last + 1));
        if (old.iova < iova) {
            old.last = iova - 1;
            put_in(t, i++, old);
        }
        if (t->count > IOTLB_ENTRIES_MAX)
            make_room(t);
        if (old.last > last)
            break;
    }
    return touched;
}

int iotlb_update(struct iotlb *t, const struct guestmem *mem, uint64_t iova, uint64_t size, uint64_t uva,
                 uint32_t access)
{
    uint8_t *hva = guestmem_uva(mem, uva, size);

    if (size == 0 || iova > UINT64_MAX - (size - 1) || !hva || access == 0 || access > (IOTLB_READ | IOTLB_WRITE))
        return RING_E_REGION;
    iotlb_invalidate(t, iova, size);
    make_room(t);
    put_in(t, first_from(t, iova), (struct entry){iova, iova + (size - 1), hva, access});
    return RING_OK;
}

int iotlb_has(const struct iotlb *t, const struct guestmem *mem, uint64_t iova, uint64_t size, uint64_t uva,
              uint32_t access)
{
    const struct entry *e = find(t, iova);
    const uint8_t *hva = guestmem_uva(mem, uva, size);

    return e && hva && size > 0 && size - 1 <= e->last - iova && hva == e->hva + (iova - e->iova) &&
           access == e->access;
}

int iotlb_run(const struct iotlb *t, const struct guestmem *mem, uint64_t iova, uint64_t len, uint32_t access,
              uint8_t **hva, struct iotlb_fault *fault)
{
    const struct guest_region *r = NULL;
    bool one_run = true;
    uint64_t left = len;

    *fault = (struct iotlb_fault){iova, access};
    while (left > 0) {
        const struct entry *e = find(t, fault->iova);
        if (!e)
            return RING_E_MISS;
        if ((e->access & access) != access)
            return RING_E_DENIED;
        uint8_t *at = e->hva + (fault->iova - e->iova);
        if (!r) {
            r = guestmem_region_at(mem, at);
            *hva = at;
        } else if (at != *hva + (len - left)) {
            one_run = false;
        }
        uint64_t part = e->last - fault->iova;
        if (part >= left - 1)
            break;
        left -= part + 1;
        fault->iova += part + 1;
    }
    return r && one_run && len <= r->size - (uint64_t)(*hva - r->hva) ? RING_OK : RING_E_RING_UNMAPPED;
}

/* ---------------------------------------------------------------------------------------- the data path */

/* Note a fault where another thread may ask for it. */
static void note(struct iotlb_fault *at, uint64_t iova, uint32_t access)
{
    __atomic_store_n(&at->iova, iova, __ATOMIC_RELAXED);
    /* Release: pairs with the exchange in told(). */
    __atomic_store_n(&at->access, access, __ATOMIC_RELEASE);
}

static void told(struct iotlb_fault *at, struct iotlb_fault *out)
{
    out->access = __atomic_exchange_n(&at->access, 0, __ATOMIC_ACQUIRE);
    out->iova = __atomic_load_n(&at->iova, __ATOMIC_RELAXED);
}

/* The entry that has `iova`, for this access; NULL: *status says what is to be answered. */
static const struct entry *look_up(struct vq *q, uint64_t iova, uint32_t access, int *status)
{
    const struct entry *e = find(q->config.iotlb, iova);

    if (likely(e && (e->access & access)))
        return e;
    if (e) {
        note(&q->denied, iova, access);
        *status = RING_E_DENIED;
    } else if (q->scouted) {
        if (q->scouted_count < q->scouted_room)
            q->scouted[q->scouted_count++] = (struct iotlb_fault){iova, access};
        *status = RING_E_MISS;
    } else if (q->refused.access && q->refused.iova == iova) {
        q->refused.access = 0;
        *status = RING_E_UNMAPPED;
    } else {
        note(&q->missing, iova, access);
        *status = RING_E_MISS;
    }
    return NULL;
}

int iotlb_translate(struct vq *q, uint64_t iova, uint64_t len, bool writable, struct piece *out, uint32_t max)
{
    uint32_t n = 0;
    int status = RING_E_UNMAPPED;

    if (iova > UINT64_MAX - (len - 1))
        return RING_E_UNMAPPED;
    while (len > 0) {
        const struct entry *e = look_up(q, iova, writable ? IOTLB_WRITE : IOTLB_READ, &status);
        if (!e && q->scouted && status == RING_E_MISS) { /* go on behind the page; what it leaves out is not used */
            uint64_t rest = SCOUT_PAGE - iova % SCOUT_PAGE;
            if (rest >= len)
                return (int)n;
            iova += rest;
            len -= rest;
            continue;
        }
        if (!e)
            return status;
        uint64_t offset = iova - e->iova, part = e->last - iova;
        part = part < len ? part + 1 : len;
        if (n == max)
            return RING_E_PIECES;
        out[n++] = (struct piece){e->hva + offset, part};
        len -= part;
        iova += part;
    }
    return (int)n;
}

int iotlb_copy(struct vq *q, uint64_t iova, uint8_t *to, uint64_t len)
{
    int status = RING_OK;

    while (len > 0) {
        const struct entry *e = look_up(q, iova, IOTLB_READ, &status);
        if (!e)
            return status;
        uint64_t part = e->last - iova;
        part = part < len ? part + 1 : len;
        memcpy(to, e->hva + (iova - e->iova), part);
        to += part;
        iova += part;
        len -= part;
    }
    return RING_OK;
}

/* ----------------------------------------------------------------------------------------- contract */

void vq_missing(struct vq *q, struct iotlb_fault *out)
{
    told(&q->missing, out);
}

void vq_denied(struct vq *q, struct iotlb_fault *out)
{
    told(&q->denied, out);
}

void vq_refuse(struct vq *q, uint64_t iova)
{
    q->refused = (struct iotlb_fault){iova, IOTLB_READ};
}
