"""The responder, spoken to by scapy, and through its sockets as the pump does."""

import os
import select
import time
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.dhcp import BOOTP, DHCP
from scapy.layers.inet import ICMP, IP, TCP, UDP, fragment
from scapy.layers.inet6 import (
    ICMPv6EchoReply,
    ICMPv6EchoRequest,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    ICMPv6ND_RS,
    ICMPv6NDOptDstLLAddr,
    ICMPv6NDOptPrefixInfo,
    ICMPv6NDOptSrcLLAddr,
    IPv6,
    in6_getnsmac,
    in6_getnsma,
)
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Raw
from scapy.pton_ntop import inet_pton
from scapy.utils6 import in6_mactoifaceid

from vdev.ports import responder as module
from vdev.ports.responder import ADDRESS_V6, LINK_LOCAL, MAC, Responder
from vdev.ports.sockets import MESSAGE_MAX
from vdev.ports.spec import ResponderSpec

OWN_MAC = MAC.hex(":")
OWN = "10.0.76.1"
GUEST_MAC = "52:54:00:aa:bb:cc"
GUEST = "10.0.76.2"
GUEST_LL = "fe80::5054:ff:feaa:bbcc"
NEEDS_CSUM = 1
PLAIN = bytes(12)


@pytest.fixture
def port():
    port = Responder(ResponderSpec(), 2)
    yield port
    port.close()


def ether(**fields):
    return Ether(**{"src": GUEST_MAC, "dst": OWN_MAC} | fields)


def ask(port, packet, header=PLAIN):
    """The answer as scapy reads it, its checksums right; None when there is none."""
    message = port.answer(header + bytes(packet))
    if message is None:
        return None
    assert message[:12] == PLAIN
    frame = Ether(message[12:])
    assert frame.src == OWN_MAC
    again = frame.copy()
    for layer in (IP, UDP, ICMP):
        if layer in again:
            del again[layer].chksum
    for name in (ICMPv6EchoReply, ICMPv6EchoRequest, ICMPv6ND_NA, ICMPv6ND_RA, ICMPv6ND_NS):
        if name in again:
            del again[name].cksum
    assert bytes(again) == message[12:]
    return frame


# ---- ARP


@pytest.mark.parametrize("psrc", [GUEST, "0.0.0.0"])
def test_arp(port, psrc):
    reply = ask(port, ether(dst="ff:ff:ff:ff:ff:ff") / ARP(op=1, hwsrc=GUEST_MAC, psrc=psrc, pdst=OWN))
    assert reply.dst == GUEST_MAC
    assert (reply[ARP].op, reply[ARP].hwsrc, reply[ARP].psrc) == (2, OWN_MAC, OWN)
    assert (reply[ARP].hwdst, reply[ARP].pdst) == (GUEST_MAC, psrc)
    assert port.answered == {"arp": 1}


@pytest.mark.parametrize("arp", [ARP(op=1, pdst="10.0.76.9"), ARP(op=2, pdst=OWN), ARP(op=3, pdst=OWN)])
def test_arp_for_others(port, arp):
    assert ask(port, ether(dst="ff:ff:ff:ff:ff:ff") / arp) is None


# ---- echo


def test_echo(port):
    request = ether() / IP(src=GUEST, dst=OWN) / ICMP(id=7, seq=3) / Raw(b"payload" * 9)
    reply = ask(port, request)
    assert (reply.dst, reply[IP].src, reply[IP].dst) == (GUEST_MAC, OWN, GUEST)
    assert (reply[ICMP].type, reply[ICMP].id, reply[ICMP].seq) == (0, 7, 3)
    assert reply[Raw].load == b"payload" * 9
    assert port.answered == {"echo": 1}


def test_echo_of_the_longest_packet(port):
    payload = os.urandom(65535 - 28)
    assert ask(port, ether() / IP(src=GUEST, dst=OWN) / ICMP() / Raw(payload))[Raw].load == payload


def test_echo_padded_to_the_smallest_frame(port):
    request = bytes(ether() / IP(src=GUEST, dst=OWN) / ICMP(id=7)).ljust(60, b"\0")
    assert ask(port, Raw(request))[IP].len == 28


@pytest.mark.parametrize("target", [str(ADDRESS_V6), str(LINK_LOCAL)])
def test_echo_v6(port, target):
    request = ether() / IPv6(src=GUEST_LL, dst=target) / ICMPv6EchoRequest(id=7, seq=3, data=b"x" * 50)
    reply = ask(port, request)
    assert (reply.dst, reply[IPv6].src, reply[IPv6].dst) == (GUEST_MAC, target, GUEST_LL)
    assert (reply[ICMPv6EchoReply].id, reply[ICMPv6EchoReply].seq) == (7, 3)
    assert reply[ICMPv6EchoReply].data == b"x" * 50


