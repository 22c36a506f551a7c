"""A Linux guest migrates between two QEMUs with a vdev each, and back, while it is used.

Both daemons hang their TAP on one bridge, as two hosts do on one network; the guest keeps its addresses. What the
guest notices is compared with QEMU's own virtio-net device, moved in the same way in the same minute.
"""

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from vdev.qemu import qemu_args
from vdev.testing.daemon import Daemon
from vdev.testing.guest import Image, LinuxGuest
from vdev.testing.measure import ping_from_host
from vdev.testing.migration import MigrationFailed, Report, migrate, start_and_cancel
from vdev.testing.netns import Namespace
from vdev.testing.onlookers import Echo, Iperf, Pings
from vdev.testing.qemu import QemuProgram, QmpError, accelerator, tap_args
from vdev.userfault import PATH

HOST, GUEST, MAC = "10.13.0.1", "10.13.0.2", "52:54:00:13:13:13"
INTERVAL = 0.1  # seconds between pings


@pytest.fixture
def bridge(lan: Namespace) -> Namespace:
    """A network with a bridge that has the host's address."""
    lan.run(["ip", "link", "add", "bridge0", "type", "bridge"])
    lan.run(["ip", "addr", "add", f"{HOST}/24", "dev", "bridge0"])
    lan.run(["ip", "link", "set", "bridge0", "up"])
    return lan


@pytest.fixture
def sound(qemu: QemuProgram) -> None:
    """Skips where a guest does not survive migration with whatever device."""
    if accelerator() == "tcg" and qemu.version < (10, 0):
        pytest.skip(f"{qemu} under TCG loses writes of the guest's own processor: its guests crash after a few "
                    "migrations, with its own virtio-net as well")


@dataclass
class Pair:
    """Two daemons, and QEMU's options for a guest on each."""

    daemons: list[Daemon]
    networks: list[list[str]]


@pytest.fixture
def pair(bridge: Namespace, qemu: QemuProgram, start_daemon: Callable[..., Daemon],
         socket_folder: Path) -> Callable[..., Pair]:
    """``pair(*options, packed=False, queue_pairs=1)``: two daemons with these options on the bridge."""

    def start(*options: str, packed: bool = False, queue_pairs: int = 1) -> Pair:
        sockets = [str(socket_folder / name) for name in ("here", "there")]
        daemons = [start_daemon(["--socket-path", socket, "--port", f"tap:vdev-{number},bridge=bridge0", *options],
                                namespace=bridge) for number, socket in enumerate(sockets)]
        return Pair(daemons, [qemu_args(socket, memory="256M", mac=MAC, qemu=qemu.binary, packed=packed,
                                        queue_pairs=queue_pairs) for socket in sockets])

    return start


@pytest.fixture
def boot(qemu: QemuProgram, image: Image) -> Iterator[Callable[..., LinuxGuest]]:
    """``boot(network, namespace=None)``: a guest with its address."""
    guests: list[LinuxGuest] = []

    def start(network: list[str], namespace: Namespace | None = None, cpus: int = 1) -> LinuxGuest:
        guest = LinuxGuest(qemu, image, network, namespace=namespace, cpus=cpus)
        guests.append(guest)
        guest.set_address(f"{GUEST}/24")
        return guest

    yield start
    for guest in guests:
        guest.stop()


@dataclass
class Journey:
    """What was seen of a guest that moved. echoed and loaded: bytes compared, and carried by iperf3 both ways."""

    lost: int
    reports: list[Report]
    echoed: int
    loaded: int

    @property
    def stopped(self) -> float:
        """Seconds that QEMU says the guest did not run."""
        return sum(report.downtime for report in self.reports) / 1000


