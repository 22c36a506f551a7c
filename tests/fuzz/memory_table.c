/* The memory table against a naive model: which tables are accepted, and where bytes lie.
 *
 * An input: a count of regions, for each its gpa, uva and size as one byte each, then questions until it ends.
 * Addresses cluster where sums go wrong: about 0, about 4 GiB and about the end of the address space.
 */
#include "fuzz.h"

#define REGIONS 8
#define QUESTIONS 64
#define LONGEST 300 /* bytes of one question */

typedef unsigned __int128 wide;

struct table {
    struct guest_region regions[REGIONS];
    uint32_t count;
    struct guestmem *mem;
};

static uint64_t an_address(struct input *in)
{
    static const uint64_t about[] = {0, 0xFFFFFFE0, 0x7FFFFFFFFFFFFFE0, UINT64_MAX - 63};
    uint8_t n = input8(in);

    return about[n >> 6] + (n & 63);
}

/* Mostly few bytes. The large ones have no memory behind them: their addresses are computed, never used. */
static uint64_t a_size(struct input *in)
{
    uint8_t n = input8(in);

    return n < 224 ? n & 31 : n < 240 ? 1ull << (n - 208) : UINT64_MAX - (255u - n);
}

static bool has_memory(const struct guest_region *r) { return r->size < 32; }

static bool meet(uint64_t a, uint64_t a_size, uint64_t b, uint64_t b_size)
{
    return (wide)a < (wide)b + b_size && (wide)b < (wide)a + a_size;
}

static bool leaves(uint64_t start, uint64_t size) { return (wide)start + size > UINT64_MAX; }

/* The rules of vhost-user's memory table: something in each region, none leaves the address space, no two meet. */
static bool is_sound(const struct table *t)
{
    for (uint32_t i = 0; i < t->count; i++) {
        const struct guest_region *r = &t->regions[i];
        if (r->size == 0 || leaves(r->gpa, r->size) || leaves(r->uva, r->size))
            return false;
        for (uint32_t j = 0; j < i; j++)
            if (meet(r->gpa, r->size, t->regions[j].gpa, t->regions[j].size) ||
                meet(r->uva, r->size, t->regions[j].uva, t->regions[j].size))
                return false;
    }
    return t->count > 0;
}

/* The region with this gpa, or NULL. */
static const struct guest_region *region_of(const struct table *t, uint64_t gpa)
{
    for (uint32_t i = 0; i < t->count; i++)
        if (meet(gpa, 1, t->regions[i].gpa, t->regions[i].size))
            return &t->regions[i];
    return NULL;
}

static uint8_t *byte_at(const struct table *t, uint64_t gpa)
{
    const struct guest_region *r = region_of(t, gpa);

    return r ? r->hva + (gpa - r->gpa) : NULL;
}

/* Byte by byte: in how many regions these lie. -> as guestmem_pieces. */
static int model_pieces(const struct table *t, uint64_t gpa, uint64_t len, uint32_t max)
{
    uint32_t n = 0;

    for (uint64_t i = 0; i < len; i++) {
        const struct guest_region *r = region_of(t, gpa + i);
        if (!r)
            return RING_E_UNMAPPED;
        if (i > 0 && r == region_of(t, gpa + i - 1))
            continue;
        if (n == max)
            return RING_E_PIECES;
        n++;
    }
    return (int)n;
}

static void check_copies(const struct piece *pieces, uint32_t count, uint64_t len, struct input *in)
{
    uint64_t offset = input8(in), left = offset < len ? len - offset : 0;
    size_t ask = input8(in), wanted = ask < left ? ask : left;
    uint8_t *private = malloc(ask + 1);

    memset(private, 0x5A, ask + 1);
    CHECK_EQ(pieces_write(pieces, count, offset, private, ask), wanted);
    memset(private, 0, ask + 1);
    CHECK_EQ(pieces_read(pieces, count, offset, private, ask), wanted);
    for (size_t i = 0; i < ask; i++)
        CHECK_EQ(private[i], i < wanted ? 0x5A : 0);
    free(private);
}

static void ask_gpa(const struct table *t, uint32_t *hint, struct input *in)
{
    uint64_t gpa = an_address(in), len = input16(in) % LONGEST;
    uint32_t max = input_below(in, REGIONS + 2);
    struct piece *pieces = malloc(max * sizeof(*pieces));
    int wanted = model_pieces(t, gpa, len, max);
    int n = guestmem_translate(t->mem, hint, gpa, len, pieces, max);
    uint64_t done = 0;
    bool real = true;

    CHECK_EQ(n, wanted);
    CHECK_EQ(guestmem_pieces(t->mem, gpa, len, pieces, max), wanted);
    for (int i = 0; i < n; i++) {
        CHECK(pieces[i].len > 0);
        CHECK(pieces[i].base == byte_at(t, gpa + done));
        CHECK(pieces[i].base + pieces[i].len - 1 == byte_at(t, gpa + done + pieces[i].len - 1));
        real &= has_memory(region_of(t, gpa + done));
        done += pieces[i].len;
    }
    if (n >= 0)
        CHECK_EQ(done, len);
    if (n >= 0 && real)
        check_copies(pieces, (uint32_t)n, len, in);
    free(pieces);
}

static void ask_uva(const struct table *t, struct input *in)
{
    uint64_t uva = an_address(in), len = input16(in) % LONGEST;
    uint8_t *wanted = NULL;

    for (uint32_t i = 0; i < t->count; i++) {
        const struct guest_region *r = &t->regions[i];
        if (meet(uva, 1, r->uva, r->size) && (wide)uva + len <= (wide)r->uva + r->size)
            wanted = r->hva + (uva - r->uva);
    }
    CHECK(guestmem_uva(t->mem, uva, len) == wanted);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input in = {data, data + size};
    struct table t = {.count = input_below(&in, REGIONS + 1)};
    int32_t gone = 0;
    uint32_t hint = 0;
    int status;

    for (uint32_t i = 0; i < t.count; i++) {
        struct guest_region *r = &t.regions[i];
        r->gpa = an_address(&in);
        r->uva = an_address(&in);
        r->size = a_size(&in);
        /* in a block of exactly its size, or at an address from which no offset overflows */
        r->hva = has_memory(r) ? calloc(1, r->size) : (uint8_t *)1;
    }
    t.mem = guestmem_new(t.regions, t.count, &gone, &status);
    CHECK_EQ(!!t.mem, is_sound(&t));
    CHECK_EQ(status, t.mem ? RING_OK : RING_E_REGION);
    for (uint32_t i = 0; t.mem && i < QUESTIONS && input_left(&in); i++)
        if (input8(&in) & 1)
            ask_uva(&t, &in);
        else
            ask_gpa(&t, &hint, &in);
    guestmem_free(t.mem);
    for (uint32_t i = 0; i < t.count; i++)
        if (has_memory(&t.regions[i]))
            free(t.regions[i].hva);
    return 0;
}
