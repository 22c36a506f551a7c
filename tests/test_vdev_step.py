"""The step engine: which phases a frame goes through, what may happen between two of them, and that leaving at any
of them leaves a ring on which a pump goes on.

That it does the same as the pump is in tests/test_vdev_step_agreement.py.
"""

import contextlib
import os
import select
from collections.abc import Iterator

import pytest

from ring.driver import Buffer, DriverQueue, Extent, GuestMemory
from ring.driver_packed import DESC_F_AVAIL
from ring.driver_parts import DESC_F_NEXT
from ring.errors import QueueBusy
from ring.pump import Lane, LaneEvent, Pump
from ring.virtqueue import CallReason
from vdev.net.features import Feature, mask
from vdev.step_flow import Phase, Step
from vdev.testing.netdriver import NEEDS_CSUM, NetDriver, NetHeader
from vdev.testing.rig import SteppedDevice, assert_serves, stepped

PLAIN = mask(Feature.VERSION_1)
USUAL = mask(Feature.VERSION_1, Feature.INDIRECT_DESC, Feature.EVENT_IDX, Feature.MRG_RXBUF)
PACKED, IN_ORDER = mask(Feature.RING_PACKED), mask(Feature.IN_ORDER)
FRAME = bytes(range(60))
FROM, TO = "from_guest", "to_guest"
either_format = pytest.mark.parametrize("ring", [0, PACKED], ids=["split", "packed"])


@contextlib.contextmanager
def by_hand(features: int, **options: object) -> Iterator[tuple[NetDriver, SteppedDevice]]:
    """An attached lane that has looked at its queues and does nothing more but what it is told to."""
    with stepped(features, attach=False, **options) as (driver, device):
        device.lane.configure(device.config)
        device.lane.attach()
        device.lane.run()
        yield driver, device


def ring_up(queue: DriverQueue) -> None:
    """Publish and kick, without giving the device its turn."""
    queue.publish()
    os.eventfd_write(queue.kick_fd, 1)


def steps(device: SteppedDevice) -> list[Step]:
    """All phases until nothing is left to do."""
    return list(iter(device.lane.step, None))


def phases(device: SteppedDevice) -> list[str]:
    return [step.phase.value for step in steps(device)]


def look(direction: str, ring: int, *, slot: int, count: int) -> Step:
    """The device looks whether a chain waits."""
    if ring & PACKED:
        return Step(direction, Phase.FLAGS_READ, descriptor=slot, count=count)
    return Step(direction, Phase.AVAILABLE_READ, count=count)


def close(direction: str, ring: int, *, slot: int, reason: CallReason) -> list[Step]:
    """How a burst ends after the last frame."""
    return [look(direction, ring, slot=slot, count=0),
            Step(direction, Phase.PUBLISHED),
            Step(direction, Phase.DECIDED, reason=reason),
            *([Step(direction, Phase.CALLED)] if reason.due else []),
            Step(direction, Phase.KICKS_ASKED, count=0)]


# ------------------------------------------------------------------------------------------- one frame


@pytest.mark.parametrize("features, wishes, reason", [
    (PLAIN, True, CallReason.FLAG_WANTS),
    (PLAIN, False, CallReason.FLAG_SUPPRESSED),
    (USUAL, True, CallReason.FIRST),
], ids=["flag", "suppressed", "event_idx"])
@either_format
def test_phases_of_a_frame_from_guest(ring, features, wishes, reason):
    with by_hand(features | ring, size=8) as (driver, device):
        if wishes:
            driver.transmitq.ring.want_calls()
        else:
            driver.transmitq.ring.refuse_calls()
        head = driver.offer(FRAME, cuts=(12,))
        ring_up(driver.transmitq)
        assert steps(device) == [
            Step(FROM, Phase.KICK_SEEN),
            Step(FROM, Phase.KICKS_REFUSED),
            look(FROM, ring, slot=0, count=1),
            Step(FROM, Phase.HEAD_TAKEN, head=None if ring else head, descriptor=0),
            Step(FROM, Phase.DESCRIPTOR_READ, descriptor=0, length=12, writable=False),
            Step(FROM, Phase.DESCRIPTOR_READ, descriptor=1, length=60, writable=False),
            Step(FROM, Phase.BYTES_READ, head=head, length=12),
            Step(FROM, Phase.BYTES_READ, head=head, length=60),
            Step(FROM, Phase.PORT_WRITE, head=head, length=60),
            Step(FROM, Phase.USED_WRITTEN, head=head, count=1, length=0),
            *close(FROM, ring, slot=2, reason=reason),
        ]
        assert device.receive(0) == (NetHeader(), FRAME)
        assert driver.transmitq.called() == reason.due and driver.reclaim() == 1


