"""Samples of several sides taken in turn: what slows the machine down for a while slows all of them down.

A side that is not being measured is stopped (SIGSTOP) with all it consists of, so that two that poll do not share a
processor. Which side begins changes from round to round.
"""

import contextlib
import os
import signal
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from benchmarks.figures import Figure

SETTLE = 0.05  # seconds between waking a side and measuring it

Sample = dict[str, float]  # quantity -> value


class Side(ABC):
    """One of the things compared. name: ``vdev`` or the peer's. pids: the processes it consists of. attempts: how many
    for a sample that nobody disturbs."""

    name: str
    pids: tuple[int, ...] = ()
    attempts = 8

    @abstractmethod
    def sample(self, seconds: float) -> tuple[Sample, float]:
        """Measure for about so long -> what was found, and how much somebody disturbed it: 0.0, not at all."""

    def freeze(self) -> None:
        """Stop where it stands."""
        for pid in self.pids:
            stand_still(pid)

    def thaw(self) -> None:
        """Go on from there."""
        for pid in self.pids:
            go_on(pid)


def stand_still(pid: int) -> None:
    """Stop a process where it is; one that has ended is left in peace."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)


def go_on(pid: int) -> None:
    """Let it run again."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def frozen(sides: Sequence[Side]) -> Iterator[None]:
    """All of them stopped meanwhile; they go on at the end, however that comes."""
    try:
        for side in sides:
            side.freeze()
        yield
    finally:
        for side in sides:
            side.thaw()


@dataclass
class Samples:
    """What rounds gave: side -> quantity -> a value a round; for each side how many samples were thrown away, and how
    many are disturbed ones that were kept because every attempt was."""

    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    thrown_away: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)

    def of(self, side: str, quantity: str) -> tuple[float, ...]:
        """One row."""
        return tuple(self.values[side][quantity])

    def figure(self, subject: str, quantity: str, unit: str, peer: str, scale: float = 1.0, ours: str = "vdev",
               **about: object) -> Figure:
        """What the rounds say of ``quantity``, each sample times ``scale``; ``about`` as Figure has it."""
        rows = (tuple(value * scale for value in self.of(side, quantity)) for side in (ours, peer))
        return Figure(subject, quantity, unit, *rows, thrown_away=self.thrown_away[ours] + self.thrown_away[peer],
                      kept=self.kept[ours] + self.kept[peer], **about)

    def add(self, side: str, sample: Sample) -> None:
        """One more round of ``side``."""
        for quantity, value in sample.items():
            self.values.setdefault(side, {}).setdefault(quantity, []).append(value)


def interleave(sides: Sequence[Side], rounds: int, seconds: float, into: Samples | None = None) -> Samples:
    """So many rounds, each with a sample of each side. into: samples to go on from."""
    samples = into or Samples()
    with frozen(sides):
        for number in range(rounds):
            for side in sides if number % 2 else sides[::-1]:
                sample, thrown, kept = undisturbed(side, seconds)
                samples.add(side.name, sample)
                samples.thrown_away[side.name] += thrown
                samples.kept[side.name] += kept
    return samples


def undisturbed(side: Side, seconds: float) -> tuple[Sample, int, bool]:
    """-> a sample that nobody disturbed, how many were thrown away before it, and whether it is only the one that was
    disturbed least, because there was no other."""
    taken: list[tuple[float, Sample]] = []
    for attempt in range(side.attempts):
        side.thaw()
        try:
            time.sleep(SETTLE)
            sample, disturbance = side.sample(seconds)
        finally:
            side.freeze()
        if not disturbance:
            return sample, attempt, False
        taken.append((disturbance, sample))
    return min(taken, key=lambda pair: pair[0])[1], side.attempts - 1, True
