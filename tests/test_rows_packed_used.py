"""Rows of docs/conformance/packed.tsv about used descriptors."""

from typing import NamedTuple

import pytest

from ring.driver import DriverQueue
from ring.driver_packed import DESC_F_AVAIL, DESC_F_USED, PACKED_DESCRIPTOR
from ring.driver_parts import DESC_F_WRITE
from vdev.net.features import Feature, mask
from vdev.testing.netdriver import NetHeader
from vdev.testing.watch import noise, on_wire, until, watching

row = pytest.mark.row

PACKED = mask(Feature.VERSION_1, Feature.RING_PACKED)
MERGEABLE = PACKED | mask(Feature.MRG_RXBUF)
IN_ORDER = PACKED | mask(Feature.IN_ORDER)
HEADER = NetHeader.SIZE


class Used(NamedTuple):
    """A used descriptor: its slot and wrap counter, and what it says."""

    slot: int
    wrap: int
    id: int
    len: int
    write: bool


class Slots:
    """Reads the ring of ``queue`` without the driver's model of it."""

    def __init__(self, queue: DriverQueue) -> None:
        self.queue = queue

    def raw(self) -> list[tuple[int, int, int, int]]:
        """(addr, len, id, flags) of every slot, in one look at each."""
        area = self.queue.ring.areas.descriptor
        return list(PACKED_DESCRIPTOR.iter_unpack(self.queue.memory.read(*area)))

    def used(self, wrap: int) -> list[Used]:
        """The slots whose AVAIL and USED flags both equal ``wrap``, but for those that are still zero."""
        turn = (DESC_F_AVAIL | DESC_F_USED) * wrap
        return [Used(slot, wrap, id, length, bool(flags & DESC_F_WRITE))
                for slot, (addr, length, id, flags) in enumerate(self.raw())
                if addr and flags & (DESC_F_AVAIL | DESC_F_USED) == turn]


@row("VQ-PACKED-D-02", "VQ-PACKED-D-09")
def test_used_descriptors_fill_the_ring_slot_by_slot(engine):
    with engine(PACKED, size=8) as (driver, device):
        slots = Slots(driver.transmitq)
        for lap in range(3):
            wrap = 1 - lap % 2
            ids = []
            for _ in range(4):
                ids += [driver.offer(noise()), driver.offer(noise())]
                driver.transmitq.submit()
                assert until(device, lambda: driver.transmitq.ring.pending() == len(ids))  # noqa: B023
                assert [(one.slot, one.id) for one in slots.used(wrap)] == list(enumerate(ids))
                flags = [flags & (DESC_F_AVAIL | DESC_F_USED) for *_, flags in slots.raw()]
                assert flags[:len(ids)] == [(DESC_F_AVAIL | DESC_F_USED) * wrap] * len(ids)
            driver.reclaim()


@row("VQ-PACKED-D-07")
def test_used_descriptors_are_not_touched_again(engine):
    with engine(MERGEABLE, size=16, buffer_size=300) as (driver, device):
        queues = [Slots(driver.transmitq), Slots(driver.receiveq)]
        driver.fill(12)
        with watching(lambda: [slots.raw() for slots in queues]) as looks:
            for number in range(6):
                driver.transmit(noise(seed=number))
                device.send(noise(400))
                assert device.receive() == (NetHeader(), noise(seed=number))
        assert until(device, lambda: driver.receiveq.ring.pending() == 12 and driver.transmitq.ring.pending() == 6)
        looks.append([slots.raw() for slots in queues])
        for queue, count in ((0, 6), (1, 12)):
            for slot in range(count):
                seen = [look[queue][slot] for look in looks]
                used = [one for one in seen if one[3] & DESC_F_USED]
                assert used and set(used) == {used[0]}


@row("VQ-PACKED-D-08")
def test_wrap_counter_flips_when_a_chain_goes_over_the_end(engine):
    with engine(PACKED, size=8) as (driver, device):
        slots = Slots(driver.transmitq)
        slot, wrap = 0, 1
        for count in (1, 3, 3, 3, 5, 2, 7, 8, 1, 8, 8):  # now behind, now at the end, now over it
            id = driver.transmit(noise(), cuts=range(1, count))
            assert device.receive() == (NetHeader(), noise())
            assert until(device, driver.transmitq.ring.pending)
            assert Used(slot, wrap, id, 0, False) in slots.used(wrap)
            driver.reclaim()
            slot += count
            if slot >= 8:
                slot, wrap = slot - 8, 1 - wrap


