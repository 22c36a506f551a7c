"""What a front-end's requests do to the device: the hands of one session.

Theory of operation. A request is judged by the session (vhost_user/session.py), handled here, and committed by
``session.answer``. Handling has two parts. The request's own handler takes what came along: memory is mapped,
descriptors change places. Then the rings are made to agree with the state that the session is about to commit
(vdev/session_rings.py). Whatever fails is undone before the refusal is returned, and the session commits nothing.
"""

import os
import time
from collections.abc import Callable
from dataclasses import replace

from ring.errors import SetupError
from ring.guestmem import DEFAULT_POLICY, Policy
from vdev.control_queue import ControlQueue
from vdev.device_state import StateError
from vdev.dirty_log import SessionLog
from vdev.engine import Engine, EngineStuck
from vdev.guest_config import GuestConfig
from vdev.inband import InBand
from vdev.iommu import Iommu
from vdev.logs import EventLog
from vdev.memory import SessionMemory
from vdev.net.config_space import ConfigSpace
from vdev.ports.base import Port, PortError
from vdev.postcopy import Arrivals, CutOff, SessionPostcopy
from vdev.reverse import ReverseChannel
from vdev.session_rings import Refuse, SessionRings
from vdev.session_state import SessionState
from vhost_user.fds import is_eventfd
from vhost_user.requests import MEMORY_KNOWN
from vhost_user.session import Accepted, Result, Session
from vhost_user.spec import STATE_NOFD, IotlbType, ProtocolFeature, Request
from vhost_user.wire import Region

RARP_INTERVAL = 0.02  # seconds between announcements; QEMU sends five, 50 ms and more apart


