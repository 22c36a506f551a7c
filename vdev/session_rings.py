"""The rings of one session, made to agree with what its front-end and driver have said.

Theory of operation. :meth:`SessionRings.settle` looks at one state of the session and makes the engine agree with it:
which rings run, which are enabled, with which features. It derives all of that from the state, so no message can leave
engine and session apart; where it fails, nothing has changed.

A ring runs when it is started and the driver is ready (DRIVER_OK, where STATUS was negotiated), and all it needs can be
reached. A ring that broke stays with the engine, silent, until GET_VRING_BASE, a reset or the end of the session; so
the front-end can still ask for its base.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

from ring.errors import MemoryGone, RingBroken, SetupError
from ring.journal import JournalError
from ring.virtqueue import VirtQueue
from vdev.agreed import driver_line, settings_of
from vdev.dirty_log import SessionLog
from vdev.engine import Engine, EngineStuck
from vdev.inband import InBand
from vdev.iommu import Iommu
from vdev.journal import no_journal
from vdev.logs import EventLog
from vdev.memory import SessionMemory
from vdev.ports.base import Port, PortError
from vdev.postcopy import SessionPostcopy
from vdev.session_state import SessionState
from vhost_user.fds import signal
from vhost_user.session import Session
from vhost_user.state import Notifier, State


class Refuse(Exception):
    """The device says no; the text is for the front-end's operator."""


@dataclass(frozen=True)
class SessionRingsPart:
    """What is known of a session's rings beside the engine's part, as it is handed on."""

    stopped_at: dict[int, int]
    told: dict[int, int]
    answered: tuple[int, ...]
    introduced: bool
    reported: tuple[int, ...]


def _close(queues: dict[int, VirtQueue]) -> None:
    for queue in queues.values():
        queue.close()


