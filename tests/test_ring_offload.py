"""Checksums and segmentation in software, compared with scapy's on random packets; what does not fit is refused.

With the kernel's: tests/test_ring_offload_kernel.py. Under sanitizers: tests/c/offload.c.
"""

import random
import struct
from dataclasses import replace

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrHopByHop, IPv6ExtHdrRouting, PadN
from scapy.layers.l2 import Dot1Q, Ether
from scapy.packet import Packet, Raw

from ring.offload import OffloadError, complete_checksum, segments
from vdev.testing.netdriver import GSO_TCPV4, GSO_TCPV6, NetHeader
from vdev.testing.oversized import (
    ADDRESSES,
    FURTHER,
    KINDS,
    MACS,
    Oversized,
    oversized,
    partial,
    random_oversized,
    random_whole,
)

ROUNDS = 20
LINK = Ether(src=MACS[0], dst=MACS[1])
IPV4 = IP(src=ADDRESSES[4][0], dst=ADDRESSES[4][1])
IPV6 = IPv6(src=ADDRESSES[6][0], dst=ADDRESSES[6][1])
PADDED = IPv6ExtHdrHopByHop(options=[PadN(optdata=bytes(4))])


def cut(sent: Oversized, fragment_id: int = 0) -> list[bytes]:
    return segments(sent.header.pack(), sent.frame, fragment_id)


def assert_cut_as_by_scapy(kind: str, seed: int) -> None:
    rng = random.Random(f"{kind} {seed}")
    sent = random_oversized(rng, kind)
    fragment_id = rng.randrange(1 << 32)
    wanted = sent.segments(fragment_id)
    assert [frame.hex() for frame in cut(sent, fragment_id)] == [frame.hex() for frame in wanted], f"seed {seed}"


@pytest.mark.parametrize("kind", KINDS)
def test_segments_are_scapys(kind: str) -> None:
    for seed in range(ROUNDS):
        assert_cut_as_by_scapy(kind, seed)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", KINDS)
def test_segments_are_scapys_long(kind: str) -> None:
    for seed in range(ROUNDS, 500):
        assert_cut_as_by_scapy(kind, seed)


@pytest.mark.parametrize("kind", KINDS)
def test_segments_of_a_sender_that_says_nothing_of_checksums(kind: str) -> None:
    ip = IPV4 if KINDS[kind][1] == 4 else IPV6 / PADDED
    sent = oversized(LINK / ip / (TCP() if "tcp" in kind else UDP()) / Raw(bytes(range(256)) * 9), kind, 1000)
    assert cut(sent.without_checksum()) == cut(sent) == sent.segments()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [0, 1, 999])
def test_frame_that_fits_is_one_segment(kind: str, length: int) -> None:
    ip = IPV4 if KINDS[kind][1] == 4 else IPV6
    transport = TCP(flags="CFP") if "tcp" in kind else UDP()
    sent = oversized(LINK / ip / transport / Raw(bytes(length)), kind, 1007)
    whole = Ether(sent.frame)
    del whole[type(transport)].chksum
    assert cut(sent) == [bytes(whole)]


def test_flags_and_numbers_from_segment_to_segment() -> None:
    sent = oversized(LINK / IP(id=0xFFFF) / TCP(flags="CEUAPF", seq=0xFFFFFF00) / Raw(bytes(500)), "tcp4", 200,
                     ecn=True)
    made = [Ether(frame) for frame in cut(sent)]
    assert [str(p[TCP].flags) for p in made] == ["AUEC", "AUE", "FPAUE"]
    assert [p[IP].id for p in made] == [0xFFFF, 0, 1]
    assert [p[TCP].seq for p in made] == [0xFFFFFF00, 0xFFFFFFC8, 0x90]


def test_padding_is_left_out_and_no_ip_length_means_all() -> None:
    for ip, field in ((IPV4, 16), (IPV6, 18)):
        sent = oversized(LINK / ip / TCP() / Raw(bytes(range(100))), "tcp4" if ip is IPV4 else "tcp6", 60)
        assert segments(sent.header.pack(), sent.frame + b"padding") == sent.segments()
        unsaid = sent.frame[:field] + bytes(2) + sent.frame[field + 2:]
        assert segments(sent.header.pack(), unsaid) == sent.segments()


