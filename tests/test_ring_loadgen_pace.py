"""A sender with a pace, and the partner whose frames it takes meanwhile: ring/core/driver_pace.inl."""

import time

import pytest

from ring.driver import DriverQueue, GuestMemory
from ring.loadgen import LoadGenerator, Role
from vdev.net.features import Feature, mask
from vdev.testing.rig import pumped
from vdev.testing.waiting import wait_until

USUAL = mask(Feature.VERSION_1, Feature.MRG_RXBUF, Feature.EVENT_IDX)
INTERVAL = 20_000  # nanoseconds


@pytest.mark.parametrize("features", [USUAL, USUAL | mask(Feature.RING_PACKED)], ids=["split", "packed"])
def test_frames_leave_at_a_pace_and_are_timed_to_their_arrival(features: int) -> None:
    with (pumped(features, loop=True) as (driver, device),
          LoadGenerator(driver.receiveq, Role.RECEIVE, frame_bytes=1524) as sink,
          LoadGenerator(driver.transmitq, Role.TRANSMIT, batch=1, interval_ns=INTERVAL, partner=sink) as source):
        began = time.monotonic()
        source.start()
        wait_until(lambda: sink.stats().frames >= 2000, "2000 frames round the loop")
        took = time.monotonic() - began
        source.stop()
        device.detach()
        sent, arrived, latencies = source.stats(), sink.stats(), sink.latencies()
    assert not sent.errors and not arrived.errors and not arrived.lost
    assert took >= 1900 * INTERVAL / 1e9  # faster than asked, it would only be by catching up a millisecond
    assert sum(latencies.values()) == arrived.frames
    assert min(latencies) > 0 and max(latencies) <= took * 1e9
    assert arrived.calls > 0  # it asks for calls, and takes them


def test_latencies_fall_into_classes_that_grow_with_them() -> None:
    from ring.loadgen import lib

    begins = [lib.driver_latency_ns(index) for index in range(lib.DRIVER_LATENCIES - 64)]
    assert begins[:40] == [*range(32), *range(32, 48, 2)]
    assert all(low < high <= low * 17 / 16 or high <= 32 for low, high in zip(begins, begins[1:], strict=False))


def test_nobody_s_partner_has_no_latencies() -> None:
    with GuestMemory() as memory, DriverQueue(memory, 16) as queue, LoadGenerator(queue, Role.RECEIVE) as sink:
        assert sink.latencies() == {}


@pytest.mark.parametrize(("role", "wish"), [
    (Role.TRANSMIT, {"interval_ns": 0}), (Role.RECEIVE, {"interval_ns": INTERVAL})], ids=["no_pace", "receiver"])
def test_partner_that_makes_no_sense(role: Role, wish: dict) -> None:
    with (GuestMemory() as memory, DriverQueue(memory, 16) as one, DriverQueue(memory, 16) as other,
          LoadGenerator(one, Role.RECEIVE) as sink, pytest.raises(ValueError)):
        LoadGenerator(other, role, partner=sink, **wish)


def test_partner_has_to_receive() -> None:
    with (GuestMemory() as memory, DriverQueue(memory, 16) as one, DriverQueue(memory, 16) as other,
          LoadGenerator(one, Role.TRANSMIT, frame_bytes=60) as sender, pytest.raises(ValueError)):
        LoadGenerator(other, Role.TRANSMIT, interval_ns=INTERVAL, partner=sender)
