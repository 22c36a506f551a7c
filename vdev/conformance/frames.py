"""Frames that the suite knows again, and the checksums it holds a back-end to, without any code of the device.

Layouts: RFC 894 (Ethernet), 791 (IPv4), 8200 (IPv6), 768 (UDP), 9293 (TCP).
"""

import itertools
import os
import struct

BROADCAST = b"\xff" * 6
GUEST = bytes.fromhex("525400c0ffee")
NETWORK = bytes.fromhex("020000c0ffee")
EXPERIMENTAL = 0x88B5  # IEEE 802 local experimental ethertype
ETHERNET_HEADER = 14

TCP, UDP = 6, 17
IPV4_HEADER, IPV6_HEADER, TCP_HEADER, UDP_HEADER = 20, 40, 20, 8
TCP_CHECKSUM, UDP_CHECKSUM = 16, 6  # offsets in their headers

TAG_BYTES = 12
_numbers = itertools.count()


def tag() -> bytes:
    """TAG_BYTES that no other frame has."""
    return os.urandom(8) + struct.pack("!I", next(_numbers) & 0xFFFFFFFF)


def plain(mark: bytes, length: int = 60, *, to: bytes = BROADCAST, source: bytes = GUEST) -> bytes:
    """A frame of ``length`` bytes of the experimental ethertype, with ``mark`` in it and then counting bytes."""
    head = to + source + struct.pack("!H", EXPERIMENTAL) + mark
    return head + bytes((i * 7 + i // 256) & 0xFF for i in range(length - len(head)))


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def _pseudo(ipv6: bool, protocol: int, length: int) -> bytes:
    if ipv6:
        return V6[0] + V6[1] + struct.pack("!II", length, protocol)
    return V4[0] + V4[1] + struct.pack("!BBH", 0, protocol, length)


V4 = bytes((10, 99, 0, 1)), bytes((10, 99, 0, 2))
V6 = bytes.fromhex("fd99" + "00" * 13 + "01"), bytes.fromhex("fd99" + "00" * 13 + "02")


def packet(payload: bytes, *, protocol: int = UDP, ipv6: bool = False, partial: bool = False, good: bool = True,
           ports: tuple[int, int] = (4099, 4100), flags: int = 0x18, to: bytes = BROADCAST) -> bytes:
    """A UDP datagram or TCP segment with ``payload`` in an Ethernet frame.

    partial: the checksum field has the sum of the pseudo header only, as NEEDS_CSUM wants it; good: else it is right.
    flags: of TCP.
    """
    length = len(payload) + (TCP_HEADER if protocol == TCP else UDP_HEADER)
    def transport(check: int) -> bytes:
        if protocol == TCP:
            return struct.pack("!HHIIBBHHH", *ports, 1000, 2000, TCP_HEADER // 4 << 4, flags, 65535, check, 0) + payload
        return struct.pack("!HHHH", *ports, length & 0xFFFF, check) + payload

    pseudo = _pseudo(ipv6, protocol, length)
    check = checksum(pseudo) ^ 0xFFFF if partial else checksum(pseudo + transport(0))
    body = transport(check if good else check ^ 0x5555)
    if ipv6:
        ip = struct.pack("!IHBB", 6 << 28, len(body) & 0xFFFF, protocol, 64) + V6[0] + V6[1]
    else:
        def header(check: int) -> bytes:
            return struct.pack("!BBHHHBBH", 0x45, 0, (IPV4_HEADER + len(body)) & 0xFFFF, 77, 0x4000, 64, protocol,
                               check) + V4[0] + V4[1]
        ip = header(checksum(header(0)))
    return to + GUEST + struct.pack("!H", 0x86DD if ipv6 else 0x0800) + ip + body


def transport_at(ipv6: bool) -> int:
    """Where the transport header begins in a frame of :func:`packet`, in bytes."""
    return ETHERNET_HEADER + (IPV6_HEADER if ipv6 else IPV4_HEADER)


def is_checked(frame: bytes) -> bool:
    """Is the transport checksum of a frame like those of :func:`packet` right?"""
    ipv6 = frame[12:14] == b"\x86\xdd"
    at = transport_at(ipv6)
    if ipv6:
        end, protocol = at + int.from_bytes(frame[18:20], "big"), frame[20]
    else:
        end, protocol = ETHERNET_HEADER + int.from_bytes(frame[16:18], "big"), frame[23]
    segment = frame[at:end]
    return checksum(_pseudo(ipv6, protocol, len(segment)) + segment) == 0
