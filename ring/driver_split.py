"""The split ring as the driver has it: its fields by name, and the driver's way of using them.

Everything that depends on the ring's format is here: where the fields lie, how a chain is written, how it
becomes visible, how each side asks for notifications. ring/driver.py is what a driver does with any ring.

Specification: virtio 1.2, section 2.7 "Split Virtqueues". Addresses are gpas.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from struct import Struct
from typing import NamedTuple

from ring.driver_memory import GuestMemory

INDIRECT_DESC = 28  # feature bits, section 6
EVENT_IDX = 29

DESC_F_NEXT = 1
DESC_F_WRITE = 2
DESC_F_INDIRECT = 4
AVAIL_F_NO_INTERRUPT = 1
USED_F_NO_NOTIFY = 1

DESCRIPTOR = Struct("<QIHH")  # addr, len, flags, next: 2.7.5
USED_ELEMENT = Struct("<II")  # id, len: 2.7.8


class RingFull(Exception):
    """Not enough free descriptors for the chain."""


class DeviceError(Exception):
    """The device did what no device may: the text says what."""


class Buffer(NamedTuple):
    """A run of guest memory for one descriptor. gpa, len in bytes; writable by the device or readable."""

    gpa: int
    len: int
    writable: bool = False


@dataclass(frozen=True)
class SplitLayout:
    """Sizes and offsets in bytes of the parts of a split ring of ``size`` descriptors (2.7, 2.7.5-2.7.8)."""

    size: int

    @property
    def desc_bytes(self) -> int:
        return DESCRIPTOR.size * self.size

    @property
    def used_event(self) -> int:
        return 4 + 2 * self.size

    @property
    def avail_bytes(self) -> int:
        return self.used_event + 2

    @property
    def avail_event(self) -> int:
        return 4 + USED_ELEMENT.size * self.size

    @property
    def used_bytes(self) -> int:
        return self.avail_event + 2

    def avail_entry(self, index: int) -> int:
        return 4 + 2 * (index % self.size)

    def used_entry(self, index: int) -> int:
        return 4 + USED_ELEMENT.size * (index % self.size)


def _field(offset: int, width: int) -> property:
    """A number of ``width`` bytes, ``offset`` bytes into the structure a view stands for."""
    return property(lambda view: view.memory.load(view.gpa + offset, width),
                    lambda view, value: view.memory.store(view.gpa + offset, width, value))


class _View:
    """A structure in guest memory."""

    __slots__ = ("memory", "gpa")

    def __init__(self, memory: GuestMemory, gpa: int) -> None:
        self.memory = memory
        self.gpa = gpa


class Descriptor(_View):
    """struct virtq_desc."""

    __slots__ = ()
    addr = _field(0, 8)
    len = _field(8, 4)
    flags = _field(12, 2)
    next = _field(14, 2)

    def set(self, addr: int, len: int, flags: int = 0, next: int = 0) -> None:
        """Write all four fields."""
        self.memory.write(self.gpa, DESCRIPTOR.pack(addr, len, flags, next))


class DescriptorTable(_View):
    """An array of struct virtq_desc: the ring's own, or an indirect one anywhere in guest memory."""

    __slots__ = ()

    def __getitem__(self, index: int) -> Descriptor:
        return Descriptor(self.memory, self.gpa + DESCRIPTOR.size * index)


class UsedElement(_View):
    """struct virtq_used_elem."""

    __slots__ = ()
    id = _field(0, 4)
    len = _field(4, 4)


class AvailableEntries(_View):
    """The ring[] of the available ring; indices count on past the size, as avail.idx does."""

    __slots__ = ("layout",)

    def __getitem__(self, index: int) -> int:
        return self.memory.load(self.gpa + self.layout.avail_entry(index), 2)

    def __setitem__(self, index: int, head: int) -> None:
        self.memory.store(self.gpa + self.layout.avail_entry(index), 2, head)


class UsedEntries(_View):
    """The ring[] of the used ring; indices count on past the size, as used.idx does."""

    __slots__ = ("layout",)

    def __getitem__(self, index: int) -> UsedElement:
        return UsedElement(self.memory, self.gpa + self.layout.used_entry(index))


class _HalfRing(_View):
    """What struct virtq_avail and struct virtq_used share."""

    __slots__ = ("layout", "ring")
    flags = _field(0, 2)
    idx = _field(2, 2)

    def __init__(self, memory: GuestMemory, gpa: int, layout: SplitLayout, entries: type) -> None:
        super().__init__(memory, gpa)
        self.layout = layout
        self.ring = entries(memory, gpa)
        self.ring.layout = layout


def _event(name: str) -> property:
    """The event index behind the entries, where the layout says that it is."""
    return property(lambda half: half.memory.load(half.gpa + getattr(half.layout, name), 2),
                    lambda half, value: half.memory.store(half.gpa + getattr(half.layout, name), 2, value))


class AvailableRing(_HalfRing):
    """struct virtq_avail: written by the driver."""

    __slots__ = ()
    used_event = _event("used_event")


class UsedRing(_HalfRing):
    """struct virtq_used: written by the device."""

    __slots__ = ()
    avail_event = _event("avail_event")


_barrier_lock = threading.Lock()


def full_barrier() -> None:
    """Order our earlier stores before our later loads.

    Taking a free lock is a locked instruction, which on x86-64 is a full barrier. Elsewhere Python has
    none to offer: check ordering there with the driver in C (ring/loadgen.py).
    """
    with _barrier_lock:
        pass


