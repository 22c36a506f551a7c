"""Parsing and building packets, with scapy as the oracle."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Raw
from scapy.utils import checksum as scapy_checksum

from vdev.ports import packets
from vdev.ports.packets import Arp, Datagram, Packet

A4, B4 = bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2])
A6, B6 = bytes.fromhex("fd00" + "0" * 27 + "1"), bytes.fromhex("fd00" + "0" * 27 + "2")
PAYLOADS = st.binary(max_size=70)


@given(st.one_of(st.binary(max_size=300),
                 st.sampled_from([b"", bytes(1), bytes(40), b"\xff" * 7, b"\xff" * 40])))
def test_checksum_is_the_one_of_scapy(data):
    assert packets.checksum(data) == scapy_checksum(data)


def test_checksum_of_the_longest_packet():
    data = bytes(range(256)) * 255 + b"odd"
    assert packets.checksum(data) == scapy_checksum(data)


@given(PAYLOADS, st.integers(0, 65535))
def test_ipv4_and_udp_as_scapy_reads_them(payload, port):
    datagram = packets.build_udp(A4, B4, Datagram(67, port, payload))
    data = packets.build_ipv4(Packet(A4, B4, packets.PROTOCOL_UDP, 64, datagram))
    ip = IP(data)
    assert (ip.src, ip.dst, ip.ttl, ip.proto, ip.len) == ("10.0.0.1", "10.0.0.2", 64, 17, len(data))
    assert (ip[UDP].sport, ip[UDP].dport, bytes(ip[UDP].payload)) == (67, port, payload)
    given_sums = (ip.chksum, ip[UDP].chksum)
    del ip.chksum, ip[UDP].chksum
    again = IP(bytes(ip))
    assert given_sums == (again.chksum, again[UDP].chksum)
    packet = packets.parse_ipv4(data)
    assert packet == Packet(A4, B4, packets.PROTOCOL_UDP, 64, datagram)
    assert packets.parse_udp(packet, partial=False) == Datagram(67, port, payload)


def test_a_udp_checksum_that_comes_out_as_zero_is_sent_as_ones():
    others = packets.pseudo_header(A4, B4, 17, 10) + 67 + 68 + 10  # ports and length
    data = packets.build_udp(A4, B4, Datagram(67, 68, struct.pack("!H", 0xFFFF - others % 0xFFFF)))
    assert data[6:8] == b"\xff\xff"
    assert packets.parse_udp(Packet(A4, B4, 17, 64, data), partial=False) is not None


@given(PAYLOADS)
def test_icmpv6_as_scapy_reads_it(payload):
    message = packets.build_icmpv6(A6, B6, 128, struct.pack("!HH", 5, 9) + payload)
    data = packets.build_ipv6(Packet(A6, B6, packets.PROTOCOL_ICMPV6, 255, message))
    ip = IPv6(data)
    echo = ip[ICMPv6EchoRequest]
    assert (ip.src, ip.dst, ip.hlim) == ("fd00::1", "fd00::2", 255)
    assert (echo.id, echo.seq, echo.data) == (5, 9, payload)
    given_sum = echo.cksum
    del echo.cksum
    assert IPv6(bytes(ip))[ICMPv6EchoRequest].cksum == given_sum
    assert packets.parse_ipv6(data) == Packet(A6, B6, packets.PROTOCOL_ICMPV6, 255, message)


def test_arp_and_ethernet_as_scapy_reads_them():
    arp = Arp(2, b"\2" * 6, A4, b"\4" * 6, B4)
    data = packets.build_frame(b"\4" * 6, b"\2" * 6, packets.ETHERTYPE_ARP, packets.build_arp(arp))
    frame = Ether(data)
    assert (frame.src, frame.dst) == ("02:02:02:02:02:02", "04:04:04:04:04:04")
    assert (frame[ARP].op, frame[ARP].psrc, frame[ARP].pdst) == (2, "10.0.0.1", "10.0.0.2")
    parsed = packets.parse_frame(data)
    assert packets.parse_arp(parsed.payload) == arp


def test_padding_and_options_are_left_out():
    data = bytes(IP(src="10.0.0.1", dst="10.0.0.2", options=b"\1" * 8) / ICMP() / Raw(b"x"))
    assert packets.parse_ipv4(data + b"padding").payload == bytes(ICMP() / Raw(b"x"))
    data = bytes(IPv6(src="fd00::1", dst="fd00::2", nh=17) / Raw(b"x"))
    assert packets.parse_ipv6(data + b"padding").payload == b"x"
    data = bytes(UDP(len=9, chksum=0) / Raw(b"xpadding"))
    assert packets.parse_udp(Packet(A4, B4, 17, 64, data), partial=False).payload == b"x"


def _ipv4(**fields):
    return bytes(IP(**{"src": "10.0.0.1", "dst": "10.0.0.2"} | fields) / Raw(bytes(20)))


@pytest.mark.parametrize("data", [
    _ipv4()[:19], _ipv4(version=6), _ipv4(ihl=4), _ipv4(ihl=15), _ipv4(len=41), _ipv4(len=19), _ipv4(len=0),
    _ipv4(flags="MF"), _ipv4(frag=1), _ipv4(chksum=1), b"",
])
def test_ipv4_refused(data):
    assert packets.parse_ipv4(_ipv4()) is not None
    assert packets.parse_ipv4(data) is None


@pytest.mark.parametrize("data", [
    bytes(IPv6())[:39], bytes(IPv6(version=4)), bytes(IPv6(plen=1)), bytes(IPv6(src="ff02::1")), b"",
])
def test_ipv6_refused(data):
    assert packets.parse_ipv6(bytes(IPv6())) is not None
    assert packets.parse_ipv6(data) is None


@pytest.mark.parametrize("udp", [UDP(len=7), UDP(len=30), UDP(chksum=5)])
def test_udp_refused(udp):
    assert packets.parse_udp(Packet(A4, B4, 17, 64, bytes(udp / Raw(b"x"))), partial=False) is None
    assert packets.parse_udp(Packet(A4, B4, 17, 64, bytes(udp)[:7]), partial=False) is None


def test_a_partial_udp_checksum_is_not_verified():
    packet = Packet(A4, B4, 17, 64, bytes(UDP(chksum=5) / Raw(b"x")))
    assert packets.parse_udp(packet, partial=True).payload == b"x"


@pytest.mark.parametrize("field", [{"hwtype": 6}, {"ptype": 1}, {"hwlen": 8}, {"plen": 16}])
def test_arp_refused(field):
    assert packets.parse_arp(bytes(ARP(pdst="10.0.0.1"))) is not None
    assert packets.parse_arp(bytes(ARP(pdst="10.0.0.1"))[:27]) is None
    data = bytearray(bytes(ARP(pdst="10.0.0.1")))
    offset, size = {"hwtype": (0, 2), "ptype": (2, 2), "hwlen": (4, 1), "plen": (5, 1)}[next(iter(field))]
    data[offset:offset + size] = next(iter(field.values())).to_bytes(size, "big")
    assert packets.parse_arp(bytes(data)) is None


def test_frames_refused():
    assert packets.parse_frame(bytes(13)) is None
    assert packets.parse_frame(bytes(14)) is not None
    assert packets.parse_frame(bytes(6) + b"\1" + bytes(7)) is None


@given(st.binary(max_size=120))
def test_parsing_never_raises(data):
    for parse in (packets.parse_frame, packets.parse_arp, packets.parse_ipv4, packets.parse_ipv6):
        parse(data)
    packets.parse_udp(Packet(A4, B4, 17, 64, data), partial=False)
