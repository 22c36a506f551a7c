"""Every command and every line of Python that README.md and docs/ show is run, or the document says why not.

A fenced block marked ``sh`` holds commands; one marked ``console`` holds commands after ``$`` and what they
print, in which ``...`` stands for anything. A block marked ``toml`` is a configuration file. Blocks marked
``pycon`` are one session of Python, all those of a document together, and print what they say, to the letter. An
HTML comment just above a block says what is special:

    <!-- runs until stopped -->   the last paragraph is a daemon: it must get ready, and end well on SIGTERM
    <!-- run by tests/FILE::TEST -->   it takes long, and that test runs it and looks closer
    <!-- not run: REASON -->

Commands run at the project's root with the directory of this Python first in PATH; ``/tmp/`` stands for a
directory that vanishes. Daemons run in a network namespace of their own, as they may make TAP devices.
"""

import doctest
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest

from vdev.testing.netns import Namespace, why_no_tap

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if path.exists()]
COMMANDS = ("sh", "console")
SESSION = "pycon"
NOT_RUN = ("text", "c", "toml", "xml")

BLOCK = re.compile(r"(?:^<!-- (?P<note>[^\n]*?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
                   re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: where it stands, what it says, and the comment above it."""

    document: str
    line: int
    language: str
    text: str
    note: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def blocks() -> list[Block]:
    """All fenced blocks of all documents."""
    found = []
    for document in DOCUMENTS:
        text = document.read_text()
        found += [Block(str(document.relative_to(ROOT)), text.count("\n", 0, match.start("language")) + 1,
                        match["language"], match["text"], match["note"] or "") for match in BLOCK.finditer(text)]
    return found


def run_by(*notes: str, languages: tuple[str, ...] = COMMANDS) -> pytest.MarkDecorator:
    """Parametrize a test with the blocks in ``languages`` that carry one of ``notes``."""
    chosen = [block for block in blocks() if block.language in languages and block.note in notes]
    return pytest.mark.parametrize("block", chosen, ids=str)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The environment of a person who has activated the virtual environment."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)}


def localized(text: str, tmp_path: Path) -> str:
    """The commands with their files in a directory of this test."""
    return text.replace("/tmp/", f"{tmp_path}/")


def commands(block: Block) -> list[tuple[str, str | None]]:
    """(command, what it prints or None for whatever) pairs of a block."""
    if block.language == "sh":
        return [(block.text, None)]
    pairs: list[tuple[str, str | None]] = []
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        lines = part.splitlines(keepends=True)
        length = next((number for number, line in enumerate(lines, 1) if not line.endswith("\\\n")), len(lines))
        pairs.append(("".join(lines[:length]), "".join(lines[length:])))
    return pairs


def is_like(said: str, promised: str) -> bool:
    """``...`` in ``promised`` stands for anything."""
    pattern = ".*".join(map(re.escape, promised.strip().split("...")))
    return re.fullmatch(pattern, said.strip(), re.DOTALL) is not None


def is_run_elsewhere(block: Block) -> bool:
    """Does its note name a test that is there?"""
    named = re.fullmatch(r"run by (tests/\S+)::(\w+)", block.note)
    return named is not None and f"def {named[2]}(" in (ROOT / named[1]).read_text()


def test_documents_are_found() -> None:
    assert len(DOCUMENTS) >= 3
    assert len([block for block in blocks() if block.language in COMMANDS]) >= 5


def test_every_block_is_run_or_says_why_not() -> None:
    known = ("", "runs until stopped")
    wrong = [f"{block}: {block.language or 'no language'} {block.note}" for block in blocks()
             if block.language not in (*COMMANDS, SESSION, *NOT_RUN)
             or block.language in (*COMMANDS, SESSION) and block.note not in known
             and not re.fullmatch(r"not run: \S.*", block.note) and not is_run_elsewhere(block)]
    assert not wrong


@pytest.mark.timeout(600)
@run_by("")
def test_commands(block: Block, environment: dict[str, str], tmp_path: Path) -> None:
    for command, promised in commands(block):
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", localized(command, tmp_path)], cwd=ROOT,
                              env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              timeout=580)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        if promised is not None:
            said = (done.stdout + done.stderr).replace(f"{tmp_path}/", "/tmp/")
            assert is_like(said, promised), f"{command} printed:\n{said}\nthe document says:\n{promised}"


@run_by("runs until stopped")
def test_daemons(block: Block, environment: dict[str, str], tmp_path: Path) -> None:
    preparations, _, daemon = block.text.strip().rpartition("\n\n")
    script = localized(f"{preparations}\nexec {daemon}".replace("sudo ", ""), tmp_path)
    missing = why_no_tap()
    if missing:
        pytest.skip(f"no namespace with a TAP device: {missing}")
    ready, ready_write = os.pipe()
    with Namespace() as namespace, os.fdopen(ready) as reader:
        process = namespace.popen(["bash", "-euo", "pipefail", "-c", f"{script} --ready-fd {ready_write}"],
                                  cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE, text=True, pass_fds=[ready_write])
        os.close(ready_write)
        was_ready = reader.read()
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        said, log = process.communicate(timeout=20)
        assert was_ready == "READY\n", log
        assert process.returncode == 0, log
        assert said.startswith("ready "), said


@run_by("", languages=("toml",))
def test_configuration_files(block: Block, environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "vdev.toml").write_text(block.text)
    done = subprocess.run([shutil.which("vdev", path=environment["PATH"]), "--config", tmp_path / "vdev.toml",
                           "--check-config"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@run_by("", languages=("xml",))
def test_definitions_of_guests(block: Block) -> None:
    domain = ElementTree.fromstring(block.text)
    assert domain.find("memoryBacking/access").get("mode") == "shared"
    interface = domain.find("devices/interface[@type='vhostuser']")
    assert interface.find("source").attrib == {"type": "unix", "path": "/run/vdev/vm1.sock", "mode": "client"}
    assert interface.find("model").get("type") == "virtio"


# ------------------------------------------------------------------------------------------------- Python


def session(document: Path) -> str:
    """The Python of a document with the prose blanked out, so that every line keeps its number."""
    lines = [""] * len(document.read_text().splitlines())
    for block in blocks():
        if block.language == SESSION and not block.note and ROOT / block.document == document:
            text = block.text.splitlines()
            lines[block.line:block.line + len(text)] = text
    return "\n".join(lines)


def differences(text: str, name: str) -> str:
    """Run a session -> where it prints something else than it says, as doctest reports it."""
    report: list[str] = []
    test = doctest.DocTestParser().get_doctest(text, {}, name, name, 0)
    doctest.DocTestRunner(verbose=False).run(test, out=report.append)
    return "".join(report)


SESSIONS = [document for document in DOCUMENTS if session(document).strip()]


@pytest.mark.parametrize("document", SESSIONS, ids=lambda document: document.name)
def test_python_sessions(document: Path) -> None:
    different = differences(session(document), document.name)
    assert not different, different


def test_a_session_that_prints_something_else_is_noticed() -> None:
    assert ROOT / "docs/rings.md" in SESSIONS
    text = session(ROOT / "docs/rings.md")
    assert "line 4" in differences(">>> x = 1\n\n\n>>> x + 1\n3\n", "example")
    assert differences(text.replace("next_avail 1  known 2", "next_avail 0  known 2", 1), "rings.md")
