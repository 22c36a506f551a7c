"""SECURITY.md: every promise names what holds it, and that exists."""

import re
from functools import cache
from pathlib import Path

import pytest

from vdev.testing import rows

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "SECURITY.md"
if not PAGE.exists():
    pytest.skip("SECURITY.md belongs to a source tree, and there is none here", allow_module_level=True)

ID = re.compile(r"\b[PRNF]\d{2,3}\b")


def promises() -> list[tuple[str, str]]:
    """(promise, what holds it): the rows of the tables that have these two columns."""
    tables = re.findall(r"^\| promised \| held by \|\n\|---\|---\|\n((?:\|.*\|\n)+)", PAGE.read_text(), re.MULTILINE)
    assert len(tables) == 5
    return [tuple(cell.strip() for cell in line.strip("|").split(" | ")) for table in tables
            for line in table.splitlines()]


@cache
def ids_of_tests() -> set[str]:
    """The ids that names of tests carry, those of programs in C included."""
    names = [name for path in (ROOT / "tests").glob("test_*.py")
             for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)]
    names += [f"test_{name}" for path in (ROOT / "tests" / "c").glob("*.c")
              for name in re.findall(r"\b[A-Z]\d{2,3}(?:_[A-Z]\d{2,3})*_\w+", path.read_text())]
    return {id for name in names for id in rows.named(name)}


def test_every_promise_names_what_holds_it() -> None:
    assert len(promises()) > 20
    silent = [promise for promise, held in promises() if not ID.search(held) and "`tests/test_" not in held]
    assert silent == []


def test_every_id_is_a_test() -> None:
    cited = set(ID.findall(PAGE.read_text()))
    assert len(cited) > 40
    assert cited - ids_of_tests() == set()


def test_every_file_exists() -> None:
    files = re.findall(r"`((?:tests|tools|docs)/[\w./-]+)`", PAGE.read_text())
    assert len(files) > 10
    assert [file for file in files if not (ROOT / file).exists()] == []


def test_an_id_nobody_tests_is_noticed() -> None:
    assert "P999" not in ids_of_tests() and {"P48", "R26", "F25"} <= ids_of_tests()
