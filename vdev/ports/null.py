"""The null port: frames from the guest are counted by the pump and dropped; none come back."""

from typing import Any

from vdev.handover import Put, Take
from vdev.net.features import OFFLOADS
from vdev.plain import from_plain
from vdev.ports.base import VNET_HEADER, Carries, Ends, Port, PortPart
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

    def export(self, put: Put) -> PortPart:
        return PortPart(str(self), self.carries.queue_pairs)

    @classmethod
    def adopt(cls, spec: NullSpec, state: Any, take: Take) -> "Null":
        return cls(from_plain(int, state))

    def let_go(self) -> None:
        pass
