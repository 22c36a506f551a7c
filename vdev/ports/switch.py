"""A port of a switch: devices of one daemon on one learning Ethernet switch.

Frames go from ring to ring in the workers of those who send (ring/plane/fabric.c has the theory). What makes a switch,
and its uplinks to the network of the host, is in vdev/switches.py.

A device at a switch is offered all offloads; what a receiver did not negotiate is made up for where it gets the frame.

What a guest's driver sets about the frames it receives (vdev/control_queue.py) is done where a switch delivers them. So
a device that has a control queue is always a member of something: of a switch, or of a :class:`Wire` that joins it to
its port and to nothing else.
"""

import contextlib
from collections import Counter
from collections.abc import Mapping
from functools import reduce
from operator import and_
from typing import Any

from ring.fabric import Fabric, FabricFull, Member
from vdev.handover import Put
from vdev.net.features import OFFLOADS
from vdev.ports.base import VNET_HEADER, Carries, Ends, Port, PortError, PortPart
from vdev.ports.spec import SwitchSpec


class Switch:
    """The switch ``name`` of this process. uplinks: the ports that are members of it, to be told what devices announce.

    Raises PortError when there is no memory for it."""

    is_wire = False

    def __init__(self, name: str) -> None:
        self.name = name
        self.uplinks: list[Port] = []
        try:
            self._fabric = Fabric(wire=self.is_wire)
        except OSError as error:
            raise PortError(f"{self}: {error.strerror.lower()}") from None

    def __str__(self) -> str:
        return str(SwitchSpec(self.name))

    def join(self, *, uplink: bool = False) -> Member:
        """A new member. Raises PortError when there are too many."""
        try:
            return self._fabric.join(uplink=uplink)
        except FabricFull as full:
            raise PortError(f"{self}: {full}; put some devices on another switch, and join the two by a bridge of the "
                            "host") from None

    @property
    def offloads(self) -> int:
        """What its members may use towards each other: all, but what an uplink cannot pass on to the kernel."""
        return reduce(and_, (uplink.carries.offloads for uplink in self.uplinks), OFFLOADS)

    def tick(self) -> None:
        """Time passes: see Fabric.tick."""
        self._fabric.tick()

    def close(self) -> None:
        """Free it. Its members must have left."""
        self._fabric.close()


class Wire(Switch):
    """What joins one device to its port. ``name`` is that of the device."""

    is_wire = True

    def __str__(self) -> str:
        return ", ".join(map(str, self.uplinks)) or f"the wire of {self.name}"


class SwitchPort(Port):
    """One device's port of a switch."""

    def __init__(self, switch: Switch, queue_pairs: int) -> None:
        self._switch = switch
        self._lost: Counter[str] = Counter()  # of members that had to be abandoned
        mtu = switch.uplinks[0].carries.mtu if switch.is_wire else None
        self.carries = Carries(VNET_HEADER, switch.offloads, queue_pairs, mtu)
        self.member: Member | None = switch.join()

    def __str__(self) -> str:
        return str(self._switch)

    def ends(self, pair: int) -> Ends:
        return Ends(-1, -1)

    def announce(self, mac: bytes) -> None:
        if self.member is not None:
            self.member.learn(mac)
        for uplink in self._switch.uplinks:
            uplink.announce(mac)

    def learned(self) -> dict[str, Any]:
        return self._switch.uplinks[0].learned() if self._switch.is_wire else {}

    def recall(self, learned: dict[str, Any]) -> None:
        if self._switch.is_wire:
            self._switch.uplinks[0].recall(learned)

    def missed(self) -> Mapping[str, int]:
        return self._lost + Counter(self.member.missed() if self.member is not None else {})

    def abandoned(self) -> None:
        """Go on as another member; where the switch has no place for one, without the switch."""
        if self.member is None:
            return
        self._lost.update(self.member.missed())
        self.member.abandon()
        self.member = None
        with contextlib.suppress(PortError):
            self.member = self._switch.join()

    def export(self, put: Put) -> PortPart:
        raise NotImplementedError  # vdev/config.py refuses --upgrade-path

    def let_go(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        if self.member is not None:
            self.member.leave()
            self.member = None
