"""Calls that are put off: counted, in time, and never for a queue that was stopped (virtio 1.2, 5.1.6.5.9)."""

import pytest

from ring.receive_settings import Coalescing
from vdev.net.features import Feature, mask
from vdev.testing.rig import USUAL
from vdev.testing.switched import Station, frame, mac, switched
from vdev.testing.waiting import wait_until

KINDS = pytest.mark.parametrize("ring", [0, mask(Feature.RING_PACKED), mask(Feature.EVENT_IDX),
                                         mask(Feature.RING_PACKED, Feature.EVENT_IDX)],
                                ids=["split", "packed", "split_events", "packed_events"])
LONG = 3_600_000_000  # microseconds


def settle(station: Station, **flows: Coalescing) -> None:
    """Have it served with these: from_guest, to_guest."""
    station.detach()
    for config in station.configs:
        for name, coalescing in flows.items():
            getattr(config, name).coalescing = coalescing
    station.attach()


def awake(station: Station) -> None:
    """The driver wants to be called at the next used buffer of either queue, and has not been."""
    for queue in (station.driver.receiveq, station.driver.transmitq):
        queue.ring.want_calls(1)
        queue.called()


def send(station: Station, count: int) -> None:
    """``count`` frames, one burst each, without a look at the transmitq."""
    for _ in range(count):
        station.driver.offer(frame(mac(1), mac(2)))
        before = station.from_guest.frames
        station.driver.transmitq.submit()
        wait_until(lambda before=before: station.from_guest.frames > before, "not sent")


def calls(station: Station) -> int:
    return station.lanes[0].stats()[1].calls


@KINDS
def test_NET_COAL_D_02_a_call_comes_after_so_many_packets(ring):
    features = USUAL & ~mask(Feature.EVENT_IDX) | ring
    with switched(features, USUAL) as (_, (guest, other)):
        settle(guest, to_guest=Coalescing(15, LONG))
        awake(guest)
        before = calls(guest)
        send(other, 14)
        assert (calls(guest) - before, guest.driver.receiveq.called()) == (0, False)
        send(other, 1)
        wait_until(lambda: calls(guest) - before == 1, "no call after 15 packets")
        assert guest.driver.receiveq.called()
        assert len(guest.received()) == 15
        awake(guest)
        send(other, 14)
        assert (calls(guest) - before, guest.driver.receiveq.called()) == (1, False)


@KINDS
@pytest.mark.parametrize("coalescing", [Coalescing(0, LONG), Coalescing(15, 0), Coalescing()])
def test_NET_COAL_D_02_without_packets_or_time_each_is_told_at_once(ring, coalescing):
    features = USUAL & ~mask(Feature.EVENT_IDX) | ring
    with switched(features, USUAL) as (_, (guest, other)):
        settle(guest, to_guest=coalescing)
        for _ in range(3):
            awake(guest)
            before = calls(guest)
            send(other, 1)
            assert (calls(guest) - before, guest.driver.receiveq.called()) == (1, True)
            assert len(guest.received()) == 1


@KINDS
def test_NET_COAL_D_02_a_call_comes_after_so_much_time(ring):
    """Of the receiveq, which another's worker fills, and of the transmitq."""
    features = USUAL & ~mask(Feature.EVENT_IDX) | ring
    with switched(features, features) as (_, (guest, other)):
        settle(guest, to_guest=Coalescing(1000, 20_000))
        settle(other, from_guest=Coalescing(1000, 20_000))
        for _ in range(3):
            awake(guest)
            awake(other)
            send(other, 3)
            wait_until(guest.driver.receiveq.called, "the receiveq's timer told nothing")
            wait_until(other.driver.transmitq.called, "the transmitq's timer told nothing")
            assert len(guest.received()) == 3
            assert other.driver.reclaim() == 3


@KINDS
def test_NET_COAL_D_11_a_driver_that_wants_no_call_gets_none(ring):
    """Not by packets, not by time, not when it is detached."""
    features = USUAL & ~mask(Feature.EVENT_IDX) | ring
    with switched(features, USUAL) as (_, (guest, other)):
        settle(guest, to_guest=Coalescing(4, LONG))
        send(other, 4)  # the first call of a ring always comes
        guest.received()
        guest.driver.receiveq.ring.refuse_calls()
        guest.driver.receiveq.called()
        before = calls(guest)
        for coalescing, frames in ((Coalescing(4, LONG), 4), (Coalescing(1000, 1000), 3)):
            settle(guest, to_guest=coalescing)
            saved = guest.lanes[0].stats()[1].calls_saved
            send(other, frames)
            wait_until(lambda saved=saved: guest.lanes[0].stats()[1].calls_saved > saved, "its turn did not come")
        settle(guest, to_guest=Coalescing(1000, LONG))
        send(other, 3)
        guest.detach()
        guest.attach()
        assert (calls(guest) - before, guest.driver.receiveq.called()) == (0, False)
        assert len(guest.received()) == 10


@KINDS
@pytest.mark.parametrize("usecs", [LONG, 50_000])
def test_NET_COAL_D_03_what_was_put_off_is_told_when_the_lane_is_taken_back_and_nothing_after(ring, usecs):
    features = USUAL & ~mask(Feature.EVENT_IDX) | ring
    with switched(features, features) as (_, (guest, other)):
        settle(guest, to_guest=Coalescing(100, usecs))
        settle(other, from_guest=Coalescing(100, usecs))
        queues = (guest.driver.receiveq, other.driver.transmitq)
        awake(guest)
        awake(other)
        send(other, 10)
        if usecs == LONG:
            assert not any(queue.called() for queue in queues)
        other.detach()
        guest.detach()
        assert all(queue.called() for queue in queues)
        awake(guest)
        awake(other)
        before = calls(guest)
        with pytest.raises(AssertionError, match="told"):
            wait_until(lambda: any(queue.called() for queue in queues), "told", seconds=0.1)
        guest.attach()
        other.attach()
        assert calls(guest) == before


def test_a_full_ring_is_told_at_once():
    with switched(USUAL, USUAL, size=8) as (_, (guest, other)):
        settle(guest, to_guest=Coalescing(1000, LONG))
        awake(guest)
        before = calls(guest)
        send(other, 8)
        wait_until(lambda: calls(guest) - before == 1, "a full ring was not told")


def test_NET_COAL_D_01_one_queue_is_put_off_and_another_is_not():
    with switched(USUAL, pairs=2) as (fabric, (guest,)):
        other = Station(fabric, features=USUAL)
        guest.detach()
        guest.configs[0].to_guest.coalescing = Coalescing(1000, LONG)
        guest.attach()
        for driver in guest.drivers:
            driver.receiveq.ring.want_calls(1)
            driver.receiveq.called()
        for n in range(32):  # flows of both
            other.send(frame(mac(100 + n), mac(2)))
        counts = [lane.stats()[1].frames for lane in guest.lanes]
        assert min(counts) > 0
        assert [driver.receiveq.called() for driver in guest.drivers] == [False, True]
        other.close()
