"""The TAP port against the kernel, each test in a network namespace of its own.

The host's side is played with ordinary sockets, the guest's by reading and writing the port's descriptors
as the pump does.
"""

import contextlib
import errno
import os
import resource
import select
import socket
import struct
import subprocess
from pathlib import Path

import pytest
from pyroute2 import IPRoute
from scapy.layers.l2 import ARP, Ether

from vdev.net.features import GUEST_GSO, OFFLOADS, Feature, mask
from vdev.ports import PortError, default_port, link, open_port, tun
from vdev.ports.rarp import rarp_frame
from vdev.ports.spec import parse_port
from vdev.ports.tap import offload_flags
from vdev.testing.isolated import drop_rights, isolated

GUEST_MAC = bytes.fromhex("525400aabbcc")
GUEST_IP = "10.9.0.2"
UDP_PORT = 9999

NEEDS_CSUM = 1
GSO_NONE, GSO_TCPV4, GSO_UDP_L4 = 0, 1, 5

_ETH_P_ALL = 3
_ETH_P_RARP = 0x8035
_SOL_PACKET, _PACKET_VNET_HDR = 263, 15
_UDP_SEGMENT = 103


def tap(text, queue_pairs=1):
    return open_port(parse_port(text), queue_pairs)


def ip(*words):
    subprocess.run(["ip", *words], check=True, timeout=30)


def frames(fds, wanted, enough, seconds=5.0):
    """[(descriptor, header, frame)] read from ``fds`` for which wanted(frame), until there are ``enough``."""
    found = []
    for fd in fds:
        os.set_blocking(fd, False)
    while len(found) < enough:
        ready, _, _ = select.select(fds, [], [], seconds)
        if not ready:
            break
        for fd in ready:
            with contextlib.suppress(BlockingIOError):
                while True:
                    message = os.read(fd, 70000)
                    if wanted(message[12:]):
                        found.append((fd, message[:12], message[12:]))
    return found


def is_udp(frame):
    return frame[12:14] == b"\x08\x00" and frame[23] == 17 and frame[36:38] == struct.pack("!H", UDP_PORT)


def host_knows_guest(port):
    """The host need not ask for the guest's MAC: an address of the TAP's network leads there."""
    with IPRoute() as ipr:
        ipr.neigh("add", dst=GUEST_IP, lladdr=GUEST_MAC.hex(":"), ifindex=socket.if_nametoindex(port.name),
                  state="permanent")


def send_flows(count):
    """One datagram each of ``count`` flows from the host to the guest."""
    with contextlib.ExitStack() as stack:
        for n in range(count):
            s = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            s.bind(("10.9.0.1", 20000 + n))
            s.sendto(b"flow %d" % n, (GUEST_IP, UDP_PORT))


def flows_by_pair(port, count, pairs=4):
    """How many of ``count`` flows from the host come out of each pair; a silence of 0.3 s ends it."""
    fds = [port.ends(pair).from_port for pair in range(pairs)]
    send_flows(count)
    got = frames(fds, is_udp, count, 0.3)
    return [sum(fd == mine for fd, _, _ in got) for mine in fds]


# ---- made


@isolated
def test_made_with_addresses_up_and_gone_after_close():
    port = tap("tap:v0,ip=10.9.0.1/24,ip=fd00:9::1/64", 2)
    assert str(port) == "tap:v0" and port.notes == ()
    carries = port.carries
    assert (carries.header, carries.queue_pairs, carries.mtu) == (12, 2, 1500)
    assert carries.offloads & ~OFFLOADS == 0 and carries.offloads >> Feature.HOST_TSO4 & 1
    with IPRoute() as ipr:
        info = ipr.link("get", index=socket.if_nametoindex("v0"))[0]
        found = {a.get_attr("IFA_ADDRESS") for a in ipr.get_addr(index=info["index"])}
    assert {"10.9.0.1", "fd00:9::1"} <= found
    assert info["flags"] & 1
    name, flags = tun.interface(port.ends(0).to_port)
    assert name == "v0" and flags & tun.Flag.MULTI_QUEUE and not flags & tun.Flag.PERSIST
    assert not any(os.get_inheritable(port.ends(pair).to_port) for pair in (0, 1))
    assert not any(os.get_blocking(port.ends(pair).to_port) for pair in (0, 1))
    port.close()
    assert not link.exists("v0")


