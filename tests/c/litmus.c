/* The store-load races of notification, again and again. Each side stores something and then loads what the
 * other one stores; without a full barrier in between both can miss the other's store, and the chain or the
 * notification is lost for good.
 *
 *     driver publishes a chain, looks whether a kick is wanted  |  device asks for kicks, looks for chains
 *     device publishes a used entry, looks whether a call is    |  driver asks for a call, looks for used
 *     wanted                                                    |  entries
 *
 *     litmus FEATURES SIZE ROUNDS   -> exit 0; 1 and a line on stdout if ever both missed
 *
 * The device runs its verbs as the step engine calls them; the driver's half is included whole, for its
 * functions are static.
 */
#include "core/driver.c"

#include "guest.h"

#define SPINS_BEFORE_YIELD 2000

static struct driver *driver;
static struct vq *device;
static uint64_t rounds;
static uint32_t arrived; /* atomic */

/* What each side saw in this round; read by the other one after the next meeting. */
static bool driver_kicks, device_saw, device_calls, driver_saw;

/* Meet the other thread. Each of the two passes `number` when both have come that far. */
static void meet(uint32_t number)
{
    __atomic_fetch_add(&arrived, 1, __ATOMIC_ACQ_REL);
    for (uint32_t spins = 0; __atomic_load_n(&arrived, __ATOMIC_ACQUIRE) - 2 * number > UINT32_MAX / 2; spins++)
        if (spins % SPINS_BEFORE_YIELD == SPINS_BEFORE_YIELD - 1)
            sched_yield();
}

/* Go a little ahead of the other thread or behind it, differently in each round. */
static void stagger(uint32_t *seed)
{
    *seed = *seed * 1664525 + 1013904223;
    for (volatile uint32_t i = *seed >> 27; i > 0; i--)
        ;
}

static void *run_device(void *unused)
{
    struct piece pieces[RING_PIECES_MAX];
    uint32_t meeting = 0, seed = 1;

    MUST(guard_install() == RING_OK);
    for (uint64_t i = 0; i < rounds; i++) {
        struct chain c;
        MUST(vq_disarm(device) == RING_OK && vq_pop(device, &c, pieces, RING_PIECES_MAX) == RING_EMPTY);
        meet(++meeting);
        stagger(&seed);
        device_saw = vq_arm(device) > 0;
        meet(++meeting);
        MUST(vq_pop(device, &c, pieces, RING_PIECES_MAX) == RING_OK);
        MUST(vq_push(device, c.head, c.slots, 0) == RING_OK);
        meet(++meeting);
        stagger(&seed);
        MUST(vq_publish(device) == RING_OK);
        device_calls = call_is_due(vq_decide(device));
        meet(++meeting);
    }
    return unused;
}

static bool run_driver(void)
{
    uint32_t meeting = 0, seed = 2;
    uint64_t kicks = 0, calls = 0;

    for (uint64_t i = 0; i < rounds; i++) {
        uint32_t written;
        refuse_calls(driver);
        offer(driver, take_slot(driver));
        meet(++meeting);
        stagger(&seed);
        if (driver->is_packed)
            packed_publish(driver);
        else
            split_publish(driver);
        driver_kicks = driver->is_packed ? packed_kick_is_due(driver) : split_kick_is_due(driver);
        meet(++meeting);
        if (!driver_kicks && !device_saw)
            return printf("round %llu: no kick, and the device saw no chain\n", (unsigned long long)i), false;
        kicks += driver_kicks;
        meet(++meeting);
        stagger(&seed);
        driver_saw = want_calls(driver, 1) > 0;
        meet(++meeting);
        if (!driver_saw && !device_calls)
            return printf("round %llu: no call, and the driver saw no used chain\n", (unsigned long long)i), false;
        calls += device_calls;
        MUST(pending(driver) == 1);
        give_slot(driver, (uint32_t)take_used(driver, &written));
    }
    printf("rounds %llu kicks %llu calls %llu\n", (unsigned long long)rounds, (unsigned long long)kicks,
           (unsigned long long)calls);
    return true;
}

int main(int argc, char **argv)
{
    struct guest g;
    pthread_t thread;

    MUST(argc == 4);
    rounds = strtoull(argv[3], NULL, 0);
    guest_open(&g);
    struct queue q = queue_make(&g, strtoull(argv[1], NULL, 0), (uint32_t)strtoul(argv[2], NULL, 0));
    driver = driver_make(&g, queue_driver(&q, DRIVER_TRANSMIT));
    device = queue_device(&g, &q);
    MUST(guard_install() == RING_OK);
    MUST(pthread_create(&thread, NULL, run_device, NULL) == 0);
    if (!run_driver())
        return 1; /* the other thread waits for ever */
    pthread_join(thread, NULL);
    vq_free(device);
    driver_free(driver);
    guestmem_free(g.table);
    return 0;
}
