"""docs/memory-order.md names every access to a ring: each function of split.inl and packed.inl, each accessor in it as
often as it stands there, and tests and driver functions that exist."""

import re
from collections import Counter
from pathlib import Path

import pytest

from vdev.testing.cprograms import names_in

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs/memory-order.md"
CORE = ROOT / "ring/core"
if not DOCUMENT.exists() or not CORE.is_dir():
    pytest.skip("no source tree here: the package is installed, not checked out", allow_module_level=True)

FORMATS = ("split", "packed")
ACCESSOR = re.compile(r"\b(glance\d+|load\d+(?:_acquire)?|store\d+(?:_release)?|full_barrier|__atomic_\w+)\(")
FUNCTION = re.compile(r"^\w[^\n;]*?\b(\w+)\([^;{]*\)\n\{(.*?)^\}", re.MULTILINE | re.DOTALL)
LINE = re.compile(r"^\w[^\n;{]*?\b(\w+)\([^;{]*\) \{", re.MULTILINE)


def rows() -> list[list[str]]:
    """Cells of the rows of both tables."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in DOCUMENT.read_text().splitlines()
            if re.match(r"\| `(split|packed)_", line)]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


@pytest.mark.parametrize("format", FORMATS)
def test_every_access_has_its_row(format: str) -> None:
    source = Counter()
    for name, body in FUNCTION.findall((CORE / f"{format}.inl").read_text()):
        source.update((name, accessor) for accessor in ACCESSOR.findall(body))
    told = Counter()
    for function, access, *_ in rows():
        accessor, times = re.match(r"`(\w+)`(?: ×(\d+))?", access).groups()
        told[quoted(function)[0], accessor] += int(times or 1)
    assert {key: n for key, n in told.items() if key[0].startswith(format)} == source
    assert (f"{format}_publish", "store16_release") in source


def test_no_access_beside_the_accessors() -> None:
    """All atomic built-ins of the core's inlined parts are in the accessors, whose list is the document's."""
    for path in CORE.glob("*.inl"):
        if not path.name.startswith("driver"):
            assert "__atomic" not in path.read_text(), path.name


@pytest.mark.parametrize("format", FORMATS)
def test_driver_functions_exist(format: str) -> None:
    text = (CORE / f"driver_{format}.inl").read_text()
    functions = {name for name, _ in FUNCTION.findall(text)} | set(LINE.findall(text))
    named = {name for row in rows() if row[0].startswith(f"`{format}_") for name in quoted(row[2])}
    assert named <= functions and f"{format}_kick_is_due" in named


def test_named_tests_exist() -> None:
    in_python = {name for path in (ROOT / "tests").glob("test_*.py")
                 for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)}
    in_c = {name for path in (ROOT / "tests/c").glob("*.c") for name in names_in(path)}
    for function, *_, shown in rows():
        format = quoted(function)[0].partition("_")[0]
        assert quoted(shown), f"nothing shows {function}"
        assert not [name for name in quoted(shown) if name not in in_python and f"{name}_{format}" not in in_c]


def test_everything_that_orders_is_left_out_in_turn() -> None:
    """A fault for each row that has an order."""
    faults = (ROOT / "tests/test_c_faults.py").read_text()
    ordered = [quoted(row[0])[0] for row in rows() if re.match("`(load16_acquire|store16_release)`", row[1])]
    assert len(ordered) == 4
    assert not [function for function in ordered if f'"{function}"' not in faults]
    barriers = {quoted(row[0])[0] for row in rows() if row[1] == "`full_barrier`"}
    assert barriers == {f"{format}_{verb}" for format in FORMATS for verb in ("arm", "decide")}
