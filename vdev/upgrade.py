"""The running side of an upgrade in place: hands everything to another vdev, or goes on as before.

Theory of operation
-------------------
The successor (vdev/takeover.py) connects to the socket of ``--upgrade-path`` and says ``hello``. What follows, with who
says it::

    old  rehearsal   all of the state and all descriptors, while traffic goes on
    new  prepared    it has adopted all of that and thrown it away again: its code is loaded and it knows how
    old  state       the devices are paused; the same once more, exact now
    new  ready       it has adopted it, and runs from here on
                     the old one lets go and ends

Frames stand still from the pause to ``ready`` only. The sockets, the eventfds and the memory are the same as before,
so the front-end and the guest see a pause and nothing else.

Who runs the rings is decided by ``ready`` alone, and both sides agree about it: the new one runs when its ``ready``
could be sent; the old one resumes after it has hung up, so that nothing more can be sent, and found no ``ready`` among
what came before. That holds for a successor that dies, says nonsense, or is too late. If the old one dies instead, once
the state is on its way, the successor finds the connection closed without a ``withdrawn`` and runs.

Whoever is connected must run as the same user, or as root: it is given the memory of the guests.
"""

import contextlib
import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

from ring.errors import RingError
from ring.pump import FlowStats
from vdev.config import DeviceConfig
from vdev.device import Device, DevicePart
from vdev.engine import EngineStuck
from vdev.features_option import FeatureEdit
from vdev.handover import Channel, HandoverError, Parcel, Put, undisturbed
from vdev.listen import Listener, ListenerPart, peer_is_trusted, peer_pid, peer_uid
from vdev.logs import EventLog
from vdev.loop import Loop, Timer
from vdev.plain import to_plain
from vdev.service import Service, SessionPart

ANSWER_SECONDS = 1.0  # for what is said while frames stand still, and for sending the rehearsal
PREPARE_SECONDS = 30.0  # for a successor that loads its code


@dataclass(frozen=True)
class ConfigPart:
    """What a device was told to be, in so far as its successor has to be told the same. port: None for the default."""

    name: str
    socket: str | None
    fd: int | None
    client: bool
    port: str | None
    queue_pairs: int | None
    features: FeatureEdit
    personality: str

    @classmethod
    def of(cls, config: DeviceConfig) -> "ConfigPart":
        """The part of ``config``, in which the number of queue pairs is settled."""
        return cls(config.name, config.socket_path, config.fd, config.client, config.port and str(config.port),
                   config.queue_pairs, config.features, config.personality)


@dataclass(frozen=True)
class ServedPart:
    """One device with all that belongs to it."""

    config: ConfigPart
    listener: ListenerPart | None
    device: DevicePart
    session: SessionPart | None
    counters: tuple[FlowStats, FlowStats] | None
    finished: bool


@dataclass(frozen=True)
class EverythingPart:
    """A daemon. paused_at: ``time.monotonic()`` when its frames began to stand still."""

    devices: tuple[ServedPart, ...]
    upgrade: ListenerPart
    paused_at: float


@dataclass
class Served:
    """One device of the running daemon. listener: None where it has none."""

    config: DeviceConfig
    listener: Listener | None
    device: Device
    service: Service

    def export(self, put: Put) -> ServedPart:
        """All of it, for a successor. Raises HandoverError."""
        return ServedPart(ConfigPart.of(self.config), self.listener and self.listener.export(put),
                          self.device.export(put), self.service.export(put), self.service.counters,
                          self.service.finished)


