"""The successor's side of an upgrade in place (vdev/upgrade.py tells how it goes).

Everything is adopted twice: once as a rehearsal, which brings the code in, finds out whether it works here at all, and
is thrown away; and once for real, while frames stand still. What is adopted does not run before ``ready`` could be
sent, and until then nothing that is released here is undone: it is the other process's.
"""

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from ring.errors import RingError
from ring.guestmem import DEFAULT_POLICY
from vdev.config import DaemonConfig, DeviceConfig
from vdev.connection import Connection
from vdev.device import Device
from vdev.errors import Failure
from vdev.handover import Channel, Gone, HandoverError, Parcel
from vdev.listen import Listener, peer_is_trusted, peer_pid, peer_uid
from vdev.logs import EventLog
from vdev.plain import from_plain
from vdev.ports.base import PortError
from vdev.ports.spec import parse_port
from vdev.service import Service
from vdev.upgrade import ANSWER_SECONDS, PREPARE_SECONDS, ConfigPart, EverythingPart, ServedPart
from vdev.workers import Workers
from vhost_user.errors import PeerError

# What may come of a state that another version, or no vdev at all, has made up.
_UNUSABLE = (ValueError, TypeError, KeyError, IndexError, OverflowError, OSError, RingError, PortError, PeerError,
             MemoryError)


EnterSandbox = Callable[[Sequence[Device], Iterable[Listener]], None]


@dataclass
class Adopted:
    """One device, and all that was handed over with it."""

    config: DeviceConfig
    listener: Listener | None
    log: EventLog
    device: Device
    sock: socket.socket | None
    connection: Connection | None
    part: ServedPart

    def give_to(self, service: Service) -> None:
        """Have ``service`` go on where it was: with a session, between two, or after the last."""
        if self.part.finished:
            service.retire()
        if self.sock is not None:
            service.adopt(self.part.session, self.sock, self.connection, self.part.counters)

    def let_go(self) -> None:
        """Release it without undoing anything."""
        if self.connection is not None:
            self.connection.let_go()
        self.device.let_go()
        if self.listener is not None:
            self.listener.sock.close()


@dataclass
class Everything:
    """A daemon that was taken over; it does not run yet."""

    devices: list[Adopted]
    upgrade: Listener
    paused_at: float

    def listeners(self) -> list[Listener]:
        """All that listen."""
        return [self.upgrade, *(adopted.listener for adopted in self.devices if adopted.listener is not None)]

    def let_go(self) -> None:
        """Release it without undoing anything."""
        for adopted in self.devices:
            adopted.let_go()
        self.upgrade.sock.close()


