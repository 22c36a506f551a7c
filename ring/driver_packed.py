"""The packed ring as the driver has it: its fields by name, and the driver's way of using them.

One ring of descriptors serves both directions: the driver makes descriptors available in ring order, the
device writes used ones over them, also in ring order but in the order in which it is done. Each side counts
the laps it has made with one bit, its wrap counter, 1 in the first lap. A descriptor says with its flags
AVAIL and USED in which lap it was made available, and in which it was used (2.8.1).

A place in the ring is therefore a slot and a wrap counter. Both are kept as one number here, a *position*,
which counts on through two laps and then begins anew: position 0 is slot 0 with wrap counter 1, position
``size`` is slot 0 with wrap counter 0. Distances are differences modulo two laps.

Specification: virtio 1.2, section 2.8 "Packed Virtqueues". Addresses are gpas.
"""

from collections.abc import Sequence
from heapq import nsmallest
from itertools import islice
from struct import Struct

from ring.driver_memory import GuestMemory
from ring.driver_parts import (
    DESC_F_INDIRECT,
    DESC_F_WRITE,
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

DESC_F_AVAIL = 1 << 7
DESC_F_USED = 1 << 15

EVENT_ENABLE = 0  # flags of an event suppression structure, 2.8.10
EVENT_DISABLE = 1
EVENT_DESC = 2

WRAP = 1 << 15  # beside a slot: its wrap counter
EVENT_BYTES = 4

PACKED_DESCRIPTOR = Struct("<QIHH")  # addr, len, id, flags: 2.8.13


class PackedDescriptor(View):
    """struct pvirtq_desc."""

    __slots__ = ()
    addr = field(0, 8)
    len = field(8, 4)
    id = field(12, 2)
    flags = field(14, 2)

    def set(self, addr: int, len: int, flags: int = 0, id: int = 0) -> None:
        """Write all four fields, the flags last."""
        self.addr, self.len, self.id, self.flags = addr, len, id, flags


class PackedDescriptors(View):
    """An array of struct pvirtq_desc: the ring itself, or an indirect table anywhere in guest memory."""

    __slots__ = ()

    def __getitem__(self, slot: int) -> PackedDescriptor:
        return PackedDescriptor(self.memory, self.gpa + DESCRIPTOR_BYTES * slot)


class EventSuppression(View):
    """struct pvirtq_event_suppress: when the side that writes it wants to be notified (2.8.14)."""

    __slots__ = ()
    off_wrap = field(0, 2)  # slot, and its wrap counter in bit 15
    flags = field(2, 2)  # EVENT_*
    both = field(0, 4)  # in one access, so that they belong together

    def set(self, off_wrap: int, flags: int) -> None:
        """Write both fields, in one access."""
        self.both = off_wrap | flags << 16


class PackedRing(Ring):
    """A packed ring in guest memory: the fields by name, and the driver's way of using them.

    size: descriptors, any number. features: negotiated mask; EVENT_IDX and IN_ORDER matter. desc,
    driver_event, device_event: gpas of the parts, allocated where None. base: slot and wrap counter where
    both sides start, as SET_VRING_BASE encodes them (the low half is enough); None: slot 0, counter 1.
    """

    def __init__(self, memory: GuestMemory, size: int, features: int, desc: int | None = None,
                 driver_event: int | None = None, device_event: int | None = None,
                 base: int | None = None) -> None:
        super().__init__(memory, size, features)
        self.desc = PackedDescriptors(memory, self._place(desc, DESCRIPTOR_BYTES * size, 16))
        self.driver_event = EventSuppression(memory, self._place(driver_event, EVENT_BYTES, 4))
        self.device_event = EventSuppression(memory, self._place(device_event, EVENT_BYTES, 4))
        self.room = size  # descriptors that are free
        self.next_avail = 0 if base is None else self.position(base & 0xFFFF)  # next slot to fill
        self.next_used = self.next_avail  # next slot the device uses
        self._published = self.next_avail  # up to here the device may look
        self._kicked = self.next_avail  # _published at the last kick decision
        self._kick_slots = 0  # how far it has moved since
        self._held: int | None = None  # flags of the first descriptor not published yet
        if self.next_avail:
            self._leave_traces(self.next_avail)

    def _leave_traces(self, position: int) -> None:
        """Make a ring that starts at ``position`` look as if the slots before it had been used."""
        for past in range(position - self.size, position):
            self.desc[past % self.size].flags = self._used_flags(past % (2 * self.size))

    # --------------------------------------------------------------------------------------- positions

    def wrap(self, position: int) -> int:
        """The wrap counter at ``position``."""
        return 1 - position // self.size

    def off_wrap(self, position: int) -> int:
        """``position`` as the ring encodes it: slot, and wrap counter in bit 15."""
        return position % self.size | WRAP * self.wrap(position)

    def position(self, off_wrap: int) -> int:
        """The opposite of :meth:`off_wrap`. Raises ValueError for a slot outside the ring."""
        slot = off_wrap & ~WRAP
        if slot >= self.size:
            raise ValueError(f"slot {slot} is outside the ring of {self.size}")
        return slot if off_wrap & WRAP else slot + self.size

    def _moved(self, position: int, by: int) -> int:
        return (position + by) % (2 * self.size)

    def available_flags(self, position: int) -> int:
        """AVAIL and USED of a descriptor made available at ``position``: equal and unequal to its wrap
        counter (2.8.1)."""
        return DESC_F_AVAIL if self.wrap(position) else DESC_F_USED

    def _used_flags(self, position: int) -> int:
        return (DESC_F_AVAIL | DESC_F_USED) * self.wrap(position)

    @property
    def areas(self) -> Areas:
        """Where the ring lies."""
        return Areas(Area(self.desc.gpa, DESCRIPTOR_BYTES * self.size), Area(self.driver_event.gpa, EVENT_BYTES),
                     Area(self.device_event.gpa, EVENT_BYTES))

    @property
    def base(self) -> int:
        """Where a device that comes now has to begin, as SET_VRING_BASE carries it: for available
        descriptors in the low half, for used ones in the high half."""
        return self.off_wrap(self.next_used) * 0x10001

    # -------------------------------------------------------------------------------- driver -> device

    def write_chain(self, buffers: Sequence[Buffer], table: int | None, direct: int) -> list[int]:
        """Describe a chain and offer it: ``direct`` buffers in descriptors of the ring, or all of them in the
        ``table`` (gpa).

        -> its buffer id. Raises RingFull, taking nothing; ValueError for a chain of both kinds, which a
        packed ring does not have (2.8.19).
        """
        if table is not None and direct:
            raise ValueError("a chain of a packed ring is either direct or in an indirect table")
        if (direct or 1) > self.room:
            raise RingFull(f"the chain needs {direct or 1} descriptors, {self.room} of {self.size} are free")
        ids = self._take_free(1)
        if table is None:
            self.offer([(buffer.gpa, buffer.len, flags)
                        for buffer, flags in zip(buffers, link(buffers), strict=True)], ids[0])
        else:
            entries = PackedDescriptors(self.memory, table)
            for i, buffer in enumerate(buffers):  # no flag but WRITE, 2.8.19
                entries[i].set(buffer.gpa, buffer.len, DESC_F_WRITE * buffer.writable)
            self.offer([(table, DESCRIPTOR_BYTES * len(buffers), DESC_F_INDIRECT)], ids[0])
        return ids

    def offer(self, descriptors: Sequence[tuple[int, int, int]], id: int) -> int:
        """Write a chain of (addr, len, flags) into the next slots, whatever it says -> its first slot.

        AVAIL and USED are added to the flags. The device sees it after :meth:`publish`. Raises RingFull.
        """
        if len(descriptors) > self.room:
            raise RingFull(f"the chain needs {len(descriptors)} descriptors, {self.room} of {self.size} are free")
        first = self.next_avail
        for at, (addr, len_, flags) in enumerate(descriptors, first):
            at %= 2 * self.size
            descriptor = self.desc[at % self.size]
            flags |= self.available_flags(at)
            descriptor.addr, descriptor.len, descriptor.id = addr, len_, id
            if self._held is None:  # that of the first descriptor comes last of all
                self._held = flags
            else:
                descriptor.flags = flags
        self._entries[id] = len(descriptors)
        self.room -= len(descriptors)
        self.next_avail = self._moved(first, len(descriptors))
        return first % self.size

    def publish(self) -> None:
        """Make everything offered visible: the flags of the first descriptor come after all else (2.8.21)."""
        if self._held is not None:
            self.desc[self._published % self.size].flags = self._held
            self._held = None
            self._kick_slots += (self.next_avail - self._published) % (2 * self.size)
            self._published = self.next_avail

    def kick_due(self) -> bool:
        """Does the device want to hear of what was published since the last question? (2.8.10, 2.8.21.3.1)

        Raises DeviceError for an event suppression structure that means nothing.
        """
        full_barrier()
        moved, self._kick_slots = self._kick_slots, 0
        both = self.device_event.both
        off_wrap, flags = both & 0xFFFF, both >> 16
        if flags == EVENT_DESC and self.event_idx:
            try:
                behind = (self._published - self.position(off_wrap)) % (2 * self.size)
            except ValueError as error:
                raise DeviceError(f"device_event.off_wrap is {off_wrap:#x}: {error}") from None
            return 1 <= behind <= moved or moved > self.size
        if flags not in (EVENT_ENABLE, EVENT_DISABLE):
            raise DeviceError(f"device_event.flags is {flags:#x}, which has no meaning here")
        return moved > 0 and flags == EVENT_ENABLE

    # -------------------------------------------------------------------------------- device -> driver

    def _used_at(self, position: int) -> tuple[int, int] | None:
        """The used descriptor at ``position`` -> (id, bytes written), or None if there is none yet.

        Raises DeviceError for flags that neither side may leave there, and for WRITE without a length.
        """
        descriptor = self.desc[position % self.size]
        flags = descriptor.flags
        turn = flags & (DESC_F_AVAIL | DESC_F_USED)
        outstanding = position != self._published
        if turn != self._used_flags(position):
            if outstanding and turn != self.available_flags(position):
                raise DeviceError(f"descriptor {position % self.size} has flags {flags:#06x}: "
                                  "neither as it was made available, nor used")
            return None
        if not outstanding:
            raise DeviceError(f"descriptor {position % self.size} was used before it was made available")
        # Without WRITE the length is reserved, and ignored by drivers (2.8.4): DPDK leaves that of the buffer there.
        written = descriptor.len if flags & DESC_F_WRITE else 0
        if flags & DESC_F_WRITE and not written:
            raise DeviceError(f"the used descriptor {position % self.size} has WRITE set, and says that nothing was "
                              "written")
        if descriptor.id not in self._entries:
            raise DeviceError(f"the used descriptor {position % self.size} names buffer id {descriptor.id}, "
                              "which is not outstanding")
        return descriptor.id, written

    def _waiting(self, most: int) -> tuple[int, int]:
        """Used chains that wait to be taken, no more than ``most`` -> how many, and the position after them."""
        position, entry, count = self.next_used, self._batch, 0
        seen: set[int] = set()
        in_turn = iter(self._entries.items())
        while count < min(most, len(self._entries)):
            entry = entry or self._used_at(position)
            if entry is None:
                break
            if self.in_order:  # all up to the one it names
                id, slots = next(in_turn)
            else:
                id, slots = entry[0], self._entries[entry[0]]
            if id in seen:
                raise DeviceError(f"buffer id {id} was used twice")
            seen.add(id)
            position = self._moved(position, slots)
            count += 1
            if id == entry[0]:
                entry = None
        return count, position

    def pending(self) -> int:
        """How many used chains wait to be taken. Raises DeviceError for used descriptors that cannot be."""
        return self._waiting(self.size)[0]

    def next_completion(self) -> tuple[int, int | None] | None:
        """Take the next used chain -> (buffer id, bytes written), or None. (2.8.22)

        Written is None for a chain that went by in a batch: it counts as completely used. Raises DeviceError
        for a used descriptor that cannot be.
        """
        entry = self._batch or self._used_at(self.next_used)
        if entry is None:
            return None
        id, written = self._next_in_turn(entry)
        slots = self._entries.pop(id)
        self.next_used = self._moved(self.next_used, slots)
        self.room += slots
        return id, written

    def want_calls(self, after: int = 1) -> bool:
        """Ask for a notification once ``after`` more chains are used (EVENT_IDX; 1 otherwise).

        -> True when that many are there already: no notification may come for those. (2.8.10)
        Out of order the slots they will take are not known: then the notification may come too early, and
        one has to ask again.
        """
        if self.event_idx:
            count, position = self._waiting(after)
            slots = self._entries.values()
            before = islice(slots, count, after - 1) if self.in_order else nsmallest(after - 1 - count, slots)
            self.driver_event.set(self.off_wrap(self._moved(position, sum(before))), EVENT_DESC)
        else:
            self.driver_event.flags = EVENT_ENABLE
        full_barrier()
        return self._waiting(after)[0] >= after

    def refuse_calls(self) -> None:
        """Ask for no notification."""
        self.driver_event.flags = EVENT_DISABLE
