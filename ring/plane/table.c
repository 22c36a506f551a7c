/* The address table of the switch: bounded, without locks, and never in anybody's way.
 *
 * An entry is one word of 64 bits, so that a reader sees all of it or nothing:
 *
 *     bits 0-47 address   48-55 member's number + 1   56-63 epoch it was last seen in
 *
 * and 0 is a free one. Entries form sets of eight, a cache line each; the address alone says which set. So a look-up
 * reads one line, and no driver can make it read more.
 *
 * Several workers learn at once. Each store is a compare-and-exchange from the word that was looked at; one that fails
 * is left undone, for somebody else has just written there, and the next frame learns again. An entry that says
 * already what is to be said is not written: known stations cost their readers no cache miss but once an epoch.
 *
 * A station that moves overwrites its entry. Of a full set the one goes that was not seen for the longest time, of
 * several the last: who floods the switch with made-up addresses drives out his own, as far as stations have been
 * heard in the same epoch. Two workers can enter the same address twice; each then looks for that and removes the one
 * further behind.
 *
 * The control thread lets time pass (table_tick) and clears what has become too old, so that eight bits of an epoch
 * are never compared across their wrap.
 */
#include <stdbool.h>

#include "table.h"

#define MAC_MASK 0xffffffffffffull

_Static_assert(FABRIC_MEMBERS < 256, "a member's number has 8 bits of an entry");
_Static_assert(FABRIC_LIFETIME < 256, "an age has 8 bits of an entry");

static uint64_t load(const uint64_t *word)
{
    return __atomic_load_n(word, __ATOMIC_RELAXED);
}

static bool replace(uint64_t *word, uint64_t old, uint64_t new)
{
    return __atomic_compare_exchange_n(word, &old, new, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
}

static int number_in(uint64_t word)
{
    return (int)(word >> 48 & 0xff) - 1;
}

static uint8_t age(const struct table *t, uint64_t word)
{
    return (uint8_t)(__atomic_load_n(&t->epoch, __ATOMIC_RELAXED) - (word >> 56));
}

/* The first entry of the set of `mac`. */
static uint32_t set_of(const struct table *t, uint64_t mac)
{
    /* the upper half of a product depends on all bits of its factors */
    uint64_t mixed = (mac ^ mac >> 29) * t->factor;

    return (uint32_t)(mixed >> 32) % (FABRIC_ADDRESSES / TABLE_WAYS) * TABLE_WAYS;
}

static bool names(uint64_t word, uint64_t mac)
{
    return word && (word & MAC_MASK) == mac;
}

void table_init(struct table *t, uint64_t seed)
{
    t->factor = (seed ^ 0x9E3779B97F4A7C15ull) | 1;
}

int table_find(const struct table *t, uint64_t mac)
{
    const uint64_t *set = &t->words[set_of(t, mac)];

    for (uint32_t way = 0; way < TABLE_WAYS; way++) {
        uint64_t word = load(&set[way]);
        if (names(word, mac))
            return number_in(word);
    }
    return -1;
}

/* Leave only the first entry of `mac`. */
static void remove_twins(uint64_t *set, uint64_t mac)
{
    bool seen = false;

    for (uint32_t way = 0; way < TABLE_WAYS; way++) {
        uint64_t word = load(&set[way]);
        if (!names(word, mac))
            continue;
        if (seen)
            replace(&set[way], word, 0);
        seen = true;
    }
}

void table_learn(struct table *t, uint64_t mac, uint32_t number)
{
    uint64_t *set = &t->words[set_of(t, mac)];
    uint64_t epoch = __atomic_load_n(&t->epoch, __ATOMIC_RELAXED);
    uint64_t wanted = mac | (uint64_t)(number + 1) << 48 | epoch << 56;
    uint64_t *victim = set, loses = 0;
    int oldest = -1;

    for (uint32_t way = 0; way < TABLE_WAYS; way++) {
        uint64_t word = load(&set[way]);
        if (names(word, mac)) {
            if (word != wanted)
                replace(&set[way], word, wanted);
            return;
        }
        int how_old = word ? age(t, word) : 256; /* a free one is older than any */
        if (how_old > oldest || (word && how_old == oldest)) {
            oldest = how_old;
            victim = &set[way];
            loses = word;
        }
    }
    if (replace(victim, loses, wanted))
        remove_twins(set, mac);
}

void table_tick(struct table *t)
{
    __atomic_fetch_add(&t->epoch, 1, __ATOMIC_RELAXED);
    for (uint32_t i = 0; i < FABRIC_ADDRESSES; i++) {
        uint64_t word = load(&t->words[i]);
        if (word && age(t, word) >= FABRIC_LIFETIME)
            replace(&t->words[i], word, 0);
    }
}

void table_forget(struct table *t, uint32_t number)
{
    for (uint32_t i = 0; i < FABRIC_ADDRESSES; i++) {
        uint64_t word = load(&t->words[i]);
        if (word && number_in(word) == (int)number)
            replace(&t->words[i], word, 0);
    }
}

uint32_t table_count(const struct table *t)
{
    uint32_t count = 0;

    for (uint32_t i = 0; i < FABRIC_ADDRESSES; i++)
        count += load(&t->words[i]) != 0;
    return count;
}
