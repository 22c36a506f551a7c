/* A ring is looked at, to tell where a predecessor stood, while its driver goes on (ring/core/journal.c, included
 * whole). What two threads would show once in a while is shown for every instant: the driver steps in at the n-th time
 * that flags are read. */
#include "guest.h"

static struct guest guest;
static uint32_t reads, steps_in_at, offers;

static uint16_t read_by_a_guest_that_goes_on(const uint16_t *flags)
{
    if (reads++ == steps_in_at)
        for (uint32_t i = 0; i < offers; i++)
            guest_chain(&guest, &(struct vring_desc){.flags = DESC_F_WRITE}, 1);
    return load16_acquire(flags);
}

#define load16_acquire read_by_a_guest_that_goes_on
#include "../../ring/core/journal.c"
#undef load16_acquire

#define SIZE 8

/* A device that used nothing yet: from any slot on, with any number of chains there before and coming meanwhile. */
TEST(F04_packed_ring_is_offered_more_while_it_is_taken_over)
{
    for (uint32_t at = 0; at < 2 * SIZE; at++)
        for (uint32_t before = 0; before <= SIZE; before++)
            for (offers = 0; offers <= SIZE - before; offers++)
                for (steps_in_at = 0; steps_in_at < 4 * SIZE; steps_in_at++) {
                    uint32_t completed;
                    guest_init(&guest, SIZE, PACKED, packed_base(at % SIZE, at < SIZE));
                    guest_start(&guest);
                    for (uint32_t i = 0; i < SIZE; i++) /* the last round's, used */
                        guest.packed[i].flags = (i < at % SIZE) == (at < SIZE) ? PACKED_F_AVAIL | PACKED_F_USED : 0;
                    for (uint32_t i = 0; i < before; i++)
                        guest_chain(&guest, &(struct vring_desc){.flags = DESC_F_WRITE}, 1);
                    reads = 0;
                    CHECK_EQ(vq_take_over(guest.q, NULL, 0, &completed), TAKEOVER_BASE);
                    CHECK(reads > 0);
                    guest_end(&guest);
                }
}
