"""The split virtqueue, device side (virtio 1.2, 2.7 "Split Virtqueues").

Three parts in guest memory, each written by one side only (numbers are bytes)::

    descriptor table   driver   size x {addr: 8, len: 4, flags: 2, next: 2}                      2.7.5
    available ring     driver   flags: 2, idx: 2, ring[size]: 2 each, used_event: 2              2.7.6
    used ring          device   flags: 2, idx: 2, ring[size]: {id: 4, len: 4}, avail_event: 2    2.7.8

The driver describes a chain in the table, enters the index of its first descriptor, its head, into the
available ring and moves the available index on. The device follows the chain, enters the same head into the
used ring and moves the used index on. Two chains, of which the device has used one::

    available ring   idx 2   ring [ 2 | 0 |   |   ]        descriptor table
                                    |   '---------------->  0  {addr, len}
                                    |                       1
                                    '-------------------->  2  {addr, len, NEXT, next 3}
    used ring        idx 1   ring [ 2 |   |   |   ]         3  {addr, len, WRITE}

An index only counts up, modulo 65536 (2.7.6.1); its entry is found modulo the queue size.
"""

from collections.abc import Sequence
from struct import Struct
from typing import NamedTuple

from ring.reference.chain import DESCRIPTOR_BYTES, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, Chain
from ring.reference.memory import Memory
from ring.reference.queue import QUEUE_SIZE_MAX, Queue, QueueState
from ring.reference.rules import CallReason, ChainError, Rule, SetupError

AVAIL_F_NO_INTERRUPT = 1  # 2.7.6
USED_F_NO_NOTIFY = 1  # 2.7.8

INDEX_MODULO = 1 << 16  # an index has 16 bits

# Offsets that available and used ring have in common.
FLAGS = 0
IDX = 2
ENTRIES = 4

_DESCRIPTOR = Struct("<QIHH")


class Descriptor(NamedTuple):
    """struct virtq_desc (2.7.5)."""

    addr: int
    len: int
    flags: int
    next: int

    @classmethod
    def unpack(cls, raw: bytes) -> "Descriptor":
        """From its 16 bytes."""
        return cls(*_DESCRIPTOR.unpack(raw))