def test_checksums_are_scapys() -> None:
    rng = random.Random(1)
    for _ in range(100):
        packet = random_whole(rng)
        start, offset, unfinished = partial(packet)
        assert complete_checksum(unfinished, start, offset) == bytes(packet) != unfinished


@pytest.mark.parametrize("kind", ["uso4", "uso6"])
def test_udp_checksum_is_never_zero(kind: str) -> None:
    """Ones' complement has two zeroes; UDP's 0 says that there is no checksum (RFC 768)."""
    packet = LINK / (IPV4 if kind == "uso4" else IPV6) / UDP() / Raw(bytes(100))
    packet[Raw].load = bytes(98) + struct.pack("!H", Ether(bytes(packet))[UDP].chksum)
    start, offset, unfinished = partial(packet)
    for made in (complete_checksum(unfinished, start, offset), *cut(oversized(packet, kind, 1000))):
        assert made[start + offset:start + offset + 2] == b"\xff\xff"


@pytest.mark.parametrize("start, offset", [(99, 0), (34, 65), (65535, 65535), (100, 0)])
def test_N01_N02_checksum_outside_the_frame(start: int, offset: int) -> None:
    with pytest.raises(OffloadError, match="checksum"):
        complete_checksum(bytes(100), start, offset)


def test_checksum_at_the_very_end() -> None:
    assert complete_checksum(bytes(100), 98, 0) == bytes(98) + b"\xff\xff"


# ---- what does not fit

TCP4 = oversized(LINK / IPV4 / TCP() / Raw(bytes(3000)), "tcp4", 1000)  # IP at 14, TCP at 34
TCP6 = oversized(LINK / IPV6 / PADDED / TCP() / Raw(bytes(3000)), "tcp6", 1000)  # IP at 14, hop-by-hop at 54, TCP at 62
USO4 = oversized(LINK / IPV4 / UDP() / Raw(bytes(3000)), "uso4", 1000)
UFO6 = oversized(LINK / IPV6 / IPv6ExtHdrDestOpt(options=[PadN(optdata=bytes(28))]) / UDP() / Raw(bytes(3000)),
                 "ufo6", 1000)  # 40 bytes before the payload


def with_byte(sent: Oversized, at: int, value: int) -> Oversized:
    return replace(sent, frame=sent.frame[:at] + bytes([value]) + sent.frame[at + 1:])


def with_header(sent: Oversized, **fields: int) -> Oversized:
    return replace(sent, header=replace(sent.header, **fields))


def extended(*extensions: Packet) -> Oversized:
    packet = LINK / IPV6
    for extension in extensions:
        packet /= extension
    return oversized(packet / TCP() / Raw(bytes(3000)), "tcp6", 1000)


