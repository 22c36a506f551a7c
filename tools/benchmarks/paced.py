"""``paced``: frames at a steady rate from one guest to another, with back-ends that sleep in between, or do not.

One thread is both guests' driver (ring/core/driver_pace.inl). vdev waits for kicks, as it does by default; the testpmd
that it is held against knows nothing but polling, so its processor is always busy: what it gains by that is latency.
"""

import contextlib
import time

from benchmarks.figures import Figure
from benchmarks.lan import Driver
from benchmarks.parts import NetVhost, PollingSide, Run, Vdev
from benchmarks.polling import arrived, circling, switch, switch_devices
from benchmarks.quiet import Watch, cpu_seconds, thread_ids
from benchmarks.results import Outcome
from benchmarks.rounds import Sample, Side, interleave

SIZE = 64
PACES = (100_000, 500_000)  # frames a second
SECONDS = 0.3
RING = 256  # descriptors
PREFIX = "020000000002" "020000000001" "88b5"  # from the first guest to the second
MEGABYTES = 16  # of each guest


class Paced(Side):
    """A back-end and the driver of two guests on it."""

    def __init__(self, backend: Vdev | NetVhost, load: Driver) -> None:
        self.name, self.pids = backend.name, (load.pid, backend.pid)
        self._backend, self._load = backend.pid, load

    def sample(self, seconds: float) -> tuple[Sample, float]:
        before, began, busy = self._load.loads()["receive"], time.monotonic(), cpu_seconds(self._backend)
        watch = Watch(thread_ids(self._load.pid))
        time.sleep(seconds)
        disturbance = watch.disturbance()
        after, took, busy = (self._load.loads()["receive"], time.monotonic() - began,
                             cpu_seconds(self._backend) - busy)
        frames = after["frames"] - before["frames"]
        times = {int(ns): count - before["latencies"].get(ns, 0) for ns, count in after["latencies"].items()}
        p50, p99 = (weighted_percentile(times, share) / 1000 for share in (0.5, 0.99))
        return {"rate": frames / took, "cost": busy / frames * 1e6, "share": 100 * busy / took, "p50": p50,
                "p99": p99}, disturbance


def weighted_percentile(counts: dict[int, int], share: float) -> int:
    """The smallest value that at least ``share`` (0 to 1) of all do not exceed; counts: value -> how many. Raises
    ValueError for none."""
    left = share * sum(counts.values())
    for value, count in sorted(counts.items()):
        left -= count
        if left <= 0 < count:
            return value
    raise ValueError("nothing was counted")


def tenth_of_maximum(run: Run) -> int:
    """A tenth of the frames a second that a vdev forwards which polls."""
    paths = [run.socket(), run.socket()]
    with contextlib.ExitStack() as stack:
        backend = stack.enter_context(switch(run, paths))
        load = stack.enter_context(circling(run, paths, "split", SIZE))
        return round(PollingSide(backend, load, arrived).sample(SECONDS)[0]["rate"] / 10)


def paced(run: Run) -> Outcome:
    """Frames at a steady rate between two guests: processor time and latency, against a testpmd that polls."""
    figures: list[Figure] = []
    tenth = None if run.quick else tenth_of_maximum(run)
    for pace in PACES[:1] if run.quick else (*PACES, *([tenth] if tenth else [])):
        ours, theirs = [run.socket(), run.socket()], [run.socket(), run.socket()]
        with contextlib.ExitStack() as stack:
            sides = []
            for backend, paths in ((stack.enter_context(Vdev(run, switch_devices(ours))), ours),
                                   (stack.enter_context(NetVhost(run, theirs, "io")), theirs)):
                transmit = {"frame_bytes": SIZE, "batch": 1, "full": False, "stall_ms": 0, "prefix": PREFIX,
                            "interval_ns": 10**9 // pace}
                partner = {"path": paths[1], "frame_bytes": 1524, "full": False, "prefix": PREFIX}
                load = stack.enter_context(Driver(run, paths[0], RING, MEGABYTES, transmit=transmit,
                                                  partner=partner))
                sides.append(Paced(backend, load))
                sides[-1].freeze()
            samples = interleave(sides, run.count(7, 3), SECONDS)
        subject = f"{SIZE} B, {pace // 1000} kpps" + (", a tenth of the most" if pace == tenth else "")
        limit = 30 if pace == tenth else None
        figures += [samples.figure(subject, "share", "% of a core", "testpmd", limit=limit),
                    *(samples.figure(subject, quantity, unit, "testpmd")
                      for quantity, unit in (("cost", "us/frame"), ("p50", "us"), ("p99", "us"))),
                    samples.figure(subject, "rate", "frames/s", "testpmd", more_is_better=True)]
    return Outcome("paced", "testpmd io between two net_vhost, which polls", tuple(figures))
