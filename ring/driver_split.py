"""The split ring as the driver has it: its fields by name, and the driver's way of using them.

Everything that depends on the ring's format is here: where the fields lie, how a chain is written, how it
becomes visible, how each side asks for notifications. ring/driver.py is what a driver does with any ring.

Specification: virtio 1.2, section 2.7 "Split Virtqueues". Addresses are gpas.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from struct import Struct

from ring.driver_memory import GuestMemory
from ring.driver_parts import (
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESCRIPTOR_BYTES,
    Area,
    Areas,
    Buffer,
    DeviceError,
    Ring,
    RingFull,
    View,
    field,
    full_barrier,
    link,
)

AVAIL_F_NO_INTERRUPT = 1
USED_F_NO_NOTIFY = 1

DESCRIPTOR = Struct("<QIHH")  # addr, len, flags, next: 2.7.5
USED_ELEMENT = Struct("<II")  # id, len: 2.7.8


@dataclass(frozen=True)
class SplitLayout:
    """Sizes and offsets in bytes of the parts of a split ring of ``size`` descriptors (2.7, 2.7.5-2.7.8)."""

    size: int

    @property
    def desc_bytes(self) -> int:
        return DESCRIPTOR_BYTES * self.size

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


class Descriptor(View):
    """struct virtq_desc."""

    __slots__ = ()
    addr = field(0, 8)
    len = field(8, 4)
    flags = field(12, 2)
    next = field(14, 2)

    def set(self, addr: int, len: int, flags: int = 0, next: int = 0) -> None:
        """Write all four fields."""
        self.memory.write(self.gpa, DESCRIPTOR.pack(addr, len, flags, next))


class DescriptorTable(View):
    """An array of struct virtq_desc: the ring's own, or an indirect one anywhere in guest memory."""

    __slots__ = ()

    def __getitem__(self, index: int) -> Descriptor:
        return Descriptor(self.memory, self.gpa + DESCRIPTOR_BYTES * index)


class UsedElement(View):
    """struct virtq_used_elem."""

    __slots__ = ()
    id = field(0, 4)
    len = field(4, 4)


class AvailableEntries(View):
    """The ring[] of the available ring; indices count on past the size, as avail.idx does."""

    __slots__ = ("layout",)

    def __getitem__(self, index: int) -> int:
        return self.memory.load(self.gpa + self.layout.avail_entry(index), 2)

    def __setitem__(self, index: int, head: int) -> None:
        self.memory.store(self.gpa + self.layout.avail_entry(index), 2, head)


class UsedEntries(View):
    """The ring[] of the used ring; indices count on past the size, as used.idx does."""

    __slots__ = ("layout",)

    def __getitem__(self, index: int) -> UsedElement:
        return UsedElement(self.memory, self.gpa + self.layout.used_entry(index))


class _HalfRing(View):
    """What struct virtq_avail and struct virtq_used share."""

    __slots__ = ("layout", "ring")
    flags = field(0, 2)
    idx = field(2, 2)

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


def need_event(event: int, new: int, old: int) -> bool:
    """Was index ``event`` passed when an index moved from ``old`` to ``new``? (vring_need_event, 2.7.10)"""
    return (new - event - 1) & 0xFFFF < (new - old) & 0xFFFF


