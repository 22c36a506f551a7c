"""The sandbox: what the daemon gives up for good once everything is open, before it hears its first front-end.

Theory of operation
-------------------
Guest and front-end are hostile, and the code that reads what they write is C. Should one of them ever get the
better of it, what it gets must be worth nothing: a process that can move frames and answer its socket, and can
neither open a file, start a program, make a network connection nor look at another process.

The order matters. By now ports are open and sockets listen, all that may be imported is imported, and no worker
thread has been started: Landlock and capabilities belong to a thread and pass to those it makes.

1. Limits: no core dump, no look from outside (PR_SET_DUMPABLE), few descriptors.
2. no_new_privs, which the next steps ask for.
3. Landlock: no file can be opened, none made; files in the directories of sockets and journals can be removed, as
   we do at the end.
4. Capabilities: none, but for what the ports say they go on needing (vdev/ports/base.py, Needs).
5. The filter of system calls (vdev/seccomp.py). Its rules are kept beside the code that makes the calls, each with
   its reason, as SYSCALLS; this module brings them together and adds those of the interpreter.

What a kernel does not have is told in one line, and the rest stays in force.
"""

import errno
import os
import resource
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ring import guestmem, journal, pump
from vdev import (
    capabilities, handover, inband, landlock, listen, logs, loop, notify, reverse, seccomp, service, sources,
    state_transfer,
)
from vdev.ports.base import Needs
from vdev.syscalls import checked, libc
from vhost_user import fds, transport

DESCRIPTORS = 64  # for the process
DESCRIPTORS_PER_PAIR = 32  # for each queue pair, with what waits in messages

_PR_SET_DUMPABLE = 4
_PROT_EXEC = 4
_CLONE_THREAD = 0x10000

# What Python and libc do on their own account.
SYSCALLS = {
    "brk": "the heap",
    f"mmap[2] & {_PROT_EXEC} == 0": "memory, the heap's and a thread's stack: nothing that can be run",
    f"mprotect[2] & {_PROT_EXEC} == 0": "the same",
    "munmap": "giving memory back",
    "mremap": "a large block that grows",
    "madvise": "memory a thread leaves behind",
    "close": "every descriptor",
    "read": "eventfds and pipes",
    "write": "the same",
    "lseek": "a file object looks where it is",
    "fstat": "a file object looks at what it is",
    "newfstatat": "looking whether a path names what it should; it opens nothing",
    "statx": "the same, of libc on other machines",
    "stat": "the same, of older libcs",
    "lstat": "the same, of older libcs",
    "getcwd": "a path made absolute",
    "fcntl": "flags of a descriptor, and second ones",
    "getsockname": "a socket described in a message",
    "getpeername": "the same",
    "dup": "a second descriptor",
    "ioctl[1] == 0x5401": "TCGETS: is it a terminal",
    "ioctl[1] == 0x5421": "FIONBIO: Python makes a socket non-blocking",
    "ioctl[1] == 0x5451": "FIOCLEX: Python has a descriptor closed on exec",
    "futex": "locks between threads",
    "sched_yield": "the same",
    "sched_getaffinity": "how many processors there are",
    "sysinfo": "how much memory there is",
    "uname": "what kernel this is",
    "clock_gettime": "time, where the vDSO has none",
    "clock_getres": "the same",
    "gettimeofday": "the same",
    "clock_nanosleep": "waiting a moment for another instance",
    "nanosleep": "the same, of older libcs",
    "getrandom": "hash seeds, temporary names",
    "getpid": "who we are",
    "gettid": "the same",
    "getuid": "the same",
    "geteuid": "the same",
    "getgid": "the same",
    "getegid": "the same",
    "prlimit64[2] == 0": "looking at limits; changing them goes through the same call with a pointer",
    "rt_sigaction": "handlers, for signals and for memory that vanishes",
    "rt_sigprocmask": "signals held back",
    "rt_sigreturn": "the end of a handler",
    "sigaltstack": "the stack of a handler",
    "restart_syscall": "a call that a stop interrupted",
    f"clone[0] & {_CLONE_THREAD:#x} == {_CLONE_THREAD:#x}": "a thread; never a process",
    "set_robust_list": "the start of a thread",
    "rseq": "the same",
    "membarrier": "libc, between threads",
    "exit": "the end of a thread",
    "exit_group": "the end",
}

