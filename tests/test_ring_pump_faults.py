"""The pump under floods, with descriptors that would block or break it, and with memory that vanishes.

Each test carries the id of its case. The worker goes on, and the other guests in it do not notice.
"""

import contextlib
import os
import resource
import select
import threading
import time

import pytest

from ring.driver import Buffer, Extent, GuestMemory
from ring.driver_packed import DESC_F_AVAIL, DESC_F_USED, PACKED_DESCRIPTOR
from ring.driver_parts import DESC_F_INDIRECT
from ring.pump import LaneEvent
from vdev.net.features import Feature, mask
from vdev.testing.netdriver import NetDriver, NetHeader
from vdev.testing.rig import PumpedDevice, assert_serves, pumped

BASE = mask(Feature.VERSION_1, Feature.INDIRECT_DESC, Feature.EVENT_IDX)
MERGEABLE = BASE | mask(Feature.MRG_RXBUF)
FRAME = bytes(range(60))

every_ring = pytest.mark.parametrize(
    "ring", [0, mask(Feature.RING_PACKED), mask(Feature.IN_ORDER), mask(Feature.RING_PACKED, Feature.IN_ORDER)],
    ids=["split", "packed", "split_in_order", "packed_in_order"])


def cpu() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


# ----------------------------------------------------------------------------------- floods and descriptors


class Flood:
    """Makes more available on a transmitq whenever the device has used some, and kicks both queues at full speed."""

    def __init__(self, driver: NetDriver, device: PumpedDevice) -> None:
        self._driver = driver
        self._queue = device.config.from_guest.queue
        self._ring = driver.transmitq.ring
        self._gpa = driver.memory.alloc(100)
        self._ring.desc[0].set(self._gpa, 100)  # of a split ring: every entry names it
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _more_split(self) -> None:
        self._ring.avail.idx = (self._ring.used.idx + 200) & 0xFFFF

    def _more_packed(self) -> None:
        """From where the device stands to the end of the ring, in its round; before that, in the next."""
        at = self._queue.base & 0xFFFF
        slot, now, then = at & 0x7FFF, DESC_F_AVAIL, DESC_F_USED
        if not at & 0x8000:
            now, then = then, now
        rest = self._ring.size - slot
        self._write(slot, rest, now)
        self._write(0, slot, then)

    def _write(self, slot: int, count: int, flags: int) -> None:
        self._driver.memory.write(self._ring.desc[slot].gpa, PACKED_DESCRIPTOR.pack(self._gpa, 100, 0, flags) * count)

    def _run(self) -> None:
        more = self._more_packed if self._driver.transmitq.packed else self._more_split
        while not self._stop.is_set():
            more()
            self._driver.transmitq.kick()
            self._driver.receiveq.kick()

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()


@every_ring
def test_R03_R56_more_available_and_kicked_without_end(ring):
    """One guest does that at full speed; the worker still serves its neighbour and us."""
    with (pumped(MERGEABLE | ring, to_port=-1, from_port=-1) as (flood, flooding),
          pumped(MERGEABLE | ring, attach=False) as (driver, device)):
        device.lane.configure(device.config)
        flooding.pump.attach(device.lane)
        try:
            with Flood(flood, flooding):
                for _ in range(50):
                    assert_serves(driver, device)
                while flooding.from_guest.dropped.get("null", 0) < 10_000:
                    assert_serves(driver, device)
                for _ in range(20):
                    flooding.detach(5000)
                    flooding.attach()
            assert flooding.from_guest.bursts > 10_000 // (4 * 64)  # each of them came to its end
            assert flooding.events(0) == LaneEvent(0)
        finally:
            flooding.pump.detach(device.lane, 5000)


def idle(device: PumpedDevice) -> bool:
    """Does the worker come to rest?"""
    before, busy = (device.from_guest.bursts, device.to_guest.bursts), cpu()
    time.sleep(0.25)
    return cpu() - busy < 0.1 and (device.from_guest.bursts, device.to_guest.bursts) == before


def test_P84_one_eventfd_for_everything():
    with pumped(attach=False) as (driver, device):
        for flow in (device.config.from_guest, device.config.to_guest):
            flow.kick = flow.call = flow.err = driver.transmitq.kick_fd
        device.attach()
        for _ in range(20):
            driver.transmitq.post(readable=[bytes(12) + FRAME])
        driver.transmitq.publish()
        driver.transmitq.kick()
        while device.from_guest.frames < 20:  # no descriptor is left to wait on
            time.sleep(0.001)
        assert idle(device)


