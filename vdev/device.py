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
from vdev.net import offer
from vdev.ports.base import Port
from vhost_user.state import Offer

# As many as QEMU asks for; the answer may never shrink, or a front-end that reconnects refuses us.
MEM_SLOTS = 509


class Device:
    """Lives as long as the daemon; takes over ``port`` and ``journal``. ``config.queue_pairs`` is set and suits it."""

    def __init__(self, name: str, port: Port, config: DeviceConfig, log: EventLog, journal: Journal | None = None):
        self.name = name
        self.port = port
        self._log = log
        pairs = config.queue_pairs
        self.engine = Engine(port, pairs, journal)
        audience = offer.Audience(config.personality)
        features = offer.virtio_features(port.carries, pairs, config.features.remove)
        self.offer = Offer(features, offer.protocol_features(features), rings=2 * pairs,
                           queue_num=audience.queue_num(pairs), max_mem_slots=MEM_SLOTS)
        self._connection: Connection | None = None
        for note in port.notes:
            log.info("port", note)

    def open_session(self, sock: socket.socket) -> Connection:
        """Serve the front-end at the other end of ``sock``, the only one now."""
        self._connection = Connection(
            sock, lambda session: Backend(session, self.engine, self.port, self._log), self.offer, self._log)
        return self._connection

    def watches(self) -> list[tuple[int, Callable[[], None]]]:
        """(descriptor, callback when it is readable) pairs; a callback raises PeerError to end the session."""
        return [(self.engine.report_fd, self._on_news), *self.port.watches()]

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
        self.port.close()
