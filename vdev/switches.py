"""The switches of a daemon: made as devices name them, kept in time, joined to the network of the host by uplinks.

An uplink is a port, a TAP, that is a member of a switch as devices are. It has a worker of its own, which reads it and
forwards; what goes to it is written by the workers of those who send.
"""

import contextlib
import logging
import os

from ring.errors import RingError
from ring.fabric import Member
from ring.pump import FlowStats, Lane, LaneConfig, LaneEvent, Pump
from vdev import traffic
from vdev.config import UplinkConfig
from vdev.errors import Failure
from vdev.logs import EventLog
from vdev.loop import Loop, Timer
from vdev.net.features import OFFLOADS
from vdev.ports import open_port
from vdev.ports.base import Needs, Port, PortError
from vdev.ports.switch import Switch, SwitchPort, Wire
from vdev.workers import Worker, WorkerLost, Workers, leave_to_worker

# An address that nobody sends from is forgotten after 300 to 320 s, 16 ticks (802.1D, table 7-5 recommends 300 s).
TICK_SECONDS = 20.0
RETRY_SECONDS = 1.0
_NOT_SERVED = (OSError, MemoryError, RingError, WorkerLost, PortError)  # what may come of an uplink's worker


class Uplink:
    """``port``, open, as a member of ``switch``, served by ``worker``, which has no other lane. It takes the port
    over. Raises PortError when the switch is full."""

    def __init__(self, port: Port, switch: Switch, worker: Worker, log: EventLog) -> None:
        self._member: Member | None = switch.join(uplink=True)  # None: a worker is stuck with the last one
        self.port = port
        self._switch = switch
        self._worker = worker
        self._log = log
        self._report = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lane = Lane(self._report)
        self._pump: Pump | None = None  # has the lane
        self._loop: Loop | None = None
        self._retry: Timer | None = None
        port.set_offloads(OFFLOADS)
        worker.join(self._on_lost)

    def __str__(self) -> str:
        return f"uplink {self.port} of {self._switch}"

    def start(self, loop: Loop) -> None:
        """Begin to forward. Raises OSError, RingError, WorkerLost."""
        self._loop = loop
        self._attach()
        loop.watch(self._report, self._on_news)
        for fd, callback in self.port.watches():
            loop.watch(fd, callback)

    def _attach(self) -> None:
        """Lend the lane. Raises OSError, RingError, WorkerLost, PortError when the switch is full."""
        if self._member is None:
            self._member = self._switch.join(uplink=True)
        ends = self.port.ends(0)
        self._lane.configure(LaneConfig(member=self._member, door=0, to_port=ends.to_port, from_port=ends.from_port,
                                        port_header=self.port.carries.header, features=OFFLOADS))
        self._member.spread(1)
        try:
            self._pump = self._worker.attach(self._lane)
        except WorkerLost:
            self._abandon()
            raise

    def _take_back(self) -> None:
        """Have the lane, or another one where a worker is stuck with it."""
        pump, self._pump = self._pump, None
        try:
            if pump is not None:
                self._worker.detach(self._lane, pump)
        except WorkerLost as lost:
            self._log.warning("uplink-stuck", f"{self}: a worker thread did not let go: {lost}")
            self._abandon()

    def _abandon(self) -> None:
        """Leave lane and member to the stuck worker."""
        self._member.abandon()
        leave_to_worker(self._lane, self._member)
        self._lane, self._member = Lane(self._report), None

    def _on_lost(self) -> None:
        """Told by the worker; :meth:`_take_back` finds it out by itself."""

    def _on_news(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._report)
        if self._lane.events() & LaneEvent.PORT_GONE and self._retry is None:
            self._log.warning("uplink-gone", f"{self} is gone: frames to it are dropped until it is back; was the "
                              "interface deleted?")
            self._recover()

    def _recover(self) -> None:
        self._retry = None
        try:
            if self.port.lost():
                self._take_back()
                self._attach()
                self._log.info("uplink-back", f"{self} is back")
                return
        except _NOT_SERVED as error:
            self._log.peer(logging.WARNING, "uplink-not-served",
                           f"{self} is back and cannot be served yet: {error}")
        self._retry = self._loop.call_later(RETRY_SECONDS, self._recover)

    def stats(self) -> tuple[FlowStats, FlowStats]:
        """(from the network, to the network)."""
        came, went = self._lane.stats()
        return came, went.and_lost(self._member.missed() if self._member is not None else {})

    def _sum_up(self) -> None:
        counts = {way: {"frames": flow.frames, "bytes": flow.bytes, "dropped": flow.dropped}
                  for way, flow in zip(("from_network", "to_network"), self.stats(), strict=True)}
        self._log.info("uplink-ended", f"{self}: {traffic.sentence(counts)}", uplink=str(self.port), traffic=counts)

    def close(self) -> None:
        """Release it and the port. A worker that does not let go keeps what it has."""
        if self._retry is not None:
            self._retry.cancel()
        if self._loop is not None:
            self._loop.unwatch(self._report)
            for fd, _ in self.port.watches():
                self._loop.unwatch(fd)
        self._take_back()
        self._worker.leave(self._on_lost)
        self._sum_up()
        if self._member is not None:
            self._member.leave()
        self._lane.close()
        os.close(self._report)
        self.port.close()