@either_format
def test_phases_of_a_frame_to_guest(ring):
    with by_hand(PLAIN | ring, size=8) as (driver, device):
        head = driver.receiveq.post(writable=[12, 1600])
        ring_up(driver.receiveq)
        device.wire.send(NetHeader().pack() + FRAME)
        assert steps(device) == [
            Step(TO, Phase.KICK_SEEN),
            Step(TO, Phase.KICKS_REFUSED),
            look(TO, ring, slot=0, count=1),
            Step(TO, Phase.HEAD_TAKEN, head=None if ring else head, descriptor=0),
            Step(TO, Phase.DESCRIPTOR_READ, descriptor=0, length=12, writable=True),
            Step(TO, Phase.DESCRIPTOR_READ, descriptor=1, length=1600, writable=True),
            Step(TO, Phase.PORT_READ, length=60),
            Step(TO, Phase.BYTES_WRITTEN, head=head, length=60),
            Step(TO, Phase.BYTES_WRITTEN, head=head, length=12),
            Step(TO, Phase.USED_WRITTEN, head=head, count=1, length=72),
            *close(TO, ring, slot=2, reason=CallReason.FLAG_WANTS),
        ]
        assert driver.receive(refill=False).frame == FRAME


@either_format
def test_nothing_is_visible_before_it_is_published(ring):
    with by_hand(PLAIN | ring, size=8) as (driver, device):
        driver.offer(FRAME)
        ring_up(driver.transmitq)
        for step in iter(device.lane.step, None):
            if step.phase is Phase.PUBLISHED:
                break
            assert driver.transmitq.ring.pending() == 0
        assert driver.transmitq.ring.pending() == 1 and not driver.transmitq.called()


@either_format
def test_phases_in_an_indirect_table(ring):
    with by_hand(USUAL | ring, size=8) as (driver, device):
        driver.offer(FRAME, cuts=(12,), direct=0)
        ring_up(driver.transmitq)
        read = [(step.descriptor, step.in_table, step.length) for step in steps(device)
                if step.phase is Phase.DESCRIPTOR_READ]
        assert read == [(0, False, 0), (0, True, 12), (1, True, 60)]


@either_format
def test_one_used_element_for_a_batch_in_order(ring):
    with by_hand(PLAIN | IN_ORDER | ring, size=8) as (driver, device):
        heads = [driver.offer(FRAME) for _ in range(3)]
        ring_up(driver.transmitq)
        used = [step for step in steps(device) if step.phase is Phase.USED_WRITTEN]
        assert used == [Step(FROM, Phase.USED_WRITTEN, head=heads[-1], count=3, length=0)]
        assert driver.reclaim() == 3


# -------------------------------------------------------------------------------------- what goes wrong


@either_format
def test_phases_of_losses_from_guest(ring):
    with by_hand(PLAIN | ring, size=8) as (driver, device):
        driver.transmitq.add([Buffer(1 << 40, 100)])
        driver.offer(FRAME, NetHeader(NEEDS_CSUM, csum_start=34))
        driver.offer(b"short")
        ring_up(driver.transmitq)
        told = [(step.phase, step.reason) for step in steps(device)
                if step.phase in (Phase.CHAIN_REFUSED, Phase.FRAME_DROPPED)]
        assert told == [(Phase.CHAIN_REFUSED, "RING_E_UNMAPPED"), (Phase.FRAME_DROPPED, "bad_chain"),
                        (Phase.FRAME_DROPPED, "bad_header"), (Phase.FRAME_DROPPED, "bad_length")]
        assert driver.reclaim() == 3


@either_format
def test_phases_of_a_frame_that_waits_for_buffers(ring):
    with by_hand(USUAL | ring, size=8, buffer_size=1000) as (driver, device):
        driver.receiveq.post(writable=[1000])
        ring_up(driver.receiveq)
        device.wire.send(NetHeader().pack() + bytes(1500))
        done = steps(device)
        assert [step.length for step in done if step.phase is Phase.FRAME_HELD] == [1500]
        assert [step.count for step in done if step.phase is Phase.GIVEN_BACK] == [1, 1]
        device.lane.detach()  # nothing of it is lost meanwhile
        device.lane.configure(device.config)
        device.lane.attach()
        driver.receiveq.post(writable=[1000])
        ring_up(driver.receiveq)
        used = [step.length for step in steps(device) if step.phase is Phase.USED_WRITTEN]
        assert used == [1000, 512]
        assert driver.receive(refill=False).frame == bytes(1500)


