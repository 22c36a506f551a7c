"""The configuration space of a network device: struct virtio_net_config.

virtio 1.2, 5.1.4 "Device configuration layout". All fields are read-only for a driver that has accepted VERSION_1
(5.1.4), and a field means something only where its feature was offered; the others read as zeroes.
"""

import struct
from dataclasses import dataclass

from vdev.net.features import Feature as F
from vdev.net.features import mask

# mac, status, max_virtqueue_pairs, mtu, speed, duplex, rss_max_key_size, rss_max_indirection_table_length,
# supported_hash_types, supported_tunnel_types (virtio 1.3)
_LAYOUT = struct.Struct("<6sHHHIBBHII")
SIZE = _LAYOUT.size  # bytes

STATUS_LINK_UP = 1
STATUS_ANNOUNCE = 2
DUPLEX_FULL = 1
SPEED_MAX = (1 << 31) - 1  # Mbit/s

_MAC_END = 6


@dataclass(frozen=True)
class ConfigSpace:
    """What a device has to say in its configuration space.

    mac: 6 bytes. queue_pairs: how many there are. mtu: bytes, 68 to 65535. speed: Mbit/s. announce: the driver is asked
    to announce its guest to the network. key_size, table_length, hash_types, tunnel_types: what RSS and HASH_REPORT can
    do.
    """

    mac: bytes
    queue_pairs: int
    mtu: int
    speed: int
    link_up: bool = True
    announce: bool = False
    key_size: int = 0
    table_length: int = 0
    hash_types: int = 0
    tunnel_types: int = 0

    def encode(self, features: int) -> bytes:
        """All SIZE bytes, as they read for whoever was offered ``features``."""
        def where(value: int, *needed: F) -> int:
            return value if features & mask(*needed) else 0

        status = self.link_up * STATUS_LINK_UP | self.announce * STATUS_ANNOUNCE
        return _LAYOUT.pack(
            self.mac if features & mask(F.MAC) else bytes(len(self.mac)), where(status, F.STATUS),
            where(self.queue_pairs, F.MQ, F.RSS), where(self.mtu, F.MTU), where(self.speed, F.SPEED_DUPLEX),
            where(DUPLEX_FULL, F.SPEED_DUPLEX), where(self.key_size, F.RSS, F.HASH_REPORT),
            where(self.table_length, F.RSS), where(self.hash_types, F.RSS, F.HASH_REPORT),
            where(self.tunnel_types, F.HASH_TUNNEL))


def mac_after(space: bytes, offset: int, data: bytes) -> bytes:
    """The address there would be if ``data`` were written at ``offset`` of ``space``, SIZE bytes. Raises ValueError
    where anything but the address would change."""
    written = space[:offset] + data + space[offset + len(data):]
    if len(written) != SIZE or written[_MAC_END:] != space[_MAC_END:]:
        raise ValueError("it would change more than the MAC address")
    return written[:_MAC_END]
