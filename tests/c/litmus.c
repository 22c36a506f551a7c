/* The store-load races of notification, again and again. Each side stores something and then loads what the other
 * one stores; without a full barrier in between both can miss the other's store, and the chain or the notification
 * is lost for good.
 *
 *     driver publishes a chain, then looks whether a     |  device asks for kicks, then looks for chains
 *     kick is wanted                                     |
 *     device publishes a used entry, then looks whether  |  driver asks for a call, then looks for used entries
 *     a call is wanted                                   |
 *
 *     litmus NAME [ROUNDS]
 *
 * The device runs its verbs as the step engine calls them; the driver's half is included whole, for its functions
 * are static. No sanitizer: it would put barriers where the processor has none.
 */
#include "../../ring/core/driver.c"

#include "load.h"
#include "threads.h"

#define ROUNDS 250000
#define SPINS_BEFORE_YIELD 2000
#define LEAD_MAX 1000

static struct driver *driver;
static struct vq *device;
static uint64_t rounds;
static uint32_t arrived; /* atomic */

/* What each side saw in this round; read by the other one after the next meeting. */
static bool driver_kicks, device_saw, device_calls, driver_saw;

/* Meet the other thread. Each of the two passes `meeting` when both have come that far. */
static void meet(uint32_t meeting)
{
    __atomic_fetch_add(&arrived, 1, __ATOMIC_ACQ_REL);
    for (uint32_t spins = 0; (int32_t)(__atomic_load_n(&arrived, __ATOMIC_ACQUIRE) - 2 * meeting) < 0; spins++)
        if (spins % SPINS_BEFORE_YIELD == SPINS_BEFORE_YIELD - 1)
            sched_yield();
}

/* Go a little ahead of the other thread or behind it, differently in each round; and wait as long as that is what
 * makes the two meet. */
static void stagger(uint32_t *seed, int32_t lead)
{
    *seed = *seed * 1664525 + 1013904223;
    for (volatile int32_t i = lead + (int32_t)(*seed >> 27); i > 0; i--)
        ;
}

/* How long the device waits for the driver in the next round (below 0: the driver waits), so that each is the first
 * about as often as the other. Both threads keep the same number. */
static void balance(int32_t *lead, bool device_was_first)
{
    if (device_was_first && *lead < LEAD_MAX)
        ++*lead;
    else if (!device_was_first && *lead > -LEAD_MAX)
        --*lead;
}

static void *run_device(void *unused)
{
    struct piece pieces[1];
    uint32_t meeting = 0, seed = 1;
    int32_t kick_lead = 0, call_lead = 0;

    settle(1);
    CHECK_EQ(guard_thread(), RING_OK);
    for (uint64_t i = 0; i < rounds; i++) {
        struct chain c;
        CHECK_EQ(vq_disarm(device), RING_OK);
        CHECK_EQ(vq_pop(device, &c, pieces, 1), RING_EMPTY);
        meet(++meeting);
        stagger(&seed, kick_lead);
        device_saw = vq_arm(device) > 0;
        meet(++meeting);
        balance(&kick_lead, driver_kicks);
        CHECK_EQ(vq_pop(device, &c, pieces, 1), RING_OK);
        CHECK_EQ(vq_push(device, c.head, c.slots, 0), RING_OK);
        meet(++meeting);
        stagger(&seed, call_lead);
        CHECK_EQ(vq_publish(device), RING_OK);
        device_calls = call_is_due(vq_decide(device));
        meet(++meeting);
        balance(&call_lead, !device_calls);
    }
    return unused;
}

static bool publish_and_look(void)
{
    if (driver->is_packed) {
        packed_publish(driver);
        return packed_kick_is_due(driver);
    }
    split_publish(driver);
    return split_kick_is_due(driver);
}

static void run_driver(void)
{
    uint32_t meeting = 0, seed = 2;
    int32_t kick_lead = 0, call_lead = 0;
    uint64_t kicks = 0, calls = 0;

    for (uint64_t i = 0; i < rounds; i++) {
        uint32_t written;
        refuse_calls(driver);
        offer(driver, take_slot(driver));
        meet(++meeting);
        stagger(&seed, -kick_lead);
        driver_kicks = publish_and_look();
        meet(++meeting);
        balance(&kick_lead, driver_kicks);
        CHECK(driver_kicks || device_saw); /* or the device sleeps, and this chain lies there */
        kicks += driver_kicks;
        meet(++meeting);
        stagger(&seed, -call_lead);
        driver_saw = want_calls(driver, 1) > 0;
        meet(++meeting);
        balance(&call_lead, !device_calls);
        CHECK(device_calls || driver_saw); /* or the driver sleeps, and the used entry lies there */
        calls += device_calls;
        CHECK_EQ(pending(driver), 1);
        give_slot(driver, (uint32_t)take_used(driver, &written));
    }
    printf("%llu rounds, %llu kicks, %llu calls\n", (unsigned long long)rounds, (unsigned long long)kicks,
           (unsigned long long)calls);
    /* Now one side was first and now the other, or these rounds show nothing. */
    CHECK(0 < kicks && kicks < rounds);
    CHECK(0 < calls && calls < rounds);
}

static void race(uint64_t features)
{
    struct driver_config config = {.role = DRIVER_TRANSMIT, .features = features, .size = 8};
    struct guest g;
    pthread_t thread;

    rounds = number ? number : ROUNDS;
    driver = driver_on(&g, -1, -1, &config);
    device = g.q;
    CHECK(pthread_create(&thread, NULL, run_device, NULL) == 0);
    settle(0);
    run_driver();
    CHECK(pthread_join(thread, NULL) == 0);
    driver_free(driver);
    guest_end(&g);
}

static void by_flags(uint64_t ring) { race(ring); }
static void by_events(uint64_t ring) { race(ring | EVENT_IDX); }
EACH_FORMAT(by_flags)
EACH_FORMAT(by_events)
