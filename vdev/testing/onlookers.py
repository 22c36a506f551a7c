"""What is seen of a guest from outside while something happens to it: pings, compared bytes, load both ways."""

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from types import TracebackType

from vdev.testing.guest import LinuxGuest
from vdev.testing.measure import iperf_server, listen
from vdev.testing.netns import Namespace
from vdev.testing.process import Child


class Unwell(AssertionError):
    """The guest was not as it ought to be. The text says what was seen."""


@dataclass(frozen=True)
class Answer:
    """To the ``number``-th request, counted from 1, at ``time`` (of time.time)."""

    number: int
    time: float


class Pings:
    """Ten pings a second from ``namespace`` to ``address`` until :meth:`stop`; a context manager."""

    def __init__(self, namespace: Namespace, address: str, interval: float = 0.1) -> None:
        self._child = Child(["ping", "-D", "-n", "-i", str(interval), address], namespace=namespace)

    def answers(self) -> list[Answer]:
        """All that came so far, in the order they came."""
        found = re.findall(r"^\[([\d.]+)\] .* icmp_seq=(\d+) ttl", self._child.log(), re.MULTILINE)
        return [Answer(int(number), float(when)) for when, number in found]

    def await_answers(self, count: int, seconds: float = 60) -> None:
        """Wait for so many more answers. Raises Unwell."""
        wanted, deadline = len(self.answers()) + count, time.monotonic() + seconds
        while len(self.answers()) < wanted:
            if time.monotonic() > deadline:
                raise Unwell(f"{count} answers did not come within {seconds:g} s: {self._child.log()[-500:]}")
            time.sleep(0.1)

    def stop(self) -> int:
        """End it -> how many requests before the last one answered have no answer."""
        self._child.signal(signal.SIGINT)
        self._child.wait(5)
        numbers = {answer.number for answer in self.answers()}
        self._child.stop()
        return max(numbers, default=0) - len(numbers)

    def __enter__(self) -> "Pings":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._child.stop()


class Echo:
    """Random bytes to a guest and back all the while, compared (vdev/testing/echo.py); a context manager.

    In the guest runs an echo server on ``port``. Raises GuestError.
    """

    def __init__(self, guest: LinuxGuest, namespace: Namespace, address: str, port: int = 7) -> None:
        listen(guest, f"nc -ll -p {port} -e cat", port)
        self._process = namespace.popen([sys.executable, "-m", "vdev.testing.echo", address, str(port)],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def stop(self) -> int:
        """End it -> bytes that came back as they were sent. Raises Unwell for a byte that did not."""
        said, _ = self._process.communicate(timeout=60)
        found = json.loads(said)
        if found["problem"]:
            raise Unwell(f"after {found['bytes']} bytes: {found['problem']}")
        return found["bytes"]

    def __enter__(self) -> "Echo":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            stream.close()


class Iperf:
    """TCP both ways between ``namespace`` and a guest, as fast as it goes, all the while; a context manager."""

    def __init__(self, guest: LinuxGuest, namespace: Namespace, address: str) -> None:
        port = iperf_server(guest)
        self._child = Child(["iperf3", "--forceflush", "-c", address, "-p", str(port), "--bidir", "-t", "3600"],
                            namespace=namespace)

    def running(self) -> bool:
        """It ends when one of its connections does; it opens none again."""
        return self._child.running()

    def carried(self) -> tuple[int, int]:
        """Bytes that went to the guest and came from it so far, as iperf3 says every second, to three digits."""
        # [  5][TX-C]   0.00-1.00   sec  1.25 MBytes ...; the summary at the end says "sender" or "receiver"
        lines = re.findall(r"\[([TR])X-C\] .* sec +([\d.]+) ([KMG]?)Bytes(?!.*er$)", self._child.log(), re.MULTILINE)
        sums = {"T": 0, "R": 0}
        for way, number, unit in lines:
            sums[way] += int(float(number) * 1024 ** " KMG".index(unit or " "))
        return sums["T"], sums["R"]

    def await_both(self, seconds: float = 60) -> None:
        """Wait until some bytes more went either way. Raises Unwell."""
        before, deadline = self.carried(), time.monotonic() + seconds
        while not all(now > then for now, then in zip(self.carried(), before, strict=True)):
            if time.monotonic() > deadline:
                raise Unwell(f"iperf3 did not get on both ways within {seconds:g} s: {self._child.log()[-500:]}")
            time.sleep(0.1)

    def stop(self) -> int:
        """End it -> bytes carried, both ways together."""
        self._child.signal(signal.SIGINT)
        self._child.wait(10)
        total = sum(self.carried())
        self._child.stop()
        return total

    def __enter__(self) -> "Iperf":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._child.stop()
