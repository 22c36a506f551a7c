/* Two threads that have to meet. Programs that include this define _GNU_SOURCE. */
#pragma once

#include <sched.h>

#include "check.h"

/* How many processors this thread may use. */
static inline int processors(void)
{
    cpu_set_t all;

    CHECK_EQ(sched_getaffinity(0, sizeof(all), &all), 0);
    return CPU_COUNT(&all);
}

/* Run this thread on the n-th of them: two on one processor would only take turns. */
static inline void settle(int n)
{
    cpu_set_t all, one;

    CHECK_EQ(sched_getaffinity(0, sizeof(all), &all), 0);
    CHECK(n < CPU_COUNT(&all));
    CPU_ZERO(&one);
    for (size_t cpu = 0; CPU_COUNT(&one) == 0; cpu++)
        if (CPU_ISSET(cpu, &all) && n-- == 0)
            CPU_SET(cpu, &one);
    CHECK_EQ(sched_setaffinity(0, sizeof(one), &one), 0);
}
