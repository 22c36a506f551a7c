"""What a driver has set about what it receives, as the C core applies it to a frame: filters and hashes, against
published vectors, packets made by scapy, and the plain Python model."""

import itertools
import random
import socket
import struct

import pytest
from scapy.contrib.geneve import GENEVE
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import (HAO, IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment, IPv6ExtHdrHopByHop,
                                IPv6ExtHdrRouting, Pad1, PadN)
from scapy.layers.ipsec import AH
from scapy.layers.l2 import ARP, GRE, Dot1AD, Dot1Q, Ether
from scapy.layers.vxlan import VXLAN
from scapy.packet import Packet, Raw

from ring.build import ffi, lib
from ring.receive_settings import (ALL_HASH_TYPES, ALL_TUNNEL_TYPES, MACS_MAX, HashType, ReceiveSettings, TunnelType,
                                   as_struct)
from vdev.testing.receive_model import hash_of, queue_of, refused, toeplitz

# "Verifying the RSS Hash Calculation", Windows driver documentation
KEY = bytes.fromhex("6d5a56da255b0ec24167253d43a38fb0d0ca2bcbae7b30b477cb2da38030f20c6a42b73bbeac01fa")
VECTORS = [  # destination, source, ports, hash with them, hash of addresses
    ("161.142.100.80", 1766, "66.9.149.187", 2794, 0x51CCC178, 0x323E8FC2),
    ("65.69.140.83", 4739, "199.92.111.2", 14230, 0xC626B0EA, 0xD718262A),
    ("12.22.207.184", 38024, "24.19.198.95", 12898, 0x5C2B394A, 0xD2D0A5DE),
    ("209.142.163.6", 2217, "38.27.205.30", 48228, 0xAFC7327F, 0x82989176),
    ("202.188.127.2", 1303, "153.39.163.191", 44251, 0x10E828A2, 0x5D1809C5),
    ("3ffe:2501:200:3::1", 1766, "3ffe:2501:200:1fff::7", 2794, 0x40207D3D, 0x2CC18CD5),
    ("ff02::1", 4739, "3ffe:501:8::260:97ff:fe40:efab", 14230, 0xDDE51BBF, 0x0F0C461C),
    ("fe80::200:f8ff:fe21:67cf", 38024, "3ffe:1900:4545:3:200:f8ff:fe21:67cf", 44251, 0x02D1FEEF, 0x4B61E985),
]
HOME, ROUTE = "2001:db8::4", "2001:db8::5"


def ether(**fields: object) -> Ether:
    """With addresses, or scapy asks the host for some."""
    return Ether(dst="02:00:00:00:00:01", src="02:00:00:00:00:02", **fields)


def arp() -> ARP:
    return ARP(psrc="192.0.2.1", hwsrc="02:00:00:00:00:02", pdst="192.0.2.2")


def core_hash(settings: ReceiveSettings, frame: bytes) -> tuple[int, int]:
    """(hash_report, hash_value) by the C core."""
    value = ffi.new("uint32_t *")
    report = lib.receive_hash(as_struct(settings, range(8)), frame, len(frame), value)
    return report, value[0]


def core_refuses(settings: ReceiveSettings, frame: bytes) -> bool:
    return bool(lib.receive_refuses(as_struct(settings, range(8)), frame, len(frame)))


def addresses(*texts: str) -> bytes:
    return b"".join(socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text) for text in texts)


def hashing(*types: HashType, tunnels: TunnelType | None = None) -> ReceiveSettings:
    return ReceiveSettings(hash_types=HashType(sum(types)), hash_key=KEY, tunnel_types=tunnels or TunnelType(0))


# ------------------------------------------------------------------------------------------------- hash


