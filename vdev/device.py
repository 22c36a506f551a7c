"""A device: a port, the engine that serves it, and what is offered to the front-ends that come and go."""

import socket
from collections.abc import Callable

from ring.journal import Journal
from ring.pump import FlowStats
from vdev.backend import Backend
from vdev.config import DeviceConfig
from vdev.connection import Connection
from vdev.engine import Engine
from vdev.logs import EventLog
from vdev.net.offer import Audience, protocol_features, virtio_features
from vdev.ports.base import Port
from vdev.reverse import ReverseChannel
from vhost_user.spec import Request
from vhost_user.state import Offer

# As many as QEMU asks for; the answer may never shrink, or a front-end that reconnects refuses us.
MEM_SLOTS = 509


class Device:
    """Lives as long as the daemon; takes over ``port`` and ``journal``. ``config.queue_pairs`` is set and suits it."""

    def __init__(self, name: str, port: Port, config: DeviceConfig, log: EventLog, journal: Journal | None = None):
        self.name = name
        self.port = port
        self._log = log
        self.engine = Engine(port, config.queue_pairs, journal)
        self._config = config
        self._reverse = ReverseChannel(log)
        self._connection: Connection | None = None
        for note in port.notes:
            log.info("port", note)

    def offer(self, opening: int) -> Offer:
        """What a front-end is offered whose first message is the request with the number ``opening``."""
        pairs = self._config.queue_pairs
        audience = Audience(self._config.personality, owner_first=opening == Request.SET_OWNER)
        features = virtio_features(self.port.carries, pairs, self._config.features.remove | audience.withheld)
        return Offer(features, protocol_features(features), rings=2 * pairs, queue_num=audience.queue_num(pairs),
                     max_mem_slots=MEM_SLOTS)

    def open_session(self, sock: socket.socket) -> Connection:
        """Serve the front-end at the other end of ``sock``, the only one now."""
        self._connection = Connection(
            sock, lambda session: Backend(session, self.engine, self.port, self._log, self._reverse), self.offer,
            self._log)
        return self._connection

    def watches(self) -> list[tuple[int, Callable[[], None]]]:
        """(descriptor, callback when it is readable) pairs; a callback raises PeerError to end the session."""
        own = [(self.engine.report_fd, self._on_news), (self._reverse.watch_fd, self._on_answers)]
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

    def close(self) -> None:
        """Release engine and port; no session may be left."""
        self.engine.close()
        self._reverse.close()
        self.port.close()
