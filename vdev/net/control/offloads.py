"""The command that switches offloads of frames to the guest (virtio 1.2, 5.1.6.5.8 "Offloads State Configuration")."""

from dataclasses import replace

from vdev.net.control.command import Context, Outcome, Rejected, unpack
from vdev.net.features import GUEST_GSO, Feature, mask, names

SWITCHABLE = mask(Feature.GUEST_CSUM) | GUEST_GSO


def guest_offloads_set(data: bytes, context: Context) -> Outcome:
    """These offloads are on, all others that can be switched off."""
    (on,) = unpack("Q", data)
    unknown = on & ~(context.features & SWITCHABLE)
    if unknown:
        raise Rejected(f"{', '.join(names(unknown))} cannot be switched on: not negotiated, or no offload of the guest")
    return Outcome(replace(context.settings, guest_offloads=on))