class SplitRing(Ring):
    """A split ring in guest memory: the fields by name, and the driver's way of using them.

    size: descriptors. features: negotiated mask; EVENT_IDX and IN_ORDER matter. desc, avail, used:
    gpas of the parts, allocated where None. base: both indices start there; None: 0.
    """

    def __init__(self, memory: GuestMemory, size: int, features: int, desc: int | None = None,
                 avail: int | None = None, used: int | None = None, base: int | None = None) -> None:
        super().__init__(memory, size, features)
        self.layout = SplitLayout(size)
        self.desc = DescriptorTable(memory, self._place(desc, self.layout.desc_bytes, 16))
        self.avail = AvailableRing(memory, self._place(avail, self.layout.avail_bytes, 2), self.layout,
                                   AvailableEntries)
        self.used = UsedRing(memory, self._place(used, self.layout.used_bytes, 4), self.layout, UsedEntries)
        self.next_avail = base or 0  # next entry to fill; avail.idx follows at publish
        self.avail.idx = self.used.idx = self.next_avail
        self.next_used = self.next_avail  # next used entry to look at
        self._kicked = self.next_avail  # next_avail at the last kick decision

    @property
    def areas(self) -> Areas:
        """Where the ring lies."""
        return Areas(Area(self.desc.gpa, self.layout.desc_bytes), Area(self.avail.gpa, self.layout.avail_bytes),
                     Area(self.used.gpa, self.layout.used_bytes))

    @property
    def base(self) -> int:
        """Where a device that comes now has to begin, as SET_VRING_BASE carries it."""
        return self.next_used

    @property
    def room(self) -> int:
        """Descriptors that are free."""
        return len(self.free)

    def _write_table(self, table: DescriptorTable, slots: Sequence[int], buffers: Sequence[Buffer]) -> None:
        for i, (buffer, flags) in enumerate(zip(buffers, link(buffers), strict=True)):
            table[slots[i]].set(buffer.gpa, buffer.len, flags, slots[i + 1] if flags & DESC_F_NEXT else 0)

    def write_chain(self, buffers: Sequence[Buffer], table: int | None, direct: int) -> list[int]:
        """Describe a chain and offer it: ``direct`` buffers in descriptors of the ring, the rest in the
        ``table`` (gpa).

        -> the descriptors taken, head first. Raises RingFull, taking nothing. (2.7.5.3)
        """
        needed = direct + (table is not None)
        if needed > self.room:
            raise RingFull(f"the chain needs {needed} descriptors, {self.room} of {self.size} are free")
        slots = self._take_free(needed)
        self._write_table(self.desc, slots[:direct], buffers[:direct])
        if table is not None:
            rest = buffers[direct:]
            self._write_table(DescriptorTable(self.memory, table), range(len(rest)), rest)
            self.desc[slots[-1]].set(table, DESCRIPTOR_BYTES * len(rest), DESC_F_INDIRECT)
            if direct:
                self.desc[slots[-2]].flags |= DESC_F_NEXT
                self.desc[slots[-2]].next = slots[-1]
        self.offer(slots[0])
        return slots

    def offer(self, head: int) -> None:
        """Enter ``head`` into the available ring; the device sees it after :meth:`publish`."""
        self.avail.ring[self.next_avail] = head
        self.next_avail = (self.next_avail + 1) & 0xFFFF
        if self.in_order:
            self._entries[head] = 1

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
        """How many used chains wait to be taken. Raises DeviceError beyond the size."""
        count = (self.used.idx - self.next_used) & 0xFFFF
        if count > self.size:
            raise DeviceError(f"used.idx {self.used.idx} is {count} ahead of {self.next_used}, "
                              f"the ring has {self.size} entries")
        return count

    def next_completion(self) -> tuple[int, int | None] | None:
        """Take the next used chain -> (head, bytes written), or None. (2.7.14)

        Written is None for a chain that went by in a batch: it counts as completely used. Raises DeviceError
        in order for a batch that is not covered by used.idx.
        """
        pending = self.pending()
        if not pending:
            if self._batch:
                raise DeviceError(f"the used element of a batch names head {self._batch[0]}, "
                                  f"but used.idx {self.used.idx} does not cover the chains up to that one")
            return None
        element = self.used.ring[self.next_used]
        head, written = self._next_in_turn(self._batch or (element.id, element.len))
        self.next_used = (self.next_used + 1) & 0xFFFF
        self._entries.pop(head, None)
        return head, written

    def want_calls(self, after: int = 1) -> bool:
        """Ask for a notification once ``after`` more chains are used (EVENT_IDX; 1 otherwise).

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
