"""Feature bits of a virtio network device, by name.

Numbers and names as in virtio 1.x, sections "Network Device / Feature bits" and "Reserved Feature Bits".
"""

from enum import IntEnum


class Feature(IntEnum):
    """Bit numbers. ``1 << Feature.CSUM`` is the mask; ``mask(CSUM, ...)`` joins several."""

    CSUM = 0  # device takes frames with a partial checksum
    GUEST_CSUM = 1  # driver takes frames with a partial checksum
    CTRL_GUEST_OFFLOADS = 2
    MTU = 3
    MAC = 5
    GUEST_TSO4 = 7
    GUEST_TSO6 = 8
    GUEST_ECN = 9
    GUEST_UFO = 10
    HOST_TSO4 = 11
    HOST_TSO6 = 12
    HOST_ECN = 13
    HOST_UFO = 14
    MRG_RXBUF = 15
    STATUS = 16
    CTRL_VQ = 17
    CTRL_RX = 18
    CTRL_VLAN = 19
    CTRL_RX_EXTRA = 20
    GUEST_ANNOUNCE = 21
    MQ = 22
    CTRL_MAC_ADDR = 23
    LOG_ALL = 26  # vhost, not virtio: log every write for live migration
    ANY_LAYOUT = 27
    INDIRECT_DESC = 28
    EVENT_IDX = 29
    PROTOCOL_FEATURES = 30  # vhost-user, not virtio: protocol features exist
    VERSION_1 = 32
    ACCESS_PLATFORM = 33
    RING_PACKED = 34
    IN_ORDER = 35
    ORDER_PLATFORM = 36
    NOTIFICATION_DATA = 38
    RING_RESET = 40
    DEVICE_STATS = 50
    HASH_TUNNEL = 51
    VQ_NOTF_COAL = 52
    NOTF_COAL = 53
    GUEST_USO4 = 54
    GUEST_USO6 = 55
    HOST_USO = 56
    HASH_REPORT = 57
    GUEST_HDRLEN = 59
    RSS = 60
    RSC_EXT = 61
    STANDBY = 62
    SPEED_DUPLEX = 63


def mask(*bits: Feature) -> int:
    """The 64-bit mask with exactly these bits set."""
    value = 0
    for bit in bits:
        value |= 1 << bit
    return value


def names(value: int) -> list[str]:
    """The names of the bits set in ``value``, lowest first; ``BIT_n`` for one that has no name."""
    known = {bit.value: bit.name for bit in Feature}
    return [known.get(n, f"BIT_{n}") for n in range(value.bit_length()) if value >> n & 1]


# What each side of segmentation and checksum offload consists of. "host" = from the guest to us,
# "guest" = from us to the guest, as the specification names them.
HOST_GSO = mask(Feature.HOST_TSO4, Feature.HOST_TSO6, Feature.HOST_ECN, Feature.HOST_UFO, Feature.HOST_USO)
GUEST_GSO = mask(Feature.GUEST_TSO4, Feature.GUEST_TSO6, Feature.GUEST_ECN, Feature.GUEST_UFO,
                 Feature.GUEST_USO4, Feature.GUEST_USO6)
OFFLOADS = mask(Feature.CSUM, Feature.GUEST_CSUM) | HOST_GSO | GUEST_GSO
