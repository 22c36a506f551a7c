"""What a device does with a frame that has come for its guest, by what the driver has set: filters, hash, receiveq. In
plain Python, to be read beside the specification and compared with the C core.

Specification: virtio 1.2, 5.1.6.4.3 "Hash calculation for incoming packets", 5.1.6.5 "Control Virtqueue"; virtio 1.3,
"Inner Header Hash".
"""

from collections.abc import Iterator
from dataclasses import dataclass

from ring.receive_settings import MACS_MAX, HashType, ReceiveSettings, TunnelType

BROADCAST = b"\xff" * 6
IPV4, IPV6, ETHERNET = 0x0800, 0x86DD, 0x6558
VLAN_TAGS = (0x8100, 0x88A8)
# A device looks so far into a packet, with inner headers and without.
LOOK_INNER, LOOK = 640, 256

_EXTENSIONS = {0, 43, 44, 51, 60, 135, 139, 140}
_ESP = 50
_REPORTS = [None, *HashType]  # by hash_report
_TCP, _UDP = 6, 17


class Short(Exception):
    """The packet ends before."""


class View:
    """Bytes that may end too early."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def take(self, start: int, length: int) -> bytes:
        """Raises Short."""
        if start + length > len(self.data):
            raise Short
        return self.data[start:start + length]

    def number(self, start: int, length: int = 2) -> int:
        """The big-endian number there. Raises Short."""
        return int.from_bytes(self.take(start, length), "big")


@dataclass
class Packet:
    """One IP packet. home, route: the addresses of the _EX types. transport: what follows all IP headers, if that can
    be told."""

    version: int
    source: bytes
    destination: bytes
    home: bytes
    route: bytes
    extended: bool = False
    protocol: int = -1
    transport: View | None = None


def refused(settings: ReceiveSettings, frame: bytes) -> bool:
    """Does a filter of the driver's refuse it (5.1.6.5.1 to 5.1.6.5.3)?"""
    if settings.promiscuous:
        return False
    return (settings.filter_macs and not _address_wanted(settings, frame[:6])) or \
        (settings.filter_vlans and not _vlan_wanted(settings, frame))


def _address_wanted(settings: ReceiveSettings, mac: bytes) -> bool:
    if mac == BROADCAST:
        return not settings.no_broadcast
    listed = (settings.mac, *settings.unicast, *settings.multicast)
    known = mac in listed or len(listed) > MACS_MAX
    if mac[0] & 1:
        return not settings.no_multicast and (settings.all_multicast or known)
    return not settings.no_unicast and (settings.all_unicast or known)


def _vlan_wanted(settings: ReceiveSettings, frame: bytes) -> bool:
    if frame[12:14] != b"\x81\x00" or len(frame) < 16:
        return True
    return int.from_bytes(frame[14:16], "big") & 0xFFF in settings.vlans


