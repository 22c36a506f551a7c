"""The driver's packed ring in Python: fields by name, chains, notifications, and what it thinks of a device that
misbehaves; and both formats in order.

The device here is the test itself, writing used entries by hand; tests/test_ring_virtqueue.py joins both halves.
"""

import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring.driver import Buffer, DeviceError, DriverQueue, GuestMemory, PackedRing, RingFull, SplitRing
from ring.driver_packed import (
    DESC_F_AVAIL,
    DESC_F_USED,
    EVENT_DESC,
    EVENT_DISABLE,
    EVENT_ENABLE,
    WRAP,
)
from ring.driver_parts import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, EVENT_IDX, IN_ORDER, RING_PACKED

PACKED = 1 << RING_PACKED
EVENT = 1 << EVENT_IDX
ORDER = 1 << IN_ORDER
AVAIL, USED = DESC_F_AVAIL, DESC_F_USED


@pytest.fixture
def memory():
    with GuestMemory(1 << 20) as made:
        yield made


@pytest.fixture
def queue(memory):
    with DriverQueue(memory, size=8, features=PACKED) as made:
        yield made


class Device:
    """Writes used descriptors: one after the other, each passing over the slots of its chain."""

    def __init__(self, queue: DriverQueue) -> None:
        self.ring = queue.ring
        self.slot, self.wrap = self.ring.base & 0x7FFF, bool(self.ring.base & WRAP)

    def use(self, id: int, written: int = 0, slots: int = 1) -> None:
        descriptor = self.ring.desc[self.slot]
        descriptor.id, descriptor.len = id, written
        descriptor.flags = (AVAIL | USED) * self.wrap | DESC_F_WRITE * bool(written)
        self.slot += slots
        if self.slot >= self.ring.size:
            self.slot -= self.ring.size
            self.wrap = not self.wrap


def flags(queue: DriverQueue) -> list[int]:
    return [queue.ring.desc[slot].flags for slot in range(queue.ring.size)]


# ------------------------------------------------------------------------------------------------ layout


def test_format_follows_the_feature(memory):
    with DriverQueue(memory, 8, PACKED) as packed, DriverQueue(memory, 8) as split:
        assert isinstance(packed.ring, PackedRing) and isinstance(split.ring, SplitRing)


def test_every_field_by_name(queue):
    ring, memory = queue.ring, queue.memory
    descriptor = ring.desc[3]
    descriptor.addr, descriptor.len, descriptor.id, descriptor.flags = 0x1122334455667788, 0x99AABBCC, 0xDDEE, 0xFF01
    assert memory.read(ring.desc.gpa + 48, 16) == struct.pack("<QIHH", 0x1122334455667788, 0x99AABBCC, 0xDDEE, 0xFF01)
    assert (descriptor.addr, descriptor.len, descriptor.id, descriptor.flags) == (
        0x1122334455667788, 0x99AABBCC, 0xDDEE, 0xFF01)
    for event in (ring.driver_event, ring.device_event):
        event.off_wrap, event.flags = 0x8005, 2
        assert memory.read(event.gpa, 4) == struct.pack("<HH", 0x8005, 2)
        event.set(7, 0xFFFF)
        assert (event.off_wrap, event.flags) == (7, 0xFFFF)


@pytest.mark.parametrize("size", [1, 3, 256, 32768])
def test_areas_have_the_sizes_of_the_specification(memory, size):
    with DriverQueue(memory, size, PACKED) as queue:
        assert [area.len for area in queue.ring.areas] == [16 * size, 4, 4]  # 2.8.10.1
        assert [area.gpa % align for area, align in zip(queue.ring.areas, (16, 4, 4), strict=True)] == [0, 0, 0]


def test_ring_parts_may_be_placed(memory):
    base = memory.alloc(4096, align=64)
    with DriverQueue(memory, 4, PACKED, desc=base, avail=base + 64, used=base + 68) as queue:
        assert [area.gpa for area in queue.ring.areas] == [base, base + 64, base + 68]


def test_fresh_base_is_that_of_the_field(memory):
    """As QEMU and DPDK send it: slot 0 and wrap counter 1, for both directions."""
    with DriverQueue(memory, 8, PACKED) as packed, DriverQueue(memory, 8, base=5) as split:
        assert (packed.base, split.base) == (0x80008000, 5)


