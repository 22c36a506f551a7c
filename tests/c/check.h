/* The smallest harness a C test can do with: TEST(name) { CHECK(...); } in a program that includes this once.
 *
 *     program NAME    runs that test; exit 0, or 1 with the line of the CHECK that failed
 *
 * tests/test_c.py finds the tests by their TEST lines and runs each in a process of its own.
 */
#pragma once

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct test {
    const char *name;
    void (*run)(void);
    struct test *next;
};
static struct test *tests;

#define TEST(name)                                                            \
    static void test_##name(void);                                            \
    __attribute__((constructor)) static void enter_##name(void)               \
    {                                                                         \
        static struct test self = {#name, test_##name, NULL};                 \
        self.next = tests;                                                    \
        tests = &self;                                                        \
    }                                                                         \
    static void test_##name(void)

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

int main(int argc, char **argv)
{
    for (const struct test *t = tests; t; t = t->next)
        if (argc == 2 && strcmp(argv[1], t->name) == 0) {
            t->run();
            return 0;
        }
    fprintf(stderr, "usage: %s TEST\n", argv[0]);
    return 2;
}