def test_P81_kick_descriptor_whose_writer_is_gone():
    with pumped(attach=False) as (driver, device):
        reader, writer = os.pipe()
        os.close(writer)
        driver.fill()
        device.config.from_guest.kick = reader
        device.attach()
        device.send(FRAME)
        assert driver.receive_within(10).frame == FRAME
        time.sleep(0.05)
        assert idle(device)
        device.detach()
        os.close(reader)


@pytest.mark.parametrize("kind", ["full_eventfd", "full_pipe", "pipe_without_reader"])
def test_P82_P83_F40_call_descriptor_that_would_block_or_break(kind):
    opened = [os.eventfd(0)] if kind == "full_eventfd" else list(os.pipe())[::-1]
    if kind == "full_eventfd":
        os.eventfd_write(opened[0], (1 << 64) - 2)  # one more blocks for ever
    elif kind == "full_pipe":
        os.set_blocking(opened[0], False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(opened[0], b"x" * 4096)
        os.set_blocking(opened[0], True)
    else:
        os.close(opened.pop())
    with pumped(BASE & ~mask(Feature.EVENT_IDX), attach=False) as (driver, device):
        device.config.from_guest.call = opened[0]
        device.attach()
        for i in range(5):
            driver.transmit(FRAME[:50 + i])
            assert device.receive(10) == (NetHeader(), FRAME[:50 + i])
        device.detach()
    for fd in opened:
        os.close(fd)


def test_N16_port_that_refuses_every_frame():
    with select.epoll() as refuses, pumped(to_port=refuses.fileno(), from_port=-1) as (driver, device):
        for _ in range(20):
            driver.offer(FRAME)
        driver.transmitq.submit()
        assert driver.reclaim_all(10)
        assert (device.from_guest.frames, device.from_guest.dropped) == (0, {"port": 20})
        assert device.events(0.02) == LaneEvent(0)


def test_N17_port_that_takes_half_a_frame():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with pumped(to_port=writer, from_port=-1) as (driver, device):
        driver.transmit(bytes(40_000))
        driver.transmit(bytes(40_000))  # a pipe holds 65 536
        assert driver.reclaim_all(10)
        assert (device.from_guest.frames, device.from_guest.dropped) == (1, {"port": 1})
    os.close(reader)
    os.close(writer)


# ------------------------------------------------------------------------------------ memory that vanishes


TWO = [Extent(0, 8 << 20, uva=1 << 40), Extent(1 << 30, 1 << 20, uva=1 << 41)]


@pytest.mark.parametrize("what", ["rings", "frame", "header", "table", "receive_buffer", "receive_header"])
@pytest.mark.parametrize("ring", [0, mask(Feature.RING_PACKED)], ids=["split", "packed"])
def test_F25_memory_truncated_under_the_pump(ring, what):
    """The device is lost and says so; the guest beside it, in the same worker, loses no frame."""
    with (pumped() as (neighbour, beside), GuestMemory(extents=TWO) as memory,
          pumped(MERGEABLE | ring, memory=memory, attach=False) as (driver, device)):
        apart = memory.alloc(4096, region=1)  # what vanishes, but for the rings
        kept = memory.alloc(4096)
        device.lane.configure(device.config)
        beside.pump.attach(device.lane)
        transmit, post = driver.transmitq.add, driver.receiveq.add
        if what == "table" and ring:
            driver.transmitq.ring.offer([(apart, 32, DESC_F_INDIRECT)], 0)
        elif what == "table":
            driver.transmitq.ring.desc[0].set(apart, 32, DESC_F_INDIRECT)
            driver.transmitq.ring.offer(0)
        elif what == "frame":
            transmit([Buffer(kept, 12), Buffer(apart, 100)])
        elif what == "header":
            transmit([Buffer(apart, 100)])
        elif what == "receive_buffer":
            post([Buffer(kept, 12, True), Buffer(apart, 4000, True)])
        elif what == "receive_header":
            post([Buffer(apart, 12, True), Buffer(kept, 4000, True)])
        driver.transmitq.publish()
        driver.receiveq.publish()
        memory.truncate(region=0 if what == "rings" else 1)
        device.send(FRAME)
        driver.transmitq.kick()
        driver.receiveq.kick()
        deadline = time.monotonic() + 10
        events = LaneEvent(0)
        while not events and time.monotonic() < deadline:
            events = device.lane.events()
            time.sleep(0.001)
        assert events == LaneEvent.MEMORY_GONE
        assert device.side.owner.gone and not beside.side.owner.gone
        assert_serves(neighbour, beside)
        assert idle(beside)
        beside.pump.detach(device.lane, 5000)
        assert device.from_guest.frames == device.to_guest.frames == 0


