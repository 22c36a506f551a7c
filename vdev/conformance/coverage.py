"""What of the conformance suite's table is covered: rows with a check, and checks that a device was made to fail."""

from collections import Counter
from collections.abc import Container, Iterator

from vdev.conformance import checks, table

# Rows that no device of ours was seen to break, though some have a fault there: permissions, and what is not offered.
UNSEEN = {"RSVF-D-02", "RSVF-D-03", "RSVF-D-06", "RSVF-D-09", "RSVF-D-10", "RSVF-D-11", "VQ-SPLIT-D-02"}
HEADS = ("section", "rows", "with a check", "with a device that breaks it", "cannot be tested", "not yet")


def coverage(broken: Container[str]) -> Iterator[str]:
    """Lines of a table in Markdown, a section each and the sum. broken: rows that some device was made to break."""
    total: Counter[str] = Counter()
    yield f"| {' | '.join(HEADS)} |"
    yield "|---|" + "--:|" * (len(HEADS) - 1)
    for name in table.SECTIONS:
        counts: Counter[str] = Counter()
        for row in table.rows().values():
            if table.section(row.id) == name:
                has = row.id in checks.by_row()
                seen = has and row.id in broken and row.id not in UNSEEN
                counts.update({"rows": 1, "with a check": has, "with a device that breaks it": seen,
                               "cannot be tested": bool(row.left_out), "not yet": not has and not row.left_out})
        total += counts
        yield _line(name, counts)
    yield _line("all", total)


def _line(name: str, counts: Counter[str]) -> str:
    return f"| {name} | {' | '.join(str(counts[head] or '') for head in HEADS[1:])} |"