@pytest.mark.parametrize("base", [0x80008000, 0x80038003, 0x00070007, 0x00000000])
def test_base_is_where_the_ring_starts(memory, base):
    with DriverQueue(memory, 8, PACKED, base=base) as queue:
        assert queue.base == base
        assert queue.collect() is None
        slot, wrap = base & 0x7FFF, base >> 15 & 1
        queue.post([b"x"])
        queue.publish()
        assert queue.ring.desc[slot].flags == (AVAIL if wrap else USED)
        # no other descriptor looks available to a device that comes there
        for past in range(1, 8):
            at, lap = (slot + past) % 8, wrap ^ (slot + past >= 8)
            assert queue.ring.desc[at].flags in (0, AVAIL | USED)
            assert bool(queue.ring.desc[at].flags & AVAIL) != lap
        device = Device(queue)
        device.use(queue.ring.desc[slot].id)
        assert queue.collect() is not None


def test_base_outside_the_ring(memory):
    with pytest.raises(ValueError, match="slot 8 is outside the ring of 8"):
        DriverQueue(memory, 8, PACKED, base=0x8008)


# ------------------------------------------------------------------------------------------------- chains


def test_direct_chain(queue):
    id = queue.add([Buffer(10, 1), Buffer(20, 2), Buffer(30, 3, writable=True)])
    queue.publish()
    desc = queue.ring.desc
    assert [(desc[i].addr, desc[i].len, desc[i].flags, desc[i].id) for i in range(3)] == [
        (10, 1, AVAIL | DESC_F_NEXT, id), (20, 2, AVAIL | DESC_F_NEXT, id), (30, 3, AVAIL | DESC_F_WRITE, id)]


def test_indirect_chain(queue):
    """Consecutive entries; no flag but WRITE in the table (2.8.19)."""
    id = queue.add([Buffer(10, 1), Buffer(20, 2), Buffer(30, 3, writable=True)], direct=0)
    queue.publish()
    first = queue.ring.desc[0]
    assert (first.len, first.flags, first.id) == (48, AVAIL | DESC_F_INDIRECT, id)
    assert queue.memory.read(first.addr, 48) == struct.pack(
        "<QIHHQIHHQIHH", 10, 1, 0, 0, 20, 2, 0, 0, 30, 3, 0, DESC_F_WRITE)
    assert queue.ring.room == 7


def test_chain_of_both_kinds_is_refused_and_costs_nothing(queue):
    free, before = queue.ring.room, queue.memory.alloc(1)
    queue.memory.free(before)
    with pytest.raises(ValueError, match="either direct or in an indirect table"):
        queue.post([b"a", b"b"], direct=1)
    assert (queue.ring.room, queue.memory.alloc(1), queue.outstanding) == (free, before, 0)


def test_first_flags_are_held_back_until_published(queue):
    """2.8.21: the rest of a batch may be there, its first descriptor comes last."""
    queue.add([Buffer(1, 1), Buffer(2, 1)])
    queue.add([Buffer(3, 1)])
    assert flags(queue)[:3] == [0, AVAIL, AVAIL]
    queue.publish()
    assert flags(queue)[:3] == [AVAIL | DESC_F_NEXT, AVAIL, AVAIL]
    queue.publish()
    assert flags(queue)[3:] == [0] * 5