@pytest.mark.parametrize("to, to_port, source, source_port, with_ports, without", VECTORS)
def test_NET_HASH_D_08_known_answers(to, to_port, source, source_port, with_ports, without):
    data = addresses(source, to)
    ports = struct.pack(">HH", source_port, to_port)
    for fields, wanted in ((data, without), (data + ports, with_ports)):
        assert lib.receive_toeplitz(KEY, fields, len(fields)) == toeplitz(KEY, fields) == wanted
    ip = IPv6(src=source, dst=to) if ":" in to else IP(src=source, dst=to)
    frame = bytes(ether() / ip / TCP(sport=source_port, dport=to_port))
    assert core_hash(hashing(ALL_HASH_TYPES), frame)[1] == with_ports
    assert core_hash(hashing(HashType.IPV4, HashType.IPV6), frame)[1] == without


def packets() -> dict[str, Packet]:
    """One of each kind that the specification tells apart."""
    v4, v6 = IP(src="192.0.2.1", dst="198.51.100.2"), IPv6(src="2001:db8::1", dst="2001:db8::2")
    tcp, udp = TCP(sport=1111, dport=2222), UDP(sport=3333, dport=4444)
    home = IPv6ExtHdrDestOpt(options=[Pad1(), PadN(optdata=b"12"), HAO(hoa=HOME)])
    route = IPv6ExtHdrRouting(type=2, segleft=1, addresses=[ROUTE])
    return {
        "tcp4": v4 / tcp, "udp4": v4 / udp, "icmp4": IP(bytes(v4 / tcp)[:9] + b"\1" + bytes(v4 / tcp)[10:]),
        "tcp4 options": IP(src="192.0.2.1", dst="198.51.100.2", options=b"\1" * 8) / tcp,
        "first fragment": IP(src="192.0.2.1", dst="198.51.100.2", flags="MF") / udp / Raw(b"x" * 32),
        "later fragment": IP(src="192.0.2.1", dst="198.51.100.2", frag=4, proto=17) / Raw(b"x" * 32),
        "tcp6": v6 / tcp, "udp6": v6 / udp, "other6": IPv6(src="2001:db8::1", dst="2001:db8::2", nh=59),
        "hop by hop": v6 / IPv6ExtHdrHopByHop() / tcp,
        "home": v6 / home / udp, "route": v6 / route / tcp, "both": v6 / route / home / udp,
        "no segment left": v6 / IPv6ExtHdrRouting(type=2, segleft=0, addresses=[ROUTE]) / tcp,
        "other route": v6 / IPv6ExtHdrRouting(type=0, segleft=1, addresses=[ROUTE]) / tcp,
        "authenticated": v6 / AH(nh=6, payloadlen=4, spi=1, seq=1, icv=b"x" * 12) / tcp,
        "whole fragment": v6 / IPv6ExtHdrFragment(offset=0, m=0) / tcp,
        "first fragment 6": v6 / IPv6ExtHdrFragment(offset=0, m=1) / udp / Raw(b"x" * 32),
        "home, then a fragment": v6 / home / IPv6ExtHdrFragment(offset=8, m=0, nh=17) / Raw(b"x" * 32),
    }


V4, V6 = addresses("192.0.2.1", "198.51.100.2"), addresses("2001:db8::1", "2001:db8::2")
TCP_PORTS, UDP_PORTS = struct.pack(">HH", 1111, 2222), struct.pack(">HH", 3333, 4444)
WANTED = {  # which type says so, and of what, with all types on
    "tcp4": (HashType.TCPV4, V4 + TCP_PORTS), "udp4": (HashType.UDPV4, V4 + UDP_PORTS), "icmp4": (HashType.IPV4, V4),
    "tcp4 options": (HashType.TCPV4, V4 + TCP_PORTS), "first fragment": (HashType.IPV4, V4),
    "later fragment": (HashType.IPV4, V4),
    "tcp6": (HashType.TCPV6, V6 + TCP_PORTS), "udp6": (HashType.UDPV6, V6 + UDP_PORTS), "other6": (HashType.IPV6, V6),
    "hop by hop": (HashType.TCP_EX, V6 + TCP_PORTS),
    "home": (HashType.UDP_EX, addresses(HOME, "2001:db8::2") + UDP_PORTS),
    "route": (HashType.TCP_EX, addresses("2001:db8::1", ROUTE) + TCP_PORTS),
    "both": (HashType.UDP_EX, addresses(HOME, ROUTE) + UDP_PORTS),
    "no segment left": (HashType.TCP_EX, V6 + TCP_PORTS), "other route": (HashType.TCP_EX, V6 + TCP_PORTS),
    "authenticated": (HashType.TCP_EX, V6 + TCP_PORTS), "whole fragment": (HashType.TCP_EX, V6 + TCP_PORTS),
    "first fragment 6": (HashType.IP_EX, V6),
    "home, then a fragment": (HashType.IP_EX, addresses(HOME, "2001:db8::2")),
}


