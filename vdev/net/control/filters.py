"""Commands about what a driver lets in: receive modes, addresses, VLANs.

virtio 1.2, 5.1.6.5.1 "Packet Receive Filtering", 5.1.6.5.2 "Setting MAC Address Filtering", 5.1.6.5.3 "VLAN Filtering".
"""

import struct
from dataclasses import replace

from ring.receive_settings import MAC_SIZE, VLANS
from vdev.net.control.command import Command, Context, Outcome, Rejected, unpack
from vdev.net.mac import MULTICAST

_COUNT = struct.Struct("<I")


def mode(name: str) -> Command:
    """The command that switches the receive mode ``name`` of ReceiveSettings: one byte, 0 or 1."""
    def switch(data: bytes, context: Context) -> Outcome:
        (on,) = unpack("B", data)
        if on not in (0, 1):
            raise Rejected(f"{on} is neither 1 (on) nor 0 (off)")
        return Outcome(replace(context.settings, **{name: bool(on)}))
    return switch


def mac_table_set(data: bytes, context: Context) -> Outcome:
    """Two tables: addresses of one station, then of several."""
    unicast, rest = _table(data, "first")
    multicast, rest = _table(rest, "second")
    if rest:
        raise Rejected(f"{len(rest)} bytes follow its second table")
    if any(mac[0] & MULTICAST for mac in unicast) or not all(mac[0] & MULTICAST for mac in multicast):
        raise Rejected("a table has an address that belongs into the other (unicast first, then multicast)")
    return Outcome(replace(context.settings, unicast=unicast, multicast=multicast))


def _table(data: bytes, which: str) -> tuple[tuple[bytes, ...], bytes]:
    """The addresses of the table that ``data`` begins with, and what follows."""
    if len(data) < _COUNT.size:
        raise Rejected(f"its {which} table has no count")
    (count,) = _COUNT.unpack_from(data)
    end = _COUNT.size + count * MAC_SIZE
    if end > len(data):
        raise Rejected(f"its {which} table has room for {(len(data) - _COUNT.size) // MAC_SIZE} addresses, not {count}")
    return tuple(data[at:at + MAC_SIZE] for at in range(_COUNT.size, end, MAC_SIZE)), data[end:]


def mac_addr_set(data: bytes, context: Context) -> Outcome:
    """The device's own address."""
    (mac,) = unpack("6s", data)
    if mac[0] & MULTICAST or not any(mac):
        raise Rejected(f"{mac.hex(':')} is no address of one station")
    return Outcome(replace(context.settings, mac=mac))


def vlan_add(data: bytes, context: Context) -> Outcome:
    """Frames of this VLAN are let in."""
    vlans = {*context.settings.vlans, _vlan(data)}
    return Outcome(replace(context.settings, vlans=tuple(sorted(vlans))))


def vlan_del(data: bytes, context: Context) -> Outcome:
    """Frames of this VLAN are refused again."""
    vlans = set(context.settings.vlans) - {_vlan(data)}
    return Outcome(replace(context.settings, vlans=tuple(sorted(vlans))))


def _vlan(data: bytes) -> int:
    (vlan,) = unpack("H", data)
    if vlan >= VLANS:
        raise Rejected(f"there is no VLAN {vlan}: they go up to {VLANS - 1}")
    return vlan
