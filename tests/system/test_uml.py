"""A guest of user-mode Linux, whose network device is wholly vdev's: configuration space and control queue."""

import signal
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from vdev.testing.daemon import Daemon
from vdev.testing.guest import Image
from vdev.testing.uml import UmlGuest
from vdev.testing.waiting import wait_until

MAC = "52:54:00:ab:cd:ef"
HOST, GUEST = "10.0.76.1", "10.0.76.5/24"


@dataclass
class Bench:
    """A guest, and the daemon it hangs on."""

    daemon: Daemon
    guest: UmlGuest


@pytest.fixture(scope="module")
def bench(uml_image: Image) -> Iterator[Bench]:
    with tempfile.TemporaryDirectory(prefix="vdev-") as folder:
        path = f"{folder}/socket"
        options = ["--socket-path", path, "--personality", "full", "--mac", MAC, "--speed", "25000",
                   "--port", f"responder:{HOST}/24"]
        with Daemon(options) as daemon, UmlGuest(uml_image, path) as guest:
            guest.set_address(GUEST)
            yield Bench(daemon, guest)


def test_the_address_is_the_one_in_the_configuration_space(bench: Bench) -> None:
    assert f"link/ether {MAC}" in bench.guest.check("ip link show eth0")


def test_guest_and_network_reach_each_other(bench: Bench) -> None:
    assert " 0% packet loss" in bench.guest.check(f"ping -c 10 -i 0.1 {HOST}")


def test_speed_and_duplex_are_shown(bench: Bench) -> None:
    shown = bench.guest.check("ethtool eth0")
    assert "Speed: 25000Mb/s" in shown
    assert "Duplex: Full" in shown


def test_the_operator_takes_the_link_down_and_up(bench: Bench) -> None:
    def link_is(up: bool) -> bool:
        return f"Link detected: {'yes' if up else 'no'}" in bench.guest.check("ethtool eth0")

    assert link_is(True)
    bench.daemon.child.signal(signal.SIGUSR1)
    wait_until(lambda: link_is(False), "the guest sees that its link is down")
    # Not even a guest that does not care gets a frame through.
    assert bench.guest.run(f"arp -d {HOST}; ping -c 1 -W 1 {HOST}").status != 0
    bench.daemon.child.signal(signal.SIGUSR2)
    wait_until(lambda: link_is(True), "the guest sees that its link is up")
    assert " 0% packet loss" in bench.guest.check(f"ping -c 3 -i 0.1 {HOST}")
