"""The linter of one device: it serves the device's lanes, looks at its messages, and says what it found."""

import time

from vdev.lint.commands import broken
from vdev.lint.findings import Findings
from vdev.lint.lane import Turns
from vdev.lint.messages import MessageWatch
from vdev.logs import EventLog
from vdev.net.control.command import Context
from vhost_user.codec import Message
from vhost_user.errors import Close
from vhost_user.session import Session

LOOK_EVERY = 0.25  # seconds between looks for a chain that waits without its kick


class Linter:
    """strict: the first MUST that is broken ends the session, with a line that says so."""

    def __init__(self, log: EventLog, strict: bool) -> None:
        self.findings = Findings(log, strict)
        self.turns = Turns(self.findings)
        self.failed = False  # a session was ended for what its driver did
        self._messages = MessageWatch(self.findings)
        self._next_look: float | None = None

    def message(self, session: Session, message: Message) -> None:
        """``message`` came. Raises Close."""
        if self._next_look is None:
            self._next_look = time.monotonic() + LOOK_EVERY
        self._messages.on(session, message)
        self._judge()

    def command(self, command: bytes, context: Context) -> None:
        """A command of the control queue is about to be executed."""
        self.findings.looked_at["commands"] += 1
        for id, evidence in broken(command, context):
            self.findings.add(id, f"the control queue: {evidence}")
        self.turns.owe()  # to judge, behind the command

    @property
    def deadline(self) -> float | None:
        """When :meth:`on_deadline` is due (``time.monotonic``); None before the first message."""
        return self._next_look

    def on_deadline(self) -> None:
        """Look for what only time tells. Raises Close."""
        now = time.monotonic()
        if self._next_look is not None and now >= self._next_look:
            self._next_look = now + LOOK_EVERY
            self.turns.on_time()
            self._judge()

    def turn(self) -> None:
        """Serve the rings for a while. Raises Close."""
        self.turns.turn()
        self._judge()

    def _judge(self) -> None:
        if self.findings.fatal is not None:
            self.failed = True
            raise Close(self.findings.fatal)

    def session_over(self) -> None:
        """Sum up."""
        self._next_look = None
        self.findings.conclude()

    def close(self) -> None:
        """The engine must have been closed."""
        self.turns.close()
