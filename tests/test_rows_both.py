"""Rows of docs/conformance/split.tsv and packed.tsv that ask the same of both ring formats."""

import time

import pytest

from ring.driver import Buffer, DriverQueue
from ring.driver_parts import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE
from vdev.net.features import Feature, mask
from vdev.testing.netdriver import NetHeader
from vdev.testing.rig import assert_serves, table
from vdev.testing.watch import delivered, noise, on_wire, placed, settle, until

PLAIN = mask(Feature.VERSION_1)
PACKED = mask(Feature.RING_PACKED)
INDIRECT = PLAIN | mask(Feature.INDIRECT_DESC)
MERGEABLE = PLAIN | mask(Feature.MRG_RXBUF)
IN_ORDER = mask(Feature.IN_ORDER)
HEADER = NetHeader.SIZE

event_idx = pytest.mark.parametrize("suppression", [0, mask(Feature.EVENT_IDX)], ids=["flags", "event_idx"])


def rows(split: str = "", packed: str = "") -> pytest.MarkDecorator:
    """The test is about these rows, one for each format; without a name the format is left out."""
    formats = ((split, 0, "split"), (packed, PACKED, "packed"))
    return pytest.mark.parametrize("ring", [pytest.param(bit, id=format, marks=pytest.mark.row(id))
                                            for id, bit, format in formats if id])


# ------------------------------------------------------------------------------------------------- chains


@rows("VQ-SPLIT-D-02", "VQ-PACKED-D-16")
def test_chain_of_as_many_descriptors_as_the_queue_has(engine, ring):
    with engine(PLAIN | ring, size=64) as (driver, device):
        for _ in range(3):
            driver.transmit(noise(100), cuts=range(1, 64))
            assert device.receive() == (NetHeader(), noise(100))
            driver.receiveq.post(writable=[2] * 64)
            driver.receiveq.submit()
            device.send(noise(100))
            assert delivered(driver, device).frame == noise(100)
            assert until(device, driver.transmitq.ring.pending)
            driver.reclaim()


@rows("VQ-SPLIT-D-03", "VQ-PACKED-D-04")
def test_readable_memory_is_not_written(engine, ring):
    with engine(PLAIN | ring) as (driver, device):
        buffers = [placed(driver.memory, NetHeader(flags, num_buffers=7).pack() + noise(seed=flags))
                   for flags in range(4)]
        before = [driver.memory.read(*buffer[:2]) for buffer in buffers]
        for buffer in buffers:  # one frame goes out, those with offloads that were not negotiated do not
            driver.transmitq.add([buffer])
        driver.transmitq.submit()
        # where a frame is to be received, a readable buffer in the chain makes it useless
        driver.receiveq.add([buffers[0], Buffer(driver.memory.alloc(2000), 2000, writable=True)])
        driver.fill(1)
        device.send(noise())
        assert until(device, lambda: driver.transmitq.ring.pending() == 4 and driver.receiveq.ring.pending() == 2)
        assert [driver.memory.read(*buffer[:2]) for buffer in buffers] == before


@rows("VQ-SPLIT-D-06", "VQ-PACKED-D-18")
def test_write_flag_of_an_indirect_descriptor_is_ignored(engine, ring):
    with engine(INDIRECT | ring, attach=False) as (driver, device):
        desc = driver.transmitq.ring.desc
        for slot, direct in enumerate((0, 0, 0) if ring else (0, 1, 2)):
            head = driver.offer(noise(), cuts=(HEADER, 20), direct=direct)
            driver.transmitq.submit()
            last = slot if ring else head
            for _ in range(direct):
                last = desc[last].next
            assert desc[last].flags & DESC_F_INDIRECT
            desc[last].flags |= DESC_F_WRITE
            device.attach()
            assert device.receive() == (NetHeader(), noise())
            device.detach()


# ------------------------------------------------------------------------------------------------ in order


