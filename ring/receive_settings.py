"""What a driver has set about what it receives (virtio 1.2, 5.1.6.5 "Control Virtqueue"), for the switch that delivers
to it (contract: plane/settings.h; what becomes of it: plane/receive.c).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntFlag

from ring.build import ffi, lib

MACS_MAX = lib.RECEIVE_MACS
KEY_SIZE = lib.RSS_KEY  # bytes
TABLE_MAX = lib.RSS_TABLE
VLANS = 4096
MAC_SIZE = 6


class HashType(IntFlag):
    """VIRTIO_NET_RSS_HASH_TYPE_* (virtio 1.2, 5.1.6.4.3)."""

    IPV4 = 1 << 0
    TCPV4 = 1 << 1
    UDPV4 = 1 << 2
    IPV6 = 1 << 3
    TCPV6 = 1 << 4
    UDPV6 = 1 << 5
    IP_EX = 1 << 6
    TCP_EX = 1 << 7
    UDP_EX = 1 << 8


class TunnelType(IntFlag):
    """VIRTIO_NET_HASH_TUNNEL_TYPE_* (virtio 1.3, "Inner Header Hash")."""

    GRE_2784 = 1 << 0
    GRE_2890 = 1 << 1
    GRE_7676 = 1 << 2
    GRE_UDP = 1 << 3
    VXLAN = 1 << 4
    VXLAN_GPE = 1 << 5
    GENEVE = 1 << 6
    IPIP = 1 << 7
    NVGRE = 1 << 8


ALL_HASH_TYPES = HashType((1 << 9) - 1)
ALL_TUNNEL_TYPES = TunnelType((1 << 9) - 1)


@dataclass(frozen=True)
class Coalescing:
    """When the driver is to be notified: after ``packets`` packets or ``usecs`` microseconds since the first one it
    was not told of, whichever comes first; where either is 0, at once (5.1.6.5.9)."""

    packets: int = 0
    usecs: int = 0


@dataclass(frozen=True)
class ReceiveSettings:
    """Everything that the commands of a driver have set, as a value: a command makes another one. As it is by default
    nothing is refused and nothing hashed, and all goes to the first receiveq.

    mac: the device's own address, 6 bytes.
    filter_macs: frames for other addresses are refused (CTRL_RX was negotiated); the six modes and the two tables mean
    something only then. Of a table with more than MACS_MAX entries, or of two that have more together, every address is
    let in.
    filter_vlans: tagged frames are refused whose id is not in ``vlans`` (CTRL_VLAN was negotiated). With
    ``promiscuous`` they are let in.

    pairs: how many queue pairs the driver uses, without ``rss``.
    rss: the hash selects the receiveq, through ``indirection``, a power of two of them; ``unclassified`` gets what has
    no hash. Queues are numbered from 0, as queue pairs are.
    hash_types: of which a hash is made; without any there is none. hash_key: up to KEY_SIZE bytes; what is missing
    counts as zeroes. tunnel_types: of which the inner header is hashed.

    guest_offloads: the mask of the offloads that are on (5.1.6.5.8), by feature bits; None: all that were negotiated.
    coalescing: by the index of the virtqueue; one that is not there: at once.
    """

    mac: bytes = bytes(MAC_SIZE)
    filter_macs: bool = False
    filter_vlans: bool = False
    promiscuous: bool = False
    all_multicast: bool = False
    all_unicast: bool = False
    no_multicast: bool = False
    no_unicast: bool = False
    no_broadcast: bool = False
    unicast: tuple[bytes, ...] = ()
    multicast: tuple[bytes, ...] = ()
    vlans: tuple[int, ...] = ()

    pairs: int = 1
    rss: bool = False
    indirection: tuple[int, ...] = (0,)
    unclassified: int = 0
    hash_types: HashType = HashType(0)
    hash_key: bytes = bytes(KEY_SIZE)
    tunnel_types: TunnelType = TunnelType(0)

    guest_offloads: int | None = None
    coalescing: tuple[Coalescing, ...] = ()

    def features(self, negotiated: int, offloads: int) -> int:
        """``negotiated`` less those of the guest's ``offloads`` (both masks of features) that are switched off."""
        return negotiated if self.guest_offloads is None else negotiated & (~offloads | self.guest_offloads)

    def coalescing_of(self, ring: int) -> Coalescing:
        """That of the virtqueue with this index."""
        return self.coalescing[ring] if ring < len(self.coalescing) else Coalescing()

    def receiving(self, ready: Sequence[int]) -> list[int]:
        """Those of the receiveqs ``ready``, by number, that get frames."""
        return list(ready) if self.rss else [queue for queue in ready if queue < self.pairs]


def as_struct(settings: ReceiveSettings, doors: Sequence[int]) -> object:
    """A struct receive_settings of it. doors: which receiveq, by number, is behind door 0, 1, ...

    Raises ValueError for an indirection table that is no power of two or too long, a key that is too long, a VLAN id
    or an address that there is not.
    """
    made = ffi.new("struct receive_settings *")
    _set_filters(made, settings)
    _set_hash(made, settings)
    behind = {queue: door for door, queue in enumerate(doors)}
    entries = settings.indirection
    if not 0 < len(entries) <= TABLE_MAX or len(entries) & (len(entries) - 1):
        raise ValueError(f"an indirection table of {len(entries)} entries: a power of two up to {TABLE_MAX} is wanted")
    made.rss = settings.rss
    made.mask = len(entries) - 1
    for index, queue in enumerate(entries):
        made.table[index] = behind.get(queue, lib.RECEIVE_NO_DOOR)
    made.unclassified = behind.get(settings.unclassified, lib.RECEIVE_NO_DOOR)
    return made


def _set_filters(made, settings: ReceiveSettings) -> None:
    s = settings
    addresses = (s.mac, *s.unicast, *s.multicast)
    overflows = len(addresses) > MACS_MAX
    modes = {lib.RECEIVE_BY_ADDRESS: s.filter_macs, lib.RECEIVE_BY_VLAN: s.filter_vlans,
             lib.RECEIVE_ALL: s.promiscuous, lib.RECEIVE_ALL_MULTICAST: s.all_multicast or overflows,
             lib.RECEIVE_ALL_UNICAST: s.all_unicast or overflows, lib.RECEIVE_NO_MULTICAST: s.no_multicast,
             lib.RECEIVE_NO_UNICAST: s.no_unicast, lib.RECEIVE_NO_BROADCAST: s.no_broadcast}
    made.modes = sum(bit for bit, is_on in modes.items() if is_on)
    made.macs = min(len(addresses), MACS_MAX)
    for index, mac in enumerate(addresses[:MACS_MAX]):
        if len(mac) != MAC_SIZE:
            raise ValueError(f"an address of {len(mac)} bytes")
        made.mac[index] = mac
    for vlan in s.vlans:
        if not 0 <= vlan < VLANS:
            raise ValueError(f"VLAN id {vlan}")
        made.vlan[vlan // 64] |= 1 << vlan % 64


def _set_hash(made, settings: ReceiveSettings) -> None:
    if len(settings.hash_key) > KEY_SIZE:
        raise ValueError(f"a hash key of {len(settings.hash_key)} bytes: there are {KEY_SIZE} at the most")
    made.hash_types, made.tunnel_types = settings.hash_types, settings.tunnel_types
    made.key = settings.hash_key.ljust(KEY_SIZE, b"\0")