@pytest.mark.parametrize("name", WANTED)
@pytest.mark.parametrize("tags", [(), (Dot1Q(vlan=5),), (Dot1AD(vlan=7), Dot1Q(vlan=5))], ids=["", "tag", "two_tags"])
def test_NET_HASH_D_07_every_kind_of_packet_is_hashed_over_its_own_fields(name, tags):
    packet = ether()
    for tag in tags:
        packet = packet / tag
    frame = bytes(packet / packets()[name])
    kind, fields = WANTED[name]
    wanted = (kind.bit_length(), toeplitz(KEY, fields))
    settings = hashing(ALL_HASH_TYPES)
    assert core_hash(settings, frame) == hash_of(settings, frame) == wanted


@pytest.mark.parametrize("name", WANTED)
def test_NET_HASH_D_04_the_first_type_that_is_on_decides(name):
    """Every combination of types, for every kind of packet (NET-HASH-D-04, 05, 06)."""
    frame = bytes(ether() / packets()[name])
    for types in range(ALL_HASH_TYPES + 1):
        settings = hashing(HashType(types))
        assert core_hash(settings, frame) == hash_of(settings, frame)


def test_NET_HASH_D_09_what_has_no_hash_reports_none():
    frames = [bytes(ether() / arp()), bytes(ether(type=0x88B5) / Raw(b"x" * 50)), bytes(14), bytes(60)]
    for frame in frames:
        assert core_hash(hashing(ALL_HASH_TYPES, tunnels=ALL_TUNNEL_TYPES), frame) == (0, 0)
    assert core_hash(hashing(), bytes(ether() / packets()["tcp4"])) == (0, 0)


def test_a_short_key_is_as_one_with_zeroes_behind_it():
    frame = bytes(ether() / packets()["tcp6"])
    short = ReceiveSettings(hash_types=ALL_HASH_TYPES, hash_key=KEY[:16])
    long = ReceiveSettings(hash_types=ALL_HASH_TYPES, hash_key=KEY[:16] + bytes(24))
    assert core_hash(short, frame) == core_hash(long, frame) == hash_of(short, frame) != (0, 0)


# ----------------------------------------------------------------------------------------- inner headers


def gre(protocol: int, **options: object) -> Packet:
    return GRE(proto=protocol, **options)


