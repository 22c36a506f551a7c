/* What a frame costs the device in each ring format: the pump's transmit path with a port that drops everything,
 * and a driver that fills the ring, in one thread and in turn. So nothing but the device's own work is measured: no
 * waiting, no other processor's caches, no system call. Each ring has its journal, as in a daemon.
 *
 *     rings ROUNDS    one line a sample: SHAPE FORMAT CYCLES, the time of one burst divided by its frames
 *
 * The formats take turns within a round. A round in which this thread was taken off its processor is left out.
 * Built by tools/bench (ring_formats.py) with the flags of the extension module. It knows the C core from inside, like
 * tests/c.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/resource.h>

#include "core/driver.c"

#include "plane/lane.h"

#define GPA 0x40000000ull
#define MEMORY (64ull << 20)
#define SIZE 256
#define BURST 64
#define WARM_UP 50 /* rounds */
#define NEW_PACKED_BASE 0x80008000 /* both sides at slot 0, their wrap counters 1 */
#define USUAL (1ull << 32 | 1ull << FEATURE_EVENT_IDX | 1ull << FEATURE_INDIRECT_DESC | 1ull << NET_F_MRG_RXBUF)
#define PACKED (1ull << FEATURE_RING_PACKED)
#define IN_ORDER (1ull << FEATURE_IN_ORDER)

static const struct format {
    const char *name;
    uint64_t features;
} formats[] = {{"split", USUAL},
               {"packed", USUAL | PACKED},
               {"split-in-order", USUAL | IN_ORDER},
               {"packed-in-order", USUAL | PACKED | IN_ORDER}};
#define FORMATS (sizeof(formats) / sizeof(*formats))

static const struct shape {
    const char *name;
    uint32_t pieces;
    int indirect;
} shapes[] = {{"one-descriptor", 1, 0}, {"two-descriptors", 2, 0}, {"indirect-table", 2, 1}};
#define SHAPES (sizeof(shapes) / sizeof(*shapes))

struct side {
    struct driver *driver;
    struct lane *lane;
};

static uint8_t *memory;
static uint64_t taken;

static void must(bool holds, const char *what)
{
    if (holds)
        return;
    fprintf(stderr, "rings: %s failed\n", what);
    exit(1);
}

static uint8_t *take(uint64_t bytes)
{
    uint8_t *at = memory + taken;

    taken += (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    must(taken <= MEMORY, "room in guest memory");
    return at;
}

static uint64_t gpa_of(const uint8_t *at) { return GPA + (uint64_t)(at - memory); }

static uint64_t clock_now(void)
{
#if defined(__x86_64__)
    return __builtin_ia32_rdtsc();
#else
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
#endif
}

static long times_preempted(void)
{
    struct rusage u;

    getrusage(RUSAGE_THREAD, &u);
    return u.ru_nivcsw;
}

static struct journal_line *new_line(void)
{
    void *line = mmap(NULL, sizeof(struct journal_line), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

    must(line != MAP_FAILED, "mmap");
    return line;
}

static struct side side_new(const struct guestmem *mem, const struct shape *shape, uint64_t features)
{
    int status;
    uint32_t base = features & PACKED ? NEW_PACKED_BASE : 0;
    struct driver_config half = {.role = DRIVER_TRANSMIT,
                                 .size = SIZE,
                                 .base = base,
                                 .features = features,
                                 .desc = take(sizeof(struct vring_desc) * SIZE),
                                 .avail = take(6 + 2 * SIZE),
                                 .used = take(6 + 8 * SIZE),
                                 .kick = eventfd(0, EFD_NONBLOCK),
                                 .call = eventfd(0, EFD_NONBLOCK),
                                 .frame_bytes = 64,
                                 .pieces = shape->pieces,
                                 .indirect = shape->indirect,
                                 .batch = BURST,
                                 .busy_poll = 1,
                                 .prefix_bytes = 14};
    struct vq_config ring = {.size = SIZE,
                             .base = base,
                             .desc = gpa_of(half.desc),
                             .avail = gpa_of(half.avail),
                             .used = gpa_of(half.used),
                             .features = features};
    struct lane_config config = {.from_guest = {.queue = vq_new(mem, &ring, &status), .enabled = 1,
                                                .kick = -1, .call = -1, .err = -1},
                                 .to_guest = {.kick = -1, .call = -1, .err = -1},
                                 .to_port = -1,
                                 .from_port = -1,
                                 .port_header = NET_HEADER,
                                 .max_frame = 65550,
                                 .features = features};
    half.area = take(driver_area_bytes(&half));
    half.area_gpa = gpa_of(half.area);
    struct side s = {driver_new(&half), lane_new(-1)};
    must(config.from_guest.queue && s.driver && s.lane, "making a queue");
    vq_record(config.from_guest.queue, new_line(), 1, base);
    must(lane_configure(s.lane, &config) == RING_OK, "lane_configure");
    refuse_calls(s.driver);
    return s;
}

/* Offer a burst, let the device drop it, take it back. -> what the device took for it */
static uint64_t burst(struct side *s)
{
    struct driver *d = s->driver;

    for (int i = 0; i < BURST; i++) {
        uint32_t slot = take_slot(d);
        make_frame(d, buffer(d, slot));
        offer(d, slot);
    }
    submit(d);
    s->lane->work = WORK_FROM_GUEST;
    uint64_t began = clock_now();
    serve_from_guest(s->lane);
    uint64_t took = clock_now() - began;
    must(pending(d) == BURST && reclaim(d, BURST), "the device's work");
    return took;
}

int main(int argc, char **argv)
{
    struct side sides[SHAPES][FORMATS];
    int32_t gone = 0;
    int status;

    must(argc == 2, "being told how many rounds");
    must(guard_thread() == RING_OK, "the SIGBUS guard");
    memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    must(memory != MAP_FAILED, "mmap");
    struct guest_region region = {.gpa = GPA, .uva = GPA, .size = MEMORY, .hva = memory};
    const struct guestmem *mem = guestmem_new(&region, 1, &gone, &status);
    must(mem, "guestmem_new");
    for (size_t i = 0; i < SHAPES; i++)
        for (size_t k = 0; k < FORMATS; k++)
            sides[i][k] = side_new(mem, &shapes[i], formats[k].features);
    long rounds = strtol(argv[1], NULL, 10);
    for (long round = -WARM_UP; round < rounds; round++)
        for (size_t i = 0; i < SHAPES; i++) {
            uint64_t took[FORMATS];
            long preempted = times_preempted();
            for (size_t k = 0; k < FORMATS; k++)
                took[k] = burst(&sides[i][k]);
            if (round < 0 || times_preempted() != preempted)
                continue;
            for (size_t k = 0; k < FORMATS; k++)
                printf("%s %s %.2f\n", shapes[i].name, formats[k].name, (double)took[k] / BURST);
        }
    return 0;
}
