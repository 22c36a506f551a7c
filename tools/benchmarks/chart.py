"""Results as a chart in SVG, without any library: one bar a figure, how much better than the peer vdev is.

A bar begins at 1, as good as the peer, and grows to the right where vdev is better, on a logarithmic scale: twice as
good and half as good are equally long. The thin line is the middle half of the ratios round by round, the mark the
target.
"""

import math
from html import escape

from benchmarks.figures import Figure
from benchmarks.results import Results
from benchmarks.table import number, ratio

WIDTH = 960
LEFT, RIGHT = 330, 150  # room for what is measured, and for the numbers
ROW, HEAD, TITLE = 20, 34, 64
COLOURS = {True: "#2c7a4b", False: "#b5482f", None: "#4a6d8c"}
LEGEND = (("#2c7a4b", "target met"), ("#b5482f", "target missed"), ("#4a6d8c", "no target"))


def advantage(ratio_of: float, more_is_better: bool) -> float:
    """How many times as good as the peer."""
    return ratio_of if more_is_better else 1 / ratio_of


def drawable(figure: Figure) -> bool:
    """Has it a ratio that can be drawn to scale?"""
    return bool(figure.ratio)


class Scale:
    """From an advantage to a place across the chart: as wide as the widest figure asks for, up to 8 times."""

    def __init__(self, figures: list[Figure]) -> None:
        widest = max((abs(math.log2(advantage(figure.ratio, figure.more_is_better))) for figure in figures), default=1)
        self.octaves = min(3.0, max(1.0, widest * 1.1))

    def __call__(self, value: float) -> float:
        """x of ``value`` times as good; what is beyond the chart lies on its edge."""
        share = min(1.0, max(-1.0, math.log2(value) / self.octaves))
        return LEFT + (WIDTH - LEFT - RIGHT) * (1 + share) / 2

    def ticks(self) -> list[float]:
        """Values worth a line."""
        return [value for value in (1 / 8, 1 / 4, 1 / 2, 0.75, 1, 1.5, 2, 4, 8)
                if abs(math.log2(value)) <= self.octaves]


def svg(results: Results) -> str:
    """The whole picture."""
    outcomes = [outcome for outcome in results.outcomes if any(map(drawable, outcome.figures))]
    scale = Scale([figure for outcome in outcomes for figure in outcome.figures if drawable(figure)])
    body: list[str] = []
    y = TITLE
    for outcome in outcomes:
        body.append(text(12, y + 22, f"{outcome.name}, against {outcome.peer}", "bold"))
        y += HEAD
        for figure in filter(drawable, outcome.figures):
            body += row(figure, y, scale)
            y += ROW
    grid = [f'<line x1="{scale(tick):.1f}" y1="{TITLE}" x2="{scale(tick):.1f}" y2="{y + 4}" '
            f'stroke="{"#444" if tick == 1 else "#ddd"}"/>' + text(scale(tick), TITLE - 6, f"{tick:g}", anchor="middle")
            for tick in scale.ticks()]
    height = y + 24
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="sans-serif" font-size="12" fill="#222">',
        '<rect width="100%" height="100%" fill="white"/>',
        text(12, 20, "vdev beside its peers: how many times as good (right of 1: better)", "bold"),
        *legend(), *grid, *body, "</svg>", ""])


def legend() -> list[str]:
    """What the colours say."""
    parts = []
    for number_of, (colour, words) in enumerate(LEGEND):
        x = 12 + 110 * number_of
        parts += [f'<rect x="{x}" y="32" width="10" height="10" fill="{colour}"/>', text(x + 14, 41, words)]
    return [*parts, text(12 + 110 * len(LEGEND), 41, "pale: most samples were disturbed")]


def row(figure: Figure, y: float, scale: Scale) -> list[str]:
    """Label, bar, spread, target and numbers of one figure."""
    one, end = scale(1), scale(advantage(figure.ratio, figure.more_is_better))
    middle = y + ROW / 2
    parts = [text(LEFT - 8, middle + 4, f"{figure.quantity}, {figure.subject}", anchor="end"),
             f'<rect x="{min(one, end):.1f}" y="{y + 4}" width="{max(1.0, abs(end - one)):.1f}" height="{ROW - 8}" '
             f'fill="{COLOURS[figure.met]}" fill-opacity="{0.4 if figure.doubtful else 1}"/>',
             text(WIDTH - RIGHT + 8, middle + 4,
                  f"{ratio(figure)}  ({number(figure.median)} : {number(figure.peer_median)})")]
    if figure.quartiles and all(figure.quartiles):
        low, high = (scale(advantage(value, figure.more_is_better)) for value in figure.quartiles)
        parts.append(f'<line x1="{low:.1f}" y1="{middle}" x2="{high:.1f}" y2="{middle}" stroke="#000" '
                     'stroke-width="2"/>')
    if figure.target:
        at = scale(advantage(figure.target, figure.more_is_better))
        parts.append(f'<line x1="{at:.1f}" y1="{y + 1}" x2="{at:.1f}" y2="{y + ROW - 1}" stroke="#c80" '
                     'stroke-width="2"/>')
    return parts


def text(x: float, y: float, words: str, weight: str = "normal", anchor: str = "start") -> str:
    """A line of text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}">{escape(words)}</text>'
