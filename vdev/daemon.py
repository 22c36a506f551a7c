"""The daemon's life: everything is opened or nothing is, served until a signal or the last session, released.

Order at the start: sockets are made but not seen yet (a path in use is the likeliest mistake, and nothing
should have been touched when it is found), then ports, then the sockets appear. A front-end can connect from then on;
it waits while the code is loaded that serves it, which is most of the program. Then come the devices, then the sandbox
is closed and the workers start in it, then whoever started us is told. What goes wrong before that ends the program,
and the sockets with it. At the end the same backwards. Never a fork: whoever starts us keeps us (vhost-user, "Backend
program conventions").

A daemon that takes over from another (``--upgrade-from``) opens nothing: it gets all that was open there, and closes
the sandbox between the rehearsal and the pause. And one that was taken over releases nothing, because its successor
uses it.
"""

import contextlib
import os
import signal
import socket
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from vdev import listen, notify
from vdev.config import DaemonConfig, DeviceConfig
from vdev.errors import Failure
from vdev.handover import undisturbed
from vdev.logs import EventLog
from vdev.loop import Loop
from vdev.net import offer
from vdev.net.features import names
from vdev.ports import PortError, open_port
from vdev.ports.base import Port
from vdev.ports.spec import PortSpec, SwitchSpec, TapSpec
from vdev.service import Device, Service
from vdev.sources import Accepting, Connecting, Inherited, Source
from vdev.workers import Workers, check_cpus

if TYPE_CHECKING:
    from vdev.ports.switch import Switch
    from vdev.switches import Switches

# SIGHUP and the user signals ask some daemons to reload or to reopen logs. There is nothing to reload, and a
# guest's network must not end because a terminal or a log rotation sent one.
IGNORED = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# Where a configuration space is ours, they are the operator's way to take the guest's link down and up.
LINK_SIGNALS = {signal.SIGUSR1: False, signal.SIGUSR2: True}
ENDING = (signal.SIGTERM, signal.SIGINT)

# An idle queue pair costs nothing, and a guest with more processors than pairs is slowed down.
TAP_QUEUE_PAIRS = 8

OpenPort = Callable[[PortSpec | None, int, "Switch | None"], Port]


def _make_device(config: DeviceConfig, port: Port, log: EventLog, upgradable: bool, workers: Workers) -> Device:
    """The device that ``config`` describes; it takes over ``port``. upgradable: it can be handed to another process;
    workers: the daemon's. Raises Failure."""
    # Here, not above: these bring in most of the code, for which neither a wrong command line nor a socket need wait.
    try:
        from ring.errors import RingError
        from ring.guestmem import DEFAULT_POLICY
        from vdev.device import Device
        from vdev.journal import open_journal
        from vdev.postcopy import open_arrivals
    except ImportError as error:
        raise Failure(f"vdev is not complete here: {error}") from None

    policy = replace(DEFAULT_POLICY, keep_files=upgradable)
    try:
        return Device(config.name, port, config, log, open_journal(config, log), policy,
                      open_arrivals() if config.postcopy else None, workers)
    except (RingError, OSError, MemoryError) as error:
        raise Failure(f"{config.name}: the device cannot be made: {error}") from None


def fitted(config: DeviceConfig, port: Port) -> DeviceConfig:
    """``config`` with its number of queue pairs settled, if ``port`` carries all that it insists on.

    Raises Failure.
    """
    pairs = config.queue_pairs or port.usual_queue_pairs
    if pairs > port.carries.queue_pairs:
        most = port.carries.queue_pairs
        raise Failure(f"{port} carries {most} queue pairs, not {pairs}; give --queue-pairs {most}")
    offered = offer.virtio_features(port.carries, pairs, config.features.remove, config.personality)
    missing = config.features.add & ~offered
    if missing:
        listed = ", ".join(names(missing)).lower()
        raise Failure(f"--features: {listed} cannot be offered: {port} with {pairs} queue pairs does not "
                      "carry it, or what it needs was taken out; leave it out")
    return replace(config, queue_pairs=pairs)


