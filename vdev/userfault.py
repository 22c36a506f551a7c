"""userfaultfd: faults on pages of our memory that are missing, for another process to resolve.

Numbers and layouts are those of linux/userfaultfd.h; userfaultfd(2) and ioctl_userfaultfd(2) tell what they do.

A descriptor must be a full one: pages are also missed by the kernel on our behalf, in readv and writev on guest memory,
and one that is for user mode only turns these into EFAULT. /dev/userfaultfd (Linux 6.1) gives full ones to whoever may
open it, and goes on doing so after privileges were given up. The system call is not used: what it gives depends on
privileges at the time, and the time is when a guest comes.
"""

import ctypes
import errno
import fcntl
import os
import struct

from vdev.syscalls import libc

PATH = "/dev/userfaultfd"

_READ, _WRITE = 2, 1
_RANGE = struct.Struct("=QQ")  # struct uffdio_range: start, length
_API = struct.Struct("=QQQ")  # struct uffdio_api: api, features, ioctls
_REGISTER = struct.Struct("=QQQQ")  # struct uffdio_register: range, mode, ioctls
_COPY = struct.Struct("=QQQQq")  # struct uffdio_copy: dst, src, length, mode, copied
_MESSAGE = struct.Struct("=B7xQQ8x")  # struct uffd_msg of a page fault: event, flags, address


def _number(direction: int, size: int, nr: int) -> int:
    """An ioctl's number, as _IOC of asm-generic/ioctl.h makes it."""
    return direction << 30 | size << 16 | 0xAA << 8 | nr


_NEW = _number(0, 0, 0x00)
_COPY_IN = _number(_READ | _WRITE, _COPY.size, 0x03)
_DO_API = _number(_READ | _WRITE, _API.size, 0x3F)
_DO_REGISTER = _number(_READ | _WRITE, _REGISTER.size, 0x00)
_UNREGISTER = _number(_READ, _RANGE.size, 0x01)
_WAKE = _number(_READ, _RANGE.size, 0x02)

_API_VERSION = 0xAA
_MODE_MISSING = 1
_EVENT_PAGEFAULT = 0x12
_FEATURE_MISSING_HUGETLBFS, _FEATURE_MISSING_SHMEM = 1 << 4, 1 << 5
_NEEDED = _FEATURE_MISSING_HUGETLBFS | _FEATURE_MISSING_SHMEM
_COPIES = 1 << 0x03  # in the ioctls of a range: pages can be put there
_MADV_NOHUGEPAGE = 15

# Of a device that may get guests by postcopy, in the sandbox: rule of vdev/seccomp.py -> reason.
SYSCALLS = {
    **{f"ioctl[1] == {number:#x}": reason for number, reason in (
        (_NEW, "a guest comes"), (_DO_API, "what the kernel can do"), (_DO_REGISTER, "its memory may be missing"),
        (_UNREGISTER, "its memory has come"), (_WAKE, "its memory will not come"))},
    "madvise": "no page but those that came",
    "memfd_create": "what takes the place of memory that will not come",
}


class Userfault:
    """One userfaultfd. All ranges are (address, bytes) of our memory, in whole pages of it.

    fd: ours from now on; the process that resolves the faults is given a copy.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def agree(self) -> None:
        """The first thing to be done with a new one. Raises OSError when it cannot do what is needed."""
        _, features, _ = _API.unpack(self._do(_DO_API, _API.pack(_API_VERSION, 0, 0)))
        if _NEEDED & ~features:
            raise OSError(errno.EOPNOTSUPP, "this kernel reports no faults on shared memory")

    def register(self, address: int, length: int) -> None:
        """From now on whoever touches a page there that is in no memory waits until somebody puts it there."""
        # khugepaged would fill the missing pages between those that came.
        libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), _MADV_NOHUGEPAGE)
        *_, ioctls = _REGISTER.unpack(self._do(_DO_REGISTER, _REGISTER.pack(address, length, _MODE_MISSING, 0)))
        if not ioctls & _COPIES:
            raise OSError(errno.EOPNOTSUPP, "this kernel puts no pages into such memory")

    def unregister(self, address: int, length: int) -> None:
        """The opposite, for all that is registered there. Who waits goes on, with zeros where no page came."""
        self._do(_UNREGISTER, _RANGE.pack(address, length))

    def wake(self, address: int, length: int) -> None:
        """Let those who wait there look again."""
        self._do(_WAKE, _RANGE.pack(address, length))

    def copy(self, address: int, page: bytes) -> None:
        """Put ``page`` at ``address``, where it is missing, and wake who waits for it. Raises FileExistsError where it
        is not missing."""
        source = ctypes.create_string_buffer(page, len(page))
        self._do(_COPY_IN, _COPY.pack(address, ctypes.addressof(source), len(page), 0, 0))

    def missed(self) -> int:
        """The next address that somebody waits for. Raises BlockingIOError when there is none."""
        event, _, address = _MESSAGE.unpack(os.read(self.fd, _MESSAGE.size))
        if event != _EVENT_PAGEFAULT:
            raise OSError(errno.EPROTO, f"userfaultfd event {event:#x} was not asked for")
        return address

    def close(self) -> None:
        """Close our copy of it. May be called again."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _do(self, number: int, argument: bytes) -> bytearray:
        answer = bytearray(argument)
        fcntl.ioctl(self.fd, number, answer)
        return answer


class UserfaultSource:
    """Where userfaultfds come from: /dev/userfaultfd, opened here while there are privileges or (``fd``, ours from now
    on) elsewhere. Those made here are about this process, whoever opened the file. Raises OSError."""

    def __init__(self, fd: int | None = None) -> None:
        self.fd = os.open(PATH, os.O_RDWR | os.O_CLOEXEC) if fd is None else fd
        try:
            self.new().close()
        except OSError:
            self.close()
            raise

    def new(self) -> Userfault:
        """A new one. Raises OSError."""
        fresh = Userfault(fcntl.ioctl(self.fd, _NEW, os.O_CLOEXEC | os.O_NONBLOCK))
        try:
            fresh.agree()
        except OSError:
            fresh.close()
            raise
        return fresh

    def close(self) -> None:
        """No more of them. May be called again."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
