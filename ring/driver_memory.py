"""Guest memory as the guest's side has it: made here, lent to a device.

The device's side (ring/guestmem.py) maps what somebody sends it and trusts none of it. This is the other
end: one memfd a region, an allocator for rings and buffers, and scalar access that a device running in
another thread or process may watch. For tests, tools and lessons; no daemon imports it.

A load or store of 2, 4 or 8 bytes at an aligned address is one machine access (a native memoryview
item), so a device never sees half of an index. struct.pack_into would write it byte by byte.
"""

import fcntl
import mmap
import os
from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass

# Kept apart from each other and from file offsets, so that mistaking one for another shows.
DEFAULT_SIZE = 16 << 20
DEFAULT_GPA = 0x4000_0000
DEFAULT_UVA = 0x7F50_0000_0000


class OutOfGuestMemory(Exception):
    """No region has that much free memory."""


@dataclass(frozen=True)
class Extent:
    """Where one region is to lie. gpa, uva, size and offset (into its file) in bytes; uva None: chosen."""

    gpa: int
    size: int
    uva: int | None = None
    offset: int = 0


@dataclass(frozen=True)
class Region:
    """A region to hand to a front-end: what one row of SET_MEM_TABLE says, and the descriptor sent along."""

    fd: int
    gpa: int
    uva: int
    size: int
    offset: int


