"""Results as a table: for a terminal, and for docs/performance.md."""

from collections.abc import Iterator
from pathlib import Path

from benchmarks.figures import Figure
from benchmarks.results import Outcome, Results

BEGIN, END = "<!-- begin: written by tools/bench -->", "<!-- end: written by tools/bench -->"
VERDICTS = {True: "yes", False: "**no**", None: ""}
TERMINAL = {True: "yes", False: "NO", None: ""}


def number(value: float | None) -> str:
    """Three digits that matter."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def wanted(figure: Figure) -> str:
    """The target, in words."""
    words = []
    if figure.target is not None:
        words.append(f"{'at least' if figure.more_is_better else 'at most'} {figure.target:g}")
    if figure.limit is not None:
        words.append(f"under {figure.limit:g} {figure.unit}")
    return ", ".join(words)


def verdict(figure: Figure, words: dict[bool | None, str]) -> str:
    """Was the target met? With a question mark where most samples were disturbed."""
    return words[figure.met] + ("?" if figure.met is not None and figure.doubtful else "")


def spread(figure: Figure) -> str:
    """The middle half of the ratios."""
    if figure.quartiles is None:
        return ""
    low, high = figure.quartiles
    return f"{low:.2f} to {high:.2f}"


def ratio(figure: Figure) -> str:
    """Ours : the peer's."""
    return "-" if figure.ratio is None else f"{figure.ratio:.2f}" if figure.ratio >= 0.01 else number(figure.ratio)


def lines(outcome: Outcome) -> Iterator[str]:
    """For a terminal."""
    if outcome.missing:
        yield f"{outcome.name}: not measured: {outcome.missing}"
        return
    yield f"{outcome.name}, against {outcome.peer}"
    yield (f"  {'':44}{'vdev':>9}{'peer':>9}  {'unit':17}{'ratio':>6}  {'middle half':15}{'target':23}met")
    for figure in outcome.figures:
        what = f"{figure.quantity}, {figure.subject}"
        yield (f"  {what:44}{number(figure.median):>9}{number(figure.peer_median):>9}  {figure.unit:17}"
               f"{ratio(figure):>6}  {spread(figure):15}{wanted(figure):23}{verdict(figure, TERMINAL)}").rstrip()
        yield from (f"    {note}" for note in figure.notes)
        if figure.thrown_away:
            yield (f"    {figure.thrown_away} disturbed samples thrown away"
                   + (f", {figure.kept} of {figure.samples} kept for want of better" if figure.kept else ""))
    yield from (f"  {note}" for note in outcome.notes)


def markdown(results: Results) -> str:
    """The part of docs/performance.md that is written by this program, marks included."""
    machine = results.machine
    vdev = machine["vdev"]
    changed = ", with changes since" if vdev["changed_since"] else ""
    about = (f"Taken on {machine['date'][:10]} at commit `{(vdev['commit'] or 'unknown')[:12]}`{changed}: "
             f"{machine['processor']}, {machine['processors']} processors, Linux {machine['kernel']}, "
             f"DPDK {machine['dpdk']}, {machine['mode']} run, load average before it {machine['load_average']:.2f}.")
    rows = ["| comparison | what | vdev | peer | unit | ratio | middle half | target | met | disturbed |",
            "|---|---|---:|---:|---|---:|---|---|---|---|"]
    notes = []
    for outcome in results.outcomes:
        if outcome.missing:
            notes.append(f"- {outcome.name}: not measured: {outcome.missing}.")
            continue
        for figure in outcome.figures:
            rows.append(f"| {outcome.name} | {figure.quantity}, {figure.subject} | {number(figure.median)} | "
                        f"{number(figure.peer_median)} | {figure.unit} | {ratio(figure)} | {spread(figure)} | "
                        f"{wanted(figure)} | {verdict(figure, VERDICTS)} | "
                        f"{f'{figure.kept} of {figure.samples}' if figure.kept else ''} |")
            notes += [f"- {outcome.name}, {figure.quantity}, {figure.subject}: {note}." for note in figure.notes]
        notes += [f"- {outcome.name}: {note}." for note in outcome.notes]
    thrown = max((figure.thrown_away for outcome in results.outcomes for figure in outcome.figures), default=0)
    notes.append(f"- Disturbed samples thrown away for one figure: at most {thrown}.")
    return "\n".join([BEGIN, "", about, "", *rows, "", *notes, "", END])


class PageError(Exception):
    """A page lacks the marks between which the table belongs. One line."""


def with_table(page: str, results: Results) -> str:
    """``page`` with its table made anew. Raises PageError."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise PageError(f"no lines {BEGIN!r} and {END!r} to put the table between")
    return before + markdown(results) + after


def write_page(path: Path, results: Results) -> None:
    """Make the table in the document ``path`` anew. Raises PageError, OSError."""
    path.write_text(with_table(path.read_text(), results))
