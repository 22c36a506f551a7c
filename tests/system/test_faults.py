"""Faults around a real guest: memory is plugged and unplugged under traffic, QEMU is stopped, the kernel panics."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vdev.qemu import qemu_args
from vdev.testing.guest import LinuxGuest
from vdev.testing.kept import holding
from vdev.testing.measure import PingReport, ping_from_guest, ping_from_host
from vdev.testing.netns import Namespace
from vdev.testing.waiting import wait_until

HOST, GUEST = "10.14.0.1", "10.14.0.2"
DIMM = 128 << 20  # bytes; a memory block of Linux on x86-64
MEMORY = "/sys/devices/system/memory"
SECONDS = 60.0


@pytest.fixture
def daemon(lan, start_daemon, socket_folder: Path):
    """On a TAP of its own."""
    return start_daemon(["--socket-path", str(socket_folder / "vm"), "--port", f"tap:vdev-dimm,ip={HOST}/24"],
                        namespace=lan)


@contextlib.contextmanager
def traffic(lan: Namespace) -> Iterator[list[PingReport]]:
    """The host pings the guest all the while -> what became of it, a hundred requests after the other; complete, and
    at least one, when the context ends."""
    reports: list[PingReport] = []
    over = threading.Event()

    def ping() -> None:
        while not over.is_set():
            reports.append(ping_from_host(lan, GUEST, 100))

    thread = threading.Thread(target=ping)
    thread.start()
    try:
        yield reports
    finally:
        over.set()
        thread.join()


def kilobytes(guest: LinuxGuest) -> int:
    """How much memory the guest has."""
    return int(guest.check("cat /proc/meminfo").split("MemTotal:")[1].split()[0])


def new_blocks(guest: LinuxGuest, known: list[str]) -> list[str]:
    """The guest's memory blocks that are not among ``known``."""
    return sorted(set(guest.check(f"ls {MEMORY}").split()) - set(known))


def test_F24_memory_is_plugged_and_unplugged_under_traffic(daemon, lan, qemu, image, socket_folder: Path) -> None:
    options = qemu_args(str(socket_folder / "vm"), memory="256M", qemu=qemu.binary)
    options[options.index("-m") + 1] += ",slots=4,maxmem=2G"
    with LinuxGuest(qemu, image, options) as guest:
        guest.set_address(f"{GUEST}/24")
        assert ping_from_host(lan, GUEST, 5).lost == 0
        blocks = new_blocks(guest, [])
        before, mapped = kilobytes(guest), holding(daemon.child.pid).mappings
        with traffic(lan) as reports:
            for number in range(2):
                guest.qemu.qmp.execute("object-add", {"qom-type": "memory-backend-memfd", "id": f"more{number}",
                                                      "size": DIMM, "share": True})
                guest.qemu.qmp.execute("device_add", {"driver": "pc-dimm", "id": f"dimm{number}",
                                                      "memdev": f"more{number}"})
            wait_until(lambda: holding(daemon.child.pid).mappings == mapped + 2, "vdev is told of the memory", SECONDS)
            wait_until(lambda: len(new_blocks(guest, blocks)) == 2, "the guest sees the memory", SECONDS)
            for block in new_blocks(guest, blocks):
                guest.check(f"grep -q offline {MEMORY}/{block}/state || echo offline > {MEMORY}/{block}/state")
                guest.check(f"echo online_movable > {MEMORY}/{block}/state")
            assert kilobytes(guest) - before > 2 * DIMM * 9 // 10 >> 10
            # More than there was before, so that what came is used.
            guest.check("mkdir /fill && mount -t tmpfs -o size=320m fill /fill && "
                        "dd if=/dev/zero of=/fill/it bs=1M count=300 && umount /fill", timeout=60)
            for number in range(2):
                guest.qemu.qmp.execute("device_del", {"id": f"dimm{number}"})
            wait_until(lambda: holding(daemon.child.pid).mappings == mapped, "the memory is taken away", SECONDS)
        assert [report.lost for report in reports] == [0] * len(reports) != []
        assert ping_from_guest(guest, HOST, 20).lost == 0
        assert not daemon.events("session-end") and not daemon.events("ring-broken")


@pytest.mark.newest_qemu
def test_F03_front_end_is_stopped_and_goes_on(daemon, lan, start_guest, socket_folder: Path) -> None:
    guest = start_guest(socket_folder / "vm")
    guest.set_address(f"{GUEST}/24")
    assert ping_from_host(lan, GUEST, 5).lost == 0
    guest.qemu.child.signal(signal.SIGSTOP)
    time.sleep(3)
    guest.qemu.child.signal(signal.SIGCONT)
    assert ping_from_guest(guest, HOST, 20).lost == 0
    assert not daemon.events("session-end")


@pytest.mark.early
@pytest.mark.newest_qemu
def test_F19_kernel_panics_under_traffic(daemon, lan, start_guest, socket_folder: Path) -> None:
    """The guest's kernel is told to reboot when it panics; the network is back with the next one."""
    guest = start_guest(socket_folder / "vm")
    guest.set_address(f"{GUEST}/24")
    with traffic(lan) as reports:
        wait_until(lambda: reports, "the guest answers", SECONDS)
        guest.console.send(b"panic 5 echo c > /proc/sysrq-trigger\n")
        guest.wait_until_up()
        guest.set_address(f"{GUEST}/24")  # or the last hundred requests would wait for answers in vain
    assert ping_from_guest(guest, HOST, 20).lost == 0
    assert len(daemon.events("driver")) == 2 and not daemon.events("session-end")
