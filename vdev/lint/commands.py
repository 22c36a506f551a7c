"""The rules about commands of the control queue, where it is ours (virtio 1.2, 5.1.6.5).

Whether a command is executed is for vdev/net/control/ to say; here it is said which rule a driver broke that sent it.
"""

import struct
from collections.abc import Iterator

from vdev.net.control.command import Context
from vdev.net.control.commands import COMMANDS
from vdev.net.control.offloads import SWITCHABLE
from vdev.net.features import names
from vdev.net.mac import MULTICAST

Finding = tuple[str, str]

_RX, _MAC, _MQ, _OFFLOADS, _COALESCING, _TUNNEL = 0, 1, 4, 5, 6, 7
_MAC_SIZE = 6

# Class, and the command where it matters -> the rule about the feature that it needs.
_NEEDS = {
    **dict.fromkeys(((_RX, 0), (_RX, 1)), "NET-RXF-DR-01"),
    **dict.fromkeys(((_RX, 2), (_RX, 3), (_RX, 4), (_RX, 5)), "NET-RXF-DR-02"),
    **dict.fromkeys(((_MAC, 0), (_MAC, 1)), "NET-MAC-DR-01"),
    (_MQ, 1): "NET-RSS-DR-01",
    **dict.fromkeys(((_COALESCING, number) for number in range(4)), "NET-COAL-DR-01"),
    (_TUNNEL, 0): "NET-HASH-DR-01",
}


def broken(command: bytes, context: Context) -> Iterator[Finding]:
    """What is wrong with ``command``: class, number, data. One that breaks no rule known here has none."""
    key, data = tuple(command[:2]), command[2:]
    row = COMMANDS.get(key)
    if row is None:
        yield "LINT-COMMAND", f"a command of {len(command)} bytes that begins {command[:2].hex(' ')}"
    elif not context.has(row.needs):
        yield _NEEDS.get(key, "LINT-COMMAND"), f"{row.name}, and {row.needs.name} was not negotiated"
    elif key == (_MQ, 0) and len(data) == 2:
        pairs = int.from_bytes(data, "little")
        if not 1 <= pairs <= context.queue_pairs:
            yield "NET-MQ-DR-02", f"{row.name} asks for {pairs} of {context.queue_pairs} pairs"
    elif key == (_OFFLOADS, 0) and len(data) == 8:
        extra = int.from_bytes(data, "little") & ~(context.features & SWITCHABLE)
        if extra:
            yield "NET-OFL-DR-01", f"{row.name} enables {', '.join(names(extra))}"
    elif key in ((_COALESCING, 2), (_COALESCING, 3)) and len(data) >= 2:
        index = int.from_bytes(data[:2], "little")
        if index not in context.enabled:
            yield "NET-COAL-DR-01", f"{row.name} names queue {index}, which is not enabled"
    elif key == (_MAC, 0) and _mixed(data):
        yield "NET-MAC-DR-03", f"{row.name}: an address is in the other's table"


def _mixed(tables: bytes) -> bool:
    """Is a multicast address in the first table, or one of a single station in the second?"""
    for multicast in (False, True):
        if len(tables) < 4:
            return False
        (count,) = struct.unpack_from("<I", tables)
        end = 4 + count * _MAC_SIZE
        if any(bool(tables[at] & MULTICAST) != multicast for at in range(4, min(end, len(tables)), _MAC_SIZE)):
            return True
        tables = tables[end:]
    return False
