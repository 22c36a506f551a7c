"""The front-end's half of the dirty log, and what really changed: the oracle for the device's half.

vhost-user, sections "Migration" and "Log description". Page numbers are gpa // PAGE throughout.
"""

import contextlib
import mmap
import os
import time
from collections.abc import Iterable, Iterator

from ring.dirty import PAGE, DirtyLog
from ring.driver import DriverQueue, GuestMemory
from ring.virtqueue import VirtQueue
from vdev.testing.netdriver import NetDriver
from vdev.testing.rig import DeviceSide, WiredDevice


class FrontEndLog:
    """A log of ``size`` bytes, ``offset`` bytes into a memfd, on both sides: ``log`` is the device's."""

    def __init__(self, size: int, offset: int = 0) -> None:
        self.size = size
        self._offset = offset
        self.fd = os.memfd_create("dirty-log", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, offset + size)
        self._file = mmap.mmap(self.fd, offset + size)
        self.log = DirtyLog(self.fd, size, offset)

    def __enter__(self) -> "FrontEndLog":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def take(self) -> set[int]:
        """The pages marked since the last time; while nobody marks, for it is not atomic.

        Raises AssertionError when the device wrote beside its log.
        """
        data = self._file[:]
        self._file[:] = bytes(len(data))
        if any(data[:self._offset]) or len(data) != self._offset + self.size:
            raise AssertionError("the file of the log was written outside of the log")
        bits, marked = int.from_bytes(data[self._offset:], "little"), set()
        while bits:
            lowest = bits & -bits
            marked.add(lowest.bit_length() - 1)
            bits ^= lowest
        return marked

    def truncate(self) -> None:
        """Do what a hostile front-end does: cut the file down to nothing."""
        os.ftruncate(self.fd, 0)

    def close(self) -> None:
        """Unmap both sides. No queue may log to it any more."""
        self.log.close()
        self._file.close()
        os.close(self.fd)


def covering(memory: GuestMemory) -> int:
    """Bytes of a log for all of ``memory``, as a front-end works them out."""
    return max(region.gpa + region.size - 1 for region in memory.regions) // PAGE // 8 + 1


def pages(*ranges: tuple[int, int]) -> set[int]:
    """The pages of these (gpa, bytes)."""
    return {page for gpa, length in ranges if length for page in range(gpa // PAGE, (gpa + length - 1) // PAGE + 1)}


def changed(memory: GuestMemory, before: Iterable[bytes], after: Iterable[bytes] | None = None) -> set[int]:
    """The pages of ``memory`` that differ between its snapshots; after: None: now."""
    found = set()
    for region, old, new in zip(memory.regions, before, after or memory.snapshot(), strict=True):
        start, end = region.gpa, region.gpa + region.size
        while old != new and start < end:
            next_page = min((start // PAGE + 1) * PAGE, end)
            part = slice(start - region.gpa, next_page - region.gpa)
            if old[part] != new[part]:
                found.add(start // PAGE)
            start = next_page
    return found


def written_parts(queue: DriverQueue) -> list[tuple[int, int]]:
    """The (gpa, bytes) of a ring that the device writes."""
    descriptors, _, used = queue.ring.areas
    return [descriptors, used] if queue.packed else [used]


def log_all(device: WiredDevice, driver: NetDriver, log: DirtyLog | None) -> None:
    """As VHOST_F_LOG_ALL, and VHOST_VRING_F_LOG of both rings, switch it; while the lane is detached."""
    for flow, queue in ((device.config.from_guest, driver.transmitq), (device.config.to_guest, driver.receiveq)):
        flow.queue.log(log, used=queue.ring.areas[2].gpa)


def run(device: WiredDevice, frames: int) -> None:
    """Lend the lane until so many more frames are through or dropped, or nothing moves any more."""
    def done() -> int:
        return device.to_guest.frames + sum(device.to_guest.dropped.values())

    wanted, quiet = done() + frames, 0
    device.attach()
    while done() < wanted and quiet < 50:
        before = device.lane.stats()
        time.sleep(0.001)
        quiet = quiet + 1 if device.lane.stats() == before else 0
    device.detach()


def on_pages(memory: GuestMemory, count: int = 1, region: int = 0) -> int:
    """The gpa of so many new pages."""
    return memory.alloc(count * PAGE, align=PAGE, region=region)


@contextlib.contextmanager
def logged(size: int = 8, features: int = 0, *, used: int | None = None, log: int | None = None, offset: int = 0,
           memory: GuestMemory | None = None) -> Iterator[tuple[DriverQueue, VirtQueue, FrontEndLog]]:
    """Both halves of one queue and of its log.

    used: log_guest_addr; None: where the used ring is. log: bytes; None: enough. offset: of the log in its file.
    memory: stays the caller's; None: 1 MiB at gpa 1 MiB.
    """
    with contextlib.ExitStack() as stack:
        guest = memory or stack.enter_context(GuestMemory(1 << 20, gpa=1 << 20))
        driver = stack.enter_context(DriverQueue(guest, size, features))
        front_end = stack.enter_context(FrontEndLog(log or covering(guest), offset))
        queue = stack.enter_context(DeviceSide(guest)).queue(driver)
        queue.log(front_end.log, used=driver.ring.areas[2].gpa if used is None else used)
        yield driver, queue, front_end
