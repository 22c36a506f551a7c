/*
 * Marking in the dirty log: any range of guest memory, as far as the driver and the front-end can name one.
 *
 * Shown: every bit that is set lies in the log, and marking ends.
 */
#include "world.h"

#define LOG_BYTES 3
#define PAGES (LOG_BYTES * PAGES_IN_BYTE + 1)

/* Ranges that begin in this page, of any length. */
static void from_page(struct dirty_log *log, uint64_t page)
{
    uint64_t gpa = page * DIRTY_PAGE + any_between(0, DIRTY_PAGE - 1);

    log->size = LOG_BYTES;
    mark(log, gpa, any_between(0, UINT64_MAX));
    mark_behind(log, gpa, 0, any_between(0, UINT64_MAX));
    log->size = 0; /* nothing is written then */
    log->bits[0] = 7;
    mark(log, gpa, any_between(0, UINT64_MAX));
    //@ check log->bits[0] == 7;
}

int main(void)
{
    int32_t owner = 0;
    struct dirty_log *log = (struct dirty_log *)block(sizeof(*log));

    *log = (struct dirty_log){.bits = block(LOG_BYTES), .size = LOG_BYTES, .owner = &owner};
    //@ loop unroll PAGES;
    for (uint64_t page = 0; page < PAGES; page++)
        from_page(log, page);
    uint64_t beyond = any_between(PAGES * DIRTY_PAGE, UINT64_MAX);
    log->size = LOG_BYTES;
    mark(log, beyond, any_between(0, UINT64_MAX));
    mark_behind(log, beyond, any_between(0, UINT64_MAX), any_between(0, UINT64_MAX));
    return 0;
}