def tunnels() -> list[tuple[Packet, TunnelType, bool]]:
    """(outer headers, all types that they match, whether Ethernet comes next)."""
    outer4, outer6 = IP(src="203.0.113.1", dst="203.0.113.2"), IPv6(src="2001:db8:f::1", dst="2001:db8:f::2")
    T = TunnelType
    made = [(IP(src="203.0.113.1", dst="203.0.113.2", proto=4), T.IPIP, 4)]
    for outer, over4 in ((outer4, True), (outer6, False)):
        alone, numbered = (T.GRE_2784, T.GRE_2890) if over4 else (T.GRE_7676, T.GRE_7676)
        made += [
            (outer / gre(0x0800), alone, 4), (outer / gre(0x0800, chksum_present=1), alone, 4),
            (outer / gre(0x0800, key_present=1, key=7), numbered, 4),
            (outer / gre(0x0800, seqnum_present=1, sequence_number=7, key_present=1), numbered, 4),
            (outer / gre(0x86DD), alone | T.GRE_7676, 6), (outer / gre(0x6558, key_present=1), numbered | T.NVGRE, 0),
            (outer / gre(0x6558), alone, 0),
            (outer / UDP(dport=4754) / gre(0x0800), T.GRE_UDP, 4),
            (outer / UDP(dport=4789) / VXLAN(vni=5), T.VXLAN, 0),
            (outer / UDP(dport=4790) / Raw(bytes([0x0C, 0, 0, 1, 0, 0, 5, 0])), T.VXLAN_GPE, 4),
            (outer / UDP(dport=4790) / Raw(bytes([0x0C, 0, 0, 2, 0, 0, 5, 0])), T.VXLAN_GPE, 6),
            (outer / UDP(dport=4790) / Raw(bytes([0x0C, 0, 0, 3, 0, 0, 5, 0])), T.VXLAN_GPE, 0),
            (outer / UDP(dport=4790) / Raw(bytes([0x08, 0, 0, 0, 0, 0, 5, 0])), T.VXLAN_GPE, 0),
            (outer / UDP(dport=6081) / GENEVE(vni=5, proto=0x6558), T.GENEVE, 0),
            (outer / UDP(dport=6081) / Raw(bytes([2, 0]) + b"\x86\xdd" + bytes(12)), T.GENEVE, 6),
        ]
    return made


@pytest.mark.parametrize("number", range(len(tunnels())))
def test_NET_HASH_D_10_NET_HASH_D_11_the_inner_header_is_hashed_of_a_type_that_is_on(number):
    """And the outer one of any that is off."""
    outer, matches, inside = tunnels()[number]
    inner = {4: packets()["tcp4"], 6: packets()["udp6"], 0: ether() / Dot1Q(vlan=3) / packets()["tcp6"]}[inside]
    frame = bytes(ether() / outer / Raw(bytes(inner)))
    alone = bytes(inner) if inside == 0 else bytes(ether() / inner)
    for kind in TunnelType:
        settings = hashing(ALL_HASH_TYPES, tunnels=kind)
        wanted = core_hash(hashing(ALL_HASH_TYPES), alone if kind in matches else frame)
        assert core_hash(settings, frame) == hash_of(settings, frame) == wanted != (0, 0), kind


@pytest.mark.parametrize("outer", [
    IP(src="203.0.113.1", dst="203.0.113.2", proto=47) / Raw(bytes.fromhex("00010800")),  # version 1
    IP(src="203.0.113.1", dst="203.0.113.2", proto=47) / Raw(bytes.fromhex("40000800")),  # routing
    IP(src="203.0.113.1", dst="203.0.113.2") / UDP(dport=4789) / Raw(bytes(8)),  # no I flag
    IP(src="203.0.113.1", dst="203.0.113.2") / UDP(dport=4790) / Raw(bytes([0x18]) + bytes(7)),  # version 1
    IP(src="203.0.113.1", dst="203.0.113.2") / UDP(dport=6081) / Raw(bytes([0x40, 0, 0x65, 0x58]) + bytes(4)),
    IP(src="203.0.113.1", dst="203.0.113.2") / UDP(dport=4788) / VXLAN(),
    IPv6(src="2001:db8:f::1", dst="2001:db8:f::2", nh=4),
])
def test_NET_HASH_D_10_what_is_no_tunnel_is_hashed_by_its_outer_header(outer):
    frame = bytes(ether() / outer / Raw(bytes(ether() / packets()["tcp4"])))
    settings = hashing(ALL_HASH_TYPES, tunnels=ALL_TUNNEL_TYPES)
    assert core_hash(settings, frame) == hash_of(settings, frame) == core_hash(hashing(ALL_HASH_TYPES), frame) != (0, 0)


