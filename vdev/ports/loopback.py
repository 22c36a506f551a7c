"""The loopback port: each frame of the guest comes back to it, on the queue pair it left by.

Nothing runs in Python: the pump writes one end of a socket pair and reads the other.
"""

from vdev.net.features import OFFLOADS
from vdev.ports.base import VNET_HEADER, Carries, Ends
from vdev.ports.sockets import SocketPort
from vdev.ports.spec import LoopbackSpec


class Loopback(SocketPort):
    """Carries every offload: the header comes back with the frame."""

    def __init__(self, queue_pairs: int) -> None:
        super().__init__(queue_pairs)
        self.carries = Carries(VNET_HEADER, OFFLOADS, queue_pairs)

    @classmethod
    def open(cls, spec: LoopbackSpec, queue_pairs: int) -> "Loopback":
        return cls(queue_pairs)

    def __str__(self) -> str:
        return str(LoopbackSpec())

    def ends(self, pair: int) -> Ends:
        return Ends(to_port=self.near[pair].fileno(), from_port=self.far[pair].fileno())