class SplitQueue(Queue):
    """The device's side of a split virtqueue in ``memory``; see Queue. base: the next available index."""

    def __init__(self, memory: Memory, *, size: int, desc: int, avail: int, used: int, features: int = 0,
                 base: int = 0) -> None:
        super().__init__(memory, size, features)
        if not 1 <= size <= QUEUE_SIZE_MAX or size.bit_count() != 1:  # a power of two (2.7)
            raise SetupError(Rule.QUEUE_SIZE)
        self.desc, self.avail, self.used = self._place([
            (desc, DESCRIPTOR_BYTES * size, 16),
            (avail, ENTRIES + 2 * size + 2, 2),
            (used, ENTRIES + 8 * size + 2, 4),
        ])
        self.next_avail = self.known = base % INDEX_MODULO
        # A predecessor that died may have published more than the front-end knows. This is the only time
        # that the device reads what is its own to write.
        self.next_used = self.published = self._decided = memory.load(self.used + IDX, 2)
        self._walking: _Walk | None = None

    # --------------------------------------------------- where everything is (2.7.6, 2.7.8), as gpas

    def avail_entry_at(self, index: int) -> int:
        """The entry of the available ring for ``index``, which counts on past the size."""
        return self.avail + ENTRIES + 2 * (index % self.size)

    def used_event_at(self) -> int:
        """Behind the entries of the available ring, for the driver is to write it."""
        return self.avail + ENTRIES + 2 * self.size

    def used_entry_at(self, index: int) -> int:
        """The entry of the used ring for ``index``, which counts on past the size."""
        return self.used + ENTRIES + 8 * (index % self.size)

    def avail_event_at(self) -> int:
        """Behind the entries of the used ring, for the device is to write it."""
        return self.used + ENTRIES + 8 * self.size

    # ------------------------------------------------------------------------------- driver to device

    def see(self) -> int:
        """Read the available index -> chains that wait. Raises RingBroken: AVAIL_AHEAD.

        The driver moves it on after it has written all that it covers (2.7.13.3).
        """
        self._check_running()
        index = self.memory.load(self.avail + IDX, 2)
        waiting = (index - self.next_avail) % INDEX_MODULO
        if waiting > self.size:  # each chain has a descriptor at least: there cannot be so many
            raise self._stop(Rule.AVAIL_AHEAD, index)
        self.known = index
        return waiting

    def take(self) -> Chain | None:
        """Read the next entry of the available ring, the head of a chain (2.7.6).

        Raises RingBroken: HEAD_RANGE.
        """
        self._check_running()
        if self.next_avail == self.known:
            return None
        head = self.memory.load(self.avail_entry_at(self.next_avail), 2)
        if head >= self.size:
            raise self._stop(Rule.HEAD_RANGE, head)
        self.next_avail = (self.next_avail + 1) % INDEX_MODULO
        chain = Chain(self.memory, head, slots=1)
        self._taken.append(chain)
        self._walking = _Walk(chain, next=head, steps_left=self.size)
        return chain

    def walk(self) -> bool:
        """Read the next descriptor of the chain (2.7.5) -> does the chain go on?

        Raises ChainError: LOOP, NEXT_RANGE, and all that Chain and _enter_table find.
        """
        self._check_running()
        walk = self._walking
        chain, at = walk.chain, walk.next
        # The table is the longest that a chain can be (2.7.5); one descriptor more means a loop (2.7.5.2).
        if walk.steps_left == 0:
            raise chain.refuse(Rule.LOOP, at)
        walk.steps_left -= 1
        descriptor = self._read_descriptor(walk)
        chain.descriptors += 1
        if descriptor.flags & DESC_F_INDIRECT:
            self._enter_table(walk, descriptor)
            return True
        chain.add_buffer(self.regions, descriptor.addr, descriptor.len, bool(descriptor.flags & DESC_F_WRITE), at)
        if not descriptor.flags & DESC_F_NEXT:
            return False
        if descriptor.next >= (self.size if walk.table is None else len(walk.table)):
            raise chain.refuse(Rule.NEXT_RANGE, at)
        walk.next = descriptor.next
        return True

    def _read_descriptor(self, walk: "_Walk") -> Descriptor:
        """From the indirect table, once the walk is in one; otherwise from the ring's own."""
        raw = self.descriptor_bytes(walk.next) if walk.table is None else walk.table[walk.next]
        return Descriptor.unpack(raw)

    def _enter_table(self, walk: "_Walk", descriptor: Descriptor) -> None:
        """Go on in an indirect table, at its first entry (2.7.5.3). It ends the chain: there is no way back.

        The device MUST ignore WRITE in the descriptor that names the table (2.7.5.3.2).
        """
        chain, at = walk.chain, walk.next
        if not self.indirect:
            raise chain.refuse(Rule.INDIRECT_OFF, at)
        if walk.table is not None:
            raise chain.refuse(Rule.INDIRECT_NESTED, at)
        if descriptor.flags & DESC_F_NEXT:
            raise chain.refuse(Rule.INDIRECT_NEXT, at)
        walk.table = chain.read_table(self.regions, descriptor.addr, descriptor.len, self.table_limit, at)
        walk.next = 0
        walk.steps_left = len(walk.table)

    def _step_back(self, chain: Chain) -> None:
        self.next_avail = (self.next_avail - 1) % INDEX_MODULO

    # ------------------------------------------------------------------------------- device to driver

    def push(self, chain: Chain | ChainError, written: int = 0) -> None:
        """Fill in the next entry of the used ring (2.7.8)."""
        self._check_running()
        self._write_used(chain.head, written)
        self.next_used = (self.next_used + 1) % INDEX_MODULO

    def push_batch(self, chains: Sequence[Chain | ChainError]) -> None:
        """One entry with the last chain's head, where the first one's would be; skip the rest (2.7.9)."""
        self._check_running()
        self._write_used(chains[-1].head, 0)
        self.next_used = (self.next_used + len(chains)) % INDEX_MODULO

    def _write_used(self, head: int, written: int) -> None:
        entry = self.used_entry_at(self.next_used)
        self.memory.store(entry, 4, head)
        self.memory.store(entry + 4, 4, written)

    def publish(self) -> None:
        """Move the used index on: entries before it are the driver's. It comes last (2.7.8.2)."""
        self._check_running()
        if self.published != self.next_used:
            self.memory.store(self.used + IDX, 2, self.next_used)
            self.published = self.next_used

    # ---------------------------------------------------------------- notifications (2.7.7 and 2.7.10)

    def decide(self) -> CallReason:
        """Look at what the driver wants to hear of: with EVENT_IDX an index, otherwise a flag (2.7.7.2)."""
        self._check_running()
        before, now = self._decided, self.published
        if before == now:
            return CallReason.NOTHING_NEW
        self._decided = now
        if not self.event_idx:
            flags = self.memory.load(self.avail + FLAGS, 2)
            return CallReason.FLAG_SUPPRESSED if flags & AVAIL_F_NO_INTERRUPT else CallReason.FLAG_WANTS
        if self._first_decision:
            self._first_decision = False
            return CallReason.FIRST
        event = self.memory.load(self.used_event_at(), 2)
        return CallReason.EVENT_REACHED if index_passed(event, before, now) else CallReason.EVENT_AHEAD

    def arm(self) -> int:
        """Ask for a kick: with EVENT_IDX, when the entry after the last one known is filled in (2.7.10.2).

        Not after the last one taken: the driver has kicked for all those known, and will not kick again when
        some of them are given back.
        """
        self._check_running()
        if self.event_idx:
            self.memory.store(self.avail_event_at(), 2, self.known)
        else:
            self.memory.store(self.used + FLAGS, 2, 0)
        self.kicks_wanted = True
        known = self.known
        self.see()
        return (self.known - known) % INDEX_MODULO

    def disarm(self) -> None:
        """Set the flag. With EVENT_IDX it stays 0 (2.7.10.2): an index left behind keeps the driver quiet."""
        self._check_running()
        if not self.event_idx and self.kicks_wanted:
            self.memory.store(self.used + FLAGS, 2, USED_F_NO_NOTIFY)
        self.kicks_wanted = False

    # ------------------------------------------------------------------------------------- from outside

    @property
    def base(self) -> int:
        """The available index to go on from."""
        return self.next_avail

    @property
    def state(self) -> QueueState:
        """The indices, and the rule if one broke the ring."""
        return QueueState(False, self.size, self.next_avail, False, self.known, False, self.next_used, False,
                          self.published, self.kicks_wanted, self.broken)


class _Walk:
    """Where the device stands in a chain. table: the entries of the indirect table it is in."""

    def __init__(self, chain: Chain, next: int, steps_left: int) -> None:
        self.chain = chain
        self.next = next
        self.steps_left = steps_left
        self.table: list[bytes] | None = None


def index_passed(event: int, before: int, now: int) -> bool:
    """Was entry ``event`` filled in when an index moved from ``before`` to ``now``? (2.7.7.2)

    That is: before <= event < now, for numbers that start again at 0 after 65535.
    """
    return (event - before) % INDEX_MODULO < (now - before) % INDEX_MODULO
