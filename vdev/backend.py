"""What a front-end's requests do to the device: the hands of one session.

Theory of operation. A request is judged by the session (vhost_user/session.py), handled here, and
committed by ``session.answer``. Handling has two parts. The request's own handler takes what came along:
memory is mapped, descriptors change places. Then :meth:`Backend._settle` makes the engine agree with the
state the session is about to commit: which rings run, which are enabled, with which features. It derives
all of that from the one state, so no message can leave engine and session apart. Whatever fails is
undone before the refusal is returned, and the session commits nothing.

A ring runs when it is started and the driver is ready (DRIVER_OK, where STATUS was negotiated). A ring
that broke stays with the engine, silent, until GET_VRING_BASE, a reset or the end of the session; so the
front-end can still ask for its base.
"""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace

from ring.errors import MemoryGone, RingBroken, SetupError
from ring.guestmem import DEFAULT_POLICY, Policy
from ring.journal import JournalError
from ring.virtqueue import VirtQueue
from vdev.agreed import driver_line, settings_of
from vdev.device_state import StateError
from vdev.dirty_log import SessionLog
from vdev.engine import Engine, EngineStuck, ring_name
from vdev.inband import InBand
from vdev.iommu import Iommu
from vdev.journal import no_journal
from vdev.logs import EventLog
from vdev.memory import SessionMemory
from vdev.ports.base import Port, PortError
from vdev.postcopy import Arrivals, CutOff, SessionPostcopy
from vdev.reverse import ReverseChannel
from vdev.session_state import SessionState
from vhost_user.fds import is_eventfd, signal
from vhost_user.requests import MEMORY_KNOWN
from vhost_user.session import Accepted, Result, Session
from vhost_user.spec import STATE_NOFD, IotlbType, ProtocolFeature, Request
from vhost_user.state import Notifier, State
from vhost_user.wire import Region

RARP_INTERVAL = 0.02  # seconds between announcements; QEMU sends five, 50 ms and more apart


class _Refuse(Exception):
    """The device says no; the text is for the front-end's operator."""


def _close(queues: dict[int, VirtQueue]) -> None:
    for queue in queues.values():
        queue.close()


