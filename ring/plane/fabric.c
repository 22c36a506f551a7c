/* The switch: frames from the rings of one guest straight into those of others, with one copy for each receiver.
 *
 * Theory of operation
 * -------------------
 * A burst of a sender has three steps, driven by serve.c:
 *
 *   gather   (forward.inl, the sender's ring format; uplink.c for a descriptor) up to 64 chains are popped. Of each
 *            the two headers are copied to private memory, checked, and decided upon (fabric_route): the source is
 *            learned, the destination looked up. The frame's bit is set in the word of each member that gets it.
 *   deliver  (here) door by door: the frames for it, in their order, by deliver.inl in the receiver's ring format.
 *            Bytes go once, from the sender's buffers to the receiver's. One publication and at most one call a door.
 *   settle   (forward.inl) the chains go back to the sender, used, with one publication.
 *
 * Whoever sends does all the work: the receiver's worker has no part in it, but for calls that its driver has had put
 * off (coalesce.c). What a driver has set about the frames it receives is done between the first two steps (receive.c).
 *
 * Doors. A receiveq is then filled by the workers of others, one at a time: whoever gets its door. A sender that
 * finds it taken looks again for a bounded time, then its frames for this receiver are lost as `busy`; nobody ever
 * waits for a ring. The worker that a lane is attached to opens its door, and closes it before it lets go: it takes the
 * lane out, then waits until nobody is inside, which is one burst at the most. So a detached lane is touched by nobody,
 * as everywhere (docs/architecture.md, "Threads"). No worker is inside two doors. The door of an uplink lets in
 * everybody, for writing to a descriptor needs no turns.
 *
 * The order of a flow. A flow comes from one transmitq, thus by one worker; it goes to one door, which its hash alone
 * selects. Where that is closed or busy the frame is lost: at another it could overtake.
 *
 * Two memories are at stake while a frame is copied, and each can vanish. There is one guard (guard.c) for each burst
 * and door, and the faulting address says whose memory it was. The receiver's: its ring breaks, its session ends, the
 * sender goes on with the next door. The sender's: what was half done for the receiver is taken back, its ring goes on
 * and is published, and the sender's lane is dead.
 *
 * Receivers that are slow lose frames, for that is what a switch does: a frame for which there are no buffers is
 * counted there, and nobody waits. Hence a receiveq at a switch is never kicked for, and its kicks mean nothing.
 *
 * Not forwarded are frames that no switch forwards: those from a group address, and those to 01:80:C2:00:00:00-0F
 * (802.1D, 7.12.6, addresses reserved for bridges). Two members that are only to be joined have a wire instead, which
 * has no opinion on addresses: all that a switch does to a receiver, and nothing of what it does to a network.
 */
#include <errno.h>
#include <sched.h>
#include <sys/mman.h>
#include <time.h>

#include "batch.h"

#define LOOKS 2000 /* at a door that is taken, before others are let run... */
#define YIELDS 100 /* ...and how often they are */
#define PAUSE_NS 100000 /* between looks at a door that is being shut and stays taken */

enum { MAC = 6 };

/* ----------------------------------------------------------------------------------------- routing */

static bool is_group(const uint8_t *mac)
{
    return mac[0] & 1;
}

static bool is_reserved(const uint8_t *mac)
{
    static const uint8_t bridges[5] = {0x01, 0x80, 0xC2, 0x00, 0x00};

    return memcmp(mac, bridges, sizeof(bridges)) == 0 && mac[5] < 0x10;
}

/* Who gets a frame for this address. -> their bits; none, and *dropped says why */
static uint64_t members_for(const struct member *from, const uint8_t *destination, int *dropped)
{
    const struct fabric *f = from->fabric;
    uint64_t up = __atomic_load_n(&f->up, __ATOMIC_RELAXED), all = up & ~(1ull << from->number);

    *dropped = DROP_FILTERED;
    if (is_reserved(destination) && !f->is_wire)
        return 0;
    if (!is_group(destination) && !f->is_wire) {
        int number = table_find(&f->table, mac_at(destination));
        if (number == (int)from->number)
            return 0;
        if (number >= 0 && up >> number & 1)
            return 1ull << number;
    }
    *dropped = DROP_NO_RECEIVER;
    return all;
}

void fabric_begin(struct batch *b)
{
    b->count = b->used = 0;
    b->source = b->destination = ~0ull;
}

int fabric_route(const struct member *from, struct batch *b, uint32_t i)
{
    struct fabric *f = from->fabric;
    struct frame *frame = &b->frames[i];
    uint64_t destination = mac_at(frame->ethernet), source = mac_at(frame->ethernet + MAC);

    if (source != b->source && !f->is_wire) {
        if (unlikely(is_group(frame->ethernet + MAC)))
            return DROP_FILTERED;
        table_learn(&f->table, source, from->number);
        b->source = source;
        b->destination = ~0ull; /* it may just have moved here */
    }
    if (destination != b->destination) {
        b->chosen = members_for(from, frame->ethernet, &b->why_none);
        b->destination = destination;
    }
    uint64_t members = b->chosen;
    if (unlikely(!members))
        return b->why_none;
    if (members & __atomic_load_n(&f->spread, __ATOMIC_RELAXED))
        frame->flow = flow_hash(frame->pieces, frame->count, frame->length);
    b->members |= members;
    while (members) {
        b->to[__builtin_ctzll(members)] |= 1ull << i;
        members &= members - 1;
    }
    return 0;
}