def need_event(event: int, new: int, old: int) -> bool:
    """Was index ``event`` passed when an index moved from ``old`` to ``new``? (vring_need_event, 2.7.10)"""
    return (new - event - 1) & 0xFFFF < (new - old) & 0xFFFF


class SplitRing:
    """A split ring in guest memory: the fields by name, and the driver's way of using them.

    size: descriptors. features: negotiated mask; INDIRECT_DESC and EVENT_IDX matter. desc, avail, used:
    gpas of the parts, allocated where None. base: both indices start there.
    """

    def __init__(self, memory: GuestMemory, size: int, features: int, desc: int | None, avail: int | None,
                 used: int | None, base: int) -> None:
        self.memory = memory
        self.size = size
        self.base = base
        self.layout = SplitLayout(size)
        self.event_idx = bool(features >> EVENT_IDX & 1)
        self._allocated: list[int] = []
        self.desc = DescriptorTable(memory, self._place(desc, self.layout.desc_bytes, 16))
        self.avail = AvailableRing(memory, self._place(avail, self.layout.avail_bytes, 2), self.layout,
                                   AvailableEntries)
        self.used = UsedRing(memory, self._place(used, self.layout.used_bytes, 4), self.layout, UsedEntries)
        self.avail.idx = self.used.idx = base
        self.next_avail = base  # next entry to fill; avail.idx follows at publish
        self.next_used = base  # next used entry to look at
        self._kicked = base  # next_avail at the last kick decision
        self.free = list(reversed(range(size)))  # descriptor numbers, taken from the end

    def _place(self, gpa: int | None, size: int, align: int) -> int:
        if gpa is not None:
            self.memory.write(gpa, bytes(size))
            return gpa
        self._allocated.append(self.memory.alloc(size, align))
        return self._allocated[-1]

    def _write_table(self, table: DescriptorTable, slots: Sequence[int], buffers: Sequence[Buffer]) -> None:
        for i, buffer in enumerate(buffers):
            last = i == len(buffers) - 1
            table[slots[i]].set(buffer.gpa, buffer.len,
                                DESC_F_WRITE * buffer.writable | DESC_F_NEXT * (not last),
                                0 if last else slots[i + 1])

    def write_chain(self, buffers: Sequence[Buffer], table: int | None, direct: int) -> list[int]:
        """Describe a chain: ``direct`` buffers in descriptors of the ring, the rest in the ``table`` (gpa).

        -> the descriptors taken, head first. Not yet offered. Raises RingFull, taking nothing. (2.7.5.3)
        """
        needed = direct + (table is not None)
        if needed > len(self.free):
            raise RingFull(f"the chain needs {needed} descriptors, {len(self.free)} of {self.size} are free")
        slots = [self.free.pop() for _ in range(needed)]
        self._write_table(self.desc, slots, buffers[:direct])
        if table is not None:
            rest = buffers[direct:]
            self._write_table(DescriptorTable(self.memory, table), range(len(rest)), rest)
            self.desc[slots[-1]].set(table, DESCRIPTOR.size * len(rest), DESC_F_INDIRECT)
            if direct:
                self.desc[slots[-2]].flags |= DESC_F_NEXT
                self.desc[slots[-2]].next = slots[-1]
        return slots

    def offer(self, head: int) -> None:
        """Enter ``head`` into the available ring; the device sees it after :meth:`publish`."""
        self.avail.ring[self.next_avail] = head
        self.next_avail = (self.next_avail + 1) & 0xFFFF

    def publish(self) -> None:
        """Make everything offered visible: the store of avail.idx comes after the entries (2.7.13.3)."""
        self.avail.idx = self.next_avail

    def kick_due(self) -> bool:
        """Does the device want to hear of what was published since the last question? (2.7.10)"""
        full_barrier()
        before, self._kicked = self._kicked, self.next_avail
        if self.event_idx:
            return need_event(self.used.avail_event, self.next_avail, before)
        return before != self.next_avail and not self.used.flags & USED_F_NO_NOTIFY

    def pending(self) -> int:
        """How many used entries wait to be taken. Raises DeviceError beyond the size."""
        count = (self.used.idx - self.next_used) & 0xFFFF
        if count > self.size:
            raise DeviceError(f"used.idx {self.used.idx} is {count} ahead of {self.next_used}, "
                              f"the ring has {self.size} entries")
        return count

    def next_completion(self) -> tuple[int, int] | None:
        """Take the next used entry -> (head, bytes written), or None. (2.7.14)"""
        if not self.pending():
            return None
        element = self.used.ring[self.next_used]
        self.next_used = (self.next_used + 1) & 0xFFFF
        return element.id, element.len

    def want_calls(self, after: int = 1) -> bool:
        """Ask for a notification once ``after`` more entries are used (EVENT_IDX; 1 otherwise).

        -> True when that many are there already: no notification may come for those. (2.7.7)
        """
        if self.event_idx:
            self.avail.used_event = (self.next_used + after - 1) & 0xFFFF
        else:
            self.avail.flags = 0
        full_barrier()
        return self.pending() >= after

    def refuse_calls(self) -> None:
        """Ask for no notification. With EVENT_IDX the event index is put where it comes last. (2.7.7)"""
        if self.event_idx:
            self.avail.used_event = (self.next_used - 1) & 0xFFFF
        else:
            self.avail.flags = AVAIL_F_NO_INTERRUPT

    def close(self) -> None:
        """Free the parts allocated here. Idempotent."""
        for gpa in self._allocated:
            self.memory.free(gpa)
        self._allocated.clear()