@isolated
def test_a_number_for_percent_d():
    first, second = tap("tap:"), tap("tap:")
    assert (first.name, second.name) == ("vdev0", "vdev1")


@isolated
def test_becomes_a_port_of_a_bridge():
    ip("link", "add", "br0", "type", "bridge")
    port = tap("tap:v0,bridge=br0")
    with IPRoute() as ipr:
        info = ipr.link("get", index=socket.if_nametoindex("v0"))[0]
    assert info.get_attr("IFLA_MASTER") == socket.if_nametoindex("br0")
    port.close()


@isolated
def test_mtu_is_read_from_the_interface():
    ip("tuntap", "add", "dev", "v0", "mode", "tap")
    ip("link", "set", "v0", "mtu", "9000")
    assert tap("tap:v0").carries.mtu == 9000


@isolated
def test_frames_go_both_ways():
    port = tap("tap:v0,ip=10.9.0.1/24")
    host_knows_guest(port)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as host:
        host.bind(("10.9.0.1", UDP_PORT))
        host.settimeout(5)
        host.sendto(b"to the guest", (GUEST_IP, UDP_PORT))
        (_, header, frame), = frames([port.ends(0).from_port], is_udp, 1)
        assert frame.endswith(b"to the guest") and header[0] & NEEDS_CSUM == 0
        back = frame[6:12] + frame[:6] + frame[12:26] + frame[30:34] + frame[26:30] + frame[34:]
        os.write(port.ends(0).to_port, bytes(12) + back)
        assert host.recv(100) == b"to the guest"


# ---- offloads


@pytest.mark.parametrize("features, flags", [
    ((), 0),
    ((Feature.GUEST_TSO4,), 0),
    ((Feature.CSUM, Feature.HOST_TSO4), 0),
    ((Feature.GUEST_CSUM,), tun.Offload.CSUM),
    ((Feature.GUEST_CSUM, Feature.GUEST_ECN), tun.Offload.CSUM),
    ((Feature.GUEST_CSUM, Feature.GUEST_TSO4), tun.Offload.CSUM | tun.Offload.TSO4),
    ((Feature.GUEST_CSUM, Feature.GUEST_TSO6, Feature.GUEST_ECN),
     tun.Offload.CSUM | tun.Offload.TSO6 | tun.Offload.TSO_ECN),
    ((Feature.GUEST_CSUM, Feature.GUEST_UFO), tun.Offload.CSUM | tun.Offload.UFO),
    ((Feature.GUEST_CSUM, Feature.GUEST_USO4), tun.Offload.CSUM),
    ((Feature.GUEST_CSUM, Feature.GUEST_USO4, Feature.GUEST_USO6),
     tun.Offload.CSUM | tun.Offload.USO4 | tun.Offload.USO6),
])
def test_offload_flags_say_only_what_was_negotiated(features, flags):
    assert offload_flags(mask(*features)) == flags


@isolated
def test_the_kernel_takes_every_combination_of_offloads():
    port = tap("tap:v0")
    bits = [bit for bit in Feature if GUEST_GSO >> bit & 1]
    for choice in range(1 << len(bits)):
        chosen = mask(*(bit for n, bit in enumerate(bits) if choice >> n & 1))
        port.set_offloads(chosen)
        port.set_offloads(chosen | mask(Feature.GUEST_CSUM))


@isolated
def test_N22_a_partial_checksum_comes_only_after_it_was_negotiated():
    port = tap("tap:v0,ip=10.9.0.1/24")
    host_knows_guest(port)

    def header_flags():
        send_flows(1)
        return [header[0] & NEEDS_CSUM for _, header, _ in frames([port.ends(0).from_port], is_udp, 1)]

    assert header_flags() == [0]
    port.set_offloads(mask(Feature.GUEST_CSUM))
    assert header_flags() == [NEEDS_CSUM]
    port.set_offloads(0)
    assert header_flags() == [0]