def test_echo_v6_to_all_nodes(port):
    request = ether(dst="33:33:00:00:00:01") / IPv6(src=GUEST_LL, dst="ff02::1") / ICMPv6EchoRequest()
    assert ask(port, request)[IPv6].src == str(LINK_LOCAL)


def test_a_checksum_left_to_the_device_is_not_verified(port):
    header = bytes([NEEDS_CSUM]) + bytes(11)
    echo = ether() / IPv6(src=GUEST_LL, dst=str(ADDRESS_V6)) / ICMPv6EchoRequest(cksum=0x1234)
    assert ask(port, echo) is None
    assert ask(port, echo, header)[ICMPv6EchoReply]
    dhcp = (ether(dst="ff:ff:ff:ff:ff:ff") / IP(src="0.0.0.0", dst="255.255.255.255")
            / UDP(sport=68, dport=67, chksum=0x1234) / BOOTP(op=1, chaddr=bytes.fromhex("525400aabbcc"))
            / DHCP(options=[("message-type", "discover"), "end"]))
    assert ask(port, dhcp) is None
    assert ask(port, dhcp, header)[DHCP]


# ---- neighbour discovery


def test_the_link_local_address_is_made_of_the_mac():
    assert LINK_LOCAL.packed == inet_pton(10, "fe80::" + in6_mactoifaceid(OWN_MAC))


@pytest.mark.parametrize("target", [str(ADDRESS_V6), str(LINK_LOCAL)])
def test_neighbour_solicitation(port, target):
    group = in6_getnsma(inet_pton(10, target))
    request = (ether(dst=in6_getnsmac(group)) / IPv6(src=GUEST_LL, dst=str(ip_address(group)))
               / ICMPv6ND_NS(tgt=target) / ICMPv6NDOptSrcLLAddr(lladdr=GUEST_MAC))
    reply = ask(port, request)
    packet = reply[IPv6]
    assert (reply.dst, packet.src, packet.dst, packet.hlim) == (GUEST_MAC, target, GUEST_LL, 255)
    answer = reply[ICMPv6ND_NA]
    assert (answer.tgt, answer.R, answer.S, answer.O) == (target, 0, 1, 1)
    assert reply[ICMPv6NDOptDstLLAddr].lladdr == OWN_MAC


def test_a_guest_that_wants_our_address_learns_that_it_is_taken(port):
    target = str(ADDRESS_V6)
    group = in6_getnsma(inet_pton(10, target))
    request = (ether(dst=in6_getnsmac(group)) / IPv6(src="::", dst=str(ip_address(group)))
               / ICMPv6ND_NS(tgt=target))
    reply = ask(port, request)
    assert (reply.dst, reply[IPv6].dst) == ("33:33:00:00:00:01", "ff02::1")
    assert (reply[ICMPv6ND_NA].S, reply[ICMPv6ND_NA].tgt) == (0, target)


@pytest.mark.parametrize("packet", [
    IPv6(src=GUEST_LL, dst=str(LINK_LOCAL), hlim=64) / ICMPv6ND_NS(tgt=str(LINK_LOCAL)),
    IPv6(src=GUEST_LL, dst=str(LINK_LOCAL)) / ICMPv6ND_NS(tgt="fe80::9"),
    IPv6(src=GUEST_LL, dst=str(LINK_LOCAL)) / ICMPv6ND_NS(tgt=str(LINK_LOCAL), code=1),
    IPv6(src=GUEST_LL, dst=str(LINK_LOCAL)) / ICMPv6ND_NS(tgt=str(LINK_LOCAL)) / Raw(b"\1\0" + bytes(6)),
    IPv6(src=GUEST_LL, dst=str(LINK_LOCAL)) / ICMPv6ND_NS(tgt=str(LINK_LOCAL)) / Raw(b"\1\2" + bytes(6)),
    IPv6(src=GUEST_LL, dst=str(LINK_LOCAL)) / ICMPv6ND_NS(tgt=str(LINK_LOCAL)) / Raw(b"\1"),
    IPv6(src=GUEST_LL, dst="ff02::2", hlim=64) / ICMPv6ND_RS(),
    IPv6(src=GUEST_LL, dst="ff02::2") / ICMPv6ND_RS() / Raw(b"\1\0" + bytes(6)),
])
def test_neighbour_discovery_that_must_be_ignored(port, packet):
    assert ask(port, ether() / packet) is None