@either_format
def test_R02_R04_R09_phases_of_a_ring_that_breaks(ring):
    """What was used before it broke is published, and one event says that it broke."""
    with by_hand(PLAIN | ring, size=8) as (driver, device):
        driver.offer(FRAME)
        ring_up(driver.transmitq)
        for step in iter(device.lane.step, None):
            if step.phase is Phase.USED_WRITTEN:
                break
        if ring:
            for slot in range(8):
                driver.transmitq.ring.desc[slot].flags = DESC_F_AVAIL | DESC_F_NEXT
        else:
            driver.transmitq.ring.offer(8)
            driver.transmitq.ring.publish()
        assert [(step.phase, step.reason) for step in steps(device)][-4:] == [
            (Phase.PUBLISHED, None), (Phase.DECIDED, CallReason.FLAG_WANTS), (Phase.CALLED, None),
            (Phase.RING_BROKEN, "RING_E_ENDLESS" if ring else "RING_E_HEAD_RANGE")]
        assert device.receive(0) == (NetHeader(), FRAME)
        assert device.errors() == (1, 0) and device.events() == LaneEvent.FROM_GUEST_BROKEN
        ring_up(driver.transmitq)
        assert phases(device) == ["kick seen"]


TWO = [Extent(0, 8 << 20, uva=1 << 40), Extent(1 << 30, 1 << 20, uva=1 << 41)]


@pytest.mark.parametrize("what", ["rings", "frame", "header", "receive_buffer", "receive_header"])
@either_format
def test_F25_memory_that_vanishes_between_two_phases(ring, what):
    with GuestMemory(extents=TWO) as memory, by_hand(USUAL | ring, memory=memory) as (driver, device):
        kept, apart = memory.alloc(4096), memory.alloc(4096, region=1)
        if what.startswith("receive"):
            queue, parts = driver.receiveq, [Buffer(kept, 12, True), Buffer(apart, 4000, True)]
            parts = parts if what == "receive_buffer" else [Buffer(apart, 12, True), Buffer(kept, 4000, True)]
        else:
            queue, parts = driver.transmitq, [Buffer(kept, 12), Buffer(apart, 100)]
            parts = parts if what == "frame" else [Buffer(apart, 100)]
        queue.add(parts)
        ring_up(queue)
        device.wire.send(NetHeader().pack() + FRAME)
        for step in iter(device.lane.step, None):
            if step.phase is Phase.HEAD_TAKEN:
                break
        memory.truncate(region=0 if what == "rings" else 1)
        assert steps(device)[-1].reason == "RING_E_MEMORY_GONE"
        assert device.events() == LaneEvent.MEMORY_GONE
        assert device.side.owner.gone and device.from_guest.frames == device.to_guest.frames == 0
        os.eventfd_write(driver.transmitq.kick_fd, 1)
        assert phases(device) == ["kick seen"]


def test_port_that_goes_away():
    with by_hand(USUAL) as (driver, device):
        driver.receiveq.post(writable=[2000])
        ring_up(driver.receiveq)
        device.wire.close()
        assert "port gone" in phases(device) and device.events() == LaneEvent.PORT_GONE
        driver.offer(FRAME)
        ring_up(driver.transmitq)
        assert "frame dropped" in phases(device)
        assert device.from_guest.dropped == {"no_port": 1} and driver.reclaim() == 1


# -------------------------------------------------------------------------------------------- being left


def pattern(i: int) -> bytes:
    return bytes([i]) * (60, 3000, 61)[i % 3]


def frames_from_guest(driver: NetDriver, device: SteppedDevice) -> None:
    for i in range(6):
        driver.offer(pattern(i), cuts=(12,) if i % 2 else ())
    ring_up(driver.transmitq)


def frames_to_guest(driver: NetDriver, device: SteppedDevice) -> None:
    for _ in range(14):
        driver.receiveq.post(writable=[5, 1000])
    for i in range(6):
        device.wire.send(NetHeader().pack() + pattern(i))
    ring_up(driver.receiveq)


@contextlib.contextmanager
def pump_goes_on(device: SteppedDevice) -> Iterator[None]:
    """The lane was left; a pump serves its queues and its port from now on."""
    lane, pump = Lane(), Pump()
    lane.configure(device.config)
    pump.attach(lane)
    try:
        yield
    finally:
        pump.detach(lane, 5000)
        lane.close()
        pump.close()


def assert_at_rest(device: SteppedDevice) -> None:
    """No chain is popped, and all used ones are published."""
    for flow in (device.config.from_guest, device.config.to_guest):
        state = flow.queue.state
        assert (state.next_avail, state.avail_wrap) == (state.next_used, state.used_wrap)
        assert state.published == state.next_used