class Backend:
    """Handles the requests of one session. Owns the memory and descriptors that came with them."""

    def __init__(self, session: Session, engine: Engine, port: Port, log: EventLog, reverse: ReverseChannel,
                 policy: Policy = DEFAULT_POLICY, arrivals: Arrivals | None = None):
        self.session = session
        self.engine = engine
        self.port = port
        self.log = log
        self.memory = SessionMemory(engine, policy)
        self.postcopy = SessionPostcopy(arrivals, engine, self.memory, log)
        self.dirty = SessionLog(log)
        self.state = SessionState(engine, port, session, log)
        self._stopped_at: dict[int, int] = {}  # bases of rings that SET_STATUS 0 stopped
        self._told: dict[int, int] = {}  # bases as SET_VRING_BASE gave them
        self._answered: set[int] = set()  # rings whose base was just answered
        self.reverse = reverse
        self.iommu = Iommu(engine, reverse, log)
        self.inband = InBand(engine, reverse, log)
        self._last_rarp = 0.0
        self._introduced = False
        self._reported: set[int] = set()  # broken rings that were spoken of
        self._abandoned = engine.abandoned

    # -------------------------------------------------------------------------- requests

    def handle(self, request: Accepted) -> Result:
        """Do what ``request`` asks -> what to answer. Raises EngineStuck or MemoryGone, after which only close() is
        left."""
        # A front-end that goes on speaking has read the last answer: it knows where these rings stand. One that only
        # looked at a ring remembers nothing, and comes back with the base of the last start.
        for index in [ring for ring in self._answered if not self.session.state.resumable(ring)]:
            self.engine.forget(index)
            self._answered.discard(index)
        handler = Backend._memory_known if request.row is MEMORY_KNOWN else _HANDLERS.get(request.kind)
        try:
            if handler is None:
                self._settle(self.session.after(request))
            answer = handler(self, request) if handler is not None else None
            self.iommu.ask(self.session.state)
            return answer if isinstance(answer, Result) else Result.ok(answer)
        except (SetupError, PortError, StateError, CutOff, _Refuse) as reason:
            return Result.refused(str(reason))
        except OSError as error:
            return Result.refused(f"{os.strerror(error.errno).lower()}; vdev ran out of a resource")

    def _addressed(self, region: Region) -> Region:
        """``region`` as the addresses of rings name it. With GPA_ADDRESSES they are guest-physical, and what the
        front-end puts in place of its own address means nothing."""
        gpa_addresses = self.session.state.has(ProtocolFeature.GPA_ADDRESSES)
        return replace(region, uva=region.gpa) if gpa_addresses else region

    def _set_mem_table(self, request: Accepted) -> tuple[int, ...] | None:
        self._expect_memory(request)
        fds = [request.fds[i] for i in range(len(request.fds))]
        regions = tuple(self._addressed(region) for region in request.payload.regions)
        self._change_memory(lambda: self.memory.replace(regions, fds))
        return self.postcopy.addresses(regions)

    def _add_mem_reg(self, request: Accepted) -> int | None:
        self._expect_memory(request)
        region = self._addressed(request.payload)
        # QEMU before 8.0 adds and removes all memory once for each queue pair; the session counts.
        if request.payload not in self.session.regions:
            self._change_memory(lambda: self.memory.add(region, request.fds[0]))
        addresses = self.postcopy.addresses([region])
        return addresses and addresses[0]

    def _expect_memory(self, request: Accepted) -> None:
        """Memory comes with ``request``. In postcopy no ring runs from here on until the front-end knows of it."""
        self.postcopy.check(request.fds)
        if self.session.state.listening:
            self._settle(self.session.after(request))

    def _memory_known(self, request: Accepted) -> None:
        self.postcopy.known()
        self._settle(self.session.after(request))

    def _rem_mem_reg(self, request: Accepted) -> None:
        left = self.session.after(request).regions
        if not any(region.same_place(request.payload) for region in left):
            self._change_memory(lambda: self.memory.remove(self._addressed(request.payload)))

    def _change_memory(self, change: Callable[[], list[int]]) -> None:
        """Do ``change``, which answers the rings that lost their memory. Translations name the memory there was, so
        they go with it, and rings behind an IOMMU wait for new ones."""
        state = self.session.state
        if not self.iommu.on(state):
            self._lost(change())
            return
        with self.engine.paused():
            self.iommu.forget(state)
            self._settle(state)
            change()
        self._settle(state)

    def _iotlb_msg(self, request: Accepted) -> None:
        message, state, memory = request.payload, self.session.state, self.memory.table
        update = message.kind == IotlbType.UPDATE
        if update and memory is None:
            raise _Refuse("no guest memory was shared that a translation could be about")
        if update and self.iommu.knows(memory, message):
            return
        with self.engine.paused():
            # An update replaces what it overlaps; a ring that ran on that stops in between.
            self.iommu.forget(state, message.iova, message.size)
            self._settle(state)
            if update:
                self.iommu.update(memory, message)
                self._settle(state)

    def _set_protocol_features(self, request: Accepted) -> None:
        self.dirty.explain(self.session.offer, request.payload.value)
        if not self.inband.on(self.session.after(request)):
            self.inband.drop()

    def _set_log_base(self, request: Accepted) -> None:
        log = request.payload
        with self.dirty.replaced(request.fds[0], log.size, log.offset):
            self._settle(self.session.after(request))

    def _set_log_fd(self, request: Accepted) -> None:
        """A back-end may signal it when it marked something, and need not: QEMU looks into the log by itself."""
        if not is_eventfd(request.fds[0]):
            raise _Refuse("the log descriptor is no eventfd")

    def _set_device_state_fd(self, request: Accepted) -> int:
        self.state.begin(request.payload.direction, request.fds.take(), self.session.state)
        return STATE_NOFD

    def _check_device_state(self, request: Accepted) -> int:
        self.state.check()
        return 0

    def _postcopy_end(self, request: Accepted) -> None:
        self.postcopy.end()
        self._settle(self.session.after(request))

    def _set_vring_base(self, request: Accepted) -> None:
        self._stopped_at.pop(request.payload.index, None)
        self._told[request.payload.index] = request.payload.num

    def _get_vring_base(self, request: Accepted) -> int:
        index = request.payload.index
        if self.engine.rings[index].queue is not None:
            base = self.engine.stop(index)
        else:
            base = self._stopped_at.pop(index, self.session.rings[index].base)
        self._settle(self.session.after(request, base))
        self._answered.add(index)
        return base

    def _set_vring_kick(self, request: Accepted) -> None:
        if len(request.fds) and not is_eventfd(request.fds[0]):
            raise _Refuse("the kick descriptor is no eventfd")
        self._swap_fd(request, "kick", lambda: self._settle(self.session.after(request)))

    def _vring_kick(self, request: Accepted) -> None:
        self._settle(self.session.after(request))
        self.inband.kick(request.payload.index)

    def _set_vring_call(self, request: Accepted) -> None:
        self._swap_fd(request, "call")

    def _set_vring_err(self, request: Accepted) -> None:
        self._swap_fd(request, "err")

    def _swap_fd(self, request: Accepted, which: str, then: Callable[[], None] = lambda: None) -> None:
        """Put the descriptor that came along in the ring's place for ``which``; close the old one, or, when
        ``then`` fails, the new one."""
        ring = self.engine.rings[request.payload.index]
        new = request.fds.take() if len(request.fds) else -1
        old = getattr(ring, which)
        unused = new
        try:
            if new >= 0:
                os.set_blocking(new, False)
            with self.engine.paused():
                setattr(ring, which, new)
                try:
                    then()
                    unused = old
                except Exception:
                    setattr(ring, which, old)
                    raise
        finally:
            if unused >= 0:
                self.inband.forget(unused)
                os.close(unused)

    def _send_rarp(self, request: Accepted) -> None:
        now = time.monotonic()
        if now - self._last_rarp >= RARP_INTERVAL:
            self._last_rarp = now
            self.port.announce(request.payload.value.to_bytes(8, "little")[:6])

    def _set_backend_req_fd(self, request: Accepted) -> None:
        if not self.reverse.suits(request.fds[0]):
            raise _Refuse("the descriptor is neither a socket nor a pipe")
        self.reverse.adopt(request.fds.take())
        with self.engine.paused():  # rings that wait for an answer look again, and it is asked for anew
            self.iommu.channel_changed()
        self.inband.channel_changed()
        self._settle(self.session.state)

    # -------------------------------------------------------------------------- settling

    def _settle(self, state: State) -> None:
        """Make the engine agree with ``state``. Raises _Refuse or PortError, and nothing changed."""
        engine = self.engine
        wanted = {index for index in range(len(state.rings)) if state.runnable(index) and self._reachable(state, index)}
        running = set(engine.running())
        enabled = [ring.enabled for ring in state.rings]
        marks = {index: self.dirty.marks(state, index) for index in wanted}
        features, mtu, parked = settings = settings_of(state)
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
            self._lost([index for index, queue in fresh.items() if queue.state.broken is not None])

    def _reachable(self, state: State, index: int) -> bool:
        return (not self.iommu.on(state) or self.memory.table is None
                or self.iommu.reachable(state, index, self.memory.table))

    def _build(self, state: State, indices: set[int]) -> dict[int, VirtQueue]:
        fresh: dict[int, VirtQueue] = {}
        try:
            for index in sorted(indices):
                ring = state.rings[index]
                if self.memory.table is None:
                    raise _Refuse(f"{ring_name(index)} cannot start: no guest memory was shared; give QEMU "
                                  "-object memory-backend-memfd,share=on and -machine memory-backend=ID")
                try:
                    fresh[index] = self._queue(state, index, self._stopped_at.get(index, ring.base))
                except SetupError as reason:
                    raise _Refuse(f"{ring_name(index)} cannot start: {reason}") from None
                # a ring that we stopped ourselves goes on from there, which is no news
                self._take_over(index, fresh[index], self._stopped_at.get(index, self._told.get(index, ring.base)))
        except (_Refuse, MemoryGone):
            _close(fresh)
            raise
        return fresh

    def _take_over(self, index: int, queue: VirtQueue, told: int) -> None:
        """Have a new queue begin where a back-end stood that ended without being asked."""
        name = ring_name(index)
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

    def _queue(self, state: State, index: int, base: int) -> VirtQueue:
        """A queue for ring ``index`` as ``state`` describes it. Raises SetupError."""
        ring = state.rings[index]
        return self.engine.build(self.memory.table, size=ring.num, desc=ring.addr.desc, avail=ring.addr.avail,
                                 used=ring.addr.used, base=base, features=state.features,
                                 iotlb=self.iommu.table if self.iommu.on(state) else None)

    def _enable_pairs(self, enabled: list[bool]) -> None:
        """Tell the port which pairs get frames. Pair 0 keeps its queue while no other has one, so that the
        link stays up without a guest."""
        pairs = enabled[::2]
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

    def _lost(self, indices: list[int]) -> None:
        """Rings whose memory was taken away by a request: broken, and the front-end is told."""
        for index in indices:
            err = self.engine.rings[index].err
            if err >= 0:
                signal(err)
        self.report_broken()

    def translations_missing(self) -> None:
        """Rings wait for translations: have the front-end asked."""
        if self.memory.table is not None:
            self.iommu.missing(self.session.state, self.memory.table)

    def access_denied(self) -> None:
        """Chains were dropped for what the guest's IOMMU does not allow."""
        self.iommu.denied()

    def report_broken(self) -> None:
        """One line for each ring that stopped for good since the last call."""
        for index, reason in self.engine.broken().items():
            if index in self._reported:
                continue
            self._reported.add(index)
            self.log.peer(logging.WARNING, "ring-broken", f"{ring_name(index)} stopped: {reason}; resetting the "
                          "guest's driver (reboot, or unbind and bind it) brings the ring back",
                          ring=index, code=reason.code)

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
                self.log.info("ring-resumed", f"{ring_name(index)} was asked for its base and not started again, while "
                              "others run (QEMU's `info virtio-queue-status` does that): going on with it", ring=index)
        try:
            self._settle(self.session.state)
        except (PortError, _Refuse, OSError) as reason:
            self.log.peer(logging.WARNING, "ring-not-resumed", f"a ring could not be resumed: {reason}")

    # ------------------------------------------------------------------------- handing on

    def let_go(self) -> None:
        """Another process goes on with the session: give up what it consists of, and tell nobody."""
        fds = self._ring_fds()
        self.engine.reset()
        self.memory.close()
        self.dirty.close()
        self.reverse.drop()
        for fd in fds:
            os.close(fd)

    # ----------------------------------------------------------------------------- close

    def _ring_fds(self) -> list[int]:
        return [fd for ring in self.engine.rings for fd in (ring.kick, ring.call, ring.err) if fd >= 0]

    def close(self) -> None:
        """End of the session: nothing of it is left in the engine, the port or the file table."""
        self.state.close()
        self.postcopy.close()
        self.inband.close()
        fds = self._ring_fds()
        try:
            self.engine.reset()
        except EngineStuck:
            fds = []  # the stuck worker may still use them
        if self.engine.abandoned != self._abandoned:
            self.memory.abandon()
            self.dirty.abandon()
            self.iommu.abandon()
        self.memory.close()
        self.dirty.close()
        self.iommu.close()
        try:
            self.port.set_offloads(0)
            self._enable_pairs([False] * len(self.engine.rings))
        except PortError as reason:
            self.log.warning("port", str(reason))
        self.reverse.drop()
        for fd in fds:
            os.close(fd)


