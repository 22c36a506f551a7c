"""How a check can end, and how it says so."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum


class Verdict(Enum):
    """Of one row."""

    PASS = "pass"
    FAIL = "fail"
    NOT_OFFERED = "not offered"
    NOT_REACHABLE = "not reachable"
    NO_CHECK = "no check"


class Broken(Exception):
    """The back-end did not do what the row asks for; the text says what it did instead."""


class NotOffered(Exception):
    """The back-end does not offer what the row is about; the text names it."""


class NotReachable(Exception):
    """Nothing can be told from here; the text says what would be needed."""


def expect(ok: bool, came: str) -> None:
    """Raises Broken with ``came``, what the back-end did, unless ``ok``."""
    if not ok:
        raise Broken(came)


@dataclass(frozen=True)
class Result:
    """What came of one row.

    did: what the check did, for people. came: what the back-end did that is wrong, or why there is no verdict.
    trace: the last that went over the socket and the rings, oldest first, of a row that fails.
    """

    row: str
    verdict: Verdict
    did: str = ""
    came: str = ""
    trace: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class Check:
    """``run`` is about ``row``. both: it is done on split rings and, where they are offered, on packed ones."""

    row: str
    run: Callable
    both: bool = False

    @property
    def did(self) -> str:
        """In one line what it does."""
        return " ".join((self.run.__doc__ or "").split())


@dataclass
class Checks:
    """The checks of one file; :meth:`row` adds one."""

    all: list[Check] = field(default_factory=list)

    def row(self, *rows: str, both: bool = False) -> Callable:
        """The decorated function, given a Bench, is the check of ``rows``. It raises Broken, NotOffered or
        NotReachable, or returns; whatever the front-end raises is the back-end's fault as well."""
        def add(run: Callable) -> Callable:
            self.all.extend(Check(row, run, both) for row in rows)
            return run
        return add
