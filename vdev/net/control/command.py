"""What a command of the control queue is executed with, and what comes of it (virtio 1.2, 5.1.6.5 "Control Virtqueue").

A command is a pure function: of the bytes behind its class and number, and of a :class:`Context`. It returns an
:class:`Outcome` or raises :class:`Rejected`, and then nothing has changed.
"""

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ring.receive_settings import ReceiveSettings
from vdev.net.features import Feature, mask

OK, ERR = 0, 1  # VIRTIO_NET_OK, VIRTIO_NET_ERR


def control_queue_index(features: int, queue_pairs: int) -> int | None:
    """The index of the control queue of a device with so many queue pairs (virtio 1.2, 5.1.2), by the features
    negotiated; None: it has none."""
    if not features & mask(Feature.CTRL_VQ):
        return None
    return 2 * queue_pairs if features & mask(Feature.MQ, Feature.RSS) else 2


class Rejected(Exception):
    """The command is answered with VIRTIO_NET_ERR. One line for a person: what about it is wrong."""


@dataclass(frozen=True)
class Context:
    """What a command finds.

    features: negotiated. queue_pairs: how many there are. hash_types, tunnel_types: masks of those that can be had.
    enabled: the indices of receiveqs and transmitqs that are. counters: asked for when a driver asks for statistics, by
    statistics.py's names; of the control queue, and by the index of the queue.
    """

    features: int
    queue_pairs: int
    settings: ReceiveSettings
    hash_types: int = 0
    tunnel_types: int = 0
    enabled: frozenset[int] = frozenset()
    counters: Callable[[int], Mapping[str, int]] = field(default=lambda _index: {})

    def has(self, feature: Feature) -> bool:
        """``feature`` was negotiated."""
        return bool(self.features >> feature & 1)


@dataclass(frozen=True)
class Outcome:
    """A command that was executed. reply: the bytes that follow the acknowledgement. announced: the driver has done
    what STATUS_ANNOUNCE asks for."""

    settings: ReceiveSettings
    reply: bytes = b""
    announced: bool = False


Command = Callable[[bytes, Context], Outcome]


def unpack(layout: str, data: bytes) -> tuple:
    """The fields of ``data``, which is as long as struct's ``layout``, without padding. Raises Rejected."""
    size = struct.calcsize(f"<{layout}")
    if len(data) != size:
        raise Rejected(f"it comes with {len(data)} bytes, not {size}")
    return struct.unpack(f"<{layout}", data)