def test_a_tunnel_without_an_ip_packet_inside_has_no_hash():
    frame = bytes(ether() / IP(src="192.0.2.1", dst="192.0.2.2") / UDP(dport=4789) / VXLAN() / ether() / arp())
    settings = hashing(ALL_HASH_TYPES, tunnels=ALL_TUNNEL_TYPES)
    assert core_hash(settings, frame) == hash_of(settings, frame) == (0, 0)


# -------------------------------------------------------------------------------------- random frames


def a_frame(rng: random.Random, whole: list[bytes]) -> bytes:
    """A packet of some kind, in a tunnel or not, cut off or with bytes of it changed, or not."""
    frame = rng.choice(whole)
    if rng.random() < 0.5:
        changed = bytearray(frame)
        for _ in range(rng.choice([1, 1, 2, 5])):
            at = rng.randrange(12, min(len(changed), 120))
            changed[at] = rng.choice([rng.randrange(256), changed[at] ^ 1 << rng.randrange(8), 0, 43, 60, 44])
        frame = bytes(changed)
    return frame[:max(14, rng.randrange(len(frame)))] if rng.random() < 0.3 else frame


def whole_frames() -> list[bytes]:
    made = [bytes(ether() / packet) for packet in packets().values()]
    made += [bytes(ether() / Dot1Q(vlan=vlan) / packets()["tcp4"]) for vlan in (0, 100, 4095)]
    for (outer, _, inside), name in itertools.product(tunnels(), ("tcp4", "home", "both")):
        if inside != 0 and inside != packets()[name].version:
            continue
        inner = packets()[name] if inside else ether() / packets()[name]
        made.append(bytes(ether() / outer / Raw(bytes(inner))))
    deep = IPv6(src="2001:db8::1", dst="2001:db8::2")
    for _ in range(28):  # further than is looked
        deep = deep / IPv6ExtHdrHopByHop()
    return [*made, bytes(ether() / deep / TCP())]


@pytest.mark.parametrize("seed", range(4))
def test_random_frames_are_hashed_as_the_model_does(seed):
    rng = random.Random(seed)
    whole = whole_frames()
    types = [ALL_HASH_TYPES, HashType(0x3F), HashType(0x1C7), HashType.TCP_EX | HashType.IPV4]
    reports = set()
    for _ in range(3000):
        frame = a_frame(rng, whole)
        settings = hashing(rng.choice(types), tunnels=rng.choice([TunnelType(0), ALL_TUNNEL_TYPES,
                                                                  rng.choice(list(TunnelType))]))
        got = core_hash(settings, frame)
        assert got == hash_of(settings, frame), (settings, frame.hex())
        reports.add(got[0])
    assert reports == set(range(10))


# ------------------------------------------------------------------------------------------------ filters

OWN, OTHER, GROUP, GROUP_2 = b"\2\0\0\0\0\1", b"\2\0\0\0\0\2", b"\1\0\x5e\0\0\1", b"\x33\x33\0\0\0\2"
DESTINATIONS = [OWN, OTHER, b"\2\0\0\0\0\3", GROUP, GROUP_2, b"\xff" * 6]
MODES = ("promiscuous", "all_multicast", "all_unicast", "no_multicast", "no_unicast", "no_broadcast")


def test_NET_RXF_D_01_every_combination_of_modes_for_every_kind_of_address():
    """NET-RXF-D-01 to 08, NET-MAC-D-04."""
    outcomes = set()
    for chosen in itertools.product([False, True], repeat=len(MODES)):
        for tables in ({}, {"unicast": (OTHER,), "multicast": (GROUP_2,)}):
            settings = ReceiveSettings(mac=OWN, filter_macs=True, **dict(zip(MODES, chosen, strict=True)), **tables)
            for to in DESTINATIONS:
                frame = to + OTHER + bytes(48)
                is_refused = core_refuses(settings, frame)
                assert is_refused == refused(settings, frame)
                outcomes.add((to, is_refused))
    assert len(outcomes) == 2 * len(DESTINATIONS)


