"""Comparisons with a Linux guest that QEMU emulates.

- ``guest``: a guest on vdev and a TAP beside one on QEMU's built-in virtio-net and a TAP of the same kind.
- ``idle``, ``memory``: what vdev takes while its guest does nothing, beside a testpmd with a vhost port.

The guests' processors are on the second processor, everything that serves them is on the first, alike for both. Threads
share processors here by design, so a sample is thrown away for what others used, not for preemption.
"""

import contextlib
import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.figures import Figure, percentile
from benchmarks.lan import add_tap, namespace
from benchmarks.parts import PROJECT, NetVhost, NotHere, Run, Vdev, front_end, processors
from benchmarks.quiet import Foreign, cpu_seconds, pin
from benchmarks.results import Outcome
from benchmarks.rounds import Sample, Samples, Side, interleave

from vdev.qemu import QemuError, qemu_args
from vdev.testing.guest import Image, LinuxGuest
from vdev.testing.measure import link_counters, ping_command, round_trips, tcp
from vdev.testing.netns import Namespace
from vdev.testing.process import Child
from vdev.testing.qemu import QemuProgram, find_program, tap_args
from vdev.testing.testpmd import Rings
from vdev.testing.waiting import wait_until

HOSTS = {"vdev": "10.9.1.1", "peer": "10.9.2.1", "polling": "10.9.3.1"}
GUESTS = {"vdev": "10.9.1.2", "peer": "10.9.2.2", "polling": "10.9.3.2"}
# What docs/usage.md recommends where a guest sends many small frames: its driver is spared kicks, which end in QEMU.
POLLING = ["--poll-us", "100"]
PINGS = 200


