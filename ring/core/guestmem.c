/* Guest memory: mapping what the front-end sent, and the table that translates addresses by range.
 *
 * A table is immutable. A change builds a new one, swaps the rings onto it while no pump runs them, and
 * frees the old one after; so the data plane needs neither lock nor reference count. Translation takes
 * a range and answers runs of our own memory, for a buffer may cross regions (a check of its first
 * address alone is the oldest hole in this trade). All sums are checked in 64 bits.
 */
#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "internal.h"

int guestmem_map(int fd, uint64_t size, uint64_t offset, int32_t *owner, uint8_t **hva, uint8_t **base,
                 size_t *length)
{
    struct stat st;

    if (fstat(fd, &st) < 0)
        return RING_E_NOMEM;
    /* On hugetlbfs offset and length must be multiples of the huge page, which st_blksize tells there;
     * elsewhere it is at least the page size. */
    uint64_t page = st.st_blksize > 4096 ? (uint64_t)st.st_blksize : 4096;
    uint64_t before = offset % page;
    uint64_t whole;
    if (__builtin_add_overflow(size, before, &whole) || whole > SIZE_MAX - page || offset - before > INT64_MAX)
        return RING_E_REGION;
    whole = (whole + page - 1) / page * page;

    void *at = mmap(NULL, whole, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, (off_t)(offset - before));
    if (at == MAP_FAILED)
        return RING_E_NOMEM;
    madvise(at, whole, MADV_DONTDUMP); /* the guest's memory stays out of our core dumps */
    if (guard_add(at, whole, owner) < 0) {
        munmap(at, whole);
        errno = ENOMEM;
        return RING_E_NOMEM;
    }
    *base = at;
    *length = whole;
    *hva = *base + before;
    return RING_OK;
}

int guestmem_sever(uint8_t *base, size_t length, int empty)
{
    void *at = mmap(base, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE | MAP_FIXED, empty, 0);

    return at == MAP_FAILED ? RING_E_NOMEM : RING_OK;
}

void guestmem_unmap(uint8_t *base, size_t length)
{
    guard_remove(base);
    munmap(base, length);
}

static int by_gpa(const void *a, const void *b)
{
    const struct guest_region *x = a, *y = b;

    return x->gpa < y->gpa ? -1 : x->gpa > y->gpa;
}

static int by_hva(const void *a, const void *b)
{
    const struct guest_region *x = a, *y = b;

    return x->hva < y->hva ? -1 : x->hva > y->hva;
}

/* Does [start, start + size) leave the address space? */
static bool wraps(uint64_t start, uint64_t size)
{
    return size == 0 || start > UINT64_MAX - size;
}

struct guestmem *guestmem_new(const struct guest_region *regions, uint32_t count, int32_t *owner, int *status)
{
    struct guestmem *mem = malloc(sizeof(*mem) + 2 * sizeof(*regions) * count);

    *status = RING_E_NOMEM;
    if (!mem)
        return NULL;
    mem->owner = owner;
    mem->count = count;
    memcpy(mem->regions, regions, count * sizeof(*regions));
    memcpy(mem->regions + count, regions, count * sizeof(*regions));
    qsort(mem->regions, count, sizeof(*regions), by_gpa);
    qsort(mem->regions + count, count, sizeof(*regions), by_hva);
    *status = RING_E_REGION;
    for (uint32_t i = 0; i < count; i++) {
        const struct guest_region *r = &mem->regions[i];
        if (wraps(r->gpa, r->size) || wraps(r->uva, r->size) ||
            (i > 0 && mem->regions[i - 1].gpa + mem->regions[i - 1].size > r->gpa))
            goto refuse;
        for (uint32_t j = 0; j < i; j++)
            if (r->uva < mem->regions[j].uva + mem->regions[j].size && mem->regions[j].uva < r->uva + r->size)
                goto refuse;
    }
    if (count == 0)
        goto refuse;
    *status = RING_OK;
    return mem;
refuse:
    free(mem);
    return NULL;
}

void guestmem_free(struct guestmem *mem)
{
    free(mem);
}

int guestmem_pieces(const struct guestmem *mem, uint64_t gpa, uint64_t len, struct piece *out, uint32_t max)
{
    uint32_t hint = 0;

    return guestmem_translate(mem, &hint, gpa, len, out, max);
}

uint8_t *guestmem_uva(const struct guestmem *mem, uint64_t uva, uint64_t len)
{
    for (uint32_t i = 0; i < mem->count; i++) {
        const struct guest_region *r = &mem->regions[i];
        if (uva - r->uva < r->size)
            return len <= r->size - (uva - r->uva) ? r->hva + (uva - r->uva) : NULL;
    }
    return NULL;
}

const struct guest_region *guestmem_region_at(const struct guestmem *mem, const uint8_t *hva)
{
    const struct guest_region *sorted = mem->regions + mem->count;
    uint32_t low = 0, high = mem->count;

    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        const struct guest_region *r = &sorted[middle];
        if (hva < r->hva)
            high = middle;
        else if ((uint64_t)(hva - r->hva) < r->size)
            return r;
        else
            low = middle + 1;
    }
    return NULL;
}

/* The loop both directions share: `to_guest` picks which side is the source. Out of line, so that the jump
 * out of the guard meets no local that changed. */
__attribute__((noinline)) size_t pieces_copy(const struct piece *pieces, uint32_t count, uint64_t offset,
                                               uint8_t *private, size_t len, bool to_guest)
{
    size_t done = 0;

    for (uint32_t i = 0; i < count && done < len; i++) {
        if (offset >= pieces[i].len) {
            offset -= pieces[i].len;
            continue;
        }
        size_t part = pieces[i].len - offset;
        if (part > len - done)
            part = len - done;
        if (to_guest)
            memcpy(pieces[i].base + offset, private + done, part);
        else
            memcpy(private + done, pieces[i].base + offset, part);
        done += part;
        offset = 0;
    }
    return done;
}

int64_t pieces_read(const struct piece *pieces, uint32_t count, uint64_t offset, uint8_t *to, size_t len)
{
    if (guard_enter())
        return RING_E_MEMORY_GONE;
    size_t done = pieces_copy(pieces, count, offset, to, len, false);
    guard_leave();
    return (int64_t)done;
}

int64_t pieces_write(const struct piece *pieces, uint32_t count, uint64_t offset, const uint8_t *from, size_t len)
{
    if (guard_enter())
        return RING_E_MEMORY_GONE;
    size_t done = pieces_copy(pieces, count, offset, (uint8_t *)from, len, true);
    guard_leave();
    return (int64_t)done;
}
