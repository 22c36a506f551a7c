"""The tests of what a driver has set about what it receives are able to fail: devices that are broken in one place each
are noticed by the tests of what they break."""

from pathlib import Path

import pytest

from vdev.testing.mutants import Tree, read

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "setup.py").exists():
    pytest.skip("a device is changed in its source tree, and there is none here", allow_module_level=True)

MUTANTS = read([ROOT / "tests/receive_mutants.toml"])
TESTS = ("test_ring_receive.py", "test_ring_receive_switch.py", "test_ring_receive_coalescing.py")


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_changes_one_place(mutant) -> None:
    for file, healthy, faulty in mutant.changes:
        assert (ROOT / file).read_text().count(healthy) == 1
        assert healthy != faulty


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_noticed(mutant, tmp_path: Path) -> None:
    tree = Tree(ROOT, tmp_path)
    tree.change(mutant)
    tree.build()
    (tmp_path / "tests").mkdir()
    for name in ("conftest.py", *TESTS):
        (tmp_path / "tests" / name).write_text((ROOT / "tests" / name).read_text())
    chosen = " or ".join(row.replace("-", "_") for row in mutant.rows)
    said = tree.run("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen,
                    *(f"tests/{name}" for name in TESTS))
    assert " failed" in said and "Error" in said, said
