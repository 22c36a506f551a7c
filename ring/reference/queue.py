"""What a virtqueue is to the device in either format: verbs, and the state they change.

A life of a chain::

    queue.see()            is anything available?
    chain = queue.take()   the next chain, of which nothing is known yet
    queue.walk()           one more of its descriptors is read, until there are none left
    chain.read() ...       the device does its work
    queue.push(chain, n)   a used entry is written, which the driver does not see yet
    queue.publish()        now it does
    queue.decide()         must the driver be notified?

``pop`` is see, take and all of walk at once. When nothing is available, ``arm`` asks for a kick when something
comes, and ``disarm`` says that none is needed. ``unpop`` gives back what was taken and not used.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from ring.reference.chain import DESCRIPTOR_BYTES, TABLE_ENTRIES_MIN_LIMIT, Chain
from ring.reference.memory import Memory, find_ring_part
from ring.reference.rules import CallReason, ChainError, RingBroken, Rule, SetupError

QUEUE_SIZE_MAX = 32768  # 2.7, 2.8

INDIRECT_DESC = 28  # feature bits (section 6)
EVENT_IDX = 29


@dataclass(frozen=True)
class QueueState:
    """The ring as the device sees it. Split: indices modulo 65536. Packed: slots, each with its wrap counter.

    next_avail: where the next chain is taken. known: how far the driver is known to have come. next_used:
    where the next used entry is written. published: as next_used, for what the driver can see.
    """

    packed: bool
    size: int
    next_avail: int
    avail_wrap: bool
    known: int
    known_wrap: bool
    next_used: int
    used_wrap: bool
    published: int
    kicks_wanted: bool
    broken: RingBroken | None


class Queue(ABC):
    """What both formats share.

    size: entries. desc, avail, used: uva of the three parts. features: negotiated feature bits. Every verb
    but conclude raises RingBroken on a ring that has lost its meaning; the constructor raises SetupError.
    """

    desc: int  # gpa of the descriptor table or ring

    def __init__(self, memory: Memory, size: int, features: int) -> None:
        self.memory = memory
        self.regions = list(memory.regions)
        self.size = size
        self.indirect = bool(features >> INDIRECT_DESC & 1)
        self.event_idx = bool(features >> EVENT_IDX & 1)
        self.table_limit = max(size, TABLE_ENTRIES_MIN_LIMIT)
        self.kicks_wanted = True  # a ring that is all zeros asks for them
        self.broken: RingBroken | None = None
        self._first_decision = True
        self._taken: deque[Chain] = deque(maxlen=size)  # for unpop

    def _place(self, parts: Sequence[tuple[int, int, int]]) -> list[int]:
        """Where the parts of the ring are, given as (uva, bytes, alignment) -> their gpas."""
        if any(uva % alignment for uva, _, alignment in parts):
            raise SetupError(Rule.RING_ALIGNMENT)
        places = [find_ring_part(self.regions, uva, length) for uva, length, _ in parts]
        if None in places:
            raise SetupError(Rule.RING_UNMAPPED)
        return places

    def _stop(self, rule: Rule, at: int) -> RingBroken:
        """The ring has lost its meaning; raise what this answers."""
        self.broken = RingBroken(rule, at)
        return self.broken

    def _check_running(self) -> None:
        if self.broken:
            raise self.broken

    def descriptor_at(self, index: int) -> int:
        """The gpa of a descriptor of the ring."""
        return self.desc + DESCRIPTOR_BYTES * index

    def descriptor_bytes(self, index: int) -> bytes:
        """That descriptor, as it is now."""
        return self.memory.read(self.descriptor_at(index), DESCRIPTOR_BYTES)

    @abstractmethod
    def see(self) -> int:
        """Look whether chains are available -> how many, as far as one look tells; 0: none."""

    @abstractmethod
    def take(self) -> Chain | None:
        """Take the next chain, without any of its descriptors; None if there is none that was seen."""

    @abstractmethod
    def walk(self) -> bool:
        """Read the next descriptor of the chain taken last -> does the chain go on? Raises ChainError."""

    def pop(self) -> Chain | None:
        """Take the next chain and walk it to its end; None if there is none. Raises ChainError."""
        chain = self.take()
        if chain is None and self.see():
            chain = self.take()
        if chain is not None:
            while self.walk():
                pass
        return chain

    def unpop(self, count: int = 1) -> None:
        """Give the ``count`` (at most size) most recently taken chains back, unused, to be taken again."""
        self._check_running()
        for _ in range(count):
            self._step_back(self._taken.pop())

    @abstractmethod
    def _step_back(self, chain: Chain) -> None:
        """Stand where ``chain``, the last one taken, began."""

    @abstractmethod
    def push(self, chain: Chain | ChainError, written: int = 0) -> None:
        """Write a used entry for ``chain``, into which ``written`` bytes went. It is not visible yet."""

    @abstractmethod
    def push_batch(self, chains: Sequence[Chain | ChainError]) -> None:
        """Write one used entry for several chains, in the order taken; each counts as completely used.

        Only with VIRTIO_F_IN_ORDER.
        """

    @abstractmethod
    def publish(self) -> None:
        """Show the driver everything pushed."""

    @abstractmethod
    def decide(self) -> CallReason:
        """Must the driver be notified of what was published since the last decision?"""

    @abstractmethod
    def arm(self) -> int:
        """Ask for a kick when more comes than is known, and look once more -> chains that came meanwhile."""

    @abstractmethod
    def disarm(self) -> None:
        """Tell the driver that kicks are not needed."""

    def conclude(self, chains: Sequence[Chain | ChainError] = ()) -> CallReason:
        """The ring broke: what was used before is shown to the driver all the same, with one entry for ``chains`` (as
        push_batch), if there are any. The one verb that a broken ring obeys."""
        broken, self.broken = self.broken, None
        if chains:
            self.push_batch(chains)
        self.publish()
        reason = self.decide()
        self.broken = broken
        return reason

    @property
    @abstractmethod
    def base(self) -> int:
        """Where a successor goes on: what GET_VRING_BASE answers."""

    @property
    @abstractmethod
    def state(self) -> QueueState:
        """All of it, for whoever watches."""
