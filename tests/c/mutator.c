/* Frames go both ways while a thread rewrites every field of both rings at random instants: descriptors,
 * indirect tables, indices, flags, event suppression. For AddressSanitizer; guest memory has unmapped pages on
 * both sides, so that an address that was not checked ends the program. The pump must always let go of the
 * rings, and a fresh pair must work again.
 *
 *     mutator FEATURES SIZE ROUNDS
 */
#include "core/driver.c"

#include "guest.h"

#define FRAME_BYTES 200
#define TURNS 60 /* of a round */
#define PARTS 8

static struct part_bytes {
    uint8_t *at;
    uint64_t bytes;
} parts[PARTS];
static bool stop; /* atomic */

static uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

/* Something that a field may hold, or nearly. */
static uint64_t choose(uint64_t *state)
{
    static const uint64_t odd[] = {0, 1, 2, 3, 4, 5, 7, 0x80, 0x8000, 0x8080, 0xffff, 0x7fff, 12, 15, 16, 32};
    uint64_t r = next_random(state);

    switch (r >> 8 & 7) {
    case 0:
        return r >> 16;
    case 1:
        return GUEST_GPA + (r >> 16) % GUEST_BYTES;
    case 2:
        return GUEST_GPA + GUEST_BYTES - (r >> 16 & 31);
    default:
        return odd[r >> 16 & 15];
    }
}

static void *mutate(void *unused)
{
    uint64_t state = 88172645463325252u;

    while (!__atomic_load_n(&stop, __ATOMIC_RELAXED)) {
        struct part_bytes part = parts[next_random(&state) % PARTS];
        uint8_t *at = part.at + (next_random(&state) % part.bytes & ~(uint64_t)1);
        uint64_t value = choose(&state), left = (uint64_t)(part.at + part.bytes - at);

        if ((uintptr_t)at % 8 == 0 && left >= 8 && value & 1)
            __atomic_store_n((uint64_t *)(void *)at, value, __ATOMIC_RELAXED);
        else if ((uintptr_t)at % 4 == 0 && left >= 4 && value & 2)
            __atomic_store_n((uint32_t *)(void *)at, (uint32_t)value, __ATOMIC_RELAXED);
        else if (left >= 2)
            __atomic_store_n((uint16_t *)(void *)at, (uint16_t)value, __ATOMIC_RELAXED);
        if (next_random(&state) % 4 == 0)
            usleep((useconds_t)(next_random(&state) % 300));
    }
    return unused;
}

/* Take what the device says it has used and offer it again. -> false: it makes no sense any more. */
static bool turn(struct driver *d)
{
    int n = pending(d);

    for (; n > 0; n--) {
        uint32_t written;
        int64_t slot = take_used(d, &written);
        if (slot < 0)
            return false;
        give_slot(d, (uint32_t)slot);
    }
    while (n == 0 && d->free_count > 0)
        offer(d, take_slot(d));
    submit(d);
    eventfd_write(d->config.kick, 1);
    return n == 0;
}

int main(int argc, char **argv)
{
    static const uint8_t frame[HEADER + FRAME_BYTES];
    uint8_t message[HEADER + FRAME_BYTES + 1];
    struct guest g;
    struct queue queues[2];
    struct driver_config drivers[2];
    struct lane_stats stats;
    pthread_t thread;
    int in[2], out[2];
    uint64_t broken = 0;

    MUST(argc == 4);
    uint64_t features = strtoull(argv[1], NULL, 0), rounds = strtoull(argv[3], NULL, 0);
    uint32_t size = (uint32_t)strtoul(argv[2], NULL, 0);
    MUST(guard_install() == RING_OK);
    guest_open(&g);
    MUST(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, in) == 0);
    MUST(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, out) == 0);
    for (int i = 0; i < 2; i++) {
        queues[i] = queue_make(&g, features, size);
        drivers[i] = queue_driver(&queues[i], i == 0 ? DRIVER_TRANSMIT : DRIVER_RECEIVE);
        drivers[i].pieces = 3;
        drivers[i].indirect = i == 0;
        drivers[i].frame_bytes = FRAME_BYTES;
        uint64_t area = driver_area_bytes(&drivers[i]);
        drivers[i].area = guest_take(&g, area);
        drivers[i].area_gpa = guest_gpa(&g, drivers[i].area);
        parts[4 * i] = (struct part_bytes){queues[i].desc, 16 * (uint64_t)size};
        parts[4 * i + 1] = (struct part_bytes){queues[i].avail, features & BIT(RING_PACKED) ? 4 : 6 + 2 * size};
        parts[4 * i + 2] = (struct part_bytes){queues[i].used, features & BIT(RING_PACKED) ? 4 : 6 + 8 * size};
        parts[4 * i + 3] = (struct part_bytes){drivers[i].area, area};
    }
    struct pump *pump = pump_new(eventfd(0, EFD_NONBLOCK));
    struct lane *lane = lane_new();
    MUST(pump && lane);
    MUST(pthread_create(&thread, NULL, mutate, NULL) == 0);
    for (uint64_t round = 0; round < rounds; round++) {
        struct driver *halves[2];
        struct flow_config flows[2];
        for (int i = 0; i < 2; i++) {
            for (int part = 0; part < 3; part++)
                memset(parts[4 * i + part].at, 0, parts[4 * i + part].bytes);
            halves[i] = driver_new(&drivers[i]);
            MUST(halves[i]);
            flows[i] = (struct flow_config){.queue = queue_device(&g, &queues[i]),
                                            .enabled = 1,
                                            .kick = queues[i].kick,
                                            .call = queues[i].call,
                                            .err = -1};
        }
        struct lane_config config = {.from_guest = flows[0],
                                     .to_guest = flows[1],
                                     .to_port = out[0],
                                     .from_port = in[1],
                                     .port_header = 12,
                                     .max_frame = 65550,
                                     .features = features};
        MUST(lane_configure(lane, &config) == RING_OK && pump_attach(pump, lane) == RING_OK);
        bool sense = true;
        for (int i = 0; i < TURNS && sense; i++) {
            sense = turn(halves[0]) && turn(halves[1]);
            for (int burst = 0; burst < 8; burst++) {
                ssize_t sent = send(in[0], frame, sizeof(frame), 0);
                (void)sent; /* full: the pump has enough to do */
                while (recv(out[1], message, sizeof(message), 0) > 0)
                    ;
            }
            usleep(20);
        }
        MUST(pump_detach(pump, lane, 5000) == RING_OK);
        for (int i = 0; i < 2; i++) {
            struct vq_state state;
            vq_state(flows[i].queue, &state);
            broken += state.broken != RING_OK;
            vq_free(flows[i].queue);
            driver_free(halves[i]);
        }
    }
    __atomic_store_n(&stop, true, __ATOMIC_RELAXED);
    pthread_join(thread, NULL);
    lane_stats_get(lane, &stats);
    pump_free(pump);
    lane_free(lane);
    guestmem_free(g.table);
    printf("frames %llu %llu bad_chains %llu broken %llu\n", (unsigned long long)stats.from_guest.frames,
           (unsigned long long)stats.to_guest.frames,
           (unsigned long long)(stats.from_guest.bad_chains + stats.to_guest.bad_chains),
           (unsigned long long)broken);
    return 0;
}
