"""A guest of user-mode Linux, whose network device is wholly vdev's: configuration space and control queue.

What its ethtool sets is seen where it has its effect: in which frames come to the guest, and to which of its queues.
"""

import re
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from vdev.testing.daemon import Daemon
from vdev.testing.guest import Image
from vdev.testing.measure import tcp
from vdev.testing.netns import Namespace
from vdev.testing.uml import UmlGuest
from vdev.testing.waiting import wait_until

MAC = "52:54:00:ab:cd:ef"
HOST, GUEST = "10.13.0.1", "10.13.0.2"
TAP = "vdev-uml"
PAIRS = 4
# Sends 50 frames for an address, with a VLAN tag.
TAGGED = """
import socket, sys
interface, mac, vlan = sys.argv[1], bytes.fromhex(sys.argv[2]), int(sys.argv[3])
with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
    raw.bind((interface, 0))
    for _ in range(50):
        raw.send(mac + b"\\2\\0\\0\\0\\0\\x99" + b"\\x81\\0" + vlan.to_bytes(2, "big") + b"\\x88\\xb5" + bytes(60))
"""


@dataclass
class Bench:
    """A guest, the daemon it hangs on, and the namespace with the other end of its TAP."""

    lan: Namespace
    daemon: Daemon
    guest: UmlGuest

    def came(self) -> list[int]:
        """Frames that came to the guest, by queue."""
        counters = self.guest.check("ethtool -S eth0")
        return [int(frames) for frames in re.findall(r"rx_queue_\d+_packets: (\d+)", counters)]


@pytest.fixture(scope="module")
def bench(uml_image: Image, tap_possible: None) -> Iterator[Bench]:
    with tempfile.TemporaryDirectory(prefix="vdev-") as folder, Namespace() as lan:
        path = f"{folder}/socket"
        options = ["--socket-path", path, "--personality", "full", "--mac", MAC, "--speed", "25000",
                   "--queue-pairs", str(PAIRS), "--port", f"tap:{TAP},ip={HOST}/24"]
        with Daemon(options, namespace=lan) as daemon, UmlGuest(uml_image, path) as guest:
            guest.set_address(f"{GUEST}/24")
            yield Bench(lan, daemon, guest)


def ping(bench: Bench, count: int = 10) -> None:
    assert " 0% packet loss" in bench.guest.check(f"ping -c {count} -i 0.05 {HOST}")


def test_the_address_is_the_one_in_the_configuration_space(bench: Bench) -> None:
    assert f"link/ether {MAC}" in bench.guest.check("ip link show eth0")


def test_the_driver_has_a_control_queue_with_all_that_it_knows(bench: Bench) -> None:
    (driver,) = bench.daemon.events("driver")
    assert {"MAC", "STATUS", "SPEED_DUPLEX", "MTU", "CTRL_VQ", "CTRL_RX", "CTRL_VLAN", "CTRL_MAC_ADDR",
            "CTRL_GUEST_OFFLOADS", "GUEST_ANNOUNCE", "MQ", "RSS", "HASH_REPORT", "NOTF_COAL"} <= set(driver["features"])
    assert not bench.daemon.events("command-refused")


def test_guest_and_network_reach_each_other(bench: Bench) -> None:
    ping(bench)


def test_speed_and_duplex_are_shown_and_changed(bench: Bench) -> None:
    assert re.search(r"Speed: 25000Mb/s\s+Duplex: Full", bench.guest.check("ethtool eth0"))
    bench.guest.check("ethtool -s eth0 speed 1000 duplex half")
    assert re.search(r"Speed: 1000Mb/s\s+Duplex: Half", bench.guest.check("ethtool eth0"))


def test_the_operator_takes_the_link_down_and_up(bench: Bench) -> None:
    def link_is(up: bool) -> bool:
        return f"Link detected: {'yes' if up else 'no'}" in bench.guest.check("ethtool eth0")

    assert link_is(True)
    bench.daemon.child.signal(signal.SIGUSR1)
    wait_until(lambda: link_is(False), "the guest sees that its link is down")
    # Not even a guest that does not care gets a frame through.
    assert bench.guest.run(f"ping -c 1 -W 1 {HOST}").status != 0
    bench.daemon.child.signal(signal.SIGUSR2)
    wait_until(lambda: link_is(True), "the guest sees that its link is up")
    ping(bench)


def test_as_many_channels_get_frames_as_there_are(bench: Bench) -> None:
    for channels in (PAIRS, 2, 1):
        bench.guest.check(f"ethtool -L eth0 combined {channels}")
        before = bench.came()
        tcp(bench.guest, bench.lan, GUEST, to_guest=True, seconds=1, streams=16)
        more = [after - first for first, after in zip(before, bench.came(), strict=True)]
        assert sum(map(bool, more[:channels])) >= min(channels, 2) and not any(more[channels:]), more
    assert "Combined:\t1" in bench.guest.check("ethtool -l eth0").split("Current hardware settings")[1]
    bench.guest.check(f"ethtool -L eth0 combined {PAIRS}")


def test_the_indirection_table_says_which_queue_it_is(bench: Bench) -> None:
    bench.guest.check("ethtool -N eth0 rx-flow-hash udp4 sdfn")
    for queue in range(PAIRS):
        weights = " ".join("1" if queue == other else "0" for other in range(PAIRS))
        bench.guest.check(f"ethtool -X eth0 weight {weights}")
        shown = bench.guest.check("ethtool -x eth0")
        assert set(re.findall(r"^ +\d+:((?: +\d+)+)$", shown, re.M)) == {f"{queue:7}" + 7 * f"{queue:6}"}, shown
        before = bench.came()
        ping(bench)
        more = [after - first for first, after in zip(before, bench.came(), strict=True)]
        assert more[queue] >= 10, (queue, more)


