/* How a worker's budget for looking at rings adapts to when work comes. */
#include "../../ring/plane/worker.c"
#include "check.h"

#define MS 1000000ull

TEST(work_that_comes_late_is_not_looked_for)
{
    struct polling y = {.most = 8 * MS, .budget = 8 * MS};

    for (uint64_t left = 4; left; left /= 2) {
        adapt(&y, 8 * MS + 1);
        CHECK_EQ(y.budget, left * MS);
    }
    adapt(&y, UINT64_MAX);
    CHECK_EQ(y.budget, 0);
    adapt(&y, UINT64_MAX);
    CHECK_EQ(y.budget, 0);
}

TEST(work_that_would_have_been_met_is_looked_for)
{
    struct polling y = {.most = 8 * MS};

    for (uint64_t now_worth = 1; now_worth < 8; now_worth *= 2) {
        adapt(&y, 8 * MS);
        CHECK_EQ(y.budget, now_worth * MS);
    }
    adapt(&y, 1);
    CHECK_EQ(y.budget, 8 * MS);
    adapt(&y, 1);
    CHECK_EQ(y.budget, 8 * MS);
}

TEST(any_budget_comes_to_its_ends)
{
    for (uint64_t most = 1; most < 3 * MS; most = most * 3 + 1) {
        struct polling y = {.most = most, .budget = most};
        for (int i = 0; i < 4; i++)
            adapt(&y, most + 1);
        CHECK_EQ(y.budget, 0);
        for (int i = 0; i < 5; i++)
            adapt(&y, most);
        CHECK_EQ(y.budget, most);
    }
}

TEST(always_is_always)
{
    struct polling y = {.most = UINT64_MAX, .budget = UINT64_MAX};

    adapt(&y, UINT64_MAX);
    CHECK(y.budget == UINT64_MAX);
}