class Takeover:
    """Takes over from the daemon that listens at ``config.upgrade_from``.

    ``pid`` is its process. :meth:`adopt` gets everything, :meth:`commit` says so; in between the other one waits.
    The constructor raises Failure.
    """

    def __init__(self, config: DaemonConfig) -> None:
        self._config = config
        path = config.upgrade_from
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(path)
        except OSError as error:
            sock.close()
            raise Failure(f"--upgrade-from {path}: no vdev can be reached there: {error.strerror}; it must run with "
                          f"--upgrade-path {path}") from None
        self._channel = Channel(sock)
        self.pid = peer_pid(sock)
        if not peer_is_trusted(sock):
            self._channel.close()
            raise Failure(f"--upgrade-from {path}: user {peer_uid(sock)} listens there, whom this process does not "
                          "trust; run it as the same user")

    def adopt(self, enter_sandbox: EnterSandbox) -> Everything:
        """Rehearse, and then take everything over. In between, while frames still move, ``enter_sandbox`` gets the
        devices and the listeners of the rehearsal. Raises Failure; the other daemon goes on then."""
        try:
            self._channel.budget(ANSWER_SECONDS)
            self._channel.send("hello")
            self._channel.budget(PREPARE_SECONDS)
            rehearsed = self._received("rehearsal")
            rehearsed.let_go()
            enter_sandbox([adopted.device for adopted in rehearsed.devices], rehearsed.listeners())
            self._channel.budget(PREPARE_SECONDS)
            self._channel.send("prepared")
            everything = self._received("state")
            for adopted in everything.devices:
                adopted.device.start_workers()
            return everything
        except (HandoverError, Failure, OSError, RingError) as error:
            with contextlib.suppress(HandoverError):
                self._channel.send("failed", why=str(error))
            raise self._failure(error) from None

    def commit(self) -> None:
        """Say ``ready``: from then on this process serves. Raises Failure when the other one has gone on."""
        try:
            self._channel.budget(ANSWER_SECONDS)
            self._channel.send("ready")
        except Gone:
            # It hung up. A daemon that goes on said so before; one that died can only be succeeded.
            try:
                self._channel.expect("withdrawn")
            except Gone:
                return
            except HandoverError as error:
                raise self._failure(error) from None
            late = HandoverError("it waited too long for this one and went on by itself; try again")
            raise self._failure(late) from None
        except HandoverError as error:
            raise self._failure(error) from None
        finally:
            self._channel.close()

    def _failure(self, error: Exception) -> Failure:
        return Failure(f"--upgrade-from {self._config.upgrade_from}: not taken over: {error}")

    def _received(self, say: str) -> Everything:
        message, parcel = self._channel.expect(say)
        try:
            return self._build(message.get("state"), parcel)
        except _UNUSABLE as error:
            raise HandoverError(f"what was handed over cannot be used: {type(error).__name__}: {error}") from None
        finally:
            parcel.close()

    def _build(self, state: object, parcel: Parcel) -> Everything:
        part = from_plain(EverythingPart, state)
        self._compare(part)
        workers = Workers.of(self._config)
        adopted = [self._device(device, workers, parcel) for device in part.devices]
        return Everything(adopted, Listener.adopt(part.upgrade, parcel.take), part.paused_at)

    def _device(self, part: ServedPart, workers: Workers, parcel: Parcel) -> Adopted:
        config = _config(part.config)
        log = EventLog(config.name)
        sock = None if part.session is None else socket.socket(fileno=parcel.take(part.session.socket))
        if (sock is None, sock is None) != (part.device.connection is None, part.counters is None):
            raise ValueError(f"{config.name}: half a session")
        policy = replace(DEFAULT_POLICY, keep_files=True)
        device, connection = Device.adopt(part.device, config, log, policy, workers, parcel.take, sock)
        listener = None if part.listener is None else Listener.adopt(part.listener, parcel.take)
        return Adopted(config, listener, log, device, sock, connection, part)

    def _compare(self, part: EverythingPart) -> None:
        """Raise HandoverError where this process was told something else than the other."""
        asked = self._config.upgrade_path
        if asked is not None and os.path.abspath(asked) != part.upgrade.path:
            raise HandoverError(f"--upgrade-path is {part.upgrade.path} there; leave it out, it is taken over too")
        if not self._config.devices:
            return
        if len(self._config.devices) != len(part.devices):
            raise HandoverError(f"{len(part.devices)} devices run there, {len(self._config.devices)} are asked for "
                                "here; leave them out, or give the same ones")
        for ours, theirs in zip(self._config.devices, part.devices, strict=True):
            _compare(ConfigPart.of(ours), theirs.config)


def _compare(ours: ConfigPart, theirs: ConfigPart) -> None:
    for field in ("name", "socket", "client", "port", "queue_pairs", "features", "personality"):
        mine, running = getattr(ours, field), getattr(theirs, field)
        if mine != running and not (mine is None and field in ("port", "queue_pairs")):
            raise HandoverError(f"{theirs.name}: {field.replace('_', '-')} is {running} in the vdev that runs, {mine} "
                                "here; leave the options of devices out, or give the same")


def _config(part: ConfigPart) -> DeviceConfig:
    """The configuration that ``part`` was made from. Raises ValueError."""
    return DeviceConfig(part.name, part.socket, part.fd, part.client, port=part.port and parse_port(part.port),
                        queue_pairs=part.queue_pairs, features=part.features, personality=part.personality)


def milliseconds_since(paused_at: float) -> float:
    """How long frames have stood still."""
    return (time.monotonic() - paused_at) * 1000
