"""vdev is killed under load and started again: the guest goes on, does nothing for it, and keeps its connections."""

import contextlib
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from vdev.testing.daemon import Daemon
from vdev.testing.guest import LinuxGuest
from vdev.testing.netns import Namespace
from vdev.testing.onlookers import Answer, Iperf, Pings
from vdev.testing.waiting import wait_until

HOST, GUEST = "10.12.0.1", "10.12.0.2"
TAP = "vdev-restart"
PING_INTERVAL = 0.02  # seconds
SETTLED = 25  # answers in a row after which a restart is over
PATIENCE = 40

ROLES = {"qemu-connects": False, "qemu-listens": True}


@dataclass(frozen=True)
class Gap:
    """Around one restart: seconds between two answers, and numbers without one."""

    seconds: float
    lost: int


def gap_after(answers: list[Answer], killed: float) -> Gap:
    """The longest silence that ended after ``killed``, and what was lost meanwhile."""
    pairs = [(one, other) for one, other in pairwise(answers) if other.time > killed]
    before, after = max(pairs, key=lambda pair: pair[1].time - pair[0].time)
    return Gap(after.time - before.time, after.number - before.number - 1)


class Supervised:
    """A vdev that is started again whenever it was killed; a context manager."""

    def __init__(self, options: list[str], lan: Namespace) -> None:
        self._options = options
        self._lan = lan
        self.now = Daemon(options, namespace=lan)

    def kill_and_start(self, *more: str) -> None:
        assert self.now.child.kill() == -signal.SIGKILL
        self.now = Daemon([*self._options, *more], namespace=self._lan)

    def wait_for(self, event: str) -> dict[str, object]:
        """The first ``event`` of the one that runs now."""

        def has_come() -> list[dict[str, object]]:
            assert self.now.child.running(), self.now.child.log()
            return self.now.events(event)

        wait_until(has_come, self.now.child.log, PATIENCE)
        return self.now.events(event)[0]

    def __enter__(self) -> "Supervised":
        return self

    def __exit__(self, *reason: object) -> None:
        self.now.__exit__(*reason)


def killed_and_restarted(lan: Namespace, start_guest: Callable[..., LinuxGuest], folder: Path, *, packed: bool,
                         qemu_listens: bool, times: int) -> list[Gap]:
    """Kill and start vdev so many times; what the guest's connections saw of each."""
    lan.run(["ip", "tuntap", "add", TAP, "mode", "tap", "multi_queue", "vnet_hdr"])
    lan.run(["ip", "addr", "add", f"{HOST}/24", "dev", TAP])
    lan.run(["ip", "link", "set", TAP, "up"])
    path = folder / "s"
    options = ["--socket-path", str(path), "--port", f"tap:{TAP}", *(["--client"] if qemu_listens else [])]
    gaps = []
    with contextlib.ExitStack() as stack:
        vdev = stack.enter_context(Supervised(options, lan))
        guest = start_guest(path, packed=packed, server=qemu_listens)
        guest.set_address(f"{GUEST}/24")
        booted = guest.check("cat /proc/sys/kernel/random/boot_id")
        pings = stack.enter_context(Pings(lan, GUEST, PING_INTERVAL))
        load = stack.enter_context(Iperf(guest, lan, GUEST))
        pings.await_answers(SETTLED, PATIENCE)
        for _ in range(times):
            killed = time.time()
            vdev.kill_and_start()
            vdev.wait_for("driver")
            pings.await_answers(SETTLED, PATIENCE)
            gaps.append(gap_after(pings.answers(), killed))
            assert vdev.now.events("ring-broken") == []
            assert {event["rings"] for event in vdev.now.events("driver")} == {"packed" if packed else "split"}
        assert load.running(), "a TCP connection did not survive"
        assert guest.check("cat /proc/sys/kernel/random/boot_id") == booted
        guest.stop()
    return gaps


def tell(what: str, gaps: list[Gap]) -> None:
    seconds, lost = [gap.seconds for gap in gaps], [gap.lost for gap in gaps]
    print(f"{what}: {len(gaps)} restarts; without an answer for {statistics.median(seconds):.2f} s (median), "
          f"{max(seconds):.2f} s at the most; lost of pings every {PING_INTERVAL * 1000:.0f} ms: "
          f"{statistics.median(lost):.0f} (median), {max(lost)} at the most")


@pytest.mark.crossed
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("rings", ["split", "packed"])
def test_F04_F05_killed_under_load(lan, start_guest, socket_folder: Path, rings: str, role: str) -> None:
    gaps = killed_and_restarted(lan, start_guest, socket_folder, packed=rings == "packed",
                                qemu_listens=ROLES[role], times=2)
    tell(f"{rings}, {role}", gaps)


@pytest.mark.long
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("rings, times", [("split", 50), ("packed", 20)])
def test_F04_F05_killed_under_load_many_times(lan, start_guest, socket_folder: Path, rings: str, times: int,
                                              role: str) -> None:
    gaps = killed_and_restarted(lan, start_guest, socket_folder, packed=rings == "packed",
                                qemu_listens=ROLES[role], times=times)
    tell(f"{rings}, {role}", gaps)


@pytest.mark.newest_qemu
@pytest.mark.crossed
@pytest.mark.parametrize("rings", ["split", "packed"])
def test_F09_restarted_while_the_guest_is_paused(lan, start_guest, socket_folder: Path, rings: str) -> None:
    path = socket_folder / "s"
    # The TAP goes and comes with vdev, its address too.
    with Supervised(["--socket-path", str(path), "--port", f"tap:{TAP},ip={HOST}/24"], lan) as vdev:
        guest = start_guest(path, packed=rings == "packed")
        guest.set_address(f"{GUEST}/24")
        lan.run(["ping", "-c", "50", "-i", "0.01", GUEST])
        guest.qemu.pause()
        vdev.kill_and_start()
        guest.qemu.resume()
        vdev.wait_for("driver")
        lan.run(["ping", "-c", "20", "-i", "0.05", "-w", "20", GUEST])
        guest.stop()


@pytest.mark.newest_qemu
def test_F06_a_vdev_that_offers_less_than_the_guest_uses_says_so(lan, start_guest, socket_folder: Path) -> None:
    path = socket_folder / "s"
    with Supervised(["--socket-path", str(path), "--port", f"tap:{TAP},ip={HOST}/24"], lan) as vdev:
        guest = start_guest(path, packed=True)
        guest.set_address(f"{GUEST}/24")
        lan.run(["ping", "-c", "5", "-i", "0.01", GUEST])
        vdev.kill_and_start("--features", "-packed")
        assert "when the guest's driver uses a feature that is missing" in vdev.wait_for("session-end")["text"]
        vdev.kill_and_start()
        vdev.wait_for("driver")
        lan.run(["ping", "-c", "20", "-i", "0.05", "-w", "20", GUEST])
        guest.stop()
