"""The tables in docs/conformance and the tests beside each other: no row without a test or a reason, no test of a
row there is not."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vdev.testing.rows import Row, named, read

ROOT = Path(__file__).resolve().parent.parent
TABLES = ROOT / "docs/conformance"
if not TABLES.is_dir():
    pytest.skip("docs/ belongs to a source tree, and there is none here", allow_module_level=True)

SPECIFIED = [row for name in ("split", "packed", "features") for row in read(TABLES / f"{name}.tsv")]
HOSTILE = read(TABLES / "hostile.tsv")
# What a front-end sends and what the network side does; these are tested over a socket.
OUTSIDE = [row for name in ("messages", "network") for row in read(TABLES / f"{name}.tsv")]
FAULTS = read(TABLES / "faults.tsv")
FAMILY = re.compile(r"[A-Z]+")
SOCKET = re.compile(r"tests/test_(rows|vdev)_")  # where tests have a whole device behind a socket
# About what is offered and what is refused before there is a ring to serve.
WITHOUT_ENGINE = re.compile(r"RSVF-D-(?!05)|VQ-SPLIT-D-29|VQ-(SPLIT|PACKED)-DR-01|VQ-SPLIT-DR-02")

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def about(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Every test that is about rows, and which."""
    record = tmp_path_factory.mktemp("rows") / "results.json"
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only", "--long",
                           "--results", str(record), "tests"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert record.exists(), done.stdout + done.stderr
    return {test: noted["rows"] for test, noted in json.loads(record.read_text())["about"].items()}


def of(row: Row, about: dict[str, list[str]]) -> Iterator[str]:
    """The tests of ``row``."""
    return (test for test, ids in about.items() if row.id in ids)


@pytest.mark.parametrize("name, ids", [
    ("test_R08_next_beyond_table", ["R08"]), ("test_R08_R10_cycle[packed-3]", ["R08", "R10"]), ("test_Rows", []),
    ("test_c[gcc-mutate-R26_R28_step_calls]", ["R26", "R28"]), ("test_P100_mtu", ["P100"]), ("test_x[R2D2]", []),
    ("test_VQ_PACKED_D_08_D_09_full_ring[5]", ["VQ-PACKED-D-08", "VQ-PACKED-D-09"]), ("test_x[N05]", ["N05"]),
    ("test_VQ_SPLIT_DR_11_leap", ["VQ-SPLIT-DR-11"])])
def test_ids_in_names(name, ids) -> None:
    assert named(name) == ids


def test_tables_are_sound() -> None:
    rows = [*SPECIFIED, *HOSTILE, *OUTSIDE, *FAULTS]
    ids = [row.id for row in rows]
    assert len(set(ids)) == len(ids)
    for row in SPECIFIED:
        assert re.fullmatch(r"[26]\.?[\d.]*( \(virtio 1\.3\))?", row.section), row
        assert row.level in ("MUST", "MUST NOT", "SHOULD", "SHOULD NOT", "MAY"), row
    for row in [*HOSTILE, *OUTSIDE, *FAULTS]:
        assert row.level in ("STOP", "DROP", "SERVE", "BOUND", "ORDER", "CLOSE", "REFUSE"), row
    for row in rows:
        assert row.left_out == "" or re.match(r"not (offered|tested): ", row.left_out), row


def test_every_row_is_tested_or_says_why_not(about) -> None:
    assert [row.id for row in [*SPECIFIED, *OUTSIDE, *FAULTS] if row.tested != any(of(row, about))] == []


def test_every_row_of_what_comes_from_outside_is_tested_over_a_socket(about) -> None:
    assert [row.id for row in OUTSIDE if row.tested and not any(SOCKET.match(test) for test in of(row, about))] == []


def test_note_names_what_is_left_out() -> None:
    note = (ROOT / "docs/conformance.md").read_text()
    left_out = {row.id for row in [*SPECIFIED, *HOSTILE, *OUTSIDE, *FAULTS] if row.left_out}
    assert left_out <= set(re.findall(r"[A-Z-]+-\d\d|[A-Z]\d{2,3}", note.partition("## Left out")[2]))


def test_every_row_of_a_ring_is_tested_on_both_engines(about) -> None:
    for row in SPECIFIED:
        engines = {engine for test in of(row, about) for engine in re.findall(r"[\[-](pump|step)[\]-]", test)}
        wanted = set() if WITHOUT_ENGINE.match(row.id) or not row.tested else {"pump", "step"}
        assert engines == wanted, row.id


def test_every_hostile_row_is_tested_in_both_formats(about) -> None:
    """By the names of its tests: one that names no format is about split rings."""
    wrong = []
    for row in HOSTILE:
        formats = {"packed" if "packed" in test else "split" for test in of(row, about)}
        if row.tested and formats != {"packed", "split"}:
            wrong.append(f"{row.id}: {', '.join(sorted(formats)) or 'no test'}")
    assert wrong == []


def test_no_test_is_about_a_row_there_is_not(about) -> None:
    known = {row.id for path in TABLES.glob("*.tsv") for row in read(path)}
    families = {FAMILY.match(id)[0] for id in known}
    assert {id for ids in about.values() for id in ids if FAMILY.match(id)[0] in families} <= known
