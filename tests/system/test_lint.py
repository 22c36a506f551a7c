"""Drivers that people use, under the linter: none of them breaks a rule."""

import tempfile
from pathlib import Path

import pytest

from vdev.qemu import qemu_args
from vdev.testing.daemon import Daemon
from vdev.testing.guest import Image, LinuxGuest
from vdev.testing.ipxe import IpxeGuest
from vdev.testing.measure import ping_from_guest, ping_from_host, tcp
from vdev.testing.netns import Namespace
from vdev.testing.qemu import QemuProgram
from vdev.testing.uml import UmlGuest

HOST, GUEST = "10.41.0.1", "10.41.0.2"


def assert_clean(daemon: Daemon, chains: int) -> None:
    """No rule was broken, in at least so many chains."""
    assert [event["text"] for event in daemon.events("lint")] == []
    (summary,) = daemon.events("lint-summary")[-1:]
    assert summary["broken"] == {} and summary["looked_at"]["chains"] >= chains


def test_ipxe(qemu: QemuProgram, socket_folder: Path) -> None:
    path = str(socket_folder / "ipxe")
    daemon = Daemon(["--socket-path", path, "--port", "responder", "--lint"], privileged=False)
    with daemon, IpxeGuest(qemu, qemu_args(path, memory="128M", qemu=qemu.binary)) as guest:
        assert guest.dhcp()
    assert_clean(daemon, 4)


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_linux(qemu: QemuProgram, image: Image, tap_possible: None, packed: bool) -> None:
    """Pings, fragments, TCP with its offloads both ways, and queues that are switched off and on."""
    with tempfile.TemporaryDirectory(prefix="vdev-") as folder, Namespace() as lan:
        socket = f"{folder}/socket"
        arguments = ["--socket-path", socket, "--queue-pairs", "2", "--port", f"tap:vdev-lint,ip={HOST}/24", "--lint"]
        network = qemu_args(socket, memory="256M", queue_pairs=2, qemu=qemu.binary, packed=packed)
        with Daemon(arguments, namespace=lan) as daemon, LinuxGuest(qemu, image, network, cpus=2) as guest:
            guest.set_address(f"{GUEST}/24")
            assert ping_from_guest(guest, HOST, 20, interval=0.01).lost == 0
            assert ping_from_host(lan, GUEST, 20, interval=0.01, size=8000).lost == 0
            for to_guest in (True, False):
                assert tcp(guest, lan, GUEST, to_guest=to_guest, seconds=1).bytes > 0
    assert_clean(daemon, 300)


def test_user_mode_linux(uml_image: Image, tap_possible: None) -> None:
    """Its front-end asks for acknowledgements before that is agreed on; its driver breaks nothing."""
    with tempfile.TemporaryDirectory(prefix="vdev-") as folder, Namespace() as lan:
        path = f"{folder}/socket"
        arguments = ["--socket-path", path, "--personality", "full", "--port", f"tap:vdev-lint,ip={HOST}/24", "--lint"]
        with Daemon(arguments, namespace=lan) as daemon, UmlGuest(uml_image, path) as guest:
            guest.set_address(f"{GUEST}/24")
            assert ping_from_host(lan, GUEST, 20, interval=0.01, size=8000).lost == 0
            guest.check("ip link set eth0 promisc on")
        (summary,) = daemon.events("lint-summary")
        assert set(summary["broken"]) == {"VU-REPLY-F-01"}
        assert summary["looked_at"]["commands"] >= 1
