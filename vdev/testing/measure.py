"""Measurements between a Linux guest and its host: ping and iperf3, with their reports understood."""

import itertools
import json
import math
import re
import shutil
from dataclasses import dataclass

from vdev.testing.guest import ObedientGuest
from vdev.testing.netns import Namespace

_ports = itertools.count(5201)


class MeasurementError(RuntimeError):
    """A measuring program failed, or its report makes no sense. The text has its own words."""


@dataclass(frozen=True)
class PingReport:
    """What became of ``sent`` requests: which, as ping numbers them, had no answer. Times in milliseconds, None when
    no answer came."""

    sent: int
    unanswered: tuple[int, ...]
    minimum: float | None
    average: float | None
    maximum: float | None

    @property
    def received(self) -> int:
        """How many requests had an answer."""
        return self.sent - self.lost

    @property
    def lost(self) -> int:
        """How many requests had no answer."""
        return len(self.unanswered)


PATIENCE = 10  # seconds for the last answers


def ping_command(address: str, count: int, interval: float = 0.01, size: int = 56) -> str:
    """``count`` requests every ``interval`` seconds with ``size`` bytes of data: iputils' or busybox's ping.

    Without a deadline iputils' ping waits for the last answer no longer than twice the longest round trip,
    and a guest that is held up just then counts as a loss. With one it goes on, with more requests if need
    be, until it has ``count`` answers; so the answers are told apart by number (parse_ping). Only iputils'
    has a receive buffer large enough for every answer when the machine is busy and they come in bursts.
    """
    return f"ping -c {count} -i {interval} -s {size} -w {math.ceil(count * interval) + PATIENCE} {address}"


def parse_ping(text: str, count: int) -> PingReport:
    """Understand the output of busybox's or iputils' ping for the first ``count`` requests. Raises
    MeasurementError."""
    if "packets transmitted" not in text:
        raise MeasurementError(f"ping gave no summary: {text.strip()}")
    first = 1 if "icmp_seq=" in text else 0  # iputils' counts from one
    unanswered = sorted(set(range(first, first + count)) - {int(number) for number in re.findall(r"seq=(\d+)", text)})
    times = re.search(r"min/avg/max\S* = ([\d.]+)/([\d.]+)/([\d.]+)", text)
    return PingReport(count, tuple(unanswered), *(map(float, times.groups()) if times else (None,) * 3))


def round_trips(text: str) -> list[float]:
    """The times in the output of busybox's or iputils' ping, in milliseconds. Raises MeasurementError without any."""
    times = [float(time) for time in re.findall(r"time=([\d.]+) ms", text)]
    if not times:
        raise MeasurementError(f"ping gave no times: {text.strip()}")
    return times


def ping_from_guest(guest: ObedientGuest, address: str, count: int, interval: float = 0.01,
                    size: int = 56) -> PingReport:
    """Ping ``address`` from inside the guest."""
    # A line an answer is too much for a serial line: only the numbers, and the summary.
    brief = "sed -n 's/.* \\(\\(icmp_\\)*seq=[0-9]*\\).*/\\1/p' /tmp/ping | tr '\\n' ' '; tail -n 3 /tmp/ping"
    result = guest.run(f"{ping_command(address, count, interval, size)} >/tmp/ping 2>&1; {brief}",
                       30 + 2 * count * interval)
    return parse_ping(result.output, count)


def ping_from_host(namespace: Namespace, address: str, count: int, interval: float = 0.01,
                   size: int = 56) -> PingReport:
    """Ping ``address`` from inside ``namespace``."""
    command = ping_command(address, count, interval, size).split()
    if not shutil.which("ping"):
        command.insert(0, "busybox")
    done = namespace.run(command, 30 + 2 * count * interval, check=False)
    return parse_ping(done.stdout + done.stderr, count)


@dataclass(frozen=True)
class TcpReport:
    """What iperf3 says of one TCP run: what arrived, and in how many seconds."""

    bytes: int
    seconds: float

    @property
    def megabits(self) -> float:
        """Mbit/s as seen by the receiver."""
        return self.bytes * 8 / self.seconds / 1e6


IPERF_LOG = "/tmp/iperf3.log"  # in the guest


def listen(guest: ObedientGuest, server: str, port: int, log: str = "/dev/null") -> None:
    """Start ``server`` in the guest and wait until it listens on TCP ``port``. Raises GuestError."""
    listening = f":{port:04X} [0-9A-F]+:0000 0A"  # local port, any peer, state TCP_LISTEN
    guest.check(f"{server} >{log} 2>&1 & "
                f"until grep -Eq '{listening}' /proc/net/tcp /proc/net/tcp6; do sleep 0.02; done")


def iperf_server(guest: ObedientGuest) -> int:
    """Start an iperf3 in the guest that serves one client -> its TCP port: another one each time, as the last server
    may not have ended yet."""
    port = next(_ports)
    listen(guest, f"iperf3 -s -1 -p {port}", port, IPERF_LOG)
    return port


def tcp(guest: ObedientGuest, namespace: Namespace, guest_address: str, *, to_guest: bool, seconds: float = 2,
        streams: int = 1) -> TcpReport:
    """TCP between the namespace and the guest for ``seconds``, in one direction. Raises MeasurementError."""
    port = iperf_server(guest)
    command = ["iperf3", "-J", "-c", guest_address, "-p", str(port), "-t", str(seconds), "-P", str(streams)]
    done = namespace.run(command if to_guest else [*command, "-R"], seconds + 30, check=False)
    try:
        report = json.loads(done.stdout)
        received = report["end"]["sum_received"]
        return TcpReport(int(received["bytes"]), float(received["seconds"]))
    except (ValueError, KeyError):
        raise MeasurementError(f"iperf3 failed: {done.stdout[-500:]}{done.stderr}"
                               f"in the guest: {guest.run(f'cat {IPERF_LOG}').output[-500:]}") from None


@dataclass(frozen=True)
class LinkCounters:
    """A host interface's counters. ``from_guest`` is what a TAP calls received: the guest wrote it."""

    from_guest_frames: int
    from_guest_bytes: int
    to_guest_frames: int
    to_guest_bytes: int


def link_counters(namespace: Namespace, interface: str) -> LinkCounters:
    """The counters of ``interface``, bytes with the Ethernet header. Raises NamespaceError without one."""
    (link,) = json.loads(namespace.run(["ip", "-s", "-j", "link", "show", "dev", interface]).stdout)
    received, sent = link["stats64"]["rx"], link["stats64"]["tx"]
    return LinkCounters(received["packets"], received["bytes"], sent["packets"], sent["bytes"])
