"""How the suite sees the other side of the back-end, where frames go to and come from.

reflect       the back-end sends every frame back to its guest; the guest is its own network
tap:NAME      the network interface NAME, in whose place the host's own stack would be; needs CAP_NET_RAW
socket:PATH   a second vhost-user socket of the same back-end, whose guest gets what the first sends, and the reverse
"""

import contextlib
import socket
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from vdev.errors import Misuse
from vdev.net.features import Feature, mask
from vdev.testing.netdriver import NetHeader
from vdev.testing.scripted import ScriptedGuest

if TYPE_CHECKING:
    from vdev.conformance.bench import Session

Left = tuple[NetHeader, bytes]  # a frame that left the back-end, and what was said about it

_PACKET_VNET_HDR = 15  # linux/if_packet.h
_PACKET_OUTGOING = 4
_SOL_PACKET = 263
_ETH_P_ALL = 3
_VNET_HEADER = 10  # bytes before each frame of a packet socket: no num_buffers


class Wire(Protocol):
    """The other side of the back-end."""

    pairs_at_least: int  # queue pairs a session needs for it
    reflects: bool  # what leaves is seen in the session's own receiveq

    def inject(self, session: "Session", frame: bytes, header: NetHeader) -> None:
        """A frame comes to the back-end from there."""

    def burst(self, session: "Session", several: Sequence[bytes]) -> None:
        """Frames come to the back-end from there, as close together as can be."""

    def leaves(self, session: "Session", mark: bytes, seconds: float) -> Left | None:
        """The next frame with ``mark`` that gets there, None after ``seconds``."""

    def forget(self) -> None:
        """Drop what has left so far, so that there is room for more."""

    def close(self) -> None:
        """Let go of it."""


class Reflect:
    """The guest is its own network."""

    pairs_at_least = 1
    reflects = True

    def inject(self, session: "Session", frame: bytes, header: NetHeader) -> None:
        session.driver.transmit(frame, header)
        session.reclaimed()

    def burst(self, session: "Session", several: Sequence[bytes]) -> None:
        for frame in several:
            session.driver.offer(frame)
        session.driver.transmitq.submit()
        session.reclaimed()

    def leaves(self, session: "Session", mark: bytes, seconds: float) -> Left | None:
        received = session.arrives(mark, seconds)
        return None if received is None else (received.header, received.frame)

    def forget(self) -> None:
        pass

    def close(self) -> None:
        pass


class Tap:
    """The host's network interface ``name``. Raises OSError."""

    pairs_at_least = 1
    reflects = False

    def __init__(self, name: str) -> None:
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
        try:
            self._socket.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
            self._socket.bind((name, 0))
        except OSError:
            self._socket.close()
            raise

    def inject(self, session: "Session", frame: bytes, header: NetHeader) -> None:
        self._socket.send(header.pack()[:_VNET_HEADER] + frame)

    def burst(self, session: "Session", several: Sequence[bytes]) -> None:
        for frame in several:
            self.inject(session, frame, NetHeader())

    def leaves(self, session: "Session", mark: bytes, seconds: float) -> Left | None:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self._socket.settimeout(left)
            try:
                data, about = self._socket.recvfrom(1 << 17)
            except TimeoutError:
                return None
            if about[2] != _PACKET_OUTGOING and mark in data:
                return NetHeader.unpack(data[:_VNET_HEADER] + bytes(2)), data[_VNET_HEADER:]
        return None

    def forget(self) -> None:
        self._socket.settimeout(0)
        with contextlib.suppress(BlockingIOError):
            while self._socket.recv(1):
                pass
        self._socket.settimeout(None)

    def close(self) -> None:
        self._socket.close()


class Peer:
    """A second guest of the same back-end, on the socket ``path``, that takes no offloads but gives them. Raises what
    ScriptedGuest does."""

    pairs_at_least = 1
    reflects = False
    FEATURES = mask(Feature.VERSION_1, Feature.MRG_RXBUF, Feature.CSUM, Feature.HOST_TSO4, Feature.HOST_TSO6,
                    Feature.HOST_USO)

    def __init__(self, path: str) -> None:
        self._guest = ScriptedGuest.connect(path, features=self.FEATURES, size=256)

    def inject(self, session: "Session", frame: bytes, header: NetHeader) -> None:
        self._guest.driver.transmit(frame, header)
        self._guest.driver.reclaim_all(session.bench.seconds)

    def burst(self, session: "Session", several: Sequence[bytes]) -> None:
        for frame in several:
            self._guest.driver.offer(frame)
        self._guest.driver.transmitq.submit()
        self._guest.driver.reclaim_all(session.bench.seconds)

    def leaves(self, session: "Session", mark: bytes, seconds: float) -> Left | None:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            received = self._guest.driver.receive_within(left)
            if received is not None and mark in received.frame:
                return received.header, received.frame
        return None

    def forget(self) -> None:
        while self._guest.driver.receive() is not None:
            pass

    def close(self) -> None:
        self._guest.close()


def parse(text: str) -> Wire:
    """The wire that ``--wire text`` names, open. Raises Misuse, OSError, and what ScriptedGuest raises."""
    kind, _, argument = text.partition(":")
    if text == "reflect":
        return Reflect()
    if kind == "tap" and argument:
        return Tap(argument)
    if kind == "socket" and argument:
        return Peer(argument)
    raise Misuse(f"--wire {text}: unknown; known: reflect, tap:NAME, socket:PATH")
