"""The state of a device that travels with its guest, as text: what it says, and what is believed of it.

One JSON object, up to BYTES_MAX long. ``vdev-state`` is its version: it changes when an older vdev would misread the
rest; a key that is merely new is passed over by those that do not know it.

    {"vdev-state": 1,
     "features": ["CSUM", ...],              what the guest negotiated, by the names of vdev/net/features.py
     "mtu": 1500,                            or null: none was set
     "queues": [{"size": 256, "enabled": true}, ...],        by ring index, those that have a size
     "macs": ["52:54:00:12:34:56"],          addresses that the guest sends from
     "settings": {...},                      or null: what the driver has set by the control queue, where that is ours
     "counters": {"from_guest": {"frames": 12, ..., "dropped": {"no_port": 3}}, "to_guest": {...}},
     "port": {"responder": {...}}}           what the port has learned of the guest, by kind of port

Rings are not part of it: their positions travel with the front-end (GET_VRING_BASE, SET_VRING_BASE), their content is
guest memory. What comes in is hostile like everything from that socket. vhost-user, "Migrating back-end state".
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ring.receive_settings import ReceiveSettings
from vdev.net.control import travel
from vdev.net.features import Feature, mask, names
from vdev.traffic import COUNTERS, Counts
from vhost_user.state import Offer, State

VERSION = 1
BYTES_MAX = 48 * 1024
_COUNT_MAX = 1 << 64
_REASONS_MAX = 64
MACS_MAX = 16  # each is announced at once where the guest comes to

_NOT_THE_GUESTS = mask(Feature.PROTOCOL_FEATURES, Feature.LOG_ALL)


class StateError(Exception):
    """A state cannot be taken over. One line: what about it, and what to do."""


@dataclass(frozen=True)
class DeviceState:
    """See the module. features: a mask. queues: (size, enabled) by ring index. macs: 6 bytes each."""

    features: int
    mtu: int | None
    queues: tuple[tuple[int, bool], ...]
    macs: tuple[bytes, ...]
    counters: Counts
    port: dict[str, Any] = field(default_factory=dict)
    settings: ReceiveSettings | None = None


def of_session(state: State, macs: Iterable[bytes], counters: Counts, port: dict[str, Any],
               settings: ReceiveSettings | None = None) -> DeviceState:
    """What ``state`` and what else is known have to say to the device at the other end."""
    queues = tuple((ring.num, ring.enabled) for ring in state.rings if ring.num)
    return DeviceState(state.features & ~_NOT_THE_GUESTS, state.mtu, queues, tuple(macs)[:MACS_MAX], counters, port,
                       settings)


def encode(state: DeviceState) -> bytes:
    """The text of ``state``."""
    text = json.dumps({
        "vdev-state": VERSION, "features": names(state.features), "mtu": state.mtu,
        "queues": [{"size": size, "enabled": enabled} for size, enabled in state.queues],
        "macs": [mac.hex(":") for mac in state.macs], "counters": state.counters, "port": state.port,
        "settings": travel.to_json(state.settings)})
    return text.encode()


def decode(data: bytes) -> DeviceState:
    """The state that ``data`` tells of. Raises StateError for anything that is none."""
    if len(data) > BYTES_MAX:
        raise StateError(f"it is longer than {BYTES_MAX} bytes, the most a state of vdev has")
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        raise StateError("it is no JSON text; was it saved by another back-end than vdev?") from None
    if not isinstance(found, dict) or "vdev-state" not in found:
        raise StateError("it has no vdev-state; was it saved by another back-end than vdev?")
    version = found["vdev-state"]
    if version != VERSION or isinstance(version, bool):
        raise StateError(f"its version is {str(version)[:20]}, this vdev knows {VERSION}; use the same release at both "
                         "ends")
    try:
        return DeviceState(_features(found["features"]), _mtu(found["mtu"]), _queues(found["queues"]),
                           _macs(found["macs"]), _counters(found["counters"]), _object(found["port"]),
                           _settings(found.get("settings")))
    except KeyError as missing:
        raise StateError(f"it lacks {missing}") from None
    except _Malformed as what:
        raise StateError(f"{what} makes no sense in it") from None


def check(state: DeviceState, offer: Offer) -> None:
    """Raises StateError if a device with ``offer`` cannot be what the guest has negotiated."""
    missing = state.features & ~offer.features
    if missing:
        raise StateError(f"the guest uses {', '.join(names(missing))}, which is not offered here; give this vdev the "
                         "port and the --features of the other")
    if len(state.queues) > offer.rings:
        raise StateError(f"the guest has {len(state.queues)} queues, here are {offer.rings}; give this vdev the "
                         "--queue-pairs of the other")
    pairs = travel.queue_pairs_needed(state.settings) if state.settings is not None else 0
    if pairs > offer.rings // 2:
        raise StateError(f"the guest's driver has set {pairs} queue pairs, here are {offer.rings // 2}; give this vdev "
                         "the --queue-pairs of the other")
    largest = max((size for size, _ in state.queues), default=0)
    if largest > offer.max_queue_size:
        raise StateError(f"a queue of the guest has {largest} entries, more than {offer.max_queue_size}")


class _Malformed(Exception):
    """Names the part that is not what it should be."""


def _features(value: Any) -> int:
    numbers = {bit.name: bit.value for bit in Feature}
    if not isinstance(value, list) or not all(isinstance(name, str) and name in numbers for name in value):
        raise _Malformed("features")
    return mask(*(Feature(numbers[name]) for name in value))


def _number(value: Any, what: str, limit: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < limit:
        raise _Malformed(what)
    return value


def _mtu(value: Any) -> int | None:
    return None if value is None else _number(value, "mtu", 1 << 16)


def _queues(value: Any) -> tuple[tuple[int, bool], ...]:
    if not isinstance(value, list):
        raise _Malformed("queues")
    queues = []
    for queue in map(_object, value):
        if not isinstance(queue["enabled"], bool):
            raise _Malformed("enabled")
        queues.append((_number(queue["size"], "size", 1 << 16), queue["enabled"]))
    return tuple(queues)


def _macs(value: Any) -> tuple[bytes, ...]:
    if not isinstance(value, list) or len(value) > MACS_MAX or not all(
            isinstance(mac, str) and re.fullmatch("[0-9a-f]{2}(:[0-9a-f]{2}){5}", mac) for mac in value):
        raise _Malformed("macs")
    return tuple(bytes.fromhex(mac.replace(":", "")) for mac in value)


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Malformed(json.dumps(value)[:40])
    return value


def _settings(value: Any) -> ReceiveSettings | None:
    try:
        return travel.from_json(value)
    except ValueError as error:
        raise _Malformed(str(error)) from None


def _counters(value: Any) -> Counts:
    counts: Counts = {}
    for way in ("from_guest", "to_guest"):
        flow = _object(_object(value)[way])
        dropped = _object(flow["dropped"])
        if len(dropped) > _REASONS_MAX:
            raise _Malformed("dropped")
        counts[way] = {name: _number(flow[name], name, _COUNT_MAX) for name in COUNTERS}
        counts[way]["dropped"] = {reason: _number(frames, "dropped", _COUNT_MAX) for reason, frames in dropped.items()}
    return counts
