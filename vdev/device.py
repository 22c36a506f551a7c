"""A device: a port, the engine that serves it, and what is offered to the front-ends that come and go."""

import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ring.guestmem import DEFAULT_POLICY, Policy
from ring.journal import Journal, JournalError
from ring.pump import FlowStats
from ring.receive_settings import ALL_HASH_TYPES, ALL_TUNNEL_TYPES, KEY_SIZE, TABLE_MAX
from vdev import userfault
from vdev.backend import Backend
from vdev.config import DeviceConfig
from vdev.connection import Connection, ConnectionPart
from vdev.engine import Engine, EnginePart
from vdev.handover import HandoverError, Put, Take
from vdev.logs import EventLog
from vdev.net.config_space import ConfigSpace
from vdev.net.features import Feature, mask, names
from vdev.net.mac import mac_of
from vdev.net.offer import Audience, protocol_features, virtio_features
from vdev.ports import adopt_port
from vdev.ports.base import Needs, Port, PortPart
from vdev.postcopy import Arrivals, ArrivalsPart
from vdev.reverse import ReverseChannel
from vdev.workers import Workers
from vhost_user.session import Session
from vhost_user.spec import Request
from vhost_user.state import Offer

if TYPE_CHECKING:
    from vdev.lint.linter import Linter

# As many as QEMU asks for; the answer may never shrink, or a front-end that reconnects refuses us.
MEM_SLOTS = 509
# The step engine asks nobody for translations, and is no member of a switch, where these have their effect.
NOT_LINTED = mask(Feature.ACCESS_PLATFORM, Feature.RSS, Feature.HASH_REPORT, Feature.HASH_TUNNEL)
DEFAULT_MTU = 1500  # bytes: of a port that has no limit of its own


@dataclass(frozen=True)
class DevicePart:
    """A device as it is handed on."""

    port: PortPart
    engine: EnginePart
    connection: ConnectionPart | None
    arrivals: ArrivalsPart | None


