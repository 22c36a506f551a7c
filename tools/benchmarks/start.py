"""``start``: the time from exec until somebody can connect, and until whoever did so at once has its first answer,
beside a testpmd with a vhost port; and until vdev has said what it is, beside a Python that does nothing."""

import socket
import subprocess
import sys
import time
from dataclasses import replace

from benchmarks.parts import NetVhost, Run, processors
from benchmarks.results import Outcome
from benchmarks.rounds import Sample, Side, interleave

from vdev.testing.process import Child
from vhost_user.frontend import FrontEnd

ANSWER_SECONDS = 20.0


class Listening(Side):
    """A program that is started anew for each sample. command: with ``old_path`` where its socket's path belongs."""

    def __init__(self, run: Run, name: str, command: list[str], old_path: str) -> None:
        self.name, self._run, self._command, self._old_path = name, run, command, old_path

    def sample(self, seconds: float) -> tuple[Sample, float]:
        path = self._run.socket()
        command = ["taskset", "-c", str(processors()[0]),
                   *(word.replace(self._old_path, path) for word in self._command)]
        held, terminal = socket.socketpair()  # a testpmd ends when nobody could tell it anything
        with held, terminal:
            began = time.monotonic()
            with Child(command, terminal=terminal.fileno()) as child:
                while (front_end := connected(path)) is None:
                    if not child.running():
                        raise child.died(f"{self.name} did not listen")
                    time.sleep(0.0005)
                listens = time.monotonic() - began
                with front_end:
                    front_end.get_features()
                    answers = time.monotonic() - began
                child.kill()
        return {"time": listens * 1000, "answer": answers * 1000}, 0.0


def connected(path: str) -> FrontEnd | None:
    """A front-end of who listens at ``path``; None where nobody does."""
    try:
        return FrontEnd.connect(path, timeout=ANSWER_SECONDS)
    except OSError:
        return None


class Telling(Side):
    """A program that prints something and ends."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name, self._command = name, command

    def sample(self, seconds: float) -> tuple[Sample, float]:
        began = time.monotonic()
        subprocess.run(self._command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, timeout=60, check=True)
        return {"time": (time.monotonic() - began) * 1000}, 0.0


def start(run: Run) -> Outcome:
    """From exec to a socket that listens, and --print-capabilities."""
    vdev = [sys.executable, "-m", "vdev"]
    path = run.socket()
    with NetVhost(run, [path], "io") as peer:
        command = peer.testpmd.child.command
    rounds = run.count(15, 5)
    listening = interleave([Listening(run, "vdev", [*vdev, "--socket-path", path, "--port", "null:"], path),
                            Listening(run, peer.name, command, path)], rounds, 0)
    telling = interleave([Telling("vdev", [*vdev, "--print-capabilities"]),
                          Telling("python", [sys.executable, "-c", ""])], rounds, 0)
    return Outcome("start", "testpmd net_vhost; a bare Python", (
        listening.figure("exec to a listening socket", "time", "ms", peer.name, limit=250),
        replace(listening.figure("exec to the first answer", "answer", "ms", peer.name), quantity="time"),
        telling.figure("--print-capabilities", "time", "ms", "python")))
