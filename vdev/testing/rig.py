"""The device's half beside the driver's, with nothing between: no socket, no front-end, no daemon.

DeviceSide maps a driver's memory and opens the device's end of its queues, as the back-end does when the
front-end tells it to. PumpedDevice puts a pump between one NetDriver and one end of a socket pair; the
other end, ``wire``, is the network: each message a 12-byte virtio_net_hdr and a frame. SteppedDevice puts the step
engine there. ENGINES has both, for tests that hold for either.
"""

import contextlib
import os
import select
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Self

from ring.driver import DriverQueue, GuestMemory
from ring.driver_split import DESCRIPTOR, DescriptorTable
from ring.guestmem import GuestMemory as DeviceMemory
from ring.guestmem import Owner
from ring.pump import Flow, FlowStats, Lane, LaneConfig, LaneEvent, Pump
from ring.virtqueue import VirtQueue
from vdev.net.features import Feature, mask
from vdev.step import StepLane
from vdev.testing.netdriver import NetDriver, NetHeader

# What any driver of today negotiates, offloads left aside.
USUAL = mask(Feature.VERSION_1, Feature.INDIRECT_DESC, Feature.EVENT_IDX, Feature.MRG_RXBUF)

# Room for every frame a test leaves unread on the wire.
_SOCKET_BUFFER = 4 << 20


def _taken(eventfd: int) -> int:
    """How often it was signalled since it was last read."""
    with contextlib.suppress(BlockingIOError):
        return os.eventfd_read(eventfd)
    return 0


class DeviceSide:
    """``memory`` as the device maps it, and the device's half of its queues."""

    def __init__(self, memory: GuestMemory) -> None:
        self.owner = Owner()
        self.mappings = [self.owner.map(r.fd, r.gpa, r.uva, r.size, r.offset) for r in memory.regions]
        self.memory: DeviceMemory = self.owner.table(self.mappings)
        self._queues: list[VirtQueue] = []

    def __enter__(self) -> "DeviceSide":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def queue(self, driver: DriverQueue, *, base: int | None = None) -> VirtQueue:
        """The device's half of ``driver``, from behind all that it collected or from ``base``."""
        desc, avail, used = (driver.memory.uva(area.gpa) for area in driver.ring.areas)
        made = VirtQueue(self.memory, size=driver.ring.size, desc=desc, avail=avail, used=used,
                         features=driver.features,
                         base=driver.base if base is None else base)
        self._queues.append(made)
        return made

    def close(self) -> None:
        """Free the queues, the table, the mappings. Idempotent."""
        for queue in self._queues:
            queue.close()
        self._queues.clear()
        self.memory.close()
        for mapping in self.mappings:
            mapping.close()


def table(memory: GuestMemory, *descriptors: tuple[int, ...]) -> tuple[int, int]:
    """An indirect table of these (addr, len, flags, next) in new memory -> (gpa, bytes)."""
    length = DESCRIPTOR.size * len(descriptors)
    made = DescriptorTable(memory, memory.alloc(length))
    for i, fields in enumerate(descriptors):
        made[i].set(*fields)
    return made.gpa, length


@contextlib.contextmanager
def joined(size: int = 8, features: int = 0, base: int | None = None,
           memory: GuestMemory | None = None) -> Iterator[tuple[DriverQueue, VirtQueue]]:
    """Both halves of one queue in memory of their own, or in ``memory``, which stays the caller's."""
    with contextlib.ExitStack() as stack:
        guest = memory or stack.enter_context(GuestMemory())
        driver = stack.enter_context(DriverQueue(guest, size, features, base=base))
        side = stack.enter_context(DeviceSide(guest))
        yield driver, side.queue(driver)