@pytest.mark.parametrize("source, there, mac", [
    (GUEST_LL, GUEST_LL, GUEST_MAC), ("::", "ff02::1", "33:33:00:00:00:01")])
def test_router_solicitation(port, source, there, mac):
    reply = ask(port, ether(dst="33:33:00:00:00:02") / IPv6(src=source, dst="ff02::2") / ICMPv6ND_RS())
    packet = reply[IPv6]
    assert (reply.dst, packet.src, packet.dst, packet.hlim) == (mac, str(LINK_LOCAL), there, 255)
    assert reply[ICMPv6ND_RA].routerlifetime == 0
    prefix = reply[ICMPv6NDOptPrefixInfo]
    assert (prefix.prefix, prefix.prefixlen, prefix.L, prefix.A) == ("fd76:6465:7600::", 64, 1, 1)
    assert prefix.validlifetime == prefix.preferredlifetime == 0xFFFFFFFF
    assert reply[ICMPv6NDOptSrcLLAddr].lladdr == OWN_MAC


# ---- DHCP


def dhcp(kind, *options):
    return (ether(dst="ff:ff:ff:ff:ff:ff") / IP(src="0.0.0.0", dst="255.255.255.255")
            / UDP(sport=68, dport=67) / BOOTP(op=1, chaddr=bytes.fromhex("525400aabbcc"), xid=5)
            / DHCP(options=[("message-type", kind), *options, "end"]))


def test_dhcp(port):
    offer = ask(port, dhcp("discover"))
    assert (offer.dst, offer[IP].src, offer[IP].dst) == (GUEST_MAC, OWN, GUEST)
    assert (offer[UDP].sport, offer[UDP].dport, offer[BOOTP].yiaddr) == (67, 68, GUEST)
    ack = ask(port, dhcp("request", ("server_id", OWN), ("requested_addr", GUEST)))
    assert ("message-type", 5) in ack[DHCP].options
    nak = ask(port, dhcp("request", ("server_id", OWN), ("requested_addr", "10.9.9.9")))
    assert (nak.dst, nak[IP].dst) == ("ff:ff:ff:ff:ff:ff", "255.255.255.255")
    assert {mac.hex(":"): str(ip) for mac, ip in port.dhcp.leases.items()} == {GUEST_MAC: GUEST}
    assert port.answered == {"dhcp": 3}


def test_boot_file():
    port = Responder(ResponderSpec(), 1, boot_file="pxe")
    assert ask(port, dhcp("discover"))[BOOTP].file.rstrip(b"\0") == b"pxe"
    port.close()


# ---- what is not answered


ECHO = IP(src=GUEST, dst=OWN) / ICMP()


@pytest.mark.parametrize("packet", [
    ether(dst="52:54:00:00:00:99") / ECHO,
    ether(src="01:00:5e:00:00:01") / ECHO,
    ether() / Dot1Q(vlan=5) / ECHO,
    ether(type=0x88B5) / Raw(bytes(50)),
    ether() / IP(src=GUEST, dst="10.0.76.9") / ICMP(),
    ether() / IP(src=GUEST, dst="10.0.76.255") / ICMP(),
    ether() / IP(src=GUEST, dst=OWN) / ICMP(chksum=1),
    ether() / IP(src=GUEST, dst=OWN) / ICMP(type=13),
    ether() / IP(src=GUEST, dst=OWN) / ICMP(code=1),
    ether() / IP(src=GUEST, dst=OWN, proto=1) / Raw(b"\x08\x00\xf7\xff"),
    ether() / IP(src=GUEST, dst=OWN) / TCP(dport=80),
    ether() / IP(src=GUEST, dst=OWN) / UDP(dport=53),
    ether() / IPv6(src="::", dst=str(LINK_LOCAL)) / ICMPv6EchoRequest(),
    ether() / IPv6(src=GUEST_LL, dst="fe80::9") / ICMPv6EchoRequest(),
    ether() / IPv6(src=GUEST_LL, dst=str(LINK_LOCAL), nh=58) / Raw(b"\x80\0\0"),
    ether() / IPv6(src=GUEST_LL, dst=str(LINK_LOCAL)) / UDP(dport=67),
    Raw(bytes(13)),
])
def test_not_answered(port, packet):
    assert ask(port, packet) is None
    assert not port.answered


def test_fragments_are_not_answered(port):
    for part in fragment(IP(src=GUEST, dst=OWN) / ICMP() / Raw(bytes(3000)), 1480):
        assert ask(port, ether() / part) is None


