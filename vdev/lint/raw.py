"""What a driver has written into a ring, field by field, without a judgement.

The device's own walk (ring/core/) stops at the first thing that is wrong, and drops what means nothing to it. A linter
wants to see the rest as well: flags that no device looks at, links behind a broken one, whether a descriptor is still
what it was. This reads all that can be read, in bounded steps, through the guarded copy of guest memory.

virtio 1.2, sections 2.7.5 "The Virtqueue Descriptor Table", 2.7.6, 2.8.13 and 2.8.14.
"""

from dataclasses import dataclass
from struct import Struct
from typing import NamedTuple

from ring.errors import MemoryGone
from ring.virtqueue import VirtQueue

NEXT, WRITE, INDIRECT = 1, 2, 4
AVAIL, USED = 1 << 7, 1 << 15
_DESCRIPTOR = Struct("<QIHH")


class Descriptor(NamedTuple):
    """One of a split ring, or of its tables: next is a link. A packed one has its buffer id there, see
    :attr:`flags_packed`."""

    at: int  # index in the table, or slot
    addr: int
    len: int
    third: int  # split: flags; packed: buffer id
    fourth: int  # split: next; packed: flags


@dataclass(frozen=True)
class RawChain:
    """A chain as it lies there. ring: its descriptors in the ring; table: those of its indirect table, if it has one
    that can be read. packed: what the third and fourth fields mean."""

    packed: bool
    ring: tuple[Descriptor, ...]
    table: tuple[Descriptor, ...] = ()

    def flags(self, descriptor: Descriptor) -> int:
        return descriptor.fourth if self.packed else descriptor.third

    @property
    def buffers(self) -> list[Descriptor]:
        """The descriptors that name memory for a frame."""
        return [d for d in (*self.ring, *self.table) if not (self.flags(d) & INDIRECT and d in self.ring)]

    def total(self, writable: bool) -> int:
        """Bytes of its device-writable or device-readable buffers."""
        return sum(d.len for d in self.buffers if bool(self.flags(d) & WRITE) == writable)


class RawQueue:
    """The driver's side of ``queue``, which runs. Everything returns None where memory cannot be read."""

    def __init__(self, queue: VirtQueue) -> None:
        self.queue = queue
        self.size = queue.size

    def _field(self, uva: int) -> int | None:
        data = self._read(uva, 2, uva=True)
        return None if data is None else int.from_bytes(data, "little")

    def _read(self, address: int, length: int, *, uva: bool = False) -> bytes | None:
        try:
            return self.queue.memory.read(address, length, uva=uva)
        except (ValueError, MemoryGone):
            return None

    # ------------------------------------------------------------------------------------------ split

    def avail_flags(self) -> int | None:
        """flags of the available ring."""
        return self._field(self.queue.avail)

    def avail_idx(self) -> int | None:
        """idx of the available ring."""
        return self._field(self.queue.avail + 2)

    def avail_entry(self, index: int) -> int | None:
        """The head in the entry for ``index``, which counts on past the size."""
        return self._field(self.queue.avail + 4 + 2 * (index % self.size))

    # ----------------------------------------------------------------------------------------- packed

    def driver_event(self) -> tuple[int, int] | None:
        """(off_wrap, flags) of the driver's event suppression."""
        data = self._read(self.queue.avail, 4, uva=True)
        return None if data is None else (int.from_bytes(data[:2], "little"), int.from_bytes(data[2:], "little"))

    def available(self, slot: int, wrap: bool) -> bool:
        """Is the descriptor in ``slot`` available in the round with the counter ``wrap``?"""
        flags = self._field(self.queue.desc + 16 * slot + 14)
        return flags is not None and bool(flags & AVAIL) == wrap != bool(flags & USED)

    # ----------------------------------------------------------------------------------------- chains

    def chain(self, at: int) -> RawChain:
        """The chain that begins at descriptor (packed: slot) ``at``, as far as it can be read."""
        packed = self.queue.packed
        ring: list[Descriptor] = []
        while len(ring) < self.size and at < self.size:
            descriptor = self._descriptor(self.queue.desc + 16 * at, at, uva=True)
            if descriptor is None:
                break
            ring.append(descriptor)
            flags = descriptor.fourth if packed else descriptor.third
            if flags & INDIRECT:
                return RawChain(packed, tuple(ring), self._table(descriptor, packed))
            if not flags & NEXT:
                break
            at = (at + 1) % self.size if packed else descriptor.fourth
        return RawChain(packed, tuple(ring))

    def _descriptor(self, address: int, at: int, *, uva: bool = False) -> Descriptor | None:
        data = self._read(address, _DESCRIPTOR.size, uva=uva)
        return None if data is None else Descriptor(at, *_DESCRIPTOR.unpack(data))

    def _table(self, named: Descriptor, packed: bool) -> tuple[Descriptor, ...]:
        count = min(named.len // _DESCRIPTOR.size, self.size + 1)  # one too many is enough to know
        data = self._read(named.addr, count * _DESCRIPTOR.size)
        if data is None:
            return ()
        entries = [Descriptor(at, *fields) for at, fields in enumerate(_DESCRIPTOR.iter_unpack(data))]
        if packed:
            return tuple(entries)
        followed: list[Descriptor] = []
        at = 0
        while len(followed) < count and at < count:
            followed.append(entries[at])
            if not entries[at].third & NEXT:
                break
            at = entries[at].fourth
        return tuple(followed)

    def bytes_of(self, chain: RawChain, limit: int) -> bytes:
        """The first ``limit`` bytes of its device-readable buffers, as far as they can be read."""
        data = b""
        for descriptor in chain.buffers:
            if len(data) >= limit:
                break
            if not chain.flags(descriptor) & WRITE:
                part = self._read(descriptor.addr, min(descriptor.len, limit - len(data)))
                if part is None:
                    break
                data += part
        return data
