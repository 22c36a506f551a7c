"""tools/test: what it counts, what it calls a failure, and that nothing runs for ever."""

import importlib.machinery
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools"
if not TOOLS.is_dir():
    pytest.skip("tools/ belongs to a source tree, and there is none here", allow_module_level=True)


@pytest.fixture(autouse=True)
def plain_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pytest runs in here start without plugins, which takes most of their time."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/test as a module."""
    monkeypatch.syspath_prepend(str(TOOLS))
    loader = importlib.machinery.SourceFileLoader("vdev_tools_test", str(TOOLS / "test"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    monkeypatch.setitem(sys.modules, loader.name, module)
    loader.exec_module(module)
    return module


EVERY_OUTCOME = """
import pytest

def test_passes(): pass
def test_fails(): assert False
def test_skips(): pytest.skip("no such thing here")
@pytest.mark.xfail(reason="known")
def test_fails_as_expected(): assert False
@pytest.mark.xfail(strict=True)
def test_passes_unexpectedly(): pass
@pytest.fixture
def broken(): raise RuntimeError
def test_setup_breaks(broken): pass
@pytest.fixture
def messy():
    yield
    raise RuntimeError
def test_teardown_breaks(messy): pass
@pytest.mark.long
def test_long(): pass
"""


def test_record_tells_what_became_of_each_test(tmp_path: Path) -> None:
    shutil.copy(ROOT / "tests/conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    long: x\n")
    (tmp_path / "test_outcomes.py").write_text(EVERY_OUTCOME)
    (tmp_path / "test_module.py").write_text("import pytest\npytest.skip('not here', allow_module_level=True)\n")
    (tmp_path / "test_syntax.py").write_text("def\n")
    record = tmp_path / "results.json"
    subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--continue-on-collection-errors",
                    "--results", str(record)], cwd=tmp_path, capture_output=True, timeout=60)
    results = json.loads(record.read_text())
    assert results["passed"] == 1
    assert sorted(results["failed"]) == [
        "test_outcomes.py::test_fails", "test_outcomes.py::test_passes_unexpectedly",
        "test_outcomes.py::test_setup_breaks", "test_outcomes.py::test_teardown_breaks", "test_syntax.py"]
    assert dict(results["skipped"]) == {
        "test_module.py": "not here", "test_outcomes.py::test_skips": "no such thing here",
        "test_outcomes.py::test_fails_as_expected": "fails as expected: known"}


@pytest.mark.parametrize(("pattern", "node", "answer"), [
    ("tests/a.py::test_x", "tests/a.py::test_x", True),
    ("tests/a.py::test_x", "tests/a.py::test_xy", False),
    ("tests/a.py::test_x[10*]", "tests/a.py::test_x[10.0]", True),
    ("tests/a.py::test_x[10*]", "tests/a.py::test_x[7.2]", False),
    ("tests/a.py::test_x1", "tests/a.py::test_x[1]", False),
    ("tests/a.py::*: no such kernel", "tests/a.py::test_x", True),
    ("tests/a.py::*: no such machine", "tests/a.py::test_x", False),
])
def test_pattern_fits_node_or_node_with_reason(program: ModuleType, pattern: str, node: str, answer: bool) -> None:
    assert program.allows(pattern, (node, "no such kernel")) is answer


