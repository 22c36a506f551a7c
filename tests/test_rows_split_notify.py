"""Rows of docs/conformance/split.tsv about notifications, both ways."""

import pytest

from vdev.net.features import Feature, mask
from vdev.testing.netdriver import NetHeader
from vdev.testing.rig import assert_serves
from vdev.testing.watch import delivered, exchange, noise, on_wire, settle, until, was_called, watching

row = pytest.mark.row

PLAIN = mask(Feature.VERSION_1)
EVENT_IDX = PLAIN | mask(Feature.EVENT_IDX)
either = pytest.mark.parametrize("features", [PLAIN, EVENT_IDX], ids=["flags", "event_idx"])


# --------------------------------------------------------------------------------------------------- calls


@row("VQ-SPLIT-D-09", "VQ-SPLIT-D-10", "VQ-SPLIT-D-11")
@pytest.mark.parametrize("suppressed", [0, 1])
def test_calls_follow_the_flag_and_not_the_event(engine, suppressed):
    with engine(PLAIN, size=16) as (driver, device):
        ring = driver.transmitq.ring
        ring.avail.flags = suppressed
        for number in range(20):
            # far away, just missed, hit
            ring.avail.used_event = (ring.used.idx + (0x8000, -1, 0, 1)[number % 4]) & 0xFFFF
            assert was_called(driver, device, number % 3 + 1) == (not suppressed)


@row("VQ-SPLIT-D-12", "VQ-SPLIT-D-13", "VQ-SPLIT-D-14", "VQ-SPLIT-DR-13")
@pytest.mark.parametrize("flags", [0, 1])
@pytest.mark.parametrize("base", [0, 65530])
def test_calls_follow_the_event_and_not_the_flag(engine, flags, base):
    with engine(EVENT_IDX, size=16, base=base) as (driver, device):
        ring = driver.transmitq.ring
        assert was_called(driver, device)  # the first one comes whatever the event: a driver may have missed one
        ring.avail.flags = flags
        for batch in (1, 2, 5):
            for distance in (-1, *range(batch + 1), 100, 0x8000):
                ring.avail.used_event = (ring.used.idx + distance) & 0xFFFF
                assert was_called(driver, device, batch) == (0 <= distance < batch), (batch, distance)
        ring.avail.used_event = 65535
        assert was_called(driver, device) == (ring.used.idx == 0)


@row("VQ-SPLIT-D-13", "VQ-SPLIT-D-14", "VQ-SPLIT-DR-13")
@pytest.mark.parametrize("distance", range(-1, 6))
def test_calls_follow_the_event_across_65536(engine, distance):
    with engine(EVENT_IDX, size=16, base=65532) as (driver, device):
        was_called(driver, device)
        driver.transmitq.ring.avail.used_event = (65533 + distance) & 0xFFFF
        assert was_called(driver, device, 5) == (0 <= distance < 5)


# --------------------------------------------------------------------------------------------------- kicks


@row("VQ-SPLIT-D-22", "VQ-SPLIT-D-24")
@either
def test_flags_of_the_used_ring(engine, features):
    with engine(features, size=16) as (driver, device):
        rings = [queue.ring for queue in (driver.transmitq, driver.receiveq)]
        with watching(lambda: [ring.used.flags for ring in rings]) as looks:
            driver.fill(8)
            exchange(driver, device, 30)
        allowed = {0} if features & mask(Feature.EVENT_IDX) else {0, 1}
        assert {flags for look in looks for flags in look} <= allowed


@row("VQ-SPLIT-D-23")
def test_kicks_are_left_out_where_the_flag_says_so(engine):
    with engine(PLAIN, size=16) as (driver, device):
        driver.fill(2)
        exchange(driver, device, 30)
        assert driver.receiveq.kicks < 31  # it did say so, while it had buffers
        assert device.errors() == (0, 0)


@row("VQ-SPLIT-D-25", "VQ-SPLIT-DR-18")
def test_kicks_are_left_out_before_avail_event(engine):
    with engine(EVENT_IDX, size=16) as (driver, device):
        driver.fill(2)
        exchange(driver, device, 30)
        for _ in range(10):
            frames = [noise(seed=number) for number in range(10)]
            for data in frames:
                driver.transmit(data)
            assert on_wire(device, len(frames)) == [(NetHeader(), data) for data in frames]
            assert until(device, lambda: driver.transmitq.ring.pending() == 10)
            driver.reclaim()
        assert driver.receiveq.kicks < 31


@row("VQ-SPLIT-D-26")
@either
def test_spurious_kicks_do_nothing(engine, features):
    with engine(features, size=16) as (driver, device):
        for done in range(3):
            for queue, flow in ((driver.transmitq, "from_guest"), (driver.receiveq, "to_guest")):
                before = getattr(device, flow).kicks
                for _ in range(100):
                    queue.kick()
                assert until(device, lambda: getattr(device, flow).kicks > before)  # noqa: B023
                settle(device)
                assert queue.ring.used.idx == done
            assert device.errors() == (0, 0)
            assert_serves(driver, device)


@row("VQ-SPLIT-DR-11")
@pytest.mark.parametrize("moved", [-1, 17, 0x8000])
def test_available_index_that_leaps_stops_the_ring_alone(engine, moved):
    with engine(PLAIN, size=16) as (driver, device):
        assert_serves(driver, device)
        driver.transmitq.ring.avail.idx = (driver.transmitq.ring.avail.idx + moved) & 0xFFFF
        driver.transmitq.kick()
        assert until(device, lambda: device.config.from_guest.queue.state.broken)
        settle(device)
        assert device.errors() == (1, 0) and driver.transmitq.ring.used.idx == 1
        driver.fill(1)
        device.send(noise())
        assert delivered(driver, device).frame == noise()
