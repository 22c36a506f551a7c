"""The engine of one device: which ring lies where, and the pump that moves frames between rings and port.

Rules that make it safe (docs/architecture.md, "Threads"): memory, rings and descriptors change only inside
``with engine.paused():``; while it lasts no worker touches anything of this device, and other devices run
on. A change is three steps: build and check before the pause, swap inside, close and unmap after it.

Rings are numbered as on the wire: 2n is the receiveq of queue pair n (to_guest), 2n+1 its transmitq
(from_guest).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from ring.dirty import DirtyLog
from ring.errors import QueueBusy, RingError, SetupError, named
from ring.guestmem import GuestMemory
from ring.iotlb import Iotlb
from ring.journal import Journal
from ring.pump import Flow, FlowStats, Lane, LaneConfig, LaneEvent, Pump
from ring.virtqueue import Takeover, VirtQueue
from vdev.handover import Put, Take
from vdev.ports.base import Port

PATIENCE = 0.1  # seconds: a worker lets go after a burst


class EngineStuck(Exception):
    """A worker did not leave the device in time: its memory cannot be unmapped, the session must end."""


@dataclass(frozen=True)
class Marks:
    """What a ring marks in the dirty log: see VirtQueue.log."""

    log: DirtyLog
    buffers: bool
    used: int | None


@dataclass
class Ring:
    """One ring as the engine runs it. Descriptors stay the caller's; -1: none."""

    queue: VirtQueue | None = None  # started
    marks: Marks | None = None
    enabled: bool = False
    kick: int = -1
    call: int = -1
    err: int = -1


@dataclass(frozen=True)
class RingPart:
    """A ring as it is handed on: its position as SET_VRING_BASE carries it, if it runs; the rule it broke, if it did;
    its descriptors."""

    base: int | None
    broken: str | None
    kick: int
    call: int
    err: int


@dataclass(frozen=True)
class EnginePart:
    """An engine as it is handed on. held: by queue pair, the frame that waits for buffers of the guest; counters:
    (from_guest, to_guest) since the device was made; journal: its path and descriptor."""

    journal: tuple[str, int] | None
    rings: tuple[RingPart, ...]
    lost_while_away: tuple[int, ...]
    held: tuple[bytes, ...]
    counters: tuple[FlowStats, FlowStats]


def ring_name(index: int) -> str:
    """How a person knows ring ``index``: "receiveq 0" or "transmitq 0", with the pair's number."""
    return f"{'transmitq' if index % 2 else 'receiveq'} {index // 2}"


_abandoned: list[object] = []


def leave_to_worker(*things: object) -> None:
    """Keep what cannot be freed because a worker is stuck in it, so that it stays mapped for good."""
    _abandoned.extend(things)


