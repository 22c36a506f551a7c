"""Guest memory as the front-end shares it: checking, mapping, and the tables that translate addresses.

``SharedFile`` owns one mmap of what a front-end sent, ``Mapping`` that of a memory region. ``GuestMemory`` is an
immutable set of mappings with its translation table; a change makes a new ``GuestMemory`` that shares the mappings
it keeps. Python never touches the memory itself: a front-end can truncate its file at any time, and only the C
core's guard survives that.
"""

import ctypes
import errno
import fcntl
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass

from ring.build import ffi, lib
from ring.errors import SetupError, error

TMPFS_MAGIC = 0x01021994  # memfd included
HUGETLBFS_MAGIC = 0x958458F6

# What shared memory takes (the sandbox of whoever maps it collects these): call, reason. 4 is PROT_EXEC.
SYSCALLS = {
    "mmap[2] & 4 == 0": "mapping what a front-end shares",
    "munmap": "the end of a mapping",
    "madvise": "guest memory stays out of core dumps",
    "fstat": "how long a file is",
    "fstatfs": "what file system it lies on",
    "fcntl": "its seals and its flags",
    "memfd_create": "the guard tests itself on a page of its own",
    "ftruncate": "the same",
}

_libc = ctypes.CDLL(None, use_errno=True)


def _file_system(fd: int) -> int:
    """The magic number of the file system ``fd`` lies on (os.statvfs does not tell it)."""
    buffer = ctypes.create_string_buffer(256)
    if _libc.fstatfs(fd, buffer) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return ctypes.c_long.from_buffer(buffer).value


def _refuse(text: str) -> SetupError:
    return SetupError("RING_E_REGION", text)


@dataclass(frozen=True)
class Policy:
    """What memory is accepted. max_bytes bounds the sum of all regions; any_file_system also takes files
    that are neither tmpfs (memfd included) nor hugetlbfs, whose pages may never arrive. keep_files: each mapping
    keeps a descriptor of its file, so that it can be handed to another process."""

    max_bytes: int = 1 << 42
    any_file_system: bool = False
    keep_files: bool = False

    def check_total(self, size: int) -> None:
        """Raise SetupError if ``size`` bytes in all are too much."""
        if size > self.max_bytes:
            raise _refuse(f"{size:#x} bytes of guest memory are more than the {self.max_bytes:#x} accepted here")


DEFAULT_POLICY = Policy()


class SharedFile:
    """``size`` bytes of a front-end's file from ``offset``, mapped; ``owner`` is marked when they vanish.

    Raises SetupError when the file is not what shared memory can be: not a regular file, on a file system
    whose pages may block, shorter than ``offset + size`` (touching the rest would raise SIGBUS), read-only
    or sealed against writing. ``fd`` stays the caller's and may be closed afterwards. noun, where, remedy: what it
    is, which one it is, and what to do about a file on the wrong file system, for these errors.

    identity: (device, inode) of the file. file: a descriptor of our own if the policy wants it kept, else -1.
    """

    def __init__(self, fd: int, size: int, offset: int, owner, policy: Policy, *, noun: str, where: str, remedy: str):
        self.size = size
        self.offset = offset
        self.file = -1
        self._owner = owner
        self._base = None
        if size <= 0 or offset < 0 or offset + size >= 1 << 63:
            raise _refuse(f"{where}: size {size:#x} at offset {offset:#x} of its file makes no sense")
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise _refuse(f"{where}: its descriptor is no regular file; use a memfd or a file in /dev/shm")
        if not policy.any_file_system and _file_system(fd) not in (TMPFS_MAGIC, HUGETLBFS_MAGIC):
            raise _refuse(f"{where}: its file is neither on tmpfs (memfd) nor on hugetlbfs; {remedy}")
        self.identity = status.st_dev, status.st_ino
        self.offset = offset
        if status.st_size < offset + size:
            raise _refuse(f"{where}: its file has {status.st_size:#x} bytes, the {noun} needs {offset + size:#x}")
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
            raise _refuse(f"{where}: its file is not open for reading and writing")
        if policy.keep_files:
            self.file = os.dup(fd)
        hva, base, length = ffi.new("uint8_t **"), ffi.new("uint8_t **"), ffi.new("size_t *")
        code = lib.guestmem_map(fd, size, offset, owner, hva, base, length)
        if code < 0:
            number = ffi.errno
            self.close()
            reason = os.strerror(number) if code == lib.RING_E_NOMEM else "offset or size out of range"
            hint = "; the file is sealed against writing" if number in (errno.EPERM, errno.EACCES) else ""
            raise _refuse(f"{where}: cannot be mapped ({reason}{hint})")
        self._hva, self._base, self._length = hva[0], base[0], length[0]

    @property
    def address(self) -> int:
        """Where the first byte lies in this process."""
        return int(ffi.cast("uintptr_t", self._hva))

    @property
    def extent(self) -> tuple[int, int]:
        """(address, bytes) of the whole mapping: ``size`` bytes and what fills their pages up."""
        return int(ffi.cast("uintptr_t", self._base)), self._length

    def sever(self, empty: int) -> None:
        """Put ``empty``, a file without a byte, in its place for whoever uses it: a touch then ends as if the front-end
        had truncated its own. Raises OSError."""
        if lib.guestmem_sever(self._base, self._length, empty) < 0:
            raise OSError(ffi.errno, os.strerror(ffi.errno))

    def close(self) -> None:
        """Unmap. No queue and no pump may use it any more."""
        if self._base is not None:
            lib.guestmem_unmap(self._base, self._length)
            self._base = None
        if self.file >= 0:
            os.close(self.file)
            self.file = -1


