"""The responder's DHCP server, spoken to by scapy."""

from ipaddress import IPv4Address, ip_interface

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.dhcp import BOOTP, DHCP

from vdev.ports.dhcp import LEASES_MAX, DhcpServer

SERVER = "10.5.0.1"
MAC = bytes.fromhex("525400aabbcc")
BROADCAST = b"\xff" * 6


@pytest.fixture
def server():
    return DhcpServer(ip_interface(f"{SERVER}/24"))


def request(kind, mac=MAC, options=(), **fields):
    """A client's message as bytes."""
    bootp = BOOTP(op=1, xid=0x1234, chaddr=mac, **fields)
    return bytes(bootp / DHCP(options=[("message-type", kind), *options, "end"]))


def read(answer):
    """(BOOTP layer, {option: value}) of an answer."""
    assert len(answer.payload) >= 300
    bootp = BOOTP(answer.payload)
    assert (bootp.op, bootp.xid, bootp.htype, bootp.hlen) == (2, 0x1234, 1, 6)
    assert bootp.chaddr[:6] == MAC
    return bootp, {option[0]: option[1] for option in bootp[DHCP].options if isinstance(option, tuple)}


def lease(server, mac):
    """The address a client gets by DISCOVER and REQUEST."""
    offered = BOOTP(server.answer(request("discover", mac)).payload).yiaddr
    answer = server.answer(request("request", mac, [("server_id", SERVER), ("requested_addr", offered)]))
    assert ("message-type", 5) in BOOTP(answer.payload)[DHCP].options
    return offered


def test_discover_offer_request_ack(server):
    answer = server.answer(request("discover"))
    bootp, options = read(answer)
    assert (bootp.yiaddr, bootp.siaddr, bootp.ciaddr) == ("10.5.0.2", "0.0.0.0", "0.0.0.0")
    assert bootp.file.strip(b"\0") == b""
    assert options == {"message-type": 2, "server_id": SERVER, "lease_time": 3600,
                       "subnet_mask": "255.255.255.0", "broadcast_address": "10.5.0.255"}
    assert (answer.mac, answer.destination) == (MAC, IPv4Address("10.5.0.2"))

    chosen = [("server_id", SERVER), ("requested_addr", "10.5.0.2")]
    answer = server.answer(request("request", options=chosen))
    bootp, options = read(answer)
    assert (options["message-type"], bootp.yiaddr, options["lease_time"]) == (5, "10.5.0.2", 3600)
    assert server.leases == {MAC: IPv4Address("10.5.0.2")}


def test_the_client_identifier_comes_back(server):
    for wanted, kind in (SERVER, 6), ("10.5.0.9", 5):
        asked = [("client_id", b"\x01abc"), ("requested_addr", wanted)]
        _, options = read(server.answer(request("request", options=asked)))
        assert (options["message-type"], options["client_id"]) == (kind, b"\x01abc")
        server.leases.clear()


def test_each_mac_keeps_its_address(server):
    macs = [bytes([2, 0, 0, 0, 0, n]) for n in range(10)]
    addresses = [lease(server, mac) for mac in macs]
    assert addresses == [f"10.5.0.{n + 2}" for n in range(10)]
    assert [lease(server, mac) for mac in reversed(macs)] == addresses[::-1]


def test_the_server_address_is_not_leased():
    server = DhcpServer(ip_interface("10.5.0.2/29"))
    for n in range(6):
        server.answer(request("discover", bytes([2, 0, 0, 0, 0, n])))
    leased = sorted(str(address) for address in server.leases.values())
    assert leased == [f"10.5.0.{n}" for n in (1, 3, 4, 5, 6)]


def test_broadcast_flag(server):
    answer = server.answer(request("discover", flags=0x8000))
    assert (answer.mac, str(answer.destination)) == (BROADCAST, "255.255.255.255")


def test_renewal_is_answered_to_the_client_itself(server):
    lease(server, MAC)
    answer = server.answer(request("request", ciaddr="10.5.0.2"))
    bootp, options = read(answer)
    assert (options["message-type"], bootp.ciaddr, bootp.yiaddr) == (5, "10.5.0.2", "10.5.0.2")
    assert (answer.mac, str(answer.destination)) == (MAC, "10.5.0.2")


def test_an_address_of_an_earlier_life_is_given_again(server):
    _, options = read(server.answer(request("request", options=[("requested_addr", "10.5.0.77")])))
    assert options["message-type"] == 5
    assert server.leases == {MAC: IPv4Address("10.5.0.77")}


@pytest.mark.parametrize("wanted", ["10.6.0.2", SERVER, "10.5.0.0", "10.5.0.255", "0.0.0.0", "10.5.0.2"])
def test_an_address_that_cannot_be_had_is_refused(server, wanted):
    lease(server, b"\2" * 6)  # has 10.5.0.2
    answer = server.answer(request("request", options=[("requested_addr", wanted)]))
    bootp, options = read(answer)
    assert options == {"message-type": 6, "server_id": SERVER}
    assert bootp.yiaddr == "0.0.0.0"
    assert (answer.mac, str(answer.destination)) == (BROADCAST, "255.255.255.255")


