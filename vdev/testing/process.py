"""A child process that cannot outlive its use: bounded stop, captured log, never a shell."""

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Sequence

from vdev.testing.netns import Namespace


class ProcessDied(RuntimeError):
    """A child ended, or did not do what was asked in time. The text ends with the last lines of its log."""


# The kernel ends the child when its parent dies, however that dies. Entering a user namespace or changing
# capabilities undoes it, which is why this goes right before the command.
TIED = ("setpriv", "--pdeathsig", "KILL", "--")


class Child:
    """A started program whose stdout and stderr go to one log.

    command: program and arguments. namespace: where it runs, this process's own by default.
    pass_fds: descriptors it inherits, under the same numbers.
    terminal: a descriptor to use as stdin and stdout instead of nothing and the log.
    """

    def __init__(self, command: Sequence[str], *, namespace: Namespace | None = None,
                 pass_fds: Sequence[int] = (), terminal: int | None = None) -> None:
        self.command = list(command)
        tied = [*TIED, *command]
        whole = namespace.command(tied) if namespace else tied
        self._log = tempfile.TemporaryFile(prefix="vdev-log-")  # noqa: SIM115 - lives as long as the child
        # A session of its own: a Ctrl-C at the terminal is the caller's to pass on, in its order.
        self.popen = subprocess.Popen(whole, stdin=subprocess.DEVNULL if terminal is None else terminal,
                                      stdout=self._log if terminal is None else terminal, stderr=self._log,
                                      pass_fds=pass_fds, start_new_session=True)

    @property
    def pid(self) -> int:
        """The process id."""
        return self.popen.pid

    def running(self) -> bool:
        """True until the process has ended."""
        return self.popen.poll() is None

    def log(self) -> str:
        """All it has printed so far; still readable after it ended."""
        if self._log.closed:
            return self._last_log
        end = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), end, 0).decode(errors="replace")

    def died(self, what: str) -> ProcessDied:
        """The error to raise when the child failed at ``what``."""
        # It has often just closed what it was heard through, and is about to end.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(0.5)
        status = self.popen.poll()
        state = "still runs" if status is None else f"ended with status {status}"
        tail = "\n".join(self.log().strip().splitlines()[-15:])
        return ProcessDied(f"{what}: {self.command[0]} {state}" + (f"\n{tail}" if tail else ""))

    def wait(self, timeout: float) -> int:
        """Its exit status (negative: a signal). Raises ProcessDied if it runs on for ``timeout`` seconds."""
        try:
            return self.popen.wait(timeout)
        except subprocess.TimeoutExpired:
            raise self.died(f"no end within {timeout:g} s") from None

    def signal(self, number: int) -> None:
        """Send a signal; a child that has ended is left in peace."""
        if self.running():
            with contextlib.suppress(ProcessLookupError):
                self.popen.send_signal(number)

    def stop(self, timeout: float = 5) -> int:
        """SIGTERM, then SIGKILL after ``timeout`` seconds. Returns the exit status; may be called again."""
        self.signal(signal.SIGTERM)
        try:
            status = self.popen.wait(timeout)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            status = self.popen.wait()
        self._close_log()
        return status

    def kill(self) -> int:
        """SIGKILL, as a crash would end it. Returns the exit status; may be called again."""
        self.signal(signal.SIGKILL)
        status = self.popen.wait()
        self._close_log()
        return status

    def _close_log(self) -> None:
        if not self._log.closed:
            self._last_log = self.log()
            self._log.close()

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
