"""What happens around a session: reboots, crashed front-ends, several guests, more queues than are used."""

import re
import signal
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vdev.net.features import Feature
from vdev.testing.guest import LinuxGuest
from vdev.testing.measure import ping_from_guest, ping_from_host, tcp
from vdev.testing.netns import Namespace
from vdev.testing.process import Child

HOST, GUEST, NEIGHBOUR = "10.12.0.1", "10.12.0.2", "10.12.0.3"


def _on_tap(socket_path: Path, tap: str) -> list[str]:
    """vdev's options for one device on a new TAP that has the host's address."""
    return ["--socket-path", str(socket_path), "--port", f"tap:{tap},ip={HOST}/24"]


def _back(guest: LinuxGuest, lan: Namespace) -> None:
    """The guest, fresh from a boot, has its network in both directions."""
    guest.set_address(f"{GUEST}/24")
    assert ping_from_guest(guest, HOST, 20).lost == 0
    assert ping_from_host(lan, GUEST, 20).lost == 0


@pytest.mark.early
@pytest.mark.newest_qemu
@pytest.mark.crossed
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_F17_network_is_back_after_two_reboots(lan, start_daemon, start_guest, socket_folder: Path, packed) -> None:
    socket_path = socket_folder / "reboot"
    daemon = start_daemon(_on_tap(socket_path, "vdev-reboot"), namespace=lan)
    guest = start_guest(socket_path, queue_pairs=2, cpus=2, packed=packed)
    _back(guest, lan)
    # The rings go round many times before the first reboot.
    assert ping_from_host(lan, GUEST, 500, interval=0.002, size=1400).lost == 0
    for to_guest in (False, True):
        assert tcp(guest, lan, GUEST, to_guest=to_guest, seconds=1).bytes > 0
    guest.reboot()
    _back(guest, lan)
    guest.qemu.reset()
    guest.wait_until_up()
    _back(guest, lan)
    accepted = guest.check("cat /sys/bus/virtio/devices/virtio0/features")  # one character a bit, lowest first
    assert accepted[Feature.RING_PACKED] == str(int(packed))
    guest.stop()
    daemon.stop()
    # One front-end, three drivers, one session.
    assert (len(daemon.events("connect")), len(daemon.events("session-end"))) == (1, 1)
    assert [driver["rings"] for driver in daemon.events("driver")] == 3 * ["packed" if packed else "split"]
    (end,) = daemon.events("session-end")
    assert end["from_guest"]["frames"] > 500 < end["to_guest"]["frames"]


def test_F02_another_front_end_follows_a_killed_one(lan, start_daemon, start_guest, socket_folder: Path) -> None:
    socket_path = socket_folder / "kill"
    daemon = start_daemon(_on_tap(socket_path, "vdev-kill"), namespace=lan)
    for _ in range(2):
        guest = start_guest(socket_path)
        _back(guest, lan)
        # In the middle of traffic: the rings are full when it dies.
        flood = lan.popen(["busybox", "ping", "-q", "-i", "0.001", "-c", "500", "-s", "1400", GUEST])
        assert ping_from_host(lan, GUEST, 20).lost == 0
        assert guest.kill() == -signal.SIGKILL
        flood.kill()
        flood.wait()
    daemon.stop()
    assert (len(daemon.events("connect")), len(daemon.events("session-end"))) == (2, 2)


@pytest.mark.early
@pytest.mark.newest_qemu
def test_two_guests_on_a_bridge_ping_each_other(lan, start_daemon, start_guest, socket_folder: Path) -> None:
    lan.run(["ip", "link", "add", "bridge0", "type", "bridge"])
    lan.run(["ip", "link", "set", "bridge0", "up"])
    sockets = [socket_folder / name for name in ("one", "two")]
    devices = [word for path in sockets
               for word in ("--device", f"socket={path},port=tap:vdev-{path.name},bridge=bridge0")]
    daemon = start_daemon(devices, namespace=lan)
    one, two = (start_guest(path) for path in sockets)
    one.set_address(f"{GUEST}/24")
    two.set_address(f"{NEIGHBOUR}/24")
    assert ping_from_guest(one, NEIGHBOUR, 200).lost == 0
    assert ping_from_guest(two, GUEST, 200, size=1400).lost == 0
    # The first leaves; the second, on its own device, does not notice.
    one.kill()
    lan.run(["ip", "addr", "add", f"{HOST}/24", "dev", "bridge0"])
    assert ping_from_guest(two, HOST, 20).lost == 0
    two.stop()
    daemon.stop()


