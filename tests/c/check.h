/* The smallest harness a C test can do with: TEST(name) { CHECK(...); } in a program that includes this once.
 *
 *     program NAME [NUMBER]   runs that test; exit 0, or 1 with the line of the CHECK that failed
 *     program                 the names of its tests; exit 2
 *
 * vdev/testing/cprograms.py finds the tests by their TEST lines; each is run in a process of its own. NUMBER is
 * for a test that takes one: how long to go on.
 *
 * A program with a main of its own (tests/fuzz) defines CHECKS_ONLY first.
 */
#pragma once

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef CHECKS_ONLY
struct test {
    const char *name;
    void (*run)(void);
    struct test *next;
};
static struct test *tests;
static unsigned long long number; /* 0: none was given */

#define TEST(name)                                                            \
    static void test_##name(void);                                            \
    __attribute__((constructor)) static void enter_##name(void)               \
    {                                                                         \
        static struct test self = {#name, test_##name, NULL};                 \
        self.next = tests;                                                    \
        tests = &self;                                                        \
    }                                                                         \
    static void test_##name(void)
#endif

#define CHECK(condition)                                                      \
    do {                                                                      \
        if (!(condition)) {                                                   \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);   \
            exit(1);                                                          \
        }                                                                     \
    } while (0)

/* As CHECK(a == b) for integers, and says what they are. */
#define CHECK_EQ(a, b)                                                                            \
    do {                                                                                          \
        long long is_ = (long long)(a), wanted_ = (long long)(b);                                 \
        if (is_ != wanted_) {                                                                     \
            fprintf(stderr, "%s:%d: %s is %lld, not %lld\n", __FILE__, __LINE__, #a, is_, wanted_); \
            exit(1);                                                                              \
        }                                                                                         \
    } while (0)

#ifndef CHECKS_ONLY
int main(int argc, char **argv)
{
    if (argc > 2)
        number = strtoull(argv[2], NULL, 0);
    for (const struct test *t = tests; t; t = t->next)
        if (argc > 1 && strcmp(argv[1], t->name) == 0) {
            t->run();
            return 0;
        }
    for (const struct test *t = tests; t; t = t->next)
        puts(t->name);
    return 2;
}
#endif