def toeplitz(key: bytes, data: bytes) -> int:
    """Bit by bit, as the definition has it: each bit that is set adds the 32 bits of the key that begin there."""
    bits = int.from_bytes(key, "big")
    value = 0
    for position in range(8 * len(data)):
        if data[position // 8] >> (7 - position % 8) & 1:
            value ^= bits >> (8 * len(key) - 32 - position) & 0xFFFFFFFF
    return value


def hash_of(settings: ReceiveSettings, frame: bytes) -> tuple[int, int]:
    """(hash_report, hash_value); (0, 0): no hash is made of it."""
    look = LOOK_INNER if settings.tunnel_types else LOOK
    try:
        packet = _ip(*_behind_ethernet(View(frame[:look])))
        for kind, inside in _tunnels(packet):
            if kind in settings.tunnel_types:
                packet = _ip(*(_behind_ethernet(inside[1]) if inside[0] == ETHERNET else inside))
                break
    except Short:
        return 0, 0
    for kind, fields in _candidates(packet):
        if kind in settings.hash_types:
            return _REPORTS.index(kind), toeplitz(settings.hash_key.ljust(40, b"\0"), fields)
    return 0, 0


def queue_of(settings: ReceiveSettings, frame: bytes) -> int | None:
    """The receiveq that RSS selects (5.1.6.5.7); None: it is not on."""
    if not settings.rss:
        return None
    report, value = hash_of(settings, frame)
    return settings.indirection[value % len(settings.indirection)] if report else settings.unclassified


def _candidates(packet: Packet) -> Iterator[tuple[HashType, bytes]]:
    """What may be hashed, in the order in which it is tried."""
    addresses = packet.source + packet.destination
    instead = packet.home + packet.route
    ports, transport = b"", packet.transport.data if packet.transport else b""
    is_tcp = packet.protocol == _TCP and len(transport) >= 20
    is_udp = packet.protocol == _UDP and len(transport) >= 8
    if is_tcp or is_udp:
        ports = transport[:4]
    if packet.version == 4:
        kinds = [(HashType.TCPV4, HashType.UDPV4, HashType.IPV4, addresses)]
    else:
        kinds = [(HashType.TCPV6, HashType.UDPV6, HashType.IPV6, addresses)]
        if packet.extended:
            kinds.insert(0, (HashType.TCP_EX, HashType.UDP_EX, HashType.IP_EX, instead))
    for tcp, udp, ip, fields in kinds:
        if is_tcp:
            yield tcp, fields + ports
        if is_udp:
            yield udp, fields + ports
        yield ip, fields


def _behind_ethernet(frame: View) -> tuple[int, View]:
    """(Ethertype, what follows), behind up to two VLAN tags."""
    at = 14
    kind = frame.number(12)
    for _ in range(2):
        if kind in VLAN_TAGS:
            kind = frame.number(at + 2)
            at += 4
    return kind, View(frame.data[at:])


def _ip(kind: int, data: View) -> Packet:
    """Raises Short for what is no IP packet of that Ethertype."""
    if kind == IPV4 and data.take(0, 20)[0] >> 4 == 4 and data.data[0] & 15 >= 5:
        return _ipv4(data)
    if kind == IPV6 and data.take(0, 40)[0] >> 4 == 6:
        return _ipv6(data)
    raise Short


def _ipv4(data: View) -> Packet:
    source, destination = data.take(12, 4), data.take(16, 4)
    packet = Packet(4, source, destination, source, destination, protocol=data.number(9, 1))
    header, fragment, length = 4 * (data.data[0] & 15), data.number(6) & 0x3FFF, data.number(2) or len(data.data)
    if not fragment and header <= min(length, len(data.data)):
        packet.transport = View(data.data[header:length])
    return packet


def _ipv6(data: View) -> Packet:
    source, destination = data.take(8, 16), data.take(24, 16)
    packet = Packet(6, source, destination, source, destination, protocol=data.number(6, 1))
    payload = data.number(4)
    rest = View(data.data[40:40 + payload] if payload else data.data[40:])
    try:
        while packet.protocol in _EXTENSIONS:
            packet.extended = True
            rest = _extension(packet, rest)
    except Short:
        return packet
    if packet.protocol == _ESP:
        packet.extended = True
    else:
        packet.transport = rest
    return packet


def _extension(packet: Packet, rest: View) -> View:
    """What follows one extension header; what it says is noted. Raises Short where nothing does."""
    kind, following = packet.protocol, rest.take(0, 8)[0]
    length = {44: 8, 51: 4 * (rest.data[1] + 2)}.get(kind, 8 * (rest.data[1] + 1))
    header = View(rest.take(0, length))
    if kind == 44 and header.number(2) & 0xFFF9:
        raise Short
    if kind == 60:
        packet.home = _home_address(header.data[2:]) or packet.home
    if kind == 43 and length == 24 and header.data[2:4] == b"\2\1":
        packet.route = header.data[8:]
    packet.protocol = following
    return View(rest.data[length:])


def _home_address(options: bytes) -> bytes | None:
    while options:
        if options[0] == 0:
            options = options[1:]
            continue
        if len(options) < 2 or 2 + options[1] > len(options):
            return None
        if options[:2] == b"\xc9\x10":
            return options[2:18]
        options = options[2 + options[1]:]
    return None


def _tunnels(packet: Packet) -> Iterator[tuple[TunnelType, tuple[int, View]]]:
    """The encapsulation types that it is one of, each with what is inside: (Ethertype, data)."""
    if packet.transport is None:
        return
    inside = packet.transport
    try:
        if packet.protocol == 4 and packet.version == 4:
            yield TunnelType.IPIP, (IPV4, inside)
        elif packet.protocol == 47:
            yield from _gre(packet, inside)
        elif packet.protocol == _UDP:
            port, inside = View(inside.take(0, 8)).number(2), View(inside.data[8:])
            if port == 4754:
                _, _, payload = _gre_header(inside)
                yield TunnelType.GRE_UDP, payload
            elif port == 4789 and inside.take(0, 8)[0] & 8:
                yield TunnelType.VXLAN, (ETHERNET, View(inside.data[8:]))
            elif port == 4790 and inside.take(0, 8)[0] & 0x39 == 8:
                flags, following = inside.data[0], inside.data[3]
                kind = {1: IPV4, 2: IPV6, 3: ETHERNET}.get(following, 0) if flags & 4 else ETHERNET
                yield TunnelType.VXLAN_GPE, (kind, View(inside.data[8:]))
            elif port == 6081 and inside.take(0, 8)[0] >> 6 == 0:
                header = 8 + 4 * (inside.data[0] & 63)
                inside.take(0, header)
                yield TunnelType.GENEVE, (inside.number(2), View(inside.data[header:]))
    except Short:
        return


def _gre_header(data: View) -> tuple[bool, bool, tuple[int, View]]:
    """(has it a key or a sequence number, has it a key alone, what is inside). Raises Short for what is no GRE."""
    flags, kind = data.number(0), data.number(2)
    if flags & 0x4C07:
        raise Short
    options = flags & 0xB000
    header = 4 + 4 * options.bit_count()
    data.take(0, header)
    return bool(flags & 0x3000), options == 0x2000, (kind, View(data.data[header:]))


def _gre(packet: Packet, data: View) -> Iterator[tuple[TunnelType, tuple[int, View]]]:
    numbered, key_alone, payload = _gre_header(data)
    if packet.version == 4:
        yield (TunnelType.GRE_2890 if numbered else TunnelType.GRE_2784), payload
    if packet.version == 6 or payload[0] == IPV6:
        yield TunnelType.GRE_7676, payload
    if key_alone and payload[0] == ETHERNET:
        yield TunnelType.NVGRE, payload
