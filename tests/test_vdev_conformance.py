"""vdev check: what it says of vdev itself, and that a back-end with a mistake does not pass."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

import pytest

from vdev.conformance import checks, report, table
from vdev.conformance.verdict import Result, Verdict
from vdev.testing.daemon import Daemon

# What vdev does not do; docs/conformance.md tells about it.
KNOWN = {"ST-D-04"}
KNOWN_AT_A_SWITCH = KNOWN | {"VU-NET-B-01"}
KNOWN_OF_A_WHOLE_DEVICE = KNOWN | {"NET-CFG-D-04"}


@contextmanager
def device(folder: Path, patch: str = "", port: str = "loopback:", options: Sequence[str] = ()) -> Iterator[str]:
    """The socket of a vdev that ran ``patch`` before it began; a second one, for its other side, is PATH.peer."""
    path = str(folder / "socket")
    begin = f"{patch}\nimport sys\nfrom vdev.cli import main\nsys.exit(main(['run', *sys.argv[1:]]))"
    devices = [word for name in (path, f"{path}.peer") for word in ("--device", f"socket={name},port={port}")]
    daemon = Daemon([*devices, *options], program=["-c", begin])
    try:
        yield path
    finally:
        daemon.child.kill()


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "vdev", "check", *arguments], capture_output=True, text=True,
                          timeout=300)


def verdicts(done: subprocess.CompletedProcess) -> dict[str, tuple[str, str]]:
    """Row -> verdict, and what came."""
    return {row["row"]: (row["verdict"], row["came"]) for row in json.loads(done.stdout)["rows"]}


# --------------------------------------------------------------------------------------------- the table


def test_every_row_has_a_section() -> None:
    assert len(table.rows()) == 380
    for row in table.rows().values():
        assert table.section(row.id) in table.SECTIONS
        assert row.level in ("MUST", "MUST NOT", "SHOULD", "SHOULD NOT", "MAY"), row
        assert re.match(r"virtio 1\.[234], |vhost-user(, |\.json)", row.section), row
        assert row.requirement and row.applies_when and row.left_out.startswith(("", "not testable: ")), row


def test_every_check_is_about_a_row_and_says_what_it_does() -> None:
    for id, check in checks.by_row().items():
        assert id in table.rows()
        assert check.did.endswith("."), id


def test_rows_are_chosen_by_id_and_section() -> None:
    assert [row.id for row in table.chosen(["VU-MEM-B-0[12]"], [])] == ["VU-MEM-B-01", "VU-MEM-B-02"]
    assert {table.section(row.id) for row in table.chosen([], ["log"])} == {"log"}
    assert table.chosen(["VU-MEM-*"], ["log"]) == []


# --------------------------------------------------------------------------------------------- the report

RESULTS = [Result("VQ-SPLIT-D-11", Verdict.FAIL, "It is tried.", "no call came", ("sent this", "came that"), 0.5),
           Result("VQ-SPLIT-D-09", Verdict.PASS, "It is tried.", seconds=0.25),
           Result("VU-MEM-B-04", Verdict.NOT_OFFERED, came="GPA_ADDRESSES is not offered")]


def test_report_tells_failures_as_stories() -> None:
    lines = list(report.text(RESULTS))
    assert lines[1].split() == ["memory", ".", ".", "1", ".", "."]
    assert lines[2].split() == ["split", "1", "1", ".", ".", "."]
    story = "\n".join(lines[4:])
    for told in ("VQ-SPLIT-D-11: MUST, virtio 1.2, 2.7.7.2", "asked", "done   It is tried.", "seen   no call came",
                 "| sent this", "3 rows: 1 that MUST be so is not, and 0 that SHOULD or MAY"):
        assert told in story


def test_report_for_programs() -> None:
    entry = json.loads(report.as_json({"socket": "x"}, RESULTS))["rows"][0]
    assert (entry["row"], entry["verdict"], entry["came"], entry["trace"]) == (
        "VQ-SPLIT-D-11", "fail", "no call came", ["sent this", "came that"])
    suite = ElementTree.fromstring(report.as_junit(RESULTS))
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("3", "1", "1")
    assert suite[0].find("failure").get("message") == "no call came"


def test_only_a_must_counts() -> None:
    assert report.violated(RESULTS)
    assert not report.violated([Result("VQ-SPLIT-D-10", Verdict.FAIL), *RESULTS[1:]])


# ---------------------------------------------------------------------------------------- against vdev


def test_some_rows_of_vdev(tmp_path: Path) -> None:
    junit = tmp_path / "junit.xml"
    rows = "VU-MSG-B-0[2-4],VU-REPLY-B-0[1-6],VU-RING-B-0[14789],VU-BASE-B-0[45],VQ-*-D-15,NET-RX-D-0[16],FEAT-D-03"
    with device(tmp_path) as path:
        done = run(path, "--wire", "reflect", "--only", rows, "--json", "--junit", str(junit))
    found = verdicts(done)
    assert len(found) > 15
    assert {row: said for row, said in found.items() if said[0] not in ("pass", "not offered")} == {}
    assert done.returncode == 0 and done.stderr == ""
    assert len(ElementTree.parse(junit).getroot()) == len(found)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("port, options, wire, known, least", [
    ("loopback:", (), "reflect", KNOWN, 195), ("switch:lan,queue-pairs=2", (), "socket", KNOWN_AT_A_SWITCH, 205),
    ("loopback:", ("--personality", "full"), "reflect", KNOWN_OF_A_WHOLE_DEVICE, 215)])
def test_vdev_passes(tmp_path: Path, port, options, wire, known, least) -> None:
    with device(tmp_path, port=port, options=options) as path:
        done = run(path, "--wire", f"socket:{path}.peer" if wire == "socket" else wire, "--json")
    found = verdicts(done)
    assert {row for row, (verdict, _) in found.items() if verdict == "fail"} == known
    assert sum(verdict == "pass" for verdict, _ in found.values()) >= least


# --------------------------------------------------------------------------- a back-end with a mistake

def test_back_end_that_dies_is_said_to(tmp_path: Path) -> None:
    patch = ("import os, vhost_user.effects as e, vhost_user.requests as r\nfrom dataclasses import replace\n"
             "row = r.REQUESTS[r.Request.RESET_OWNER]\n"
             "r.REQUESTS[r.Request.RESET_OWNER] = replace(row, effect=lambda *_: os._exit(3))")
    with device(tmp_path, patch) as path:
        done = run(path, "--only", "VU-FEAT-B-09,VU-RING-B-07", "--json", "--seconds", "1")
    found = verdicts(done)
    assert found["VU-FEAT-B-09"][0] == "fail" and "serves nobody any more" in found["VU-FEAT-B-09"][1]
    assert found["VU-RING-B-07"] == ("not reachable", "the back-end serves nobody since the check of VU-FEAT-B-09")


@pytest.mark.parametrize("arguments, said", [
    (["x", "--section", "nonsense"], "vdev: --section nonsense: unknown; known: status, features"),
    (["x", "--only", "NONSENSE"], "vdev: no row is chosen; ids are like VQ-SPLIT-D-11"),
    (["x", "--wire", "pigeon"], "vdev: --wire pigeon: unknown; known: reflect, tap:NAME, socket:PATH"),
    (["/nowhere/at/all", "--seconds", "0.1"], "vdev: /nowhere/at/all: no back-end answers there, so nothing can be "
     "told: "),
])
def test_mistakes_are_one_line(arguments, said) -> None:
    done = run(*arguments)
    assert done.returncode in (1, 2) and done.stderr.startswith(said) and done.stderr.count("\n") == 1
