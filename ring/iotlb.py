"""The IOTLB: what a front-end says about the addresses of a driver behind an IOMMU (core/iotlb.c has the theory)."""

from collections.abc import Sequence
from dataclasses import dataclass

from ring.build import ffi, lib
from ring.errors import error
from ring.guestmem import GuestMemory

READ = lib.IOTLB_READ
WRITE = lib.IOTLB_WRITE
ENTRIES_MAX = lib.IOTLB_ENTRIES_MAX


@dataclass(frozen=True)
class Fault:
    """A use of memory, ``access`` (READ | WRITE) at ``iova``, that could not be translated."""

    iova: int
    access: int


def fault_from(c) -> Fault | None:
    """What the core noted, if anything."""
    return Fault(c.iova, c.access) if c.access else None


@dataclass(frozen=True)
class Part:
    """A part of a ring: ``length`` bytes at ``address``, for ``access``."""

    address: int
    length: int
    access: int

    def overlaps(self, iova: int, size: int) -> bool:
        """Does it have a byte in [iova, iova + size)?"""
        return self.address < iova + size and iova < self.address + self.length


def ring_parts(*, size: int, desc: int, avail: int, used: int, features: int) -> list[Part]:
    """The three parts of a ring as VirtQueue takes them, with their lengths in bytes (virtio 1.2, 2.7 and 2.8.10.1)
    and what the device does with them."""
    out = ffi.new("struct vq_part[3]")
    lib.vq_parts(size, features, out)
    return [Part(address, part.len, part.access) for address, part in zip((desc, avail, used), out, strict=True)]


class Iotlb:
    """A table of translations. Changes only while no pump has a queue that uses it."""

    def __init__(self) -> None:
        self.handle = lib.iotlb_new()
        if self.handle == ffi.NULL:
            raise MemoryError("an IOTLB")

    def __len__(self) -> int:
        return lib.iotlb_count(self.handle)

    def update(self, memory: GuestMemory, iova: int, size: int, uva: int, access: int) -> None:
        """[iova, iova + size) is at ``uva``; replaces what it overlaps. Raises SetupError for what cannot be."""
        status = lib.iotlb_update(self.handle, memory.handle, iova, size, uva, access)
        if status < 0:
            raise error(status)

    def has(self, memory: GuestMemory, iova: int, size: int, uva: int, access: int) -> bool:
        """Would :meth:`update` with this change nothing?"""
        return bool(lib.iotlb_has(self.handle, memory.handle, iova, size, uva, access))

    def invalidate(self, iova: int, size: int) -> int:
        """Forget [iova, iova + size), no further than the end of the address space -> how many entries that
        touched."""
        return lib.iotlb_invalidate(self.handle, iova, min(size, (1 << 64) - iova) % (1 << 64))

    def clear(self) -> None:
        """Forget everything: the memory table changes."""
        self.invalidate(0, 1 << 64)

    def lacks(self, memory: GuestMemory, parts: Sequence[Part]) -> tuple[str, Fault] | None:
        """The first of ``parts`` that cannot be used yet: the code (RING_E_MISS, _DENIED, or _RING_UNMAPPED where it is
        not one run of memory) and the fault; None: all can."""
        hva, fault = ffi.new("uint8_t **"), ffi.new("struct iotlb_fault *")
        for part in parts:
            status = lib.iotlb_run(self.handle, memory.handle, part.address, part.length, part.access, hva, fault)
            if status < 0:
                return error(status).code, Fault(fault.iova, fault.access)
        return None

    def uva(self, memory: GuestMemory, iova: int) -> int:
        """What the front-end itself calls ``iova``, which is translated. Raises RingError where it is not."""
        hva, fault = ffi.new("uint8_t **"), ffi.new("struct iotlb_fault *")
        status = lib.iotlb_run(self.handle, memory.handle, iova, 1, 0, hva, fault)
        if status < 0:
            raise error(status)
        return memory.uva_of(hva[0])

    def close(self) -> None:
        """Free it. No queue may use it any more."""
        if self.handle != ffi.NULL:
            lib.iotlb_free(self.handle)
            self.handle = ffi.NULL