@isolated
def test_N22_segments_come_whole_only_after_tso_was_negotiated():
    port = tap("tap:v0")
    tcp = (GUEST_MAC + bytes.fromhex("525400000001") + b"\x08\x00"
           + struct.pack("!BBHHHBBH4s4s", 0x45, 0, 40 + 4000, 1, 0x4000, 64, 6, 0, bytes([10, 9, 0, 1]),
                         bytes([10, 9, 0, 2]))
           + struct.pack("!HHIIBBHHH", 1, UDP_PORT, 0, 0, 0x50, 0x10, 1000, 0, 0) + bytes(4000))
    header = struct.pack("<BBHHHH", NEEDS_CSUM, GSO_TCPV4, 54, 1000, 34, 16)

    def kinds():
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as host:
            host.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
            host.bind((port.name, 0))
            host.send(header + tcp)
        got = frames([port.ends(0).from_port], lambda f: f[12:14] == b"\x08\x00" and f[23] == 6, 4, 0.3)
        return [(h[1], len(f) - 54) for _, h, f in got]

    assert kinds() == [(GSO_NONE, 1000)] * 4
    port.set_offloads(mask(Feature.GUEST_CSUM, Feature.GUEST_TSO6))
    assert kinds() == [(GSO_NONE, 1000)] * 4
    port.set_offloads(mask(Feature.GUEST_CSUM, Feature.GUEST_TSO4))
    assert kinds() == [(GSO_TCPV4, 4000)]
    port.set_offloads(0)
    assert kinds() == [(GSO_NONE, 1000)] * 4


@isolated
def test_uso_is_carried_where_the_kernel_has_it():
    port = tap("tap:v0,ip=10.9.0.1/24")
    if not port.carries.offloads >> Feature.HOST_USO & 1:
        pytest.skip("the kernel has no USO on a TAP (Linux 6.2)")
    host_knows_guest(port)

    def kinds():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as host:
            host.setsockopt(socket.IPPROTO_UDP, _UDP_SEGMENT, 1000)
            host.sendto(bytes(3000), (GUEST_IP, UDP_PORT))
        return [h[1] for _, h, _ in frames([port.ends(0).from_port], is_udp, 3, 0.3)]

    assert kinds() == [GSO_NONE] * 3
    port.set_offloads(mask(Feature.GUEST_CSUM, Feature.GUEST_USO4, Feature.GUEST_USO6))
    assert kinds() == [GSO_UDP_L4]


# ---- queues


@isolated
def test_flows_go_to_attached_queues_only():
    port = tap("tap:v0,ip=10.9.0.1/24", 4)
    host_knows_guest(port)
    assert port.carries.queue_pairs == 4
    assert flows_by_pair(port, 100) == [100, 0, 0, 0]
    for pair in 1, 2, 3:
        port.enable(pair, True)
    spread = flows_by_pair(port, 100)
    assert sum(spread) == 100 and all(spread), spread
    port.enable(2, False)
    port.enable(2, False)
    port.enable(3, False)
    spread = flows_by_pair(port, 100)
    assert sum(spread) == 100 and spread[2:] == [0, 0] and all(spread[:2]), spread


@isolated
def test_a_detached_pair_zero_forgets_what_waited():
    port = tap("tap:v0,ip=10.9.0.1/24")
    host_knows_guest(port)
    send_flows(3)
    port.enable(0, False)
    port.enable(0, True)
    assert frames([port.ends(0).from_port], is_udp, 1, 0.2) == []
    send_flows(1)
    assert len(frames([port.ends(0).from_port], is_udp, 1)) == 1


# ---- joined


@isolated
def test_joined_without_multi_queue():
    ip("tuntap", "add", "dev", "v0", "mode", "tap")
    port = tap("tap:v0,ip=10.9.0.1/24", 4)
    assert port.carries.queue_pairs == 1 and port.carries.header == 12
    assert "v0 has a single queue: one queue pair is served" in port.notes[0]
    host_knows_guest(port)
    port.enable(0, False)
    port.enable(0, True)
    assert flows_by_pair(port, 20, pairs=1) == [20]


