"""iPXE's own virtio-net driver, on the responder port, without any privilege: QEMU's ROM is the guest."""

import socket
import sys
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from vdev.qemu import qemu_args
from vdev.testing.daemon import Daemon, as_plain_user
from vdev.testing.ipxe import IpxeGuest
from vdev.testing.process import Child
from vdev.testing.qemu import QemuProgram


def test_lease_from_the_responder_without_privileges(qemu: QemuProgram, socket_folder: Path) -> None:
    path = str(socket_folder / "ipxe")
    daemon = Daemon(["--socket-path", path, "--port", "responder:192.168.77.1/24"], privileged=False)
    with daemon, IpxeGuest(qemu, qemu_args(path, memory="128M", qemu=qemu.binary)) as guest:
        address = ip_address(guest.dhcp())
        assert address in ip_network("192.168.77.0/24") and address != ip_address("192.168.77.1")
        counters = guest.statistics()
        # Discovery and request, offer and acknowledgement at the least, and no error.
        assert counters["RX"] >= 2 and counters["TX"] >= 2 and counters["TXE"] == 0
    (end,) = daemon.events("session-end")
    assert end["from_guest"]["frames"] >= 2 and end["to_guest"]["frames"] >= 2
    assert end["from_guest"]["dropped"] == end["to_guest"]["dropped"] == {}


@pytest.mark.newest_qemu
def test_a_bare_fd_without_privileges_serves_the_responder(qemu: QemuProgram, socket_folder: Path) -> None:
    """Where no TAP can be made, ``vdev --fd N`` says so and still gives the guest a network."""
    path = str(socket_folder / "ipxe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen(1)
        command = as_plain_user([sys.executable, "-m", "vdev", "--fd", str(server.fileno())])
        daemon = Child(command, pass_fds=[server.fileno()])
    with daemon, IpxeGuest(qemu, qemu_args(path, memory="128M", qemu=qemu.binary)) as guest:
        assert ip_address(guest.dhcp()).is_private
        assert "using responder" in daemon.log()
        assert daemon.stop() == 0


@pytest.mark.newest_qemu
def test_another_guest_follows_on_the_same_socket(qemu: QemuProgram, socket_folder: Path) -> None:
    path = str(socket_folder / "ipxe")
    with Daemon(["--socket-path", path, "--port", "responder"], privileged=False) as daemon:
        for _ in range(2):
            with IpxeGuest(qemu, qemu_args(path, memory="128M", qemu=qemu.binary)) as guest:
                assert guest.dhcp()
    assert len(daemon.events("session-end")) == 2
