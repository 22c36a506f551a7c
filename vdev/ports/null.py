"""The null port: frames from the guest are counted by the pump and dropped; none come back."""

from vdev.net.features import OFFLOADS
from vdev.ports.base import VNET_HEADER, Carries, Ends, Port
from vdev.ports.spec import NullSpec


class Null(Port):
    """Carries everything, as nothing leaves the pump."""

    def __init__(self, queue_pairs: int) -> None:
        self.carries = Carries(VNET_HEADER, OFFLOADS, queue_pairs)

    @classmethod
    def open(cls, spec: NullSpec, queue_pairs: int) -> "Null":
        return cls(queue_pairs)

    def __str__(self) -> str:
        return str(NullSpec())

    def ends(self, pair: int) -> Ends:
        return Ends(-1, -1)
