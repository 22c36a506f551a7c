/* Calls that are put off until enough has come together, or long enough has been waited. See coalesce.c. */
#pragma once

#include "lane.h"

/* Something was published. Is the driver to be told later? If not, it is now. */
bool coalesce_puts_off(struct coalescing *c, const struct flow_config *flow, const struct flow_stats *stats);

/* The worker takes the lane: timers are there where they are needed. And it lets go: whatever was put off is told. */
void coalesce_open(struct lane *l);
void coalesce_shut(struct lane *l);
void coalesce_free(struct lane *l);
/* The timer of this direction (enum work) has gone off. */
void coalesce_due(struct lane *l, uint32_t direction);

static inline struct coalescing *coalescing_of(struct lane *l, const struct flow_config *flow)
{
    return flow == &l->config.from_guest ? &l->coalescing_from_guest : &l->coalescing_to_guest;
}
