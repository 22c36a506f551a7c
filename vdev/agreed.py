"""What front-end and back-end have agreed on, as the engine needs it and as a person reads it."""

from vdev.net.features import Feature, mask, names
from vhost_user.state import State


def settings_of(state: State, own_mtu: int | None = None) -> tuple[int, int, bool]:
    """What the engine is told of ``state`` beside the rings: features, MTU, whether to report kicks. own_mtu: what our
    configuration space says where the front-end has set none."""
    mtu = (state.mtu or own_mtu or 0) if state.features & mask(Feature.MTU) else 0
    parked = any(state.resumable(index) for index in range(len(state.rings)))
    # LOG_ALL is about the device, not for the guest.
    return state.features & ~mask(Feature.LOG_ALL), mtu, parked


def driver_line(state: State, shared: int) -> tuple[str, dict[str, object]]:
    """What the log says when the guest's driver is there, and the same as fields. shared: bytes of guest memory."""
    listed = names(state.features & ~mask(Feature.PROTOCOL_FEATURES, Feature.LOG_ALL))
    pairs = sum(ring.enabled for ring in state.rings[:len(state.rings) // 2 * 2:2])
    rings = "packed" if state.features & mask(Feature.RING_PACKED) else "split"
    order = ", used in order" if state.features & mask(Feature.IN_ORDER) else ""
    size = max(ring.num for ring in state.rings)
    text = (f"the guest's driver is ready: {pairs} queue pair{'s' * (pairs != 1)} of {len(state.rings) // 2} enabled, "
            f"{rings} rings{order}, queue size {size}, {shared >> 20} MiB shared, features {' '.join(listed)}")
    return text, {"features": listed, "queue_pairs": pairs, "rings": rings, "queue_size": size, "shared_bytes": shared}