_HANDLERS: dict[Request, Callable[[Backend, Accepted], object]] = {
    Request.SET_MEM_TABLE: Backend._set_mem_table,
    Request.ADD_MEM_REG: Backend._add_mem_reg,
    Request.REM_MEM_REG: Backend._rem_mem_reg,
    Request.SET_PROTOCOL_FEATURES: Backend._set_protocol_features,
    Request.SET_LOG_BASE: Backend._set_log_base,
    Request.SET_LOG_FD: Backend._set_log_fd,
    Request.SET_DEVICE_STATE_FD: Backend._set_device_state_fd,
    Request.CHECK_DEVICE_STATE: Backend._check_device_state,
    Request.POSTCOPY_ADVISE: lambda backend, _: Result.ok(fds=(backend.postcopy.advise(),)),
    Request.POSTCOPY_LISTEN: lambda backend, _: backend.postcopy.listen(),
    Request.POSTCOPY_END: Backend._postcopy_end,
    Request.SET_VRING_BASE: Backend._set_vring_base,
    Request.GET_VRING_BASE: Backend._get_vring_base,
    Request.SET_VRING_KICK: Backend._set_vring_kick,
    Request.VRING_KICK: Backend._vring_kick,
    Request.SET_VRING_CALL: Backend._set_vring_call,
    Request.SET_VRING_ERR: Backend._set_vring_err,
    Request.SEND_RARP: Backend._send_rarp,
    Request.IOTLB_MSG: Backend._iotlb_msg,
    Request.SET_BACKEND_REQ_FD: Backend._set_backend_req_fd,
}
