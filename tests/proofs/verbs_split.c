/*
 * The verbs of a split ring that touch the rings themselves, from any indices, whatever the
 * driver has written.
 *
 * With EVERY_SIZE for all 16 queue sizes, else for a few of them.
 *
 * Shown: every load and store lies in the ring parts; vq_take moves the next available index by one when it answers
 * OK and not at all when it does not, and answers a head and a walk inside the table; used index and available index
 * move only by the verbs that are there for it.
 */
#include "world.h"

/* Indices at which something could wrap. Checks of "one more" need them exactly. */
static const uint16_t indices[] = {0, 32767, 65535};
#define INDICES (sizeof(indices) / sizeof(*indices))

#ifdef EVERY_SIZE
static const uint32_t sizes[] = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
#else
static const uint32_t sizes[] = {1, 4, 32768};
#endif
#define SIZES (sizeof(sizes) / sizeof(*sizes))

static void any_state(struct vq *q, uint16_t next_avail)
{
    q->broken = RING_OK;
    q->next_avail = next_avail;
    q->avail_seen = any16();
    q->next_used = any16();
    q->published = any16();
    q->decided = any16();
    q->first_decision = any_bool();
    q->kicks_wanted = any_bool();
}

static void see(struct vq *q, uint16_t next_avail)
{
    any_state(q, next_avail);
    int status = vq_see(q);
    //@ check 0 <= status <= q->size || status == RING_E_AVAIL_AHEAD || status == RING_E_MEMORY_GONE;
    //@ check status < 0 ==> q->broken == status;
    //@ check q->next_avail == next_avail;
}

static void take(struct vq *q, uint16_t next_avail)
{
    struct chain c;

    any_state(q, next_avail);
    int status = vq_take(q, &c);
    uint16_t after = (uint16_t)(next_avail + 1);
    /*@ check status == RING_OK || status == RING_EMPTY || status == RING_E_HEAD_RANGE ||
              status == RING_E_MEMORY_GONE; */
    //@ check status == RING_OK ==> q->next_avail == after;
    //@ check status != RING_OK ==> q->next_avail == next_avail;
    //@ check status == RING_OK ==> c.head < q->size && c.slots == 1 && c.readable == 0 && c.writable == 0;
    //@ check status == RING_OK ==> !q->walk.indirect && !q->walk.writable_seen && q->walk.next < q->size;
    //@ check status == RING_OK ==> q->walk.entries == q->size && q->walk.steps_left == q->size;
    //@ check status < 0 ==> q->broken == status;
}

/* What does not look for chains leaves the available index alone. */
static void others(struct vq *q, uint16_t next_avail)
{
    any_state(q, next_avail);
    vq_push(q, any32(), any32(), any32());
    any_state(q, next_avail);
    vq_push_batch(q, any32(), any32(), any32());
    any_state(q, next_avail);
    vq_publish(q);
    any_state(q, next_avail);
    int reason = vq_decide(q);
    //@ check CALL_NOTHING_NEW <= reason <= CALL_FIRST || reason == RING_E_MEMORY_GONE;
    any_state(q, next_avail);
    int ahead = vq_arm(q);
    //@ check 0 <= ahead <= UINT16_MAX || ahead == RING_E_AVAIL_AHEAD || ahead == RING_E_MEMORY_GONE;
    any_state(q, next_avail);
    vq_disarm(q);
    any_state(q, next_avail);
    q->broken = RING_E_HEAD_RANGE;
    vq_conclude(q, any32(), any32(), any32());
    //@ check q->next_avail == next_avail;
}

static void all_verbs(uint32_t size, uint64_t features)
{
    struct vq *q = any_queue(size, features, NULL);

    //@ loop unroll INDICES;
    for (uint32_t i = 0; i < INDICES; i++) {
        see(q, indices[i]);
        take(q, indices[i]);
        others(q, indices[i]);
    }
    /* and from every other index, where Eva knows only that the accesses are right */
    struct chain c;
    any_state(q, any16());
    vq_unpop(q, any32());
    vq_see(q);
    vq_take(q, &c);
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
