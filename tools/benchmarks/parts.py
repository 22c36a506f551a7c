"""What comparisons are built of: a run with its options, back-ends, and the side of a back-end under a load that polls.

The back-end has the first processor of this machine, its load the second: a sample tells of the back-end alone.
"""

import contextlib
import itertools
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from benchmarks.quiet import Watch, cpu_seconds, pin, thread_ids
from benchmarks.rounds import SETTLE, Sample, Side

from vdev.testing.daemon import Daemon
from vdev.testing.netns import Namespace
from vdev.testing.process import TIED
from vdev.testing.testpmd import Counters, Forwarder, Placement, Rings
from vdev.testing.waiting import wait_until

PROJECT = Path(__file__).resolve().parents[2]
RING_SIZE = 1024
MEMORY = 512  # MiB of a testpmd: 128 MiB of buffers, as they lie in its memory, and room
SATURATED = 0.95
POLLING = ("--poll-us", "always")  # options of a vdev that never sleeps
_sockets = itertools.count(1)


def processors() -> tuple[int, int]:
    """(the back-end's, the load's)."""
    first, *others = sorted(os.sched_getaffinity(0))
    return first, (others or [first])[0]


class NotHere(Exception):
    """A comparison cannot be made on this machine or with this build. One line: what is missing."""


@dataclass
class Run:
    """One comparison of one call of tools/bench. folder: for sockets. rounds: None: as many as the comparison thinks
    right. commands: of all programs started, for the results file."""

    folder: Path
    quick: bool = False
    rounds: int | None = None
    huge: bool = False
    qemu: str | None = None
    commands: list[str] = field(default_factory=list)

    def count(self, full: int, quick: int) -> int:
        """Rounds, or whatever else there is less of in a quick run."""
        return self.rounds or (quick if self.quick else full)

    def socket(self) -> str:
        """A new path for a socket."""
        return str(self.folder / f"{next(_sockets)}.sock")

    def started(self, command: Sequence[str]) -> None:
        """Remember the command of a program, without what belongs to this machine."""
        words = [re.sub(r"^.*/(python)[\d.]*$", r"\1", word) for word in command]
        words = words[words.index("--", words.index("setpriv")) + 1:] if "setpriv" in words else words
        text = shlex.join(words).replace(f"{self.folder}/", "").replace(f"{PROJECT}/", "")
        text = text.replace(str(Path.home()), "~")
        text = re.sub(r"--file-prefix=\S+ | --ready-fd \d+", "", text)
        if text not in self.commands:
            self.commands.append(text)

    def placement(self, cpu: int) -> Placement:
        """A testpmd that polls on ``cpu``; its prompt sleeps there too."""
        return Placement(cpu, cpu, self.huge, MEMORY)


class Account(NamedTuple):
    """What a back-end has done so far. frames: None where only its load can tell. busy: seconds of a processor."""

    frames: int | None
    busy: float


class Vdev:
    """vdev as a back-end; a context manager. arguments: of its command line."""

    name = "vdev"

    def __init__(self, run: Run, arguments: Sequence[str], namespace: Namespace | None = None) -> None:
        self.daemon = Daemon([*arguments, "--log-level", "info"], namespace=namespace)
        self.pid = self.daemon.child.pid
        self.polls = "--poll-us" in arguments
        run.started(self.daemon.child.command)
        pin(self.pid, processors()[0])

    def account(self) -> Account:
        """By the processor time of the whole process: of a worker that polls, that is more than it works."""
        return Account(None, cpu_seconds(self.pid))

    def sessions(self) -> list[dict]:
        """What it said at the ends of sessions so far."""
        return self.daemon.events("session-end")

    def __enter__(self) -> "Vdev":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        # What it is measured for is over: how it ends is for the tests.
        self.daemon.child.stop()


class NetVhost:
    """DPDK's testpmd as a back-end, one vhost port a socket; a context manager. others: further ports (--vdev)."""

    name = "testpmd"

    def __init__(self, run: Run, sockets: Sequence[str], mode: str, others: Sequence[str] = (),
                 namespace: Namespace | None = None, options: Sequence[str] = ()) -> None:
        devices = [f"net_vhost{number},iface={path},queues=1" for number, path in enumerate(sockets)]
        self.testpmd = Forwarder([*devices, *others], mode=mode, ring_size=RING_SIZE,
                                 placement=run.placement(processors()[0]), namespace=namespace,
                                 options=["--record-core-cycles", "--burst=32", *options])
        self.pid = self.testpmd.child.pid
        run.started(self.testpmd.child.command)
        self.testpmd.start()

    def account(self) -> Account:
        """By its own time stamps around bursts that moved frames. Of those it forwards, what it could send."""
        counters = self.testpmd.counters()
        return Account(counters.sent or counters.received, counters.busy_seconds)

    def __enter__(self) -> "NetVhost":
        return self

    def __exit__(self, *_: object) -> None:
        self.testpmd.stop()