class Upgrades:
    """Waits on ``listener`` for a successor and hands ``served`` to it. Then ``on_handed_over(pid)`` is called, and
    nothing of ``served`` is left here but listening sockets, whose paths are the successor's."""

    def __init__(self, listener: Listener, served: list[Served], loop: Loop, log: EventLog,
                 on_handed_over: Callable[[int | None], None]) -> None:
        self._listener = listener
        self._served = served
        self._loop = loop
        self._log = log
        self._on_handed_over = on_handed_over
        self._channel: Channel | None = None
        self._pid: int | None = None
        self._timer: Timer | None = None

    def open(self) -> None:
        """Begin to wait."""
        self._loop.watch(self._listener.fileno(), self._accept)

    def close(self) -> None:
        """Wait no more; whoever is being prepared is left alone."""
        self._loop.unwatch(self._listener.fileno())
        self._drop()

    def _accept(self) -> None:
        try:
            sock = self._listener.accept()
        except OSError as error:
            self._log.peer(logging.WARNING, "upgrade-failed", f"cannot accept a successor: {error.strerror}")
            return
        if sock is None:
            return
        channel = Channel(sock)
        channel.budget(ANSWER_SECONDS)
        if not peer_is_trusted(sock):
            self._refuse(channel, sock, f"runs as user {peer_uid(sock)}, which is neither root nor this vdev's user; "
                         "run it as the same user")
        elif self._channel is not None:
            self._refuse(channel, sock, f"came while process {self._pid} is taking over; try again later")
        else:
            self._channel, self._pid = channel, peer_pid(sock)
            self._loop.watch(channel.fileno(), self._hear)
            self._timer = self._loop.call_later(PREPARE_SECONDS, self._too_slow)

    def _refuse(self, channel: Channel, sock: socket.socket, why: str) -> None:
        self._log.peer(logging.WARNING, "upgrade-refused", f"process {peer_pid(sock)} may not take over: it {why}")
        with contextlib.suppress(HandoverError):
            channel.send("failed", why=f"the running vdev refused: this process {why}")
        channel.close()

    def _too_slow(self) -> None:
        self._fail(f"it did not get ready within {PREPARE_SECONDS:.0f} s")

    def _fail(self, why: str) -> None:
        self._log.peer(logging.WARNING, "upgrade-failed", f"process {self._pid} did not take over, going on as before: "
                       f"{why}")
        self._drop()

    def _drop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._channel is not None:
            self._loop.unwatch(self._channel.fileno())
            self._channel.close()
        self._channel = self._timer = None

    # ------------------------------------------------------------------------------------ the talk

    def _hear(self) -> None:
        self._channel.budget(ANSWER_SECONDS)
        try:
            message, parcel = self._channel.receive()
            parcel.close()
            if message["say"] == "hello":
                self._send("rehearsal", time.monotonic())
            elif message["say"] == "prepared":
                self._hand_over()
            elif message["say"] == "failed":
                raise HandoverError(str(message.get("why")))
            else:
                raise HandoverError(f"it said {message['say']!r}, which nobody understands here")
        except (HandoverError, OSError, RingError) as error:
            with contextlib.suppress(HandoverError):
                self._channel.send("withdrawn", why=str(error))
            self._fail(str(error))

    def _send(self, say: str, paused_at: float) -> None:
        parcel = Parcel()
        devices = tuple(served.export(parcel.put) for served in self._served)
        state = EverythingPart(devices, self._listener.export(parcel.put), paused_at)
        self._channel.send(say, parcel.fds, state=to_plain(state))

    def _hand_over(self) -> None:
        """Pause, pass everything on, and let go if the successor is ready. Raises what keeps it from that; then
        everything runs as before."""
        paused_at = time.monotonic()
        with contextlib.ExitStack() as pauses:
            pauses.enter_context(undisturbed())
            for served in self._served:
                try:
                    pauses.enter_context(served.device.engine.paused())
                except EngineStuck as stuck:
                    served.service.abort(f"{stuck}; closing")
                    raise HandoverError(str(stuck)) from None
            self._send("state", paused_at)
            self._await_ready()
            # No way back from here: what follows must not fail, and touches nothing the successor uses.
            for served in self._served:
                served.service.let_go()
        for served in self._served:
            served.device.let_go()
        pid = self._pid
        self.close()
        self._on_handed_over(pid)

    def _await_ready(self) -> None:
        """Raises HandoverError when the successor does not run, and never will."""
        try:
            self._channel.expect("ready")
        except HandoverError:
            with contextlib.suppress(HandoverError):
                self._channel.budget(ANSWER_SECONDS)
                self._channel.send("withdrawn")
            self._channel.hang_up()
            try:
                self._channel.expect("ready")
            except HandoverError:
                pass
            else:
                return
            raise