@isolated
def test_a_joined_tap_stays_and_loses_only_what_it_was_given():
    ip("link", "add", "br0", "type", "bridge")
    ip("tuntap", "add", "dev", "v0", "mode", "tap", "multi_queue")
    ip("address", "add", "10.9.0.1/24", "dev", "v0")
    tap("tap:v0,ip=10.9.0.1/24,ip=10.9.1.1/24,bridge=br0", 2).close()
    with IPRoute() as ipr:
        info = ipr.link("get", index=socket.if_nametoindex("v0"))[0]
        addresses = ipr.get_addr(index=info["index"], family=socket.AF_INET)
    assert [address.get_attr("IFA_ADDRESS") for address in addresses] == ["10.9.0.1"]
    assert info.get_attr("IFLA_MASTER") is None


@isolated
def test_a_persistent_tap_is_joined_without_any_right():
    ip("tuntap", "add", "dev", "v0", "mode", "tap", "multi_queue", "user", "0")
    drop_rights()
    port = tap("tap:v0", 2)
    assert port.carries.queue_pairs == 2 and port.carries.header == 12
    assert port.notes == ("v0 is down and may not be set up by this user; frames are dropped until"
                          " `sudo ip link set v0 up`",)
    port.set_offloads(mask(Feature.GUEST_CSUM, Feature.GUEST_TSO4))
    port.enable(1, True)


@isolated
def test_N25_a_tap_somebody_reads_already():
    for kind in [], ["multi_queue"]:
        name = f"v{len(kind)}"
        ip("tuntap", "add", "dev", name, "mode", "tap", *kind)
        port = tap(f"tap:{name}", 2)
        with pytest.raises(PortError, match=f"^tap:{name}: {name} is in use by another program; stop"):
            tap(f"tap:{name}")
        port.close()
        tap(f"tap:{name}").close()


# ---- inherited


def _inherited(flags):
    fd = os.open(tun.DEVICE, os.O_RDWR)
    tun.attach(fd, "v0", flags)
    return fd


@isolated
def test_inherited():
    fd = _inherited(tun.Flag.TAP | tun.Flag.NO_PI | tun.Flag.VNET_HDR)
    port = tap(f"tap:fd={fd}", 4)
    assert (port.carries.header, port.carries.queue_pairs, port.carries.mtu) == (12, 1, 1500)
    assert port.ends(0).to_port == fd and str(port) == "tap:v0"
    assert not os.get_blocking(fd) and not os.get_inheritable(fd)
    ip("link", "del", "v0")
    assert not port.lost()
    port.close()
    with pytest.raises(OSError):
        os.fstat(fd)


@isolated
def test_inherited_without_a_net_header():
    fd = _inherited(tun.Flag.TAP | tun.Flag.NO_PI)
    port = tap(f"tap:fd={fd}")
    assert (port.carries.header, port.carries.offloads) == (0, 0)
    port.set_offloads(OFFLOADS)
    link.bring_up("v0")
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_RARP)) as host:
        host.settimeout(5)
        port.announce(GUEST_MAC)
        assert host.recv(2000) == rarp_frame(GUEST_MAC)


@isolated
def test_inherited_and_detached_is_attached():
    fd = _inherited(tun.Flag.TAP | tun.Flag.NO_PI | tun.Flag.VNET_HDR | tun.Flag.MULTI_QUEUE)
    tun.set_queue(fd, False)
    tap(f"tap:fd={fd}")
    assert not tun.interface(fd)[1] & tun.Flag.DETACH_QUEUE