def test_a_request_for_another_server_is_not_ours(server):
    options = [("server_id", "10.5.0.9"), ("requested_addr", "10.5.0.2")]
    assert server.answer(request("request", options=options)) is None


def test_release(server):
    lease(server, MAC)
    assert server.answer(request("release", ciaddr="10.5.0.3")) is None
    assert server.leases
    assert server.answer(request("release", ciaddr="10.5.0.2")) is None
    assert not server.leases


def test_a_declined_address_is_not_offered_again(server):
    lease(server, MAC)
    options = [("requested_addr", "10.5.0.2"), ("server_id", SERVER)]
    assert server.answer(request("decline", options=options)) is None
    assert lease(server, MAC) == "10.5.0.3"


def test_declining_everything_still_leaves_an_address():
    server = DhcpServer(ip_interface("10.5.0.1/30"))
    for _ in range(3):
        assert lease(server, MAC) == "10.5.0.2"
        server.answer(request("decline", options=[("requested_addr", "10.5.0.2")]))


def test_inform(server):
    answer = server.answer(request("inform", ciaddr="10.5.0.50"))
    bootp, options = read(answer)
    assert (options["message-type"], bootp.yiaddr) == (5, "0.0.0.0") and "lease_time" not in options
    assert str(answer.destination) == "10.5.0.50" and not server.leases


def test_a_flood_of_clients_is_bounded(server):
    for n in range(1000):
        server.answer(request("discover", bytes([2, 0, 0, 0]) + n.to_bytes(2, "big")))
        assert len(server.leases) <= LEASES_MAX
    assert len(set(server.leases.values())) == len(server.leases)


def test_the_lease_unheard_for_longest_gives_way():
    server = DhcpServer(ip_interface("10.5.0.1/29"))
    macs = [bytes([2, 0, 0, 0, 0, n]) for n in range(6)]
    first = [lease(server, mac) for mac in macs[:5]]
    lease(server, macs[0])
    assert lease(server, macs[5]) == first[1]
    assert macs[1] not in server.leases


def test_boot_file():
    server = DhcpServer(ip_interface(f"{SERVER}/24"), boot_file="http://10.5.0.1/x")
    bootp, _ = read(server.answer(request("discover")))
    assert (bootp.file.rstrip(b"\0"), bootp.siaddr) == (b"http://10.5.0.1/x", SERVER)
    with pytest.raises(ValueError, match="longer than 127 bytes"):
        DhcpServer(ip_interface(f"{SERVER}/24"), boot_file="x" * 128)


@pytest.mark.parametrize("message", [
    b"",
    request("discover")[:239],
    request("offer"),
    request(77),
    bytes(BOOTP(op=2, chaddr=MAC) / DHCP(options=[("message-type", 1), "end"])),
    bytes(BOOTP(op=1, htype=6, chaddr=MAC) / DHCP(options=[("message-type", 1), "end"])),
    bytes(BOOTP(op=1, hlen=16, chaddr=MAC) / DHCP(options=[("message-type", 1), "end"])),
    bytes(BOOTP(op=1, giaddr="10.5.0.9", chaddr=MAC) / DHCP(options=[("message-type", 1), "end"])),
    bytes(BOOTP(op=1, chaddr=MAC, options=b"\1\2\3\4") / DHCP(options=[("message-type", 1), "end"])),
    bytes(BOOTP(op=1, chaddr=MAC) / DHCP(options=["end"])),
    bytes(BOOTP(op=1, chaddr=MAC)) + b"\x63\x82\x53\x63\x35\x01",  # a value beyond the end
    bytes(BOOTP(op=1, chaddr=MAC)) + b"\x63\x82\x53\x63\x35",  # a length beyond the end
    bytes(BOOTP(op=1, chaddr=MAC)) + b"\x63\x82\x53\x63\x35\x02\x01\x01\xff",  # a type of two bytes
    bytes(BOOTP(op=1, chaddr=MAC)) + b"\x63\x82\x53\x63\xff\x35\x01\x01",  # a type behind the end
])
def test_messages_that_get_no_answer(server, message):
    assert server.answer(message) is None
    assert not server.leases


def test_padding_between_options(server):
    message = bytes(BOOTP(op=1, xid=0x1234, chaddr=MAC, options=b"c\x82Sc")) + b"\0\0\x35\x01\x01\0\xff"
    assert read(server.answer(message))[1]["message-type"] == 2


@given(st.binary(max_size=60), st.integers(0, 2**32 - 1), st.binary(min_size=16, max_size=16))
def test_no_options_of_a_client_raise(options, client, hardware):
    server = DhcpServer(ip_interface("10.5.0.1/29"))
    head = b"\1\1\6\0" + bytes(8) + client.to_bytes(4, "big") + bytes(12) + hardware + bytes(192)
    for kind in range(1, 9):
        server.answer(head + b"c\x82Sc" + bytes((53, 1, kind)) + options)
        assert len(server.leases) <= 5
    server.answer(options)
