"""A figure: samples of vdev and of a peer that were taken in turn, and what may be said of them.

The ratio is that of the two medians. Its spread is the middle half of the ratios round by round: what one would have
read on another day is more likely inside than outside.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """What was measured of one thing on both sides.

    subject: e.g. ``64 B, split``. quantity: ``rate``, ``cost``, ... unit: of the samples. ours, peer: the samples,
    round by round. more_is_better: of the samples, hence of the ratio ours : peer. target: the ratio at least (at most,
    where less is better) wanted, None: none. limit: the most that our median may be, in ``unit``. thrown_away: samples
    that somebody disturbed. kept: rounds that were disturbed at each attempt, whose best sample counts all the same.
    """

    subject: str
    quantity: str
    unit: str
    ours: tuple[float, ...]
    peer: tuple[float, ...]
    more_is_better: bool = False
    target: float | None = None
    limit: float | None = None
    thrown_away: int = 0
    kept: int = 0
    notes: tuple[str, ...] = ()

    @property
    def median(self) -> float:
        """Ours."""
        return statistics.median(self.ours)

    @property
    def peer_median(self) -> float:
        """The peer's."""
        return statistics.median(self.peer)

    @property
    def ratio(self) -> float | None:
        """That of the medians, ours : peer; None where the peer's is zero."""
        return self.median / self.peer_median if self.peer_median else None

    @property
    def quartiles(self) -> tuple[float, float] | None:
        """The middle half of the ratios round by round; None with fewer than two rounds."""
        ratios = [a / b for a, b in zip(self.ours, self.peer, strict=True) if b]
        if len(ratios) < 2:
            return None
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return low, high

    @property
    def met(self) -> bool | None:
        """Is the target met, and our median within its limit? None: there is neither."""
        verdicts = []
        if self.target is not None and self.ratio is not None:
            verdicts.append(self.ratio >= self.target if self.more_is_better else self.ratio <= self.target)
        if self.limit is not None:
            verdicts.append(self.median <= self.limit)
        return all(verdicts) if verdicts else None

    @property
    def samples(self) -> int:
        """How many there are, of both sides."""
        return len(self.ours) + len(self.peer)

    @property
    def doubtful(self) -> bool:
        """Is it mostly made of disturbed samples?"""
        return 2 * self.kept > self.samples

    def as_json(self) -> dict:
        """For the results file: the samples, and for people who read it what follows from them."""
        return {"subject": self.subject, "quantity": self.quantity, "unit": self.unit,
                "vdev": rounded(self.median), "peer": rounded(self.peer_median), "ratio": rounded(self.ratio),
                "ratio_quartiles": self.quartiles and [rounded(end) for end in self.quartiles],
                "more_is_better": self.more_is_better, "target": self.target, "limit": self.limit, "met": self.met,
                "samples_vdev": [rounded(sample) for sample in self.ours],
                "samples_peer": [rounded(sample) for sample in self.peer],
                "thrown_away": self.thrown_away, "kept_though_disturbed": self.kept, "notes": list(self.notes)}

    @classmethod
    def from_json(cls, fields: dict) -> "Figure":
        """From the results file. Raises KeyError."""
        return cls(fields["subject"], fields["quantity"], fields["unit"], tuple(fields["samples_vdev"]),
                   tuple(fields["samples_peer"]), fields["more_is_better"], fields["target"], fields["limit"],
                   fields["thrown_away"], fields["kept_though_disturbed"], tuple(fields["notes"]))


def rounded(value: float | None, digits: int = 5) -> float | None:
    """To so many significant digits: more are noise, and make the file longer."""
    return None if value is None else float(f"{value:.{digits}g}")


def percentile(samples: Sequence[float], share: float) -> float:
    """The smallest sample that at least ``share`` (0 to 1) of them do not exceed. Raises ValueError for none."""
    if not samples:
        raise ValueError("no samples")
    ordered = sorted(samples)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]