class Daemon:
    """One process that serves the devices of ``config``. open_port: what opens their ports, as vdev.ports has it."""

    def __init__(self, config: DaemonConfig, open_port: OpenPort = open_port):
        self._config = config
        self._open_port = open_port
        self._workers = Workers.of(config)
        self._switches: Switches | None = None  # where no device has a port of one
        self._log = EventLog()
        self._loop = Loop(lambda exception: self._log.bug("internal-error", "serving an event", exception))
        self._serving = 0
        self._services: list[Service] = []
        self._handed_over = False

    def run(self) -> None:
        """Serve until SIGTERM, SIGINT, or the last session when there can be no other. Raises Failure when
        something cannot be opened; nothing is left behind then."""
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(self._loop.close)
            self._take_signals()
            check_cpus(self._config.cpus)
            services = self._open(cleanup) if self._config.upgrade_from is None else self._take_over(cleanup)
            self._services = services
            for service in services:
                cleanup.callback(service.close)
                service.open()
            self._tell_ready()
            self._loop.run()
            if self._handed_over:
                cleanup.pop_all()
                return
            # A second signal could only disturb an end that is under way.
            signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
            self._tell_manager("STOPPING=1")
            if self._config.one_off and any(service.failed for service in services):
                raise Failure("a session was ended for a rule that its driver broke (--lint=strict)")

    def _take_signals(self) -> None:
        for number in IGNORED:
            signal.signal(number, signal.SIG_IGN)
        for number in ENDING:
            self._loop.on_signal(number, lambda number=number: self._end(signal.Signals(number).name))
        if any(config.personality == "full" for config in self._config.devices):
            for number, up in LINK_SIGNALS.items():
                self._loop.on_signal(number, lambda up=up: self._set_links(up))

    def _set_links(self, up: bool) -> None:
        """The operator switches the links of all guests that read of it in a configuration space of ours."""
        for config, service in zip(self._config.devices, self._services, strict=True):
            if config.personality == "full":
                service.set_link(up)

    def _end(self, why: str) -> None:
        self._log.info("ending", f"ending: {why}", reason=why)
        self._loop.stop()

    # ------------------------------------------------------------------------------------ start

    def _open(self, cleanup: contextlib.ExitStack) -> tuple[list[Device], list[Service]]:
        """All devices, and a service for each, not opened yet; ``cleanup`` gets what releases the rest.

        Raises Failure.
        """
        configs = self._config.devices
        if self._config.ready_fd is not None:
            notify.check_ready_fd(self._config.ready_fd)
        sockets = [_socket(config, cleanup) for config in configs]
        upgrade = None
        if self._config.upgrade_path is not None:
            upgrade = listen.Publication(self._config.upgrade_path, mode=0o600)
            cleanup.callback(upgrade.close)
        self._open_switches(cleanup)
        logs = [EventLog(config.name) for config in configs]
        ports: deque[tuple[DeviceConfig, Port]] = deque()  # those that no device has taken over yet
        cleanup.callback(lambda: [port.close() for _, port in ports])
        for config, log in zip(configs, logs, strict=True):
            ports.append(self._port_of(config, log))
        for number, log in enumerate(logs):
            if isinstance(sockets[number], listen.Publication):
                sockets[number] = self._publish(sockets[number], log, cleanup)
        devices, services = [], []
        for config, sock, log in zip(configs, sockets, logs, strict=True):
            device = _make_device(*ports[0], log, self._config.upgrade_path is not None, self._workers)
            ports.popleft()
            cleanup.callback(self._release, device)
            devices.append(device)
            services.append(self._service(config, sock, device, log))
        self._serving = len(services)
        if upgrade is not None:
            upgrade = self._publish(upgrade, self._log, cleanup)
            self._await_successor(upgrade, sockets, devices, services, cleanup)
        self._enter_sandbox(devices, [*sockets, upgrade])
        for device in devices:
            _start_workers(device)
        if self._switches is not None:
            self._switches.start(self._loop)
        return services

    def _open_switches(self, cleanup: contextlib.ExitStack) -> None:
        """Open the uplinks, if there are switches; a device with a control queue has one to itself. Raises Failure."""
        if not any(isinstance(config.port, SwitchSpec) or config.personality == "full"
                   for config in self._config.devices):
            return
        try:
            from vdev.switches import Switches
        except ImportError as error:
            raise Failure(f"vdev is not complete here: {error}") from None
        self._switches = Switches(self._workers)
        cleanup.callback(self._switches.close)
        try:
            for uplink in self._config.uplinks:
                self._switches.open_uplink(uplink, self._log)
        except PortError as error:
            raise Failure(str(error)) from None

    def _port_of(self, config: DeviceConfig, log: EventLog) -> tuple[DeviceConfig, Port]:
        """``config`` with its number of queue pairs settled, and the port that it describes, open. Raises Failure."""
        maybe_tap = config.port is None or isinstance(config.port, TapSpec)
        try:
            switch = self._switches.named(config.port.name) if isinstance(config.port, SwitchSpec) else None
            if switch is None and config.personality == "full" and config.lint == "off":
                port = self._switches.wired(self._open_port(config.port, 1, None), config.name,
                                            config.queue_pairs or 1, log)
            else:
                port = self._open_port(config.port, config.queue_pairs or (TAP_QUEUE_PAIRS if maybe_tap else 1), switch)
        except PortError as error:
            raise Failure(str(error)) from None
        try:
            return fitted(config, port), port
        except Failure:
            port.close()
            raise

    def _enter_sandbox(self, devices: Sequence[Device], listeners: Iterable[object]) -> None:
        """Give up what is not needed from here on. ``listeners``: those that are of class Listener have a path that is
        removed at the end. Raises Failure."""
        if not self._config.sandbox:
            self._log.warning("sandbox-off", "the sandbox is off: who finds a hole in vdev has all rights of this user;"
                              " leave out --sandbox off unless you debug vdev")
            return
        from vdev import sandbox

        paths = [each.path for each in listeners if isinstance(each, listen.Listener) and each.path is not None]
        paths += [path for device in devices for path in device.files]
        try:
            pairs = sum(device.port.carries.queue_pairs for device in devices) + len(self._config.uplinks)
            # A wire's end at the port, and a control queue.
            pairs += 2 * sum(config.personality == "full" for config in self._config.devices)
            more = sum(device.memory_files for device in devices) + self._workers.descriptors(pairs)
            needs = [need for device in devices for need in device.needs]
            needs += self._switches.needs if self._switches is not None else []
            report = sandbox.enter(pairs, more, [self._workers.needs, *needs], paths)
        except OSError as error:
            raise Failure(f"the sandbox cannot be entered: {error.strerror.lower()}; --sandbox off does without"
                          ) from None
        for line in report.missing:
            self._log.warning("sandbox-incomplete", line)
        self._log.debug("sandbox", str(report))

    @staticmethod
    def _publish(sock: listen.Publication, log: EventLog, cleanup: contextlib.ExitStack) -> listen.Listener:
        if sock.replaced:
            log.info("stale-socket", f"{sock.path}: replaced a socket whose owner is gone", path=sock.path)
        listener = sock.publish()
        cleanup.callback(listener.close)
        return listener

    def _service(self, config: DeviceConfig, sock: listen.Listener | socket.socket | None, device: Device,
                 log: EventLog) -> Service:
        """sock: None for a device that connects by itself."""
        if isinstance(sock, listen.Listener):
            source: Source = Accepting(sock, self._loop, log)
        elif sock is not None:
            source = Inherited(sock)
        else:
            source = Connecting(config.socket_path, self._loop, log)
        return Service(self._loop, device, source, log, self._config.one_off, self._finished)

    def _release(self, device: Device) -> None:
        try:
            device.close()
        except Exception as exception:  # the others still have to be released, and the sockets removed
            self._log.bug("internal-error", "closing a device", exception)

    # -------------------------------------------------------------------------- one after the other

    def _await_successor(self, listener: listen.Listener, sockets: list, devices: list, services: list[Service],
                         cleanup: contextlib.ExitStack) -> None:
        """Let another process take over from this one, at ``listener``."""
        from vdev.upgrade import Served, Upgrades

        served = [Served(device.config, sock if isinstance(sock, listen.Listener) else None, device, service)
                  for sock, device, service in zip(sockets, devices, services, strict=True)]
        upgrades = Upgrades(listener, served, self._loop, self._log, self._succeeded)
        cleanup.callback(upgrades.close)
        upgrades.open()

    def _succeeded(self, pid: int | None) -> None:
        """Process ``pid`` serves now. What is open here is its own, and is left as it is."""
        self._log.info("handed-over", f"process {pid} has taken over", successor_pid=pid)
        self._tell_manager(f"MAINPID={pid}")
        self._handed_over = True
        self._loop.stop()

    def _take_over(self, cleanup: contextlib.ExitStack) -> list[Service]:
        """As :meth:`_open`, but everything comes from a daemon that runs. Raises Failure, and that one goes on."""
        try:
            from vdev.takeover import Takeover, milliseconds_since
        except ImportError as error:
            raise Failure(f"vdev is not complete here: {error}") from None
        if self._config.ready_fd is not None:
            notify.check_ready_fd(self._config.ready_fd)
        takeover = Takeover(self._config)
        with undisturbed():
            everything = takeover.adopt(self._enter_sandbox)
            takeover.commit()
            for adopted in everything.devices:
                adopted.device.start()
            gap = milliseconds_since(everything.paused_at)
        services, sockets = [], []
        for adopted in everything.devices:
            cleanup.callback(self._release, adopted.device)
            sock = adopted.listener or (adopted.sock if adopted.config.fd is not None else None)
            service = self._service(adopted.config, sock, adopted.device, adopted.log)
            adopted.give_to(service)
            services.append(service)
            sockets.append(sock)
        for listener in (everything.upgrade, *(sock for sock in sockets if isinstance(sock, listen.Listener))):
            listener.take_credit()
            cleanup.callback(listener.close)
        self._serving = sum(not service.finished for service in services)
        self._config = replace(self._config, devices=tuple(adopted.config for adopted in everything.devices))
        sessions = sum(adopted.sock is not None for adopted in everything.devices)
        self._log.info("taken-over", f"taken over from process {takeover.pid}: devices {len(services)}, front-ends "
                       f"connected {sessions}; frames stood still for {gap:.1f} ms", predecessor_pid=takeover.pid,
                       devices=len(services), sessions=sessions, milliseconds=round(gap, 3))
        self._await_successor(everything.upgrade, sockets, [adopted.device for adopted in everything.devices],
                              services, cleanup)
        return services

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


def _start_workers(device: Device) -> None:
    """Start the workers of ``device``. Raises Failure."""
    from ring.errors import RingError

    try:
        device.start_workers()
    except (RingError, OSError, MemoryError) as error:
        raise Failure(f"the device cannot be started: {error}") from None


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
