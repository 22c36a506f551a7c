"""vdev/seccomp.py: what the assembled filter decides, run by the few instructions of classic BPF it is made of."""

import errno
import struct

import pytest

from vdev import sandbox, seccomp
from vdev.syscalls import MACHINES, number

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # linux/audit.h
ALLOW, KILL = 0x7FFF0000, 0x80000000  # linux/seccomp.h


def decide(program, call, *arguments, machine="x86_64", architecture=None):
    """The verdict about system call number ``call``, by linux/filter.h."""
    padded = [*arguments, *[0] * (6 - len(arguments))]
    data = struct.pack("<IIQ6Q", call & 0xFFFFFFFF, architecture or ARCHITECTURES[machine], 0, *padded)
    code = list(struct.iter_unpack("<HBBI", program))
    at = accumulator = 0
    while True:
        kind, if_true, if_false, operand = code[at]
        at += 1
        if kind == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, operand)
        elif kind == 0x54:
            accumulator &= operand
        elif kind == 0x15:
            at += if_true if accumulator == operand else if_false
        elif kind == 0x35:
            at += if_true if accumulator >= operand else if_false
        elif kind == 0x06:
            return operand
        else:
            raise AssertionError(f"unknown instruction {kind:#x}")


@pytest.mark.parametrize("machine", MACHINES)
def test_only_what_a_rule_names_is_allowed(machine):
    program = seccomp.assemble(["read", "writev"], machine)
    for name in ("read", "writev"):
        assert decide(program, number(name, machine), machine=machine) == ALLOW
    for other in set(range(1024)) - {number(name, machine) for name in ("read", "writev", *seccomp.REFUSED)}:
        assert decide(program, other, machine=machine) == KILL


def test_arguments_decide_where_a_rule_says_so():
    program = seccomp.assemble(["socket[0] == 1", "mmap[2] & 0x4 == 0", "read"], "x86_64")
    socket, mmap = number("socket", "x86_64"), number("mmap", "x86_64")
    assert decide(program, socket, 1, 2) == ALLOW
    assert decide(program, socket, 2, 1) == KILL
    assert decide(program, mmap, 0, 4096, 3) == ALLOW
    assert decide(program, mmap, 0, 4096, 7) == KILL
    assert decide(program, number("read", "x86_64"), 9, 9, 9) == ALLOW


def test_both_terms_of_a_rule_must_hold_and_rules_are_alternatives():
    rules = ["socket[0] == 16 and socket[2] == 0", "socket[0] == 1", "socket[0] == 2 and socket[1] & 0xf == 2"]
    program = seccomp.assemble(rules, "x86_64")
    verdicts = {arguments: decide(program, 41, *arguments) == ALLOW
                for arguments in ((16, 3, 0), (16, 3, 15), (1, 1, 7), (2, 0x80002, 0), (2, 1, 0), (10, 2, 0))}
    assert verdicts == {(16, 3, 0): True, (16, 3, 15): False, (1, 1, 7): True, (2, 0x80002, 0): True,
                        (2, 1, 0): False, (10, 2, 0): False}


def test_a_rule_without_arguments_outdoes_one_with_them():
    program = seccomp.assemble(["ioctl[1] == 5", "ioctl"], "x86_64")
    assert decide(program, number("ioctl", "x86_64"), 0, 6) == ALLOW


def test_calls_that_libraries_make_by_the_way_are_refused_with_an_error():
    program = seccomp.assemble(["read"], "x86_64")
    assert decide(program, number("openat", "x86_64")) == 0x00050000 | errno.EACCES
    assert decide(program, number("clone3", "x86_64")) == 0x00050000 | errno.ENOSYS


def test_another_architecture_has_no_calls_at_all():
    program = seccomp.assemble(["read"], "x86_64")
    assert decide(program, 0, architecture=0x40000003) == KILL  # i386, on the same kernel
    assert decide(program, 0x40000000) == KILL  # x32


@pytest.mark.parametrize("rule", ["", "read[0]", "read[6] == 1", "read[0] == x", "read[0] = 1", "read and write",
                                  "read[0] == 0x100000000", "read[0] == 1 and write[0] == 1"])
def test_what_is_no_rule_is_told(rule):
    with pytest.raises(ValueError, match="rule|invalid literal"):
        seccomp.parse(rule)


def test_unknown_names_are_told():
    with pytest.raises(KeyError):
        seccomp.assemble(["raed"])


@pytest.mark.parametrize("machine", MACHINES)
def test_every_rule_of_the_daemon_makes_sense_on_every_machine(machine):
    rules = [rule for area in sandbox.AREAS for rule in area]
    program = seccomp.assemble(rules, machine)
    assert len(program) // 8 < 4096  # BPF_MAXINSNS
    waits = [name for name in ("epoll_wait", "epoll_pwait") if number(name, machine) >= 0]
    for name in ("readv", "writev", "recvmsg", *waits):
        assert decide(program, number(name, machine), machine=machine) == ALLOW