class WiredDevice(ABC):
    """A lane between ``driver`` and a wire; what serves it, a subclass knows.

    Attached when made, unless ``attach`` is False; ``config`` may be changed between :meth:`detach` and
    :meth:`attach`. loop: every frame from the guest goes back to it. Further keyword arguments are fields
    of LaneConfig.
    """

    lane: Lane | StepLane

    def __init__(self, driver: NetDriver, *, attach: bool = True, loop: bool = False, **config: object) -> None:
        self.side = DeviceSide(driver.memory)
        self.wire, self._port = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self.wire, self._port):
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER)
        self.err_fds = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2)]
        flows = [Flow(self.side.queue(queue), True, queue.kick_fd, queue.call_fd, err)
                 for queue, err in zip((driver.transmitq, driver.receiveq), self.err_fds, strict=True)]
        self.config = LaneConfig(from_guest=flows[0], to_guest=flows[1], to_port=self._port.fileno(),
                                 from_port=(self.wire if loop else self._port).fileno(),
                                 features=driver.features)
        for name, value in config.items():
            setattr(self.config, name, value)
        self._attached = False
        if attach:
            self.attach()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def attach(self) -> None:
        """Configure the lane and have it served."""
        self.lane.configure(self.config)
        self._lend()
        self._attached = True

    def detach(self, timeout_ms: int = 5000) -> None:
        """Take it back."""
        self._take_back(timeout_ms)
        self._attached = False

    @abstractmethod
    def _lend(self) -> None: ...

    @abstractmethod
    def _take_back(self, timeout_ms: int) -> None: ...

    @abstractmethod
    def _turn(self) -> None:
        """Let the device work until nothing is left to do, if it has no thread of its own."""

    # ------------------------------------------------------------------------------------- the wire

    def receive(self, seconds: float = 5) -> tuple[NetHeader, bytes] | None:
        """What the device put on the wire: header and frame; None if nothing came within ``seconds``."""
        self._turn()
        if not select.select([self.wire], [], [], seconds)[0]:
            return None
        message = self.wire.recv(1 << 17)
        return NetHeader.unpack(message), message[NetHeader.SIZE:]

    def send(self, frame: bytes, header: NetHeader | None = None) -> None:
        """Put a frame on the wire for the guest. Raises BlockingIOError when the wire takes no more."""
        self.wire.send((header or NetHeader()).pack() + frame)
        self._turn()

    # ----------------------------------------------------------------------------------- what it says

    @property
    def from_guest(self) -> FlowStats:
        """Counters of that direction."""
        self._turn()
        return self.lane.stats()[0]

    @property
    def to_guest(self) -> FlowStats:
        """Counters of that direction."""
        self._turn()
        return self.lane.stats()[1]

    def events(self, seconds: float = 5) -> LaneEvent:
        """Wait for the lane to report something, and take what it has to say (nothing: LaneEvent(0))."""
        self._turn()
        return self.lane.events()

    def errors(self) -> tuple[int, int]:
        """How often the err eventfd of (transmitq, receiveq) was signalled since the last question."""
        self._turn()
        return _taken(self.err_fds[0]), _taken(self.err_fds[1])

    def close(self) -> None:
        """Detach, free everything made here; the driver stays its owner's."""
        if self._attached:
            self.detach()
        self.lane.close()
        self.side.close()
        self.wire.close()
        self._port.close()
        for fd in self.err_fds:
            os.close(fd)


class PumpedDevice(WiredDevice):
    """A pump between ``driver`` and a wire. poll_us: see Pump."""

    def __init__(self, driver: NetDriver, poll_us: int | None = 0, **options: object) -> None:
        self._report = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.lane = Lane(self._report)
        self.pump = Pump(poll_us=poll_us)
        super().__init__(driver, **options)

    def _lend(self) -> None:
        self.pump.attach(self.lane)

    def _take_back(self, timeout_ms: int) -> None:
        self.pump.detach(self.lane, timeout_ms)

    def _turn(self) -> None:
        """Its worker needs no such hint."""

    def events(self, seconds: float = 5) -> LaneEvent:
        select.select([self._report], [], [], seconds)
        _taken(self._report)
        return super().events()

    def close(self) -> None:
        super().close()
        self.pump.close()
        os.close(self._report)


class SteppedDevice(WiredDevice):
    """The step engine between ``driver`` and a wire, without a thread: it works until nothing is left to do whenever
    the driver kicks or waits, a frame is sent to it, or it is asked for anything."""

    def __init__(self, driver: NetDriver, **options: object) -> None:
        self.lane = self._new_lane()
        self._serving = threading.Lock()  # a test may kick from several threads
        for queue in (driver.transmitq, driver.receiveq):
            queue.device_turn = self._turn
        super().__init__(driver, **options)

    def _new_lane(self) -> StepLane:
        return StepLane()

    def _lend(self) -> None:
        self.lane.attach()
        self._turn()

    def _take_back(self, timeout_ms: int) -> None:
        with self._serving:
            self.lane.detach()

    def _turn(self) -> None:
        with self._serving:
            self.lane.run()


@contextlib.contextmanager
def _served(kind: type[WiredDevice], features: int, memory: GuestMemory | None,
            options: dict[str, object]) -> Iterator[tuple[NetDriver, WiredDevice]]:
    of_driver = {name: options.pop(name) for name in ("size", "buffer_size", "base") if name in options}
    with contextlib.ExitStack() as stack:
        guest = memory or stack.enter_context(GuestMemory(32 << 20))
        driver = stack.enter_context(NetDriver(guest, features=features, **of_driver))
        yield driver, stack.enter_context(kind(driver, **options))


def pumped(features: int = USUAL, memory: GuestMemory | None = None,
           **options: object) -> contextlib.AbstractContextManager[tuple[NetDriver, PumpedDevice]]:
    """A driver and its pumped device, in memory of their own or in ``memory``, which stays the caller's.

    Options are those of WiredDevice, and ``size``, ``buffer_size`` and ``base`` of NetDriver.
    """
    return _served(PumpedDevice, features, memory, options)


def stepped(features: int = USUAL, memory: GuestMemory | None = None,
            **options: object) -> contextlib.AbstractContextManager[tuple[NetDriver, SteppedDevice]]:
    """As :func:`pumped`, served by the step engine."""
    return _served(SteppedDevice, features, memory, options)


ENGINES = {"step": stepped, "pump": pumped}


_PROBE = bytes(range(60))  # long enough for an Ethernet header, short enough for every buffer


def assert_serves(driver: NetDriver, device: WiredDevice) -> None:
    """Both directions of an untouched guest work. Raises AssertionError where one does not."""
    driver.transmit(_PROBE)
    assert device.receive(10) == (NetHeader(), _PROBE)
    driver.fill(1)
    device.send(_PROBE)
    assert driver.receive_within(10, refill=False).frame == _PROBE
