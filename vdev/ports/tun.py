"""The ioctls of /dev/net/tun, one function each, and nothing else.

Numbers from <linux/if_tun.h>, encoded as on x86, Arm, RISC-V and s390 (asm-generic/ioctl.h). All raise
OSError as the kernel answers.
"""

import fcntl
import os
import struct
from enum import IntFlag

DEVICE = "/dev/net/tun"

_TUNSETIFF = 0x400454CA
_TUNSETOFFLOAD = 0x400454D0
_TUNGETIFF = 0x800454D2
_TUNSETVNETHDRSZ = 0x400454D8
_TUNSETQUEUE = 0x400454D9
_TUNSETVNETLE = 0x400454DC

_IFREQ = struct.Struct("16sH22x")

# What a TAP that is open goes on needing: rule of vdev/seccomp.py -> reason. TUNSETIFF brings a deleted one back.
SYSCALLS = {f"ioctl[1] == {request:#x}": reason for request, reason in (
    (_TUNSETIFF, "a deleted interface is attached again"), (_TUNGETIFF, "which interface it is, and is there one"),
    (_TUNSETOFFLOAD, "what the guest negotiated"), (_TUNSETQUEUE, "queue pairs are switched on and off"),
    (_TUNSETVNETHDRSZ, "the header, of an interface that came back"), (_TUNSETVNETLE, "the same"))}


class Flag(IntFlag):
    """Flags of TUNSETIFF and TUNGETIFF."""

    TUN = 0x0001
    TAP = 0x0002
    MULTI_QUEUE = 0x0100
    ATTACH_QUEUE = 0x0200
    DETACH_QUEUE = 0x0400  # TUNGETIFF: this queue is detached
    PERSIST = 0x0800
    NO_PI = 0x1000
    VNET_HDR = 0x4000


class Offload(IntFlag):
    """Bits of TUNSETOFFLOAD: what the reader of the descriptor can take."""

    CSUM = 0x01
    TSO4 = 0x02
    TSO6 = 0x04
    TSO_ECN = 0x08
    UFO = 0x10
    USO4 = 0x20
    USO6 = 0x40


def open_device() -> int:
    """A new descriptor, non-blocking and close-on-exec, that belongs to no interface yet."""
    return os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)


def attach(fd: int, name: str, flags: Flag) -> str:
    """Make or join interface ``name`` (``%d``: the first free number). -> its real name.

    EPERM: not allowed. EINVAL: exists, as something else than ``flags`` say. EBUSY: one queue, and taken.
    A descriptor whose interface was deleted may be attached again.
    """
    answer = fcntl.ioctl(fd, _TUNSETIFF, _IFREQ.pack(name.encode(), flags))
    return _name(_IFREQ.unpack(answer)[0])


def interface(fd: int) -> tuple[str, Flag]:
    """(name, flags) of the interface of ``fd``. EBADFD: it has none (any more). ENOTTY and others: no TAP."""
    name, flags = _IFREQ.unpack(fcntl.ioctl(fd, _TUNGETIFF, bytes(_IFREQ.size)))
    return _name(name), Flag(flags)


def set_queue(fd: int, attached: bool) -> None:
    """Let the kernel steer flows to this queue, or not. EINVAL: it is so already, or not multi-queue."""
    flag = Flag.ATTACH_QUEUE if attached else Flag.DETACH_QUEUE
    fcntl.ioctl(fd, _TUNSETQUEUE, _IFREQ.pack(b"", flag))


def set_header(fd: int, size: int) -> None:
    """The virtio_net_hdr before each frame has ``size`` bytes and little-endian fields, as in virtio 1."""
    fcntl.ioctl(fd, _TUNSETVNETHDRSZ, struct.pack("i", size))
    fcntl.ioctl(fd, _TUNSETVNETLE, struct.pack("i", 1))


def set_offload(fd: int, offload: Offload) -> None:
    """What frames read from the interface (all its queues) may use. EINVAL: the kernel knows not all."""
    fcntl.ioctl(fd, _TUNSETOFFLOAD, int(offload))


def _name(raw: bytes) -> str:
    return raw.partition(b"\0")[0].decode(errors="replace")
