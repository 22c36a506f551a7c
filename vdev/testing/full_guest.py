"""A guest in one process of a device that keeps configuration space and control queue: front-end and driver at once."""

import contextlib
import socket
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

from ring.driver import DriverQueue, GuestMemory
from vdev.net.config_space import SIZE
from vdev.net.control.command import control_queue_index
from vdev.net.features import Feature, mask
from vdev.testing.netdriver import NetDriver, NetHeader
from vdev.testing.scripted import ring_setup, shared_regions
from vdev.testing.served import ServedDevice, WirePort
from vhost_user.frontend import FrontEnd
from vhost_user.spec import Status

PLAIN = mask(Feature.VERSION_1, Feature.MRG_RXBUF, Feature.CTRL_VQ)
OWN, OTHER = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")
GROUP, BROADCAST = bytes.fromhex("01005e000001"), b"\xff" * 6
TYPE = b"\x88\xb5"  # IEEE 802: local experiments
_RUNNING = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK


class FullGuest:
    """Connected, negotiated, all its rings running and receive buffers posted; a context manager.

    features: what the driver accepts of what is offered. queue_pairs: how many the device has. The driver of pair n is
    ``drivers[n]``.
    """

    def __init__(self, sock: socket.socket, *, features: int = PLAIN, queue_pairs: int = 1, size: int = 64) -> None:
        self.front_end = FrontEnd(sock)
        self.front_end.negotiate(features)
        self.front_end.set_backend_req_fd()
        self.features = self.front_end.features & ~mask(Feature.PROTOCOL_FEATURES)
        self.queue_pairs = queue_pairs
        self.memory = GuestMemory()
        self._size = size
        self.drivers: list[NetDriver] = []
        self.front_end.share(shared_regions(self.memory))
        self._begin()

    def _begin(self) -> None:
        """The driver starts from nothing."""
        used = self.queue_pairs if self.features & mask(Feature.MQ, Feature.RSS) else 1
        self.drivers = [NetDriver(self.memory, size=self._size, features=self.features) for _ in range(used)]
        self.control = DriverQueue(self.memory, self._size, self.features)
        self.start()
        for driver in self.drivers:
            driver.fill()

    def reset(self) -> None:
        """The guest reboots: its device is reset, and its driver begins again."""
        self.front_end.reset_device()
        self._close_queues()
        self.front_end.set_features(self.features | mask(Feature.PROTOCOL_FEATURES))
        self._begin()

    def reconnect(self, sock: socket.socket, first: Callable[[], None] = lambda: None) -> None:
        """Go on with another back-end, which learns nothing of the one before but what ``first`` tells it."""
        self.front_end.close()
        self.front_end = FrontEnd(sock)
        self.front_end.negotiate(self.features)
        self.front_end.share(shared_regions(self.memory))
        first()
        self.start()

    @property
    def rings(self) -> dict[int, DriverQueue]:
        """Every queue, by its index."""
        both = [queue for driver in self.drivers for queue in (driver.receiveq, driver.transmitq)]
        control = control_queue_index(self.features, self.queue_pairs)
        return dict(enumerate(both)) | ({} if control is None else {control: self.control})

    def start(self) -> None:
        """Start and enable all rings, from where their driver's half is."""
        for index, queue in self.rings.items():
            self.front_end.set_ring(index, ring_setup(queue))
            self.front_end.set_vring_enable(index, True)
        self.front_end.set_status(_RUNNING)

    def stop(self) -> None:
        """Stop all rings, as a front-end does whose guest is paused."""
        self.front_end.set_status(0)
        for index in self.rings:
            self.front_end.get_vring_base(index)

    @property
    def config(self) -> bytes:
        """All of the configuration space."""
        return self.front_end.get_config(0, SIZE)

    def command(self, kind: int, number: int, data: bytes = b"", *, reply: int = 0, cuts: Sequence[int] = (),
                room: Sequence[int] = ()) -> tuple[int | None, bytes]:
        """Have a command executed -> (its acknowledgement, None if there is no room; what follows).

        reply: bytes that may follow. cuts: positions in the command where one descriptor ends and the next begins.
        room: how the writable bytes are cut; empty: in one piece.
        """
        whole = bytes([kind, number]) + data
        bounds = [0, *cuts, len(whole)]
        parts = [whole[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]
        self.control.post(readable=parts, writable=room or [1 + reply])
        self.control.submit()
        if not self.control.wait(10):
            raise TimeoutError("a command was not executed within 10 s")
        written = self.control.collect().data
        return (written[0], written[1:]) if written else (None, b"")

    def close(self) -> None:
        """Hang up. Idempotent."""
        self.front_end.close()
        self._close_queues()
        self.memory.close()

    def _close_queues(self) -> None:
        for driver in self.drivers:
            driver.close()
        self.control.close()

    def __enter__(self) -> "FullGuest":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        self.close()


@contextlib.contextmanager
def served(queue_pairs: int = 1, features: int = PLAIN) -> Iterator[tuple[ServedDevice, FullGuest]]:
    """A device with so many queue pairs, and a guest of it."""
    with ServedDevice(WirePort(queue_pairs), personality="full") as device, \
            FullGuest(device.connect(), features=features, queue_pairs=queue_pairs) as guest:
        yield device, guest


def frame(to: bytes, payload: bytes = b"", vlan: int | None = None) -> bytes:
    """A frame from OTHER, 60 bytes or more. vlan: with a tag."""
    tag = b"" if vlan is None else b"\x81\x00" + vlan.to_bytes(2, "big")
    return (to + OTHER + tag + TYPE + payload).ljust(60, b"\0")


def gets(device: ServedDevice, guest: FullGuest, *frames: bytes) -> list[bytes]:
    """Which of these frames from the network the guest gets: a broadcast behind them shows that there are no more."""
    last = frame(BROADCAST, b"the last one")
    for one in (*frames, last):
        device.port.wire[0].send(NetHeader().pack() + one)
    found = []
    while (received := guest.drivers[0].receive_within(5)) is not None:
        if received.frame == last:
            return found
        found.append(received.frame)
    raise AssertionError("the last frame did not come")
