"""The packed virtqueue, device side (virtio 1.2, 2.8 "Packed Virtqueues").

One ring that both sides write, and two small structures, each written by one side (numbers are bytes)::

    descriptor ring            both     size x {addr: 8, len: 4, id: 2, flags: 2}    2.8.13
    driver event suppression   driver   {desc: 2, flags: 2}                          2.8.14
    device event suppression   device   {desc: 2, flags: 2}                          2.8.14

Both sides go round the ring. The driver turns descriptors available; the device, once it has used a chain,
writes one used descriptor over them, at the place where it stands itself, and steps on by as many slots as
the chain had in the ring (2.8.6). Two chains of two descriptors, of which the device has used one::

    slot    0           1             2             3             4
            used,       left from     available,    available,    nothing yet
            id 7        chain 7       NEXT          id 3
                                      ^                           ^
                                      next_used                   next_avail, when both are taken

What one sees in a slot depends on the round: each side counts its rounds in one bit, the wrap counter, 1 at
first (2.8.1). With the counter of its own round,

    a descriptor is available   when its AVAIL flag equals the counter and its USED flag does not,
    a descriptor is used        when both equal it.

So nothing has to be cleared, and one write of flags hands a descriptor over::

    round        1st         2nd         3rd ...
    counter      1           0           1
    available    AVAIL       USED        AVAIL         (set; the other is clear)
    used         AVAIL USED  neither     AVAIL USED
"""

from collections.abc import Sequence
from dataclasses import dataclass
from struct import Struct
from typing import NamedTuple

from ring.reference.chain import DESCRIPTOR_BYTES, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, Chain
from ring.reference.memory import Memory
from ring.reference.queue import QUEUE_SIZE_MAX, Queue, QueueState
from ring.reference.rules import CallReason, ChainError, Rule, SetupError

DESC_F_AVAIL = 1 << 7  # 2.8.1
DESC_F_USED = 1 << 15

RING_EVENT_FLAGS_ENABLE = 0  # 2.8.10
RING_EVENT_FLAGS_DISABLE = 1
RING_EVENT_FLAGS_DESC = 2
RING_EVENT_FLAGS_MASK = 3  # the other bits of the field are reserved (2.8.14)

# Offsets in a descriptor (2.8.13) and in an event suppression structure (2.8.14).
DESC_LEN = 8
DESC_ID = 12
DESC_FLAGS = 14
EVENT_DESC = 0
EVENT_FLAGS = 2

_DESCRIPTOR = Struct("<QIHH")


class Descriptor(NamedTuple):
    """struct pvirtq_desc (2.8.13)."""

    addr: int
    len: int
    id: int
    flags: int

    @classmethod
    def unpack(cls, raw: bytes) -> "Descriptor":
        """From its 16 bytes."""
        return cls(*_DESCRIPTOR.unpack(raw))


@dataclass(frozen=True)
class Place:
    """Where one stands in the ring: a slot, and the wrap counter of the round (2.8.1).

    The specification speaks of one counter on each side. A device that has taken chains and not yet used them
    stands in two places, next_avail and next_used, and each has the counter of its own round.
    """

    slot: int
    wrap: bool

    def moved(self, slots: int, size: int) -> "Place":
        """So many slots on (or back). Whenever the end of the ring is passed the counter flips (2.8.1)."""
        rounds, slot = divmod(self.slot + slots, size)
        return Place(slot, self.wrap ^ (rounds % 2 == 1))

    def slots_to(self, later: "Place", size: int) -> int:
        """So many slots further on is ``later``, which is another place: 1 to size.

        A driver that keeps the rules has no more than one round outstanding.
        """
        return (later.slot - self.slot) % size or size

    def pack(self) -> int:
        """As 16 bits, the counter on top: desc_event_off and desc_event_wrap (2.8.14); half of a base, too."""
        return self.slot | self.wrap << 15

    @classmethod
    def unpack(cls, bits: int) -> "Place":
        """The reverse of pack."""
        return cls(bits & 0x7FFF, bool(bits >> 15 & 1))


