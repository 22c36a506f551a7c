/* Delivery to a member whose driver has set what it wants, and where (virtio 1.2, 5.1.6.5).
 *
 * Theory of operation
 * -------------------
 * fabric.c asks who gets a frame; here the frames for one member are looked at once more, in the sender's worker, as
 * its settings say: those that a filter refuses are counted and gone, of the others a hash is made, and it or the flow
 * selects the door. Then they go through their doors as any others. The order of tests is that of 5.1.6: filters first,
 * so that a frame that is refused reaches no queue.
 *
 * What is looked at is copied first. The sender's driver may change a frame between this look and the copy that is
 * delivered: then it has deceived the receiver about a filter or a hash, which is all it can do.
 *
 * Settings change while the member's doors are closed, but senders look at them outside the doors. So they are counted
 * in member.users, as long as they have frames for it in hand: whoever changes the settings puts the new ones in place,
 * then waits until nobody is left; whoever comes after that has seen the new ones. That is the mirror image of how a
 * door is shut (fabric.c). When a command of the driver is answered, it has taken effect.
 */
#include <stdlib.h>
#include <time.h>

#include "batch.h"

#define TYPE_VLAN 0x8100
#define MAC 6
#define TAGGED (ETHERNET_HEADER + 2) /* bytes up to the end of the tag's id */
#define PAUSE_NS 50000
#define FORGET_MS 1000
#define PAUSES_A_MS (1000000 / PAUSE_NS)

/* ------------------------------------------------------------------------------------------ filter */

static bool is_listed(const struct receive_settings *s, const uint8_t *mac)
{
    for (uint32_t i = 0; i < s->macs; i++)
        if (memcmp(s->mac[i], mac, MAC) == 0)
            return true;
    return false;
}

/* 5.1.6.5.1 and 5.1.6.5.2 */
static bool refused_by_address(const struct receive_settings *s, const uint8_t *mac)
{
    static const uint8_t broadcast[MAC] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff};

    if (memcmp(mac, broadcast, MAC) == 0)
        return s->modes & RECEIVE_NO_BROADCAST;
    bool is_group = mac[0] & 1;
    if (s->modes & (is_group ? RECEIVE_NO_MULTICAST : RECEIVE_NO_UNICAST))
        return true;
    if (s->modes & (is_group ? RECEIVE_ALL_MULTICAST : RECEIVE_ALL_UNICAST))
        return false;
    return !is_listed(s, mac);
}

/* 5.1.6.5.3 */
static bool refused_by_vlan(const struct receive_settings *s, const uint8_t *frame, uint32_t given)
{
    if (given < TAGGED || rss_big16(frame + 2 * MAC) != TYPE_VLAN)
        return false;
    uint32_t id = rss_big16(frame + ETHERNET_HEADER) & 0xfff;
    return !(s->vlan[id / 64] >> id % 64 & 1);
}

int receive_refuses(const struct receive_settings *s, const uint8_t *frame, uint32_t given)
{
    if (s->modes & RECEIVE_ALL)
        return 0;
    return (s->modes & RECEIVE_BY_ADDRESS && refused_by_address(s, frame)) ||
           (s->modes & RECEIVE_BY_VLAN && refused_by_vlan(s, frame, given));
}

/* -------------------------------------------------------------------------------------------- hash */

uint32_t receive_hash(const struct receive_settings *s, const uint8_t *frame, uint32_t given, uint32_t *value)
{
    struct toeplitz t;
    uint32_t look = s->tunnel_types ? RSS_LOOK_INNER : RSS_LOOK;

    toeplitz_init(&t, s->key);
    return rss_hash(&t, s->hash_types, s->tunnel_types, (struct seen){frame, given < look ? given : look}, value);
}

uint32_t receive_toeplitz(const uint8_t *key, const uint8_t *input, uint32_t length)
{
    struct toeplitz t;

    toeplitz_init(&t, key);
    return toeplitz_hash(&t, input, length < RSS_INPUT ? length : RSS_INPUT);
}

/* ---------------------------------------------------------------------------------------- settings */

static struct receiver *receiver_new(const struct receive_settings *s)
{
    struct receiver *r = malloc(sizeof(*r));

    if (!r)
        return NULL;
    r->set = *s;
    toeplitz_init(&r->toeplitz, s->key);
    r->look = ETHERNET_HEADER;
    if (s->modes & RECEIVE_BY_VLAN && !(s->modes & RECEIVE_ALL))
        r->look = TAGGED;
    if (s->hash_types)
        r->look = s->tunnel_types ? RSS_LOOK_INNER : RSS_LOOK;
    return r;
}

