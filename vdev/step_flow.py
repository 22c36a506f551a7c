"""What both directions of a stepped lane share: the phases, the verbs of a virtqueue as phases, making used entries
visible, counting, and what follows when a ring or its memory is lost. See vdev/step.py for the theory.

Counterpart in C: ring/plane/flow.h, ring/plane/lane.h, ring/plane/serve.c.
"""

import contextlib
import errno
import os
import select
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar

from ring.build import lib
from ring.errors import ChainError, MemoryGone, RingBroken
from ring.pump import DROP_REASONS, Flow, FlowStats, LaneConfig, LaneEvent
from ring.virtqueue import CallReason, Chain, VirtQueue
from vhost_user.fds import ready, signal

NET_HEADER: int = lib.NET_HEADER
ETHERNET_HEADER: int = lib.ETHERNET_HEADER
BURST_FRAMES: int = lib.BURST_FRAMES
BURSTS: int = lib.BURSTS


class Phase(StrEnum):
    """What has just happened. In this order, as far as it happens at all, for one frame of either direction."""

    KICK_SEEN = "kick seen"
    KICKS_REFUSED = "kicks refused"
    AVAILABLE_READ = "available index read"  # count: chains that wait
    FLAGS_READ = "descriptor flags read"  # packed instead; descriptor: the slot, count: 1 if available
    HEAD_TAKEN = "head taken"  # descriptor: where the chain begins
    DESCRIPTOR_READ = "descriptor read"  # descriptor, length, writable
    CHAIN_REFUSED = "chain refused"  # reason: the rule
    BYTES_READ = "bytes read"  # length; out of the guest's buffers
    PORT_READ = "port read"  # length; reason: why nothing came
    PORT_WRITE = "port write"  # length; reason: why it took nothing
    BYTES_WRITTEN = "bytes written"  # length; into the guest's buffers
    FRAME_DROPPED = "frame dropped"  # reason: one of DROP_REASONS
    FRAME_HELD = "frame held"  # length
    GIVEN_BACK = "chains given back"  # count
    USED_WRITTEN = "used element written"  # head, length, count: chains it completes
    PUBLISHED = "published"
    DECIDED = "interrupt decision"  # reason: the CallReason
    CALLED = "call"
    KICKS_ASKED = "kicks asked for"  # count: chains that came meanwhile
    RING_BROKEN = "ring broken"  # reason: the rule
    PORT_GONE = "port gone"


@dataclass(frozen=True)
class Step:
    """One phase, done. direction: "from_guest" or "to_guest". head: the chain, as its used entry names it.
    descriptor: an index in the ring's table, or, with in_table, in an indirect one (packed, in the ring: a slot).
    length: bytes, headers not counted in at the port. What a phase does not know is None."""

    direction: str
    phase: Phase
    head: int | None = None
    descriptor: int | None = None
    in_table: bool = False
    writable: bool | None = None
    count: int | None = None
    length: int | None = None
    reason: str | CallReason | None = None


@dataclass
class Shared:
    """What the directions of one lane share. leaving: somebody wants the lane: end with the chain in hand."""

    config: LaneConfig = field(default_factory=LaneConfig)
    events: LaneEvent = LaneEvent(0)
    port_gone: bool = False
    memory_gone: bool = False
    leaving: bool = False


@dataclass
class Counts:
    """One direction's counters, as struct flow_stats in ring/plane/pump.h."""

    frames: int = 0
    bytes: int = 0
    gso_frames: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    bad_chains: int = 0
    kicks: int = 0
    calls: int = 0
    calls_saved: int = 0
    bursts: int = 0

    def stats(self) -> FlowStats:
        """A copy that stays as it is."""
        dropped = {reason: self.dropped[reason] for reason in DROP_REASONS if self.dropped[reason]}
        return FlowStats(**vars(self) | {"dropped": dropped})


_PORT_IS_DEAD = {errno.EBADFD, errno.EBADF, errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.ECONNREFUSED,
                 errno.ENODEV, errno.ENXIO}


def port_is_dead(error: OSError) -> bool:
    """Is this the end of the port, rather than of one frame?"""
    return error.errno in _PORT_IS_DEAD


def drain(fd: int) -> None:
    """Forget kicks that were signalled so far: whoever attaches looks at the rings anyway."""
    if ready(fd, select.POLLIN):
        with contextlib.suppress(OSError):
            os.read(fd, 8)