@pytest.mark.parametrize("gso", [1, 3, 4, 5, 0x81])
def test_segmented_frames_are_not_answered(port, gso):
    assert ask(port, ether() / ECHO, bytes([0, gso]) + bytes(10)) is None
    assert ask(port, ether() / ECHO, bytes([0, 0x80]) + bytes(10)) is not None


def test_no_truncation_of_a_good_message_raises(port):
    option = ICMPv6NDOptSrcLLAddr(lladdr=GUEST_MAC)
    goods = [ether() / ARP(op=1, pdst=OWN), ether() / ECHO, dhcp("discover"),
             ether() / IPv6(src=GUEST_LL, dst=str(LINK_LOCAL)) / ICMPv6ND_NS(tgt=str(LINK_LOCAL)) / option,
             ether() / IPv6(src=GUEST_LL, dst="ff02::2") / ICMPv6ND_RS() / option]
    for good in goods:
        message = PLAIN + bytes(good)
        assert port.answer(message) is not None
        for length in range(len(message)):
            port.answer(message[:length])


@pytest.fixture(scope="module")
def fuzzed():
    port = Responder(ResponderSpec(), 1)
    yield port
    port.close()


def _mutated(good):
    """Bytes of ``good`` overwritten at random places: most layers still parse, so deep code is reached."""
    data = PLAIN + bytes(good)
    places = st.integers(12, len(data) - 1)
    return st.dictionaries(places, st.integers(0, 255), max_size=6).map(
        lambda changes: bytes(changes.get(at, byte) for at, byte in enumerate(data)))


HOSTILE = st.one_of(
    st.binary(max_size=200),
    st.binary(max_size=200).map(lambda tail: PLAIN + MAC + bytes.fromhex("525400aabbcc0800") + tail),
    st.binary(max_size=200).map(lambda tail: PLAIN + MAC + bytes.fromhex("525400aabbcc86dd") + tail),
    *map(_mutated, [ether() / ARP(op=1, pdst=OWN), ether() / ECHO, dhcp("discover"),
                    ether() / IPv6(src=GUEST_LL, dst=str(LINK_LOCAL)) / ICMPv6ND_NS(tgt=str(LINK_LOCAL))]))


@given(HOSTILE, st.booleans())
def test_no_frame_raises_or_makes_tables_grow(fuzzed, message, partial):
    reply = fuzzed.answer(bytes([partial]) + message[1:])
    assert reply is None or reply[:12] == PLAIN and reply[18:24] == MAC
    assert len(fuzzed._neighbours) <= 64 and len(fuzzed.dhcp.leases) <= 64


def test_the_neighbour_table_is_bounded_and_holds_only_neighbours(port):
    for n in range(200):
        ask(port, ether() / ARP(op=1, psrc=f"10.0.76.{n}", pdst=OWN))
    assert len(port._neighbours) == 64
    before = dict(port._neighbours)
    ask(port, ether() / ARP(op=1, psrc="8.8.8.8", pdst=OWN))
    ask(port, ether() / ARP(op=1, psrc=OWN, pdst=OWN))
    assert port._neighbours == before


# ---- through the sockets


def serve(port):
    """What the control loop does once."""
    ready = select.select([fd for fd, _ in port.watches()], [], [], 0)[0]
    for fd, callback in port.watches():
        if fd in ready:
            callback()


def test_carries(port):
    assert (port.carries.header, port.carries.queue_pairs, port.carries.mtu) == (12, 2, None)


def test_answers_come_on_the_pair_that_asked(port):
    for pair in 0, 1:
        os.write(port.ends(pair).to_port, PLAIN + bytes(ether() / IP(src=GUEST, dst=OWN) / ICMP(seq=pair)))
    serve(port)
    for pair in 1, 0:
        assert Ether(os.read(port.ends(pair).from_port, MESSAGE_MAX)[12:])[ICMP].seq == pair


def test_a_turn_is_bounded_and_the_rest_is_served_next(port):
    request = PLAIN + bytes(ether() / ECHO)
    count = module._MESSAGES_A_TURN + 5
    for _ in range(count):
        os.write(port.ends(0).to_port, request)
    serve(port)
    assert port.answered["echo"] == module._MESSAGES_A_TURN
    serve(port)
    assert port.answered["echo"] == count
    serve(port)