@pytest.mark.row("RSVF-D-05")
@pytest.mark.parametrize("ring", [0, PACKED], ids=["split", "packed"])
def test_buffers_in_order_are_used_as_they_became_available(engine, ring):
    with engine(MERGEABLE | IN_ORDER | ring, size=64, buffer_size=500) as (driver, device):
        receiveq, transmitq = driver.receiveq, driver.transmitq
        offered, completed, missing = [], [], 0
        lengths = (60, 1400, 14, 480, 900)
        for _ in range(10):
            offered += [receiveq.post(writable=[500] * (1 + i % 2)) for i in range(8)]
            receiveq.submit()
            sent = [driver.offer(noise(length), cuts=range(1, length % 7)) for length in lengths]
            transmitq.submit()
            for length in lengths:
                device.send(noise(length))
            assert on_wire(device, len(lengths)) == [(NetHeader(), noise(length)) for length in lengths]
            assert until(device, lambda: transmitq.ring.pending() == len(lengths))
            assert [done.head for done in transmitq.collect_all()] == sent
            missing += sum(lengths) + HEADER * len(lengths)
            while missing:
                assert until(device, receiveq.ring.pending)
                done = receiveq.collect_all()
                completed += [one.head for one in done]
                missing -= sum(one.written for one in done)
        assert completed == offered[:len(completed)]


