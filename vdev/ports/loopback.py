"""The loopback port: each frame of the guest comes back to it, on the queue pair it left by.

Nothing runs in Python: the pump writes one end of a socket pair and reads the other.
"""

import socket
from typing import Any

from vdev.handover import Put, Take
from vdev.net.features import OFFLOADS
from vdev.plain import from_plain
from vdev.ports.base import VNET_HEADER, Carries, Ends, PortPart
from vdev.ports.sockets import Pairs, SocketPort, adopt_pairs
from vdev.ports.spec import LoopbackSpec


class Loopback(SocketPort):
    """Carries every offload: the header comes back with the frame."""

    def __init__(self, queue_pairs: int, pairs: list[tuple[socket.socket, socket.socket]] | None = None) -> None:
        super().__init__(queue_pairs, pairs)
        self.carries = Carries(VNET_HEADER, OFFLOADS, queue_pairs)

    @classmethod
    def open(cls, spec: LoopbackSpec, queue_pairs: int) -> "Loopback":
        return cls(queue_pairs)

    def __str__(self) -> str:
        return str(LoopbackSpec())

    def ends(self, pair: int) -> Ends:
        return Ends(to_port=self.near[pair].fileno(), from_port=self.far[pair].fileno())

    def export(self, put: Put) -> PortPart:
        return PortPart(str(self), self.export_pairs(put))

    @classmethod
    def adopt(cls, spec: LoopbackSpec, state: Any, take: Take) -> "Loopback":
        pairs = adopt_pairs(from_plain(Pairs, state), take)
        return cls(len(pairs), pairs)
