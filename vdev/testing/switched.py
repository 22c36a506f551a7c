"""Devices at a switch with nothing between: drivers, lanes and one worker each, without sockets or a daemon."""

import contextlib
import os
from collections.abc import Iterator, Sequence

from ring.driver import GuestMemory
from ring.fabric import Fabric
from ring.pump import Flow, FlowStats, Lane, LaneConfig, LaneEvent, Pump
from vdev.testing.netdriver import NetDriver, NetHeader
from vdev.testing.rig import USUAL, DeviceSide
from vdev.testing.waiting import wait_until

TYPE = b"\x88\xb5"  # IEEE 802: local experiments
BROADCAST = b"\xff" * 6


def mac(n: int) -> bytes:
    """The address of station ``n``."""
    return bytes([2, 0, 0, 0, n >> 8, n & 0xFF])


def frame(to: int | bytes, source: int | bytes, payload: bytes = b"", length: int = 60) -> bytes:
    """A frame between two stations, by number or address, at least ``length`` bytes long."""
    ends = (end if isinstance(end, bytes) else mac(end) for end in (to, source))
    return (b"".join(ends) + TYPE + payload).ljust(length, b"\0")


class Station:
    """A device at ``fabric``: up when made, with ``buffers`` receive buffers a queue (None: as many as fit).

    features: negotiated. pairs: queue pairs. memory: None for one of its own, which is closed with it.
    Further options are those of NetDriver and fields of LaneConfig.
    """

    def __init__(self, fabric: Fabric, *, features: int = USUAL, pairs: int = 1, buffers: int | None = None,
                 memory: GuestMemory | None = None, size: int = 64, buffer_size: int | None = None,
                 **config: object) -> None:
        self._own = GuestMemory(32 << 20) if memory is None else None
        self.memory = memory or self._own
        self.drivers = [NetDriver(self.memory, size=size, features=features, buffer_size=buffer_size)
                        for _ in range(pairs)]
        self.side = DeviceSide(self.memory)
        self.member = fabric.join()
        self.report = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.pump = Pump()
        self.lanes = [Lane(self.report) for _ in self.drivers]
        self.configs = []
        for door, driver in enumerate(self.drivers):
            flows = [Flow(self.side.queue(queue), True, queue.kick_fd, queue.call_fd)
                     for queue in (driver.transmitq, driver.receiveq)]
            self.configs.append(LaneConfig(flows[0], flows[1], member=self.member, door=door, features=features,
                                           **config))
            driver.fill(buffers)
        self._attached = False
        self.attach()

    @property
    def driver(self) -> NetDriver:
        """That of the first pair."""
        return self.drivers[0]

    def attach(self) -> None:
        """Have it up and served."""
        self.member.spread(len(self.lanes))
        for lane, config in zip(self.lanes, self.configs, strict=True):
            lane.configure(config)
            self.pump.attach(lane)
        self._attached = True

    def detach(self, *, down: bool = False) -> None:
        """Take the lanes back; down: leave the switch's sight."""
        for lane in self.lanes:
            self.pump.detach(lane, 5000)
        self._attached = False
        if down:
            self.member.spread(0)

    def send(self, *frames: bytes, header: NetHeader | None = None, pair: int = 0, cuts: Sequence[int] = ()) -> None:
        """Send them in one burst and wait until they are where they go. header: before each; None: zeroes."""
        driver = self.drivers[pair]
        for sent in frames:
            driver.offer(sent, header or NetHeader(), cuts=cuts)
        driver.transmitq.submit()
        assert driver.reclaim_all(10)

    def received(self, pair: int = 0, *, refill: bool = True) -> list[bytes]:
        """The frames that have arrived."""
        return [got.frame for got in iter(lambda: self.drivers[pair].receive(refill=refill), None)]

    @property
    def from_guest(self) -> FlowStats:
        """Counters of that direction, of the first lane."""
        return self.lanes[0].stats()[0]

    @property
    def to_guest(self) -> FlowStats:
        """Counters of that direction, of all lanes and what was lost before them."""
        flows = [lane.stats()[1] for lane in self.lanes]
        return sum(flows[1:], flows[0]).and_lost(self.member.missed())

    def events(self) -> LaneEvent:
        """Wait for the first lane to report something."""
        found = LaneEvent(0)

        def reported() -> bool:
            nonlocal found
            found |= self.lanes[0].events()
            return bool(found)

        wait_until(reported, "the lane has nothing to report")
        return found

    def close(self) -> None:
        """Detach and free everything."""
        if self._attached:
            self.detach()
        for lane in self.lanes:
            lane.close()
        self.pump.close()
        self.member.leave()
        self.side.close()
        for driver in self.drivers:
            driver.close()
        os.close(self.report)
        if self._own is not None:
            self._own.close()


@contextlib.contextmanager
def switched(*features: int, **options: object) -> Iterator[tuple[Fabric, list[Station]]]:
    """A switch with a station for each of ``features``; ``options`` as for Station."""
    fabric = Fabric(seed=1)
    with contextlib.ExitStack() as stack:
        stack.callback(fabric.close)
        stations = []
        for each in features:
            stations.append(Station(fabric, features=each, **options))
            stack.callback(stations[-1].close)
        yield fabric, stations