@pytest.mark.parametrize("modes, accepted", [
    ((), {OWN, b"\xff" * 6}), (("all_multicast",), {OWN, GROUP, b"\xff" * 6}),
    (("all_multicast", "no_multicast"), {OWN, b"\xff" * 6}), (("all_unicast",), {OWN, OTHER, b"\xff" * 6}),
    (("all_unicast", "no_unicast"), {b"\xff" * 6}), (("no_broadcast", "all_multicast"), {OWN, GROUP}),
    (("promiscuous", "no_multicast", "no_unicast", "no_broadcast"), {OWN, OTHER, GROUP, b"\xff" * 6}),
])
def test_NET_RXF_D_06_modes_by_hand(modes, accepted):
    settings = ReceiveSettings(mac=OWN, filter_macs=True, **dict.fromkeys(modes, True))
    frames = {to: to + OTHER + bytes(48) for to in (OWN, OTHER, GROUP, b"\xff" * 6)}
    assert {to for to, frame in frames.items() if not core_refuses(settings, frame)} == accepted


def test_without_a_filter_everything_is_let_in():
    settings = ReceiveSettings(mac=OWN, no_broadcast=True, no_unicast=True, no_multicast=True)
    assert not any(core_refuses(settings, to + OTHER + bytes(48)) for to in DESTINATIONS)


@pytest.mark.parametrize("listed", [MACS_MAX - 1, MACS_MAX])
def test_more_addresses_than_there_is_room_for_are_all_let_in(listed):
    table = tuple(b"\2\1\0\0" + n.to_bytes(2, "big") for n in range(listed))
    settings = ReceiveSettings(mac=OWN, filter_macs=True, unicast=table)
    fits = listed < MACS_MAX
    assert [core_refuses(settings, to + OTHER + bytes(48)) for to in (*table, OTHER, GROUP)] == \
        [False] * listed + [fits, fits]


@pytest.mark.parametrize("by_address", [False, True])
def test_NET_VLAN_D_02_tagged_frames_by_id(by_address):
    """NET-VLAN-D-01 to 04; 802.1ad's tags are none of these."""
    for vlans in ((), (0,), (1, 100, 4095), tuple(range(4096))):
        settings = ReceiveSettings(mac=OWN, filter_macs=by_address, filter_vlans=True, vlans=vlans)
        for vlan, priority in itertools.product((0, 1, 63, 64, 100, 4094, 4095), (0, 7)):
            frame = OWN + OTHER + b"\x81\x00" + (priority << 13 | vlan).to_bytes(2, "big") + bytes(44)
            assert core_refuses(settings, frame) == refused(settings, frame) == (vlan not in vlans)
        for frame in (OWN + OTHER + b"\x08\x00" + bytes(46), OWN + OTHER + b"\x88\xa8" + bytes(46),
                      OWN + OTHER + b"\x81\x00", OWN + OTHER + b"\x81\x00\0"):
            assert not core_refuses(settings, frame)
    tagged = OWN + OTHER + b"\x81\x00\x00\x05" + bytes(44)
    assert not core_refuses(ReceiveSettings(mac=OWN), tagged)


def test_NET_RSS_D_01_the_model_selects_by_mask():
    settings = ReceiveSettings(rss=True, indirection=(0, 1, 2, 3), unclassified=3, hash_types=ALL_HASH_TYPES,
                               hash_key=KEY)
    frame = bytes(ether() / packets()["tcp4"])
    assert queue_of(settings, frame) == core_hash(settings, frame)[1] & 3
    assert queue_of(settings, bytes(ether() / arp())) == 3


@pytest.mark.parametrize("wrong", [
    {"indirection": ()}, {"indirection": (0, 1, 0)}, {"indirection": (0,) * 256}, {"hash_key": bytes(41)},
    {"vlans": (4096,)}, {"mac": bytes(5)}, {"unicast": (bytes(7),)},
])
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValueError):
        as_struct(ReceiveSettings(**wrong), [0])
