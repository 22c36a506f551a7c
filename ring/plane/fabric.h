/*
 * The contract of the switch: one learning Ethernet switch (IEEE 802.1D, without spanning tree) between the devices
 * of a process. Part of the cffi definition, before pump.h. fabric.c tells how it works.
 *
 * A fabric is the switch. A member is one port of it: a device, or an uplink, which is a descriptor to be read and
 * written as a port of the pump is. Frames come to a member through lanes (lane_config.member of pump.h) and leave
 * through its doors: each receiveq of a device is one, and an uplink has one.
 *
 * Fabric and members belong to the control thread; workers only use them.
 */

/* Members of one fabric. */
#define FABRIC_MEMBERS 64
/* Addresses it remembers. */
#define FABRIC_ADDRESSES 4096
/* Receiveqs of one member. */
#define FABRIC_DOORS 128
/* An address nobody has sent from is forgotten at this tick after the one it was last seen in. */
#define FABRIC_LIFETIME 16

struct fabric; /* one switch */
struct member; /* one port of it */

/* Frames that a member did not get, by reasons that show before its receiveq is looked at. They belong to the counters
 * of what goes to the member, beside those of its lanes. */
struct member_missed {
    uint64_t busy;    /* DROP_BUSY */
    uint64_t stopped; /* DROP_STOPPED */
    uint64_t unwanted; /* DROP_UNWANTED */
};

/* -> NULL with errno. seed: any number; who knows it can choose addresses that drive each other out. */
struct fabric *fabric_new(uint64_t seed);
/* It is a wire, no switch: what one member sends all others get, whatever the addresses. Before a member joins. */
void fabric_make_wire(struct fabric *f);
/* No lane may name a member of it any more. */
void fabric_free(struct fabric *f);
/* A new member, down. uplink: its lanes have no queues but a descriptor. -> NULL: there are FABRIC_MEMBERS. */
struct member *fabric_join(struct fabric *f, int uplink);
/* Its lanes must be detached. */
void fabric_leave(struct member *m);
/* Time passes: what has not been seen for FABRIC_LIFETIME ticks is forgotten. */
void fabric_tick(struct fabric *f);
/* How many addresses are known. */
uint32_t fabric_known(const struct fabric *f);
/* Behind which member an address (6 bytes) is. -> its number, or -1: not known. */
int fabric_find(const struct fabric *f, const uint8_t *mac);

/* 0 to FABRIC_MEMBERS - 1; free again when the member has left. */
uint32_t member_number(const struct member *m);
/* Flows are spread over the doors 0 to `doors` - 1, at most FABRIC_DOORS; 0: the member is down, gets nothing, and
 * what was behind it is forgotten. To be called while its lanes are detached. */
void member_spread(struct member *m, uint32_t doors);
/* The worker of its lanes does not answer: nobody comes in any more, and the member is down for good. */
void member_abandon(struct member *m);
/* This address (6 bytes) is behind the member, as if a frame had come from it. */
void member_learn(struct member *m, const uint8_t *mac);
/* Over all its doors, since it joined. */
void member_missed(const struct member *m, struct member_missed *out);
