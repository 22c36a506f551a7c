"""Rows of docs/conformance/packed.tsv about notifications, both ways."""

import pytest

from ring.driver_packed import EVENT_DESC, EVENT_DISABLE, EVENT_ENABLE
from vdev.net.features import Feature, mask
from vdev.testing.netdriver import NetHeader
from vdev.testing.watch import exchange, noise, settle, until, was_called, watching

row = pytest.mark.row

PACKED = mask(Feature.VERSION_1, Feature.RING_PACKED)
EVENT_IDX = PACKED | mask(Feature.EVENT_IDX)
either = pytest.mark.parametrize("features", [PACKED, EVENT_IDX], ids=["flags", "event_idx"])


# --------------------------------------------------------------------------------------------------- calls


@row("VQ-PACKED-D-25")
@either
def test_calls_follow_the_flags(engine, features):
    with engine(features, size=16) as (driver, device):
        assert was_called(driver, device)
        for number in range(12):
            wanted = number % 3 > 0
            # the offset means nothing beside these flags
            driver.transmitq.ring.driver_event.set(0x8000 | number, EVENT_ENABLE if wanted else EVENT_DISABLE)
            assert was_called(driver, device, number % 4 + 1) == wanted


@row("VQ-PACKED-D-26")
@pytest.mark.parametrize("slot, wrap", [(0, 1), (13, 1), (15, 0)])
def test_calls_follow_the_descriptor_asked_for(engine, slot, wrap):
    with engine(EVENT_IDX, size=16, base=slot | wrap << 15) as (driver, device):
        ring = driver.transmitq.ring
        assert was_called(driver, device)  # the first one comes whatever the event: a driver may have missed one
        for batch in (1, 2, 5):
            for distance in (-1, *range(batch + 1), 15, 16):
                ring.driver_event.set(ring.off_wrap((ring.next_used + distance) % 32), EVENT_DESC)
                assert was_called(driver, device, batch) == (0 <= distance < batch), (batch, distance)


@row("VQ-PACKED-D-26")
def test_calls_follow_a_descriptor_that_is_passed_over(engine):
    with engine(EVENT_IDX, size=16) as (driver, device):
        queue, ring = driver.transmitq, driver.transmitq.ring
        assert was_called(driver, device)
        for inside in (0, 1, 2):
            ring.driver_event.set(ring.off_wrap(ring.next_used + inside), EVENT_DESC)
            driver.transmit(noise(), cuts=(12, 30))
            assert device.receive() == (NetHeader(), noise())
            assert until(device, ring.pending)
            settle(device)
            driver.reclaim()
            assert queue.called()


# --------------------------------------------------------------------------------------------------- kicks


@row("VQ-PACKED-D-23")
@either
def test_driver_event_structures_are_only_read(engine, features):
    with engine(features, size=16) as (driver, device):
        events = [queue.ring.driver_event for queue in (driver.transmitq, driver.receiveq)]
        for event in events:
            event.set(0x8003, EVENT_ENABLE)
        with watching(lambda: [event.both for event in events]) as looks:
            driver.fill(8)
            exchange(driver, device, 20)
        assert looks == [[0x8003 | EVENT_ENABLE << 16] * 2]


@row("VQ-PACKED-D-24")
@either
def test_flags_of_the_device_event_structures(engine, features):
    with engine(features, size=16) as (driver, device):
        events = [queue.ring.device_event for queue in (driver.transmitq, driver.receiveq)]
        with watching(lambda: [event.flags for event in events]) as looks:
            driver.fill(8)
            exchange(driver, device, 30)
        allowed = {EVENT_ENABLE, EVENT_DISABLE, EVENT_DESC} if features == EVENT_IDX else {EVENT_ENABLE, EVENT_DISABLE}
        assert {flags for look in looks for flags in look} <= allowed
        assert driver.receiveq.kicks < 31  # kicks were suppressed while it had buffers
