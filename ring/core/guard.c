/* The SIGBUS guard: memory that another process can take away.
 *
 * Guest memory is a file the front-end holds too. It can truncate it, or the tmpfs or hugetlb pool behind
 * it can run dry; then a load or store of ours raises SIGBUS, and the default action ends the daemon and
 * with it every other guest. The kernel's own copies (readv, writev) answer EFAULT instead, so only our
 * direct accesses - rings, headers, copies - need this.
 *
 * The handler looks the faulting address up in a table of all mappings. Found, and the thread armed: it
 * marks the owner of that address (whose memory it is matters, not whose turn it was) and jumps back to
 * where the thread armed itself. Otherwise it is a real bug of ours: the previous action is put back and
 * the instruction runs into it again.
 *
 * The table is a list of chunks that only grows; slots are reused. It is read from a signal handler while
 * the control thread may change it, hence the order: length and owner first, then the base with release;
 * removal clears the base first. A mapping is removed only when no pump uses it any more.
 *
 * Arming is one store and a sigsetjmp without the signal mask (3 ns; with the mask it is 170): hence
 * SA_NODEFER, or the signal would stay blocked after the jump. An alternative stack is not used: the stack
 * itself is never guest memory.
 *
 * pytest and others install a handler of their own (faulthandler) now and then; guard_install puts ours
 * back, and proves it on a private file. It does so once each time it put it there: a process that has no
 * descriptor left must still be able to set up rings.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "internal.h"

#define CHUNK 256

struct range {
    uint8_t *base; /* NULL: free slot */
    size_t length;
    int32_t *owner;
};

struct chunk {
    struct range ranges[CHUNK];
    struct chunk *next;
};

_Thread_local struct guard guard_of_thread;
static struct chunk first_chunk;
static pthread_mutex_t table_lock = PTHREAD_MUTEX_INITIALIZER; /* writers only */
static struct sigaction previous;
static bool proven; /* that our handler works, since it was put there */

static struct range *find(const uint8_t *address)
{
    for (struct chunk *c = &first_chunk; c; c = __atomic_load_n(&c->next, __ATOMIC_ACQUIRE))
        for (int i = 0; i < CHUNK; i++) {
            uint8_t *base = __atomic_load_n(&c->ranges[i].base, __ATOMIC_ACQUIRE);
            if (base && address >= base && (size_t)(address - base) < c->ranges[i].length)
                return &c->ranges[i];
        }
    return NULL;
}

static void on_sigbus(int number, siginfo_t *info, void *context)
{
    (void)context;
    struct range *hit = find(info->si_addr);
    if (hit && guard_of_thread.armed) {
        __atomic_store_n(hit->owner, 1, __ATOMIC_RELAXED);
        guard_of_thread.armed = 0;
        siglongjmp(guard_of_thread.jump, 1);
    }
    sigaction(number, &previous, NULL);
}

int guard_add(uint8_t *base, size_t length, int32_t *owner)
{
    int result = RING_OK;

    pthread_mutex_lock(&table_lock);
    for (struct chunk *c = &first_chunk;; c = c->next) {
        for (int i = 0; i < CHUNK; i++) {
            struct range *r = &c->ranges[i];
            if (r->base)
                continue;
            r->length = length;
            r->owner = owner;
            __atomic_store_n(&r->base, base, __ATOMIC_RELEASE);
            goto done;
        }
        if (!c->next) {
            struct chunk *more = calloc(1, sizeof(*more));
            if (!more) {
                result = RING_E_NOMEM;
                goto done;
            }
            __atomic_store_n(&c->next, more, __ATOMIC_RELEASE);
        }
    }
done:
    pthread_mutex_unlock(&table_lock);
    return result;
}

void guard_remove(uint8_t *base)
{
    pthread_mutex_lock(&table_lock);
    for (struct chunk *c = &first_chunk; c; c = c->next)
        for (int i = 0; i < CHUNK; i++)
            if (c->ranges[i].base == base) {
                __atomic_store_n(&c->ranges[i].base, NULL, __ATOMIC_RELEASE);
                goto done;
            }
done:
    pthread_mutex_unlock(&table_lock);
}

/* Truncate a private file under a mapping and touch it: only a working guard survives this. */
static int self_test(void)
{
    int32_t gone = 0;
    uint8_t *page = MAP_FAILED;
    int fd = memfd_create("vdev-guard-self-test", MFD_CLOEXEC);

    if (fd < 0)
        return RING_E_NOMEM;
    if (ftruncate(fd, 4096) == 0)
        page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (page != MAP_FAILED) {
        if (guard_add(page, 4096, &gone) == RING_OK) {
            if (!guard_enter()) {
                if (ftruncate(fd, 0) == 0)
                    (void)*(volatile uint8_t *)page;
                guard_leave();
            }
            guard_remove(page);
        }
        munmap(page, 4096);
    }
    close(fd);
    return gone ? RING_OK : RING_E_GUARD;
}

int guard_install(void)
{
    struct sigaction now, ours = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_NODEFER};

    if (sigaction(SIGBUS, NULL, &now) < 0)
        return RING_E_GUARD;
    if (!(now.sa_flags & SA_SIGINFO) || now.sa_sigaction != on_sigbus) {
        previous = now;
        sigemptyset(&ours.sa_mask);
        if (sigaction(SIGBUS, &ours, NULL) < 0)
            return RING_E_GUARD;
        __atomic_store_n(&proven, false, __ATOMIC_RELAXED);
    }
    if (guard_thread() != RING_OK)
        return RING_E_GUARD;
    if (__atomic_load_n(&proven, __ATOMIC_RELAXED))
        return RING_OK;
    int result = self_test();
    __atomic_store_n(&proven, result == RING_OK, __ATOMIC_RELAXED);
    return result;
}

int guard_thread(void)
{
    sigset_t faults;

    sigemptyset(&faults);
    sigaddset(&faults, SIGBUS);
    sigaddset(&faults, SIGSEGV);
    sigaddset(&faults, SIGFPE);
    sigaddset(&faults, SIGILL);
    guard_of_thread.armed = 0; /* the first touch may allocate, which a handler must not */
    return pthread_sigmask(SIG_UNBLOCK, &faults, NULL) == 0 ? RING_OK : RING_E_GUARD;
}
