"""Commands about when a driver is notified of used buffers (virtio 1.2, 5.1.6.5.9 "Notifications Coalescing"; about one
queue: virtio 1.3).
"""

import struct
from collections.abc import Iterable
from dataclasses import replace

from ring.receive_settings import Coalescing
from vdev.net.control.command import Context, Outcome, Rejected, unpack

_COAL = struct.Struct("<II")  # max_packets, max_usecs


def transmitqs_set(data: bytes, context: Context) -> Outcome:
    """The same for all transmitqs."""
    return _set(context, range(1, 2 * context.queue_pairs, 2), Coalescing(*unpack("II", data)))


def receiveqs_set(data: bytes, context: Context) -> Outcome:
    """The same for all receiveqs."""
    return _set(context, range(0, 2 * context.queue_pairs, 2), Coalescing(*unpack("II", data)))


def vq_set(data: bytes, context: Context) -> Outcome:
    """That of one queue."""
    index, _reserved, packets, usecs = unpack("HHII", data)
    return _set(context, [_enabled(index, context)], Coalescing(packets, usecs))


def vq_get(data: bytes, context: Context) -> Outcome:
    """What that of one queue is. The rest of the structure may come along or not: it is in the answer."""
    index, *_ = unpack("HHII" if len(data) > 4 else "HH", data)
    found = context.settings.coalescing_of(_enabled(index, context))
    return Outcome(context.settings, _COAL.pack(found.packets, found.usecs))


def _enabled(index: int, context: Context) -> int:
    if index not in context.enabled:
        raise Rejected(f"queue {index} is no receiveq or transmitq that is enabled")
    return index


def _set(context: Context, indices: Iterable[int], wanted: Coalescing) -> Outcome:
    every = [context.settings.coalescing_of(index) for index in range(2 * context.queue_pairs)]
    for index in indices:
        every[index] = wanted
    return Outcome(replace(context.settings, coalescing=tuple(every)))