class Backend:
    """Handles the requests of one session. Owns the memory and descriptors that came with them. space: what the device
    has to say in its configuration space; None where that is the front-end's."""

    def __init__(self, session: Session, engine: Engine, port: Port, log: EventLog, reverse: ReverseChannel,
                 policy: Policy = DEFAULT_POLICY, arrivals: Arrivals | None = None,
                 space: ConfigSpace | None = None):
        self.session = session
        self.engine = engine
        self.port = port
        self.log = log
        self.memory = SessionMemory(engine, policy)
        self.postcopy = SessionPostcopy(arrivals, engine, self.memory, log)
        self.dirty = SessionLog(log)
        self.state = SessionState(engine, port, session, log)
        self.reverse = reverse
        self.iommu = Iommu(engine, reverse, log)
        self.inband = InBand(engine, reverse, log)
        self.config = GuestConfig(space, session, reverse) if space is not None else None
        self.control: ControlQueue | None = None
        if self.config is not None:
            self.control = ControlQueue(engine, self.config, reverse, log, lambda: self.rings.report_broken())
            self.state.control = self.control
        self.rings = SessionRings(session, engine, port, log, memory=self.memory, postcopy=self.postcopy,
                                  dirty=self.dirty, state=self.state, iommu=self.iommu, inband=self.inband,
                                  own_mtu=self.config and self.config.mtu,
                                  forget=self.control and self.control.forget)
        self._last_rarp = 0.0
        self._abandoned = engine.abandoned

    # -------------------------------------------------------------------------- requests

    def handle(self, request: Accepted) -> Result:
        """Do what ``request`` asks -> what to answer. Raises EngineStuck or MemoryGone, after which only close() is
        left."""
        self.rings.answers_read()
        handler = Backend._memory_known if request.row is MEMORY_KNOWN else _HANDLERS.get(request.kind)
        try:
            if handler is None:
                self.rings.settle(self.session.after(request))
            answer = handler(self, request) if handler is not None else None
            if self.control is not None:
                self.control.settle()
            self.iommu.ask(self.session.state)
            return answer if isinstance(answer, Result) else Result.ok(answer)
        except (SetupError, PortError, StateError, CutOff, Refuse) as reason:
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
            self.rings.settle(self.session.after(request))

    def _memory_known(self, request: Accepted) -> None:
        self.postcopy.known()
        self.rings.settle(self.session.after(request))

    def _rem_mem_reg(self, request: Accepted) -> None:
        left = self.session.after(request).regions
        if not any(region.same_place(request.payload) for region in left):
            self._change_memory(lambda: self.memory.remove(self._addressed(request.payload)))

    def _change_memory(self, change: Callable[[], list[int]]) -> None:
        """Do ``change``, which answers the rings that lost their memory. Translations name the memory there was, so
        they go with it, and rings behind an IOMMU wait for new ones."""
        state = self.session.state
        if not self.iommu.on(state):
            self.rings.lost(change())
            return
        with self.engine.paused():
            self.iommu.forget(state)
            self.rings.settle(state)
            change()
        self.rings.settle(state)

    def _iotlb_msg(self, request: Accepted) -> None:
        message, state, memory = request.payload, self.session.state, self.memory.table
        update = message.kind == IotlbType.UPDATE
        if update and memory is None:
            raise Refuse("no guest memory was shared that a translation could be about")
        if update and self.iommu.knows(memory, message):
            return
        with self.engine.paused():
            # An update replaces what it overlaps; a ring that ran on that stops in between.
            self.iommu.forget(state, message.iova, message.size)
            self.rings.settle(state)
            if update:
                self.iommu.update(memory, message)
                self.rings.settle(state)

    def _set_protocol_features(self, request: Accepted) -> None:
        self.dirty.explain(self.session.offer, request.payload.value)
        if not self.inband.on(self.session.after(request)):
            self.inband.drop()

    def _reset_device(self, request: Accepted) -> None:
        self.rings.settle(self.session.after(request))
        if self.control is not None:
            self.control.reset()

    def _set_status(self, request: Accepted) -> None:
        if request.payload.value:
            self.rings.settle(self.session.after(request))
        else:
            self._reset_device(request)

    def _set_log_base(self, request: Accepted) -> None:
        log = request.payload
        with self.dirty.replaced(request.fds[0], log.size, log.offset):
            self.rings.settle(self.session.after(request))

    def _set_log_fd(self, request: Accepted) -> None:
        """A back-end may signal it when it marked something, and need not: QEMU looks into the log by itself."""
        if not is_eventfd(request.fds[0]):
            raise Refuse("the log descriptor is no eventfd")

    def _set_device_state_fd(self, request: Accepted) -> int:
        self.state.begin(request.payload.direction, request.fds.take(), self.session.state)
        return STATE_NOFD

    def _check_device_state(self, request: Accepted) -> int:
        self.state.check()
        return 0

    def _postcopy_end(self, request: Accepted) -> None:
        self.postcopy.end()
        self.rings.settle(self.session.after(request))

    def _set_vring_base(self, request: Accepted) -> None:
        self.rings.begin_at(request.payload.index, request.payload.num)

    def _get_vring_base(self, request: Accepted) -> int:
        base = self.rings.stop(request.payload.index)
        self.rings.settle(self.session.after(request, base))
        self.rings.answered(request.payload.index)
        return base

    def _set_vring_kick(self, request: Accepted) -> None:
        if len(request.fds) and not is_eventfd(request.fds[0]):
            raise Refuse("the kick descriptor is no eventfd")
        self._swap_fd(request, "kick", lambda: self.rings.settle(self.session.after(request)))

    def _vring_kick(self, request: Accepted) -> None:
        self.rings.settle(self.session.after(request))
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
                if self.control is not None:
                    self.control.forget(unused)
                os.close(unused)

    def _send_rarp(self, request: Accepted) -> None:
        now = time.monotonic()
        if now - self._last_rarp >= RARP_INTERVAL:
            self._last_rarp = now
            self.port.announce(request.payload.value.to_bytes(8, "little")[:6])

    def _set_backend_req_fd(self, request: Accepted) -> None:
        if not self.reverse.suits(request.fds[0]):
            raise Refuse("the descriptor is neither a socket nor a pipe")
        self.reverse.adopt(request.fds.take())
        with self.engine.paused():  # rings that wait for an answer look again, and it is asked for anew
            self.iommu.channel_changed()
        self.inband.channel_changed()
        self.rings.settle(self.session.state)
        if self.config is not None:
            self.config.channel_changed()

    @property
    def commands_due(self) -> float | None:
        """When the control queue is to be looked at (``time.monotonic``); None: when it is kicked, or never."""
        return self.control.deadline if self.control is not None else None

    # ------------------------------------------------------------------------------ news

    def translations_missing(self) -> None:
        """Rings wait for translations: have the front-end asked."""
        if self.memory.table is not None:
            self.iommu.missing(self.session.state, self.memory.table)

    def access_denied(self) -> None:
        """Chains were dropped for what the guest's IOMMU does not allow."""
        self.iommu.denied()

    # ------------------------------------------------------------------------- handing on

    def let_go(self) -> None:
        """Another process goes on with the session: give up what it consists of, and tell nobody."""
        fds = self.rings.fds()
        self.engine.reset()
        self.memory.close()
        self.dirty.close()
        self.reverse.drop()
        for fd in fds:
            os.close(fd)

    # ----------------------------------------------------------------------------- close

    def close(self) -> None:
        """End of the session: nothing of it is left in the engine, the port or the file table."""
        self.state.close()
        self.postcopy.close()
        self.inband.close()
        if self.control is not None:
            self.control.close()
        fds = self.rings.fds()
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
            self.rings.release()
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
    Request.RESET_DEVICE: Backend._reset_device,
    Request.SET_STATUS: Backend._set_status,
    # The gates of these two let nothing through without a configuration space of ours.
    Request.GET_CONFIG: lambda backend, request: backend.config.read(request.payload),
    Request.SET_CONFIG: lambda backend, request: backend.config.write(request.payload),
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
