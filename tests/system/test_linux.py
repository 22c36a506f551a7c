"""A Linux guest in real QEMU talks through vdev and a TAP to its host.

One guest with two processors and two queue pairs serves the tests that leave it as they found it; those
that reboot, kill or outnumber it have their own (test_linux_life.py).
"""

import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from vdev.qemu import qemu_args
from vdev.testing.daemon import Daemon
from vdev.testing.guest import Image, LinuxGuest
from vdev.testing.measure import link_counters, ping_from_guest, ping_from_host, tcp
from vdev.testing.netns import Namespace
from vdev.testing.qemu import QemuProgram

HOST, GUEST = "10.11.0.1", "10.11.0.2"
HOST6, GUEST6 = "fd11::1", "fd11::2"
TAP = "vdev-linux"
ETHERNET_FRAME_MAX = 1514  # without TSO no frame is longer


@dataclass
class Bench:
    """A guest, the daemon it hangs on, and the namespace with the other end."""

    lan: Namespace
    daemon: Daemon
    guest: LinuxGuest


@pytest.fixture(scope="module")
def bench(qemu: QemuProgram, image: Image, tap_possible: None) -> Iterator[Bench]:
    with tempfile.TemporaryDirectory(prefix="vdev-") as folder, Namespace() as lan:
        socket = f"{folder}/socket"
        arguments = ["--socket-path", socket, "--queue-pairs", "2",
                     "--port", f"tap:{TAP},ip={HOST}/24,ip={HOST6}/64"]
        network = qemu_args(socket, memory="256M", queue_pairs=2, qemu=qemu.binary)
        with Daemon(arguments, namespace=lan) as daemon, LinuxGuest(qemu, image, network, cpus=2) as guest:
            guest.set_address(f"{GUEST}/24", f"{GUEST6}/64")
            yield Bench(lan, daemon, guest)


def test_guest_negotiates_what_the_tap_carries(bench: Bench) -> None:
    (driver,) = bench.daemon.events("driver")[-1:]
    assert {"CSUM", "GUEST_CSUM", "HOST_TSO4", "HOST_TSO6", "GUEST_TSO4", "GUEST_TSO6", "MRG_RXBUF", "MQ",
            "INDIRECT_DESC", "EVENT_IDX", "VERSION_1"} <= set(driver["features"])


@pytest.mark.parametrize("address", [HOST, pytest.param(HOST6, marks=pytest.mark.newest_qemu)])
def test_1000_pings_from_the_guest_without_a_loss(bench: Bench, address: str) -> None:
    report = ping_from_guest(bench.guest, address, 1000, interval=0.002)
    assert (report.sent, report.received) == (1000, 1000)


@pytest.mark.parametrize("address", [GUEST, pytest.param(GUEST6, marks=pytest.mark.newest_qemu)])
def test_1000_pings_from_the_host_without_a_loss(bench: Bench, address: str) -> None:
    report = ping_from_host(bench.lan, address, 1000, interval=0.002)
    assert (report.sent, report.received) == (1000, 1000)


@pytest.mark.parametrize("size", [1, 1472, 1473, 8000, 60000])
def test_pings_of_every_length_come_back(bench: Bench, size: int) -> None:
    # The longest are fragmented, and longer than any one receive buffer of the guest. Two of them are all that the
    # socket of whoever pings holds: where they come close together, after a guest was held up, the third is lost there.
    interval = 0.01 if size < 10_000 else 0.1
    assert ping_from_host(bench.lan, GUEST, 10, interval, size).lost == 0
    assert ping_from_guest(bench.guest, HOST, 10, interval, size).lost == 0


def test_tcp_from_the_guest_uses_segmentation_offload(bench: Bench) -> None:
    before = link_counters(bench.lan, TAP)
    report = tcp(bench.guest, bench.lan, GUEST, to_guest=False)
    after = link_counters(bench.lan, TAP)
    sent = after.from_guest_bytes - before.from_guest_bytes
    frames = after.from_guest_frames - before.from_guest_frames
    assert sent >= report.bytes > 0
    assert sent / frames > ETHERNET_FRAME_MAX


