"""``--features +mrg_rxbuf,-event_idx``: changes to the offer, by name.

Names are those of the specification without their prefix, in either case, as vdev/net/features.py has them.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from vdev.net.features import Feature, names
from vdev.net.offer import FIXED, IMPLEMENTED

# What QEMU's properties and everybody's speech call otherwise than the specification.
ALIASES = {"packed": Feature.RING_PACKED}


@dataclass(frozen=True)
class FeatureEdit:
    """Masks of virtio feature bits: ``add`` must be offered, ``remove`` must not."""

    add: int = 0
    remove: int = 0


def feature(name: str) -> Feature:
    """The feature called ``name``. Raises KeyError."""
    return ALIASES.get(name.lower()) or Feature[name.upper()]


def parse_features(items: Iterable[str]) -> FeatureEdit:
    """The changes that ``items`` (``+name`` or ``-name`` each) ask for.

    Raises ValueError for an item without a sign, an unknown or fixed feature (the error lists what may be
    changed), one that is not implemented, and one both added and removed.
    """
    changes = {"+": 0, "-": 0}
    for item in items:
        sign, name = item[:1], item[1:]
        if sign not in changes:
            raise ValueError(f"{item!r} needs a sign: +{item} to offer it, -{item} not to")
        try:
            bit = 1 << feature(name)
        except KeyError:
            listed = ", ".join(name.lower() for name in names(IMPLEMENTED & ~FIXED))
            raise ValueError(f"unknown feature {name!r}; known: {listed}") from None
        if bit & FIXED:
            raise ValueError(f"{name} is always offered, nothing works without it; leave it out")
        if sign == "+" and not bit & IMPLEMENTED:
            raise ValueError(f"{name} is not implemented by this version of vdev; leave it out")
        changes[sign] |= bit
    both = changes["+"] & changes["-"]
    if both:
        raise ValueError(f"{names(both)[0].lower()} is both added and removed; decide for one")
    return FeatureEdit(changes["+"], changes["-"])
