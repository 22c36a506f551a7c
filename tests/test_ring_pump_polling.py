"""A worker that looks at rings instead of waiting for kicks, and one that sleeps.

That no notification is lost between looking and sleeping: tests/c/workers.c; how the budget adapts: tests/c/budget.c.
"""

import contextlib
import os
import time
from pathlib import Path

import pytest

from ring.pump import Pump
from vdev.net.features import Feature, mask
from vdev.testing.rig import USUAL, assert_serves, pumped
from vdev.testing.waiting import wait_until

FRAME = bytes.fromhex("525400123456020000000001 88b5") + bytes(range(50))
EVENT_IDX = mask(Feature.EVENT_IDX)
PACKED = mask(Feature.RING_PACKED)

RINGS = {"split_flags": USUAL & ~EVENT_IDX, "split_events": USUAL,
         "packed_flags": USUAL & ~EVENT_IDX | PACKED, "packed_events": USUAL | PACKED}
every_ring = pytest.mark.parametrize("features", RINGS.values(), ids=RINGS)
ALWAYS = None


@contextlib.contextmanager
def thread_of(**options):
    """(driver, device, the worker's entry in /proc): as pumped()."""
    before = set(os.listdir("/proc/self/task"))
    with pumped(**options) as (driver, device):
        (made,) = set(os.listdir("/proc/self/task")) - before
        yield driver, device, Path("/proc/self/task", made)


def status(thread: Path, name: str) -> str:
    (line,) = [line for line in (thread / "status").read_text().splitlines() if line.startswith(f"{name}:")]
    return line.partition(":")[2].strip()


def sleeps(thread: Path) -> int:
    """How often it has gone to sleep."""
    return int(status(thread, "voluntary_ctxt_switches"))


def sent_without_kick(driver, device) -> bool:
    driver.offer(FRAME)
    kicked = driver.transmitq.submit()
    assert device.receive()[1] == FRAME
    assert driver.reclaim_all(5)
    return not kicked


@every_ring
def test_frames_from_guest_arrive_without_a_kick_while_polling(features):
    """And none is asked for, for good: each ring goes round more than twice."""
    with pumped(features, size=16, poll_us=ALWAYS) as (driver, device):
        wait_until(lambda: sent_without_kick(driver, device), "the driver is asked for kicks")
        for _ in range(100):
            assert sent_without_kick(driver, device)


@every_ring
def test_buffers_are_found_without_a_kick_while_polling(features):
    with pumped(features, size=16, poll_us=ALWAYS) as (driver, device):
        for _ in range(40):
            device.send(FRAME)
            driver.receiveq.post(writable=[2000])
            driver.receiveq.publish()
            received = driver.receive_within(10, refill=False)
            assert received is not None and received.frame == FRAME


@every_ring
@pytest.mark.parametrize("poll_us", [0, 1000])
def test_idle_worker_sleeps_and_is_not_woken(features, poll_us):
    with thread_of(features=features, poll_us=poll_us) as (driver, device, thread):
        for _ in range(3):
            assert_serves(driver, device)
        before = [-1]

        def rests() -> bool:
            """Asleep, and was so all the time since the last question."""
            before.append(sleeps(thread))
            return status(thread, "State").startswith("S") and before[-2] == before[-1]

        wait_until(rests, "it does not come to rest", pause=0.02)
        count, bursts = sleeps(thread), (device.from_guest.bursts, device.to_guest.bursts)
        time.sleep(0.3)
        assert sleeps(thread) == count and status(thread, "State").startswith("S")
        assert (device.from_guest.bursts, device.to_guest.bursts) == bursts
        assert_serves(driver, device)


def test_worker_that_always_polls_sleeps_without_a_lane():
    with thread_of(attach=False, poll_us=ALWAYS) as (driver, device, thread):
        wait_until(lambda: status(thread, "State").startswith("S"), "it runs without a lane")
        device.attach()
        for _ in range(5):
            assert status(thread, "State").startswith("R")
        assert_serves(driver, device)
        device.detach()
        wait_until(lambda: status(thread, "State").startswith("S"), "it runs without a lane")


@every_ring
def test_commands_are_answered_while_polling_always(features):
    with pumped(features, poll_us=ALWAYS) as (driver, device):
        for _ in range(50):
            device.detach(5000)
            device.attach()
        assert_serves(driver, device)


@every_ring
def test_ring_that_was_taken_back_asks_for_kicks(features):
    """Whoever has it next finds it as an idle device leaves it."""
    with pumped(features, poll_us=ALWAYS) as (driver, device):
        wait_until(lambda: sent_without_kick(driver, device), "the driver is asked for kicks")
        device.detach()
        driver.offer(FRAME)
        assert driver.transmitq.submit()
        device.attach()
        assert device.receive()[1] == FRAME


@pytest.mark.skipif(os.uname().machine not in ("x86_64", "i686"), reason="no time stamp counter that is read here")
def test_cycles_are_those_of_frames():
    with pumped(poll_us=ALWAYS) as (driver, device):
        assert_serves(driver, device)
        wait_until(lambda: device.from_guest.cycles and device.to_guest.cycles, "nothing counted")
        first = device.from_guest.cycles, device.to_guest.cycles
        bursts = device.from_guest.bursts
        time.sleep(0.05)  # it looks at the rings all the time
        assert (device.from_guest.cycles, device.to_guest.cycles) == first and device.from_guest.bursts == bursts
        assert_serves(driver, device)
        wait_until(lambda: device.from_guest.cycles > first[0] and device.to_guest.cycles > first[1], "nothing counted")


def test_placement():
    cpu = max(os.sched_getaffinity(0))
    before = set(os.listdir("/proc/self/task"))
    pump = Pump(cpu)
    try:
        (made,) = set(os.listdir("/proc/self/task")) - before
        assert status(Path("/proc/self/task", made), "Cpus_allowed_list") == str(cpu)
    finally:
        pump.close()


def test_processor_that_is_not_there():
    before = set(os.listdir("/proc/self/task"))
    with pytest.raises(OSError, match="Invalid argument"):
        Pump(8191)
    wait_until(lambda: set(os.listdir("/proc/self/task")) == before, "its thread is left")
