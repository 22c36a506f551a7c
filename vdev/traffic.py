"""What went through a device between two readings of its counters, in words and as fields for machines."""

from collections.abc import Mapping
from typing import Any, Protocol


class FlowStats(Protocol):
    """Ever-growing counters of one direction, as ring/pump.py gives them."""

    frames: int
    bytes: int
    gso_frames: int
    kicks: int
    calls: int
    cycles: int
    bursts: int
    dropped: Mapping[str, int]  # reason -> frames


Reading = tuple[FlowStats, FlowStats]  # (from_guest, to_guest)
Counts = dict[str, dict[str, Any]]  # {"from_guest": {"frames": n, ..., "dropped": {reason: n}}, "to_guest": {...}}

COUNTERS = ("frames", "bytes", "gso_frames", "kicks", "calls")


def between(before: Reading, after: Reading) -> Counts:
    """The counts since ``before``."""
    return {name: _difference(*flows)
            for name, *flows in zip(("from_guest", "to_guest"), before, after, strict=True)}


def _difference(before: FlowStats, after: FlowStats) -> dict[str, Any]:
    counts: dict[str, Any] = {name: getattr(after, name) - getattr(before, name) for name in COUNTERS}
    lost = {reason: frames - before.dropped.get(reason, 0) for reason, frames in after.dropped.items()}
    counts["dropped"] = {reason: frames for reason, frames in lost.items() if frames}
    return counts


def effort(before: Reading, after: Reading) -> dict[str, dict[str, int]]:
    """What moving those frames took, by direction: ``cycles`` of this machine's time stamp counter, and ``bursts``,
    times that a ring was served. They are no part of the counts, which may travel."""
    return {name: {flow: getattr(now, name) - getattr(then, name)
                   for flow, then, now in zip(("from_guest", "to_guest"), before, after, strict=True)}
            for name in ("cycles", "bursts")}


def added(one: Counts, other: Counts) -> Counts:
    """The sum of two."""
    return {way: _sum(one[way], other[way]) for way in one}


def _sum(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    counts: dict[str, Any] = {name: one[name] + other[name] for name in COUNTERS}
    counts["dropped"] = {reason: one["dropped"].get(reason, 0) + other["dropped"].get(reason, 0)
                         for reason in {**one["dropped"], **other["dropped"]}}
    return counts


def sentence(traffic: Counts) -> str:
    """E.g. ``from guest 12 frames, 980 bytes, none dropped; to guest ...``."""
    return "; ".join(f"{name.replace('_', ' ')} {flow['frames']} frames, {flow['bytes']} bytes, "
                     f"{_losses(flow['dropped'])}" for name, flow in traffic.items())


def _losses(dropped: dict[str, int]) -> str:
    if not dropped:
        return "none dropped"
    return f"{sum(dropped.values())} dropped ({', '.join(f'{reason} {n}' for reason, n in dropped.items())})"
