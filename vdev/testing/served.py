"""A real device in this process, served on a thread of its own, with a port whose far side a test holds.

Everything is the product's - service, connection, backend, engine, pump - but the process and the socket's
path. WirePort is the port: ``wire[n]`` is the network side of queue pair n, and what the device told the
port is recorded.
"""

import contextlib
import os
import queue
import socket
import threading
from pathlib import Path
from types import TracebackType

from ring.journal import Journal
from vdev.config import DeviceConfig
from vdev.device import Device
from vdev.features_option import FeatureEdit
from vdev.logs import EventLog
from vdev.loop import Loop
from vdev.net.features import OFFLOADS
from vdev.ports.base import Carries, Ends
from vdev.ports.sockets import SocketPort
from vdev.postcopy import Arrivals
from vdev.service import Service
from vdev.switches import Switches
from vdev.testing.netdriver import NetHeader
from vdev.testing.scripted import ScriptedGuest
from vdev.userfault import UserfaultSource
from vdev.workers import Workers

WAIT = 30.0  # seconds until a test gives up
FRAME = bytes.fromhex("52540012345602000000000188b5") + bytes(range(100))


class WirePort(SocketPort):
    """Frames go to ``wire[pair]`` and come from there, each a message of net header and frame.

    told: what the device said, in order: ("offloads", mask), ("enable", pair, bool), ("announce", mac).
    """

    def __init__(self, queue_pairs: int = 1, offloads: int = OFFLOADS) -> None:
        super().__init__(queue_pairs)
        self.carries = Carries(12, offloads, queue_pairs)
        self.told: list[tuple] = []
        self.comes_back = False

    def __str__(self) -> str:
        return "wire:"

    @property
    def wire(self) -> list[socket.socket]:
        """The network's side of each queue pair."""
        return self.near

    def ends(self, pair: int) -> Ends:
        return Ends(self.far[pair].fileno(), self.far[pair].fileno())

    def set_offloads(self, features: int) -> None:
        self.told.append(("offloads", features))

    def enable(self, pair: int, enabled: bool) -> None:
        self.told.append(("enable", pair, enabled))

    def announce(self, mac: bytes) -> None:
        self.told.append(("announce", mac))

    def cut(self) -> None:
        """The network's side of pair 0 disappears: the pump sees a port that is gone."""
        self.near[0].close()

    def lost(self) -> bool:
        """Comes back as a new pair of sockets once ``comes_back`` is set."""
        if not self.comes_back:
            return False
        fresh = WirePort(1)
        self.far[0].close()
        self.near[0], self.far[0] = fresh.near[0], fresh.far[0]
        return True