/* ------------------------------------------------------------------------------------------- doors */

void lane_open(struct lane *l)
{
    const struct lane_config *c = &l->config;

    l->delivery.waiting = false;
    if (c->member && c->door >= 0)
        __atomic_store_n(&c->member->doors[c->door].lane, l, __ATOMIC_SEQ_CST);
}

void lane_shut(struct lane *l)
{
    const struct lane_config *c = &l->config;

    if (!c->member || c->door < 0)
        return;
    struct door *d = &c->member->doors[c->door];
    /* The lane is taken out before one looks who is inside; whoever enters does the mirror image. */
    __atomic_store_n(&d->lane, NULL, __ATOMIC_SEQ_CST);
    for (uint32_t i = 0; __atomic_load_n(&d->users, __ATOMIC_SEQ_CST); i++)
        if (i < YIELDS)
            sched_yield();
        else
            nanosleep(&(struct timespec){.tv_nsec = PAUSE_NS}, NULL);
}

/* Of a door that could not be had, and is taken still, nobody expects it soon: its user may be stuck. */
bool door_enter(struct door *d)
{
    uint32_t looks = __atomic_load_n(&d->stuck, __ATOMIC_RELAXED) ? 1 : LOOKS + YIELDS;

    for (uint32_t i = 0; i < looks; i++) {
        uint32_t nobody = 0;
        if (__atomic_load_n(&d->users, __ATOMIC_RELAXED) == 0 &&
            __atomic_compare_exchange_n(&d->users, &nobody, 1, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED)) {
            if (unlikely(looks == 1))
                __atomic_store_n(&d->stuck, 0, __ATOMIC_RELAXED);
            return true;
        }
        if (i < LOOKS)
            relax();
        else
            sched_yield();
    }
    __atomic_store_n(&d->stuck, 1, __ATOMIC_RELAXED);
    return false;
}

void door_leave(struct door *d)
{
    __atomic_fetch_sub(&d->users, 1, __ATOMIC_RELEASE);
}

static void miss(uint64_t *counter, uint64_t frames)
{
    __atomic_fetch_add(counter, (uint64_t)__builtin_popcountll(frames), __ATOMIC_RELAXED);
}

/* ---------------------------------------------------------------------------------------- delivery */

static bool is_set(const int32_t *owner)
{
    return __atomic_load_n(owner, __ATOMIC_RELAXED);
}

/* The receiver's memory vanished, or that of its dirty log: what follows for it. */
static void receiver_gone(struct lane *to)
{
    struct vq *q = to->config.to_guest.queue;
    struct delivery *d = &to->delivery;

    lane_event(to, vq_vanished(q, to->pieces + 1, d->pieces) == RING_E_LOG_GONE ? LANE_LOG_GONE : LANE_MEMORY_GONE);
    to->stats.to_guest.dropped[DROP_STOPPED] += (uint64_t)__builtin_popcountll(d->left);
}

/* Put these frames into the receiveq whose door is held. -> false: the sender's memory vanished. */
static bool deliver_to_ring(const struct lane *from, struct lane *to, uint64_t frames)
{
    struct vq *q = to->config.to_guest.queue;
    bool sender_is_there = true;

    to->delivery.batch = from->batch;
    to->delivery.left = frames;
    to->delivery.slots = to->delivery.pieces = 0;
    if (q->broken || to->delivery.waiting) {
        to->stats.to_guest.dropped[DROP_STOPPED] += (uint64_t)__builtin_popcountll(frames);
        return true;
    }
    if (!guarded(to, directions_of(q)->deliver)) {
        /* whose address it was, the handler has marked */
        const struct vq *sending = from->config.from_guest.queue;
        sender_is_there = !sending || !is_set(sending->mem->owner);
        if (sender_is_there || is_set(q->mem->owner) || (q->log && is_set(q->log->owner)) ||
            !guarded(to, directions_of(q)->take_back))
            receiver_gone(to);
    }
    lane_report(to);
    return sender_is_there;
}

bool fabric_through(struct door *d, const struct lane *from, uint64_t frames, bool shared)
{
    bool fine = true;

    if (shared)
        __atomic_fetch_add(&d->users, 1, __ATOMIC_SEQ_CST);
    else if (!door_enter(d))
        return miss(&d->busy, frames), true;
    struct lane *to = __atomic_load_n(&d->lane, __ATOMIC_SEQ_CST);
    if (!to)
        miss(&d->stopped, frames);
    else if (shared)
        fine = uplink_write(to, from->batch, frames);
    else
        fine = deliver_to_ring(from, to, frames);
    door_leave(d);
    return fine;
}

