"""tools/conformance: what counts as tested, and what it says of it."""

import importlib.machinery
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools"
if not TOOLS.is_dir():
    pytest.skip("tools/ belongs to a source tree, and there is none here", allow_module_level=True)

TABLE = """id\tlevel\tsubject\tsection\trequirement\tapplies_when\tleft_out
A-01\tMUST\tdevice\t2.7\tDo it.\talways\t
A-02\tMAY\tdevice\t2.7\tDo that.\talways\tnot tested: nobody can see it
A-03\tMUST\tdevice\t2.7\tDo the rest.\tSOMETHING\tnot offered: nobody wants it
"""


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """tools/conformance as a module, with tables and mutants of its own."""
    monkeypatch.syspath_prepend(str(TOOLS))
    loader = importlib.machinery.SourceFileLoader("vdev_tools_conformance", str(TOOLS / "conformance"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    monkeypatch.setitem(sys.modules, loader.name, module)
    loader.exec_module(module)
    (tmp_path / "split.tsv").write_text(TABLE)
    (tmp_path / "hostile.tsv").write_text(TABLE.partition("\n")[0] + "\nR01\tDROP\tdriver\t-\tBe bad.\talways\t\n")
    (tmp_path / "mutants.toml").write_text(
        '[[mutant]]\nrows = ["A-01", "A-03"]\nname = "x"\n[[mutant]]\nrows = ["A-01"]\nname = "y"\n')
    monkeypatch.setattr(module, "TABLES", tmp_path)
    monkeypatch.setattr(module, "MUTANTS", tmp_path)
    return module


def record(**outcomes: str) -> dict:
    """A record in which the tests ``row__format`` ended so."""
    return {"failed": [], "about": {f"tests/test_x.py::test_it[{name}]": {
        "rows": [name.split("__")[0].replace("_", "-")], "outcome": outcome, "why": ""}
        for name, outcome in outcomes.items()}}


def verdicts(program: ModuleType, **outcomes: str) -> dict[str, str]:
    tables = program.evaluate(["A-*"], record(**outcomes), {})
    return {entry["row"]: entry["verdict"] for entry in tables["split"]}


@pytest.mark.parametrize("outcomes, verdict", [
    ([], "NO TEST"), (["passed"], "pass"), (["passed", "failed"], "FAIL"), (["skipped"], "NOT RUN"),
    (["not run"], "NOT RUN"), (["passed", "skipped"], "pass")])
def test_verdict(program, outcomes, verdict) -> None:
    said = verdicts(program, **{f"A_01__{i}": outcome for i, outcome in enumerate(outcomes)})
    assert said["A-01"] == verdict


def test_rows_left_out(program) -> None:
    """One that is not offered has to be seen not to be."""
    assert verdicts(program)["A-02"] == "not tested: nobody can see it"
    assert verdicts(program)["A-03"] == "NO TEST"
    assert verdicts(program, A_03="passed")["A-03"] == "not offered: nobody wants it"
    assert verdicts(program, A_03="failed")["A-03"] == "FAIL"


def test_hostile_rows_have_a_verdict_for_each_format(program) -> None:
    tables = program.evaluate(["R*"], record(R01="passed", R01__packed="failed"), {})
    assert [(entry["split"], entry["packed"]) for entry in tables["hostile"]] == [("pass", "FAIL")]
    assert program.missing(tables) == ["R01"]
    tables = program.evaluate(["R*"], record(R01="passed"), {})
    assert tables["hostile"][0]["packed"] == "NO TEST" and program.missing(tables) == ["R01"]


def test_mutants_are_counted_and_one_that_lives_is_missed(program, capsys) -> None:
    mutants = program.mutants_of({"failed": ["tests/test_rows_mutants.py::test_mutant_is_noticed[y (A-01)]"]})
    assert mutants == {"A-01": (1, 2), "A-03": (1, 1)}
    tables = program.evaluate(["A-*"], record(A_01="passed", A_03="passed"), mutants)
    assert program.missing(tables) == ["A-01"]
    program.print_tables(tables)
    lines = capsys.readouterr().out.splitlines()
    assert "A-01             MUST       pass 1/2 mutants noticed" in lines
    assert any(line.strip() == "test_x.py::test_it" for line in lines)


def test_it_runs_the_tests_of_the_rows_asked_for(program, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # they take most of the time
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests/conftest.py", tmp_path / "tests")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    row: x\n    long: x\n")
    (tmp_path / "tests/test_a.py").write_text(
        "import pytest\n@pytest.mark.row('A-01', 'A-02')\ndef test_a(): pass\n"
        "@pytest.mark.row('A-02')\ndef test_b(): assert 0 == 1\ndef test_N01_c(): pass\ndef test_d(): pass\n")
    monkeypatch.setattr(program, "PROJECT", tmp_path)
    about = program.run("--rows", "A-02,N??")["about"]
    assert {test.rpartition("::")[2]: (noted["outcome"], noted["why"]) for test, noted in about.items()} == {
        "test_a": ("passed", ""), "test_b": ("failed", "assert 0 == 1"), "test_N01_c": ("passed", "")}
    with pytest.raises(SystemExit, match="told nothing"):
        program.run("--no-such-option")


@pytest.mark.parametrize("outcome, status, last", [
    ("passed", 0, "3 rows; nothing is missing"), ("failed", 1, "3 rows; not as they should be: A-01")])
def test_table_for_people_and_for_programs(program, monkeypatch, tmp_path, capsys, outcome, status, last) -> None:
    asked = []
    monkeypatch.setattr(program, "run", lambda *arguments: asked.append(arguments) or record(
        A_01=outcome, A_03="passed"))
    monkeypatch.setattr(program.bootstrap, "VENV", Path(sys.prefix))
    monkeypatch.setattr(sys, "argv", ["conformance", "A-*", "--json", str(tmp_path / "rows.json")])
    assert program.main() == status
    assert "--rows" in asked[0] and "A-*" in asked[0] and len(asked) == 1
    assert capsys.readouterr().out.splitlines()[-1] == last
    entries = json.loads((tmp_path / "rows.json").read_text())["split"]
    assert [entry["row"] for entry in entries] == ["A-01", "A-02", "A-03"]


def test_rows_there_are_not_are_an_error_that_says_where_to_look(program, monkeypatch, capsys) -> None:
    monkeypatch.setattr(program, "run", lambda *arguments: record())
    monkeypatch.setattr(program.bootstrap, "VENV", Path(sys.prefix))
    monkeypatch.setattr(sys, "argv", ["conformance", "B-01"])
    with pytest.raises(SystemExit):
        program.main()
    assert "no row is named B-01; see docs/conformance" in capsys.readouterr().err
