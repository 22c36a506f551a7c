"""What ports made of ``SOCK_SEQPACKET`` pairs share: one pair of sockets a queue pair.

Each message is a 12-byte virtio_net_hdr and one frame. A message is kept whole by the kernel, a full
socket is the back-pressure, and both ends are non-blocking.
"""

import socket
from collections.abc import Iterator
from dataclasses import dataclass

from vdev.handover import Put, Take
from vdev.ports.base import ETHERNET_HEADER, VNET_HEADER, Needs, Port

# The longest packet IP can name, behind an Ethernet header with one VLAN tag, behind the net header.
MESSAGE_MAX = VNET_HEADER + ETHERNET_HEADER + 4 + 65535

# A Unix socket charges a message to its sender, so only the send buffer counts. The kernel caps it at
# net.core.wmem_max, whose default still takes several of the longest messages.
_SEND_BUFFER = 16 * MESSAGE_MAX


@dataclass(frozen=True)
class Pairs:
    """The sockets of a port as they are handed on, with the frames in them: (near, far) by queue pair."""

    ends: tuple[tuple[int, int], ...]


class SocketPort(Port):
    """``self.near[pair]`` is our end, ``self.far[pair]`` the pump's, for ``queue_pairs`` pairs.

    pairs: sockets made before, instead of new ones. Raises OSError (EMFILE, ENOMEM) when the sockets cannot be had;
    none is left open then.
    """

    needs = Needs(syscalls={"recvfrom": "messages from the pump", "sendto": "and to it"})

    def __init__(self, queue_pairs: int, pairs: list[tuple[socket.socket, socket.socket]] | None = None) -> None:
        self.near: list[socket.socket] = []
        self.far: list[socket.socket] = []
        try:
            for near, far in _fresh(queue_pairs) if pairs is None else pairs:
                self.near.append(near)
                self.far.append(far)
        except OSError:
            self.close()
            raise

    def export_pairs(self, put: Put) -> Pairs:
        """The sockets, for another process."""
        both = zip(self.near, self.far, strict=True)
        return Pairs(tuple((put(near.fileno()), put(far.fileno())) for near, far in both))

    def let_go(self) -> None:
        for end in self.near + self.far:
            end.close()
        self.near.clear()
        self.far.clear()

    def enable(self, pair: int, enabled: bool) -> None:
        """A pair that is switched off loses what waits for its guest: it would be stale later."""
        if not enabled:
            drain(self.far[pair])

    def set_offloads(self, features: int) -> None:
        """Without a guest, what waits for one is stale: the next front-end's guest is another, or has started anew."""
        if not features:
            for end in self.far:
                drain(end)

    def close(self) -> None:
        self.let_go()


def _fresh(count: int) -> Iterator[tuple[socket.socket, socket.socket]]:
    for _ in range(count):
        pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in pair:
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        yield pair


def adopt_pairs(pairs: Pairs, take: Take) -> list[tuple[socket.socket, socket.socket]]:
    """The sockets that another process exported."""
    return [(socket.socket(fileno=take(near)), socket.socket(fileno=take(far))) for near, far in pairs.ends]


def drain(end: socket.socket) -> None:
    """Read and drop everything that waits at the non-blocking socket ``end``."""
    try:
        while end.recv(1):  # the rest of a message is dropped with it
            pass
    except BlockingIOError:
        pass
