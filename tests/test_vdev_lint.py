"""The linter as a user meets it: its options, its lines in the log, the end of a session; and that nothing is left
out of its documentation or of its tests."""

import re
from pathlib import Path

import pytest

from tests.test_vdev_lint_commands import CASES as COMMAND_CASES
from tests.test_vdev_lint_messages import CASES as MESSAGE_CASES
from tests.test_vdev_lint_rings import CASES as RING_CASES
from vdev.config import build
from vdev.errors import Misuse
from vdev.lint.findings import Findings
from vdev.lint.rules import RULES
from vdev.logs import EventLog
from vdev.net.features import Feature, mask
from vdev.testing.daemon import Daemon
from vdev.testing.netdriver import NetHeader
from vdev.testing.rows import read
from vdev.testing.scripted import ScriptedGuest
from vdev.testing.served import ServedDevice, both_ways
from vdev.testing.waiting import wait_until

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs/lint.md"


def test_every_rule_has_a_driver_that_breaks_it() -> None:
    tests = (ROOT / "tests/test_vdev_lint_rings.py").read_text()
    alone = {id.replace("_", "-") for id in re.findall(r"^def test_\w+?_((?:LINT|NET)_[A-Z_0-9]+)\(", tests, re.M)}
    broken = {case.id for case in (*RING_CASES, *MESSAGE_CASES)} | {id for id, *_ in COMMAND_CASES}
    assert broken | alone == RULES.keys()


def test_the_table_in_the_documentation_is_this_one() -> None:
    rows = re.findall(r"^\| ([A-Z]+-[A-Z0-9-]+) \| ([A-Z ]+) \| (.+?) \| (.+?) \|$", DOCUMENT.read_text(), re.M)
    assert rows == [(rule.id, rule.level, rule.section, rule.requirement) for rule in RULES.values()]


def test_a_rule_says_what_its_row_says() -> None:
    """Level and section, for the rules that are rows of the tables of requirements."""
    rows = {row.id: row for table in (ROOT / "docs/conformance").glob("*.tsv") for row in read(table)}
    both = rows.keys() & RULES.keys()
    assert len(both) >= 15
    assert {id: (RULES[id].level, RULES[id].section) for id in both} == \
        {id: (rows[id].level, rows[id].section) for id in both}


# ------------------------------------------------------------------------------------------ options

def config(**given: object):
    return build({}, given, {"socket": "/tmp/x.sock"}, devices=[], file=None, passed=[])


@pytest.mark.parametrize(("given", "lint"), [(True, "on"), (False, "off"), ("on", "on"), ("strict", "strict")])
def test_what_lint_may_be(given: object, lint: str) -> None:
    assert config(lint=given).devices[0].lint == lint


def test_it_is_off_by_itself() -> None:
    assert config().devices[0].lint == "off"


def test_what_does_not_go_with_it() -> None:
    with pytest.raises(Misuse) as caught:
        build({"upgrade-path": "/tmp/u.sock"}, {"lint": "on", "postcopy": True},
              {"socket": "/tmp/x.sock", "port": "switch:lan"}, devices=[], file=None, passed=[])
    lines = "\n".join(caught.value.args)
    for what in ("lint does not go with switch:lan", "lint does not go with postcopy", "--upgrade-path"):
        assert what in lines


def test_another_word_is_a_mistake() -> None:
    with pytest.raises(Misuse, match="must be one of off, on, strict"):
        config(lint="harsh")


# ------------------------------------------------------------------------------------- findings

class _Lines(EventLog):
    """Keeps (event, text, fields)."""

    def __init__(self) -> None:
        super().__init__("test")
        self.lines: list[tuple[str, str, dict]] = []

    def _write(self, level: int, event: str, text: str, fields: dict) -> None:
        self.lines.append((event, text, fields))


def test_a_finding_is_told_once_and_counted() -> None:
    log = _Lines()
    findings = Findings(log)
    findings.looked_at["chains"] = 3
    for _ in range(3):
        findings.add("VQ-SPLIT-DR-12", "receiveq 0: flags is 2")
    findings.add("NET-TX-DR-14", "hdr_len is 0")
    findings.conclude()
    events = [event for event, _, _ in log.lines]
    assert events == ["lint", "lint", "lint-summary"]
    first, summary = log.lines[0], log.lines[2]
    for part in ("VQ-SPLIT-DR-12", "receiveq 0: flags is 2", "2.7.7.1", RULES["VQ-SPLIT-DR-12"].hint):
        assert part in first[1]
    assert first[2]["row"] == "VQ-SPLIT-DR-12" and first[2]["must"]
    assert "2 rules broken (1 MUST) in 3 chains: VQ-SPLIT-DR-12 3 times, NET-TX-DR-14" in summary[1]
    assert findings.fatal is None and not findings.counts


