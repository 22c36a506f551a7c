/* The micro-steps of split.inl and packed.inl, wrapped one by one for the step engine: each call is one
 * visible phase, under a guard of its own, refused on a broken ring. */
#include "packed.inl"
#include "split.inl"

/* Open every wrapper below: one phase of a ring that is not broken, under the guard. */
#define ENTER(q)                                         \
    do {                                                 \
        if ((q)->broken)                                 \
            return (q)->broken;                          \
        if (guard_enter())                               \
            return vq_vanished((q), NULL, 0);            \
    } while (0)

/* The verb of the ring's format, and the end of the guard. */
#define ANSWER(q, verb, ...)                                                                      \
    do {                                                                                          \
        int answer = (q)->is_packed ? packed_##verb(__VA_ARGS__) : split_##verb(__VA_ARGS__);     \
        guard_leave();                                                                            \
        return answer;                                                                            \
    } while (0)

/* The same for verbs that cannot fail. */
#define DO(q, verb, ...)                 \
    do {                                 \
        if ((q)->is_packed)              \
            packed_##verb(__VA_ARGS__);  \
        else                             \
            split_##verb(__VA_ARGS__);   \
        guard_leave();                   \
        return RING_OK;                  \
    } while (0)

int vq_see(struct vq *q)
{
    ENTER(q);
    ANSWER(q, see, q);
}

int vq_take(struct vq *q, struct chain *c)
{
    ENTER(q);
    ANSWER(q, take, q, &q->walk, c);
}

int vq_walk(struct vq *q, struct chain *c, struct piece *pieces, uint32_t max)
{
    ENTER(q);
    ANSWER(q, walk, q, &q->walk, c, pieces, max);
}

int vq_pop(struct vq *q, struct chain *c, struct piece *pieces, uint32_t max)
{
    ENTER(q);
    ANSWER(q, pop, q, c, pieces, max);
}

int vq_unpop(struct vq *q, uint32_t slots)
{
    ENTER(q);
    DO(q, unpop, q, slots);
}

int vq_push(struct vq *q, uint32_t head, uint32_t slots, uint32_t written)
{
    ENTER(q);
    DO(q, push, q, head, slots, written);
}

int vq_push_batch(struct vq *q, uint32_t head, uint32_t chains, uint32_t slots)
{
    ENTER(q);
    DO(q, push_batch, q, head, chains, slots);
}

int vq_publish(struct vq *q)
{
    ENTER(q);
    DO(q, publish, q);
}

int vq_decide(struct vq *q)
{
    ENTER(q);
    ANSWER(q, decide, q);
}

int vq_arm(struct vq *q)
{
    ENTER(q);
    ANSWER(q, arm, q);
}

int vq_disarm(struct vq *q)
{
    ENTER(q);
    DO(q, disarm, q);
}

static int scout(struct vq *q, struct piece *pieces)
{
    struct chain c;
    int status = q->is_packed ? packed_pop(q, &c, pieces, RING_PIECES_MAX) : split_pop(q, &c, pieces, RING_PIECES_MAX);

    if (q->broken)
        return q->broken;
    if (status != RING_EMPTY) {
        if (q->is_packed)
            packed_unpop(q, c.slots);
        else
            split_unpop(q, c.slots);
    }
    return (int)q->scouted_count;
}

int vq_scout(struct vq *q, struct piece *pieces, struct iotlb_fault *out, uint32_t max)
{
    if (q->broken)
        return q->broken;
    q->scouted = out;
    q->scouted_room = max;
    q->scouted_count = 0;
    if (guard_enter()) {
        q->scouted = NULL;
        return vq_vanished(q, NULL, 0);
    }
    int found = scout(q, pieces);
    guard_leave();
    q->scouted = NULL;
    return found;
}

static int conclude(struct vq *q, uint32_t head, uint32_t chains, uint32_t slots)
{
    if (q->is_packed) {
        if (chains)
            packed_push_batch(q, head, chains, slots);
        packed_publish(q);
        return packed_decide(q);
    }
    if (chains)
        split_push_batch(q, head, chains, slots);
    split_publish(q);
    return split_decide(q);
}

int vq_conclude(struct vq *q, uint32_t head, uint32_t chains, uint32_t slots)
{
    /* what we take from the ring has lost its meaning, what we put there has not */
    if (q->broken && q->broken != RING_E_AVAIL_AHEAD && q->broken != RING_E_HEAD_RANGE &&
        q->broken != RING_E_ENDLESS)
        return q->broken;
    if (guard_enter())
        return vq_vanished(q, NULL, 0);
    int reason = conclude(q, head, chains, slots);
    guard_leave();
    return reason;
}