class PackedQueue(Queue):
    """The device's side of a packed virtqueue in ``memory``; see Queue.

    avail, used: uva of the driver's and of the device's event suppression structure. base: where to go on; a
    fresh ring is 0x80008000, slot 0 of the first round for both directions.
    """

    def __init__(self, memory: Memory, *, size: int, desc: int, avail: int, used: int, features: int = 0,
                 base: int = 0x80008000) -> None:
        super().__init__(memory, size, features)
        if not 1 <= size <= QUEUE_SIZE_MAX:  # any number, not only powers of two (2.8.10.1)
            raise SetupError(Rule.QUEUE_SIZE)
        self.desc, self.driver_event, self.device_event = self._place([
            (desc, DESCRIPTOR_BYTES * size, 16),
            (avail, 4, 4),
            (used, 4, 4),
        ])
        self.next_avail, self.next_used = self._unpack_base(base)
        self.known = self.next_avail
        self.published = self.next_used
        self._held_flags: int | None = None  # of the first used descriptor since the last publish
        self._undecided = 0  # slots published since the last decision
        self._walking: _Walk | None = None

    def _unpack_base(self, base: int) -> tuple[Place, Place]:
        """Next available place in the low half, next used place in the high half.

        A front-end that knows one position only sends the low half alone: it stands for both.
        """
        low, high = base & 0xFFFF, base >> 16
        avail, used = Place.unpack(low), Place.unpack(high or low)
        if avail.slot >= self.size or used.slot >= self.size:
            raise SetupError(Rule.BASE)
        return avail, used

    # ------------------------------------------------------------------------------- driver to device

    def see(self) -> int:
        """Test the flags of one descriptor, the next (2.8.2) -> 1 if a chain waits, otherwise 0.

        The driver writes the first descriptor's flags last, so the whole chain is there (2.8.6).
        """
        self._check_running()
        if self._is_available(self.next_avail):
            return 1
        self.known = self.next_avail
        return 0

    def _is_available(self, place: Place) -> bool:
        """Has the driver made the descriptor there available in this round? (2.8.1, 2.8.15)"""
        flags = self.memory.load(self.descriptor_at(place.slot) + DESC_FLAGS, 2)
        return bool(flags & DESC_F_AVAIL) == place.wrap and bool(flags & DESC_F_USED) != place.wrap

    def take(self) -> Chain | None:
        """Begin with the next chain. Its id and its slots come to light as it is walked."""
        if not self.see():
            return None
        chain = Chain(self.memory, head=0, slots=0)
        self._taken.append(chain)
        self._walking = _Walk(chain)
        return chain

    def walk(self) -> bool:
        """Read the next descriptor of the chain, the next in the ring (2.8.6) -> does the chain go on?

        Raises ChainError: what Chain and _enter_table find; RingBroken: ENDLESS.
        """
        self._check_running()
        walk = self._walking
        if walk.table is not None:
            return self._walk_table(walk)
        at = self.next_avail.slot
        descriptor = self._read_next(walk.chain, at)
        walk.chain.descriptors += 1
        try:
            if descriptor.flags & DESC_F_INDIRECT:
                self._enter_table(walk, descriptor, at)
                return True
            writable = bool(descriptor.flags & DESC_F_WRITE)
            walk.chain.add_buffer(self.regions, descriptor.addr, descriptor.len, writable, at)
        except ChainError as broken:
            self._skip_rest(walk.chain, descriptor, at)
            raise walk.chain.refuse(broken.code, at) from None  # now that id and slots are known
        return bool(descriptor.flags & DESC_F_NEXT)

    def _read_next(self, chain: Chain, at: int) -> Descriptor:
        """Read the descriptor at the next slot of the ring, and count it to the chain.

        The id of a chain is that in its last descriptor (2.8.6). A chain is no longer than the ring (2.8.17):
        one that is has no end, hence no id and no successor, and the ring is lost. ``at``: the slot to blame.
        """
        if chain.slots == self.size:
            raise self._stop(Rule.ENDLESS, at)
        descriptor = Descriptor.unpack(self.descriptor_bytes(self.next_avail.slot))
        self.next_avail = self.next_avail.moved(1, self.size)
        chain.slots += 1
        chain.head = descriptor.id
        return descriptor

    def _skip_rest(self, chain: Chain, descriptor: Descriptor, at: int) -> None:
        """Pass over the rest of a chain that broke a rule: to give it back, its id and slots are needed."""
        while descriptor.flags & DESC_F_NEXT:
            descriptor = self._read_next(chain, at)

    def _enter_table(self, walk: "_Walk", descriptor: Descriptor, at: int) -> None:
        """Go on in an indirect table (2.8.7). Unlike in a split ring, its descriptor stands alone (2.8.19).

        WRITE in the descriptor that names the table is ignored (2.8.7).
        """
        chain = walk.chain
        if not self.indirect:
            raise chain.refuse(Rule.INDIRECT_OFF, at)
        if descriptor.flags & DESC_F_NEXT or chain.slots > 1:
            raise chain.refuse(Rule.INDIRECT_NEXT, at)
        walk.table = chain.read_table(self.regions, descriptor.addr, descriptor.len, self.table_limit, at)

    def _walk_table(self, walk: "_Walk") -> bool:
        """Take over the next entry of the table, the one behind. Of its flags only WRITE counts (2.8.7)."""
        at, chain = walk.next, walk.chain
        entry = Descriptor.unpack(walk.table[at])
        chain.descriptors += 1
        chain.add_buffer(self.regions, entry.addr, entry.len, bool(entry.flags & DESC_F_WRITE), at)
        walk.next += 1
        return walk.next < len(walk.table)

    def _step_back(self, chain: Chain) -> None:
        self.next_avail = self.next_avail.moved(-chain.slots, self.size)

    # ------------------------------------------------------------------------------- device to driver

    def push(self, chain: Chain | ChainError, written: int = 0) -> None:
        """Write a used descriptor where the device stands, then skip the slots of the chain (2.8.6)."""
        self._check_running()
        self._write_used(chain.head, written)
        self.next_used = self.next_used.moved(chain.slots, self.size)

    def push_batch(self, chains: Sequence[Chain | ChainError]) -> None:
        """One used descriptor with the last chain's id, then skip the slots of all of them (2.8.8)."""
        self._check_running()
        self._write_used(chains[-1].head, 0)
        self.next_used = self.next_used.moved(sum(chain.slots for chain in chains), self.size)

    def _write_used(self, id: int, written: int) -> None:
        """WRITE says that something was written into the buffers (2.8.3), len how much (2.8.4).

        The first descriptor since the last publish is shown last, because the driver goes by it: it finds
        either nothing or everything. Buffers that belong to one request depend on that (2.8.9).
        """
        descriptor = self.descriptor_at(self.next_used.slot)
        flags = DESC_F_AVAIL | DESC_F_USED if self.next_used.wrap else 0
        if written:
            flags |= DESC_F_WRITE
        self.memory.store(descriptor + DESC_ID, 2, id)
        self.memory.store(descriptor + DESC_LEN, 4, written)
        if self._held_flags is None:
            self._held_flags = flags
        else:
            self.memory.store(descriptor + DESC_FLAGS, 2, flags)

    def publish(self) -> None:
        """Write the flags that were held back: all that was pushed is the driver's (2.8.9, 2.8.15)."""
        self._check_running()
        if self._held_flags is None:
            return
        self.memory.store(self.descriptor_at(self.published.slot) + DESC_FLAGS, 2, self._held_flags)
        self._held_flags = None
        self._undecided += self.published.slots_to(self.next_used, self.size)
        self.published = self.next_used

    # ---------------------------------------------------------------------- notifications (2.8.10)

    def decide(self) -> CallReason:
        """Look at what the driver wants to hear of: everything, nothing, or one place in the ring."""
        self._check_running()
        if not self._undecided:
            return CallReason.NOTHING_NEW
        moved, self._undecided = self._undecided, 0
        first, self._first_decision = self._first_decision, False
        wish = self.memory.load(self.driver_event + EVENT_FLAGS, 2) & RING_EVENT_FLAGS_MASK
        if wish == RING_EVENT_FLAGS_DISABLE:
            return CallReason.FLAG_SUPPRESSED
        if wish != RING_EVENT_FLAGS_DESC or not self.event_idx:  # a reserved wish does no harm as "everything"
            return CallReason.FLAG_WANTS
        if first:
            return CallReason.FIRST
        event = Place.unpack(self.memory.load(self.driver_event + EVENT_DESC, 2))
        reached = place_passed(event, moved, self.published, self.size)
        return CallReason.EVENT_REACHED if reached else CallReason.EVENT_AHEAD

    def arm(self) -> int:
        """Ask for a kick: with EVENT_IDX, when the place where nothing was found is filled (2.8.10).

        Not the next place to take from: the driver has kicked for all before that one, and will not kick
        again when some of them are given back.
        """
        self._check_running()
        if self.event_idx:
            self.memory.store(self.device_event + EVENT_DESC, 2, self.known.pack())
            self.memory.store(self.device_event + EVENT_FLAGS, 2, RING_EVENT_FLAGS_DESC)
        else:
            self.memory.store(self.device_event + EVENT_FLAGS, 2, RING_EVENT_FLAGS_ENABLE)
        self.kicks_wanted = True
        return int(self._is_available(self.known))

    def disarm(self) -> None:
        """Set the flags; with EVENT_IDX a place left behind keeps the driver quiet just as well."""
        self._check_running()
        if not self.event_idx and self.kicks_wanted:
            self.memory.store(self.device_event + EVENT_FLAGS, 2, RING_EVENT_FLAGS_DISABLE)
        self.kicks_wanted = False

    # ------------------------------------------------------------------------------------- from outside

    @property
    def base(self) -> int:
        """Next available place in the low half, next used place in the high half."""
        return self.next_avail.pack() | self.next_used.pack() << 16

    @property
    def state(self) -> QueueState:
        """The places, and the rule if one broke the ring."""
        return QueueState(
            True, self.size, self.next_avail.slot, self.next_avail.wrap, self.known.slot, self.known.wrap,
            self.next_used.slot, self.next_used.wrap, self.published.slot, self.kicks_wanted, self.broken)


class _Walk:
    """Where the device stands in a chain. table: the indirect table it is in; next: which entry follows."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self.table: list[bytes] | None = None
        self.next = 0


def place_passed(event: Place, moved: int, now: Place, size: int) -> bool:
    """Was ``event`` written or passed over with the last ``moved`` slots before ``now``? (2.8.10)

    ``event`` is in the round of ``now`` or, if the counters differ, in the one before.
    """
    if moved > size:  # more than a round: every place was passed
        return True
    slots_ago = now.slot - event.slot + (0 if event.wrap == now.wrap else size)
    return 1 <= slots_ago <= moved
