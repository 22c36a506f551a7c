"""The engine of one device: which ring lies where, and the pump that moves frames between rings and port.

Rules that make it safe (docs/architecture.md, "Threads"): memory, rings and descriptors change only inside
``with engine.paused():``; while it lasts no worker touches anything of this device, and other devices run
on. A change is three steps: build and check before the pause, swap inside, close and unmap after it.

A lane serves a queue pair, or one direction of it where each has a worker of its own (vdev/workers.py).

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
from ring.pump import Flow, FlowStats, HeaderStats, Lane, LaneConfig, LaneEvent, Pump
from ring.receive_settings import Coalescing, ReceiveSettings
from ring.virtqueue import Takeover, VirtQueue
from vdev.handover import Put, Take
from vdev.net.control.command import control_queue_index
from vdev.net.control.offloads import SWITCHABLE
from vdev.net.offer import without_orphans
from vdev.ports.base import Port
from vdev.workers import ATTACH_PATIENCE, PATIENCE, Worker, WorkerLost, Workers, leave_to_worker


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


@dataclass(eq=False)
class _Served:
    """A lane: the queue pair, which of its directions it serves, and who does that. pump: who has it now."""

    pair: int
    from_guest: bool
    to_guest: bool
    worker: Worker
    lane: Lane
    pump: Pump | None = None


class Engine:
    """Runs the rings of one device against its port. Made once a device, used by one session after the other.

    The workers are not started with it: what a thread may do is settled when it starts (vdev/sandbox.py).

    journal: where positions of the rings are written down for a successor; None: nowhere. workers: the daemon's.
    control_queue: there is a ring more, for a control queue, which vdev/control_queue.py serves. settings: what the
    driver has set by it; None: it cannot.
    """

    def __init__(self, port: Port, queue_pairs: int, journal: Journal | None = None, workers: Workers | None = None,
                 control_queue: bool = False):
        self.port = port
        self._journal = journal
        self.queue_pairs = queue_pairs
        self.rings = [Ring() for _ in range(2 * queue_pairs + control_queue)]
        self.settings: ReceiveSettings | None = None
        self.features = 0
        self.mtu = 0
        self.watch_kicks = False
        self._link_up = True
        self.lost_while_away = [0] * len(self.rings)  # chains a front-end completed while no back-end was there
        self.abandoned = 0  # how often a worker got stuck
        self.patience = PATIENCE  # seconds that a worker may take to let go
        self.lost_worker = False  # another device had to give up a worker of ours: refresh() tells what that means
        self._depth = 0
        self._carried: list[tuple[FlowStats, FlowStats]] = []  # of lanes that had to be abandoned
        self.report_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._pool = workers or Workers()
        self._workers = self._pool.of_device(queue_pairs * (2 if self._pool.splits else 1))
        for worker in dict.fromkeys(self._workers):
            worker.join(self._on_lost)
        self._apart: Worker | None = None  # serves all lanes, in place of the others
        self._lanes = self._new_lanes()

    def _new_lanes(self) -> list[_Served]:
        ways = ((False, True), (True, False)) if self._pool.splits else ((True, True),)
        places = [(pair, *way) for pair in range(self.queue_pairs) for way in ways]
        return [_Served(*place, worker, self._pool.lane(self.report_fd))
                for place, worker in zip(places, self._workers, strict=True)]

    def start_workers(self) -> None:
        """Start the workers now rather than with the first ring. Raises OSError when there can be no thread, RingError
        when memory that vanishes could not be survived."""
        for worker in self._workers:
            worker.start()

    def _on_lost(self) -> None:
        if any(served.pump is not None for served in self._lanes):
            self.lost_worker = True
            os.eventfd_write(self.report_fd, 1)

    def keep_apart(self, apart: bool) -> None:
        """Have this device served by a worker that serves no other, or as before. Raises EngineStuck."""
        if not self._pool.shared or apart == (self._apart is not None):
            return
        with self.paused():
            if apart:
                self._apart = self._pool.new()
                self._apart.join(self._on_lost)
                for served in self._lanes:
                    served.worker = self._apart
            else:
                self._rejoin()

    def _rejoin(self) -> None:
        if self._apart is not None:
            for served, worker in zip(self._lanes, self._workers, strict=True):
                served.worker = worker
            self._apart.leave(self._on_lost)
            self._apart = None

    # -------------------------------------------------------------------------- pausing

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No worker touches this device inside. Nests. Raises EngineStuck when a worker does not let go."""
        if self._depth == 0:
            self._take_back()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._resume()

    def _take_back(self, lost: WorkerLost | None = None) -> None:
        """Have all lanes back. Raises EngineStuck where one cannot be had, or with ``lost``."""
        for served in self._lanes:
            if served.pump is not None:
                try:
                    served.worker.detach(served.lane, served.pump, self.patience)
                    served.pump = None
                except WorkerLost as why:
                    lost = lost or why
        self.lost_worker = False
        if lost is not None:
            self._abandon()
            raise EngineStuck(f"a worker thread did not leave the device: {lost}")

    def _resume(self) -> None:
        member, pairs = self.port.member, self._pairs()
        receiving = [pair for pair in pairs
                     if self.rings[2 * pair].queue is not None and self.rings[2 * pair].enabled and self._link_up]
        features = self.features
        if self.settings is not None:
            receiving = self.settings.receiving(receiving)
            features = without_orphans(self.settings.features(features, SWITCHABLE))
        if member is not None:
            try:
                member.receive(self.settings, receiving)
            except QueueBusy as busy:
                self._take_back(WorkerLost(str(busy)))
            member.spread(len(receiving))
        for served in self._lanes:
            if served.pair not in pairs:
                served.lane.configure(LaneConfig())
                continue
            config = LaneConfig(port_header=self.port.carries.header, mtu=self.mtu, watch_kicks=self.watch_kicks,
                                features=features, member=member)
            ends = self.port.ends(served.pair)
            if served.from_guest:
                config.from_guest, config.to_port = self._flow(2 * served.pair + 1), ends.to_port
            if served.to_guest:
                config.to_guest, config.from_port = self._flow(2 * served.pair), ends.from_port
                config.door = receiving.index(served.pair) if served.pair in receiving else -1
            served.lane.configure(config)
            if config.from_guest.queue or config.to_guest.queue:
                try:
                    served.pump = served.worker.attach(served.lane, max(ATTACH_PATIENCE, self.patience))
                except WorkerLost as lost:
                    self._take_back(lost)

    @property
    def control(self) -> int | None:
        """The index of the control queue, by the features negotiated."""
        return control_queue_index(self.features, self.queue_pairs) if len(self.rings) % 2 else None

    def _pairs(self) -> range:
        """Those that there are for the driver: a control queue may lie where others begin."""
        return range(self.queue_pairs if self.control is None else self.control // 2)

    def data_rings(self) -> range:
        """The indices of the receiveqs and transmitqs that there are for the driver."""
        return range(2 * len(self._pairs()))

    def ring_name(self, index: int) -> str:
        """How a person knows ring ``index``."""
        return "the control queue" if index == self.control else ring_name(index)

    def set_settings(self, settings: ReceiveSettings | None) -> None:
        """The driver has set this; when it returns no frame comes by what held before. Raises EngineStuck."""
        if settings != self.settings:
            with self.paused():
                self.settings = settings

    def _flow(self, index: int) -> Flow:
        ring = self.rings[index]
        coalescing = self.settings.coalescing_of(index) if self.settings is not None else Coalescing()
        return Flow(ring.queue, ring.enabled and self._link_up, ring.kick, ring.call, ring.err, coalescing)

    def _abandon(self) -> None:
        """Leave lanes and rings to the stuck worker for good, and start with fresh ones."""
        self._carried.extend(served.lane.stats() for served in self._lanes)
        leave_to_worker(self._lanes, self.rings, self._journal)
        self.drop_journal()
        self._rejoin()
        self.port.abandoned()
        self.rings = [Ring() for _ in self.rings]
        self._lanes = self._new_lanes()
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

    def set_link(self, up: bool) -> None:
        """Have no frame go through, either way, or as the rings say. Raises EngineStuck."""
        with self.paused():
            self._link_up = up

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
            self.settings = None
            self.watch_kicks = False
            self._rejoin()
        for queue in queues:
            queue.close()

    # ----------------------------------------------------------------------------- news

    def news(self) -> LaneEvent:
        """What the workers reported since the last call, over all queue pairs. To be asked when
        ``report_fd``, an eventfd, is readable."""
        with suppress(BlockingIOError):
            os.eventfd_read(self.report_fd)
        events = LaneEvent(0)
        for served in self._lanes:
            events |= served.lane.events()
        return events

    def broken(self) -> dict[int, RingError]:
        """Started rings that broke, with the rule."""
        states = {index: self.rings[index].queue.state.broken for index in self.running()}
        return {index: reason for index, reason in states.items() if reason is not None}

    def stats(self) -> tuple[FlowStats, FlowStats]:
        """(from_guest, to_guest), summed over all queue pairs since the device was made."""
        both = [*self._carried, *(served.lane.stats() for served in self._lanes)]
        totals = both[0]
        for from_guest, to_guest in both[1:]:
            totals = (totals[0] + from_guest, totals[1] + to_guest)
        return totals[0], totals[1].and_lost(self.port.missed())

    def ring_stats(self, index: int) -> tuple[FlowStats, HeaderStats]:
        """Of the receiveq or transmitq ``index``, since the device was made or a worker was lost."""
        pair, from_guest = divmod(index, 2)
        (served,) = [lane for lane in self._lanes
                     if lane.pair == pair and (lane.from_guest if from_guest else lane.to_guest)]
        return served.lane.stats()[not from_guest], served.lane.header_stats()[not from_guest]

    def guest_macs(self) -> list[bytes]:
        """Addresses, 6 bytes each, that the guest has sent from since the last call. Raises EngineStuck."""
        with self.paused():
            macs = [served.lane.guest_mac() for served in self._lanes]
        return sorted({mac for mac in macs if mac is not None})

    # ------------------------------------------------------------------------- handing on

    def export(self, put: Put) -> EnginePart:
        """Positions and frames are exact while paused; else a look at what moves on, without the frames."""
        rings = []
        for ring in self.rings:
            broken = ring.queue.state.broken if ring.queue else None
            rings.append(RingPart(ring.queue.base if ring.queue else None, broken.code if broken else None,
                                  put(ring.kick), put(ring.call), put(ring.err)))
        held = tuple(served.lane.held if served.pump is None else b"" for served in self._lanes if served.to_guest)
        journal = None if self._journal is None else (self._journal.path, put(self._journal.fileno()))
        return EnginePart(journal, tuple(rings), tuple(self.lost_while_away), held, self.stats())

    def adopt(self, part: EnginePart, take: Take) -> None:
        """Be what another process exported, except for the queues and the journal. Nothing may have run here yet, and
        nothing does before :meth:`start`. Raises ValueError for what is no engine of this many rings."""
        for ring, given in zip(self.rings, part.rings, strict=True):
            ring.kick, ring.call, ring.err = take(given.kick), take(given.call), take(given.err)
        receiving = [served.lane for served in self._lanes if served.to_guest]
        for lane, frame in zip(receiving, part.held, strict=True):
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
        """Stop everything and leave the workers."""
        self.reset()
        for served in self._lanes:
            served.lane.close()
        for worker in dict.fromkeys(self._workers):
            worker.leave(self._on_lost)
        if self._journal is not None:
            self._journal.close()
        os.close(self.report_fd)
