"""The journal's file: one line a ring that outlives the process (theory: core/journal.c).

Layout: a header of 64 bytes - magic, version, boot id - and ``struct journal_line`` (core/ring.h) for each ring. The
file is sparse; what a ring uses of its line is allocated before it is written to, because a full file system
would otherwise raise SIGBUS in a worker. A file of another boot or another version says nothing and starts anew.
"""

import contextlib
import fcntl
import hashlib
import mmap
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

from ring.build import ffi
from ring.virtqueue import Takeover, VirtQueue

_HEADER = struct.Struct("<8sI16s36x")
_MAGIC = b"vdevring"
_VERSION = 1
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class JournalError(Exception):
    """There can be no journal; one line, with the reason."""


@dataclass(frozen=True)
class _Place:
    """Everything that makes a ring this ring: whose memory, where in it, how large."""

    device: int  # of the memory's file, with inode: a guest's memory, across connections and processes
    inode: int
    offset: int  # of the descriptors in that file
    desc: int  # uva
    avail: int
    used: int
    size: int
    packed: bool

    @property
    def binding(self) -> int:
        """A number that no other ring has; never 0."""
        packed = struct.pack("<8Q", self.device, self.inode, self.offset, self.desc, self.avail, self.used, self.size,
                             self.packed)
        return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") | 1


# What a journal that is open takes (the sandbox of whoever keeps one collects these): call, reason.
SYSCALLS = {
    "fallocate": "room for a ring's line, before it is needed",
    "fstatfs": "the same, of libc, where the file system cannot do that",
    "pwrite64": "the same",
    "pread64": "is there anything in a line",
    "unlink": "a journal that is of no use any more",
    "unlinkat": "the same, on machines without unlink",
}


def _binding(queue: VirtQueue) -> int:
    device, inode, offset = queue.file
    return _Place(device, inode, offset, queue.desc, queue.avail, queue.used, queue.size, queue.packed).binding


def _opened(path: str) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


class Journal:
    """The lines of ``rings`` rings in the file at ``path``, ours alone. Raises JournalError.

    file: a descriptor of it from a process that had it and handed it over; ours from now on.
    """

    def __init__(self, path: str, rings: int, file: int | None = None) -> None:
        self.path = path
        self._rings = rings
        self._line_bytes = ffi.sizeof("struct journal_line")
        try:
            self._fd = _opened(path) if file is None else file
        except OSError as error:
            raise JournalError(f"{path}: cannot be opened: {error.strerror}") from None
        try:
            if file is None:
                self._claim()
            size = max(os.fstat(self._fd).st_size, _HEADER.size + rings * self._line_bytes)
            os.ftruncate(self._fd, size)
            self._map = mmap.mmap(self._fd, size)
        except OSError as error:
            os.close(self._fd)
            raise JournalError(f"{path}: cannot be used: {error.strerror or error}") from None
        except JournalError:
            os.close(self._fd)
            raise
        self._memory = ffi.from_buffer(self._map)

    def _claim(self) -> None:
        """See that the file is ours, and of this boot."""
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise JournalError(f"{self.path}: is no file of ours; remove it")
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise JournalError(f"{self.path}: another process writes it; two vdev on one socket path?") from None
        header = _HEADER.pack(_MAGIC, _VERSION, bytes.fromhex(_BOOT_ID.read_text().strip().replace("-", "")))
        if os.pread(self._fd, _HEADER.size, 0) != header:
            os.ftruncate(self._fd, 0)
            os.posix_fallocate(self._fd, 0, _HEADER.size)
            os.pwrite(self._fd, header, 0)

    def _line(self, index: int):
        return ffi.cast("struct journal_line *", self._memory + _HEADER.size + index * self._line_bytes)

    def take_over(self, index: int, queue: VirtQueue, base: int) -> Takeover:
        """Have ``queue``, new and not run yet, go on where a predecessor on ring ``index`` stood, and write down from
        now on what it does. base: what the front-end said last with SET_VRING_BASE.

        Raises RingBroken when neither base nor journal fit the ring (then nothing is written down), JournalError
        when the file system has no room.
        """
        binding = _binding(queue)
        entries = queue.size * ffi.sizeof("struct journal_entry") if queue.packed else 0
        try:
            os.posix_fallocate(self._fd, _HEADER.size + index * self._line_bytes,
                               ffi.offsetof("struct journal_line", "entries") + entries)
        except OSError as error:
            raise JournalError(f"{self.path}: {error.strerror}") from None
        line = self._line(index)
        found = queue.take_over(line, binding)
        queue.record(line, binding, base)
        return found

    def write_on(self, index: int, queue: VirtQueue) -> None:
        """Have ``queue``, which stands where that of the process stood that handed the file over, write down what it
        does, if that one did."""
        if self._known(index):
            queue.write_on(self._line(index), _binding(queue))

    def fileno(self) -> int:
        """The file, which no other process may open meanwhile."""
        return self._fd

    def let_go(self) -> None:
        """Release the file, which another process has now. No queue may write to it any more."""
        ffi.release(self._memory)
        self._map.close()
        os.close(self._fd)

    def forget(self, index: int) -> None:
        """The front-end knows where ring ``index`` stands, which does not run: what is written of it counts no more."""
        if self._known(index):  # a line never used is a hole in the file: writing there could fail
            self._line(index).binding = 0

    def close(self) -> None:
        """Release the file, and remove it unless it is still of use. No queue may write to it any more."""
        useful = any(self._known(index) for index in range(self._rings))
        if not useful:
            with contextlib.suppress(OSError):
                os.unlink(self.path)
        self.let_go()

    def _known(self, index: int) -> bool:
        start = _HEADER.size + index * self._line_bytes
        return any(os.pread(self._fd, 8, start))


__all__ = ["Journal", "JournalError"]
