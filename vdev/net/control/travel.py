"""What a driver has set, as it travels with its guest: fit for JSON, and checked where it arrives."""

from dataclasses import replace
from typing import Any

from ring.receive_settings import (
    ALL_HASH_TYPES,
    ALL_TUNNEL_TYPES,
    KEY_SIZE,
    MAC_SIZE,
    MACS_MAX,
    TABLE_MAX,
    VLANS,
    ReceiveSettings,
)
from vdev.plain import from_plain, to_plain

_U32, _U64 = 1 << 32, 1 << 64


def to_json(settings: ReceiveSettings | None) -> Any:
    """Of tables with more addresses than are told apart, as many as show that there are more."""
    if settings is None:
        return None
    return to_plain(replace(settings, unicast=settings.unicast[:MACS_MAX], multicast=settings.multicast[:MACS_MAX]))


def from_json(data: Any) -> ReceiveSettings | None:
    """The settings that ``data`` stands for. Raises ValueError for what no command can have set."""
    settings = from_plain(ReceiveSettings | None, data, "settings")
    if settings is None:
        return None
    entries = settings.indirection
    sound = (
        all(len(mac) == MAC_SIZE for mac in (settings.mac, *settings.unicast, *settings.multicast))
        and len(settings.unicast) <= MACS_MAX and len(settings.multicast) <= MACS_MAX
        and all(0 <= vlan < VLANS for vlan in settings.vlans)
        and 0 < len(entries) <= TABLE_MAX and not len(entries) & len(entries) - 1
        and len(settings.hash_key) <= KEY_SIZE
        and settings.hash_types & ALL_HASH_TYPES == settings.hash_types
        and settings.tunnel_types & ALL_TUNNEL_TYPES == settings.tunnel_types
        and min(settings.pairs - 1, settings.unclassified, *entries) >= 0
        and 0 <= (settings.guest_offloads or 0) < _U64
        and all(0 <= number < _U32 for each in settings.coalescing for number in (each.packets, each.usecs)))
    if not sound:
        raise ValueError("settings: out of bounds")
    return settings


def queue_pairs_needed(settings: ReceiveSettings) -> int:
    """How many queue pairs a device must have for them."""
    return max(settings.pairs, settings.unclassified + 1, max(settings.indirection) + 1, len(settings.coalescing) // 2)
