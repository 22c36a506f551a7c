"""Frames that somebody else is to cut into segments, made at random; and what scapy makes of them.

Specification: virtio 1.2, section 5.1.6.2 "Packet Transmission".
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_NOP, IPOption_Router_Alert, fragment, in4_pseudoheader
from scapy.layers.inet6 import (
    HBHOptUnknown,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    in6_pseudoheader,
)
from scapy.layers.l2 import Dot1AD, Dot1Q, Ether
from scapy.packet import Packet, Raw
from scapy.utils import checksum

from vdev.testing.netdriver import GSO_ECN, GSO_TCPV4, GSO_TCPV6, GSO_UDP, GSO_UDP_L4, NEEDS_CSUM, NetHeader

KINDS = {"tcp4": (GSO_TCPV4, 4), "tcp6": (GSO_TCPV6, 6), "uso4": (GSO_UDP_L4, 4), "uso6": (GSO_UDP_L4, 6),
         "ufo4": (GSO_UDP, 4), "ufo6": (GSO_UDP, 6)}
ADDRESSES = {4: ("10.9.0.1", "10.9.0.2"), 6: ("fd00:9::1", "fd00:9::2")}
MACS = ("52:54:00:00:00:01", "52:54:00:00:00:02")  # source, destination
FURTHER = ("fd00:9::3", "fd00:9::4")  # where a routing header leads to

_NOT_IN_INNER = {"F": "last", "P": "last", "C": "first"}  # TCP flags, and which segment keeps them


@dataclass(frozen=True)
class Oversized:
    """A frame as its sender leaves it. ``packet``: the same with no checksum in TCP or UDP yet."""

    header: NetHeader
    packet: Packet
    frame: bytes

    def segments(self, fragment_id: int = 0) -> list[bytes]:
        """What has to become of it, by scapy."""
        if self.header.gso_type == GSO_UDP:
            return list(_fragments(self.packet, self.header.gso_size, fragment_id))
        return list(_segments(self.packet, self.header.gso_size))

    def without_checksum(self) -> "Oversized":
        """The same of a sender that says nothing of a checksum and leaves anything in its field."""
        packet = self.packet.copy()
        _transport(packet).chksum = 0x1234
        return Oversized(replace(self.header, flags=0, csum_start=0, csum_offset=0), self.packet, bytes(packet))


def oversized(packet: Packet, kind: str, gso_size: int, ecn: bool = False) -> Oversized:
    """``packet`` with the sum of its pseudo header where the checksum belongs, and the net header for it."""
    gso_type, _ = KINDS[kind]
    packet = packet.copy()
    _clean(packet)
    start, offset, frame = partial(packet)
    header = NetHeader(NEEDS_CSUM, gso_type | (GSO_ECN if ecn else 0), start, gso_size, start, offset)
    return Oversized(header, packet, frame)


def partial(packet: Packet) -> tuple[int, int, bytes]:
    """-> (csum_start, csum_offset, the frame with the sum of the pseudo header alone in its checksum)."""
    transport = _transport(packet)
    length = len(bytes(transport))
    protocol = {TCP: 6, UDP: 17}.get(type(transport))
    if isinstance(transport, ICMP):
        summed = b""
    elif IPv6 in packet:
        summed = bytes(in6_pseudoheader(protocol, transport.underlayer, length))
    else:
        summed = in4_pseudoheader(protocol, packet[IP], length)
    packet = packet.copy()
    _transport(packet).chksum = ~checksum(summed) & 0xFFFF
    frame = bytes(packet)
    return len(frame) - length, {TCP: 16, UDP: 6, ICMP: 2}[type(transport)], frame


def random_oversized(rng: random.Random, kind: str) -> Oversized:
    """Tags, options, extension headers, lengths, flags and numbers near their end, all at random."""
    gso_type, version = KINDS[kind]
    tcp = gso_type in (GSO_TCPV4, GSO_TCPV6)
    size = rng.choice((48, 49, 536, 1448, rng.randrange(48, 3000)))
    if gso_type == GSO_UDP:
        size += 256  # all headers of an IPv6 datagram have to be in its first fragment
    payload = rng.randbytes(max(0, size * rng.randrange(1, 12) + rng.choice((-1, 0, 1, rng.randrange(-size, size)))))
    transport = random_tcp(rng) if tcp else UDP(sport=rng.randrange(65536), dport=rng.randrange(65536))
    packet = random_link(rng) / (random_ipv4(rng) if version == 4 else random_ipv6(rng)) / transport
    return oversized(packet / Raw(payload) if payload else packet, kind, size, ecn=tcp and rng.random() < 0.3)


def random_whole(rng: random.Random) -> Packet:
    """A packet of TCP, UDP or ICMP that nobody has to cut, its checksum complete."""
    transport = rng.choice((random_tcp(rng), UDP(sport=rng.randrange(65536)), ICMP(seq=rng.randrange(65536))))
    ip = random_ipv6 if not isinstance(transport, ICMP) and rng.random() < 0.5 else random_ipv4
    return random_link(rng) / ip(rng) / transport / Raw(rng.randbytes(rng.randrange(1500)))


def random_link(rng: random.Random) -> Packet:
    """An Ethernet header with no VLAN tag, one or two."""
    packet = Ether(src=MACS[0], dst=MACS[1])
    for tag in rng.choice(((), (Dot1Q(vlan=7, prio=3),), (Dot1AD(vlan=5), Dot1Q(vlan=7)), (Dot1Q(vlan=5), Dot1Q()))):
        packet /= tag
    return packet


def random_ipv4(rng: random.Random) -> Packet:
    """An IPv4 header with up to 40 bytes of options."""
    source, destination = ADDRESSES[4]
    options = [IPOption_Router_Alert(), IPOption_NOP()] * rng.choice((0, 0, 1, 3, 8))
    return IP(src=source, dst=destination, id=rng.choice((0, 65533, rng.randrange(65536))), tos=rng.randrange(256),
              ttl=rng.randrange(1, 256), flags=rng.choice((0, "DF")), options=options)


def random_ipv6(rng: random.Random, routed: bool = True) -> Packet:
    """An IPv6 header with extension headers, in the order that RFC 8200 (4.1) recommends. routed: maybe with one that
    leads to another destination."""
    source, destination = ADDRESSES[6]
    packet = IPv6(src=source, dst=destination, tc=rng.randrange(256), fl=rng.randrange(1 << 20),
                  hlim=rng.randrange(1, 256))
    option = HBHOptUnknown(otype=0x1E, optdata=rng.randbytes(rng.randrange(20)))  # whoever does not know it skips it
    for extension in (IPv6ExtHdrHopByHop(options=[option]), IPv6ExtHdrDestOpt(options=[option]),
                      IPv6ExtHdrRouting(addresses=list(FURTHER), segleft=rng.randrange(3) if routed else 0),
                      IPv6ExtHdrDestOpt(options=[option, option])):
        if rng.random() < 0.3:
            packet /= extension
    return packet


def random_tcp(rng: random.Random) -> Packet:
    """A TCP header with options and any flags."""
    options = [("Timestamp", (rng.randrange(1 << 32), 5)), ("NOP", None), ("NOP", None),
               ("SAck", (1, 2, 3, 4)), ("MSS", 1460)]
    return TCP(sport=rng.randrange(65536), dport=rng.randrange(65536), ack=rng.randrange(1 << 32),
               seq=rng.choice((0, (1 << 32) - 50, rng.randrange(1 << 32))), flags=rng.randrange(256),
               window=rng.randrange(65536), options=options[:rng.randrange(6)])


def _transport(packet: Packet) -> Packet:
    return next(packet[layer] for layer in (TCP, UDP, ICMP) if layer in packet)


def _clean(packet: Packet) -> None:
    """Have scapy calculate, once more, what follows from the rest."""
    del _transport(packet).chksum
    for layer, fields in ((UDP, ("len",)), (IP, ("len", "chksum")), (IPv6, ("plen",))):
        if layer in packet:
            for field in fields:
                delattr(packet[layer], field)


def _segments(packet: Packet, size: int) -> Iterator[bytes]:
    transport = _transport(packet)
    payload, flags = bytes(transport.payload), str(getattr(transport, "flags", ""))
    starts = range(0, max(len(payload), 1), size)
    for i, at in enumerate(starts):
        made = packet.copy()
        mine = _transport(made)
        mine.remove_payload()
        mine.add_payload(payload[at:at + size])
        if IP in made:
            made[IP].id = (made[IP].id + i) % 65536
        if TCP in made:
            mine.seq = (mine.seq + at) % (1 << 32)
            place = {"first"} if i == 0 else set()
            place |= {"last"} if i == len(starts) - 1 else set()
            mine.flags = "".join(flag for flag in flags if _NOT_IN_INNER.get(flag) in {None, *place})
        _clean(made)
        yield bytes(made)


def _fragments(packet: Packet, size: int, fragment_id: int) -> Iterator[bytes]:
    made = packet.copy()
    _clean(made)
    if len(bytes(_fragmentable(made))) <= size:
        yield bytes(made)
    elif IP in made:
        made = Ether(bytes(made))
        made[IP].flags = 0
        yield from map(bytes, fragment(made, size // 8 * 8))
    else:
        yield from _ipv6_fragments(made, size // 8 * 8, fragment_id)


def _fragmentable(packet: Packet) -> Packet:
    """The first layer that is not repeated in each fragment (RFC 8200, 4.5)."""
    for layer in (IPv6ExtHdrRouting, IPv6ExtHdrHopByHop, IPv6, IP):
        if layer in packet:
            return packet[layer].payload
    raise ValueError(f"no IP in {packet.summary()}")


def _ipv6_fragments(packet: Packet, size: int, fragment_id: int) -> Iterator[bytes]:
    first = _fragmentable(packet)
    datagram, protocol = bytes(first), first.underlayer.nh
    for at in range(0, len(datagram), size):
        made = packet.copy()
        above = _fragmentable(made).underlayer
        above.remove_payload()
        above.add_payload(IPv6ExtHdrFragment(nh=protocol, offset=at // 8, m=at + size < len(datagram), id=fragment_id) /
                          Raw(datagram[at:at + size]))
        above.nh = 44
        yield bytes(made)
