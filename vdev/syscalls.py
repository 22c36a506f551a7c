"""System calls by name: their numbers where a filter or a call without a wrapper in libc needs them.

Sources: the kernel's arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h (which 64-bit Arm
uses). A call that one of them does not have is left out of that column with -1.
"""

import ctypes
import os

MACHINES = ("x86_64", "aarch64")

# name: (number on x86_64, number on aarch64)
_NUMBERS = {
    "accept4": (288, 242), "access": (21, -1), "bind": (49, 200), "brk": (12, 214), "clock_getres": (229, 114),
    "clock_gettime": (228, 113), "clock_nanosleep": (230, 115), "clone": (56, 220), "clone3": (435, 435),
    "close": (3, 57), "connect": (42, 203), "dup": (32, 23), "epoll_create1": (291, 20), "epoll_ctl": (233, 21),
    "epoll_pwait": (281, 22), "epoll_pwait2": (441, 441), "epoll_wait": (232, -1), "eventfd2": (290, 19),
    "exit": (60, 93), "exit_group": (231, 94), "faccessat": (269, 48), "fallocate": (285, 47), "fcntl": (72, 25),
    "fstat": (5, 80), "fstatfs": (138, 44), "ftruncate": (77, 46), "futex": (202, 98), "getcwd": (79, 17),
    "getdents64": (217, 61), "getegid": (108, 177), "geteuid": (107, 175), "getgid": (104, 176),
    "getpeername": (52, 205), "getpid": (39, 172), "getrandom": (318, 278), "getsockname": (51, 204),
    "getsockopt": (55, 209), "gettid": (186, 178), "gettimeofday": (96, 169), "getuid": (102, 174),
    "ioctl": (16, 29), "landlock_add_rule": (445, 445), "landlock_create_ruleset": (444, 444),
    "landlock_restrict_self": (446, 446), "listen": (50, 201), "lseek": (8, 62), "lstat": (6, -1), "madvise": (28, 233),
    "membarrier": (324, 283), "memfd_create": (319, 279), "mmap": (9, 222), "mprotect": (10, 226),
    "mremap": (25, 216), "munmap": (11, 215), "nanosleep": (35, 101), "newfstatat": (262, 79), "open": (2, -1),
    "openat": (257, 56), "pipe2": (293, 59), "poll": (7, -1), "ppoll": (271, 73), "pread64": (17, 67),
    "prlimit64": (302, 261),
    "pwrite64": (18, 68), "read": (0, 63), "readlink": (89, -1), "readlinkat": (267, 78), "readv": (19, 65),
    "recvfrom": (45, 207), "recvmsg": (47, 212), "restart_syscall": (219, 128), "rseq": (334, 293),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "sched_getaffinity": (204, 123), "sched_setaffinity": (203, 122), "sched_yield": (24, 124),
    "seccomp": (317, 277), "sendmsg": (46, 211),
    "sendto": (44, 206), "set_robust_list": (273, 99), "setsockopt": (54, 208), "shutdown": (48, 210),
    "sigaltstack": (131, 132), "socket": (41, 198), "socketpair": (53, 199), "splice": (275, 76), "stat": (4, -1),
    "statx": (332, 291),
    "sysinfo": (99, 179), "tgkill": (234, 131), "timerfd_create": (283, 85), "timerfd_settime": (286, 86),
    "uname": (63, 160), "unlink": (87, -1), "unlinkat": (263, 35),
    "write": (1, 64), "writev": (20, 66),
}

libc = ctypes.CDLL(None, use_errno=True)


def number(name: str, machine: str | None = None) -> int:
    """The number of call ``name`` on ``machine`` (one of MACHINES; None: this one), -1 where it has no such call.

    Raises KeyError for a name that is not in the table, ValueError for another machine.
    """
    return _NUMBERS[name][MACHINES.index(machine or os.uname().machine)]


def checked(result: int) -> int:
    """``result`` of a function of ``libc``, or OSError with its errno where that says failure."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def call(name: str, *arguments: object) -> int:
    """Make the call; arguments as ctypes takes them. Raises OSError, ENOSYS on a machine that is not in the table."""
    return checked(libc.syscall(ctypes.c_long(number(name)), *arguments))