def test_skip_nobody_allowed_is_a_failure(program: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    allowed = tmp_path / "allowed-skips"
    allowed.write_text("# a comment\n\ntests/a.py::*\tno second machine\n")
    monkeypatch.setattr(program, "ALLOWED_SKIPS", allowed)
    results = program.Results(3, ["tests/c.py::test_z"], [("tests/a.py::test_x", "why"), ("tests/b.py::test_y", "why")])
    program.report(results, 1.0)
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "3 passed, 2 failed, 2 skipped"
    assert "tests/a.py::test_x: why" in said
    assert "tests/b.py::test_y: why  <- not in tests/allowed-skips" in said
    assert any(line.startswith("tests/b.py::test_y: skipped, and") for line in said)


def test_allowance_without_a_reason_is_refused(program: ModuleType, monkeypatch: pytest.MonkeyPatch,
                                               tmp_path: Path) -> None:
    (tmp_path / "allowed-skips").write_text("tests/a.py::*  \n")
    monkeypatch.setattr(program, "ALLOWED_SKIPS", tmp_path / "allowed-skips")
    with pytest.raises(SystemExit, match=r"allowed-skips:1: not `PATTERN<TAB>REASON`"):
        program.read_allowed_skips()


def test_allowed_skips_can_be_read(program: ModuleType) -> None:
    for pattern, reason in program.read_allowed_skips():
        assert pattern.startswith("tests/") and len(reason) > 10


def is_running(pid: int) -> bool:
    """A process that nobody has collected yet does not run any more."""
    try:
        return not re.search(r"\) [ZX] ", Path(f"/proc/{pid}/stat").read_text())
    except OSError:
        return False


def test_what_runs_too_long_ends_with_its_children(program: ModuleType, tmp_path: Path) -> None:
    script = f"trap '' INT; sleep 300 & echo $! > {tmp_path}/pid; while :; do wait; done"
    begin = time.monotonic()
    assert program.run_bounded(["bash", "-c", script], 0.5, patience=0.5) is None
    assert time.monotonic() - begin < 30
    child = int((tmp_path / "pid").read_text())
    while is_running(child):
        assert time.monotonic() - begin < 30
        time.sleep(0.01)


def test_status_of_what_ends_in_time(program: ModuleType) -> None:
    assert program.run_bounded(["bash", "-c", "exit 3"], 20) == 3


@pytest.fixture
def small_project(program: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """tools/test looks at a project with a directory of tests, empty but for conftest.py."""
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests/conftest.py", tmp_path / "tests")
    monkeypatch.setattr(program, "PROJECT", tmp_path)
    return tmp_path / "tests"


def run_a_stage(program: ModuleType, *arguments: str) -> tuple[int, list[str], int]:
    """(passed, failed, skipped) of a stage over the small project."""
    results = program.Results()
    program.run_stage(program.Stage("unit", "", (".",), 1), Path(sys.executable), list(arguments), results)
    return results.passed, results.failed, len(results.skipped)


def test_stage_adds_up(program: ModuleType, small_project: Path) -> None:
    (small_project / "test_a.py").write_text("def test_a(): pass\ndef test_b(): assert 0\n")
    assert run_a_stage(program) == (1, ["tests/test_a.py::test_b"], 0)


@pytest.mark.parametrize("arguments, seconds", [([], 600), (["--long"], 5400)])
def test_stage_with_long_tests_may_take_longer(program: ModuleType, small_project: Path,
                                               monkeypatch: pytest.MonkeyPatch, arguments: list[str],
                                               seconds: int) -> None:
    asked = []
    monkeypatch.setattr(program, "run_bounded", lambda command, seconds: asked.append(seconds))
    results = program.Results()
    program.run_stage(program.Stage("c", "", (".",), 10, minutes_long=90), Path(sys.executable), arguments, results)
    assert asked == [seconds]
    assert f"c: not finished after {seconds // 60} minutes" in results.failed


def test_stage_without_tests_is_a_failure(program: ModuleType, small_project: Path) -> None:
    assert run_a_stage(program) == (0, ["unit: pytest ended with status 5 and ran no test"], 0)


def test_stage_that_leaves_the_caller_without_tests_is_fine(program: ModuleType, small_project: Path) -> None:
    (small_project / "test_a.py").write_text("def test_a(): pass\n")
    assert run_a_stage(program, "-k", "nothing_of_this_name") == (0, [], 0)


def test_stage_that_dies_is_a_failure(program: ModuleType, small_project: Path) -> None:
    (small_project / "test_a.py").write_text("import os\ndef test_a(): os.abort()\n")
    passed, failed, _ = run_a_stage(program)
    assert passed == 0
    assert failed == ["unit: pytest ended with status -6 and ran no test"]
