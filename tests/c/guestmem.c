/* Memory table and SIGBUS guard, under sanitizers. */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "guest.h"

#define PAGE 4096

static int file_of(off_t size)
{
    int fd = memfd_create("guest-memory", MFD_CLOEXEC);

    CHECK(fd >= 0 && ftruncate(fd, size) == 0);
    return fd;
}

TEST(mapping_starts_at_any_offset)
{
    static const uint64_t offsets[] = {0, 1, 7, PAGE - 1, PAGE, PAGE + 1, 0x100000};

    CHECK_EQ(guard_install(), RING_OK);
    for (size_t i = 0; i < sizeof(offsets) / sizeof(*offsets); i++) {
        uint8_t *hva, *base;
        size_t length;
        int32_t gone = 0;
        int fd = file_of((off_t)(offsets[i] + PAGE));
        CHECK(pwrite(fd, "guest", 5, (off_t)offsets[i]) == 5);
        CHECK_EQ(guestmem_map(fd, PAGE, offsets[i], &gone, &hva, &base, &length), RING_OK);
        CHECK(memcmp(hva, "guest", 5) == 0);
        hva[PAGE - 1] = 1;
        CHECK(base <= hva && hva + PAGE <= base + length);
        guestmem_unmap(base, length);
        close(fd);
    }
}

TEST(P44_sizes_and_offsets_that_overflow)
{
    static const struct { uint64_t size, offset; } cases[] = {
        {UINT64_MAX, 0}, {UINT64_MAX, 1}, {1, UINT64_MAX}, {UINT64_MAX - PAGE + 1, PAGE - 1}, {PAGE, 1ull << 63},
    };
    int fd = file_of(PAGE);

    for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
        uint8_t *hva, *base;
        size_t length;
        int32_t gone = 0;
        CHECK(guestmem_map(fd, cases[i].size, cases[i].offset, &gone, &hva, &base, &length) < 0);
    }
    close(fd);
}

TEST(P45_regions_at_the_end_of_the_address_space)
{
    uint8_t *data = malloc(PAGE);
    struct piece pieces[2];
    int32_t gone = 0;
    int status;
    struct guest_region last = {UINT64_MAX - PAGE, UINT64_MAX - PAGE, PAGE, data};
    struct guestmem *mem = guestmem_new(&last, 1, &gone, &status);

    CHECK(mem);
    CHECK_EQ(guestmem_pieces(mem, UINT64_MAX - 1, 1, pieces, 2), 1);
    CHECK(pieces[0].base == data + PAGE - 1);
    CHECK_EQ(guestmem_pieces(mem, UINT64_MAX - 1, 2, pieces, 2), RING_E_UNMAPPED);
    CHECK_EQ(guestmem_pieces(mem, UINT64_MAX - PAGE, UINT64_MAX, pieces, 2), RING_E_UNMAPPED);
    CHECK(guestmem_uva(mem, UINT64_MAX - 1, 1) == data + PAGE - 1);
    CHECK(!guestmem_uva(mem, UINT64_MAX - 1, 2) && !guestmem_uva(mem, UINT64_MAX, 1));
    guestmem_free(mem);
    last.gpa++;
    CHECK(!guestmem_new(&last, 1, &gone, &status) && status == RING_E_REGION);
    free(data);
}

TEST(many_regions_are_found_in_any_order)
{
    enum { COUNT = 509 };
    static struct guest_region regions[COUNT];
    static uint8_t data[COUNT];
    struct piece pieces[COUNT];
    int32_t gone = 0;
    int status;

    for (uint32_t i = 0; i < COUNT; i++) /* adjacent, one byte each, handed over shuffled */
        regions[i] = (struct guest_region){100 + i * 7 % COUNT, 5000 + 2 * i, 1, data + i * 7 % COUNT};
    struct guestmem *mem = guestmem_new(regions, COUNT, &gone, &status);
    CHECK(mem);
    CHECK_EQ(guestmem_pieces(mem, 100, COUNT, pieces, COUNT), COUNT);
    for (uint32_t i = 0; i < COUNT; i++)
        CHECK(pieces[i].base == data + i && pieces[i].len == 1);
    CHECK_EQ(guestmem_pieces(mem, 100, COUNT, pieces, COUNT - 1), RING_E_PIECES);
    CHECK_EQ(guestmem_pieces(mem, 100, COUNT + 1, pieces, COUNT), RING_E_UNMAPPED);
    uint32_t hint = 0;
    for (uint32_t i = 0; i < 10000; i++) {
        uint32_t at = i * 331 % (COUNT + 2);
        CHECK_EQ(guestmem_translate(mem, &hint, 99 + at, 1, pieces, 1),
                 at == 0 || at == COUNT + 1 ? RING_E_UNMAPPED : 1);
    }
    guestmem_free(mem);
}

TEST(copies_cross_pieces_and_stop_at_their_end)
{
    uint8_t *first = malloc(3), *second = malloc(5), *private = malloc(8);
    struct piece pieces[] = {{first, 3}, {second, 5}};

    memcpy(private, "01234567", 8);
    CHECK_EQ(pieces_write(pieces, 2, 0, private, 8), 8);
    CHECK(memcmp(first, "012", 3) == 0 && memcmp(second, "34567", 5) == 0);
    for (uint64_t offset = 0; offset <= 9; offset++)
        for (size_t len = 0; len <= 8; len++) {
            size_t left = offset < 8 ? 8 - (size_t)offset : 0, wanted = len < left ? len : left;
            CHECK_EQ(pieces_read(pieces, 2, offset, private, len), wanted);
            CHECK(memcmp(private, &"01234567"[offset < 8 ? offset : 0], wanted) == 0);
        }
    free(first);
    free(second);
    free(private);
}

