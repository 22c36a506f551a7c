"""A network namespace of one's own: as root directly, as a plain user inside a user namespace.

A small holder process keeps the namespace alive; commands enter it with nsenter. The holder ends when its
standard input closes, so that the kernel takes the namespace and every link in it away even when the
process that made it is killed.
"""

import os
import shutil
import subprocess
from collections.abc import Sequence


class NamespaceError(RuntimeError):
    """No namespace, or a command in it failed. The first line says what and why."""


class Namespace:
    """A network namespace with its loopback up; a context manager.

    Raises NamespaceError where this machine grants none, with the reason.
    """

    def __init__(self) -> None:
        for program in ("unshare", "nsenter", "ip"):
            if not shutil.which(program):
                raise NamespaceError(f"no {program} on this machine: apt install util-linux iproute2")
        user = [] if os.geteuid() == 0 else ["--map-root-user"]
        self._holder = subprocess.Popen(
            ["unshare", *user, "--net", "sh", "-c", "echo made; read _"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if self._holder.stdout.readline() != "made\n":
            reason = self._holder.stderr.read().strip()
            self.close()
            raise NamespaceError(f"no network namespace: {reason}")
        enter = ["--user", "--preserve-credentials"] if user else []
        self._prefix = ["nsenter", f"--target={self._holder.pid}", *enter, "--net", "--"]
        self.run(["ip", "link", "set", "lo", "up"])

    def command(self, command: Sequence[str]) -> list[str]:
        """``command`` as it must be started from outside to run in here."""
        return [*self._prefix, *command]

    def run(self, command: Sequence[str], timeout: float = 30,
            check: bool = True) -> subprocess.CompletedProcess:
        """Run a command to its end; output as text. With ``check`` a failure raises NamespaceError."""
        try:
            done = subprocess.run(self.command(command), capture_output=True, text=True, timeout=timeout,
                                  stdin=subprocess.DEVNULL, check=False)
        except subprocess.TimeoutExpired:
            raise NamespaceError(f"{' '.join(command)}: no end within {timeout:g} s") from None
        if check and done.returncode:
            raise NamespaceError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
        return done

    def popen(self, command: Sequence[str], **options: object) -> subprocess.Popen:
        """Start a command in here; ``options`` as subprocess.Popen takes them."""
        return subprocess.Popen(self.command(command), **options)

    def close(self) -> None:
        """End the holder; the namespace goes when the last process in it has ended. May be called again."""
        if self._holder.stdin and not self._holder.stdin.closed:
            self._holder.stdin.close()
        try:
            self._holder.wait(5)
        except subprocess.TimeoutExpired:
            self._holder.kill()
            self._holder.wait()
        self._holder.stdout.close()
        self._holder.stderr.close()

    def __enter__(self) -> "Namespace":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def why_no_tap() -> str | None:
    """Why a namespace with a TAP device cannot be had here, or None when it can."""
    try:
        with Namespace() as namespace:
            namespace.run(["ip", "tuntap", "add", "probe", "mode", "tap"])
    except NamespaceError as reason:
        return str(reason)
    return None
