"""Every test of a row is able to fail: the devices of tests/mutants*.toml, each of which breaks one requirement, are
noticed by the tests of that requirement."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from vdev.testing import rows
from vdev.testing.mutants import Tree, read

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "setup.py").exists():
    pytest.skip("a device is changed in its source tree, and there is none here", allow_module_level=True)

# A test has noticed when it or the driver it uses says so; one that just breaks has not.
NOTICED = re.compile(r"assert|(Failed: )?AssertionError|Failed: DID NOT RAISE|ring\.driver_parts\.DeviceError")
ROW_TESTS = sorted(f"tests/{path.name}" for path in (ROOT / "tests").glob("test_rows_[!m]*.py"))
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "pytest_timeout")
WITHOUT_PLUGINS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # loading them takes longer than most tests
ENGINE = re.compile(r"[\[-](pump|step)[\]-]")


MUTANTS = read(sorted((ROOT / "tests").glob("mutants*.toml")))


@functools.cache
def files_about() -> dict[str, set[str]]:
    """Row -> the files of its tests. Collecting all of them anew for each device would take most of the time."""
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "results.json"
        command = [sys.executable, *PYTEST, "--collect-only", "--long", "--results", str(record), *ROW_TESTS]
        subprocess.run(command, cwd=ROOT, env={**os.environ, **WITHOUT_PLUGINS}, timeout=600, check=True,
                       stdout=subprocess.DEVNULL)
        about = json.loads(record.read_text())["about"]
    files: dict[str, set[str]] = {}
    for test, noted in about.items():
        for row in noted["rows"]:
            files.setdefault(row, set()).add(test.partition("::")[0])
    return files


class TestedTree(Tree):
    """A copy of the project in ``folder``, with the tests of rows."""

    def __init__(self, folder: Path) -> None:
        super().__init__(ROOT, folder)
        (folder / "tests").mkdir()
        for path in ["tests/conftest.py", *ROW_TESTS]:
            shutil.copy(ROOT / path, folder / "tests")

    def test(self, ids: list[str]) -> dict:
        """Run the tests of these rows -> the record (tests/conftest.py)."""
        record = self.folder / "results.json"
        files = {file for row, files in files_about().items() for file in files
                 if any(fnmatchcase(row, pattern) for pattern in ids)}
        output = self.run(*PYTEST, "--rows", ",".join(ids), "--results", str(record), *sorted(files),
                          more=WITHOUT_PLUGINS)
        assert record.exists(), output
        return json.loads(record.read_text())


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_changes_one_place(mutant) -> None:
    for file, healthy, faulty in mutant.changes:
        assert (ROOT / file).read_text().count(healthy) == 1
        assert healthy != faulty


def test_a_tree_is_made_with_a_text_replaced(tmp_path: Path) -> None:
    mutant = MUTANTS[0]
    tree = TestedTree(tmp_path)
    tree.replace(mutant.file, mutant.healthy, mutant.faulty)
    healthy, faulty = ((root / mutant.file).read_text() for root in (ROOT, tmp_path))
    assert healthy.replace(mutant.healthy, mutant.faulty) == faulty
    with pytest.raises(ValueError, match="has 0 times"):
        tree.replace(mutant.file, mutant.healthy, mutant.faulty)


def test_every_row_has_a_mutant() -> None:
    tables = [rows.read(ROOT / "docs/conformance" / f"{name}.tsv")
              for name in ("split", "packed", "features", "messages", "network")]
    wanted = [row.id for table in tables for row in table if row.tested]
    broken = {id for mutant in MUTANTS for id in mutant.rows}
    assert [id for id in wanted if id not in broken] == []
    others = [row.id for name in ("hostile", "faults") for row in rows.read(ROOT / f"docs/conformance/{name}.tsv")]
    assert broken <= {*wanted, *others}


@pytest.mark.long
@pytest.mark.timeout(900)
def test_copy_without_a_fault_passes(tmp_path: Path) -> None:
    tree = TestedTree(tmp_path)
    tree.build()
    for module in ("ring.build", "ring._core", "vdev", "vhost_user"):
        where = tree.run("-c", f"import {module} as m; print(m.__file__)")
        assert where.startswith(str(tmp_path))
    record = tree.test(["VQ-*", "RSVF-*", "P*", "N*"])
    assert record["failed"] == [] and record["passed"] > 100


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_noticed(mutant, tmp_path: Path) -> None:
    tree = TestedTree(tmp_path)
    tree.change(mutant)
    if mutant.compiled:
        tree.build()
    record = tree.test(mutant.rows)
    for row in mutant.rows:
        tests = {test: about for test, about in record["about"].items() if row in about["rows"]}
        engines = {engine for test in tests for engine in ENGINE.findall(test)} or {""}
        for engine in {mutant.engine} if mutant.engine else engines:
            why = [about["why"] for test, about in tests.items() if not engine or engine in ENGINE.findall(test)]
            assert any(map(NOTICED.match, why)), f"{row}, {engine or 'any engine'}: {list(filter(None, why))}"
