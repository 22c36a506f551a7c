"""A guest without a virtual machine: QEMU's half of the socket and a driver's half of the rings, in Python.

It goes through the messages of a real QEMU in their order and then moves frames, against any back-end.
"""

import dataclasses
import socket
from types import TracebackType

from ring.driver import DriverQueue, GuestMemory
from vdev.net.features import Feature, mask, names
from vdev.testing.netdriver import NetDriver
from vhost_user.frontend import FrontEnd, RingSetup, SharedRegion
from vhost_user.handshake import QEMU_10_0, Qemu, QemuVersion
from vhost_user.spec import ProtocolFeature

# What decides how the rings look: they are made before the back-end has said what it offers.
_RING_FEATURES = mask(Feature.RING_PACKED, Feature.IN_ORDER)


def ring_setup(queue: DriverQueue, as_driver: bool = False) -> RingSetup:
    """What a front-end tells the back-end of a driver's ``queue``: where its parts are for the front-end, or
    ``as_driver`` has them."""
    desc, avail, used = (area.gpa if as_driver else queue.memory.uva(area.gpa) for area in queue.ring.areas)
    return RingSetup(num=queue.ring.size, desc=desc, avail=avail, used=used, base=queue.base,
                     kick=queue.kick_fd, call=queue.call_fd, log=queue.ring.areas[2].gpa)


def shared_regions(memory: GuestMemory, gpa_addresses: bool = False) -> list[SharedRegion]:
    """The same of a guest's memory."""
    return [SharedRegion(region.fd, region.gpa, region.gpa if gpa_addresses else region.uva, region.size, region.offset)
            for region in memory.regions]


class ScriptedGuest:
    """Connected, negotiated, its rings running and receive buffers posted when the constructor returns.

    sock: a connected socket, from now on the guest's. features: what the driver accepts of what is offered;
    RING_PACKED and IN_ORDER it insists on (ValueError).
    queue_pairs: how many, all enabled; ``drivers`` has one NetDriver for each. size: descriptors of a queue.
    base: where all rings start, as SET_VRING_BASE carries it; None: fresh. buffers: receive buffers to post;
    None: as many as there are descriptors. memory: the guest's, which closes with it; None: one region.
    """

    def __init__(self, sock: socket.socket, *, features: int = mask(Feature.VERSION_1, Feature.MRG_RXBUF),
                 queue_pairs: int = 1, size: int = 64, base: int | None = None, buffers: int | None = None,
                 version: QemuVersion = QEMU_10_0, memory: GuestMemory | None = None) -> None:
        self.memory = memory or GuestMemory()
        self.drivers = [NetDriver(self.memory, size=size, features=features, base=base) for _ in range(queue_pairs)]
        self.front_end = FrontEnd(sock)
        try:
            self._start(features, buffers, version)
        except BaseException:
            self.close()
            raise

    def _start(self, features: int, buffers: int | None, version: QemuVersion) -> None:
        queues = [queue for driver in self.drivers for queue in (driver.receiveq, driver.transmitq)]
        self.qemu = Qemu(self.front_end, [ring_setup(queue) for queue in queues], version)
        self.qemu.connect()
        missing = features & _RING_FEATURES & ~self.qemu.offered
        if missing:
            raise ValueError(f"the back-end does not offer {', '.join(names(missing))}")
        self.qemu.reset(len(self.drivers))
        gpa_addresses = self.front_end.has(ProtocolFeature.GPA_ADDRESSES)
        iommu = bool(features & self.qemu.offered & mask(Feature.ACCESS_PLATFORM))
        self.qemu.rings = [ring_setup(queue, gpa_addresses or iommu) for queue in queues]
        self.features = features & self.qemu.offered
        for driver in self.drivers:
            driver.features = self.features
        self.qemu.start(self.regions(gpa_addresses), self.features, enabled_pairs=len(self.drivers))
        for driver in self.drivers:
            driver.fill(buffers)

    @classmethod
    def connect(cls, path: str, **options) -> "ScriptedGuest":
        """A guest of the back-end that listens on ``path``; ``options`` as for the constructor."""
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(path)
        return cls(sock, **options)

    def reconnect(self, sock: socket.socket) -> None:
        """Go on with the back-end at the other end of ``sock``, as QEMU does when one came back that had gone without
        a word: the features of before; the base of a split ring from its used index, of a packed one that of the last
        start."""
        self.front_end.close()
        self.front_end = FrontEnd(sock)
        queues = [queue for driver in self.drivers for queue in (driver.receiveq, driver.transmitq)]
        rings = [ring if queue.packed else dataclasses.replace(ring, base=queue.ring.used.idx)
                 for ring, queue in zip(self.qemu.rings, queues, strict=True)]
        self.qemu = Qemu(self.front_end, rings, self.qemu.version)
        self.qemu.connect()
        self.qemu.enable_pairs(len(self.drivers))
        self.qemu.start(shared_regions(self.memory), self.features, enabled_pairs=len(self.drivers))

    def regions(self, gpa_addresses: bool = False) -> list[SharedRegion]:
        """Guest memory as the back-end is told of it."""
        return shared_regions(self.memory, gpa_addresses)

    @property
    def driver(self) -> NetDriver:
        """That of the first queue pair."""
        return self.drivers[0]

    def exchange(self, frame: bytes, seconds: float = 5.0) -> bytes | None:
        """Send ``frame`` on the first queue pair -> the next frame that comes back there, None after
        ``seconds``."""
        self.driver.transmit(frame)
        received = self.driver.receive_within(seconds)
        return None if received is None else received.frame

    def close(self) -> None:
        """Hang up, as a QEMU that ends. Idempotent."""
        self.front_end.close()
        for driver in self.drivers:
            driver.close()
        self.memory.close()

    def __enter__(self) -> "ScriptedGuest":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        self.close()
