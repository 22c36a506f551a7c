"""Packets as the responder sees them: parsed with every bound checked, and built with every checksum.

Parsing answers None for anything that is not a whole, well-formed packet of its kind; it never raises.
What a field says about lengths is believed only as far as there are bytes. Layouts: RFC 894 (Ethernet),
826 (ARP), 791 (IPv4), 768 (UDP), 792 (ICMP), 8200 (IPv6), 4443 (ICMPv6).
"""

import struct
from typing import NamedTuple

ETHERTYPE_IPV4 = 0x0800
ETHERTYPE_ARP = 0x0806
ETHERTYPE_IPV6 = 0x86DD

PROTOCOL_ICMP = 1
PROTOCOL_UDP = 17
PROTOCOL_ICMPV6 = 58

BROADCAST = b"\xff" * 6

_ETHERNET = struct.Struct("!6s6sH")
_ARP = struct.Struct("!HHBBH6s4s6s4s")
_IPV4 = struct.Struct("!BBHHHBBH4s4s")
_IPV6 = struct.Struct("!IHBB16s16s")
_UDP = struct.Struct("!HHHH")

_MORE_OR_OFFSET = 0x3FFF  # IPv4: "more fragments" and the fragment offset


class Frame(NamedTuple):
    """An Ethernet frame; MAC addresses are 6 bytes."""

    destination: bytes
    source: bytes
    ethertype: int
    payload: bytes


class Arp(NamedTuple):
    """ARP for IPv4 over Ethernet; addresses are 6 and 4 bytes."""

    operation: int  # 1 request, 2 reply
    sender_mac: bytes
    sender: bytes
    target_mac: bytes
    target: bytes


class Packet(NamedTuple):
    """An IPv4 or IPv6 packet without options or extension headers; addresses are 4 or 16 bytes."""

    source: bytes
    destination: bytes
    protocol: int
    hops: int  # TTL or hop limit
    payload: bytes


class Datagram(NamedTuple):
    """A UDP datagram between two ports."""

    source: int
    destination: int
    payload: bytes


def checksum(data: bytes, start: int = 0) -> int:
    """The Internet checksum (RFC 1071) of ``data`` on top of ``start``; 0 where it was filled in right.

    Adding 16-bit words with end-around carry is arithmetic modulo 65535, where only a sum of nothing but
    zeros is zero. Python does that to one large number much faster than to thousands of small ones.
    """
    if len(data) % 2:
        data += b"\0"
    total = start + int.from_bytes(data, "big")
    return 0xFFFF - (total % 0xFFFF or (0xFFFF if total else 0))


def pseudo_header(source: bytes, destination: bytes, protocol: int, length: int) -> int:
    """What UDP and ICMPv6 checksums start from; addresses of 4 or 16 bytes."""
    return int.from_bytes(source, "big") + int.from_bytes(destination, "big") + length + protocol


# ---- from the guest


def parse_frame(data: bytes) -> Frame | None:
    """An Ethernet frame from a station (a group address as the source is refused)."""
    if len(data) < _ETHERNET.size:
        return None
    destination, source, ethertype = _ETHERNET.unpack_from(data)
    if source[0] & 1:
        return None
    return Frame(destination, source, ethertype, data[_ETHERNET.size:])


def parse_arp(data: bytes) -> Arp | None:
    """ARP for IPv4 over Ethernet."""
    if len(data) < _ARP.size:
        return None
    hardware, protocol, hardware_size, protocol_size, *rest = _ARP.unpack_from(data)
    if (hardware, protocol, hardware_size, protocol_size) != (1, ETHERTYPE_IPV4, 6, 4):
        return None
    return Arp(*rest)


def parse_ipv4(data: bytes) -> Packet | None:
    """A whole IPv4 packet; fragments are refused, options are skipped, padding is cut off."""
    if len(data) < _IPV4.size:
        return None
    version, _, total, _, fragment, hops, protocol, _, source, destination = _IPV4.unpack_from(data)
    header = (version & 15) * 4
    if version >> 4 != 4 or header < _IPV4.size or not header <= total <= len(data):
        return None
    if fragment & _MORE_OR_OFFSET or checksum(data[:header]):
        return None
    return Packet(source, destination, protocol, hops, data[header:total])


def parse_ipv6(data: bytes) -> Packet | None:
    """An IPv6 packet; ``protocol`` is the first next header, so extension headers end the matter."""
    if len(data) < _IPV6.size:
        return None
    first, length, protocol, hops, source, destination = _IPV6.unpack_from(data)
    if first >> 28 != 6 or _IPV6.size + length > len(data) or source[0] == 0xFF:
        return None
    return Packet(source, destination, protocol, hops, data[_IPV6.size:_IPV6.size + length])


def parse_udp(packet: Packet, partial: bool) -> Datagram | None:
    """The UDP datagram in ``packet``. partial: the guest left the checksum to the device (NEEDS_CSUM)."""
    data = packet.payload
    if len(data) < _UDP.size:
        return None
    source, destination, length, given = _UDP.unpack_from(data)
    if not _UDP.size <= length <= len(data):
        return None
    data = data[:length]
    if given and not partial and checksum(data, pseudo_header(packet.source, packet.destination,
                                                              PROTOCOL_UDP, length)):
        return None
    return Datagram(source, destination, data[_UDP.size:])


# ---- to the guest


def build_frame(destination: bytes, source: bytes, ethertype: int, payload: bytes) -> bytes:
    """Header and payload, without padding or checksum."""
    return _ETHERNET.pack(destination, source, ethertype) + payload


def build_arp(arp: Arp) -> bytes:
    """28 bytes, the payload of an Ethernet frame."""
    return _ARP.pack(1, ETHERTYPE_IPV4, 6, 4, *arp)


def build_ipv4(packet: Packet, identification: int = 0) -> bytes:
    """Header and payload; "don't fragment" is set."""
    def header(check: int) -> bytes:
        return _IPV4.pack(0x45, 0, _IPV4.size + len(packet.payload), identification, 0x4000, packet.hops,
                          packet.protocol, check, packet.source, packet.destination)

    return header(checksum(header(0))) + packet.payload


def build_ipv6(packet: Packet) -> bytes:
    """Header and payload, no extension headers."""
    return _IPV6.pack(6 << 28, len(packet.payload), packet.protocol, packet.hops, packet.source,
                      packet.destination) + packet.payload


def build_udp(source: bytes, destination: bytes, datagram: Datagram) -> bytes:
    """Header and payload between the IP addresses ``source`` and ``destination``."""
    length = _UDP.size + len(datagram.payload)
    head = _UDP.pack(datagram.source, datagram.destination, length, 0)
    value = checksum(head + datagram.payload, pseudo_header(source, destination, PROTOCOL_UDP, length))
    return head[:6] + struct.pack("!H", value or 0xFFFF) + datagram.payload


def build_icmp(kind: int, body: bytes) -> bytes:
    """An ICMP message of code 0; ``body`` is all that follows the checksum."""
    head = struct.pack("!BB", kind, 0)
    return head + struct.pack("!H", checksum(head + b"\0\0" + body)) + body


def build_icmpv6(source: bytes, destination: bytes, kind: int, body: bytes) -> bytes:
    """An ICMPv6 message of code 0 between two addresses; ``body`` is all that follows the checksum."""
    head = struct.pack("!BB", kind, 0)
    start = pseudo_header(source, destination, PROTOCOL_ICMPV6, 4 + len(body))
    return head + struct.pack("!H", checksum(head + b"\0\0" + body, start)) + body
