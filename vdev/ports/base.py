"""What a port is: the place where frames go when they leave the rings.

Every port is served by the same pump through file descriptors. A TAP gives its own; a port written in
Python keeps the far end of a ``SOCK_SEQPACKET`` pair, each message a 12-byte virtio_net_hdr and a frame,
so that no Python object ever points into guest memory and back-pressure is the socket's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vdev.handover import Put

if TYPE_CHECKING:  # the C core, which the command line need not wait for
    from ring.fabric import Member

VNET_HEADER = 12  # struct virtio_net_hdr_v1, virtio 1.x "Network Device / Device Operation"
ETHERNET_HEADER = 14


class PortError(Exception):
    """A port cannot be had as asked. The text is one line: what, where, and what to do."""


@dataclass(frozen=True)
class Carries:
    """What a port can carry; the device offers the guest only that.

    header: bytes of virtio_net_hdr before each frame, 12 or 0.
    offloads: mask over vdev.net.features.OFFLOADS the port can honour (0 when header is 0).
    queue_pairs: how many the port can serve at the most.
    mtu: largest layer-3 packet in bytes, or None where there is no limit below 65535.
    """

    header: int
    offloads: int
    queue_pairs: int
    mtu: int | None = None


@dataclass(frozen=True)
class Ends:
    """The descriptors the pump uses for one queue pair; -1 for none.

    to_port: written with frames from the guest. from_port: read for frames to the guest. Often the same.
    """

    to_port: int
    from_port: int


@dataclass(frozen=True)
class PortPart:
    """A port as it is handed on. spec: a text for parse_port; state: what only a port of this kind understands."""

    spec: str
    state: Any


@dataclass(frozen=True)
class Needs:
    """What a port, or a device, goes on needing in the sandbox (vdev/sandbox.py).

    capabilities: of vdev/capabilities.py. syscalls: rule of vdev/seccomp.py -> its reason.
    """

    capabilities: frozenset[int] = frozenset()
    syscalls: Mapping[str, str] = field(default_factory=dict)


class Port:
    """Base of all ports. Descriptors stay owned by the port and are closed by :meth:`close`.

    notes: lines for the log when the port is taken into use: what was chosen, what is still to be done.
    usual_queue_pairs: what a device has whose number of queue pairs nobody gave.
    member: of the switch that takes the place of descriptors; None for all other ports.
    """

    carries: Carries
    needs: Needs = Needs()
    usual_queue_pairs: int = 1
    notes: tuple[str, ...] = ()
    member: "Member | None" = None

    def __str__(self) -> str:
        """The port as a person knows it, e.g. ``tap:vdev0``."""
        raise NotImplementedError

    def ends(self, pair: int) -> Ends:
        """The descriptors of queue pair ``pair`` (0-based)."""
        raise NotImplementedError

    def set_offloads(self, features: int) -> None:
        """The guest negotiated ``features`` (0: no guest): frames to the guest may use no other offload.

        Raises PortError when the port refuses; one that is gone is told when it is back.
        """

    def enable(self, pair: int, enabled: bool) -> None:
        """Queue pair ``pair`` is (not) to get frames from now on. Called with the pair's pump paused.

        Raises PortError when the port refuses; one that is gone is told when it is back.
        """

    def announce(self, mac: bytes) -> None:
        """Tell the network where ``mac`` (6 bytes) now lives, on behalf of the guest (a fake RARP)."""

    def learned(self) -> dict[str, Any]:
        """What this port has learned of the guest and would be missed where the guest migrates to, fit for JSON."""
        return {}

    def recall(self, learned: dict[str, Any]) -> None:
        """Take over what a port of this kind has learned elsewhere. Raises ValueError, KeyError, TypeError or
        AttributeError where that makes no sense, and nothing has changed."""

    def watches(self) -> list[tuple[int, Callable[[], None]]]:
        """(descriptor, callback when it is readable) pairs for the control loop."""
        return []

    def lost(self) -> bool:
        """The pump found the port gone (EBADFD). Try to get it back; True when it is usable again."""
        return False

    def missed(self) -> Mapping[str, int]:
        """Frames for the guest that were lost before a lane counted them, by reason (ring.pump.DROP_REASONS)."""
        return {}

    def abandoned(self) -> None:
        """A worker is stuck with a lane of the device: what it may use of the port is its own from now on."""

    def export(self, put: Put) -> PortPart:
        """What another process needs to go on with this port (vdev/handover.py): the class of the same spec makes it of
        that again, with ``adopt(spec, state, take)``."""
        raise NotImplementedError

    def let_go(self) -> None:
        """Another process goes on with this port: close our descriptors, and undo nothing."""
        raise NotImplementedError

    def close(self) -> None:
        """Release everything this port made, and nothing it found."""
