/* The micro-steps of split.inl, wrapped one by one for the step engine: each call is one visible phase,
 * under a guard of its own, refused on a broken ring. */
#include "split.inl"

/* Open and close every wrapper below. */
#define ENTER(q)                                           \
    do {                                                   \
        if ((q)->broken)                                   \
            return (q)->broken;                            \
        if (guard_enter())                                 \
            return vq_break((q), RING_E_MEMORY_GONE, 0);   \
    } while (0)
#define LEAVE(value)      \
    do {                  \
        guard_leave();    \
        return (value);   \
    } while (0)

int vq_see(struct vq *q)
{
    ENTER(q);
    int n = split_see(q);
    LEAVE(n);
}

int vq_take(struct vq *q, struct chain *c)
{
    ENTER(q);
    int status = split_take(q, c);
    LEAVE(status);
}

int vq_walk(struct vq *q, struct chain *c, struct piece *pieces, uint32_t max)
{
    ENTER(q);
    int status = split_walk(q, c, pieces, max);
    LEAVE(status);
}

int vq_pop(struct vq *q, struct chain *c, struct piece *pieces, uint32_t max)
{
    ENTER(q);
    int status = split_pop(q, c, pieces, max);
    LEAVE(status);
}

int vq_unpop(struct vq *q, uint32_t count)
{
    if (q->broken)
        return q->broken;
    split_unpop(q, count);
    return RING_OK;
}

int vq_push(struct vq *q, uint32_t head, uint32_t written)
{
    ENTER(q);
    split_push(q, head, written);
    LEAVE(RING_OK);
}

int vq_publish(struct vq *q)
{
    ENTER(q);
    split_publish(q);
    LEAVE(RING_OK);
}

int vq_decide(struct vq *q)
{
    ENTER(q);
    int reason = split_decide(q);
    LEAVE(reason);
}

int vq_arm(struct vq *q)
{
    ENTER(q);
    int n = split_arm(q);
    LEAVE(n);
}

int vq_disarm(struct vq *q)
{
    ENTER(q);
    split_disarm(q);
    LEAVE(RING_OK);
}
