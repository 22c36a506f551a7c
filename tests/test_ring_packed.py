"""What is the packed virtqueue's own in normal life: wrap counters, flags, event suppression structures.

Driver in Python, device in C through the step API. What it shares with the split ring is in
tests/test_ring_virtqueue.py, what a lying driver gets in tests/test_ring_hostile.py.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ring.driver import Buffer, DriverQueue, GuestMemory
from ring.driver_packed import (
    DESC_F_AVAIL,
    DESC_F_USED,
    EVENT_DESC,
    EVENT_DISABLE,
    EVENT_ENABLE,
    WRAP,
    PackedDescriptors,
)
from ring.driver_parts import (
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    EVENT_IDX,
    IN_ORDER,
    INDIRECT_DESC,
    RING_PACKED,
)
from ring.errors import SetupError
from ring.virtqueue import CallReason, VirtQueue
from vdev.testing.rig import DeviceSide, joined

PACKED = 1 << RING_PACKED
EVENT = PACKED | 1 << EVENT_IDX
ORDER = PACKED | 1 << IN_ORDER
INDIRECT = PACKED | 1 << INDIRECT_DESC
TURN = DESC_F_AVAIL | DESC_F_USED


def serve(device: VirtQueue) -> None:
    """Use every chain that waits."""
    while (chain := device.pop()) is not None:
        device.push(chain)
    device.publish()


def off_wrap(position: int, size: int) -> int:
    """Position 0 is slot 0 in the lap with wrap counter 1, position ``size`` slot 0 in the next."""
    position %= 2 * size
    return position % size | WRAP * (position < size)


def base(position: int, size: int) -> int:
    return off_wrap(position, size) * 0x10001


# ----------------------------------------------------------------------------------- descriptors and laps


def test_phases_one_by_one():
    with joined(features=PACKED) as (driver, device):
        id = driver.post([b"ab"], [3])
        driver.post([b"c"])
        driver.publish()
        assert device.see() == 1  # no more than one can be told
        chain = device.take()
        assert (chain.descriptors, chain.slots) == (0, 0)
        assert device.walk() and (chain.readable_len, chain.writable_len) == (2, 0)
        assert not device.walk() and (chain.readable_len, chain.writable_len) == (2, 3)
        assert (chain.head, chain.slots) == (id, 2)
        second = device.take()
        assert not device.walk() and second.read() == b"c"
        assert device.see() == 0 and device.take() is None


def test_zeroed_ring_holds_nothing():
    """VQ-PACKED-D-06: no descriptor is available before its AVAIL flag has changed."""
    with joined(features=PACKED) as (driver, device):
        before = driver.memory.snapshot()
        assert device.pop() is None and device.see() == 0
        assert driver.memory.snapshot() == before


@pytest.mark.parametrize("size", [1, 2, 3, 7, 256, 32768], ids="R06_R07_size_{}".format)
def test_VQ_PACKED_D_08_D_09_D_19_full_ring_of_every_size_through_three_laps(size):
    with joined(size, PACKED) as (driver, device):
        for lap in range(3):
            for id in range(size):
                driver.ring.offer([(0, 0, 0)], id)
            driver.publish()
            chains = list(iter(device.pop, None))
            assert [chain.head for chain in chains] == list(range(size))
            assert device.base & 0xFFFF == off_wrap((lap + 1) * size, size)
            for chain in reversed(chains):
                device.push(chain)
            device.publish()
            wrap = 1 - lap % 2
            assert {driver.ring.desc[slot].flags for slot in range(size)} == {TURN * wrap}
            assert [driver.ring.next_completion() for _ in range(size)] == [(id, 0) for id in reversed(range(size))]
            assert driver.ring.next_completion() is None
            assert device.base == base((lap + 1) * size, size) == driver.base


def test_VQ_PACKED_D_10_D_11_chain_is_one_used_descriptor_and_its_slots_are_skipped():
    with joined(features=PACKED) as (driver, device):
        ring = driver.ring
        first = ring.offer([(ring.desc.gpa, 1, DESC_F_NEXT), (ring.desc.gpa, 1, DESC_F_NEXT), (ring.desc.gpa, 1, 0)], 5)
        ring.desc[first].id, ring.desc[first + 1].id = 1, 2  # the last one's counts
        driver.publish()
        driver.post([b"x"])
        driver.publish()
        chain = device.pop()
        assert (chain.head, chain.slots) == (5, 3)
        kept = driver.memory.read(ring.desc.gpa + 16, 32)
        device.push(chain)
        device.push(device.pop())
        device.publish()
        assert (ring.desc[0].id, ring.desc[0].flags) == (5, TURN)
        assert ring.desc[3].flags == TURN
        assert driver.memory.read(ring.desc.gpa + 16, 32) == kept


def test_VQ_PACKED_D_12_used_descriptors_fill_the_next_used_slots():
    with joined(features=PACKED) as (driver, device):
        ids = [driver.post([b"x"] * count) for count in (1, 3, 2)]
        driver.publish()
        chains = list(iter(device.pop, None))
        for i in (2, 0, 1):
            device.push(chains[i])
        device.publish()
        assert [driver.ring.desc[slot].id for slot in (0, 2, 3)] == [ids[2], ids[0], ids[1]]
        assert [done.head for done in driver.collect_all()] == [ids[2], ids[0], ids[1]]


@pytest.mark.parametrize("written", [0, 3])
def test_VQ_PACKED_D_13_D_14_write_flag_and_length_say_what_was_written(written):
    with joined(features=PACKED) as (driver, device):
        driver.post([b"x"], [8])
        driver.publish()
        chain = device.pop()
        device.push(chain, chain.write(b"y" * written))
        device.publish()
        assert (driver.ring.desc[0].flags, driver.ring.desc[0].len) == (TURN | DESC_F_WRITE * bool(written), written)


def test_VQ_PACKED_D_22_first_of_several_is_flipped_last():
    """A frame over merged buffers: as long as the first used descriptor is not there, the driver sees nothing."""
    with joined(features=PACKED) as (driver, device):
        for _ in range(3):
            driver.post([], [8])
        driver.publish()
        before = driver.ring.desc[0].flags
        for chain in list(iter(device.pop, None)):
            device.push(chain, chain.write(b"12345678"))
        assert [driver.ring.desc[slot].flags for slot in range(3)] == [before, *[TURN | DESC_F_WRITE] * 2]
        assert driver.ring.pending() == 0 and driver.collect() is None
        device.publish()
        assert len(driver.collect_all()) == 3


def test_VQ_PACKED_D_17_flags_and_ids_inside_an_indirect_table_mean_nothing():
    with joined(features=INDIRECT) as (driver, device):
        gpa = driver.memory.alloc(64)
        driver.memory.write(gpa, b"abcd")
        entries = PackedDescriptors(driver.memory, driver.memory.alloc(48))
        entries[0].set(gpa, 2, DESC_F_NEXT | DESC_F_INDIRECT, 0xFFFF)
        entries[1].set(gpa + 2, 2, TURN, 7)
        entries[2].set(gpa + 8, 9, DESC_F_WRITE | 0x7F78)
        driver.ring.offer([(entries.gpa, 48, DESC_F_INDIRECT)], 3)
        driver.publish()
        chain = device.pop()
        assert (chain.head, chain.read(), chain.writable_len) == (3, b"abcd", 9)


def test_batch_in_order_is_one_descriptor_at_the_first_slot():
    """VQ-PACKED-D-20: it names the last, and the slots of all are passed over."""
    with joined(features=ORDER, base=base(6, 8)) as (driver, device):
        ids = [driver.post([b"x"] * count) for count in (1, 2, 1)]
        driver.publish()
        device.push_batch(list(iter(device.pop, None)))
        assert driver.collect() is None
        device.publish()
        assert (driver.ring.desc[6].id, driver.ring.desc[6].flags) == (ids[2], TURN)
        assert driver.ring.desc[7].flags & TURN == DESC_F_AVAIL
        assert device.base == base(10, 8)
        assert [done.head for done in driver.collect_all()] == ids


# ------------------------------------------------------------------------------------------ base and state


@pytest.mark.parametrize("start", [0, 3, 6, 7, 8, 11, 14, 15])
def test_base_in_any_lap(start):
    with joined(features=PACKED, base=base(start, 8)) as (driver, device):
        assert device.base == driver.base == base(start, 8)
        for i in range(12):
            id = driver.post([b"%d" % i, b"!"])
            driver.publish()
            chain = device.pop()
            assert (chain.head, chain.read()) == (id, b"%d!" % i)
            device.push(chain)
            device.publish()
            assert driver.collect().head == id and device.pop() is None
            assert device.base == driver.base == base(start + 2 * (i + 1), 8)


def test_base_of_both_directions_and_state():
    with joined(size=5, features=PACKED, base=base(3, 5)) as (driver, device):
        for _ in range(4):
            driver.post([b"x"])
        driver.publish()
        device.push(device.pop())
        device.publish()
        device.push(device.pop())
        device.pop()
        assert device.base == off_wrap(6, 5) | off_wrap(5, 5) << 16
        state = device.state
        assert (state.packed, state.size, state.next_avail, state.avail_wrap) == (True, 5, 1, False)
        assert (state.next_used, state.used_wrap, state.published, state.broken) == (0, False, 4, None)


def test_base_with_only_its_low_half():
    with GuestMemory() as memory, DriverQueue(memory, 8, PACKED) as driver, DeviceSide(memory) as side:
        assert side.queue(driver, base=0x8000).base == 0x80008000


@pytest.mark.parametrize("bad", [0x80088008, 0x8000FFFF, 0x80080000 | 0x8000, 0xFFFF8000])
def test_R58_base_outside_the_ring_is_refused(bad):
    with GuestMemory() as memory, DriverQueue(memory, 8, PACKED) as driver, DeviceSide(memory) as side:
        with pytest.raises(SetupError) as caught:
            side.queue(driver, base=bad)
        assert caught.value.code == "RING_E_BASE"


@pytest.mark.parametrize("size", [0, 32769, 65536])
def test_P64_size_is_refused(size):
    with GuestMemory() as memory, DriverQueue(memory, 8) as driver, DeviceSide(memory) as side:
        uva = memory.uva(driver.ring.desc.gpa)
        with pytest.raises(SetupError) as caught:
            VirtQueue(side.memory, size=size, desc=uva, avail=uva, used=uva, features=PACKED)
        assert caught.value.code == "RING_E_QUEUE_SIZE"


# ------------------------------------------------------------------------------------- device -> driver


def use_one(driver: DriverQueue, device: VirtQueue) -> CallReason:
    driver.post([b"x"])
    driver.publish()
    serve(device)
    driver.collect()
    return device.decide()


@pytest.mark.parametrize("features", [PACKED, EVENT])
def test_VQ_PACKED_D_25_call_follows_the_flags(features):
    with joined(features=features) as (driver, device):
        reasons = []
        for flags in (EVENT_DISABLE, EVENT_ENABLE, EVENT_DISABLE, EVENT_ENABLE):
            driver.ring.driver_event.flags = flags
            reasons.append(use_one(driver, device))
        assert [reason.due for reason in reasons] == [False, True, False, True]
        assert reasons[:2] == [CallReason.FLAG_SUPPRESSED, CallReason.FLAG_WANTS]
        assert device.decide() == CallReason.NOTHING_NEW


def test_VQ_PACKED_D_26_call_follows_the_offset():
    with joined(features=EVENT, base=base(5, 8)) as (driver, device):
        driver.ring.driver_event.set(off_wrap(0, 8), EVENT_DESC)
        assert use_one(driver, device) == CallReason.FIRST  # a predecessor may have owed one: R37
        driver.ring.driver_event.set(off_wrap(8, 8), EVENT_DESC)
        reasons = [use_one(driver, device) for _ in range(4)]
        ahead, reached = CallReason.EVENT_AHEAD, CallReason.EVENT_REACHED
        assert reasons == [ahead, ahead, reached, ahead]  # used slots 6, 7, 0, 1


@given(size=st.integers(1, 9), start=st.integers(0, 17), slots=st.lists(st.integers(1, 4), min_size=1, max_size=4),
       event=st.integers(0, 17))
@settings(max_examples=300, deadline=None)
def test_VQ_PACKED_D_26_call_is_brute_force(size, start, slots, event):
    """2.8.10 in words: a descriptor at the offset and wrap counter was written or passed over."""
    with joined(size, EVENT, base(start, size)) as (driver, device):
        driver.ring.driver_event.set(0, EVENT_DESC)
        driver.ring.offer([(0, 0, 0)], 0)
        driver.publish()
        serve(device)
        driver.ring.next_completion()
        device.decide()
        driver.ring.driver_event.set(off_wrap(event, size), EVENT_DESC)
        moved = 0
        for id, count in enumerate(slots):
            if driver.ring.room >= count:
                driver.ring.offer([(0, 0, DESC_F_NEXT)] * (count - 1) + [(0, 0, 0)], id)
                moved += count
        driver.publish()
        serve(device)
        passed = any((start + 1 + i) % (2 * size) == event % (2 * size) for i in range(moved))
        expected = CallReason.EVENT_REACHED if passed else CallReason.EVENT_AHEAD
        assert device.decide() == (expected if moved else CallReason.NOTHING_NEW)
        assert device.decide() == CallReason.NOTHING_NEW


def test_several_publications_before_one_decision_lose_no_call():
    """More than a lap may have gone by since the last decision: the offset was certainly passed."""
    with joined(4, EVENT) as (driver, device):
        driver.ring.driver_event.set(off_wrap(0, 4), EVENT_DESC)
        use_one(driver, device)
        driver.ring.driver_event.set(off_wrap(2, 4), EVENT_DESC)
        for _ in range(6):  # slots 1, 2, 3, 0, 1, 2
            driver.post([b"x"])
            driver.publish()
            serve(device)
            driver.collect()
        assert device.decide().due


def test_VQ_PACKED_D_23_driver_event_structure_is_only_read():
    with joined(features=EVENT) as (driver, device):
        for flags in (EVENT_ENABLE, EVENT_DISABLE, EVENT_DESC):
            driver.ring.driver_event.set(0x8003, flags)
            device.disarm()
            use_one(driver, device)
            device.arm()
            assert (driver.ring.driver_event.off_wrap, driver.ring.driver_event.flags) == (0x8003, flags)


# ------------------------------------------------------------------------------------- driver -> device


def test_kicks_wanted_and_not_by_flags():
    with joined(features=PACKED) as (driver, device):
        device.disarm()
        assert driver.ring.device_event.flags == EVENT_DISABLE
        device.arm()
        assert driver.ring.device_event.flags == EVENT_ENABLE


def test_VQ_PACKED_D_24_kicks_wanted_by_offset():
    with joined(features=EVENT, base=base(6, 8)) as (driver, device):
        assert device.pop() is None and device.arm() == 0
        assert (driver.ring.device_event.off_wrap, driver.ring.device_event.flags) == (off_wrap(6, 8), EVENT_DESC)
        kicks = []
        for i in range(4):
            driver.add([Buffer(0, 0), Buffer(0, 0)])
            kicks.append(driver.submit())
            if i == 1:
                serve(device)
                device.disarm()
                assert device.arm() == 0
                assert driver.ring.device_event.off_wrap == off_wrap(10, 8)
        assert kicks == [True, False, True, False]
        assert driver.ring.device_event.flags == EVENT_DESC


def test_arm_asks_for_what_comes_after_the_chains_known():
    """A chain popped and given back was announced before: a kick from there on would never come."""
    with joined(features=EVENT) as (driver, device):
        driver.post([b"x", b"y"])
        driver.publish()
        device.pop()
        assert device.pop() is None
        device.unpop()
        assert device.arm() == 0 and driver.ring.device_event.off_wrap == off_wrap(2, 8)
        driver.post([b"z"])
        assert driver.submit()