class Switches:
    """All switches of one process, made as they are asked for. ``workers``: those of the process."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._named: dict[str, Switch] = {}
        self._wires: list[Wire] = []
        self._uplinks: list[Uplink] = []
        self._loop: Loop | None = None
        self._timer: Timer | None = None

    def named(self, name: str) -> Switch:
        """That switch. Raises PortError."""
        if name not in self._named:
            self._named[name] = Switch(name)
        return self._named[name]

    def wired(self, port: Port, device: str, queue_pairs: int, log: EventLog) -> SwitchPort:
        """A port for so many queue pairs of ``device``, joined to ``port``, which is taken over, by a wire. Raises
        PortError."""
        wire = Wire(device)
        self._wires.append(wire)
        self._join(wire, port, f"{port} cannot serve --personality full", log)
        return SwitchPort(wire, queue_pairs)

    def _join(self, switch: Switch, port: Port, where: str, log: EventLog) -> None:
        """Make ``port`` a member of ``switch``, or close it and raise PortError, which begins with ``where``."""
        try:
            if not port.carries.header:
                raise PortError(f"{where}: it has no net header, so that no offload can pass; open the TAP with "
                                "IFF_VNET_HDR")
            self._uplinks.append(Uplink(port, switch, self._workers.new(), log))
        except BaseException:
            port.close()
            raise
        switch.uplinks.append(port)
        for note in port.notes:
            log.info("port", note)

    def open_uplink(self, config: UplinkConfig, log: EventLog) -> None:
        """Open the port and make it a member of the switch. Raises PortError."""
        switch = self.named(config.switch)
        port = open_port(config.port, 1)
        self._join(switch, port, f"--uplink {config.switch}={port}", log)

    @property
    def needs(self) -> list[Needs]:
        """What the uplinks go on needing in the sandbox."""
        return [uplink.port.needs for uplink in self._uplinks]

    def start(self, loop: Loop) -> None:
        """Start the workers of the uplinks, and time. Raises Failure."""
        self._loop = loop
        for uplink in self._uplinks:
            try:
                uplink.start(loop)
            except _NOT_SERVED as error:
                raise Failure(f"{uplink} cannot be started: {error}") from None
        if self._named:
            self._tick()

    def _tick(self) -> None:
        self._timer = self._loop.call_later(TICK_SECONDS, self._tick)
        for switch in self._named.values():
            switch.tick()

    def close(self) -> None:
        """Close all of them. Devices must have left."""
        if self._timer is not None:
            self._timer.cancel()
        for uplink in self._uplinks:
            uplink.close()
        for switch in (*self._named.values(), *self._wires):
            switch.close()