/* -> false: the sender's memory vanished */
static bool deliver_to(struct member *m, const struct lane *from, uint64_t frames)
{
    const struct frame *all = from->batch->frames;
    uint32_t doors = __atomic_load_n(&m->spread, __ATOMIC_RELAXED);
    bool shared = __atomic_load_n(&m->uplink, __ATOMIC_RELAXED);

    if (unlikely(__atomic_load_n(&m->receiver, __ATOMIC_RELAXED)))
        return receive_deliver(m, from, frames);
    if (doors <= 1) /* down by now: the door is closed, and counts */
        return fabric_through(&m->doors[0], from, frames, shared);
    while (frames) {
        uint32_t door = all[__builtin_ctzll(frames)].flow % doors;
        uint64_t mine = 0;
        for (uint64_t left = frames; left; left &= left - 1) {
            int i = __builtin_ctzll(left);
            if (all[i].flow % doors == door)
                mine |= 1ull << i;
        }
        frames &= ~mine;
        if (!fabric_through(&m->doors[door], from, mine, shared))
            return false;
    }
    return true;
}

bool fabric_deliver(const struct lane *from)
{
    struct fabric *f = from->config.member->fabric;
    struct batch *b = from->batch;
    bool fine = true;

    while (b->members) {
        int number = __builtin_ctzll(b->members);
        uint64_t frames = b->to[number];
        b->members &= b->members - 1;
        b->to[number] = 0;
        if (fine)
            fine = deliver_to(&f->members[number], from, frames);
    }
    return fine;
}

void fabric_discard(struct batch *b)
{
    b->members = 0;
    memset(b->to, 0, sizeof(b->to));
}

/* ---------------------------------------------------------------------------------------- contract */

struct fabric *fabric_new(uint64_t seed)
{
    /* most doors are never used, and pages nobody touches cost nothing */
    struct fabric *f = mmap(NULL, sizeof(*f), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (f == MAP_FAILED)
        return NULL;
    table_init(&f->table, seed);
    return f;
}

void fabric_make_wire(struct fabric *f)
{
    f->is_wire = true;
}

void fabric_free(struct fabric *f)
{
    munmap(f, sizeof(*f));
}

struct member *fabric_join(struct fabric *f, int uplink)
{
    if (!~f->taken)
        return NULL;
    uint32_t number = (uint32_t)__builtin_ctzll(~f->taken);
    struct member *m = &f->members[number];
    f->taken |= 1ull << number;
    m->fabric = f;
    m->number = number;
    __atomic_store_n(&m->uplink, uplink != 0, __ATOMIC_RELAXED); /* a sender may still look at who was here before */
    return m;
}

void fabric_leave(struct member *m)
{
    member_spread(m, 0);
    receive_forget(m);
    for (uint32_t i = 0; i < FABRIC_DOORS; i++)
        if (m->doors[i].busy || m->doors[i].stopped) /* most were never touched, and stay so */
            m->doors[i].busy = m->doors[i].stopped = 0;
    m->fabric->taken &= ~(1ull << m->number);
}

void fabric_tick(struct fabric *f)
{
    table_tick(&f->table);
}

uint32_t fabric_known(const struct fabric *f)
{
    return table_count(&f->table);
}

int fabric_find(const struct fabric *f, const uint8_t *mac)
{
    return table_find(&f->table, mac_at(mac));
}

uint32_t member_number(const struct member *m)
{
    return m->number;
}

/* Set or clear a member's bit. */
static void mark(uint64_t *bits, uint32_t number, bool set)
{
    if (set)
        __atomic_fetch_or(bits, 1ull << number, __ATOMIC_RELAXED);
    else
        __atomic_fetch_and(bits, ~(1ull << number), __ATOMIC_RELAXED);
}

void member_spread(struct member *m, uint32_t doors)
{
    struct fabric *f = m->fabric;

    mark(&f->spread, m->number, doors > 1);
    __atomic_store_n(&m->spread, doors, __ATOMIC_RELAXED);
    mark(&f->up, m->number, doors > 0);
    if (!doors)
        table_forget(&f->table, m->number);
}

void member_abandon(struct member *m)
{
    member_spread(m, 0);
    for (uint32_t i = 0; i < FABRIC_DOORS; i++)
        if (__atomic_load_n(&m->doors[i].lane, __ATOMIC_RELAXED))
            __atomic_store_n(&m->doors[i].lane, NULL, __ATOMIC_SEQ_CST);
}

void member_learn(struct member *m, const uint8_t *mac)
{
    if (!is_group(mac) && !m->fabric->is_wire)
        table_learn(&m->fabric->table, mac_at(mac), m->number);
}

void member_missed(const struct member *m, struct member_missed *out)
{
    *out = (struct member_missed){.unwanted = __atomic_load_n(&m->unwanted, __ATOMIC_RELAXED)};
    for (uint32_t i = 0; i < FABRIC_DOORS; i++) {
        out->busy += __atomic_load_n(&m->doors[i].busy, __ATOMIC_RELAXED);
        out->stopped += __atomic_load_n(&m->doors[i].stopped, __ATOMIC_RELAXED);
    }
}