class _Backing:
    """One region's memfd, its mapping, typed views of it and its free intervals."""

    def __init__(self, extent: Extent, uva: int, sealed: bool, directory: str | None) -> None:
        if directory is None:
            self.fd = os.memfd_create("guest-memory", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        else:
            self.fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC)
        length = extent.offset + extent.size
        os.ftruncate(self.fd, length)
        if sealed:
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS,
                        fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self.region = Region(self.fd, extent.gpa, uva, extent.size, extent.offset)
        self.mapping = mmap.mmap(self.fd, length)
        self.bytes = memoryview(self.mapping)
        self.items = {width: self.bytes[:length // width * width].cast(code)
                      for width, code in ((1, "B"), (2, "H"), (4, "I"), (8, "Q"))}
        self.free = [(extent.gpa, extent.size)]

    def unmap(self) -> None:
        for view in (*self.items.values(), self.bytes):
            view.release()
        self.mapping.close()


class GuestMemory:
    """A guest's RAM: one region of ``size`` bytes, or several given as ``extents``.

    gpa, uva: where the single region lies. sealed: put the seals on that QEMU's memory-backend-memfd puts
    on (SHRINK, GROW, SEAL); without them :meth:`truncate` works. directory: use unnamed files there, as its
    memory-backend-file does, instead of memfds. All addresses taken and answered are gpas,
    all lengths bytes. An address outside every region raises ValueError, as does any access to a region
    that was truncated: the mapping is given up first, for touching it would end the process.
    """

    def __init__(self, size: int = DEFAULT_SIZE, *, gpa: int = DEFAULT_GPA, uva: int = DEFAULT_UVA,
                 sealed: bool = False, directory: str | None = None,
                 extents: Iterable[Extent] | None = None) -> None:
        wanted = [Extent(gpa, size, uva)] if extents is None else list(extents)
        self._backings: list[_Backing] = []
        self._allocated: dict[int, tuple[_Backing, int]] = {}
        for extent in wanted:
            chosen = extent.gpa - DEFAULT_GPA + DEFAULT_UVA if extent.uva is None else extent.uva
            self._backings.append(_Backing(extent, chosen, sealed, directory))
        self._last = self._backings[0]

    def __enter__(self) -> "GuestMemory":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def regions(self) -> list[Region]:
        """What to hand to a front-end, in the order given."""
        return [backing.region for backing in self._backings]

    def uva(self, gpa: int) -> int:
        """The front-end virtual address of ``gpa``: what SET_VRING_ADDR carries."""
        region = self._find(gpa).region
        return gpa - region.gpa + region.uva

    # ---------------------------------------------------------------------------- bytes and scalars

    def _find(self, gpa: int) -> _Backing:
        if 0 <= gpa - self._last.region.gpa < self._last.region.size:
            return self._last
        for backing in self._backings:
            if 0 <= gpa - backing.region.gpa < backing.region.size:
                self._last = backing
                return backing
        raise ValueError(f"gpa {gpa:#x} is in no region of guest memory")

    def _runs(self, gpa: int, length: int) -> Iterable[tuple[_Backing, int, int]]:
        """[gpa, gpa + length) as (backing, position in its mapping, bytes), crossing adjacent regions."""
        while length > 0:
            backing = self._find(gpa)
            region = backing.region
            part = min(length, region.gpa + region.size - gpa)
            yield backing, gpa - region.gpa + region.offset, part
            gpa += part
            length -= part

    def read(self, gpa: int, length: int) -> bytes:
        """The bytes at [gpa, gpa + length)."""
        return b"".join(bytes(backing.bytes[at:at + part]) for backing, at, part in self._runs(gpa, length))

    def write(self, gpa: int, data: bytes) -> None:
        """Put ``data`` at ``gpa``."""
        done = 0
        for backing, at, part in self._runs(gpa, len(data)):
            backing.bytes[at:at + part] = data[done:done + part]
            done += part

    def view(self, gpa: int, length: int) -> memoryview:
        """The bytes themselves, inside one region, for C to work on. Release it before :meth:`close`."""
        (backing, at, part), *more = self._runs(gpa, length)
        if more:
            raise ValueError(f"[{gpa:#x}, {gpa + length:#x}) crosses regions")
        return backing.bytes[at:at + part]

    def _item(self, gpa: int, width: int) -> tuple[memoryview | None, int]:
        """Where an aligned number of ``width`` bytes is; (None, 0) if it has to be moved bytewise."""
        backing = self._find(gpa)
        within = gpa - backing.region.gpa
        at = within + backing.region.offset
        if at % width or within + width > backing.region.size:
            return None, 0
        return backing.items[width], at // width

    def load(self, gpa: int, width: int) -> int:
        """The little-endian number of ``width`` bytes at ``gpa``: one access if aligned."""
        items, index = self._item(gpa, width)
        return int.from_bytes(self.read(gpa, width), "little") if items is None else items[index]

    def store(self, gpa: int, width: int, value: int) -> None:
        """Put the number ``value``, little-endian, into ``width`` bytes at ``gpa``: one access if aligned."""
        items, index = self._item(gpa, width)
        if items is None:
            self.write(gpa, value.to_bytes(width, "little"))
        else:
            items[index] = value

    def snapshot(self) -> list[bytes]:
        """A copy of every region's bytes, to be compared with a later one."""
        return [self.read(region.gpa, region.size) for region in self.regions]

    # ----------------------------------------------------------------------------------- allocator

    def alloc(self, size: int, align: int = 16, region: int | None = None) -> int:
        """Take ``size`` bytes (zeroed) at a multiple of ``align``, from region number ``region`` or any.

        -> gpa. Raises OutOfGuestMemory, ValueError for size 0. First fit: whoever frees everything gets the
        same addresses again.
        """
        if size < 1:
            raise ValueError("an allocation needs at least one byte")
        size = -(-size // align) * align  # no splinters between buffers
        for backing in self._backings if region is None else [self._backings[region]]:
            for i, (start, length) in enumerate(backing.free):
                gpa = -(-start // align) * align
                left = start + length - gpa - size
                if left < 0:
                    continue
                rest = [(start, gpa - start), (gpa + size, left)]
                backing.free[i:i + 1] = [interval for interval in rest if interval[1]]
                self._allocated[gpa] = (backing, size)
                self.write(gpa, bytes(size))
                return gpa
        raise OutOfGuestMemory(f"no {size} bytes of guest memory are free: make the GuestMemory larger")

    def free(self, gpa: int) -> None:
        """Give back what :meth:`alloc` answered. Raises KeyError for anything else."""
        backing, size = self._allocated.pop(gpa)
        insort(backing.free, (gpa, size))
        merged: list[tuple[int, int]] = []
        for start, length in backing.free:
            if merged and merged[-1][0] + merged[-1][1] == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            else:
                merged.append((start, length))
        backing.free = merged

    # ----------------------------------------------------------------------------------- life's end

    def truncate(self, size: int = 0, region: int = 0) -> None:
        """Do what a hostile front-end does: cut the file of region number ``region`` down to ``size`` bytes.

        Raises PermissionError on sealed memory, in which case nothing has changed.
        """
        backing = self._backings[region]
        os.ftruncate(backing.fd, size)
        backing.unmap()

    def close(self) -> None:
        """Unmap everything and close the memfds. Idempotent; a device keeps its own mapping."""
        for backing in self._backings:
            if backing.fd >= 0:
                backing.unmap()
                os.close(backing.fd)
                backing.fd = -1