class Mapping(SharedFile):
    """One region of guest memory: gpa and uva are where the guest and the front-end have it. Raises SetupError."""

    def __init__(self, fd: int, gpa: int, uva: int, size: int, offset: int, owner, policy: Policy = DEFAULT_POLICY):
        super().__init__(fd, size, offset, owner, policy, noun="region", where=f"memory region at {gpa:#x}",
                         remedy="use memory-backend-memfd,share=on")
        self.gpa, self.uva = gpa, uva

    def covers(self, gpa: int, uva: int, size: int) -> bool:
        """Is this the region a front-end names so? (REM_MEM_REG compares these three.)"""
        return (self.gpa, self.uva, self.size) == (gpa, uva, size)


class Owner:
    """Whose memory it is: what the SIGBUS guard marks when one of its mappings vanishes."""

    def __init__(self):
        self._flag = ffi.new("int32_t *")

    def map(self, fd: int, gpa: int, uva: int, size: int, offset: int = 0, policy: Policy = DEFAULT_POLICY) -> Mapping:
        """Map one region for this owner; see Mapping."""
        return Mapping(fd, gpa, uva, size, offset, self._flag, policy)

    @property
    def gone(self) -> bool:
        """Did any of its memory vanish?"""
        return bool(self._flag[0])

    def table(self, mappings: Iterable[Mapping]) -> "GuestMemory":
        """An immutable translation table over ``mappings`` (at least one; neither their gpa nor their uva
        ranges may overlap). Raises SetupError."""
        return GuestMemory(tuple(mappings), self._flag)


class GuestMemory:
    """An immutable table of mappings. Does not own them: ``close`` frees the table alone."""

    def __init__(self, mappings: tuple[Mapping, ...], flag):
        self.mappings = mappings
        self._flag = flag
        regions = ffi.new("struct guest_region[]", len(mappings))
        for region, mapping in zip(regions, mappings, strict=True):
            region.gpa, region.uva, region.size, region.hva = mapping.gpa, mapping.uva, mapping.size, mapping._hva
        status = ffi.new("int *")
        self.handle = lib.guestmem_new(regions, len(mappings), flag, status)
        if self.handle == ffi.NULL:
            raise error(status[0])

    def file_at(self, uva: int) -> tuple[int, int, int]:
        """What lies at the front-end's address ``uva``: device and inode of the file, and the offset in it. They name a
        guest's memory, whoever maps it. Raises ValueError for an address outside all mappings."""
        for mapping in self.mappings:
            if mapping.uva <= uva < mapping.uva + mapping.size:
                return *mapping.identity, mapping.offset + uva - mapping.uva
        raise ValueError(f"{uva:#x} is in no region")

    def read(self, address: int, length: int, *, uva: bool = False) -> bytes:
        """A copy of ``length`` bytes at a gpa, or with ``uva`` at the front-end's address. Raises ValueError where some
        of them are in no region, MemoryGone."""
        pieces = ffi.new("struct piece[]", len(self.mappings))
        count, left = 0, length
        while left:
            for mapping in self.mappings:
                offset = address - (mapping.uva if uva else mapping.gpa)
                if 0 <= offset < mapping.size:
                    break
            else:
                raise ValueError(f"{address:#x} is in no region")
            part = min(left, mapping.size - offset)
            pieces[count].base, pieces[count].len = mapping._hva + offset, part
            count, left, address = count + 1, left - part, address + part
        data = ffi.new("uint8_t[]", max(length, 1))
        done = lib.pieces_read(pieces, count, 0, data, length)
        if done < 0:
            raise error(done)
        return bytes(ffi.buffer(data, done))

    def uva_of(self, hva) -> int:
        """What the front-end calls our address ``hva``. Raises ValueError for one outside all mappings."""
        at = int(ffi.cast("uintptr_t", hva))
        for mapping in self.mappings:
            offset = at - int(ffi.cast("uintptr_t", mapping._hva))
            if 0 <= offset < mapping.size:
                return mapping.uva + offset
        raise ValueError(f"{at:#x} is in no region")

    def close(self) -> None:
        """Free the table. No queue may use it any more."""
        if self.handle != ffi.NULL:
            lib.guestmem_free(self.handle)
            self.handle = ffi.NULL
