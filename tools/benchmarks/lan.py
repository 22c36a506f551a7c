"""A network namespace with quiet TAP devices, the program that fills and drains them, and loads in processes of their
own that answer line by line."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.parts import PROJECT, NotHere, Run, processors

from vdev.testing.netns import Namespace, why_no_tap
from vdev.testing.process import TIED
from vdev.testing.testpmd import Counters

SOURCE = Path(__file__).with_name("tap_loop.c")
QUEUE = 8192  # frames that wait in a TAP
FOOTPRINT = 128 << 20  # bytes of buffers


def namespace() -> Namespace:
    """In which nobody speaks but us. Raises NotHere."""
    reason = why_no_tap()
    if reason:
        raise NotHere(f"no TAP device to be had: {reason}")
    made = Namespace()
    made.run(["sh", "-c", "for each in all default; do echo 1 >/proc/sys/net/ipv6/conf/$each/disable_ipv6; done"],
             check=False)  # a kernel without IPv6 is as quiet
    return made


def add_tap(lan: Namespace, name: str, address: str | None = None) -> None:
    """A TAP with one queue and the net header, which any program may join."""
    lan.run(["ip", "tuntap", "add", name, "mode", "tap", "vnet_hdr"])
    lan.run(["ip", "link", "set", name, "txqueuelen", str(QUEUE), "up"])
    if address:
        lan.run(["ip", "address", "add", address, "dev", name])


def build_tap_loop(run: Run) -> str:
    """The program, compiled -> its path."""
    program = run.folder / "tap_loop"
    if not program.exists():
        subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-Werror", SOURCE, "-o", program], check=True)
    return str(program)


class Answering:
    """A program on ``cpu`` that says ``ready`` and answers each line with one; a context manager."""

    def __init__(self, command: Sequence[str], cpu: int, lan: Namespace | None = None, cwd: Path | None = None) -> None:
        whole = [*TIED, "taskset", "-c", str(cpu), *command]
        self.process = subprocess.Popen(lan.command(whole) if lan else whole, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True, cwd=cwd)
        self.pid = self.process.pid
        if self.process.stdout.readline() != "ready\n":
            self.close()
            raise RuntimeError(f"{command[0]} did not get ready")

    def ask(self, line: object = "") -> str:
        """Give a line and wait for the answer."""
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()

    def close(self) -> None:
        """End it. May be called again."""
        self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class TapLoop(Answering):
    """tap_loop.c in one of its modes on ``tap``, frames of ``size`` bytes."""

    def __init__(self, run: Run, lan: Namespace, mode: str, tap: str, size: int) -> None:
        room = -(-max(size, 1526) // 2048) * 2048
        command = [build_tap_loop(run), mode, tap, str(size), str(FOOTPRINT // room), str(int(run.huge))]
        run.started(command)
        super().__init__(command, processors()[mode == "feed"], lan)

    def moved(self, number: object) -> tuple[int, float]:
        """Do it -> (frames, seconds of a processor)."""
        frames, nanoseconds = self.ask(number).split()
        return int(frames), int(nanoseconds) / 1e9


class Driver(Answering):
    """driver_load.py on the socket ``path``, on the load's processor: counters like those of a testpmd."""

    def __init__(self, run: Run, path: str, size: int, megabytes: int, **loads: object) -> None:
        wanted = json.dumps({"path": path, "size": size, "megabytes": megabytes, **loads})
        command = [sys.executable, "-m", "benchmarks.driver_load", wanted]
        run.started(command)
        super().__init__(command, processors()[1], cwd=PROJECT / "tools")
        self.name = f"the driver on {Path(path).name}"
        self.child = self

    def loads(self) -> dict:
        """What its LoadGenerators count. Raises RuntimeError when a device did what it must not."""
        loads = json.loads(self.ask())
        wrong = {way: load["errors"] for way, load in loads.items() if load["errors"]}
        if wrong:
            raise RuntimeError(f"{self.name}: {wrong}")
        return loads

    def counters(self) -> Counters:
        """Frames only; those that others sent count as received."""
        loads = self.loads()
        received = loads.get("receive", {"frames": 0, "foreign": 0})
        sent = loads.get("transmit", {"frames": 0})
        return Counters(received["frames"] + received["foreign"], sent["frames"], 0)