def test_a_turn_is_bounded_in_bytes_too(port, monkeypatch):
    monkeypatch.setattr(module, "_BYTES_A_TURN", 50000)
    request = PLAIN + bytes(ether() / IP(src=GUEST, dst=OWN) / ICMP() / Raw(bytes(30000)))
    for _ in range(3):
        os.write(port.ends(0).to_port, request)
    serve(port)
    assert port.answered["echo"] == 2
    serve(port)
    assert port.answered["echo"] == 3


def test_a_guest_that_does_not_read_loses_answers_and_nothing_else(port):
    request = PLAIN + bytes(ether() / IP(src=GUEST, dst=OWN) / ICMP() / Raw(bytes(1400)))
    while not port.answered["unsent"]:
        os.write(port.ends(0).to_port, request)
        serve(port)
    port.enable(0, False)
    port.enable(0, True)
    os.write(port.ends(0).to_port, request)
    serve(port)
    assert Ether(os.read(port.ends(0).from_port, MESSAGE_MAX)[12:])[ICMP].type == 0


# ---- pinging the guest


def from_port(port):
    return Ether(os.read(port.ends(0).from_port, MESSAGE_MAX)[12:])


def to_port(port, packet):
    os.write(port.ends(0).to_port, PLAIN + bytes(packet))
    serve(port)


def test_ping(port):
    replies = []
    port.on_echo_reply = replies.append
    assert not port.send_echo(ip_address(GUEST), 1)
    question = from_port(port)
    assert (question.dst, question[ARP].op, question[ARP].pdst) == ("ff:ff:ff:ff:ff:ff", 1, GUEST)
    to_port(port, ether() / ARP(op=2, hwsrc=GUEST_MAC, psrc=GUEST, hwdst=OWN_MAC, pdst=OWN))

    before = time.monotonic()
    assert port.send_echo(ip_address(GUEST), 1)
    request = from_port(port)
    assert (request.dst, request[IP].dst, request[ICMP].type, request[ICMP].seq) == (GUEST_MAC, GUEST, 8, 1)
    reply = ether() / IP(src=GUEST, dst=OWN) / ICMP(type=0, id=request[ICMP].id, seq=1) / request[Raw]
    to_port(port, reply)
    to_port(port, reply)  # a duplicate counts once
    (got,) = replies
    assert (got.address, got.sequence) == (ip_address(GUEST), 1)
    assert 0 <= got.seconds <= time.monotonic() - before


def test_ping_v6(port):
    replies = []
    port.on_echo_reply = replies.append
    assert not port.send_echo(ip_address(GUEST_LL), 2)
    question = from_port(port)
    assert (question.dst, question[IPv6].dst) == ("33:33:ff:aa:bb:cc", "ff02::1:ffaa:bbcc")
    assert (question[IPv6].hlim, question[ICMPv6ND_NS].tgt) == (255, GUEST_LL)
    assert question[ICMPv6NDOptSrcLLAddr].lladdr == OWN_MAC
    to_port(port, ether() / IPv6(src=GUEST_LL, dst=str(LINK_LOCAL)) / ICMPv6ND_NA(tgt=GUEST_LL, R=0))
    assert port.send_echo(ip_address(GUEST_LL), 2)
    request = from_port(port)
    assert (request.dst, request[IPv6].src) == (GUEST_MAC, str(LINK_LOCAL))
    reply = ICMPv6EchoReply(id=request[ICMPv6EchoRequest].id, seq=request[ICMPv6EchoRequest].seq)
    to_port(port, ether() / IPv6(src=GUEST_LL, dst=str(LINK_LOCAL)) / reply)
    assert [(reply.address, reply.sequence) for reply in replies] == [(ip_address(GUEST_LL), 2)]


def test_a_reply_nobody_asked_for_is_no_pong(port):
    replies = []
    port.on_echo_reply = replies.append
    to_port(port, ether() / ARP(op=2, hwsrc=GUEST_MAC, psrc=GUEST, hwdst=OWN_MAC, pdst=OWN))
    port.send_echo(ip_address(GUEST), 1)
    mine = from_port(port)[ICMP].id
    for identifier, sequence, source in [(mine, 2, GUEST), (mine ^ 1, 1, GUEST), (mine, 1, "10.0.76.9")]:
        to_port(port, ether() / IP(src=source, dst=OWN) / ICMP(type=0, id=identifier, seq=sequence))
    assert replies == []


def test_pings_without_an_answer_are_forgotten(port):
    to_port(port, ether() / ARP(op=2, hwsrc=GUEST_MAC, psrc=GUEST, hwdst=OWN_MAC, pdst=OWN))
    for sequence in range(100):
        port.send_echo(ip_address(GUEST), sequence)
        from_port(port)
    assert len(port._pings) == 64