class ServedDevice:
    """A device with ``port`` and as many queue pairs as it carries; a context manager.

    removed: mask of features not to offer. journal: the path of its journal, if it is to have one. personality: as for
    --personality. postcopy: offer it (OSError where it cannot be had). workers: those of a daemon. lint: as for --lint.
    ``log`` collects (event, text) of its log lines.
    """

    def __init__(self, port: WirePort | None = None, removed: int = 0, journal: Path | None = None,
                 personality: str = "qemu-net", postcopy: bool = False, workers: Workers | None = None,
                 lint: str = "off") -> None:
        self.port = port or WirePort()
        self.log: list[tuple[str, str]] = []
        config = DeviceConfig("test", fd=0, queue_pairs=self.port.carries.queue_pairs,
                              features=FeatureEdit(remove=removed), personality=personality, lint=lint)
        self.failures: list[Exception] = []
        self._loop = Loop(self.failures.append)
        self._log = _Recorder(self.log)
        self._switches = Switches(workers or Workers()) if personality == "full" else None
        port = self.port
        if self._switches is not None:
            port = self._switches.wired(self.port, "test", config.queue_pairs, self._log)
        self.device = Device("test", port, config, self._log,
                             journal and Journal(str(journal), 2 * config.queue_pairs),
                             arrivals=Arrivals(UserfaultSource()) if postcopy else None, workers=workers)
        self.device.start_workers()
        if self._switches is not None:
            self._switches.start(self._loop)
        self._source = _Handed()
        self._service = Service(self._loop, self.device, self._source, self._log, False, self._loop.stop)
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._loop.watch(self._wake, self._run_tasks)
        self._service.open()
        self._thread = threading.Thread(target=self._loop.run, daemon=True)
        self._thread.start()

    def connect(self) -> socket.socket:
        """A front-end's end of a new connection."""
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self.call(lambda: self._source.deliver(theirs))
        return ours

    def call(self, task):
        """Run ``task`` on the device's thread between two events -> what it returned."""
        answer: queue.SimpleQueue = queue.SimpleQueue()
        self._tasks.put((task, answer))
        os.eventfd_write(self._wake, 1)
        result, error = answer.get(timeout=WAIT)
        if error is not None:
            raise error
        return result

    def _run_tasks(self) -> None:
        os.eventfd_read(self._wake)
        with contextlib.suppress(queue.Empty):
            while True:
                task, answer = self._tasks.get_nowait()
                try:
                    answer.put((task(), None))
                except Exception as error:
                    answer.put((None, error))

    def lines(self, event: str) -> list[str]:
        """The log lines of ``event`` so far."""
        return [text for name, text in self.log if name == event]

    def wait_for(self, event: str, count: int = 1) -> str:
        """Wait for the ``count``-th log line of ``event`` -> its text. Raises TimeoutError."""
        if not self._log.arrived.wait_for(event, count):
            raise TimeoutError(f"no {event!r} within {WAIT} s; the log: {self.log}")
        return self.lines(event)[count - 1]

    def close(self) -> None:
        """End session, device and thread. Raises what an event of the loop raised."""
        if self._thread.is_alive():
            self.call(self._service.close)
            self.call(self._loop.stop)
            self._thread.join(WAIT)
            self.device.close()
            if self._switches is not None:
                self._switches.close()
            self._loop.close()
            os.close(self._wake)
        for failure in self.failures:
            raise failure

    def __enter__(self) -> "ServedDevice":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        self.close()


def receive(wire: socket.socket, seconds: float = WAIT) -> bytes:
    """The next frame on the network's side, without its header. Raises TimeoutError."""
    wire.settimeout(seconds)
    try:
        return wire.recv(1 << 17)[NetHeader.SIZE:]
    finally:
        wire.setblocking(False)


def both_ways(served: ServedDevice, guest: ScriptedGuest, pair: int = 0) -> None:
    """Send FRAME each way on ``pair``. Raises AssertionError or TimeoutError when one does not arrive."""
    driver = guest.drivers[pair]
    driver.transmit(FRAME)
    assert receive(served.port.wire[pair]) == FRAME
    assert driver.reclaim_all(5)
    served.port.wire[pair].send(NetHeader().pack() + FRAME)
    received = driver.receive_within(5)
    assert received is not None and received.frame == FRAME


class _Handed:
    """A Source of connections that a test makes."""

    ends = False

    def open(self, deliver) -> None:
        self.deliver = deliver

    def vacant(self) -> None:
        pass

    def close(self) -> None:
        pass


class _Arrivals:
    """Lets one thread wait for what another notes."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._changed = threading.Condition()

    def note(self, event: str) -> None:
        with self._changed:
            self._counts[event] = self._counts.get(event, 0) + 1
            self._changed.notify_all()

    def wait_for(self, event: str, count: int) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._counts.get(event, 0) >= count, WAIT)


class _Recorder(EventLog):
    """An EventLog that also keeps every line, before levels and limits."""

    def __init__(self, lines: list[tuple[str, str]]) -> None:
        super().__init__("test")
        self._lines = lines
        self.arrived = _Arrivals()

    def peer(self, level: int, event: str, text: str, **fields: object) -> None:
        self._note(event, text)

    def _write(self, level: int, event: str, text: str, fields: dict) -> None:
        self._note(event, text)

    def _note(self, event: str, text: str) -> None:
        self._lines.append((event, text))
        self.arrived.note(event)