def front_end(run: Run, paths: Sequence[str], mode: str, rings: Rings, options: Sequence[str] = (),
              macs: Sequence[str] = ()) -> Forwarder:
    """A load: testpmd as driver of a device on each of ``paths``, on the load's processor."""
    devices = [rings.front_end(number, path, mac=macs[number] if macs else None) for number, path in enumerate(paths)]
    testpmd = Forwarder(devices, mode=mode, ring_size=rings.size, placement=run.placement(processors()[1]),
                        buffers=65536, options=["--record-core-cycles", "--burst=32", *options])
    run.started(testpmd.child.command)
    return testpmd


class PollingSide(Side):
    """A back-end under a load that polls.

    A sample has ``rate`` (frames a second, counted by the load), ``cost`` (nanoseconds of a processor that the back-end
    is busy for a frame), ``backend_busy`` and ``load_busy`` (shares of a processor).
    count: what of the load's counters is a frame that went through.
    """

    def __init__(self, backend: Vdev | NetVhost, load: Forwarder, count: Callable[[Counters], int]) -> None:
        self.name = backend.name
        self.pids = (backend.pid, load.child.pid)
        self.backend, self.load, self._count = backend, load, count

    def sample(self, seconds: float) -> tuple[Sample, float]:
        before, began, load_before = self.backend.account(), time.monotonic(), self.load.counters()
        watch = Watch(thread for pid in self.pids for thread in thread_ids(pid))
        time.sleep(seconds)
        disturbance = watch.disturbance()
        after, ended, load_after = self.backend.account(), time.monotonic(), self.load.counters()
        loaded = load_after.since(load_before)
        frames = self._count(loaded)
        own_frames = frames if after.frames is None else after.frames - before.frames
        busy = after.busy - before.busy
        if not frames or not own_frames:
            raise RuntimeError(f"no frame went through {self.name} in {seconds:g} s:\n{self.load.said[-800:]}")
        return {"rate": frames / (ended - began), "cost": busy / own_frames * 1e9,
                "backend_busy": busy / (ended - began), "load_busy": load_busy(loaded, ended - began)}, disturbance


class SessionSide(Side):
    """As PollingSide, for a vdev that polls: each sample is a session of its own, of a load that ``connect`` starts.

    A worker that polls is always busy, so its cost are the cycles of bursts that moved frames, which it counts itself
    and tells at the end of a session. A worker that was stopped in the middle of a burst would count that, too.
    """

    attempts = 3  # each takes seconds

    def __init__(self, backend: Vdev, connect: Callable[[], Forwarder], count: Callable[[Counters], int]) -> None:
        self.name, self.pids = backend.name, (backend.pid,)
        self.backend, self._connect, self._count = backend, connect, count

    def sample(self, seconds: float) -> tuple[Sample, float]:
        before = len(self.backend.sessions())
        with self._connect() as load:
            time.sleep(SETTLE)
            sample, disturbance = PollingSide(self.backend, load, self._count).sample(seconds)
            hertz, guests = load.counters().hertz, len(load.devices)
        wait_until(lambda: len(self.backend.sessions()) >= before + guests, "the ends of the sessions")
        cycles, frames = counted_cycles(self.backend.sessions()[before:])
        sample["cost"] = cycles / frames / hertz * 1e9
        sample["backend_busy"] = sample["cost"] * sample["rate"] / 1e9
        return sample, disturbance


def counted_cycles(ends: Sequence[dict]) -> tuple[int, int]:
    """(cycles, frames) of sessions that have ended: of both directions, and the frames that arrived at a guest, or else
    at a port, a null port included."""
    sent = sum(end["from_guest"]["frames"] + end["from_guest"]["dropped"].get("null", 0) for end in ends)
    return sum(sum(end["cycles"].values()) for end in ends), sum(end["to_guest"]["frames"] for end in ends) or sent


def load_busy(loaded: Counters, seconds: float) -> float:
    """The share of its time that a testpmd was busy with frames that got through. A sender that finds the ring full
    makes frames in vain, and could do more."""
    offered = loaded.sent + loaded.dropped
    return loaded.busy_seconds / seconds * (loaded.sent / offered if offered else 1.0)


@contextlib.contextmanager
def spinning(cpu: int) -> Iterator[int]:
    """``cpu`` busy with nothing meanwhile -> the process id of what keeps it so."""
    child = subprocess.Popen([*TIED, "taskset", "-c", str(cpu), sys.executable, "-c", "while True: pass"])
    try:
        yield child.pid
    finally:
        child.kill()
        child.wait()
