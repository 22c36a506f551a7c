"""tools/bootstrap.py: what is missing is installed or named, and what is there is left alone."""

import ast
import importlib.util
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "tools/bootstrap.py"
if not SCRIPT.exists():
    pytest.skip("tools/ belongs to a source tree, and there is none here", allow_module_level=True)


@pytest.fixture
def bootstrap(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/bootstrap.py as a module."""
    spec = importlib.util.spec_from_file_location("vdev_tools_bootstrap", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["tools/demo"])
    return module


@pytest.fixture
def debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A machine with the packages ``installed`` and, in its lists, ``known``; -> the log of what apt did."""

    def make(installed: str = "", known: str = "", update_fails: bool = False) -> Path:
        log = tmp_path / "apt.log"
        log.touch()
        programs = {
            "dpkg-query": f'for name; do case " {installed} " in *" $name "*) echo "$name installed";; esac; done',
            "apt-cache": f'case " {known} " in *" $2 "*) echo "  Candidate: 1.0";; '
                         '*) echo "  Candidate: (none)";; esac',
            "apt-get": f'echo "$@" >> {log}; case "$*" in *update*) exit {int(update_fails)};; '
                       f'*impossible*) echo "E: no such package"; exit 100;; esac',
        }
        for name, body in programs.items():
            program = tmp_path / "bin" / name
            program.parent.mkdir(exist_ok=True)
            program.write_text(f"#!/bin/sh\n{body}\n")
            program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
        return log

    return make


def as_user(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: number)


def installs(log: Path) -> list[list[str]]:
    """The packages of each `apt-get install`."""
    lines = [line.split() for line in log.read_text().splitlines()]
    return [words[words.index("--no-install-recommends") + 1:] for words in lines if "install" in words]


def test_nothing_missing_leaves_apt_alone(bootstrap: ModuleType, debian: Callable[..., Path]) -> None:
    log = debian(installed="gcc iperf3 new-name")
    bootstrap.ensure_packages(["gcc", "iperf3", "new-name | old-name", "odd-name | new-name"])
    assert log.read_text() == ""


def test_root_installs_what_is_missing(bootstrap: ModuleType, debian: Callable[..., Path],
                                       monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    log = debian(installed="gcc", known="iperf3 old-name")
    as_user(monkeypatch, 0)
    bootstrap.ensure_packages(["gcc", "iperf3", "new-name | old-name"])
    assert log.read_text().splitlines()[0].endswith(" update")
    assert installs(log) == [["iperf3", "old-name"]]
    assert "iperf3" in capsys.readouterr().err


def test_failing_update_does_not_matter_when_the_install_works(
        bootstrap: ModuleType, debian: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    log = debian(update_fails=True)
    as_user(monkeypatch, 0)
    bootstrap.ensure_packages(["iperf3"])
    assert installs(log) == [["iperf3"]]


def test_failing_install_shows_what_apt_said(
        bootstrap: ModuleType, debian: Callable[..., Path], monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    debian()
    as_user(monkeypatch, 0)
    with pytest.raises(SystemExit, match=r"^demo: `apt-get .* impossible` failed with status 100"):
        bootstrap.ensure_packages(["impossible"])
    assert "E: no such package" in capsys.readouterr().err


def test_user_is_told_the_exact_command(bootstrap: ModuleType, debian: Callable[..., Path],
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    log = debian(installed="gcc", known="iperf3 old-name")
    as_user(monkeypatch, 1000)
    with pytest.raises(SystemExit) as end:
        bootstrap.ensure_packages(["gcc", "iperf3", "new-name | old-name"])
    assert end.value.code == "demo: packages are missing; install them with: sudo apt install iperf3 old-name"
    assert log.read_text() == ""


def test_other_distributions_are_told_the_names(bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch,
                                                tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    bootstrap.ensure_packages(["gcc", "iperf3"])
    assert capsys.readouterr().err.strip().endswith("packages that Debian calls: gcc, iperf3")


def test_old_python_is_named_with_the_fix(bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch,
                                          tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    with pytest.raises(SystemExit, match=r"vdev needs 3\.11 or later; on Debian and Ubuntu: "
                                         r"sudo apt install python3\.11 python3\.11-venv python3\.11-dev$"):
        bootstrap.ensure_python()


def test_old_python_hands_over_to_a_newer_one(bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch,
                                              tmp_path: Path) -> None:
    newer = tmp_path / "python3.12"
    newer.write_text("#!/bin/sh\n")
    newer.chmod(0o755)
    called = []
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "version_info", (3, 9, 2))
    monkeypatch.setattr(os, "execv", lambda *words: called.append(words) or sys.exit(0))
    with pytest.raises(SystemExit):
        bootstrap.ensure_python()
    assert called == [(str(newer), [str(newer), "tools/demo"])]


def test_script_is_read_by_an_old_python() -> None:
    ast.parse(SCRIPT.read_text(), feature_version=(3, 7))


class Project:
    """A project directory in which making a venv and pip are replaced by what they leave behind."""

    def __init__(self, root: Path, bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.commands: list[list[str]] = []
        for folder in ("ring/core", "ring/plane"):
            (root / folder).mkdir(parents=True)
        (root / "pyproject.toml").write_text("[project]\n")
        (root / "ring/core/verbs.c").write_text("int a;\n")
        monkeypatch.setattr(bootstrap, "PROJECT", root)
        monkeypatch.setattr(bootstrap, "VENV", root / ".venv")
        monkeypatch.setattr(bootstrap, "PYTHON", root / ".venv/bin/python")
        monkeypatch.setattr(bootstrap, "STAMP", root / ".venv/stamp.json")
        monkeypatch.setattr(bootstrap, "_run", self._run)
        monkeypatch.setattr(bootstrap, "_ensure_build_tools", lambda: None)

    def _run(self, command: list[object], **_options: object) -> None:
        words = [str(word) for word in command]
        self.commands.append(words)
        if "venv" in words:
            python = self.root / ".venv/bin/python"
            python.parent.mkdir(parents=True)
            # Not a link: through one, Python would look for its packages beside it, and find no pip.
            python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
            python.chmod(0o755)
        else:
            (self.root / "ring/_core.abi3.so").write_text(str(len(self.commands)))

    def taken(self) -> list[list[str]]:
        """The commands since the last call."""
        taken, self.commands = self.commands, []
        return taken


@pytest.fixture
def project(tmp_path: Path, bootstrap: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Project:
    """See Project."""
    return Project(tmp_path, bootstrap, monkeypatch)


def test_venv_is_made_once(bootstrap: ModuleType, project: Project) -> None:
    assert bootstrap.ensure_venv() == project.root / ".venv/bin/python"
    made, installed = project.taken()
    assert "venv" in made and installed[-2:] == ["-e", str(project.root)]
    bootstrap.ensure_venv()
    assert project.taken() == []


@pytest.mark.parametrize("changed", ["pyproject.toml", "ring/core/verbs.c", "ring/plane/pump.c"])
def test_change_of_what_it_is_built_from_installs_again(bootstrap: ModuleType, project: Project,
                                                        changed: str) -> None:
    bootstrap.ensure_venv()
    project.taken()
    (project.root / changed).write_text("something else\n")
    bootstrap.ensure_venv()
    assert len(project.taken()) == 1
    bootstrap.ensure_venv()
    assert project.taken() == []


def test_missing_extension_installs_again(bootstrap: ModuleType, project: Project) -> None:
    bootstrap.ensure_venv()
    project.taken()
    (project.root / "ring/_core.abi3.so").unlink()
    bootstrap.ensure_venv()
    assert len(project.taken()) == 1


def test_extras_are_added_and_never_lost(bootstrap: ModuleType, project: Project) -> None:
    bootstrap.ensure_venv(["test"])
    assert project.taken()[-1][-1] == f"{project.root}[test]"
    bootstrap.ensure_venv()
    assert project.taken() == []
    bootstrap.ensure_venv(["lab"])
    assert project.taken()[-1][-1] == f"{project.root}[lab,test]"


def test_broken_venv_is_made_anew(bootstrap: ModuleType, project: Project) -> None:
    bootstrap.ensure_venv()
    project.taken()
    python = project.root / ".venv/bin/python"
    python.unlink()
    python.parent.rmdir()
    bootstrap.ensure_venv()
    assert ["venv" in command for command in project.taken()] == [True, False]


def test_failed_install_is_not_taken_for_done(bootstrap: ModuleType, project: Project,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    bootstrap.ensure_venv()
    project.taken()
    (project.root / "pyproject.toml").write_text("broken\n")

    def fail(*_words: object, **_options: object) -> None:
        raise SystemExit("pip failed")

    with monkeypatch.context() as patch:
        patch.setattr(bootstrap, "_run", fail)
        with pytest.raises(SystemExit):
            bootstrap.ensure_venv()
    bootstrap.ensure_venv()
    assert len(project.taken()) == 1


def test_one_of_two_at_once_does_the_work(bootstrap: ModuleType, project: Project) -> None:
    callers = [threading.Thread(target=bootstrap.ensure_venv) for _ in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(30)
    assert len(project.taken()) == 2


def test_this_checkout_is_ready_at_once() -> None:
    """Run twice, the second time finds nothing to do. Only where tools/test set this checkout up."""
    root = SCRIPT.parent.parent
    if not (root / ".venv/vdev-installed.json").exists():
        pytest.skip("this checkout's .venv was not made by tools/bootstrap.py")
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stdout.strip() == str(root / ".venv/bin/python")
    assert done.stderr == ""
