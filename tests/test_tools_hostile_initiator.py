"""tools/hostile-initiator: vdev passes every case; back-ends that are lax, leak, hang or die are told apart from it."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vdev.testing import hostile_memory, hostile_messages, hostile_rings
from vdev.testing.daemon import Daemon
from vdev.testing.initiator import ANY, REFUSED, Case, NotOffered, NotServed, Outcome, judge
from vhost_user.frontend import NoAnswer

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "tools" / "hostile-initiator"
if not PROGRAM.exists():
    pytest.skip("no tools here: the package is installed, not checked out", allow_module_level=True)

CASES = [*hostile_messages.CASES, *hostile_memory.CASES, *hostile_rings.CASES]
# What a front-end cannot see from outside, or what no back-end that is known offers.
NOT_AIMED = {"P18", "P19", "P32", "P38", "P89", "P90", "P91", "P93", "P97"}


def run(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, PROGRAM, *map(str, arguments)], capture_output=True, text=True, timeout=110)


@pytest.fixture
def socket_path(tmp_path: Path) -> Path:
    return tmp_path / "socket"


def aimed_at(path: Path, tmp_path: Path, *options: str, patch: str = "") -> tuple[int, list[dict], str]:
    """The program's status, reports and standard error, aimed at a vdev that ran ``patch`` before it began."""
    report = tmp_path / "report.json"
    begin = f"{patch}\nimport sys\nfrom vdev.cli import main\nsys.exit(main(['run', *sys.argv[1:]]))"
    daemon = Daemon(["--socket-path", str(path), "--port", "null:"], program=["-c", begin])
    try:
        done = run(path, "--json", report, *options)
    finally:
        daemon.child.kill()
    return done.returncode, json.loads(report.read_text()), done.stderr


# ------------------------------------------------------------------------------------------ against vdev


# A worker that does not let go in time costs its device the session. On a busy machine that says nothing of vdev.
PATIENT = "from ring.pump import Pump\nPump.detach.__defaults__ = (20_000,)"


@pytest.mark.parametrize("ids", ["P0?", "P[1-3]?", "P4?", "P5?", "P6?", "P7?", "P8?", "P9?", "P1??"])
def test_vdev_passes(socket_path: Path, tmp_path: Path, ids: str) -> None:
    status, reports, said = aimed_at(socket_path, tmp_path, "--case", ids, "--seconds", "20", patch=PATIENT)
    assert [report for report in reports if report["verdict"] not in ("pass", "n/a")] == []
    assert (status, said) == (0, "")
    assert len(reports) == len([case for case in CASES if re.fullmatch(ids.replace("?", "."), case.id)]) > 0
    # A case without an outcome has not happened.
    assert [report["case"] for report in reports if report["verdict"] == "pass" and not report["outcomes"]] == []


BROKEN = [
    ("P100", "import vhost_user.rules\nvhost_user.rules.MTU_MAX = 1 << 64", "LAX",
     "taken where closed or refused is due"),
    ("P12", "from vhost_user.fds import OwnedFds\nOwnedFds.close = lambda self: self.take_all()", "FAIL",
     r"\d+ descriptors were left open"),
    ("P09", "import os, vhost_user.codec\nvhost_user.codec.Close = lambda text: os._exit(3)", "FAIL",
     r"process \d+ died|a good front-end is not served any more: .*"),
    ("P05", "import time, vhost_user.wire\nvhost_user.wire.wrong_size = lambda *_: time.sleep(3600)", "FAIL",
     "a good front-end is not served any more: .*"),
]


@pytest.mark.parametrize("id, patch, verdict, why", BROKEN, ids=[id for id, *_ in BROKEN])
def test_a_back_end_with_a_mistake_does_not_pass(socket_path: Path, tmp_path: Path, id, patch, verdict, why) -> None:
    status, reports, _ = aimed_at(socket_path, tmp_path, "--case", id, "--seconds", "1", patch=patch)
    assert status == 1
    assert reports[0]["verdict"] == verdict
    assert re.fullmatch(f"{why}", reports[0]["why"]), reports[0]["why"]


