/* What a member's driver has set about what it receives, ready for use. See receive.c. */
#pragma once

#include "rss.h"

struct receiver {
    struct receive_settings set;
    struct toeplitz toeplitz;
    uint32_t look; /* how many bytes of a frame are looked at */
};

/* What is being found out about the frames for one member; a part of struct batch. */
struct sorting {
    const struct receiver *by;
    uint32_t doors;    /* that flows are spread over, where no hash selects one */
    uint64_t left;     /* bits: frames that have not been looked at */
    uint64_t accepted; /* bits: those that have been, and were not refused */
    uint16_t door[64]; /* [BURST_FRAMES] of those accepted; RECEIVE_NO_DOOR: none */
};

struct door;
struct lane;

/* As deliver_to of fabric.c, for a member with settings. */
bool receive_deliver(struct member *m, const struct lane *from, uint64_t frames);
/* It has left the switch. */
void receive_forget(struct member *m);