def there_and_back(guest: LinuxGuest, networks: list[list[str]], lan: Namespace, times: int,
                   namespace: Namespace | None = None, postcopy: bool = False) -> Journey:
    """Move the guest from the first network to the second and back, under pings, TCP both ways and a comparison of
    what is sent with what comes back. Raises AssertionError when its memory is not what it was."""
    guest.check("dd if=/dev/urandom of=/tmp/pattern bs=1M count=32 2>/dev/null", 60)
    pattern = guest.check("sha256sum /tmp/pattern", 60)
    reports = []
    with Iperf(guest, lan, GUEST) as iperf, Echo(guest, lan, GUEST) as echo, Pings(lan, GUEST, INTERVAL) as pings:
        pings.await_answers(5)
        for _ in range(times):
            for network in (networks[1], networks[0]):
                reports.append(migrate(guest, network, namespace=namespace, postcopy=postcopy))
                pings.await_answers(10)
        iperf.await_both()  # TCP goes on once its timers, which doubled meanwhile, have run out
        lost = pings.stop()
        echoed = echo.stop()
        loaded = iperf.stop()
    assert guest.check("sha256sum /tmp/pattern", 60) == pattern
    return Journey(lost, reports, echoed, loaded)


def own_device(lan: Namespace) -> list[list[str]]:
    """QEMU's options for its own virtio-net on two TAPs of the bridge."""
    networks = []
    for name in ("own-0", "own-1"):
        lan.run(["ip", "tuntap", "add", name, "mode", "tap", "vnet_hdr"])
        lan.run(["ip", "link", "set", name, "up", "master", "bridge0"])
        networks.append(tap_args(name, mac=MAC))
    return networks


@pytest.mark.early
@pytest.mark.parametrize(("postcopy", "packed", "times"), [
    pytest.param(False, False, 1, id="precopy-split-once"), pytest.param(True, True, 1, id="postcopy-packed-once"),
    *(pytest.param(postcopy, packed, 10, marks=pytest.mark.long,
                   id=f"{'postcopy' if postcopy else 'precopy'}-{'packed' if packed else 'split'}-ten-times")
      for postcopy in (False, True) for packed in (False, True))])
def test_F29_there_and_back_under_load(request, sound, bridge, pair, boot, times, packed, postcopy) -> None:
    if postcopy:
        request.getfixturevalue("userfaults")
    both = pair(*["--postcopy"] * postcopy, packed=packed)
    guest = boot(both.networks[0])
    ours = there_and_back(guest, both.networks, bridge, times, postcopy=postcopy)
    guest.stop()
    own = own_device(bridge)
    guest = boot(own[0], namespace=bridge)
    qemus = there_and_back(guest, own, bridge, times, namespace=bridge, postcopy=postcopy)
    print(f"vdev: {ours}\nQEMU: {qemus}")
    assert ours.echoed > 0 < ours.loaded
    # How long it stops the guest is decided by QEMU, by what it guesses of the bandwidth of a busy machine.
    longer = max(0, math.ceil((ours.stopped - qemus.stopped) / INTERVAL))
    assert ours.lost <= qemus.lost + longer + 1
    for daemon in both.daemons:
        assert daemon.events("log-on") and not daemon.events("log-too-small")
        assert len(daemon.events("postcopy-begins")) == len(daemon.events("postcopy-ends")) == times * postcopy
    if postcopy:
        assert all(report.asked for report in ours.reports)


@pytest.fixture
def userfaults() -> None:
    """Skips where a daemon can have no userfaultfd."""
    if not os.access(PATH, os.R_OK | os.W_OK):
        pytest.skip(f"postcopy needs {PATH}, and permissions for it")


@pytest.mark.newest_qemu
def test_without_it_postcopy_is_refused_before_anything_moves(pair, boot, qemu) -> None:
    both = pair()
    guest = boot(both.networks[0])
    with pytest.raises(MigrationFailed, match="not capable of postcopy"):
        migrate(guest, both.networks[1], postcopy=True)
    guest.check("true")


