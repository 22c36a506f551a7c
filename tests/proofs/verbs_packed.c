/*
 * The verbs of a packed ring that touch the ring itself, from any positions, whatever
 * the driver has written.
 *
 * With EVERY_SIZE for queue sizes of every kind, else for a few of them.
 *
 * Shown: every load and store lies in the ring parts; every position stays in the ring; vq_see and vq_take move none;
 * the positions of available and used entries move only by the verbs that are there for it; a walk starts with no
 * slot counted.
 */
#include "world.h"

/* The smallest, the largest, powers of two and their neighbours. */
#ifdef EVERY_SIZE
static const uint32_t sizes[] = {1, 2, 3, 4, 5, 7, 8, 9, 255, 256, 257, 1000, 4095, 32767, 32768};
#else
static const uint32_t sizes[] = {1, 3, 32768};
#endif
#define SIZES (sizeof(sizes) / sizeof(*sizes))

static uint16_t any_slot(const struct vq *q)
{
    return (uint16_t)any_between(0, q->size - 1);
}

static void any_state(struct vq *q, uint16_t next_avail, uint16_t next_used)
{
    q->broken = RING_OK;
    q->next_avail = next_avail;
    q->known = any_slot(q);
    q->next_used = next_used;
    q->published = any_slot(q);
    q->avail_wrap = any_bool();
    q->known_wrap = any_bool();
    q->used_wrap = any_bool();
    q->published_wrap = any_bool();
    q->holding = any_bool();
    q->held_flags = any16();
    q->undecided = any32();
    q->first_decision = any_bool();
    q->kicks_wanted = any_bool();
}

static void check_positions(const struct vq *q)
{
    //@ check q->next_avail < q->size && q->known < q->size && q->next_used < q->size && q->published < q->size;
}

/* Verbs that leave both positions where they are: seen at the first slot and at the last. */
static void lookers(struct vq *q, uint16_t at)
{
    struct chain c;

    any_state(q, at, at);
    int status = vq_see(q);
    //@ check status == 0 || status == 1 || status == RING_E_MEMORY_GONE;
    check_positions(q);
    any_state(q, at, at);
    status = vq_take(q, &c);
    //@ check status == RING_OK || status == RING_EMPTY || status == RING_E_MEMORY_GONE;
    //@ check status == RING_OK ==> c.slots == 0 && c.readable == 0 && c.writable == 0;
    //@ check status == RING_OK ==> !q->walk.indirect && !q->walk.writable_seen;
    check_positions(q);
    any_state(q, at, at);
    status = vq_publish(q);
    check_positions(q);
    //@ check status == RING_OK ==> !q->holding;
    any_state(q, at, at);
    int reason = vq_decide(q);
    //@ check CALL_NOTHING_NEW <= reason <= CALL_FIRST || reason == RING_E_MEMORY_GONE;
    any_state(q, at, at);
    int more = vq_arm(q);
    //@ check more == 0 || more == 1 || more == RING_E_MEMORY_GONE;
    any_state(q, at, at);
    vq_disarm(q);
    //@ check q->next_avail == at && q->next_used == at;
}

/* Verbs that move one position, from anywhere and by anything; `at` is the other one. */
static void movers(struct vq *q, uint16_t at)
{
    any_state(q, at, any_slot(q));
    vq_push(q, any32(), any32(), any32());
    check_positions(q);
    vq_push_batch(q, any32(), any32(), any32());
    check_positions(q);
    any_state(q, at, any_slot(q));
    q->broken = RING_E_ENDLESS;
    vq_conclude(q, any32(), any32(), any32());
    check_positions(q);
    //@ check q->next_avail == at;
    any_state(q, any_slot(q), at);
    vq_unpop(q, any32());
    check_positions(q);
    //@ check q->next_used == at;
}

static void all_verbs(uint32_t size, uint64_t features)
{
    struct vq *q = any_queue(size, RING_PACKED | features, NULL);
    struct chain c;

    lookers(q, 0);
    lookers(q, (uint16_t)(size - 1));
    movers(q, 0);
    movers(q, (uint16_t)(size - 1));
    any_state(q, any_slot(q), any_slot(q)); /* and looking from anywhere */
    vq_see(q);
    vq_take(q, &c);
    check_positions(q);
}

int main(void)
{
    //@ loop unroll SIZES;
    for (uint32_t i = 0; i < SIZES; i++) {
        all_verbs(sizes[i], 0);
        all_verbs(sizes[i], EVENT_IDX);
    }
    return 0;
}
