"""What came of the rows: for a person, as JSON, as JUnit's XML."""

import json
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from xml.etree import ElementTree

from vdev.conformance.table import SECTIONS, rows, section
from vdev.conformance.verdict import Result, Verdict

_WIDTH = 110
_OBLIGED = ("MUST", "MUST NOT")


def violated(results: Sequence[Result]) -> bool:
    """Has a MUST or MUST NOT failed?"""
    return any(result.verdict is Verdict.FAIL and rows()[result.row].level in _OBLIGED for result in results)


def table(results: Sequence[Result]) -> Iterator[str]:
    """Lines: verdicts counted by section."""
    counts = {name: Counter(result.verdict for result in results if section(result.row) == name) for name in SECTIONS}
    heads = [verdict.value for verdict in Verdict]
    yield f"{'section':12}" + "".join(f"{head:>15}" for head in heads)
    for name, count in counts.items():
        if count:
            yield f"{name:12}" + "".join(f"{count[verdict] or '.':>15}" for verdict in Verdict)
    total = Counter(result.verdict for result in results)
    yield f"{'all':12}" + "".join(f"{total[verdict]:>15}" for verdict in Verdict)


def story(result: Result) -> Iterator[str]:
    """Lines about a row that failed: what is asked and where, what was done, what came of it."""
    row = rows()[result.row]
    yield f"{row.id}: {row.level}, {row.section}"
    for head, text in (("asked", f"{row.requirement} ({row.applies_when})"), ("done", result.did),
                       ("seen", result.came)):
        yield from textwrap.wrap(text, _WIDTH, initial_indent=f"  {head:7}", subsequent_indent=" " * 9)
    for line in result.trace:
        yield f"         | {line}"


def text(results: Sequence[Result]) -> Iterator[str]:
    """Lines for a person: the table, then the failures."""
    yield from table(results)
    failed = [result for result in results if result.verdict is Verdict.FAIL]
    for result in failed:
        yield ""
        yield from story(result)
    yield ""
    musts = sum(rows()[result.row].level in _OBLIGED for result in failed)
    others = len(failed) - musts
    yield (f"{len(results)} rows: {musts} that MUST be so {'is' if musts == 1 else 'are'} not, and "
           f"{others} that SHOULD or MAY")


def entry(result: Result) -> dict:
    """A result as JSON has it."""
    row = rows()[result.row]
    return {"row": row.id, "section": section(row.id), "level": row.level, "requirement": row.requirement,
            "specification": row.section, "verdict": result.verdict.value, "did": result.did, "came": result.came,
            "trace": list(result.trace), "seconds": round(result.seconds, 3)}


def as_json(target: dict, results: Sequence[Result]) -> str:
    """``target`` (what was looked at) and all rows as one JSON object."""
    return json.dumps({**target, "rows": [entry(result) for result in results]}, indent=1)


def as_junit(results: Sequence[Result]) -> str:
    """A test case a row; a row without a verdict is one that was skipped."""
    suite = ElementTree.Element("testsuite", name="vdev check", tests=str(len(results)))
    skipped = 0
    for result in results:
        case = ElementTree.SubElement(suite, "testcase", classname=section(result.row), name=result.row,
                                      time=f"{result.seconds:.3f}")
        if result.verdict is Verdict.FAIL:
            ElementTree.SubElement(case, "failure", message=result.came).text = "\n".join(story(result))
        elif result.verdict is not Verdict.PASS:
            skipped += 1
            ElementTree.SubElement(case, "skipped", message=f"{result.verdict.value}: {result.came}")
    suite.set("failures", str(sum(result.verdict is Verdict.FAIL for result in results)))
    suite.set("skipped", str(skipped))
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True)