def left_after(count: int, ring: int, offer) -> bool:
    """Leave after so many phases and let a pump go on -> was anything left to do?"""
    with (GuestMemory(1 << 20) as memory,
          by_hand(USUAL | ring, memory=memory, size=32) as (driver, device)):
        for queue in (driver.transmitq, driver.receiveq):
            queue.ring.want_calls()
        offer(driver, device)
        cut = all(device.lane.step() is not None for _ in range(count))
        device.lane.detach()
        assert_at_rest(device)
        for queue in (driver.transmitq, driver.receiveq):
            assert queue.called() == (queue.ring.pending() > 0)
        with pump_goes_on(device):
            for i in range(6):
                if offer is frames_from_guest:
                    assert device.receive(10) == (NetHeader(), pattern(i))
                else:
                    assert driver.receive_within(10, refill=False).frame == pattern(i)
            assert driver.reclaim_all(10)
            driver.receiveq.collect_all()
            assert_serves(driver, device)  # without a frame or a used element that came twice
        assert not select.select([device.wire], [], [], 0)[0]
        assert driver.reclaim() == 1 and driver.transmitq.outstanding == 0
        return cut


@pytest.mark.parametrize("ring, offer", [
    pytest.param(0, frames_from_guest, id="split_from_guest"),
    pytest.param(PACKED, frames_from_guest, id="packed_from_guest"),
    pytest.param(IN_ORDER, frames_from_guest, id="split_in_order_from_guest"),
    pytest.param(PACKED | IN_ORDER, frames_from_guest, id="packed_in_order_from_guest"),
    pytest.param(0, frames_to_guest, id="split_to_guest"),
    pytest.param(PACKED, frames_to_guest, id="packed_to_guest"),
])
def test_left_at_any_phase_a_pump_goes_on(ring, offer):
    count = 0
    while left_after(count, ring, offer):
        count += 1
    assert count > 40


@either_format
def test_leaving_a_long_chain_does_not_take_long(ring):
    """It goes back, and is then walked in one go."""
    with by_hand(PLAIN | ring, size=1024) as (driver, device):
        data = NetHeader().pack() + bytes(1000)
        driver.transmitq.post(readable=[data[i:i + 1] for i in range(1000)])
        ring_up(driver.transmitq)
        for step in iter(device.lane.step, None):
            if step.descriptor == 10:
                break
        queue, walked = device.config.from_guest.queue, []
        queue.walk = lambda *arguments: walked.append(arguments)
        device.lane.abandon()
        assert not walked
        assert device.receive(0) == (NetHeader(), data[12:1000]) and driver.reclaim() == 1
        assert_at_rest(device)


# ------------------------------------------------------------------------------------------ as a lane is


def test_an_attached_lane_is_not_configured_nor_attached_again():
    with by_hand(PLAIN) as (_, device):
        for verb in (lambda: device.lane.configure(device.config), device.lane.attach):
            with pytest.raises(QueueBusy):
                verb()


def test_a_detached_lane_does_nothing():
    with by_hand(PLAIN) as (driver, device):
        device.lane.detach()
        driver.offer(FRAME)
        ring_up(driver.transmitq)
        assert device.lane.step() is None and device.lane.run() == 0
        device.lane.attach()
        assert device.lane.run() > 0 and device.receive(0) == (NetHeader(), FRAME)


def test_run_does_no_more_than_it_is_asked_for():
    with by_hand(PLAIN) as (driver, device):
        driver.offer(FRAME)
        ring_up(driver.transmitq)
        assert device.lane.run(3) == 3
        assert device.lane.step().phase is Phase.HEAD_TAKEN


def test_queue_without_kick_descriptor_is_looked_at_each_time():
    with stepped(attach=False) as (driver, device):
        device.config.from_guest.kick = device.config.to_guest.kick = -1
        device.attach()
        driver.offer(FRAME)
        driver.transmitq.publish()
        assert device.receive(0) == (NetHeader(), FRAME)
        device.send(FRAME)
        driver.receiveq.post(writable=[2000])
        driver.receiveq.publish()
        assert driver.receive_within(1, refill=False).frame == FRAME


def test_new_call_descriptor_is_signalled_once():
    with stepped() as (_, device):
        device.detach()
        fresh = os.eventfd(0, os.EFD_NONBLOCK)
        device.config.from_guest.call = fresh
        device.attach()
        assert os.eventfd_read(fresh) == 1
        device.detach()
        os.close(fresh)


def test_full_port_gets_its_frames_when_it_has_room():
    with stepped(size=256) as (driver, device):
        for i in range(200):
            driver.offer(bytes([i]) * 60_000)
            if i % 20 == 19:
                driver.transmitq.submit()
        assert 0 < device.from_guest.frames < 200
        for i in range(200):
            assert device.receive(0) == (NetHeader(), bytes([i]) * 60_000)
        assert device.from_guest.dropped == {} and driver.reclaim() == 200
