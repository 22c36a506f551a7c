"""The daemon's life: everything is opened or nothing is, served until a signal or the last session, released.

Order at the start: sockets are made but not seen yet (a path in use is the likeliest mistake, and nothing
should have been touched when it is found), then ports and devices, then the sockets appear, then whoever
started us is told. At the end the same backwards. Never a fork: whoever starts us keeps us (vhost-user,
"Backend program conventions").
"""

import contextlib
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import replace

from vdev import listen, notify
from vdev.config import DaemonConfig, DeviceConfig
from vdev.errors import Failure
from vdev.logs import EventLog
from vdev.loop import Loop
from vdev.net import offer
from vdev.net.features import names
from vdev.ports.base import Port
from vdev.ports.spec import TapSpec
from vdev.service import Device, Service
from vdev.sources import Accepting, Connecting, Inherited, Source

# SIGHUP and the user signals ask some daemons to reload or to reopen logs. There is nothing to reload, and a
# guest's network must not end because a terminal or a log rotation sent one.
IGNORED = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
ENDING = (signal.SIGTERM, signal.SIGINT)

# An idle queue pair costs nothing, and a guest with more processors than pairs is slowed down.
TAP_QUEUE_PAIRS = 8

OpenDevice = Callable[[DeviceConfig, EventLog], Device]


def open_device(config: DeviceConfig, log: EventLog) -> Device:
    """The device that ``config`` describes, its port open. Raises Failure."""
    # Here, not above: these bring in the C core and netlink, which a wrong command line need not wait for.
    try:
        from ring.errors import RingError
        from vdev.device import Device
        from vdev.journal import open_journal
        from vdev.ports import PortError, open_port
        from vdev.ports.tap import Tap
    except ImportError as error:
        raise Failure(f"vdev is not complete here: {error}") from None

    maybe_tap = config.port is None or isinstance(config.port, TapSpec)
    try:
        port = open_port(config.port, config.queue_pairs or (TAP_QUEUE_PAIRS if maybe_tap else 1))
    except PortError as error:
        raise Failure(str(error)) from None
    try:
        default = port.carries.queue_pairs if isinstance(port, Tap) else 1
        settled = fitted(config, port, default)
        return Device(config.name, port, settled, log, open_journal(settled, log))
    except BaseException as error:
        port.close()
        if isinstance(error, RingError | OSError | MemoryError):
            raise Failure(f"{config.name}: the device cannot be made: {error}") from None
        raise


def fitted(config: DeviceConfig, port: Port, default_pairs: int) -> DeviceConfig:
    """``config`` with its number of queue pairs settled, if ``port`` carries all that it insists on.

    Raises Failure.
    """
    pairs = config.queue_pairs or default_pairs
    if pairs > port.carries.queue_pairs:
        most = port.carries.queue_pairs
        raise Failure(f"{port} carries {most} queue pairs, not {pairs}; give --queue-pairs {most}")
    missing = config.features.add & ~offer.virtio_features(port.carries, pairs, config.features.remove)
    if missing:
        listed = ", ".join(names(missing)).lower()
        raise Failure(f"--features: {listed} cannot be offered: {port} with {pairs} queue pairs does not "
                      "carry it, or what it needs was taken out; leave it out")
    return replace(config, queue_pairs=pairs)


class Daemon:
    """One process that serves the devices of ``config``. ``open_device`` makes each."""

    def __init__(self, config: DaemonConfig, open_device: OpenDevice = open_device):
        self._config = config
        self._open_device = open_device
        self._log = EventLog()
        self._loop = Loop(lambda exception: self._log.bug("internal-error", "serving an event", exception))
        self._serving = 0

    def run(self) -> None:
        """Serve until SIGTERM, SIGINT, or the last session when there can be no other. Raises Failure when
        something cannot be opened; nothing is left behind then."""
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(self._loop.close)
            self._take_signals()
            for service in self._open(cleanup):
                cleanup.callback(service.close)
                service.open()
            self._tell_ready()
            self._loop.run()
            # A second signal could only disturb an end that is under way.
            signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
            self._tell_manager("STOPPING=1")

    def _take_signals(self) -> None:
        for number in IGNORED:
            signal.signal(number, signal.SIG_IGN)
        for number in ENDING:
            self._loop.on_signal(number, lambda number=number: self._end(signal.Signals(number).name))

    def _end(self, why: str) -> None:
        self._log.info("ending", f"ending: {why}", reason=why)
        self._loop.stop()

    # ------------------------------------------------------------------------------------ start

    def _open(self, cleanup: contextlib.ExitStack) -> list[Service]:
        """A service for each device, not opened yet; ``cleanup`` gets what releases the rest.

        Raises Failure.
        """
        configs = self._config.devices
        if self._config.ready_fd is not None:
            notify.check_ready_fd(self._config.ready_fd)
        sockets = [_socket(config, cleanup) for config in configs]
        logs = [EventLog(config.name) for config in configs]
        devices = []
        for config, log in zip(configs, logs, strict=True):
            device = self._open_device(config, log)
            cleanup.callback(self._release, device)
            devices.append(device)
        services = []
        for config, sock, device, log in zip(configs, sockets, devices, logs, strict=True):
            source = self._source(config, sock, log, cleanup)
            services.append(Service(self._loop, device, source, log, self._config.one_off, self._finished))
        self._serving = len(services)
        return services

    def _source(self, config: DeviceConfig, sock: "_Socket", log: EventLog,
                cleanup: contextlib.ExitStack) -> Source:
        if isinstance(sock, listen.Publication):
            if sock.replaced:
                log.info("stale-socket", f"{sock.path}: replaced a socket whose owner is gone",
                         path=sock.path)
            sock = sock.publish()
            cleanup.callback(sock.close)
        if isinstance(sock, listen.Listener):
            return Accepting(sock, self._loop, log)
        if sock is not None:
            return Inherited(sock)
        return Connecting(config.socket_path, self._loop, log)

    def _release(self, device: Device) -> None:
        try:
            device.close()
        except Exception as exception:  # the others still have to be released, and the sockets removed
            self._log.bug("internal-error", "closing a device", exception)

    def _tell_ready(self) -> None:
        line = " ".join(["ready", *map(str, self._config.devices)])
        # Not print(): a reader that went away must not be found again when the interpreter flushes at exit.
        with contextlib.suppress(OSError):
            os.write(1, os.fsencode(line) + b"\n")
        if self._config.ready_fd is not None:
            notify.write_ready_fd(self._config.ready_fd)
        self._tell_manager("READY=1")

    def _tell_manager(self, state: str) -> None:
        try:
            notify.tell_manager(state)
        except OSError as error:
            self._log.warning("notify-failed", f"cannot tell the service manager {state}: {error.strerror}")

    def _finished(self) -> None:
        self._serving -= 1
        if not self._serving:
            self._end("the last session is over")


_Socket = listen.Publication | listen.Listener | socket.socket | None


def _socket(config: DeviceConfig, cleanup: contextlib.ExitStack) -> _Socket:
    """What the device listens on or has inherited; None for a client, which makes its own. Raises Failure."""
    if config.fd is not None:
        inherited = listen.adopt(config.fd)
        cleanup.callback(inherited.close)
        return inherited
    if config.client:
        return None
    publication = listen.Publication(config.socket_path, config.socket_group, config.socket_mode)
    cleanup.callback(publication.close)
    return publication