def test_nobody_listens(tmp_path: Path) -> None:
    done = run(tmp_path / "nothing", "--case", "P09", "--seconds", "0.1")
    assert done.returncode == 1
    assert "a good front-end is not served" in done.stderr and "Traceback" not in done.stderr


# ---------------------------------------------------------------------------------------- what is printed


def test_list_names_every_case() -> None:
    lines = run("--list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == sorted((case.id for case in CASES), key=lambda id: int(id[1:]))


@pytest.mark.parametrize("arguments", [[], ["--case", "P999", "socket"]], ids=["no-socket", "no-case"])
def test_misuse(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2 and "usage:" in done.stderr


def test_cases_are_rows_of_the_table() -> None:
    table = ROOT / "docs" / "conformance" / "messages.tsv"
    rows = {line.split("\t")[0] for line in table.read_text().splitlines()[1:]}
    assert {case.id for case in CASES} | NOT_AIMED == rows
    assert not {case.id for case in CASES} & NOT_AIMED


# -------------------------------------------------------------------------------------------- the verdict


class Answering:
    """A target that serves as told: a good front-end after a case, and what was counted before and after."""

    path = "-"
    seconds = 0.05

    def __init__(self, served: bool = True, replaced: bool = False, alive: bool = True, leaks: int = 0) -> None:
        self._served, self._replaced, self._alive, self._leaks = served, replaced, alive, leaks
        self.pid = 100
        self._visits = 0

    def serves(self) -> None:
        self._visits += 1
        if self._visits > 1 and not self._served:
            raise NotServed("gone")
        self.pid = 100 + (self._replaced and self._visits > 1)

    def alive(self) -> bool:
        return self._alive

    def descriptors(self) -> int:
        return 9 + (self._leaks if self._visits > 1 else 0)


def acting(*outcomes: Outcome | Exception, careful=REFUSED) -> Case:
    def act(_target: object) -> Iterator[Outcome]:
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
            yield outcome
    return Case("P00", "something", frozenset(careful), act)


@pytest.mark.parametrize("outcomes, target, verdict, why", [
    ([Outcome.REFUSED, Outcome.CLOSED], {}, "pass", ""),
    ([Outcome.REFUSED, Outcome.TAKEN], {}, "LAX", "taken where closed or refused is due"),
    ([Outcome.SILENT], {}, "FAIL", "it neither answered"),
    ([NoAnswer()], {}, "FAIL", "it neither answered"),
    ([ConnectionResetError()], {}, "pass", ""),
    ([NotOffered("MTU")], {}, "n/a", "MTU is not offered"),
    ([Outcome.REFUSED, NotServed("no")], {}, "FAIL", "in the middle"),
    ([Outcome.REFUSED], {"served": False}, "FAIL", "not served any more"),
    ([Outcome.REFUSED], {"served": False, "alive": False}, "FAIL", "process 100 died"),
    ([Outcome.REFUSED], {"replaced": True}, "FAIL", "replaced by process 101"),
    ([Outcome.REFUSED], {"leaks": 3}, "FAIL", "3 descriptors were left open"),
])
def test_verdict(outcomes, target, verdict, why) -> None:
    report = judge(Answering(**target), acting(*outcomes))
    assert report.verdict == verdict
    assert why in report.why and bool(why) == bool(report.why)


def test_whatever_may_happen_is_no_silence() -> None:
    assert judge(Answering(), acting(Outcome.TAKEN, Outcome.CLOSED, careful=ANY)).verdict == "pass"
    assert judge(Answering(), acting(Outcome.SILENT, careful=ANY)).verdict == "FAIL"
    assert set(Outcome) - {Outcome.SILENT} == ANY
