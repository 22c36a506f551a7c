"""Commands that ask for counters (virtio 1.4, "Device Statistics").

Each type of statistics is a row: which queues have it, and the names of its counters in order. What those count is for
the specification to say, and for whoever is asked for them (Context.counters).
"""

import struct
from dataclasses import dataclass

from vdev.net.control.command import Context, Outcome, Rejected, control_queue_index, unpack
from vdev.net.features import Feature, mask, names

_WRAP = (1 << 64) - 1
_REPLY_HEAD = struct.Struct("<BxHxxH")  # type, vq_index, size
_REQUEST = struct.Struct("<H6xQ")  # vq_index, types_bitmap


@dataclass(frozen=True)
class Type:
    """queues: "control", "receive" or "transmit". counters: 64-bit each, in the order of the reply. needs: a mask of
    features, one of which has to be negotiated; 0: none."""

    queues: str
    counters: tuple[str, ...]
    needs: int = 0


# bit of supported_stats_types and types_bitmap, and the reply's type
TYPES = {
    0: Type("receive", ("notifications", "packets", "bytes", "interrupts", "drops", "drop_overruns")),
    1: Type("receive", ("csum_valid", "needs_csum", "csum_none", "csum_bad"), mask(Feature.GUEST_CSUM)),
    2: Type("receive", ("gso_packets", "gso_bytes", "gso_packets_coalesced", "gso_bytes_coalesced"),
            mask(Feature.GUEST_TSO4, Feature.GUEST_TSO6)),
    16: Type("transmit", ("notifications", "packets", "bytes", "interrupts", "drops", "drop_malformed")),
    17: Type("transmit", ("csum_none", "needs_csum"), mask(Feature.CSUM)),
    32: Type("control", ("command_num", "ok_num")),
}


def query(data: bytes, context: Context) -> Outcome:
    """Which types there are."""
    unpack("", data)
    return Outcome(context.settings, struct.pack("<Q", sum(1 << bit for bit in TYPES)))


def get(data: bytes, context: Context) -> Outcome:
    """The counters of some types, each of some queues. One entry that is wrong makes the whole of it wrong."""
    if not data or len(data) % _REQUEST.size:
        raise Rejected(f"it comes with {len(data)} bytes, not with some entries of {_REQUEST.size}")
    reply = b"".join(_entry(index, types, context) for index, types in _REQUEST.iter_unpack(data))
    return Outcome(context.settings, reply)


def _entry(index: int, types: int, context: Context) -> bytes:
    kind = _kind(index, context)
    wrong = types & ~sum(1 << bit for bit, each in TYPES.items() if each.queues == kind)
    if wrong:
        raise Rejected(f"queue {index}, a {kind} queue, has no statistics of types {wrong:#x}")
    for bit, each in TYPES.items():
        if types >> bit & 1 and each.needs and not each.needs & context.features:
            raise Rejected(f"statistics of type {bit} need one of {', '.join(names(each.needs))}, not negotiated")
    counters = context.counters(index)
    reply = b""
    for bit, each in TYPES.items():
        if types >> bit & 1:
            values = struct.pack(f"<{len(each.counters)}Q", *(counters[name] & _WRAP for name in each.counters))
            reply += _REPLY_HEAD.pack(bit, index, _REPLY_HEAD.size + len(values)) + values
    return reply


def _kind(index: int, context: Context) -> str:
    control = control_queue_index(context.features, context.queue_pairs)
    if index == control:
        return "control"
    if control is None or index > control:
        raise Rejected(f"there is no queue {index}")
    return "transmit" if index % 2 else "receive"