class Device:
    """Lives as long as the daemon; takes over ``port``, ``journal`` and ``arrivals`` (None: no postcopy).
    ``config.queue_pairs`` is set and suits it. workers: the daemon's; None: one of its own."""

    def __init__(self, name: str, port: Port, config: DeviceConfig, log: EventLog, journal: Journal | None = None,
                 policy: Policy = DEFAULT_POLICY, arrivals: Arrivals | None = None, workers: Workers | None = None):
        self.name = name
        self.files = [journal.path] if journal is not None else []  # to be removed at the end
        self._arrivals = arrivals
        self.port = port
        self.config = config
        self._log = log
        self._policy = policy
        self.linter = _linter(config, log)
        self.engine = Engine(port, config.queue_pairs, journal, self.linter.turns if self.linter else workers,
                             control_queue=self._is_full)
        self._reverse = ReverseChannel(log)
        self._link_up = True
        self._connection: Connection | None = None
        for note in port.notes:
            log.info("port", note)

    @property
    def _is_full(self) -> bool:
        """Configuration space and control queue are ours."""
        return self.config.personality == "full"

    def offer(self, opening: int) -> Offer:
        """What a front-end is offered whose first message is the request with the number ``opening``."""
        pairs = self.config.queue_pairs
        audience = Audience(self.config.personality, owner_first=opening == Request.SET_OWNER)
        removed = self.config.features.remove | audience.withheld
        if self.linter is not None:
            removed |= NOT_LINTED
        features = virtio_features(self.port.carries, pairs, removed, audience.personality)
        return Offer(features, protocol_features(features, audience, self._arrivals is not None),
                     rings=len(self.engine.rings), queue_num=audience.queue_num(pairs), max_mem_slots=MEM_SLOTS)

    @property
    def failed(self) -> bool:
        """A session was ended because its driver broke a rule (--lint=strict)."""
        return self.linter is not None and self.linter.failed

    @property
    def needs(self) -> list[Needs]:
        """What the port goes on needing in the sandbox, and what guests that arrive do."""
        return [self.port.needs, *([Needs(syscalls=userfault.SYSCALLS)] if self._arrivals is not None else [])]

    @property
    def memory_files(self) -> int:
        """How many files of guest memory stay open at most: none where their mappings are enough."""
        return MEM_SLOTS if self._policy.keep_files else 0

    def start_workers(self) -> None:
        """Start its workers, which have nothing to do yet. Raises OSError, RingError."""
        self.engine.start_workers()

    def open_session(self, sock: socket.socket) -> Connection:
        """Serve the front-end at the other end of ``sock``, the only one now."""
        self._connection = Connection(sock, self._backend_of, self.offer, self._log, linter=self.linter)
        return self._connection

    def _backend_of(self, session: Session) -> Backend:
        backend = Backend(session, self.engine, self.port, self._log, self._reverse, self._policy, self._arrivals,
                          self._space())
        if self.linter is not None and backend.control is not None:
            backend.control.watch = self.linter.command
        return backend

    def _space(self) -> ConfigSpace | None:
        """What a session's configuration space begins with; None where that is the front-end's."""
        config = self.config
        if not self._is_full:
            return None
        return ConfigSpace(config.mac or mac_of(str(config)), config.queue_pairs, self.port.carries.mtu or DEFAULT_MTU,
                           config.speed, self._link_up, key_size=KEY_SIZE, table_length=TABLE_MAX,
                           hash_types=ALL_HASH_TYPES, tunnel_types=ALL_TUNNEL_TYPES)

    def set_link(self, up: bool) -> None:
        """Have the guest's link go up or down, of a device whose configuration space is ours. Raises EngineStuck."""
        if self._link_up == up:
            return
        self._link_up = up
        self.engine.set_link(up)
        self._log.info("link", f"the guest's link is {'up' if up else 'down'}", up=up)
        if self._connection is not None and self._connection.fileno() >= 0:
            self._connection.set_link(up)

    def watches(self) -> list[tuple[int, Callable[[], None]]]:
        """(descriptor, callback when it is readable) pairs; a callback raises PeerError to end the session."""
        own = [(self.engine.report_fd, self._on_news), (self._reverse.watch_fd, self._on_answers)]
        if self.linter is not None:
            own.append((self.linter.turns.fileno(), self.linter.turn))
        return [*own, *self.port.watches()]

    def _on_answers(self) -> None:
        if self._connection is not None and self._connection.fileno() >= 0:
            self._connection.on_answers()

    def _on_news(self) -> None:
        events = self.engine.news()
        if self._connection is not None and self._connection.fileno() >= 0:
            self._connection.on_news(events)

    def stats(self) -> tuple[FlowStats, FlowStats]:
        """(from_guest, to_guest) since the device was made."""
        return self.engine.stats()

    # ------------------------------------------------------------------------- handing on

    def export(self, put: Put) -> DevicePart:
        """What another process needs to go on with this device; exact while the engine is paused. Raises
        HandoverError."""
        connected = self._connection is not None and self._connection.fileno() >= 0
        return DevicePart(self.port.export(put), self.engine.export(put),
                          self._connection.export(put) if connected else None,
                          self._arrivals and self._arrivals.export(put))

    @classmethod
    def adopt(cls, part: DevicePart, config: DeviceConfig, log: EventLog, policy: Policy, workers: Workers,
              take: Take, sock: socket.socket | None) -> tuple["Device", Connection | None]:
        """The device that another process exported, and its session over ``sock``; they run when :meth:`start` is
        called. Raises HandoverError where this one would be less, and what the parts of it raise."""
        try:
            given = part.engine.journal
            journal = given and Journal(given[0], 2 * config.queue_pairs, take(given[1]))
        except JournalError as error:
            raise HandoverError(f"{config.name}: {error}") from None
        arrivals = part.arrivals and Arrivals.adopt(part.arrivals, take)
        device = cls(config.name, adopt_port(part.port, take), config, log, journal, policy, arrivals, workers)
        device.engine.adopt(part.engine, take)
        given = part.connection
        if given is not None:
            device._connection = Connection(sock, device._backend_of, device.offer, log, given.state,
                                            device._opening(given.offer))
            device._connection.adopt(given, part.engine, take)
        return device, device._connection

    def _opening(self, promised: Offer) -> int:
        """The first message of a front-end to which ``promised`` still holds. Raises HandoverError where none is."""
        openings = (Request.GET_FEATURES, Request.SET_OWNER)
        for opening in openings:
            if self.offer(opening).keeps(promised):
                return opening
        raise HandoverError(f"{self.name}: this vdev would offer the guest less than the one that runs "
                            f"({_less(self.offer(openings[0]), promised)}); give it the same options, or stop the one "
                            "and start the other")

    def start(self) -> None:
        """Run what was adopted."""
        self.engine.start()

    def let_go(self) -> None:
        """Another process goes on with the device: release what is ours of it and undo nothing. The session must have
        been let go."""
        self.engine.let_go()
        self._reverse.close()
        self.port.let_go()
        if self._arrivals is not None:
            self._arrivals.close()

    def close(self) -> None:
        """Release engine and port; no session may be left."""
        self.engine.close()
        if self.linter is not None:
            self.linter.close()
        self._reverse.close()
        self.port.close()
        if self._arrivals is not None:
            self._arrivals.close()


def _linter(config: DeviceConfig, log: EventLog) -> "Linter | None":
    if config.lint == "off":
        return None
    from vdev.lint.linter import Linter

    return Linter(log, strict=config.lint == "strict")


def _less(offered: Offer, before: Offer) -> str:
    """What ``before`` had and ``offered`` lacks, for a person."""
    missing = names(before.features & ~offered.features)
    return ", ".join(missing).lower() if missing else "other protocol features or limits"