FLOWS = 100
ROUNDS = 3
SEND = f"""
import socket
for turn in range({ROUNDS}):
    for flow in range({FLOWS}):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            s.bind(("{HOST}", 20000 + flow))
            s.sendto(b"flow", ("{GUEST}", 9))
"""


def _datagrams(guest: LinuxGuest) -> int:
    """UDP datagrams that reached the guest's network stack, wanted there or not."""
    names, counts = re.findall(r"^Udp: (.*)", guest.check("cat /proc/net/snmp"), re.MULTILINE)
    udp = dict(zip(names.split(), map(int, counts.split()), strict=True))
    return udp["InDatagrams"] + udp["NoPorts"]


@pytest.mark.newest_qemu
def test_no_flow_is_steered_to_an_idle_queue(lan, start_daemon, start_guest, socket_folder: Path) -> None:
    """Four pairs negotiated, one enabled: the host's kernel must not spread flows over the other three."""
    socket_path = socket_folder / "flows"
    daemon = start_daemon([*_on_tap(socket_path, "vdev-flows"), "--queue-pairs", "4"], namespace=lan)
    guest = start_guest(socket_path, queue_pairs=4, cpus=1)
    current = guest.check("ethtool -l eth0").split("Current hardware settings")[1]
    assert "Combined:\t1" in current
    _back(guest, lan)
    before = _datagrams(guest)
    lan.run([sys.executable, "-c", SEND])
    assert ping_from_host(lan, GUEST, 1).lost == 0  # all that was sent before has arrived by now
    assert _datagrams(guest) - before == FLOWS * ROUNDS
    guest.stop()
    daemon.stop()


@pytest.mark.newest_qemu
def test_a_bare_listening_fd_is_enough(lan, start_guest, socket_folder: Path) -> None:
    """``vdev --fd N`` and nothing else, as management software starts it, makes a new TAP where it may."""
    with _listen(socket_folder / "fd") as server, _bare(server, lan) as daemon:
        _serves_on_a_tap_of_its_own(start_guest(socket_folder / "fd"), lan)
        assert daemon.stop() == 0, daemon.log()


@pytest.mark.newest_qemu
def test_a_bare_connected_fd_is_enough(lan, start_guest, socket_folder: Path) -> None:
    # QEMU does not come up before somebody answers, so the daemon is started beside it once it has connected.
    # A child ends with the thread that started it: the pool has to live as long.
    with _listen(socket_folder / "fd") as server, ThreadPoolExecutor(1) as waiter:
        server.settimeout(30)
        accepted = waiter.submit(lambda: _bare(server.accept()[0], lan))
        guest = start_guest(socket_folder / "fd")
        with accepted.result(30) as daemon:
            _serves_on_a_tap_of_its_own(guest, lan)
            # There is no other connection to come: the daemon ends with this one.
            guest.stop()
            assert daemon.wait(5) == 0, daemon.log()


def _listen(path: Path) -> socket.socket:
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen(1)
    return server


def _bare(given: socket.socket, lan: Namespace) -> Child:
    command = [sys.executable, "-m", "vdev", "--fd", str(given.fileno())]
    return Child(command, namespace=lan, pass_fds=[given.fileno()])


def _serves_on_a_tap_of_its_own(guest: LinuxGuest, lan: Namespace) -> None:
    (tap,) = re.findall(r"^vdev\d+", lan.run(["ip", "-br", "link"]).stdout, re.MULTILINE)
    lan.run(["ip", "addr", "add", f"{HOST}/24", "dev", tap])
    _back(guest, lan)
