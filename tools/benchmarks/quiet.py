"""Was somebody else at work while a sample was taken?

Two answers, for two kinds of comparisons. Where every thread has a processor to itself, :class:`Watch` sees each time
that one of them was preempted, and what the hypervisor took. Where threads share processors by design (a guest with
its back-end), :class:`Foreign` sees what processes that do not belong to the comparison used.
"""

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


def thread_ids(pid: int) -> list[int]:
    """All threads of ``pid``; none when it is gone."""
    try:
        return [int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return []


def pin(pid: int, cpu: int) -> None:
    """Have all threads of ``pid``, and those they make from now on, run on ``cpu`` only."""
    for thread in thread_ids(pid):
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(thread, {cpu})


def cpu_seconds(pid: int) -> float:
    """What all threads of ``pid`` have used of processors so far, exact to the microsecond. Raises OSError when it is
    gone."""
    # The kernel's number for that clock of another process: CPUCLOCK_SCHED, clock_getcpuclockid(3).
    return time.clock_gettime((~pid << 3) | 2)


def _texts(threads: Iterable[int], name: str) -> Iterator[str]:
    """What /proc/PID/task/TID/``name`` says of each of these threads that is there."""
    for thread in threads:
        with contextlib.suppress(OSError):
            yield Path(f"/proc/{thread}/task/{thread}/{name}").read_text()


def involuntary_switches(threads: Iterable[int]) -> int:
    """How often these threads were taken off their processors though they had more to do."""
    return sum(map(parse_involuntary, _texts(threads, "status")))


def parse_involuntary(status: str) -> int:
    """That number in /proc/PID/task/TID/status."""
    return int(status.rpartition("nonvoluntary_ctxt_switches:")[2].split()[0])


def processor_ticks(stat: str) -> tuple[int, int]:
    """From /proc/stat: (ticks all processors were busy for somebody of this machine, ticks the hypervisor took)."""
    # Interrupts are left out: what the kernel does there for our own frames is charged to no process.
    user, nice, system, _idle, _wait, _irq, _softirq, steal, *_ = map(int, stat.splitlines()[0].split()[1:])
    return user + nice + system, steal


def _processors() -> tuple[int, int]:
    return processor_ticks(Path("/proc/stat").read_text())


def parse_waited(schedstat: str) -> float:
    """Seconds a thread waited for its processor though it had something to do, in /proc/PID/task/TID/schedstat."""
    return int(schedstat.split()[1]) / 1e9


def waited_seconds(threads: Iterable[int]) -> float:
    """The same of several threads; none where the kernel keeps no such numbers."""
    return sum(map(parse_waited, _texts(threads, "schedstat")))


class Watch:
    """Looks at pinned threads from its making on."""

    LEAST = 1e-6

    def __init__(self, threads: Iterable[int]) -> None:
        self._threads = list(threads)
        self._began = time.monotonic()
        self._before = self._state()

    def _state(self) -> tuple[int, int, float]:
        return involuntary_switches(self._threads), _processors()[1], waited_seconds(self._threads)

    def disturbance(self) -> float:
        """0.0 when none of them was preempted and no processor was taken from this machine; else about the share of the
        time that this cost."""
        switches, stolen, waited = (now - before for now, before in zip(self._state(), self._before, strict=True))
        if not switches and not stolen:
            return 0.0
        return max(self.LEAST, (waited + stolen / TICKS) / (time.monotonic() - self._began))


def own_ticks(pids: Iterable[int]) -> int:
    """Ticks the processes ``pids`` and their ended children have used."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            total += sum(map(int, fields[11:15]))
    return total


class Foreign:
    """How much of a processor others used, and the hypervisor took, between start and :meth:`share`."""

    MAX = 0.05  # of one processor: more spoils a sample

    def __init__(self, pids: Iterable[int]) -> None:
        self._pids = list(pids)
        self._start = (time.monotonic(), *_processors(), own_ticks(self._pids))

    def share(self) -> float:
        """Fraction of one processor."""
        since, busy, stolen, own = self._start
        now_busy, now_stolen = _processors()
        ticks = (now_busy - busy) + (now_stolen - stolen) - (own_ticks(self._pids) - own)
        return max(0.0, ticks / TICKS / (time.monotonic() - since))

    def disturbance(self) -> float:
        """0.0 when others used no more than may be; else what they used."""
        share = self.share()
        return share if share > self.MAX else 0.0
