"""What the linter has found in one session: counted by rule, told once each, summed up at the end."""

import logging
from collections import Counter

from vdev.lint.rules import RULES, Rule
from vdev.logs import EventLog


class Findings:
    """strict: the first MUST that is broken is to end the session (:attr:`fatal`)."""

    def __init__(self, log: EventLog, strict: bool = False) -> None:
        self._log = log
        self._strict = strict
        self.counts: Counter[str] = Counter()  # by id of a rule, in this session
        self.evidence: dict[str, str] = {}  # of the first of each
        self.fatal: str | None = None  # why the session has to end
        self.looked_at: Counter[str] = Counter()  # "messages", "chains", "frames"
        self._told: set[str] = set()  # ids that a line was written about in an earlier session or this one

    def add(self, id: str, evidence: str) -> None:
        """The rule ``id`` was broken. evidence: what was seen, and where."""
        rule = RULES[id]
        self.counts[id] += 1
        if self.counts[id] > 1:
            return
        self.evidence[id] = evidence
        text = _told(rule, evidence)
        fields = {"row": id, "must": rule.binding, "section": rule.section, "evidence": evidence, "hint": rule.hint}
        if id in self._told:  # a guest that reboots in a circle
            self._log.peer(logging.WARNING, "lint", text, **fields)
        else:
            self._told.add(id)
            self._log.warning("lint", text, **fields)
        if self._strict and rule.binding and self.fatal is None:
            self.fatal = f"{text} (--lint=strict)"

    def conclude(self) -> None:
        """The session is over: one line of summary, unless nothing was there to look at, and a new start."""
        counts, looked_at = dict(self.counts), dict(self.looked_at)
        if looked_at:
            self._log.info("lint-summary", self.summary(), broken=counts, looked_at=looked_at)
        self.counts.clear()
        self.evidence.clear()
        self.looked_at.clear()
        self.fatal = None

    def summary(self) -> str:
        """All of it in one line."""
        seen = ", ".join(f"{count} {what}" for what, count in self.looked_at.items())
        if not self.counts:
            return f"lint: no rule broken in {seen}"
        listed = ", ".join(f"{id} {count} times" if count > 1 else id for id, count in self.counts.most_common())
        binding = sum(RULES[id].binding for id in self.counts)
        return f"lint: {len(self.counts)} rules broken ({binding} MUST) in {seen}: {listed}"


def _told(rule: Rule, evidence: str) -> str:
    section = rule.section
    if section[0].isdecimal():
        section = f"virtio 1.2, {section}"
    elif not section.startswith("virtio"):
        section = f"vhost-user, {section}"
    who = "the front-end" if rule.id.startswith("VU-") else "the driver"
    return (f"lint: {rule.id}: {evidence}; {who} {rule.level} "
            f"{rule.requirement} ({section}): {rule.hint}")