def test_strict_is_about_what_must_be() -> None:
    findings = Findings(_Lines(), strict=True)
    findings.add("NET-TX-DR-14", "hdr_len is 0")
    assert findings.fatal is None
    findings.add("NET-TX-DR-02", "num_buffers is 1")
    assert "NET-TX-DR-02" in findings.fatal


def test_a_session_without_a_message_has_no_summary() -> None:
    log = _Lines()
    Findings(log).conclude()
    assert log.lines == []


# --------------------------------------------------------------------------------- a device's session

PACKED = mask(Feature.RING_PACKED)


@pytest.mark.parametrize("features", [0, PACKED, mask(Feature.IN_ORDER)], ids=["split", "packed", "in_order"])
def test_an_honest_guest_is_served_and_clean(features: int) -> None:
    usual = mask(Feature.VERSION_1, Feature.MRG_RXBUF, Feature.EVENT_IDX, Feature.INDIRECT_DESC)
    with ServedDevice(lint="on") as served:
        with ScriptedGuest(served.connect(), features=usual | features) as guest:
            for _ in range(3):
                both_ways(served, guest)
        assert "no rule broken" in served.wait_for("lint-summary")
        assert served.lines("lint") == []


def test_what_a_guest_breaks_is_told_while_it_goes_on() -> None:
    with ServedDevice(lint="on") as served:
        with ScriptedGuest(served.connect()) as guest:
            for _ in range(3):
                guest.drivers[0].transmit(bytes(60), NetHeader(num_buffers=7))
            assert "num_buffers is 7" in served.wait_for("lint")
            assert guest.drivers[0].reclaim_all(5)
        assert "NET-TX-DR-02 3 times" in served.wait_for("lint-summary")
        assert len(served.lines("lint")) == 1


def test_strict_ends_the_session_and_says_why() -> None:
    with ServedDevice(lint="strict") as served:
        with ScriptedGuest(served.connect()) as guest:
            guest.drivers[0].transmit(bytes(60), NetHeader(num_buffers=7))
            reason = served.wait_for("session-end")
        assert "NET-TX-DR-02" in reason and "--lint=strict" in reason
        assert served.device.linter.failed
        with ScriptedGuest(served.connect()) as guest:  # and the next one is served
            guest.drivers[0].transmit(bytes(60))
            assert guest.drivers[0].reclaim_all(5)


def test_a_missing_kick_is_found_by_the_clock() -> None:
    with ServedDevice(lint="on") as served, ScriptedGuest(served.connect()) as guest:
        driver = guest.drivers[0]
        driver.transmit(bytes(60))
        assert driver.reclaim_all(5)
        wait_until(lambda: not driver.transmitq.ring.used.flags, "the device asks for kicks")
        driver.offer(bytes(60))
        driver.transmitq.publish()
        assert "VQ-SPLIT-DR-17" in served.wait_for("lint")


def test_the_iommu_is_not_offered() -> None:
    with ServedDevice(lint="on") as served, ScriptedGuest(served.connect()) as guest:
        assert not guest.qemu.offered & mask(Feature.ACCESS_PLATFORM)


@pytest.mark.parametrize(("num_buffers", "status"), [(0, 0), (7, 1)])
def test_the_exit_status_tells_after_one_strict_session(tmp_path: Path, num_buffers: int, status: int) -> None:
    path = str(tmp_path / "s")
    daemon = Daemon(["--socket-path", path, "--port", "null:", "--lint=strict", "--one-off"])
    try:
        with ScriptedGuest.connect(path) as guest:
            guest.drivers[0].transmit(bytes(60), NetHeader(num_buffers=num_buffers))
            if not status:
                assert guest.drivers[0].reclaim_all(10)
            else:
                wait_until(lambda: daemon.events("session-end"), "the session is ended")
        assert daemon.child.wait(20) == status
        assert ("broke (--lint=strict)" in daemon.child.log()) == bool(status)
    finally:
        daemon.child.kill()