# Every daemon's; what only some ports need they say themselves.
AREAS: tuple[Mapping[str, str], ...] = (
    SYSCALLS, loop.SYSCALLS, logs.SYSCALLS, listen.SYSCALLS, sources.SYSCALLS, notify.SYSCALLS, service.SYSCALLS,
    transport.SYSCALLS, fds.SYSCALLS, state_transfer.SYSCALLS, reverse.SYSCALLS, inband.SYSCALLS, handover.SYSCALLS,
    guestmem.SYSCALLS, journal.SYSCALLS, pump.SYSCALLS)


@dataclass
class Report:
    """What is in force.

    capabilities: those kept. landlock: version of its interface, 0 for none. calls: how many rules the filter has,
    0 for no filter. descriptors: the limit. missing: a line for each thing this kernel does not have.
    """

    capabilities: frozenset[int] = frozenset()
    landlock: int = 0
    calls: int = 0
    descriptors: int = 0
    missing: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kept = ", ".join(f"capability {number}" for number in sorted(self.capabilities)) or "no capabilities"
        return (f"sandbox: {kept}, {f'Landlock {self.landlock}' if self.landlock else 'no Landlock'}, "
                f"{f'{self.calls} system call rules' if self.calls else 'no system call filter'}, at most "
                f"{self.descriptors} descriptors")


def enter(queue_pairs: int, more: int, needs: Iterable[Needs], removable: Iterable[str]) -> Report:
    """Give up what is not needed, for good; no thread may have been started.

    queue_pairs: of all devices together. more: descriptors beside those of queue pairs, for memory that stays open and
    for workers. needs: of each device, and others'. removable: paths of files that are to be removed at the end.
    Raises OSError when rights could not be given up that this kernel does let one give up.
    """
    needs = list(needs)
    report = Report(descriptors=_limit(DESCRIPTORS + DESCRIPTORS_PER_PAIR * queue_pairs + more))
    seccomp.forbid_new_privileges()
    directories = {os.path.dirname(os.path.abspath(path)) for path in removable}
    try:
        report.landlock = landlock.restrict(directories, abstract_sockets=notify.is_abstract())
    except OSError as error:
        report.missing.append(_without("Landlock", error, "files are kept out of reach by the system call filter only"))
    wanted = frozenset(number for need in needs for number in need.capabilities)
    report.capabilities = wanted & capabilities.effective()
    capabilities.keep_only(report.capabilities)
    rules = {rule for area in (*AREAS, *(need.syscalls for need in needs)) for rule in area}
    rules.add(f"tgkill[0] == {os.getpid()}")  # abort(), which says more than an end by this filter
    try:
        seccomp.install(seccomp.assemble(sorted(rules)))
        report.calls = len(rules)
    except (OSError, ValueError) as error:
        report.missing.append(_without("system call filter", error, "any call can be made"))
    return report


def _limit(descriptors: int) -> int:
    """Bound what this process takes up and shows; -> the limit of descriptors, never higher than it was.

    A program that was started with many descriptors of others' gets as many beside those.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    checked(libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0))
    highest = max(map(int, os.listdir("/proc/self/fd")))
    if 2 * highest > descriptors:
        descriptors += highest + 1
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft == resource.RLIM_INFINITY or soft > descriptors:
        soft = descriptors
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, soft))
    return soft


def _without(what: str, error: Exception, consequence: str) -> str:
    code = getattr(error, "errno", None)
    why = {errno.ENOSYS: "this kernel has none", errno.EOPNOTSUPP: "it is switched off (lsm= at the kernel's start)",
           None: "not known on this kind of machine"}.get(code) or os.strerror(code).lower()
    return f"no {what}: {why}; {consequence}"
