"""vdev itself as a child process, as an operator starts it: for system tests and the demonstration."""

import json
import os
import select
import sys
from collections.abc import Sequence

from vdev.testing.netns import Namespace
from vdev.testing.process import TIED, Child, ProcessDied

READY_SECONDS = 60
# For a machine that does much else; that one second is enough where nothing else runs has a test of its own.
STOP_SECONDS = 30

# As root, what a plain user is: no capability now and none to be had from an executed file.
WITHOUT_CAPABILITIES = ("setpriv", "--no-new-privs", "--securebits=+noroot", "--inh-caps=-all",
                        "--bounding-set=-all", "--")

# Options of a daemon whose descriptors and mappings are to be looked at: the sandbox hides them from all but root.
VISIBLE = () if os.geteuid() == 0 else ("--sandbox", "off")


def as_plain_user(command: Sequence[str]) -> list[str]:
    """``command`` as a user without privileges runs it: root's capabilities are dropped, if it is root."""
    # Tied again: the kernel forgets the wish to end with the parent when capabilities change.
    return [*WITHOUT_CAPABILITIES, *TIED, *command] if os.geteuid() == 0 else list(command)


class Daemon:
    """A running ``vdev``; a context manager. The constructor returns when the daemon says it is ready.

    arguments: of the command line, e.g. ``["--socket-path", path, "--port", "tap:vdev0"]``.
    namespace: where it makes its TAP devices. privileged: False takes root's capabilities away.
    pass_fds: descriptors it inherits. program: what Python runs instead of ``-m vdev run``.
    Raises ProcessDied with the daemon's own words when it does not start.
    """

    def __init__(self, arguments: Sequence[str], *, namespace: Namespace | None = None,
                 privileged: bool = True, pass_fds: Sequence[int] = (),
                 program: Sequence[str] = ("-m", "vdev", "run")) -> None:
        ready, daemon_ready = os.pipe()
        try:
            command = [sys.executable, *program, *arguments, "--log-format", "json",
                       "--ready-fd", str(daemon_ready)]
            try:
                self.child = Child(command if privileged else as_plain_user(command), namespace=namespace,
                                   pass_fds=[daemon_ready, *pass_fds])
            finally:
                os.close(daemon_ready)
            self._wait_until_ready(ready)
        finally:
            os.close(ready)

    def _wait_until_ready(self, ready: int) -> None:
        poll = select.poll()
        poll.register(ready, select.POLLIN)
        # A daemon that gives up closes the pipe: that, too, ends the wait.
        if not poll.poll(READY_SECONDS * 1000) or os.read(ready, 16) != b"READY\n":
            failure = self.child.died("vdev did not get ready")
            self.child.kill()
            raise failure

    def events(self, name: str) -> list[dict]:
        """The log lines of kind ``name`` so far, decoded, oldest first."""
        lines = [json.loads(line) for line in self.child.log().splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == name]

    def stop(self) -> str:
        """End it as an operator does, and return its log.

        Raises ProcessDied unless it ends within STOP_SECONDS with status 0, without a traceback or a fault of
        its own in the log. May be called again.
        """
        running = self.child.running()
        status = self.child.stop(STOP_SECONDS)
        log = self.child.log()
        faults = [line for line in log.splitlines() if "Traceback" in line or '"internal error' in line]
        if status or faults:
            what = "had ended on its own" if not running else f"did not end well within {STOP_SECONDS} s of SIGTERM"
            raise ProcessDied(f"vdev {what} (status {status})\n{log}")
        return log

    def __enter__(self) -> "Daemon":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.stop()
        else:
            self.child.kill()