class Direction(ABC):
    """One direction of a lane. ``due``: there may be something to do. Generators here do one phase, then yield it."""

    name: ClassVar[str]
    broken_event: ClassVar[LaneEvent]

    def __init__(self, lane: Shared):
        self.lane = lane
        self.counts = Counts()
        self.due = False
        self.call_owed = False  # the call descriptor of a running queue changed: signal it once
        self._pushed = False  # used entries wait to be published
        self._batch: list[Chain | ChainError] = []  # with VIRTIO_F_IN_ORDER: one used entry will complete them

    @property
    def flow(self) -> Flow:
        """Its half of the lane's configuration."""
        return getattr(self.lane.config, self.name)

    @property
    def queue(self) -> VirtQueue:
        """Its virtqueue, which is started."""
        return self.flow.queue

    def step(self, phase: Phase, **data: object) -> Step:
        """One phase of this direction."""
        return Step(self.name, phase, **data)

    # --------------------------------------------------------------------------------- a turn, fenced

    def serves(self) -> bool:
        """Is there a queue, and may it be touched?"""
        queue = self.flow.queue
        return queue is not None and queue.state.broken is None and not self.lane.memory_gone

    def serve(self) -> Iterator[Step]:
        """One turn: until nothing is left to do or the budget is used up (then it stays due)."""
        if not self.serves():
            self.due = False
            return
        self.counts.bursts += 1
        try:
            try:
                yield from self._turn()
            except MemoryGone:
                raise
            except RingBroken as broken:
                yield from self._ring_broke(broken)
        except MemoryGone as gone:
            self.due = False
            self.lane.memory_gone = True
            self.lane.events |= LaneEvent.LOG_GONE if gone.code == "RING_E_LOG_GONE" else LaneEvent.MEMORY_GONE
            self.queue.fail(gone)
            yield self.step(Phase.RING_BROKEN, reason=gone.code)

    @abstractmethod
    def _turn(self) -> Iterator[Step]:
        """Some bursts."""

    def _ring_broke(self, broken: RingBroken) -> Iterator[Step]:
        """What was used before stays used; nothing else is taken from this ring."""
        self.due = False
        batch, self._batch = self._batch, []
        if batch or self._pushed:
            self._pushed = False
            reason = self.queue.conclude(batch)
            if batch:
                yield self._used(batch[-1].head, len(batch), 0)
            yield self.step(Phase.PUBLISHED)
            yield from self._call(reason)
        self.lane.events |= self.broken_event
        if self.flow.err >= 0:
            signal(self.flow.err)
        yield self.step(Phase.RING_BROKEN, reason=broken.code)

    # ------------------------------------------------------------------------- the driver's half

    def _disarm(self) -> Iterator[Step]:
        wanted = self.queue.state.kicks_wanted
        self.queue.disarm()
        if wanted:
            yield self.step(Phase.KICKS_REFUSED)

    def _arm(self) -> Generator[Step, None, bool]:
        """Ask for kicks -> did more come meanwhile? Then they are refused again."""
        more = self.queue.arm()
        yield self.step(Phase.KICKS_ASKED, count=more)
        if more:
            yield from self._disarm()
        return more > 0

    def _pop(self, pieces: int) -> Generator[Step, None, Chain | None]:
        """Take the next chain, in at most so many pieces of memory -> the chain, or None. Raises ChainError."""
        queue, state = self.queue, self.queue.state
        if state.packed:
            yield self.step(Phase.FLAGS_READ, descriptor=state.next_avail, count=queue.see())
        elif state.known == state.next_avail:  # none is left of those seen in an earlier look
            yield self.step(Phase.AVAILABLE_READ, count=queue.see())
        chain = queue.take()
        if chain is None:
            return None
        if state.packed:  # the last descriptor has its name
            yield self.step(Phase.HEAD_TAKEN, descriptor=state.next_avail)
        else:
            yield self.step(Phase.HEAD_TAKEN, head=chain.head, descriptor=chain.head)
        goes_on = True
        while goes_on:
            if self.lane.leaving:
                queue.unpop()
                return queue.pop(pieces)  # no time for one descriptor after the other
            descriptor, in_table = queue.walk_at
            readable, writable = chain.readable_len, chain.writable_len
            goes_on = queue.walk(pieces)
            length = chain.readable_len + chain.writable_len - readable - writable
            yield self.step(Phase.DESCRIPTOR_READ, descriptor=descriptor, in_table=in_table, length=length,
                            writable=chain.writable_len > writable)
        return chain

    def _give_back(self, chains: int) -> Iterator[Step]:
        if chains:
            self.queue.unpop(chains)
            yield self.step(Phase.GIVEN_BACK, count=chains)

    # ------------------------------------------------------------------------- the device's half

    def _used(self, head: int, chains: int, length: int) -> Step:
        return self.step(Phase.USED_WRITTEN, head=head, count=chains, length=length)

    def _push(self, chain: Chain | ChainError, written: int = 0) -> Iterator[Step]:
        self.queue.push(chain, written)
        self._pushed = True
        yield self._used(chain.head, 1, written)

    def _push_batch(self) -> Iterator[Step]:
        """One used entry for the whole batch, if there is one (2.7.9, 2.8.8)."""
        batch, self._batch = self._batch, []
        if batch:
            self.queue.push_batch(batch)
            self._pushed = True
            yield self._used(batch[-1].head, len(batch), 0)

    def _publish(self) -> Iterator[Step]:
        """Make what was pushed visible, and notify the driver if it asked for that."""
        if not self._pushed:
            return
        self._pushed = False
        self.queue.publish()
        yield self.step(Phase.PUBLISHED)
        yield from self._call(self.queue.decide())

    def _call(self, reason: CallReason) -> Iterator[Step]:
        yield self.step(Phase.DECIDED, reason=reason)
        if not reason.due:
            self.counts.calls_saved += 1
        elif self.flow.call >= 0:
            yield self.call()

    def call(self) -> Step:
        """Notify the driver; there is a descriptor for it."""
        signal(self.flow.call)
        self.counts.calls += 1
        return self.step(Phase.CALLED)

    # ------------------------------------------------------------------------------------- losses

    def _drop(self, reason: str) -> Step:
        self.counts.dropped[reason] += 1
        return self.step(Phase.FRAME_DROPPED, reason=reason)

    def _refuse(self, chain: Chain | ChainError) -> Step:
        """A chain that breaks a rule of the ring, or of this direction."""
        self.counts.bad_chains += 1
        if isinstance(chain, ChainError):
            return self.step(Phase.CHAIN_REFUSED, head=chain.head, descriptor=chain.at, reason=chain.code)
        return self.step(Phase.CHAIN_REFUSED, head=chain.head, reason="not for this direction, or too short")

    def port_lost(self) -> Step:
        """Nothing more comes from the port, nor goes to it."""
        self.lane.port_gone = True
        self.lane.events |= LaneEvent.PORT_GONE
        return self.step(Phase.PORT_GONE)