@isolated
def test_descriptors_that_are_no_tap():
    unattached = os.open(tun.DEVICE, os.O_RDWR)
    tun_fd = os.open(tun.DEVICE, os.O_RDWR)
    tun.attach(tun_fd, "t0", tun.Flag.TUN | tun.Flag.NO_PI)
    for fd, why in [(999, "is not open in this process"), (0, "is no TAP"), (tun_fd, "is a TUN"),
                    (unattached, "is not attached to an interface")]:
        with pytest.raises(PortError, match=f"descriptor {fd} {why}.*open /dev/net/tun, TUNSETIFF"):
            tap(f"tap:fd={fd}")


# ---- deleted


@isolated
def test_N18_a_deleted_tap_comes_back_as_it_was():
    port = tap("tap:v0,ip=10.9.0.1/24", 3)
    port.enable(2, True)
    port.set_offloads(mask(Feature.GUEST_CSUM))
    fds = [port.ends(pair).to_port for pair in range(3)]
    ip("link", "del", "v0")
    for call in (lambda: os.read(fds[0], 100), lambda: os.write(fds[2], bytes(100))):
        with pytest.raises(OSError) as e:
            call()
        assert e.value.errno == errno.EBADFD
    port.enable(2, False)  # the guest goes on meanwhile
    port.enable(1, True)
    port.set_offloads(mask(Feature.GUEST_CSUM, Feature.GUEST_TSO4))
    port.announce(GUEST_MAC)

    assert port.lost()
    assert [port.ends(pair).to_port for pair in range(3)] == fds
    host_knows_guest(port)
    spread = flows_by_pair(port, 100, pairs=3)
    assert sum(spread) == 100 and spread[2] == 0 and spread[0] and spread[1]
    send_flows(1)
    (_, header, _), = frames(fds, is_udp, 1)
    assert header[0] & NEEDS_CSUM
    assert port.lost()  # asking again changes nothing
    port.close()
    assert not link.exists("v0")


@isolated
def test_a_tap_that_was_moved_away_meanwhile_is_not_claimed_back():
    port = tap("tap:v0", 2)
    ip("link", "del", "v0")
    ip("tuntap", "add", "dev", "v0", "mode", "tun")
    assert not port.lost()
    ip("link", "del", "v0")
    assert port.lost()


@isolated
def test_a_tap_whose_bridge_is_gone_waits_for_it():
    ip("link", "add", "br0", "type", "bridge")
    port = tap("tap:v0,bridge=br0")
    ip("link", "del", "br0")
    ip("link", "del", "v0")
    assert not port.lost() and not port.lost()
    ip("link", "add", "br0", "type", "bridge")
    assert port.lost()
    with IPRoute() as ipr:
        info = ipr.link("get", index=socket.if_nametoindex("v0"))[0]
    assert info.get_attr("IFLA_MASTER") == socket.if_nametoindex("br0") and info["flags"] & 1


# ---- announcing


@isolated
def test_P101_announces_the_guest_to_the_network():
    port = tap("tap:v0", 2)
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_RARP)) as host:
        host.settimeout(5)
        for _ in range(100):
            port.announce(GUEST_MAC)
        seen = [host.recv(2000) for _ in range(100)]
    assert set(seen) == {rarp_frame(GUEST_MAC)}
    assert len(seen[0]) == 60
    frame = Ether(seen[0])
    assert (frame.dst, frame.src, frame.type) == ("ff:ff:ff:ff:ff:ff", GUEST_MAC.hex(":"), _ETH_P_RARP)
    request = ARP(bytes(frame.payload))
    assert (request.op, request.hwsrc, request.hwdst) == (3, GUEST_MAC.hex(":"), GUEST_MAC.hex(":"))
    assert (request.psrc, request.pdst) == ("0.0.0.0", "0.0.0.0")


@pytest.mark.parametrize("mac", [bytes(6), b"\xff" * 6, bytes.fromhex("01005e000001"), b"", b"\x02" * 7])
def test_P101_no_frame_for_what_is_no_station(mac):
    assert rarp_frame(mac) is None


@isolated
def test_announcing_on_an_interface_that_is_down_is_no_error():
    port = tap("tap:v0")
    ip("link", "set", "v0", "down")
    port.announce(GUEST_MAC)
    port.announce(bytes(6))


