"""What tools/bench can compare, in the order in which it does."""

import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from benchmarks import guest, paced, polling, ring_formats, start, tap
from benchmarks.parts import NotHere, Run
from benchmarks.results import Outcome

from vdev.testing.testpmd import why_no_testpmd

# Of a back-end and a load on both sides, and a third crowd in one comparison.
HUGE_MEGABYTES = 3072


class UnknownComparison(Exception):
    """There is none of that name. One line."""


@dataclass(frozen=True)
class Comparison:
    """run: makes it. quick: is it part of a quick run? testpmd: does it need DPDK's?"""

    name: str
    run: Callable[[Run], Outcome]
    quick: bool = True
    testpmd: bool = True

    @property
    def about(self) -> str:
        """One line."""
        return self.run.__doc__.strip().splitlines()[0]

    def outcome(self, run: Run) -> Outcome:
        """Make it; what this machine or this build lacks, or what went wrong, is said in the outcome."""
        try:
            reason = why_no_testpmd() if self.testpmd else None
            if reason:
                raise NotHere(reason)
            return replace(self.run(run), commands=tuple(run.commands))
        except NotHere as reason:
            return Outcome(self.name, "", missing=str(reason))
        except Exception as error:  # the others go on
            traceback.print_exc()
            return Outcome(self.name, "", missing=f"it failed: {' '.join(str(error).split())[:200] or repr(error)}")


COMPARISONS = {comparison.name: comparison for comparison in (
    Comparison("start", start.start),
    Comparison("drop", polling.drop),
    Comparison("rings", ring_formats.rings, quick=False, testpmd=False),
    Comparison("tap-ceiling", tap.tap_ceiling),
    Comparison("net_tap", tap.net_tap),
    Comparison("guest-to-guest", polling.guest_to_guest),
    Comparison("paced", paced.paced, quick=False),
    Comparison("many", polling.many, quick=False),
    Comparison("guest", guest.guest, quick=False, testpmd=False),
    Comparison("idle", guest.idle, quick=False),
    Comparison("memory", guest.memory, quick=False),
)}


def choose(names: Sequence[str], quick: bool) -> list[Comparison]:
    """Those named, else all, or those of a quick run. Raises UnknownComparison."""
    unknown = [name for name in names if name not in COMPARISONS]
    if unknown:
        raise UnknownComparison(f"no comparison {', '.join(unknown)}; there are {', '.join(COMPARISONS)}")
    return [comparison for comparison in COMPARISONS.values()
            if (comparison.name in names if names else comparison.quick or not quick)]


def listing() -> Iterator[str]:
    """A line a comparison."""
    for comparison in COMPARISONS.values():
        yield f"{comparison.name:16}{comparison.about}{'' if comparison.quick else ' (not in a quick run)'}"