@pytest.mark.parametrize("size, count", [(1, 5), (2, 9), (3, 10), (7, 50)])
def test_wrap_counter_flips_at_the_end_of_the_ring(memory, size, count):
    with DriverQueue(memory, size, PACKED) as queue:
        device = Device(queue)
        for i in range(count):
            id = queue.post([b"x"])
            queue.publish()
            assert queue.ring.desc[i % size].flags == (USED if i // size % 2 else AVAIL)
            assert queue.collect() is None
            device.use(id)
            assert queue.collect().head == id
        assert queue.base == (count % size | (0 if count // size % 2 else WRAP)) * 0x10001


def test_chain_across_the_end_of_the_ring(memory):
    with DriverQueue(memory, 3, PACKED) as queue:
        device = Device(queue)
        id = queue.post([b"1", b"2"])
        queue.publish()
        device.use(id, slots=2)
        queue.collect()
        id = queue.post([b"1", b"2"])
        queue.publish()
        assert flags(queue)[2] == AVAIL | DESC_F_NEXT and flags(queue)[0] == USED
        device.use(id, slots=2)
        assert queue.collect().head == id and (device.slot, device.wrap) == (1, False)


def test_full_ring_takes_nothing_and_loses_nothing(queue):
    before = queue.memory.alloc(1)
    queue.memory.free(before)
    for _ in range(7):
        queue.add([Buffer(0, 1)])
    for chain in ({"writable": [1, 1]}, {"writable": [1] * 5}):
        with pytest.raises(RingFull, match="descriptors, 1 of 8 are free"):
            queue.post(**chain)
    assert queue.memory.alloc(1) == before and queue.outstanding == 7
    queue.add([Buffer(0, 1), Buffer(0, 1)], direct=0)  # one descriptor
    assert queue.ring.room == 0


def test_chains_used_out_of_order_go_to_the_next_used_slots(queue):
    """A used descriptor stands where the device has come to, not where its chain was."""
    ids = [queue.post([b"a"], [4]), queue.post([b"b", b"c"], [4]), queue.post([], [4])]
    queue.publish()
    device = Device(queue)
    for i, slots in ((2, 1), (0, 2), (1, 3)):
        device.use(ids[i], i, slots)
    assert queue.ring.pending() == 3
    assert [(done.head, done.written) for done in queue.collect_all()] == [(ids[2], 2), (ids[0], 0), (ids[1], 1)]
    assert queue.ring.room == 8 and sorted(queue.ring.free) == list(range(8))


# --------------------------------------------------------------------------------- devices that break a rule


def test_id_that_is_not_outstanding(queue):
    queue.post([b"x"])
    queue.publish()
    Device(queue).use(5)
    with pytest.raises(DeviceError, match="descriptor 0 names buffer id 5, which is not outstanding"):
        queue.collect()


@pytest.mark.parametrize("unpublished", [False, True])
def test_used_before_available(queue, unpublished):
    if unpublished:
        queue.post([b"x"])
    Device(queue).use(7)
    with pytest.raises(DeviceError, match="descriptor 0 was used before it was made available"):
        queue.collect()


@pytest.mark.parametrize("turn", [0, USED])
def test_flags_out_of_turn(queue, turn):
    queue.post([b"x"])
    queue.publish()
    queue.ring.desc[0].flags = turn
    with pytest.raises(DeviceError, match="neither as it was made available, nor used"):
        queue.collect()


def test_length_without_write_means_nothing(queue):
    """2.8.4: it is reserved."""
    id = queue.post([b"x"])
    queue.publish()
    Device(queue).use(id)
    queue.ring.desc[0].len = 3
    assert queue.collect().written == 0


def test_write_without_a_length_is_noticed(queue):
    id = queue.post([], [8])
    queue.publish()
    Device(queue).use(id)
    queue.ring.desc[0].flags |= DESC_F_WRITE
    with pytest.raises(DeviceError, match="has WRITE set, and says that nothing was written"):
        queue.collect()


def test_more_bytes_than_room(queue):
    id = queue.post([b"x"], [8])
    queue.publish()
    Device(queue).use(id, 9, 2)
    with pytest.raises(DeviceError, match="says 9 bytes, the chain has room for 8"):
        queue.collect()


def test_one_chain_used_twice(queue):
    id = queue.post([b"x"])
    queue.post([b"y"])
    queue.publish()
    device = Device(queue)
    device.use(id)
    device.use(id)
    with pytest.raises(DeviceError, match=f"buffer id {id} was used twice"):
        queue.ring.pending()
    queue.collect()
    with pytest.raises(DeviceError, match="not outstanding"):
        queue.collect()


@pytest.mark.parametrize("off_wrap, flags_, features, complaint", [
    (0, 3, EVENT, "device_event.flags is 0x3"), (0, 4, 0, "device_event.flags is 0x4"),
    (0x8000, EVENT_DESC, 0, "device_event.flags is 0x2"),
    (8, EVENT_DESC, EVENT, "device_event.off_wrap is 0x8: slot 8 is outside the ring of 8")])
def test_event_suppression_that_means_nothing(memory, off_wrap, flags_, features, complaint):
    with DriverQueue(memory, 8, PACKED | features) as queue:
        queue.ring.device_event.set(off_wrap, flags_)
        queue.post([b"x"])
        with pytest.raises(DeviceError, match=complaint):
            queue.submit()


# ------------------------------------------------------------------------------------------ notifications


def test_kick_follows_the_flags(queue):
    assert not queue.submit()  # nothing new
    queue.post([b"1"])
    assert queue.submit() and os.eventfd_read(queue.kick_fd) == 1
    queue.ring.device_event.flags = EVENT_DISABLE
    queue.post([b"2"])
    assert not queue.submit()
    queue.ring.device_event.flags = EVENT_ENABLE
    assert not queue.submit()
    assert queue.kicks == 1


@given(size=st.integers(1, 9), start=st.integers(0, 17), moved=st.integers(1, 9), event=st.integers(0, 17))
def test_kick_at_an_offset_is_brute_force(size, start, moved, event):
    """2.8.10 in words: a descriptor was made available at the offset and wrap counter the device named."""
    start, moved, event = start % (2 * size), min(moved, size), event % (2 * size)
    with GuestMemory(1 << 16) as memory:
        where = start % size | WRAP * (start < size)
        with DriverQueue(memory, size, PACKED | EVENT, base=where) as queue:
            queue.ring.device_event.set(event % size | WRAP * (event < size), EVENT_DESC)
            for _ in range(moved):
                queue.add([Buffer(0, 1)])
            due = any((start + i) % (2 * size) == event for i in range(moved))
            assert queue.submit() == due
            assert not queue.submit()


def test_wish_for_calls(memory):
    with DriverQueue(memory, 4, PACKED) as queue:
        queue.ring.refuse_calls()
        assert queue.ring.driver_event.flags == EVENT_DISABLE
        assert not queue.ring.want_calls()
        assert queue.ring.driver_event.flags == EVENT_ENABLE
    with DriverQueue(memory, 4, PACKED | EVENT, base=0x80038003) as queue:
        ids = [queue.post([b"1", b"2"]), queue.post([b"3"])]
        queue.publish()
        assert not queue.ring.want_calls()
        assert (queue.ring.driver_event.off_wrap, queue.ring.driver_event.flags) == (0x8003, EVENT_DESC)
        # which chain comes first is not known: the second used descriptor may be as near as one slot on
        assert not queue.ring.want_calls(2)
        assert queue.ring.driver_event.off_wrap == 0x0000
        device = Device(queue)
        device.use(ids[0], slots=2)
        assert not queue.ring.want_calls(2)
        assert queue.ring.driver_event.off_wrap == 0x0001
        device.use(ids[1])
        assert queue.ring.want_calls(2)
        queue.ring.refuse_calls()
        assert queue.ring.driver_event.flags == EVENT_DISABLE


def test_wish_for_calls_in_order_is_exact(memory):
    with DriverQueue(memory, 8, PACKED | EVENT | ORDER) as queue:
        for chain in ([b"1", b"2"], [b"3", b"4", b"5"], [b"6"]):
            queue.post(chain)
        queue.publish()
        queue.ring.want_calls(3)
        assert queue.ring.driver_event.off_wrap == 0x8005


# ------------------------------------------------------------------------------------------------ in order


def use_split(queue: DriverQueue, head: int, written: int, batch: int) -> None:
    """One used element for ``batch`` chains: it stands at the first, the index passes over all (2.7.9)."""
    ring = queue.ring
    element = ring.used.ring[ring.used.idx]
    element.id, element.len = head, written
    ring.used.idx = (ring.used.idx + batch) & 0xFFFF


@pytest.mark.parametrize("packed", [False, True])
def test_batch_counts_as_completely_used_but_for_its_last(memory, packed):
    with DriverQueue(memory, 8, ORDER | PACKED * packed) as queue:
        device = Device(queue) if packed else None
        for _ in range(5):  # several laps
            names = [queue.post([b"a"], [3]), queue.post([], [5]), queue.post([b"b"], [4, 4]), queue.post([b"c"])]
            queue.publish()
            if packed:
                device.use(names[2], 6, 2 + 1 + 3)
            else:
                use_split(queue, names[2], 6, 3)
            assert queue.ring.pending() == 3
            done = queue.collect()
            assert (done.head, done.written) == (names[0], 3)
            assert queue.ring.pending() == 2  # in the middle of the batch
            assert [(done.head, done.written) for done in queue.collect_all()] == [(names[1], 5), (names[2], 6)]
            if packed:
                device.use(names[3])
            else:
                use_split(queue, names[3], 0, 1)
            assert queue.collect().head == names[3]
            assert queue.ring.room == 8 and queue.outstanding == 0


def test_split_descriptors_are_taken_round_the_table_in_order(memory):
    with DriverQueue(memory, 4, ORDER) as queue:
        heads = []
        for _ in range(5):
            heads.append(queue.post([b"a", b"b", b"c"]))
            slot = heads[-1]
            for _ in range(2):
                assert queue.ring.desc[slot].next == (slot + 1) % 4  # 2.7.5.2
                slot = queue.ring.desc[slot].next
            queue.publish()
            use_split(queue, heads[-1], 0, 1)
            queue.collect()
        assert heads == [0, 3, 2, 1, 0]


def test_split_batch_that_used_idx_does_not_cover(memory):
    with DriverQueue(memory, 8, ORDER) as queue:
        names = [queue.post([b"a"]) for _ in range(3)]
        queue.publish()
        use_split(queue, names[2], 0, 2)
        queue.collect()
        queue.collect()
        with pytest.raises(DeviceError, match=f"names head {names[2]}, but used.idx 2 does not cover"):
            queue.collect()


@pytest.mark.parametrize("packed", [False, True])
def test_batch_that_names_a_chain_twice(memory, packed):
    with DriverQueue(memory, 8, ORDER | PACKED * packed) as queue:
        names = [queue.post([b"a"]) for _ in range(3)]
        queue.publish()
        device = Device(queue) if packed else None
        for _ in range(2):
            if packed:
                device.use(names[0])
            else:
                use_split(queue, names[0], 0, 1)
        queue.collect()
        with pytest.raises(DeviceError, match="not outstanding"):
            queue.collect()