int member_receive(struct member *m, const struct receive_settings *s, int timeout_ms)
{
    struct receiver *r = s ? receiver_new(s) : NULL;

    if (s && !r)
        return RING_E_NOMEM;
    struct receiver *before = __atomic_exchange_n(&m->receiver, r, __ATOMIC_SEQ_CST);
    for (int i = 0; __atomic_load_n(&m->users, __ATOMIC_SEQ_CST); i++) {
        if (i >= timeout_ms * PAUSES_A_MS)
            return RING_E_BUSY; /* what was before stays, for whoever is still reading it */
        nanosleep(&(struct timespec){.tv_nsec = PAUSE_NS}, NULL);
    }
    free(before);
    return RING_OK;
}

void receive_forget(struct member *m)
{
    member_receive(m, NULL, FORGET_MS); /* a sender may have been looking since before it was down */
    m->unwanted = 0;
}

/* ---------------------------------------------------------------------------------------- delivery */

/* Look at one frame. -> it is accepted: its door and its hash are noted */
static bool sort_frame(struct frame *f, uint16_t *door, const struct sorting *s)
{
    const struct receiver *r = s->by;
    const struct receive_settings *set = &r->set;
    uint8_t seen[RSS_LOOK_INNER];
    const uint8_t *begins = f->ethernet;
    uint32_t given = ETHERNET_HEADER;

    if (r->look > ETHERNET_HEADER) {
        given = f->length < r->look ? f->length : r->look;
        pieces_copy(f->pieces, f->count, 0, seen, given, false);
        __asm__ volatile("" ::: "memory"); /* decide on this copy, not on a second read of its source */
        memcpy(seen, f->ethernet, ETHERNET_HEADER); /* by which it was routed */
        begins = seen;
    }
    if (receive_refuses(set, begins, given))
        return false;
    if (set->hash_types)
        f->hash.report = (uint16_t)rss_hash(&r->toeplitz, set->hash_types, set->tunnel_types,
                                            (struct seen){begins, given}, &f->hash.value);
    if (!set->rss)
        *door = (uint16_t)(s->doors > 1 ? f->flow % s->doors : 0);
    else
        *door = f->hash.report ? set->table[f->hash.value & set->mask] : set->unclassified;
    return true;
}

/* Under the guard: sender's memory is read. */
static void sort(struct lane *from)
{
    struct batch *b = from->batch;
    struct sorting *s = &b->sorting;

    for (; s->left; s->left &= s->left - 1) {
        int i = __builtin_ctzll(s->left);
        if (sort_frame(&b->frames[i], &s->door[i], s))
            s->accepted |= 1ull << i;
    }
}

static void count(uint64_t *counter, uint64_t frames)
{
    __atomic_fetch_add(counter, (uint64_t)__builtin_popcountll(frames), __ATOMIC_RELAXED);
}

/* Those of the frames that go through the same door as the first one. */
static uint64_t with_first(const struct sorting *s, uint64_t frames)
{
    uint16_t door = s->door[__builtin_ctzll(frames)];
    uint64_t mine = 0;

    for (uint64_t left = frames; left; left &= left - 1) {
        int i = __builtin_ctzll(left);
        if (s->door[i] == door)
            mine |= 1ull << i;
    }
    return mine;
}

/* -> false: the sender's memory vanished */
static bool sort_and_deliver(struct member *m, const struct receiver *r, const struct lane *from, uint64_t frames)
{
    struct batch *b = from->batch;
    struct sorting *s = &b->sorting;

    s->by = r;
    s->doors = __atomic_load_n(&m->spread, __ATOMIC_RELAXED);
    s->left = frames;
    s->accepted = 0;
    bool fine = guarded((struct lane *)from, sort);
    if (fine)
        count(&m->unwanted, frames & ~s->accepted);
    for (uint64_t left = s->accepted, mine; left && fine; left &= ~mine) {
        mine = with_first(s, left);
        uint16_t door = s->door[__builtin_ctzll(mine)];
        if (door < FABRIC_DOORS)
            fine = fabric_through(&m->doors[door], from, mine, false);
        else
            count(&m->doors[0].stopped, mine);
    }
    for (; frames; frames &= frames - 1)
        b->frames[__builtin_ctzll(frames)].hash = (struct hash_header){0}; /* it was this member's */
    return fine;
}

bool receive_deliver(struct member *m, const struct lane *from, uint64_t frames)
{
    bool fine = true;

    __atomic_fetch_add(&m->users, 1, __ATOMIC_SEQ_CST);
    const struct receiver *r = __atomic_load_n(&m->receiver, __ATOMIC_SEQ_CST);
    if (r)
        fine = sort_and_deliver(m, r, from, frames);
    else
        count(&m->doors[0].stopped, frames); /* it was just taken away, and the doors are closed */
    __atomic_fetch_sub(&m->users, 1, __ATOMIC_RELEASE);
    return fine;
}
