"""What a session saves of its device when the guest leaves, and loads when one comes from elsewhere.

vhost-user, "Migrating back-end state". The text is vdev/device_state.py's, the pipe vdev/state_transfer.py's.
"""

import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ring.pump import FlowStats
from vdev import device_state, traffic
from vdev.device_state import StateError
from vdev.engine import Engine
from vdev.logs import EventLog
from vdev.ports.base import Port
from vdev.state_transfer import Transfer
from vhost_user.session import Session
from vhost_user.spec import Direction
from vhost_user.state import State

if TYPE_CHECKING:
    from vdev.control_queue import ControlQueue


@dataclass(frozen=True)
class SessionStatePart:
    """A SessionState as it is handed on. elsewhere: counts as JSON text."""

    before: tuple[FlowStats, FlowStats]
    elsewhere: str | None
    macs: tuple[bytes, ...]
    moved: tuple[bytes, ...]


class SessionState:
    """The state of one session's device. At most one transfer is under way."""

    def __init__(self, engine: Engine, port: Port, session: Session, log: EventLog) -> None:
        self._engine = engine
        self._port = port
        self._session = session
        self._log = log
        self.control: ControlQueue | None = None  # where it is ours
        self._before: tuple[FlowStats, FlowStats] = engine.stats()
        self._elsewhere: traffic.Counts | None = None  # what went through before the guest came here
        self._transfer: Transfer | None = None
        engine.guest_macs()  # another guest's are forgotten
        self._macs: list[bytes] = []
        self._moved: tuple[bytes, ...] = ()  # addresses of a guest that came here and is not announced yet

    @property
    def deadline(self) -> float | None:
        """When :meth:`advance` is due (``time.monotonic``); None: nothing is under way."""
        return self._transfer.deadline if self._transfer else None

    def advance(self) -> None:
        """Move what can be moved now."""
        if self._transfer is not None:
            self._transfer.advance()

    def export(self) -> SessionStatePart:
        """What another process needs to go on; nothing may be under way. Raises EngineStuck."""
        self._macs = self._engine.guest_macs() or self._macs
        return SessionStatePart(self._before, self._elsewhere and json.dumps(self._elsewhere), tuple(self._macs),
                                self._moved)

    def adopt(self, part: SessionStatePart) -> None:
        """Be what another process exported. Raises ValueError."""
        self._before, self._macs, self._moved = part.before, list(part.macs), part.moved
        self._elsewhere = part.elsewhere and json.loads(part.elsewhere)

    def begin(self, direction: int, fd: int, state: State) -> None:
        """SET_DEVICE_STATE_FD: save to ``fd`` or load from it, which is ours from now on. Raises StateError and
        OSError."""
        self.close()
        if direction == Direction.SAVE:
            self._transfer = Transfer(fd, device_state.encode(self._current(state)))
        else:
            self._transfer = Transfer(fd, None, self._load)

    def check(self) -> None:
        """CHECK_DEVICE_STATE: the transfer was a success. Raises StateError if it was none."""
        transfer, self._transfer = self._transfer, None
        if transfer is None:
            raise StateError("no state was transferred; the front-end must send SET_DEVICE_STATE_FD first")
        transfer.advance()
        transfer.close()
        if transfer.failure or not transfer.finished:
            raise StateError(f"the device's state was not {'saved' if transfer.saving else 'loaded'}: "
                             f"{transfer.failure or 'the pipe is not at its end'}")

    def close(self) -> None:
        """Break off what is under way."""
        if self._transfer is not None:
            self._transfer.close()
            self._transfer = None

    def announce(self) -> None:
        """The guest runs here now: tell the network at once where the addresses live that it had elsewhere. A guest
        that announces itself (GUEST_ANNOUNCE) has to be scheduled first, and all that is sent to it until then is lost.
        """
        for mac in self._moved:
            self._port.announce(mac)
        if self._moved and self.control is not None:
            self.control.ask_to_announce()
        self._moved = ()

    @property
    def _kind(self) -> str:
        return str(self._port).partition(":")[0]

    def _current(self, state: State) -> device_state.DeviceState:
        counts = traffic.between(self._before, self._engine.stats())
        if self._elsewhere is not None:
            counts = traffic.added(self._elsewhere, counts)
        self._macs = self._engine.guest_macs() or self._macs
        return device_state.of_session(state, self._macs, counts, {self._kind: self._port.learned()},
                                       self.control.lasting if self.control is not None else None)

    def _load(self, data: bytes) -> None:
        """Take over what a device elsewhere has saved. Raises StateError, and nothing changed."""
        loaded = device_state.decode(data)
        device_state.check(loaded, self._session.offer)
        if self._kind in loaded.port:
            try:
                self._port.recall(loaded.port[self._kind])
            except (ValueError, KeyError, TypeError, AttributeError):
                raise StateError(f"what its port {self._kind} has learned makes no sense") from None
        if self.control is not None and loaded.settings is not None:
            self.control.recall(loaded.settings)
        self._elsewhere = loaded.counters
        self._macs, self._moved = list(loaded.macs), loaded.macs
        self._log.peer(logging.INFO, "state-loaded", "a guest that ran elsewhere comes here; there went through: "
                       f"{traffic.sentence(loaded.counters)}", **loaded.counters)