MISFITS = {
    "gso_type_none": ("kind", with_header(TCP4, gso_type=0)),
    "gso_type_unknown": ("kind", with_header(TCP4, gso_type=2)),
    "gso_type_only_ecn": ("kind", with_header(TCP4, gso_type=0x80)),
    "tcp6_over_ipv4": ("ethertype", with_header(TCP4, gso_type=GSO_TCPV6)),
    "tcp4_over_ipv6": ("ethertype", with_header(TCP6, gso_type=GSO_TCPV4)),
    "arp": ("ethertype", with_byte(TCP4, 13, 6)),
    "three_tags": ("ethertype", oversized(LINK / Dot1Q() / Dot1Q() / Dot1Q() / IPV4 / TCP() / Raw(bytes(300)), "tcp4",
                                          100)),
    "ipv4_version": ("ip", with_byte(TCP4, 14, 0x65)),
    "ipv6_version": ("ip", with_byte(TCP6, 14, 0x40)),
    "ipv4_header_too_short": ("ip", with_byte(TCP4, 14, 0x44)),
    "ipv4_longer_than_the_frame": ("ip", replace(TCP4, frame=TCP4.frame[:-1])),
    "ipv6_longer_than_the_frame": ("ip", replace(TCP6, frame=TCP6.frame[:-1])),
    "ipv4_shorter_than_its_header": ("ip", with_byte(with_byte(TCP4, 16, 0), 17, 19)),
    "ipv4_first_fragment": ("fragment", with_byte(TCP4, 20, 0x20)),
    "ipv4_later_fragment": ("fragment", with_byte(TCP4, 21, 1)),
    "ipv6_fragment": ("fragment", with_byte(TCP6, 54, 44)),
    "udp_in_tcp": ("protocol", with_byte(TCP4, 23, 17)),
    "tcp_in_udp": ("protocol", with_byte(USO4, 23, 6)),
    "ipv6_unknown_extension": ("protocol", with_byte(TCP6, 54, 51)),
    "hop_by_hop_not_first": ("protocol", extended(IPv6ExtHdrDestOpt(), IPv6ExtHdrHopByHop())),
    "tcp_header_too_short": ("transport", with_byte(TCP4, 46, 0x40)),
    "udp_length": ("transport", with_byte(USO4, 39, USO4.frame[39] ^ 1)),
    "tcp_header_behind_the_end": ("headers", with_byte(oversized(LINK / IPV4 / TCP(), "tcp4", 100), 46, 0x60)),
    "ipv6_ends_in_its_extension": ("headers", with_byte(with_byte(TCP6, 18, 0), 19, 7)),
    "ipv4_ends_in_udp": ("headers", with_byte(with_byte(USO4, 16, 0), 17, 27)),
    "extension_behind_what_is_read": ("headers", with_byte(TCP6, 55, 255)),
    "extensions_too_long": ("headers", extended(*[IPv6ExtHdrDestOpt(options=[PadN(optdata=bytes(52))])] * 4)),
    "csum_start": ("checksum", with_header(TCP4, csum_start=35, csum_offset=15)),
    "csum_offset": ("checksum", with_header(TCP4, csum_offset=18)),
    "csum_of_udp_in_tcp": ("checksum", with_header(TCP4, csum_offset=6)),
    "end_of_the_route_unknown": ("checksum", extended(
        IPv6ExtHdrRouting(addresses=list(FURTHER), segleft=1)).without_checksum()),
    "gso_size_0": ("size", with_header(TCP4, gso_size=0)),
    "fragments_of_less_than_8": ("size", with_header(UFO6, gso_size=7)),
    "headers_longer_than_the_first_fragment": ("size", with_header(UFO6, gso_size=39)),
    "frame_longer_than_any": ("size", replace(TCP4, frame=TCP4.frame + bytes(66048))),
    "segment_longer_than_ipv4": ("size", replace(TCP4, header=replace(TCP4.header, gso_size=65535),
                                                 frame=with_byte(with_byte(TCP4, 16, 0), 17, 0).frame + bytes(62600))),
    "segment_longer_than_ipv6": ("size", replace(TCP6, header=replace(TCP6.header, gso_size=65535),
                                                 frame=with_byte(with_byte(TCP6, 18, 0), 19, 0).frame + bytes(62600))),
}


@pytest.mark.parametrize("name", MISFITS)
def test_N08_gso_that_does_not_fit_the_frame(name: str) -> None:
    reason, sent = MISFITS[name]
    with pytest.raises(OffloadError) as caught:
        cut(sent)
    assert caught.value.reason == reason


@pytest.mark.parametrize("sent", [TCP4, TCP6, USO4, UFO6], ids=["tcp4", "tcp6", "uso4", "ufo6"])
def test_N08_frame_that_ends_in_its_headers(sent: Oversized) -> None:
    """Wherever it is cut off: with the IP length that was right before, and with none."""
    assert cut(sent) == sent.segments()
    field = 16 if sent.frame[12] == 8 else 18
    unsaid = sent.frame[:field] + bytes(2) + sent.frame[field + 2:]
    for length in range(54):
        for frame in (sent.frame[:length], unsaid[:length]):
            with pytest.raises(OffloadError) as caught:
                segments(sent.header.pack(), frame)
            assert caught.value.reason in ("headers", "ip", "transport")


def test_smallest_fragments_hold_all_headers() -> None:
    assert len(cut(with_header(UFO6, gso_size=47))) == -(-3040 // 40)


def test_net_header_of_another_length() -> None:
    with pytest.raises(ValueError, match="12 bytes, not 11"):
        segments(bytes(NetHeader.SIZE - 1), TCP4.frame)