def test_tcp_to_the_guest_uses_segmentation_offload(bench: Bench) -> None:
    before = link_counters(bench.lan, TAP)
    report = tcp(bench.guest, bench.lan, GUEST, to_guest=True)
    after = link_counters(bench.lan, TAP)
    sent = after.to_guest_bytes - before.to_guest_bytes
    frames = after.to_guest_frames - before.to_guest_frames
    assert sent >= report.bytes > 0
    assert sent / frames > ETHERNET_FRAME_MAX


def _queue_frames(guest: LinuxGuest) -> dict[str, int]:
    """Frames by queue and direction as the guest's driver counted them, e.g. ``rx1``."""
    counters = guest.check("ethtool -S eth0")
    return {f"{way}{queue}": int(count)
            for way, queue, count in re.findall(r"(rx|tx)_queue_(\d+)_packets: (\d+)", counters)}


def test_two_queue_pairs_carry_traffic_both_ways(bench: Bench) -> None:
    assert "Combined:\t2" in bench.guest.check("ethtool -l eth0").split("Current hardware settings")[1]
    before = _queue_frames(bench.guest)
    # Each processor of the guest sends through a queue of its own, and gets the answers there.
    for processor in (1, 2):
        bench.guest.check(f"taskset {processor} ping -c 20 -i 0.01 -q {HOST}")
    tcp(bench.guest, bench.lan, GUEST, to_guest=True, streams=8)
    after = _queue_frames(bench.guest)
    assert all(after[queue] > before[queue] for queue in ("rx0", "rx1", "tx0", "tx1")), (before, after)


def test_one_of_two_pairs_switched_off_and_on_loses_nothing(bench: Bench) -> None:
    for pairs in (1, 2, 1, 2):
        bench.guest.check(f"ethtool -L eth0 combined {pairs}")
        assert ping_from_host(bench.lan, GUEST, 50).lost == 0
        assert ping_from_guest(bench.guest, HOST, 50).lost == 0


@pytest.mark.parametrize("queue", [0, 1])
def test_the_monitors_queue_inspection_does_not_stop_traffic(bench: Bench, queue: int) -> None:
    """QEMU reads a ring's state with GET_VRING_BASE, which is meant to stop it, and does not start it again.

    It does so for the first pair only; others it answers from what it remembers itself.
    """
    device = "/machine/peripheral-anon/device[0]/virtio-backend"
    before = len(bench.daemon.events("ring-resumed"))
    said = bench.guest.qemu.monitor(f"info virtio-queue-status {device} {queue}")
    assert "last_avail_idx" in said, said
    # The guest first: it is a kick that tells the daemon that the ring was not meant to stop.
    assert ping_from_guest(bench.guest, HOST, 20).lost == 0
    assert ping_from_host(bench.lan, GUEST, 20).lost == 0
    assert [event["ring"] for event in bench.daemon.events("ring-resumed")[before:]] == [queue]


def test_a_paused_guest_goes_on(bench: Bench) -> None:
    bench.guest.qemu.pause()
    bench.guest.qemu.resume()
    assert ping_from_host(bench.lan, GUEST, 20).lost == 0


def test_nothing_was_dropped_and_both_ways_saw_long_frames(bench: Bench) -> None:
    """The daemon's own account of the session, once the guest is gone. Last: it ends the guest."""
    for to_guest in (False, True):
        tcp(bench.guest, bench.lan, GUEST, to_guest=to_guest, seconds=1)
    bench.guest.stop()
    bench.daemon.stop()
    (end,) = bench.daemon.events("session-end")
    for way in ("from_guest", "to_guest"):
        assert end[way]["frames"] > end[way]["gso_frames"] > 0
        assert end[way]["calls"] > 0 and end[way]["kicks"] > 0
        # A guest that gives up a queue may have frames in it; the protocol has those consumed and dropped.
        assert set(end[way]["dropped"]) <= {"disabled"}