/* ------------------------------------------------------------------------------------------- guard */

struct victim {
    int fd;
    uint8_t *hva, *base;
    size_t length;
    int32_t gone;
};

static void victim_new(struct victim *v)
{
    v->gone = 0;
    v->fd = file_of(PAGE);
    CHECK_EQ(guestmem_map(v->fd, PAGE, 0, &v->gone, &v->hva, &v->base, &v->length), RING_OK);
}

static void victim_free(struct victim *v)
{
    guestmem_unmap(v->base, v->length);
    close(v->fd);
}

TEST(F25_copy_from_and_to_memory_that_vanished)
{
    struct victim v;
    uint8_t private[8] = {0};

    CHECK_EQ(guard_install(), RING_OK);
    victim_new(&v);
    struct piece piece = {v.hva, 8};
    CHECK_EQ(pieces_read(&piece, 1, 0, private, 8), 8);
    CHECK(ftruncate(v.fd, 0) == 0);
    for (int i = 0; i < 100; i++) {
        CHECK_EQ(pieces_read(&piece, 1, 0, private, 8), RING_E_MEMORY_GONE);
        CHECK_EQ(pieces_write(&piece, 1, 0, private, 8), RING_E_MEMORY_GONE);
    }
    CHECK(v.gone);
    victim_free(&v);
}

TEST(guard_table_grows_and_reuses_its_slots)
{
    enum { COUNT = 600 };
    static struct victim victims[COUNT];
    uint8_t private[1];

    CHECK_EQ(guard_install(), RING_OK);
    for (int round = 0; round < 3; round++) {
        for (int i = 0; i < COUNT; i++)
            victim_new(&victims[i]);
        for (int i = 0; i < COUNT; i += 7) {
            struct piece piece = {victims[i].hva, 1};
            CHECK(ftruncate(victims[i].fd, 0) == 0);
            CHECK_EQ(pieces_read(&piece, 1, 0, private, 1), RING_E_MEMORY_GONE);
        }
        for (int i = 0; i < COUNT; i++) {
            CHECK_EQ(victims[i].gone, i % 7 == 0);
            victim_free(&victims[i]);
        }
    }
}

static void *fault(void *argument)
{
    struct victim *v = argument;
    struct piece piece = {v->hva, 1};
    uint8_t private[1];

    CHECK_EQ(guard_thread(), RING_OK);
    for (int i = 0; i < 2000; i++)
        CHECK_EQ(pieces_read(&piece, 1, 0, private, 1), RING_E_MEMORY_GONE);
    return NULL;
}

TEST(threads_fault_at_the_same_time)
{
    struct victim victims[4];
    pthread_t threads[4];

    CHECK_EQ(guard_install(), RING_OK);
    for (int i = 0; i < 4; i++) {
        victim_new(&victims[i]);
        CHECK(ftruncate(victims[i].fd, 0) == 0);
        CHECK(pthread_create(&threads[i], NULL, fault, &victims[i]) == 0);
    }
    for (int i = 0; i < 4; i++) {
        CHECK(pthread_join(threads[i], NULL) == 0);
        CHECK(victims[i].gone);
        victim_free(&victims[i]);
    }
}

TEST(F13_guard_that_was_proven_needs_no_descriptor)
{
    struct rlimit before, none;
    struct victim victim;

    CHECK_EQ(guard_install(), RING_OK);
    victim_new(&victim);
    CHECK(getrlimit(RLIMIT_NOFILE, &before) == 0);
    none = (struct rlimit){.rlim_cur = 0, .rlim_max = before.rlim_max};
    CHECK(setrlimit(RLIMIT_NOFILE, &none) == 0);
    CHECK_EQ(guard_install(), RING_OK);
    signal(SIGBUS, SIG_DFL);
    CHECK_EQ(guard_install(), RING_E_NOMEM); /* a new one cannot be proven, and is not blamed */
    CHECK(setrlimit(RLIMIT_NOFILE, &before) == 0);
    CHECK_EQ(guard_install(), RING_OK);
    CHECK(ftruncate(victim.fd, 0) == 0);
    fault(&victim);
    CHECK(victim.gone);
    victim_free(&victim);
}

/* What a child that runs `crash` dies of. Without the sanitizer's own handlers, so that the signal shows. */
static int dies_of(void (*crash)(void))
{
    int status;
    pid_t pid = fork();

    if (pid == 0) {
        signal(SIGBUS, SIG_DFL);
        CHECK_EQ(guard_install(), RING_OK);
        crash();
        _exit(0);
    }
    CHECK(waitpid(pid, &status, 0) == pid);
    return WIFSIGNALED(status) ? WTERMSIG(status) : 0;
}

static void touch_unguarded_mapping(void)
{
    int fd = file_of(PAGE);
    volatile uint8_t *page = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, 0);
    CHECK(ftruncate(fd, 0) == 0);
    (void)page[0];
}

static void touch_foreign_mapping_while_armed(void)
{
    if (!guard_enter())
        touch_unguarded_mapping();
    guard_leave();
}

static void touch_guest_memory_unarmed(void)
{
    struct victim v;
    victim_new(&v);
    CHECK(ftruncate(v.fd, 0) == 0);
    (void)*(volatile uint8_t *)v.hva;
}

TEST(bugs_of_ours_still_crash)
{
    CHECK_EQ(dies_of(touch_unguarded_mapping), SIGBUS);
    CHECK_EQ(dies_of(touch_foreign_mapping_while_armed), SIGBUS);
    CHECK_EQ(dies_of(touch_guest_memory_unarmed), SIGBUS);
}
