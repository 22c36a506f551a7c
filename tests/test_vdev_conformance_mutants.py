"""Every check of `vdev check` is able to fail: devices that break one requirement each do not pass it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vdev.conformance import checks, table
from vdev.conformance.coverage import coverage
from vdev.testing.mutants import Mutant, Tree, read

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "setup.py").exists():
    pytest.skip("a device is changed in its source tree, and there is none here", allow_module_level=True)

# Of the shared ones, those that no check has to notice, by name: vdev is stricter than it must be, or the row is a
# permission, which a device cannot break.
STRICTER = {"an indirect table of any length is cut down to its whole entries",
            "a chain may have half as many descriptors as the queue", "legacy drivers are let in",
            "no driver behind an IOMMU is served", "bit 30 is counted among the driver's",
            "the byte order of legacy drivers is offered", "features that were not offered can be set"}
OWN = read([ROOT / "tests/conformance_mutants.toml"])
# Of those for the rows' own tests (tests/test_rows_mutants.py), which break them on either engine, those of rows that
# the suite has.
SHARED = [mutant for mutant in read(sorted((ROOT / "tests").glob("mutants*.toml")))
          if set(mutant.rows) & checks.by_row().keys() and mutant.name not in STRICTER]
LOOPBACK = "loopback:"


def checked(tree: Tree, folder: Path, mutant: Mutant, rows: list[str]) -> dict[str, str]:
    """What the suite says of ``rows`` of a device run from ``tree``: row -> verdict, or what is said of all."""
    paths = [str(folder / "socket"), str(folder / "peer")]
    port = mutant.port or LOOPBACK
    command = [sys.executable, "-m", "vdev", "run", "--log-level", "warning", *mutant.options,
               *(word for path in paths for word in ("--device", f"socket={path},port={port}"))]
    wire = "reflect" if port == LOOPBACK else f"socket:{paths[1]}"
    with (folder / "log").open("w") as log:
        daemon = subprocess.Popen(command, cwd=tree.folder, env=tree.environment(), stdout=subprocess.PIPE, stderr=log)
    try:
        daemon.stdout.readline()  # ready
        done = subprocess.run([sys.executable, "-m", "vdev", "check", paths[0], "--wire", wire, "--json", "--seconds",
                               "2", "--only", ",".join(rows)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    finally:
        daemon.kill()
        daemon.wait()
    if not done.stdout:
        return dict.fromkeys(rows, done.stderr)
    return {row["row"]: row["verdict"] for row in json.loads(done.stdout)["rows"]}


@pytest.mark.parametrize("mutant", OWN, ids=str)
def test_mutant_changes_one_place(mutant) -> None:
    for file, healthy, faulty in mutant.changes:
        assert (ROOT / file).read_text().count(healthy) == 1
        assert healthy != faulty
    assert set(mutant.rows) <= table.rows().keys()


def test_coverage_is_told() -> None:
    text = (ROOT / "docs/conformance.md").read_text()
    broken = {row for mutant in read(sorted((ROOT / "tests").glob("*mutants*.toml"))) for row in mutant.rows}
    assert "\n".join(coverage(broken)) in text, "tools/conformance --coverage prints what is due there"


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mutant", [*OWN, *SHARED], ids=str)
def test_mutant_does_not_pass(mutant, tmp_path: Path) -> None:
    tree = Tree(ROOT, tmp_path / "tree")
    tree.change(mutant)
    if mutant.compiled:
        tree.build()
    rows = [row for row in mutant.rows if row in checks.by_row()]
    found = checked(tree, tmp_path, mutant, rows)
    unnoticed = {row: verdict for row, verdict in found.items() if verdict != "fail"}
    # A mutant that is shared breaks some rows only for a device that offers more, or is told by the rows' own tests.
    assert unnoticed == {} or (mutant in SHARED and len(unnoticed) < len(rows)), unnoticed
