"""What fails around a device: guests in processes that are stopped and killed, a daemon that has nothing left."""

import contextlib
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from vdev.testing.kept import FRAME, WAIT
from vdev.testing.process import Child
from vdev.testing.scripted import ScriptedGuest

# A guest that sends frames to itself for ever, and writes a dot for each that came back whole.
_FLOODING = """
import sys
from vdev.testing.kept import FRAME
from vdev.testing.scripted import ScriptedGuest
with ScriptedGuest.connect(sys.argv[1], size=64) as guest:
    while guest.exchange(FRAME, 60) == FRAME and guest.driver.reclaim_all(60):
        print(".", end="", flush=True)
print("lost")
"""


@contextlib.contextmanager
def flooding(path: str) -> Iterator[Child]:
    """Such a guest behind the back-end at ``path``, whose port is a loopback, once it is at work."""
    with Child([sys.executable, "-c", _FLOODING, path]) as child:
        goes_on(child)
        yield child


def goes_on(child: Child, frames: int = 20) -> None:
    """Wait until the guest in ``child`` has had ``frames`` more. Raises AssertionError where they do not come."""
    wanted = len(child.log()) + frames
    deadline = time.monotonic() + 3 * WAIT
    while len(child.log()) < wanted:
        assert child.running() and time.monotonic() < deadline, child.log()
        time.sleep(0.01)
    assert "lost" not in child.log()


def goes_round(guest: ScriptedGuest, frame: bytes = FRAME) -> bool:
    """Does a frame that ``guest`` sends come back, and its buffer?"""
    return guest.exchange(frame, WAIT) == frame and guest.driver.reclaim_all(WAIT)


def processor_seconds(pid: int) -> float:
    """Processor time that process ``pid`` has used. Raises OSError when there is none."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def limited(pid: int, limit: int, value: int) -> Iterator[None]:
    """Process ``pid`` may have no more than ``value`` of ``limit`` (a RLIMIT_* number) for a while."""
    soft, hard = resource.prlimit(pid, limit)
    resource.prlimit(pid, limit, (value, hard))
    try:
        yield
    finally:
        resource.prlimit(pid, limit, (soft, hard))
