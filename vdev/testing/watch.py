"""Looking at a device from outside while it works, for tests of what it does when; and traffic for it."""

import contextlib
import itertools
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from ring.driver import Buffer, GuestMemory
from vdev.testing.netdriver import NetDriver, NetHeader, Received
from vdev.testing.rig import WiredDevice

Seen = TypeVar("Seen")


def until(device: WiredDevice, condition: Callable[[], object], seconds: float = 10) -> bool:
    """Let ``device`` work until ``condition`` holds -> False if it does not within ``seconds``.

    What the device reports meanwhile is taken and forgotten; ask errors() for rings that broke.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        device.events(0)
        time.sleep(0.001)
    return True


def settle(device: WiredDevice) -> None:
    """Let ``device`` come to the end of what it is doing, notifications included, and look once more."""
    device.detach()
    device.attach()


@contextlib.contextmanager
def watching(look: Callable[[], Seen]) -> Iterator[list[Seen]]:
    """Call ``look`` again and again on a thread of its own -> what it returned, in order; what did not
    change since the last look is left out. Complete when the context ends, which raises what ``look`` raised.
    """
    seen: list[Seen] = []
    failures: list[Exception] = []
    started, stop = threading.Event(), threading.Event()

    def run() -> None:
        try:
            while True:
                last = stop.is_set()
                value = look()
                if not seen or seen[-1] != value:
                    seen.append(value)
                started.set()
                if last:
                    return
                time.sleep(0)  # let go of the interpreter: a device in Python must get on
        except Exception as failure:
            failures.append(failure)
            started.set()

    thread = threading.Thread(target=run, daemon=True)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    thread.start()
    started.wait()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
    for failure in failures:
        raise failure


def noise(length: int = 60, seed: int = 0) -> bytes:
    """A frame of ``length`` bytes in which every byte out of place shows."""
    return random.Random(seed).randbytes(length)


def placed(memory: GuestMemory, data: bytes) -> Buffer:
    """``data`` in a device-readable buffer of its own, which no driver frees or writes over."""
    gpa = memory.alloc(len(data))
    memory.write(gpa, data)
    return Buffer(gpa, len(data))


def delivered(driver: NetDriver, device: WiredDevice) -> Received:
    """The next frame for the guest; its buffers are not posted again. Raises AssertionError if none comes."""
    assert until(device, driver.receiveq.ring.pending), "no frame for the guest"
    received = driver.receive(refill=False)
    assert received is not None
    return received


def on_wire(device: WiredDevice, count: int) -> list[tuple[NetHeader, bytes]]:
    """The next ``count`` frames that the device puts on the wire, header and frame; fewer if one does not come."""
    return list(itertools.takewhile(bool, (device.receive() for _ in range(count))))


def was_called(driver: NetDriver, device: WiredDevice, frames: int = 1) -> bool:
    """Have ``frames`` sent in one burst -> whether the driver was called. The chains are collected.

    Raises AssertionError if not all of them are sent and used.
    """
    queue = driver.transmitq
    device.detach()
    queue.called()
    for _ in range(frames):
        driver.offer(noise())
    queue.publish()
    device.attach()
    assert on_wire(device, frames) == [(NetHeader(), noise())] * frames
    assert until(device, lambda: queue.ring.pending() == frames)
    settle(device)
    driver.reclaim()
    return queue.called()


def exchange(driver: NetDriver, device: WiredDevice, count: int) -> None:
    """``count`` frames each way, one by one, each announced only if the device wants to hear of it.

    Raises AssertionError for the first that does not arrive.
    """
    for number in range(count):
        data = noise(seed=number)
        driver.transmit(data)
        assert device.receive(2) == (NetHeader(), data)
        driver.fill(1)
        device.send(data)
        assert delivered(driver, device).frame == data
        assert until(device, driver.transmitq.ring.pending)
        driver.reclaim()
        time.sleep(0.002)  # now and then it has gone to sleep before the next one comes
