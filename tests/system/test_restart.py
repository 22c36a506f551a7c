"""vdev is killed under load and started again: the guest goes on, does nothing for it, and keeps its connections."""

import contextlib
import re
import signal
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest

from vdev.testing.daemon import Daemon
from vdev.testing.guest import LinuxGuest
from vdev.testing.measure import tcp_both_ways
from vdev.testing.netns import Namespace

HOST, GUEST = "10.12.0.1", "10.12.0.2"
TAP = "vdev-restart"
PING_INTERVAL = 0.02  # seconds
SETTLED = 25  # answers in a row after which a restart is over
PATIENCE = 40

ROLES = {"qemu-connects": False, "qemu-listens": True}


class Pings:
    """Pings from the host, one after the other until closed, with the time of each answer."""

    def __init__(self, lan: Namespace, log: IO[str]) -> None:
        self._log = log
        self._ping = lan.popen(["ping", "-D", "-n", "-i", str(PING_INTERVAL), GUEST], stdout=log,
                               stderr=subprocess.DEVNULL)

    def answers(self) -> list[tuple[float, int]]:
        """(time, number) of every answer so far."""
        with open(self._log.name) as text:
            found = re.findall(r"^\[([\d.]+)\] \d+ bytes from .* icmp_seq=(\d+)", text.read(), re.MULTILINE)
        return [(float(when), int(number)) for when, number in found]

    def wait_for_answers_after(self, when: float) -> None:
        deadline = time.monotonic() + PATIENCE
        while sum(answered > when for answered, _ in self.answers()) < SETTLED:
            assert time.monotonic() < deadline, f"no answers within {PATIENCE} s"
            time.sleep(0.1)

    def close(self) -> None:
        self._ping.send_signal(signal.SIGINT)
        self._ping.wait(5)


@dataclass(frozen=True)
class Gap:
    """Around one restart: seconds between two answers, and numbers without one."""

    seconds: float
    lost: int


def gap_after(answers: list[tuple[float, int]], killed: float) -> Gap:
    """The longest silence that ended after ``killed``, and what was lost meanwhile."""
    pairs = [(one, other) for one, other in zip(answers, answers[1:], strict=False) if other[0] > killed]
    before, after = max(pairs, key=lambda pair: pair[1][0] - pair[0][0])
    return Gap(after[0] - before[0], after[1] - before[1] - 1)


class Supervised:
    """A vdev that is started again whenever it was killed; a context manager."""

    def __init__(self, options: list[str], lan: Namespace) -> None:
        self._options = options
        self._lan = lan
        self.now = Daemon(options, namespace=lan)

    def kill_and_start(self, *more: str) -> None:
        assert self.now.child.kill() == -signal.SIGKILL
        self.now = Daemon([*self._options, *more], namespace=self._lan)

    def wait_for_driver(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while not self.now.events("driver"):
            assert self.now.child.running() and time.monotonic() < deadline, self.now.child.log()
            time.sleep(0.02)

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
        pings = stack.enter_context(contextlib.closing(Pings(lan, stack.enter_context(open(folder / "pings", "w")))))
        load = stack.enter_context(tcp_both_ways(guest, lan, GUEST))
        pings.wait_for_answers_after(time.time())
        for _ in range(times):
            killed = time.time()
            vdev.kill_and_start()
            vdev.wait_for_driver()
            pings.wait_for_answers_after(time.time())
            gaps.append(gap_after(pings.answers(), killed))
            assert vdev.now.events("ring-broken") == []
            assert {event["rings"] for event in vdev.now.events("driver")} == {"packed" if packed else "split"}
        assert load.poll() is None, "a TCP connection did not survive"
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
        vdev.wait_for_driver()
        lan.run(["ping", "-c", "20", "-i", "0.05", "-w", "20", GUEST])
        guest.stop()


def test_F06_a_vdev_that_offers_less_than_the_guest_uses_says_so(lan, start_guest, socket_folder: Path) -> None:
    path = socket_folder / "s"
    with Supervised(["--socket-path", str(path), "--port", f"tap:{TAP},ip={HOST}/24"], lan) as vdev:
        guest = start_guest(path, packed=True)
        guest.set_address(f"{GUEST}/24")
        lan.run(["ping", "-c", "5", "-i", "0.01", GUEST])
        vdev.kill_and_start("--features", "-packed")
        deadline = time.monotonic() + PATIENCE
        while not vdev.now.events("session-end"):
            assert time.monotonic() < deadline, vdev.now.child.log()
            time.sleep(0.1)
        assert "when the guest's driver uses a feature that is missing" in vdev.now.events("session-end")[0]["text"]
        vdev.kill_and_start()
        vdev.wait_for_driver()
        lan.run(["ping", "-c", "20", "-i", "0.05", "-w", "20", GUEST])
        guest.stop()