def made_by(tool: str) -> str:
    """What a program of tools/ prints. Raises NotHere with its reason."""
    done = subprocess.run([PROJECT / "tools" / tool], capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode:
        raise NotHere((done.stderr.strip().splitlines() or [f"{tool} failed"])[-1])
    return done.stdout


def newest_qemu(run: Run) -> QemuProgram:
    """QEMU 10, whose guests use MSI-X with both devices, or where that is not to be had the one on PATH."""
    try:
        if run.qemu:
            return find_program(run.qemu)
        try:
            return find_program(json.loads(made_by("qemu-backport"))["binary"])
        except NotHere:
            return find_program()
    except QemuError as reason:
        raise NotHere(str(reason)) from None


class GuestSide(Side):
    """A guest on the TAP that has this side's name. It is never stopped: it would miss its clock.

    everybody: the processes that are to work while a sample is taken. measures: what a sample is.
    """

    attempts = 3  # each takes seconds

    def __init__(self, name: str, guest: LinuxGuest, lan: Namespace, everybody: list[int]) -> None:
        self.name, self.guest, self.lan, self._everybody = name, guest, lan, everybody
        self.measures: Callable[[GuestSide, float], Sample] = GuestSide.udp
        place(guest)

    def sample(self, seconds: float) -> tuple[Sample, float]:
        foreign = Foreign(self._everybody)
        return self.measures(self, seconds), foreign.disturbance()

    def _frames(self) -> int:
        return link_counters(self.lan, self.name).from_guest_frames

    def udp(self, seconds: float) -> Sample:
        """Frames a second that arrive in the TAP while the guest's kernel sends as fast as it can."""
        silent = self._frames()
        self.guest.check("echo start >/proc/net/pktgen/pgctrl &")
        try:
            wait_until(lambda: self._frames() > silent + 1000, "UDP from the guest", pause=0.1)
            before, began = self._frames(), time.monotonic()
            time.sleep(seconds)
            return {"rate": (self._frames() - before) / (time.monotonic() - began)}
        finally:
            self.guest.run("echo stop >/proc/net/pktgen/pgctrl")

    def prepare_udp(self) -> None:
        """Have the guest's kernel know what to send: UDP in frames of 64 bytes. Raises NotHere where it cannot."""
        if self.guest.run("insmod /modules/pktgen.ko").status:
            raise NotHere("the guest's kernel has no packet generator (pktgen)")
        (link,) = json.loads(self.lan.run(["ip", "-j", "link", "show", "dev", self.name]).stdout)
        self.guest.check("echo add_device eth0 >/proc/net/pktgen/kpktgend_0")
        for words in ("count 0", "delay 0", "pkt_size 64", f"dst {HOSTS[self.name]}", f"dst_mac {link['address']}"):
            self.guest.check(f"echo {words} >/proc/net/pktgen/eth0")

    def tcp_to_guest(self, seconds: float) -> Sample:
        """Megabits of payload a second."""
        return {"rate": tcp(self.guest, self.lan, GUESTS[self.name], to_guest=True, seconds=seconds).megabits}

    def tcp_from_guest(self, seconds: float) -> Sample:
        """Megabits of payload a second."""
        return {"rate": tcp(self.guest, self.lan, GUESTS[self.name], to_guest=False, seconds=seconds).megabits}

    def ping(self, seconds: float) -> Sample:
        """Milliseconds of round trips from the host."""
        command = ping_command(GUESTS[self.name], PINGS, seconds / PINGS)
        times = round_trips(self.lan.run(command.split(), 30 + 2 * seconds, check=False).stdout)
        return {"p50": percentile(times, 0.5), "p99": percentile(times, 0.99)}


def place(guest: LinuxGuest) -> None:
    """QEMU on the first processor, the guest's own on the second."""
    pin(guest.qemu.child.pid, processors()[0])
    for thread in guest.qemu.qmp.execute("query-cpus-fast"):
        os.sched_setaffinity(thread["thread-id"], {processors()[1]})


@contextlib.contextmanager
def guests(run: Run) -> Iterator[tuple[QemuProgram, list[GuestSide]]]:
    """The QEMU, and the sides, up and with addresses: vdev, the peer, and a vdev that polls."""
    program, image = newest_qemu(run), Image.parse(made_by("guest-image"))
    with contextlib.ExitStack() as stack:
        lan = stack.enter_context(namespace())
        for name, address in HOSTS.items():
            add_tap(lan, name, f"{address}/24")
        paths = {"vdev": run.socket(), "polling": run.socket()}
        vdevs = [stack.enter_context(Vdev(run, ["--socket-path", path, "--port", f"tap:{name}", *options], lan))
                 for (name, path), options in zip(paths.items(), ([], POLLING), strict=True)]
        server = stack.enter_context(Child(["iperf3", "-s"], namespace=lan))
        pin(server.pid, processors()[0])
        everybody = [os.getpid(), server.pid, *(vdev.pid for vdev in vdevs)]
        sides = []
        for name in HOSTS:
            network, inside = ((tap_args("peer"), lan) if name == "peer" else
                               (qemu_args(paths[name], memory="256M", qemu=program.binary), None))
            guest = stack.enter_context(LinuxGuest(program, image, network, namespace=inside))
            run.started(guest.qemu.child.command)
            guest.set_address(f"{GUESTS[name]}/24")
            everybody.append(guest.qemu.child.pid)
            sides.append(GuestSide(name, guest, lan, everybody))
        yield program, sides


# subject, side, what is measured, quantity, unit, is more better?, target
MEASURES: Sequence[tuple[str, str, Callable[[GuestSide, float], Sample], str, str, bool, float | None]] = (
    ("UDP, 64 B, from the guest", "vdev", GuestSide.udp, "rate", "frames/s", True, None),
    (f"UDP, 64 B, from the guest, {' '.join(POLLING)}", "polling", GuestSide.udp, "rate", "frames/s", True, 1.5),
    ("TCP to the guest", "vdev", GuestSide.tcp_to_guest, "rate", "Mbit/s", True, 1.1),
    ("TCP from the guest", "vdev", GuestSide.tcp_from_guest, "rate", "Mbit/s", True, 1.0),
    ("round trip", "vdev", GuestSide.ping, "p50", "ms", False, 1.25),
    ("round trip", "vdev", GuestSide.ping, "p99", "ms", False, None))


def compared(sides: list[GuestSide], measures: Callable[[GuestSide, float], Sample], run: Run) -> Samples:
    """The same of all sides in turn."""
    for side in sides:
        side.measures = measures
        side.sample(1)  # the first one warms code translation and TCP up
    return interleave(sides, run.count(8, 2), 1 if run.quick else 2)


def guest(run: Run) -> Outcome:
    """A Linux guest under emulation: UDP, TCP both ways, round trips, against QEMU's built-in virtio-net."""
    figures: list[Figure] = []
    with guests(run) as (program, sides):
        taken, notes = {}, [str(program)]
        try:
            for side in sides:
                side.prepare_udp()
            possible = MEASURES
        except NotHere as reason:
            notes.append(str(reason))
            possible = MEASURES[2:]
        for subject, ours, measures, quantity, unit, more_is_better, target in possible:
            if measures not in taken:
                taken[measures] = compared(sides if measures is GuestSide.udp else sides[:2], measures, run)
            figures.append(taken[measures].figure(subject, quantity, unit, "peer", ours=ours,
                                                  more_is_better=more_is_better, target=target))
    return Outcome("guest", "QEMU's built-in virtio-net on a TAP", tuple(figures), notes=tuple(notes))


# --------------------------------------------------------------------------------------------- a guest at rest


class Resting(Side):
    """A back-end whose guest does nothing."""

    def __init__(self, name: str, pid: int) -> None:
        self.name, self._pid = name, pid

    def sample(self, seconds: float) -> tuple[Sample, float]:
        before, began = cpu_seconds(self._pid), time.monotonic()
        time.sleep(seconds)
        share = (cpu_seconds(self._pid) - before) / (time.monotonic() - began)
        memory_now = anonymous_megabytes(Path(f"/proc/{self._pid}/status").read_text())
        return {"share": 100 * share, "memory": memory_now}, 0.0


def anonymous_megabytes(status: str) -> float:
    """RssAnon in /proc/PID/status, in MiB."""
    return int(re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)[1]) / 1024