def test_guest_with_more_queues_cannot_arrive_by_postcopy_and_stays(sound, userfaults, bridge, pair, boot) -> None:
    """QEMU would wait for an answer to what it does not send (see vhost_user/rules.py)."""
    both = pair("--postcopy", queue_pairs=2)
    guest = boot(both.networks[0], cpus=2)
    with pytest.raises(MigrationFailed):
        migrate(guest, both.networks[1], postcopy=True)
    assert any("one queue pair" in line["text"] for line in both.daemons[1].events("session-end"))
    assert ping_from_host(bridge, GUEST, 20).lost == 0


def test_guest_with_more_queues_migrates(sound, bridge, pair, boot) -> None:
    both = pair(queue_pairs=2)
    guest = boot(both.networks[0], cpus=2)
    for network in (both.networks[1], both.networks[0]):
        migrate(guest, network)
        assert ping_from_host(bridge, GUEST, 50).received
        assert ping_from_host(bridge, GUEST, 50).lost == 0
        assert "Combined:\t2" in guest.check("ethtool -l eth0").split("Current hardware settings")[1]


SNIFF = f"""
import socket
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x8035))
s.bind(("bridge0", 0))
s.settimeout(120)
print("ready", flush=True)
while (frame := s.recv(2048))[6:12].hex(":") != "{MAC}":
    pass
print(frame[:14].hex(), flush=True)
"""


def test_VU_NET_B_01_guest_that_cannot_announce_itself_is_announced(sound, bridge, pair, boot) -> None:
    """QEMU sends SEND_RARP where the guest has no GUEST_ANNOUNCE."""
    both = pair("--features=-guest_announce")
    guest = boot(both.networks[0])
    with bridge.popen([sys.executable, "-c", SNIFF], stdout=subprocess.PIPE, text=True) as sniffer:
        try:
            assert sniffer.stdout.readline() == "ready\n"
            migrate(guest, both.networks[1])
            assert sniffer.stdout.readline().strip() == "ff" * 6 + MAC.replace(":", "") + "8035"
        finally:
            sniffer.kill()
    assert ping_from_host(bridge, GUEST, 20).lost == 0


@pytest.mark.newest_qemu
def test_F30_without_the_log_qemu_refuses_and_the_line_says_why(pair, boot) -> None:
    both = pair("--features=-log_all")
    guest = boot(both.networks[0])
    with pytest.raises(QmpError, match="Migration disabled: ") as refused:
        guest.qemu.qmp.execute("migrate", {"uri": "exec:cat >/dev/null"})
    (line,) = both.daemons[0].events("no-migration")
    assert "--features -log_all" in line["text"]
    assert str(refused.value).removeprefix("migrate: ").rstrip(".") in line["text"]  # it quotes what QEMU says


def resources(daemon: Daemon) -> tuple[int, int]:
    """Open descriptors and mapped files of the daemon."""
    process = Path("/proc", str(daemon.child.pid))
    return len(os.listdir(process / "fd")), sum("memfd" in line for line in (process / "maps").read_text().splitlines())


@pytest.mark.parametrize("times", [20, pytest.param(100, marks=pytest.mark.long)])
def test_F28_started_and_cancelled_under_load_leaves_nothing(bridge, pair, boot, times) -> None:
    both = pair()
    daemon = both.daemons[0]
    guest = boot(both.networks[0])

    with Echo(guest, bridge, GUEST) as echo, Pings(bridge, GUEST) as pings:
        pings.await_answers(5)
        before = resources(daemon)
        during = set()
        for _ in range(times):
            start_and_cancel(guest, lambda: during.add(resources(daemon)))
        pings.await_answers(10)
        assert echo.stop() > 0
        assert pings.stop() == 0
    assert daemon.events("log-on") and daemon.events("log-off")
    # The last log stays until another one replaces it.
    assert resources(daemon) == (before[0], before[1] + 1)
    assert during == {(before[0], before[1] + 1)}
