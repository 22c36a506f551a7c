"""What ports made of ``SOCK_SEQPACKET`` pairs share: one pair of sockets a queue pair.

Each message is a 12-byte virtio_net_hdr and one frame. A message is kept whole by the kernel, a full
socket is the back-pressure, and both ends are non-blocking.
"""

import socket

from vdev.ports.base import ETHERNET_HEADER, VNET_HEADER, Port

# The longest packet IP can name, behind an Ethernet header with one VLAN tag, behind the net header.
MESSAGE_MAX = VNET_HEADER + ETHERNET_HEADER + 4 + 65535

# A Unix socket charges a message to its sender, so only the send buffer counts. The kernel caps it at
# net.core.wmem_max, whose default still takes several of the longest messages.
_SEND_BUFFER = 16 * MESSAGE_MAX


class SocketPort(Port):
    """``self.near[pair]`` is our end, ``self.far[pair]`` the pump's, for ``queue_pairs`` pairs.

    Raises OSError (EMFILE, ENOMEM) when the sockets cannot be had; none is left open then.
    """

    def __init__(self, queue_pairs: int) -> None:
        self.near: list[socket.socket] = []
        self.far: list[socket.socket] = []
        try:
            for _ in range(queue_pairs):
                near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                self.near.append(near)
                self.far.append(far)
                for end in near, far:
                    end.setblocking(False)
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        except OSError:
            self.close()
            raise

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
        for end in self.near + self.far:
            end.close()
        self.near.clear()
        self.far.clear()


def drain(end: socket.socket) -> None:
    """Read and drop everything that waits at the non-blocking socket ``end``."""
    try:
        while end.recv(1):  # the rest of a message is dropped with it
            pass
    except BlockingIOError:
        pass
