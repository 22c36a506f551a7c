"""The system call filter: what a list of rules becomes, and putting it in force.

Theory of operation
-------------------
A rule is a line of text, so that each package keeps its own beside the code that needs it and knows nothing of this
module:

    "readv"                                     the call, whatever its arguments
    "socket[0] == 1"                            with this value in argument 0
    "mmap[2] & 0x4 == 0"                        with these bits of argument 2 having this value
    "socket[0] == 2 and socket[1] & 0xf == 2"   with both

Several rules for one call are alternatives. Only the low 32 bits of an argument are looked at: all that rules ask
about are ints or bits of the low word.

The kernel runs the filter, a classic BPF program, before each call (seccomp(2)). It first makes sure of the
architecture, without which numbers mean nothing, then goes down the calls it knows. Anything else ends the
process: a call nobody foresaw is either a mistake of ours or not made by us. A few calls are refused with an
error instead, because libraries make them by the way and go on without (REFUSED).

The filter is installed for all threads at once, and cannot be taken back.
"""

import ctypes
import errno
import os
import re
import struct
from collections.abc import Iterable

from vdev.syscalls import MACHINES, call, checked, libc, number

# Opening and looking for files: the interpreter does that when it imports or prints a traceback. clone3 hides its
# flags in memory, where no filter can see them; libc falls back to clone.
REFUSED = {"open": errno.EACCES, "openat": errno.EACCES, "access": errno.EACCES, "faccessat": errno.EACCES,
           "getdents64": errno.EACCES, "clone3": errno.ENOSYS}

_ALLOW = 0x7FFF0000  # SECCOMP_RET_ALLOW
_ERRNO = 0x00050000  # SECCOMP_RET_ERRNO, with the error in the low 16 bits
_KILL = 0x80000000  # SECCOMP_RET_KILL_PROCESS
_ARCHITECTURES = dict(zip(MACHINES, (0xC000003E, 0xC00000B7), strict=True))  # AUDIT_ARCH_*
_X32 = 0x40000000  # numbers from here on are x86_64's other ABI

_PR_SET_NO_NEW_PRIVS = 38
_SET_MODE_FILTER, _FLAG_TSYNC = 1, 1

# struct seccomp_data: nr, arch, instruction pointer, six arguments of 64 bits
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
# struct sock_filter: code, jump if true, jump if false, operand
_INSTRUCTION = struct.Struct("=HBBI")
_LOAD, _AND, _IF_EQUAL, _IF_AT_LEAST, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06

Check = tuple[int, int, int]  # argument, mask, value
_TERM = re.compile(r"(\w+)(?:\[([0-5])\](?: & (\w+))? == (\w+))?")


def parse(rule: str) -> tuple[str, list[Check]]:
    """(call, checks that must all hold). Raises ValueError for what is no rule."""
    names, checks = set(), []
    for term in rule.split(" and "):
        found = _TERM.fullmatch(term)
        if found is None:
            raise ValueError(f"not a rule: {rule!r}")
        name, argument, bits, value = found.groups()
        names.add(name)
        if argument is not None:
            checks.append((int(argument), int(bits, 0) if bits else 0xFFFFFFFF, int(value, 0)))
    if len(names) != 1 or any(not 0 <= part <= 0xFFFFFFFF for check in checks for part in check[1:]):
        raise ValueError(f"not a rule about one call and 32 bits: {rule!r}")
    return names.pop(), checks


def _instruction(code: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return _INSTRUCTION.pack(code, if_true, if_false, operand)


def _alternative(checks: list[Check]) -> bytes:
    """Return ALLOW if all checks hold, else go on behind it."""
    # Each check is three instructions, and what is left after it is skipped where it fails.
    code = b""
    for position, (argument, bits, value) in enumerate(checks):
        rest = 3 * (len(checks) - position - 1) + 1
        code += _instruction(_LOAD, _ARGUMENTS + 8 * argument) + _instruction(_AND, bits)
        code += _instruction(_IF_EQUAL, value, 0, rest)
    return code + _instruction(_RETURN, _ALLOW)


def assemble(rules: Iterable[str], machine: str | None = None) -> bytes:
    """The filter for ``machine`` (of MACHINES; None: this one). Raises ValueError for a machine nobody knows."""
    machine = machine or os.uname().machine
    alternatives: dict[int, list[list[Check]]] = {}
    for name, checks in map(parse, rules):
        if number(name, machine) >= 0:
            alternatives.setdefault(number(name, machine), []).append(checks)
    otherwise = {number(name, machine): _ERRNO | code for name, code in REFUSED.items()}
    code = _instruction(_LOAD, _ARCHITECTURE) + _instruction(_IF_EQUAL, _ARCHITECTURES[machine], 1, 0)
    code += _instruction(_RETURN, _KILL)
    code += _instruction(_LOAD, _NUMBER) + _instruction(_IF_AT_LEAST, _X32, 0, 1) + _instruction(_RETURN, _KILL)
    for wanted in dict.fromkeys([*alternatives, *(refused for refused in otherwise if refused >= 0)]):
        block = b"".join(_alternative(checks) for checks in alternatives.get(wanted, []))
        if [] not in alternatives.get(wanted, []):
            block += _instruction(_RETURN, otherwise.get(wanted, _KILL))
        code += _instruction(_IF_EQUAL, wanted, 0, len(block) // _INSTRUCTION.size) + block
    return code + _instruction(_RETURN, _KILL)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))  # struct sock_fprog


def forbid_new_privileges() -> None:
    """No program this process starts can have more rights than it has (prctl(2), PR_SET_NO_NEW_PRIVS)."""
    checked(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def install(program: bytes) -> None:
    """Put what :func:`assemble` made in force for all threads, for good. New privileges must be forbidden.

    Raises OSError: ENOSYS or EINVAL where the kernel has no such filters.
    """
    wrapped = _Program(len(program) // _INSTRUCTION.size, program)
    thread = call("seccomp", _SET_MODE_FILTER, _FLAG_TSYNC, ctypes.byref(wrapped))
    if thread:
        raise OSError(errno.EBUSY, f"thread {thread} has a filter of its own")