@contextlib.contextmanager
def resting(run: Run) -> Iterator[list[Side]]:
    """vdev with a Linux guest on a TAP, and a testpmd with one vhost port."""
    program, image = newest_qemu(run), Image.parse(made_by("guest-image"))
    with contextlib.ExitStack() as stack:
        lan = stack.enter_context(namespace())
        add_tap(lan, "vdev", f"{HOSTS['vdev']}/24")
        ours, theirs = run.socket(), run.socket()
        vdev = stack.enter_context(Vdev(run, ["--socket-path", ours, "--port", "tap:vdev"], lan))
        linux = stack.enter_context(LinuxGuest(program, image,
                                               qemu_args(ours, memory="256M", qemu=program.binary)))
        linux.set_address(f"{GUESTS['vdev']}/24")
        place(linux)
        peer = stack.enter_context(NetVhost(run, [theirs], "io"))
        stack.enter_context(front_end(run, [theirs], "io", Rings()))  # attached, and told to do nothing
        yield [Resting("vdev", vdev.pid), Resting(peer.name, peer.pid)]


def idle(run: Run) -> Outcome:
    """The share of a processor that vdev uses with a guest at rest."""
    with resting(run) as sides:
        samples = interleave(sides, run.count(3, 2), 2 if run.quick else 5)
    return Outcome("idle", "testpmd net_vhost, which polls",
                   (samples.figure("a guest attached, no traffic", "share", "% of a core", sides[1].name, limit=0.1),))


def memory(run: Run) -> Outcome:
    """Anonymous memory (RssAnon) of vdev with one guest on a TAP."""
    with resting(run) as sides:
        samples = interleave(sides, 2, 0.5)
    return Outcome("memory", "testpmd net_vhost",
                   (samples.figure("a guest on a TAP, RssAnon", "memory", "MiB", sides[1].name, limit=32),),
                   notes=("huge pages are no part of RssAnon",) if run.huge else ())