class Engine:
    """Runs the rings of one device against its port. Made once a device, used by one session after the other.

    The worker is not started with it: what a thread may do is settled when it starts (vdev/sandbox.py).

    journal: where positions of the rings are written down for a successor; None: nowhere.
    """

    def __init__(self, port: Port, queue_pairs: int, journal: Journal | None = None):
        self.port = port
        self._journal = journal
        self.rings = [Ring() for _ in range(2 * queue_pairs)]
        self.features = 0
        self.mtu = 0
        self.watch_kicks = False
        self.lost_while_away = [0] * len(self.rings)  # chains a front-end completed while no back-end was there
        self.abandoned = 0  # how often a worker got stuck
        self.patience = PATIENCE  # seconds that a worker may take to let go
        self._depth = 0
        self._lanes = [Lane() for _ in range(queue_pairs)]
        self._attached: set[Lane] = set()
        self._carried: list[tuple[FlowStats, FlowStats]] = []  # of lanes that had to be abandoned
        self.report_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._pump: Pump | None = None

    def start_worker(self) -> None:
        """Start the worker now rather than with the first ring. Raises OSError when there can be no thread, RingError
        when memory that vanishes could not be survived."""
        if self._pump is None:
            self._pump = Pump(self.report_fd)

    # -------------------------------------------------------------------------- pausing

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No worker touches this device inside. Nests. Raises EngineStuck when a worker does not let go."""
        if self._depth == 0:
            for lane in list(self._attached):
                try:
                    self._pump.detach(lane, int(1000 * self.patience))
                except QueueBusy as busy:
                    self._abandon()
                    raise EngineStuck(f"a worker thread did not leave the device: {busy}") from None
                self._attached.discard(lane)
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._resume()

    def _resume(self) -> None:
        for pair, lane in enumerate(self._lanes):
            to_guest, from_guest = self.rings[2 * pair], self.rings[2 * pair + 1]
            ends = self.port.ends(pair)
            lane.configure(LaneConfig(
                from_guest=Flow(from_guest.queue, from_guest.enabled, from_guest.kick, from_guest.call,
                                from_guest.err),
                to_guest=Flow(to_guest.queue, to_guest.enabled, to_guest.kick, to_guest.call, to_guest.err),
                to_port=ends.to_port, from_port=ends.from_port, port_header=self.port.carries.header,
                mtu=self.mtu, watch_kicks=self.watch_kicks, features=self.features))
            if to_guest.queue or from_guest.queue:
                self.start_worker()
                self._pump.attach(lane)
                self._attached.add(lane)

    def _abandon(self) -> None:
        """Leave pump, lanes and rings to the stuck worker for good, and start with fresh ones."""
        self._carried.extend(lane.stats() for lane in self._lanes)
        leave_to_worker(self._pump, self._lanes, self.rings, self._journal)
        self.drop_journal()
        self.rings = [Ring() for _ in self.rings]
        self._lanes = [Lane() for _ in self._lanes]
        self._attached = set()
        self._pump = None
        self.abandoned += 1

    # ---------------------------------------------------------------------------- rings

    def build(self, memory: GuestMemory, *, size: int, desc: int, avail: int, used: int, base: int,
              features: int, iotlb: Iotlb | None = None) -> VirtQueue:
        """A queue for one of the rings (addresses are uva, with ``iotlb`` iova), not run yet. Raises SetupError."""
        return VirtQueue(memory, size=size, desc=desc, avail=avail, used=used, features=features, base=base,
                         iotlb=iotlb)

    def take_over(self, index: int, queue: VirtQueue, told: int) -> Takeover:
        """Have ``queue``, just built for ring ``index``, go on where a predecessor that died stood; ``told`` is what
        the front-end said last with SET_VRING_BASE. Raises RingBroken when that cannot be told, JournalError when it
        cannot be written down what this queue does."""
        if self._journal is None:
            return queue.take_over()
        return self._journal.take_over(index, queue, told)

    def forget(self, index: int) -> None:
        """The front-end has learnt where ring ``index`` stands, or the driver was reset."""
        if self._journal is not None:
            self._journal.forget(index)

    def drop_journal(self) -> None:
        """Write nothing down any more, and let no successor believe what was written."""
        if self._journal is not None:
            for index in range(len(self.rings)):
                self._journal.forget(index)
            self._journal = None

    def stop(self, index: int) -> int:
        """Stop ring ``index``, which runs -> its base."""
        ring = self.rings[index]
        with self.paused():
            queue, ring.queue, ring.marks = ring.queue, None, None
        base = queue.base
        queue.close()
        return base

    def run(self, index: int, queue: VirtQueue) -> None:
        """Run ``queue`` as ring ``index``. Call it paused."""
        self.rings[index].queue, self.rings[index].marks = queue, None

    def mark(self, index: int, marks: Marks | None) -> None:
        """Have ring ``index``, which runs, mark what it writes so from now on. Call it paused."""
        ring = self.rings[index]
        if marks is None:
            ring.queue.log(None)
        else:
            ring.queue.log(marks.log, used=marks.used, buffers=marks.buffers)
        ring.marks = marks

    def running(self) -> list[int]:
        """The rings that have a queue, broken ones included."""
        return [index for index, ring in enumerate(self.rings) if ring.queue is not None]

    def move(self, memory: GuestMemory | None) -> list[int]:
        """Put all rings onto another memory table (None: no memory is left). Call it paused.
        -> the rings that broke because their memory is no longer there."""
        lost = []
        for index in self.running():
            queue = self.rings[index].queue
            if queue.state.broken is not None:
                continue
            try:
                if memory is None:
                    raise named("RING_E_RING_UNMAPPED")
                queue.move(memory)
            except SetupError as reason:
                queue.fail(reason)
                lost.append(index)
        return lost

    def refresh(self) -> None:
        """Take the port's descriptors anew. Raises EngineStuck."""
        with self.paused():
            pass

    def reset(self) -> None:
        """Stop every ring and forget everything about them."""
        with self.paused():
            queues = [ring.queue for ring in self.rings if ring.queue is not None]
            self.rings = [Ring() for _ in self.rings]
            self.features = self.mtu = 0
            self.watch_kicks = False
        for queue in queues:
            queue.close()

    # ----------------------------------------------------------------------------- news

    def news(self) -> LaneEvent:
        """What the workers reported since the last call, over all queue pairs. To be asked when
        ``report_fd``, an eventfd, is readable."""
        with suppress(BlockingIOError):
            os.eventfd_read(self.report_fd)
        events = LaneEvent(0)
        for lane in self._lanes:
            events |= lane.events()
        return events

    def broken(self) -> dict[int, RingError]:
        """Started rings that broke, with the rule."""
        states = {index: self.rings[index].queue.state.broken for index in self.running()}
        return {index: reason for index, reason in states.items() if reason is not None}

    def stats(self) -> tuple[FlowStats, FlowStats]:
        """(from_guest, to_guest), summed over all queue pairs since the device was made."""
        both = [*self._carried, *(lane.stats() for lane in self._lanes)]
        totals = both[0]
        for from_guest, to_guest in both[1:]:
            totals = (totals[0] + from_guest, totals[1] + to_guest)
        return totals

    def guest_macs(self) -> list[bytes]:
        """Addresses, 6 bytes each, that the guest has sent from since the last call. Raises EngineStuck."""
        with self.paused():
            macs = [lane.guest_mac() for lane in self._lanes]
        return sorted({mac for mac in macs if mac is not None})

    # ------------------------------------------------------------------------- handing on

    def export(self, put: Put) -> EnginePart:
        """Positions and frames are exact while paused; else a look at what moves on, without the frames."""
        rings = []
        for ring in self.rings:
            broken = ring.queue.state.broken if ring.queue else None
            rings.append(RingPart(ring.queue.base if ring.queue else None, broken.code if broken else None,
                                  put(ring.kick), put(ring.call), put(ring.err)))
        held = tuple(b"" if lane in self._attached else lane.held for lane in self._lanes)
        journal = None if self._journal is None else (self._journal.path, put(self._journal.fileno()))
        return EnginePart(journal, tuple(rings), tuple(self.lost_while_away), held, self.stats())

    def adopt(self, part: EnginePart, take: Take) -> None:
        """Be what another process exported, except for the queues and the journal. Nothing may have run here yet, and
        nothing does before :meth:`start`. Raises ValueError for what is no engine of this many rings."""
        for ring, given in zip(self.rings, part.rings, strict=True):
            ring.kick, ring.call, ring.err = take(given.kick), take(given.call), take(given.err)
        for lane, frame in zip(self._lanes, part.held, strict=True):
            if frame:
                lane.hold(frame)
        self.lost_while_away = list(part.lost_while_away)
        self._carried.append(part.counters)

    def start(self) -> None:
        """Run what was adopted. Raises EngineStuck."""
        with self.paused():
            for index in self.running():
                if self._journal is not None:
                    self._journal.write_on(index, self.rings[index].queue)

    def let_go(self) -> None:
        """Another process goes on with what this one ran."""
        self.reset()
        if self._journal is not None:
            self._journal.let_go()
            self._journal = None
        self.close()

    def close(self) -> None:
        """Stop everything and end the worker."""
        self.reset()
        for lane in self._lanes:
            lane.close()
        if self._pump is not None:
            self._pump.close()
        if self._journal is not None:
            self._journal.close()
        os.close(self.report_fd)