class SessionRings:
    """Starts, stops and resumes the rings of ``engine`` for one session; all else is the backend's, and lent.
    own_mtu: see vdev/agreed.py. forget: told of a kick that is about to be closed."""

    def __init__(self, session: Session, engine: Engine, port: Port, log: EventLog, *, memory: SessionMemory,
                 postcopy: SessionPostcopy, dirty: SessionLog, state: SessionState, iommu: Iommu,
                 inband: InBand, own_mtu: int | None = None,
                 forget: Callable[[int], None] | None = None) -> None:
        self.session = session
        self.engine = engine
        self.port = port
        self.log = log
        self.memory = memory
        self.postcopy = postcopy
        self.dirty = dirty
        self.state = state
        self.iommu = iommu
        self.inband = inband
        self._own_mtu = own_mtu
        self._forget = forget
        self._stopped_at: dict[int, int] = {}  # bases of rings that SET_STATUS 0 stopped
        self._told: dict[int, int] = {}  # bases as SET_VRING_BASE gave them
        self._answered: set[int] = set()  # rings whose base was just answered
        self._introduced = False
        self._reported: set[int] = set()  # broken rings that were spoken of

    # ------------------------------------------------------------------------------ bases

    def answers_read(self) -> None:
        """A front-end that goes on speaking has read the last answer: it knows where these rings stand. One that only
        looked at a ring remembers nothing, and comes back with the base of the last start."""
        for index in [ring for ring in self._answered if not self.session.state.resumable(ring)]:
            self.engine.forget(index)
            self._answered.discard(index)

    def begin_at(self, index: int, base: int) -> None:
        """SET_VRING_BASE: ring ``index`` is to begin at ``base``."""
        self._stopped_at.pop(index, None)
        self._told[index] = base

    def stop(self, index: int) -> int:
        """Stop ring ``index`` if it runs -> where it stands."""
        if self.engine.rings[index].queue is not None:
            return self.engine.stop(index)
        return self._stopped_at.pop(index, self.session.rings[index].base)

    def answered(self, index: int) -> None:
        """The base of ring ``index`` is the answer that goes out next."""
        self._answered.add(index)

    # -------------------------------------------------------------------------- settling

    def settle(self, state: State) -> None:
        """Make the engine agree with ``state``. Raises Refuse or PortError, and nothing changed."""
        engine = self.engine
        wanted = {index for index in range(len(state.rings)) if state.runnable(index) and self._reachable(state, index)}
        running = set(engine.running())
        enabled = [ring.enabled for ring in state.rings]
        marks = {index: self.dirty.marks(state, index) for index in wanted}
        features, mtu, parked = settings = settings_of(state, self._own_mtu)
        if (wanted == running and enabled == [ring.enabled for ring in engine.rings]
                and settings == (engine.features, engine.mtu, engine.watch_kicks)
                and all(engine.rings[index].marks == wish for index, wish in marks.items())):
            return
        self.inband.wire(state, wanted - running)
        fresh = self.postcopy.bounded(lambda: self._build(state, wanted - running), _close)
        forgotten: list[int] = []
        try:
            with engine.paused():
                if features != engine.features:
                    self.port.set_offloads(features)
                self._enable_pairs(enabled)
                for index in running - wanted:
                    self._stopped_at[index] = engine.stop(index)
                    engine.forget(index)
                for index, queue in fresh.items():
                    engine.run(index, queue)
                    self._stopped_at.pop(index, None)
                for index, wish in marks.items():
                    engine.mark(index, wish)
                for ring, known in zip(engine.rings, state.rings, strict=True):
                    ring.enabled = known.enabled
                    if known.kick is Notifier.UNSET and not known.started and ring.kick >= 0:
                        forgotten.append(ring.kick)
                        ring.kick = -1
                engine.features, engine.mtu, engine.watch_kicks = features, mtu, parked
        except (PortError, EngineStuck):
            _close(fresh)
            raise
        for fd in forgotten:
            self.inband.forget(fd)
            if self._forget is not None:
                self._forget(fd)
            os.close(fd)
        self.dirty.report(state)
        if not features:
            self._stopped_at.clear()
        self._reported -= running - wanted | fresh.keys()
        if not any(ring.started for ring in state.rings):
            self._introduced = False
        if fresh:
            self.state.announce()
            self._introduce(state)
            self.lost([index for index, queue in fresh.items() if queue.state.broken is not None])

    def _reachable(self, state: State, index: int) -> bool:
        return (not self.iommu.on(state) or self.memory.table is None
                or self.iommu.reachable(state, index, self.memory.table))

    def _build(self, state: State, indices: set[int]) -> dict[int, VirtQueue]:
        fresh: dict[int, VirtQueue] = {}
        try:
            for index in sorted(indices):
                ring = state.rings[index]
                if self.memory.table is None:
                    raise Refuse(f"{self.engine.ring_name(index)} cannot start: no guest memory was shared; give QEMU "
                                  "-object memory-backend-memfd,share=on and -machine memory-backend=ID")
                try:
                    fresh[index] = self.queue(state, index, self._stopped_at.get(index, ring.base))
                except SetupError as reason:
                    raise Refuse(f"{self.engine.ring_name(index)} cannot start: {reason}") from None
                # a ring that we stopped ourselves goes on from there, which is no news
                self._take_over(index, fresh[index], self._stopped_at.get(index, self._told.get(index, ring.base)))
        except (Refuse, MemoryGone):
            _close(fresh)
            raise
        return fresh

    def _take_over(self, index: int, queue: VirtQueue, told: int) -> None:
        """Have a new queue begin where a back-end stood that ended without being asked."""
        name = self.engine.ring_name(index)
        try:
            found = self.engine.take_over(index, queue, told)
        except RingBroken:
            return  # reported with the others that broke
        except JournalError as reason:
            self.engine.drop_journal()
            self.log.warning("no-journal", no_journal(reason))
            return
        if found.by_journal:
            self.log.info("ring-taken-over", f"{name} goes on where the last vdev stood when it ended (base "
                          f"{queue.base:#x}), not at the front-end's base {told:#x}, which is out of date",
                          ring=index, base=queue.base, told=told)
        if found.completed:
            self.engine.lost_while_away[index] += found.completed
            self.log.info("lost-while-away", f"{name}: the front-end dropped {found.completed} chains of the "
                          "guest while no back-end was connected", ring=index, chains=found.completed)

    def queue(self, state: State, index: int, base: int) -> VirtQueue:
        """A queue for ring ``index`` as ``state`` describes it. Raises SetupError."""
        ring = state.rings[index]
        return self.engine.build(self.memory.table, size=ring.num, desc=ring.addr.desc, avail=ring.addr.avail,
                                 used=ring.addr.used, base=base, features=state.features,
                                 iotlb=self.iommu.table if self.iommu.on(state) else None)

    def _enable_pairs(self, enabled: list[bool]) -> None:
        """Tell the port which pairs get frames. Pair 0 keeps its queue while no other has one, so that the
        link stays up without a guest."""
        pairs = enabled[:2 * self.engine.queue_pairs:2]
        for pair, on in enumerate(pairs):
            self.port.enable(pair, on or (pair == 0 and not any(pairs)))

    def _introduce(self, state: State) -> None:
        """One line when the guest's driver is there for the first time."""
        if self._introduced:
            return
        self._introduced = True
        text, fields = driver_line(state, self.memory.size)
        self.log.info("driver", text, **fields)

    # ------------------------------------------------------------------------------ news

    def lost(self, indices: list[int]) -> None:
        """Rings whose memory was taken away by a request: broken, and the front-end is told."""
        for index in indices:
            err = self.engine.rings[index].err
            if err >= 0:
                signal(err)
        self.report_broken()

    def report_broken(self) -> None:
        """One line for each ring that stopped for good since the last call."""
        for index, reason in self.engine.broken().items():
            if index in self._reported:
                continue
            self._reported.add(index)
            self.log.peer(logging.WARNING, "ring-broken", f"{self.engine.ring_name(index)} stopped: {reason}; "
                          "resetting the guest's driver (reboot, or unbind and bind it) brings the ring back",
                          ring=index, code=reason.code)

    # ---------------------------------------------------------------------------- parked rings

    @property
    def parked(self) -> bool:
        """Is there a ring that was stopped behind a running driver's back?"""
        return any(self.session.state.resumable(index) for index in range(len(self.session.rings)))

    def resume_parked(self) -> None:
        """Start such rings again, at the base that was answered."""
        for index in range(len(self.session.rings)):
            if self.session.state.resumable(index):
                self.session.resume(index)
                self._answered.discard(index)
                self.log.info("ring-resumed", f"{self.engine.ring_name(index)} was asked for its base and not started "
                              "again, while others run (QEMU's `info virtio-queue-status` does that): going on with it",
                              ring=index)
        try:
            self.settle(self.session.state)
        except (PortError, Refuse, OSError) as reason:
            self.log.peer(logging.WARNING, "ring-not-resumed", f"a ring could not be resumed: {reason}")

    # ------------------------------------------------------------------------- handing on

    def export(self) -> SessionRingsPart:
        """What another process needs to know, beside the engine's part."""
        return SessionRingsPart(dict(self._stopped_at), dict(self._told), tuple(sorted(self._answered)),
                                self._introduced, tuple(sorted(self._reported)))

    def adopt(self, part: SessionRingsPart) -> None:
        """Know what another process exported."""
        self._stopped_at, self._told, self._answered = part.stopped_at, part.told, set(part.answered)
        self._introduced, self._reported = part.introduced, set(part.reported)

    # ------------------------------------------------------------------------------- end

    def fds(self) -> list[int]:
        """The open kick, call and err descriptors."""
        return [fd for ring in self.engine.rings for fd in (ring.kick, ring.call, ring.err) if fd >= 0]

    def release(self) -> None:
        """No guest is there any more: the port is as it was before. Raises PortError."""
        self.port.set_offloads(0)
        self._enable_pairs([False] * len(self.engine.rings))