@rows("VQ-SPLIT-D-21", "VQ-PACKED-D-21")
@pytest.mark.parametrize("mergeable", [0, MERGEABLE], ids=["one_each", "mergeable"])
def test_partly_filled_buffers_in_order_are_not_skipped(engine, ring, mergeable):
    with engine(PLAIN | IN_ORDER | ring | mergeable, attach=False, size=32, buffer_size=400) as (driver, device):
        lengths = (60, 1000, 388, 1100, 14) if mergeable else (60, 380, 61, 14)
        driver.fill(20)
        for length in lengths:
            device.send(noise(length))
        device.attach()  # so all are there for one burst
        parts = [part for length in lengths
                 for part in [400] * ((HEADER + length) // 400) + [(HEADER + length) % 400] if part]
        assert until(device, lambda: driver.receiveq.ring.pending() == len(parts))
        # not what the driver makes of them, but what the used entries say
        assert [driver.receiveq.ring.next_completion()[1] for _ in parts] == parts


# ------------------------------------------------------------------------------------------------- batches


@rows("VQ-SPLIT-DR-20", "VQ-PACKED-DR-12")
@event_idx
def test_driver_that_publishes_batches_and_refuses_calls_meanwhile(engine, ring, suppression):
    with engine(PLAIN | ring | suppression, size=16) as (driver, device):
        queue = driver.transmitq
        for _ in range(50):
            queue.ring.refuse_calls()
            for _ in range(8):
                driver.offer(noise())
            queue.submit()
            assert on_wire(device, 8) == [(NetHeader(), noise())] * 8
            driver.reclaim()
            while queue.outstanding:
                if not queue.ring.want_calls():
                    assert until(device, queue.called)
                driver.reclaim()


@rows("VQ-SPLIT-D-27", "VQ-PACKED-D-27")
@event_idx
def test_chains_without_a_kick_are_served_by_the_next_one_at_the_latest(engine, ring, suppression):
    with engine(PLAIN | ring | suppression, size=16) as (driver, device):
        driver.transmit(noise())
        assert device.receive() == (NetHeader(), noise())
        settle(device)
        for number in range(3):
            driver.offer(noise(seed=number))
            driver.transmitq.publish()
            time.sleep(0.02)
        driver.transmitq.kick()
        assert on_wire(device, 3) == [(NetHeader(), noise(seed=number)) for number in range(3)]


# ---------------------------------------------------------------------- chains that no driver should offer


def by_hand(queue: DriverQueue, *descriptors: tuple[int, int, int, int]) -> int:
    """Offer a chain of descriptors (addr, len, flags, next), whatever they say -> its name; next is relative to
    the first, and means nothing on a packed ring."""
    if queue.packed:
        queue.ring.offer([descriptor[:3] for descriptor in descriptors], 5)
        return 5
    for i, (addr, length, flags, next) in enumerate(descriptors):
        queue.ring.desc[i].set(addr, length, flags, next)
    queue.ring.offer(0)
    return 0


def comes_back_unused(engine, features: int, make) -> None:
    """What ``make`` offers on the transmitq, given a frame's address, goes back used with length 0, nothing is
    sent, and what comes after it is served."""
    with engine(features, size=16) as (driver, device):
        queue = driver.transmitq
        name = make(queue, placed(driver.memory, bytes(HEADER) + noise()).gpa)
        queue.submit()
        assert until(device, queue.ring.pending)
        assert queue.ring.next_completion() == (name, 0)
        settle(device)
        assert device.from_guest.frames == 0 and device.errors() == (0, 0)
        # the chain was not made of free descriptors: now they are in the driver's hands again
        assert_serves(driver, device)


@rows("VQ-SPLIT-DR-03", "VQ-PACKED-DR-06")
def test_readable_descriptor_after_a_writable_one(engine, ring):
    comes_back_unused(engine, PLAIN | ring, lambda queue, gpa: by_hand(
        queue, (gpa, 20, DESC_F_NEXT | DESC_F_WRITE, 1), (gpa + 20, 52, 0, 0)))


@rows("VQ-SPLIT-DR-03", "VQ-PACKED-DR-06")
def test_readable_descriptor_behind_a_receive_buffer(engine, ring):
    with engine(PLAIN | ring, size=16) as (driver, device):
        room = driver.memory.alloc(2000)
        name = by_hand(driver.receiveq, (room, 2000, DESC_F_NEXT | DESC_F_WRITE, 1),
                       (placed(driver.memory, noise()).gpa, 60, 0, 0))
        driver.receiveq.submit()
        device.send(noise())
        assert until(device, driver.receiveq.ring.pending)
        assert driver.receiveq.ring.next_completion() == (name, 0)
        assert driver.memory.read(room, 2000) == bytes(2000)


@rows("VQ-SPLIT-DR-05")
@pytest.mark.parametrize("back", [0, 1])
def test_chain_that_loops(engine, ring, back):
    comes_back_unused(engine, PLAIN | ring, lambda queue, gpa: by_hand(
        queue, (gpa, 20, DESC_F_NEXT, 1), (gpa + 20, 52, DESC_F_NEXT, back)))


@rows("VQ-SPLIT-DR-07", "VQ-PACKED-DR-09")
def test_indirect_descriptor_that_was_not_negotiated(engine, ring):
    comes_back_unused(engine, PLAIN | ring, lambda queue, gpa: by_hand(
        queue, (*table(queue.memory, (gpa, 72, 0, 0)), DESC_F_INDIRECT, 0)))


@rows("VQ-SPLIT-DR-08")
def test_indirect_descriptor_in_an_indirect_table(engine, ring):
    comes_back_unused(engine, INDIRECT | ring, lambda queue, gpa: by_hand(queue, (*table(
        queue.memory, (*table(queue.memory, (gpa, 72, 0, 0)), DESC_F_INDIRECT, 0)), DESC_F_INDIRECT, 0)))


@rows("VQ-SPLIT-DR-09")
def test_indirect_table_longer_than_the_queue_and_than_any_bound(engine, ring):
    with engine(INDIRECT | ring, size=16) as (driver, device):
        driver.transmit(noise(), cuts=range(1, 70), direct=0)  # some drivers do that, and are served
        assert device.receive() == (NetHeader(), noise())
    comes_back_unused(engine, INDIRECT | ring, lambda queue, gpa: by_hand(
        queue, (*table(queue.memory, *[(gpa, 1, DESC_F_NEXT, i + 1) for i in range(1500)]), DESC_F_INDIRECT, 0)))


@rows("VQ-SPLIT-DR-10", "VQ-PACKED-DR-10")
def test_indirect_descriptor_with_next(engine, ring):
    comes_back_unused(engine, INDIRECT | ring, lambda queue, gpa: by_hand(
        queue, (*table(queue.memory, (gpa, 72, 0, 0)), DESC_F_INDIRECT | DESC_F_NEXT, 1), (gpa, 72, 0, 0)))


@rows(packed="VQ-PACKED-DR-10")
def test_indirect_descriptor_at_the_end_of_a_packed_chain(engine, ring):
    comes_back_unused(engine, INDIRECT | ring, lambda queue, gpa: by_hand(
        queue, (gpa, HEADER, DESC_F_NEXT, 1), (*table(queue.memory, (gpa + HEADER, 60, 0, 0)), DESC_F_INDIRECT, 0)))


@rows(packed="VQ-PACKED-DR-05")
def test_chain_without_an_end_stops_the_ring_alone(engine, ring):
    with engine(PLAIN | ring, size=16) as (driver, device):
        gpa = placed(driver.memory, noise()).gpa
        by_hand(driver.transmitq, *[(gpa, 60, DESC_F_NEXT, 0)] * 16)
        driver.transmitq.submit()
        assert until(device, lambda: device.config.from_guest.queue.state.broken)
        settle(device)
        assert device.errors() == (1, 0) and device.from_guest.frames == 0
        assert driver.transmitq.ring.pending() == 0
        driver.fill(1)
        device.send(noise())
        assert delivered(driver, device).frame == noise()
