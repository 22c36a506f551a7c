"""The rules about struct virtio_net_hdr and the frame behind it, as a driver sends them (virtio 1.2, 5.1.6.2).

Pure functions of bytes. A frame of which only the beginning is at hand is judged by that.
"""

from collections.abc import Iterator
from struct import Struct
from typing import NamedTuple

from vdev.net.features import HOST_GSO, Feature, mask

Finding = tuple[str, str]  # id of the rule, evidence

HEADER = Struct("<BBHHHHH")
PREFIX = 256  # bytes of a frame that are enough for all of this

NEEDS_CSUM, DATA_VALID, RSC_INFO = 1, 2, 4
GSO_ECN = 0x80
_ETHERNET, _VLAN_TAG = 14, 4
_TCP, _UDP = 6, 17
_CWR = 0x80

# gso_type -> its name, the feature it needs, the transport protocol
_GSO = {
    1: ("TCPV4", Feature.HOST_TSO4, _TCP),
    3: ("UDP", Feature.HOST_UFO, _UDP),
    4: ("TCPV6", Feature.HOST_TSO6, _TCP),
    5: ("UDP_L4", Feature.HOST_USO, _UDP),
}


class Header(NamedTuple):
    """struct virtio_net_hdr."""

    flags: int
    gso_type: int
    hdr_len: int
    gso_size: int
    csum_start: int
    csum_offset: int
    num_buffers: int


def broken(data: bytes, frame: bytes, length: int, features: int, mtu: int) -> Iterator[Finding]:
    """What is wrong with a frame of ``length`` bytes that begins with ``frame``, behind the 12 bytes ``data``. mtu: 0
    where it was not negotiated."""
    header = Header(*HEADER.unpack(data))
    if header.num_buffers:
        yield "NET-TX-DR-02", f"num_buffers is {header.num_buffers}"
    if header.flags and not features >> Feature.CSUM & 1:
        yield "NET-TX-DR-03", f"flags is {header.flags:#x}, and CSUM was not negotiated"
    if header.flags & (DATA_VALID | RSC_INFO):
        yield "NET-TX-DR-15", f"flags is {header.flags:#x}"
    if header.flags & NEEDS_CSUM:
        yield from _checksum(header, frame, length)
    if header.gso_type:
        yield from _segmented(header, frame, features)
    elif mtu:
        limit = _ETHERNET + mtu + (_VLAN_TAG if frame[12:14] == b"\x81\x00" else 0)
        if length > limit:
            yield "NET-CFG-DR-06", f"a frame of {length} bytes, and the MTU {mtu} allows {limit}"


def _checksum(header: Header, frame: bytes, length: int) -> Iterator[Finding]:
    start, field = header.csum_start, header.csum_start + header.csum_offset
    place = f"csum_start {start}, csum_offset {header.csum_offset}"
    if start < _ETHERNET or field + 2 > length:
        yield "NET-TX-DR-11", f"{place} in a frame of {length} bytes"
        return
    transport = _transport(frame)
    if transport is None or start != transport.at or header.csum_offset != {_TCP: 16, _UDP: 6}[transport.protocol]:
        return  # another protocol, or a checksum inside a tunnel: nothing is known of its field
    if field + 2 > len(frame):
        return
    found = int.from_bytes(frame[field:field + 2])
    # The length counts, but not in what is segmented: there the one of each segment will.
    lengths = {length - start, transport.length, 0} if header.gso_type else {transport.length}
    sums = [_ones_complement(transport.addresses + bytes([0, transport.protocol]) + size.to_bytes(4))
            for size in lengths]
    if found not in sums:
        yield "NET-TX-DR-10", f"{place}: the field holds {found:#06x}, the pseudo-header's sum is {sums[0]:#06x}"


def _segmented(header: Header, frame: bytes, features: int) -> Iterator[Finding]:
    kind = header.gso_type & ~GSO_ECN
    name, feature, protocol = _GSO.get(kind, (f"{header.gso_type:#x}", None, None))
    if not features & HOST_GSO:
        yield "NET-TX-DR-06", f"gso_type is {name}"
    elif feature is None:
        yield "NET-TX-DR-05", f"gso_type is {name}, which there is not"
    elif not features & mask(feature):
        yield "NET-TX-DR-05", f"gso_type is {name}, and {feature.name} was not negotiated"
    elif header.gso_type & GSO_ECN and not features & mask(Feature.HOST_ECN):
        yield "NET-TX-DR-05", "gso_type has ECN, and HOST_ECN was not negotiated"
    if not header.flags & NEEDS_CSUM or not header.gso_size:
        yield "NET-TX-DR-12", f"gso_type {name} with flags {header.flags:#x} and gso_size {header.gso_size}"
        return
    at = header.csum_start  # where the transport header is, whatever comes before it
    if protocol == _TCP and at + 14 <= len(frame):
        yield from _headers(header, at + (frame[at + 12] >> 4) * 4, features)
        ecn = bool(frame[at + 13] & _CWR)
        if ecn and not features & mask(Feature.HOST_ECN):
            yield "NET-TX-DR-07", "TCP with CWR to be segmented, and HOST_ECN was not negotiated"
        elif ecn and not header.gso_type & GSO_ECN:
            yield "NET-TX-DR-08", f"TCP with CWR, and gso_type is {header.gso_type:#x}"
    elif protocol == _UDP:
        yield from _headers(header, at + 8, features)


def _headers(header: Header, due: int, features: int) -> Iterator[Finding]:
    """``due``: bytes up to and with the transport header."""
    evidence = f"hdr_len is {header.hdr_len}, the headers have {due} bytes"
    if features & mask(Feature.GUEST_HDRLEN):
        if header.hdr_len != due:
            yield "NET-TX-DR-13", evidence
    elif header.hdr_len < due:
        yield "NET-TX-DR-14", evidence


class _Transport(NamedTuple):
    """A TCP or UDP header. addresses: of the packet, source first; length: what the pseudo-header says, bytes."""

    at: int
    protocol: int
    addresses: bytes
    length: int


def _transport(frame: bytes) -> _Transport | None:
    """Where it is in an Ethernet frame; None: there is none, or it cannot be told (fragments, extension headers)."""
    at = _ETHERNET
    kind = frame[12:14]
    if kind == b"\x81\x00":
        at, kind = at + _VLAN_TAG, frame[16:18]
    packet = frame[at:]
    if kind == b"\x08\x00" and len(packet) >= 20:
        size = (packet[0] & 15) * 4
        fragment = int.from_bytes(packet[6:8]) & 0x3FFF
        if packet[9] in (_TCP, _UDP) and not fragment and size >= 20:
            return _Transport(at + size, packet[9], packet[12:20], int.from_bytes(packet[2:4]) - size)
    if kind == b"\x86\xdd" and len(packet) >= 40 and packet[6] in (_TCP, _UDP):
        return _Transport(at + 40, packet[6], packet[8:40], int.from_bytes(packet[4:6]))
    return None


def _ones_complement(data: bytes) -> int:
    """The sum that a checksum is made of (RFC 1071), not inverted; ``data`` has an even length."""
    total = sum(int.from_bytes(data[at:at + 2]) for at in range(0, len(data), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total
