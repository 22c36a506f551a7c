"""Looking at a device from QEMU's monitor: what runs goes on, what was stopped stays stopped.

QEMU reads the state of a ring of the first pair with GET_VRING_BASE, which is meant to stop it, and does not start it
again. Others it answers from what it remembers itself.
"""

import time

import pytest

from vdev.testing.guest import LinuxGuest
from vdev.testing.measure import ping_from_guest, ping_from_host
from vdev.testing.onlookers import Iperf

HOST, GUEST = "10.13.0.1", "10.13.0.2"
DEVICE = "/machine/peripheral-anon/device[0]/virtio-backend"
QUEUES = range(4)  # of two pairs
ASKED = {0, 1}
ROUNDS = 3
RESUMED_WITHIN = 1.0  # seconds: what a daemon waits in which nothing happens

pytestmark = pytest.mark.crossed
every_ring = pytest.mark.parametrize("rings", ["split", "packed"])


def look_at(guest: LinuxGuest, queue: int) -> None:
    """Ask the monitor everything it knows about ``queue``."""
    assert "virtio-net" in guest.qemu.monitor("info virtio")
    said = guest.qemu.monitor(f"info virtio-queue-status {DEVICE} {queue}")
    assert f"queue_index:          {queue}" in said, said


@pytest.fixture
def inspected(lan, start_daemon, start_guest, socket_folder, rings):
    """A guest with two queue pairs, and its daemon."""
    path = socket_folder / "s"
    daemon = start_daemon(["--socket-path", str(path), "--queue-pairs", "2", "--port", f"tap:vdev-look,ip={HOST}/24"],
                          namespace=lan)
    guest = start_guest(path, queue_pairs=2, cpus=2, packed=rings == "packed")
    guest.set_address(f"{GUEST}/24")
    (driver,) = daemon.events("driver")
    assert driver["rings"] == rings
    return daemon, guest


@every_ring
def test_inspection_under_load_stops_nothing(lan, inspected) -> None:
    daemon, guest = inspected
    with Iperf(guest, lan, GUEST) as load:
        for _ in range(ROUNDS):
            for queue in QUEUES:
                look_at(guest, queue)
                # The guest first: it is a kick that tells the daemon that the ring was not meant to stop.
                assert ping_from_guest(guest, HOST, 10).lost == 0
                assert ping_from_host(lan, GUEST, 10).lost == 0
        assert load.running(), "a TCP connection did not survive"
    # Each processor of the guest sends through a queue of its own.
    for processor in (1, 2):
        guest.check(f"taskset {processor} ping -c 20 -i 0.01 -q {HOST}")
    assert {event["ring"] for event in daemon.events("ring-resumed")} == ASKED
    assert len(daemon.events("ring-resumed")) == ROUNDS * len(ASKED)


@pytest.mark.newest_qemu
@every_ring
def test_inspection_of_every_queue_at_once(lan, inspected) -> None:
    """Both rings of the first pair are asked for before either goes on."""
    daemon, guest = inspected
    for _ in range(ROUNDS):
        for queue in QUEUES:
            look_at(guest, queue)
        assert ping_from_guest(guest, HOST, 10).lost == 0
        assert ping_from_host(lan, GUEST, 10).lost == 0
    assert {event["ring"] for event in daemon.events("ring-resumed")} == ASKED


@pytest.mark.newest_qemu
@every_ring
def test_inspection_of_a_guest_that_is_silent_and_of_one_without_a_driver(lan, inspected) -> None:
    """An interface that is down has its driver: its rings go on. Without a driver nothing is started."""
    daemon, guest = inspected
    guest.check("ip link set eth0 down")
    for queue in QUEUES:
        look_at(guest, queue)
    guest.check("ip link set eth0 up")
    assert ping_from_guest(guest, HOST, 10).lost == 0

    device = guest.check("basename $(readlink -f /sys/class/net/eth0/device)").strip()
    guest.check(f"echo {device} > /sys/bus/virtio/drivers/virtio_net/unbind")
    time.sleep(2 * RESUMED_WITHIN)
    before = len(daemon.events("ring-resumed"))
    for queue in QUEUES:
        guest.qemu.monitor(f"info virtio-queue-status {DEVICE} {queue}")
    time.sleep(2 * RESUMED_WITHIN)
    assert len(daemon.events("ring-resumed")) == before
    assert len(daemon.events("driver")) == 1

    guest.check(f"echo {device} > /sys/bus/virtio/drivers/virtio_net/bind")
    guest.set_address(f"{GUEST}/24")
    assert ping_from_guest(guest, HOST, 10).lost == 0
    assert ping_from_host(lan, GUEST, 10).lost == 0
    assert len(daemon.events("driver")) == 2