# ---- errors: one line with the cause and the fix


def refused(text, queue_pairs=1):
    with pytest.raises(PortError) as e:
        tap(text, queue_pairs)
    line = str(e.value)
    assert "\n" not in line
    return line


def test_no_tun_device(monkeypatch, tmp_path):
    monkeypatch.setattr(tun, "DEVICE", str(tmp_path / "tun"))
    line = refused("tap:v0")
    assert line.startswith(f"tap:v0: {tmp_path}/tun does not exist; `sudo modprobe tun`")
    assert "--port responder" in line


@isolated
def test_running_out_of_descriptors():
    resource.setrlimit(resource.RLIMIT_NOFILE, (50, 50))
    line = refused("tap:v0", 200)
    assert line.startswith("tap:v0: too many open files; it needs a few file descriptors")
    assert not link.exists("v0")


@isolated
def test_no_right_to_make_a_tap():
    drop_rights()
    line = refused("tap:v0")
    assert line.startswith("tap:v0: making a TAP needs CAP_NET_ADMIN; ")
    for way in ("`sudo ip tuntap add dev v0 mode tap user $USER multi_queue vnet_hdr`", "run vdev as root",
                "--port responder"):
        assert way in line


@isolated
def test_a_tap_of_another_user():
    if Path("/proc/self/uid_map").read_text().split()[2] == "1":
        pytest.skip("needs root outside a user namespace, to make a TAP that belongs to another user")
    ip("tuntap", "add", "dev", "v0", "mode", "tap", "user", "12345", "multi_queue")
    drop_rights()
    assert refused("tap:v0").startswith("tap:v0: this user may not use v0; make it again with `sudo ip")


@isolated
def test_interfaces_that_are_no_tap():
    ip("tuntap", "add", "dev", "t0", "mode", "tun")
    for name in "lo", "t0":
        assert refused(f"tap:{name}") == (f"tap:{name}: {name} exists but is no TAP; choose another name"
                                          " (`ip tuntap` lists the TAPs)")


@isolated
def test_bridges_that_cannot_be_had():
    ip("link", "add", "br0", "type", "bridge")
    ip("link", "add", "br1", "type", "bridge")
    ip("tuntap", "add", "dev", "v1", "mode", "tap")
    ip("link", "set", "v1", "master", "br1")
    assert "there is no bridge br7; make it with `ip link add br7 type bridge" in refused("tap:v0,bridge=br7")
    assert "lo exists but is no bridge" in refused("tap:v0,bridge=lo")
    line = refused("tap:v1,bridge=br0")
    assert "v1 already belongs to br1; take it out with `ip link set v1 nomaster`" in line
    assert not link.exists("v0")


@isolated
def test_an_address_the_kernel_refuses_takes_everything_back():
    ip("tuntap", "add", "dev", "v0", "mode", "tap")
    line = refused("tap:v0,ip=10.9.0.1/24,ip=ff02::1/64")
    assert "v0 cannot have address ff02::1/64: " in line
    with IPRoute() as ipr:
        assert list(ipr.get_addr(index=socket.if_nametoindex("v0"), family=socket.AF_INET)) == []


@isolated
def test_an_address_on_a_bridge_port_is_pointed_out():
    ip("link", "add", "br0", "type", "bridge")
    assert "give br0 the address instead" in tap("tap:v0,ip=10.9.0.1/24,bridge=br0").notes[0]


# ---- the default


@isolated
def test_the_default_is_a_new_tap_where_it_may_be_made():
    port = default_port(2)
    assert str(port) == "tap:vdev0" and port.carries.queue_pairs == 2
    assert port.notes[0].startswith("no --port given: made tap:vdev0")


@isolated
def test_the_default_is_the_responder_elsewhere():
    drop_rights()
    port = open_port(None, 1)
    assert str(port) == "responder:10.0.76.1/24"
    assert port.notes[0].startswith("no --port given and no TAP to be had (tap:vdev%d: making a TAP needs"
                                    " CAP_NET_ADMIN") and "using responder:10.0.76.1/24" in port.notes[0]