@row("VQ-PACKED-D-10")
def test_chain_becomes_one_used_descriptor(engine):
    with engine(PACKED, size=16) as (driver, device):
        ids = [driver.offer(noise(), cuts=(HEADER, 40)) for _ in range(4)]
        driver.transmitq.submit()
        assert until(device, lambda: driver.transmitq.ring.pending() == 4)
        assert [(one.slot, one.id) for one in Slots(driver.transmitq).used(1)] == [
            (3 * i, id) for i, id in enumerate(ids)]


@row("VQ-PACKED-D-11")
def test_buffer_id_is_that_of_the_last_descriptor(engine):
    with engine(PACKED, size=16) as (driver, device):
        driver.offer(noise(), cuts=(HEADER, 40))
        for slot, id in ((0, 7), (1, 8), (2, 0xFFF9)):
            driver.transmitq.ring.desc[slot].id = id
        driver.transmitq.submit()
        assert until(device, lambda: Slots(driver.transmitq).used(1))
        assert Slots(driver.transmitq).used(1) == [Used(0, 1, 0xFFF9, 0, False)]


@row("VQ-PACKED-D-12", "VQ-PACKED-D-20")
@pytest.mark.parametrize("counts", [(1, 3, 2), (4, 1), (2, 2, 2, 1)])
def test_used_descriptor_goes_to_the_next_slot_not_to_that_of_its_buffer(engine, counts):
    """With VIRTIO_F_IN_ORDER the one for a batch has the id of the last chain and the slot of the first."""
    with engine(IN_ORDER, size=16, attach=False) as (driver, device):
        frames = [noise(60, i) for i in range(len(counts))]
        ids = [driver.offer(data, cuts=range(1, count)) for data, count in zip(frames, counts, strict=True)]
        driver.transmitq.submit()
        device.attach()
        assert on_wire(device, len(frames)) == [(NetHeader(), data) for data in frames]
        assert until(device, lambda: driver.transmitq.ring.pending() == len(ids))
        found = Slots(driver.transmitq).used(1)
        each = [Used(sum(counts[:i]), 1, id, 0, False) for i, id in enumerate(ids)]
        assert found in ([Used(0, 1, ids[-1], 0, False)], each)  # the second would be right too
        assert [done.head for done in driver.transmitq.collect_all()] == ids
        # the next batch begins behind all the slots of this one
        id = driver.transmit(noise(seed=9))
        assert device.receive() == (NetHeader(), noise(seed=9))
        assert until(device, driver.transmitq.ring.pending)
        assert Used(sum(counts), 1, id, 0, False) in Slots(driver.transmitq).used(1)


@row("VQ-PACKED-D-13", "VQ-PACKED-D-14")
def test_write_flag_and_length_tell_what_was_written(engine):
    with engine(PACKED, size=16) as (driver, device):
        lengths = [14, 60, 61, 1500]
        driver.fill(5)
        for length in lengths:
            device.send(noise(length))
            driver.offer(noise(length), cuts=(5, HEADER))
        driver.transmitq.submit()
        assert until(device, lambda: driver.transmitq.ring.pending() == 4 and driver.receiveq.ring.pending() == 4)
        assert [(one.len, one.write) for one in Slots(driver.receiveq).used(1)] == [
            (HEADER + length, True) for length in lengths]
        assert [one.write for one in Slots(driver.transmitq).used(1)] == [False] * 4


@row("VQ-PACKED-D-13")
def test_receive_buffer_that_is_given_back_unused_has_no_write_flag(engine):
    with engine(PACKED, size=16) as (driver, device):
        driver.receiveq.post(writable=[HEADER - 1])  # no room for the header: of no use
        driver.fill(1)
        device.send(noise())
        assert until(device, lambda: len(Slots(driver.receiveq).used(1)) == 2)
        assert [(one.len, one.write) for one in Slots(driver.receiveq).used(1)] == [(0, False), (HEADER + 60, True)]


@row("VQ-PACKED-D-22")
def test_first_buffer_of_a_frame_is_used_after_the_others(engine):
    with engine(MERGEABLE, size=64, buffer_size=300) as (driver, device):
        slots = Slots(driver.receiveq)
        driver.fill(60)
        desc = driver.receiveq.ring.desc

        def look() -> list[bool]:
            # the first slot of each frame is read before the others
            return [not desc[first].flags & DESC_F_USED or all(
                desc[first + i].flags & DESC_F_USED for i in (1, 2, 3)) for first in range(0, 60, 4)]

        with watching(look) as looks:
            for number in range(15):
                device.send(noise(4 * 300 - HEADER, number))
                assert until(device, lambda: driver.receiveq.ring.pending() == 4 * number + 4)  # noqa: B023
        assert all(all(one) for one in looks)
        assert len(slots.used(1)) == 60