def test_the_key_is_shown_as_it_was_set_and_moves_flows(bench: Bench) -> None:
    bench.guest.check(f"ethtool -X eth0 equal {PAIRS}")

    def of_key(key: str) -> int:
        bench.guest.check(f"ethtool -X eth0 hkey {key}")
        assert key in bench.guest.check("ethtool -x eth0")
        before = bench.came()
        ping(bench)
        more = [after - first for first, after in zip(before, bench.came(), strict=True)]
        return more.index(max(more))

    keys = [":".join(f"{(byte * factor + factor) & 255:02x}" for byte in range(40)) for factor in range(1, 12)]
    assert len({of_key(key) for key in keys}) > 1


def test_the_fields_that_are_hashed_are_shown_as_they_were_set(bench: Bench) -> None:
    bench.guest.check("ethtool -N eth0 rx-flow-hash tcp4 sd")
    assert "src port" not in bench.guest.check("ethtool -n eth0 rx-flow-hash tcp4")
    bench.guest.check("ethtool -K eth0 rxhash on")
    before = bench.came()
    # Of addresses alone all streams have the same hash.
    tcp(bench.guest, bench.lan, GUEST, to_guest=True, seconds=1, streams=8)
    more = [after - first for first, after in zip(before, bench.came(), strict=True)]
    assert sum(frames > 100 for frames in more) == 1, more
    bench.guest.check("ethtool -N eth0 rx-flow-hash tcp4 sdfn")
    assert "src port" in bench.guest.check("ethtool -n eth0 rx-flow-hash tcp4")
    before = bench.came()
    tcp(bench.guest, bench.lan, GUEST, to_guest=True, seconds=1, streams=8)
    more = [after - first for first, after in zip(before, bench.came(), strict=True)]
    assert sum(frames > 100 for frames in more) > 1, more


def test_offloads_that_are_switched_off_are_not_used(bench: Bench) -> None:
    def longest() -> float:
        """Bytes of the frames that came, on average."""
        counters = "cat /sys/class/net/eth0/statistics/rx_bytes /sys/class/net/eth0/statistics/rx_packets"
        before = list(map(int, bench.guest.check(counters).split()))
        tcp(bench.guest, bench.lan, GUEST, to_guest=True, seconds=1)
        octets, frames = (b - a for a, b in zip(before, map(int, bench.guest.check(counters).split()), strict=True))
        return octets / frames

    bench.guest.check("ethtool -K eth0 rx-gro-hw on")
    assert longest() > 1514
    bench.guest.check("ethtool -K eth0 rx-gro-hw off")
    assert longest() <= 1514
    bench.guest.check("ethtool -K eth0 rx-gro-hw on")


def received(bench: Bench) -> int:
    return sum(bench.came())


def test_frames_for_other_addresses_do_not_come_unless_asked_for(bench: Bench) -> None:
    bench.lan.run(["ip", "neigh", "replace", "10.13.0.9", "lladdr", "02:00:00:00:00:99", "dev", TAP])
    for promiscuous, frames in (("off", 0), ("on", 20), ("off", 0)):
        bench.guest.check(f"ip link set eth0 promisc {promiscuous}")
        before = received(bench)
        bench.lan.run(["ping", "-c", "20", "-i", "0.01", "-W", "0.1", "10.13.0.9"], check=False)
        assert received(bench) - before - frames < 10, (promiscuous, received(bench) - before)
        assert received(bench) - before >= frames


def test_address_that_the_guest_changes_is_the_devices(bench: Bench) -> None:
    other = "52:54:00:ab:cd:00"
    for address in (other, MAC):
        bench.guest.check(f"ip link set eth0 address {address}")
        assert f"link/ether {address}" in bench.guest.check("ip link show eth0")
        ping(bench)


def test_vlans_that_the_guest_does_not_have_do_not_come(bench: Bench) -> None:
    bench.guest.check("ip link add link eth0 name eth0.5 type vlan id 5; ip link set eth0.5 up")
    counter = "cat /sys/class/net/eth0.5/statistics/rx_packets"
    of_vlan = int(bench.guest.check(counter))
    for vlan, wanted in ((5, True), (6, False), (0, True)):
        before = received(bench)
        bench.lan.run([sys.executable, "-c", TAGGED, TAP, MAC.replace(":", ""), str(vlan)])
        assert (received(bench) - before >= 50) == wanted, vlan
    assert int(bench.guest.check(counter)) - of_vlan == 50
    bench.guest.check("ip link del eth0.5")


def test_coalescing_is_shown_as_it_was_set(bench: Bench) -> None:
    # The driver changes its own handling of transmitqs where tx-frames is 0, and refuses that while it is up.
    bench.guest.check("ethtool -C eth0 rx-usecs 50000 rx-frames 64 tx-frames 1")
    assert re.search(r"rx-usecs:\s+50000\s+rx-frames:\s+64", bench.guest.check("ethtool -c eth0"))
    report = bench.guest.check(f"ping -c 5 -i 0.2 {HOST}")
    (average,) = re.findall(r"= [\d.]+/([\d.]+)/", report)
    assert float(average) >= 30, report  # the answer alone does not call the driver
    bench.guest.check("ethtool -C eth0 rx-usecs 0 rx-frames 0 tx-frames 1")
    ping(bench)
    assert not bench.daemon.events("command-refused")
