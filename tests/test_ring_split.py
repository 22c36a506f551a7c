"""The split virtqueue in normal life: both halves, the driver in Python and the device in C, agree.

The device is used through the step API, one visible phase at a time; what a lying driver gets is in
tests/test_ring_hostile.py.
"""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ring.driver import Buffer, DriverQueue, Extent, GuestMemory
from ring.driver_split import EVENT_IDX, INDIRECT_DESC, USED_F_NO_NOTIFY, SplitLayout
from ring.errors import SetupError
from ring.virtqueue import CallReason, VirtQueue
from vdev.testing.rig import DeviceSide, joined

INDIRECT = 1 << INDIRECT_DESC
EVENT = 1 << EVENT_IDX


def serve(device: VirtQueue, answer: bytes = b"") -> int:
    """Use every chain that waits, writing ``answer`` into each -> how many."""
    served = 0
    while (chain := device.pop()) is not None:
        device.push(chain, chain.write(answer))
        served += 1
    device.publish()
    return served


def heads(device: VirtQueue) -> list[int]:
    """Pop everything; the heads in the order they came."""
    return [chain.head for chain in iter(device.pop, None)]


# ------------------------------------------------------------------------------------------------- chains


@pytest.mark.parametrize("direct", [None, 0, 1, 3, 5])
def test_bytes_travel_both_ways(direct):
    with joined(features=INDIRECT) as (driver, device):
        driver.post([b"abc", b"defgh"], [2, 1, 10], direct=direct)
        driver.submit()
        chain = device.pop()
        assert chain.descriptors == 5 + (direct not in (None, 5))
        assert (chain.readable_len, chain.writable_len) == (8, 13)
        assert chain.read() == b"abcdefgh"
        assert (chain.read(2, 3), chain.read(5), chain.read(8), chain.read(3, 100)) == (b"cde", b"fgh", b"", b"defgh")
        assert chain.write(b"01234567") == 8
        assert chain.write(b"89ABCDEF", 8) == 5  # what fits
        device.push(chain, 13)
        device.publish()
        assert driver.collect().data == b"0123456789ABC"


@pytest.mark.parametrize("chain, readable, writable", [(([b"x"], []), 1, 0), (([], [7]), 0, 7)])
def test_chain_of_one_kind(chain, readable, writable):
    with joined() as (driver, device):
        driver.post(*chain)
        driver.publish()
        popped = device.pop()
        assert (popped.readable_len, popped.writable_len) == (readable, writable)


def test_empty_ring():
    with joined() as (_, device):
        assert device.see() == 0
        assert device.take() is None
        assert device.pop() is None
        assert device.decide() == CallReason.NOTHING_NEW


def test_phases_one_by_one():
    with joined() as (driver, device):
        driver.post([b"ab"], [3])
        driver.post([b"c"])
        driver.publish()
        assert device.see() == 2
        driver.post([b"later"])
        driver.publish()
        chain = device.take()
        assert (chain.head, chain.descriptors) == (0, 0)
        assert device.walk() and (chain.readable_len, chain.writable_len) == (2, 0)
        assert not device.walk() and (chain.readable_len, chain.writable_len) == (2, 3)
        second = device.take()
        assert second.head == 2 and not device.walk() and second.read() == b"c"
        assert device.take() is None  # the third was not there when we looked
        assert device.see() == 1
        assert device.take().head == 3


def test_pushed_is_invisible_until_published():
    with joined() as (driver, device):
        driver.post([b"x"])
        driver.publish()
        device.push(device.pop())
        assert driver.collect() is None
        device.publish()
        assert driver.collect().written == 0


def test_chains_may_be_used_in_any_order():
    with joined() as (driver, device):
        sent = [driver.post([bytes([i])], [1]) for i in range(4)]
        driver.publish()
        chains = list(iter(device.pop, None))
        for i in (2, 0, 3, 1):
            chains[i].write(chains[i].read())
            device.push(chains[i], 1)
        device.publish()
        assert [(done.head, done.data[0]) for done in driver.collect_all()] == [(sent[i], i) for i in (2, 0, 3, 1)]


def test_unpop_gives_back_in_order():
    with joined(base=0xFFFF) as (driver, device):
        sent = [driver.post([b"x"]) for _ in range(4)]
        driver.publish()
        for _ in range(3):
            device.pop()
        assert device.base == 2
        device.unpop(2)
        assert device.base == 0
        assert heads(device) == sent[1:]


def test_base_and_state():
    with joined(size=4, base=0xFFFE) as (driver, device):
        for _ in range(3):
            driver.post([b"x"])
        driver.publish()
        device.push(device.pop())
        device.push(device.pop())
        device.publish()
        device.pop()
        state = device.state
        assert (state.size, state.next_avail, state.avail_seen, state.next_used, state.published) == (4, 1, 1, 0, 0)
        assert state.broken is None
        assert device.base == 1


# ----------------------------------------------------------------------------------------- sizes and wraps


@pytest.mark.parametrize("size", [1, 2, 16, 1024, 32768])
def test_R06_R07_full_ring_of_every_size_across_the_wrap(size):
    with joined(size, base=0xFFFF - size // 2) as (driver, device):
        for _ in range(2 if size < 32768 else 1):
            for head in range(size):  # a table of zeros: each descriptor is an empty chain
                driver.ring.offer(head)
            driver.publish()
            assert device.see() == size
            assert heads(device) == list(range(size))
            for head in range(size):
                device.push(head)
            device.publish()
            assert [driver.ring.next_completion() for _ in range(size)] == [(head, 0) for head in range(size)]
            assert driver.ring.next_completion() is None


@pytest.mark.parametrize("size", [0, 3, 12, 32769, 65536])
def test_P64_size_is_refused(size):
    with GuestMemory() as memory, DriverQueue(memory, 8) as driver, DeviceSide(memory) as side:
        uva = memory.uva(driver.ring.desc.gpa)
        with pytest.raises(SetupError, match="power of two") as caught:
            VirtQueue(side.memory, size=size, desc=uva, avail=uva, used=uva)
        assert caught.value.code == "RING_E_QUEUE_SIZE"


@pytest.mark.parametrize("part, shift", [("desc", 8), ("avail", 1), ("used", 2)])
def test_P70_alignment_is_refused(part, shift):
    with GuestMemory() as memory, DeviceSide(memory) as side:
        at = {name: memory.uva(memory.alloc(4096, 64)) for name in ("desc", "avail", "used")}
        at[part] += shift
        with pytest.raises(SetupError, match="aligned to 16, 2 and 4"):
            VirtQueue(side.memory, size=8, **at)


@pytest.mark.parametrize("part", ["desc", "avail", "used"])
def test_P67_P68_P69_ring_part_outside_one_region_is_refused(part):
    # the second region is adjacent both ways: nothing but the rule keeps a part from crossing over
    extents = [Extent(0, 1 << 16, uva=1 << 30), Extent(1 << 16, 1 << 16, uva=(1 << 30) + (1 << 16))]
    layout = SplitLayout(256)
    sizes = {"desc": layout.desc_bytes, "avail": layout.avail_bytes, "used": layout.used_bytes}
    with GuestMemory(extents=extents) as memory, DeviceSide(memory) as side:
        good = {"desc": 1 << 30, "avail": (1 << 30) + 0x2000, "used": (1 << 30) + 0x4000}
        end = (1 << 30) + (1 << 16)
        last = (end - sizes[part]) // 16 * 16
        VirtQueue(side.memory, size=256, **good | {part: last}).close()
        for bad in (last + 16, end - 16, (1 << 30) - 16, end + (1 << 16), 0, (1 << 64) - 16):
            with pytest.raises(SetupError, match="not inside one shared memory region"):
                VirtQueue(side.memory, size=256, **good | {part: bad})


def test_move_to_another_table_goes_on_where_it_was():
    with GuestMemory() as memory, DriverQueue(memory, 8) as driver, DeviceSide(memory) as old:
        device = old.queue(driver)
        sent = [driver.post([bytes([65 + i])], [1]) for i in range(3)]
        driver.publish()
        first = device.pop()
        with contextlib.ExitStack() as stack:
            new = stack.enter_context(DeviceSide(memory))
            device.move(new.memory)
            assert device.pop().read() == b"B"
            device.push(first)
            device.publish()
            assert driver.collect().head == sent[0]
            other = stack.enter_context(GuestMemory(gpa=1 << 40, uva=1 << 40))
            elsewhere = stack.enter_context(DeviceSide(other))
            with pytest.raises(SetupError, match="not inside one shared memory region"):
                device.move(elsewhere.memory)
            stack.callback(device.close)
            assert device.pop().read() == b"C"  # still on the table before


# ------------------------------------------------------------------------------------- device -> driver


def test_call_follows_the_flag():
    with joined() as (driver, device):
        for _ in range(4):
            driver.post([b"x"])
        driver.publish()
        reasons = []
        for suppressed in (1, 0, 1):
            driver.ring.avail.flags = suppressed
            device.push(device.pop())
            device.publish()
            reasons.append(device.decide())
        assert reasons == [CallReason.FLAG_SUPPRESSED, CallReason.FLAG_WANTS, CallReason.FLAG_SUPPRESSED]
        assert [reason.due for reason in reasons] == [False, True, False]
        assert device.decide() == CallReason.NOTHING_NEW and not CallReason.NOTHING_NEW.due


def test_call_follows_the_event():
    with joined(features=EVENT, base=0xFFFD) as (driver, device):
        driver.post([b"x"])
        driver.publish()
        serve(device)
        driver.ring.avail.used_event = 0x8000
        assert device.decide() == CallReason.FIRST  # a predecessor may have owed one: R37
        driver.ring.avail.flags = 1  # means nothing with EVENT_IDX
        driver.ring.avail.used_event = 0
        reasons = []
        for _ in range(4):
            driver.post([b"x"])
            driver.publish()
            serve(device)
            reasons.append(device.decide())
        ahead, reached = CallReason.EVENT_AHEAD, CallReason.EVENT_REACHED
        assert reasons == [ahead, ahead, reached, ahead]  # used indices 0xFFFE, 0xFFFF, 0, 1


@given(before=st.integers(0, 0xFFFF), batch=st.integers(1, 64), distance=st.integers(-70, 70))
@settings(max_examples=100, deadline=None)
def test_one_call_a_batch_wherever_the_event_lies(before, batch, distance):
    event = (before + distance) & 0xFFFF
    with joined(size=64, features=EVENT, base=(before - 1) & 0xFFFF) as (driver, device):
        driver.post([b"x"])
        driver.publish()
        serve(device)
        device.decide()
        driver.collect()
        for _ in range(batch):
            driver.add([Buffer(driver.ring.desc.gpa, 1)])
        driver.publish()
        driver.ring.avail.used_event = event
        serve(device)
        reason = device.decide()
        # 2.7.10 in words: the batch made an entry visible at the index the driver named
        due = any((before + i) & 0xFFFF == event for i in range(batch))
        assert reason == (CallReason.EVENT_REACHED if due else CallReason.EVENT_AHEAD)
        assert device.decide() == CallReason.NOTHING_NEW


# ------------------------------------------------------------------------------------- driver -> device


def test_kicks_wanted_and_not_by_flag():
    with joined() as (driver, device):
        driver.post([b"1"])
        assert driver.submit()  # a fresh ring wants kicks
        device.disarm()
        assert driver.ring.used.flags == USED_F_NO_NOTIFY
        driver.post([b"2"])
        assert not driver.submit()
        assert device.arm() == 2  # arrived while nobody wanted to hear of it
        assert driver.ring.used.flags == 0
        driver.post([b"3"])
        assert driver.submit()


def test_kicks_wanted_and_not_by_event():
    with joined(features=EVENT, base=0xFFFE) as (driver, device):
        assert device.arm() == 0
        assert driver.ring.used.avail_event == 0xFFFE
        kicks = []
        for i in range(4):
            driver.post([b"x"])
            kicks.append(driver.submit())
            if i == 1:
                serve(device)
                device.disarm()
                assert device.arm() == 0 and driver.ring.used.avail_event == 0
        assert kicks == [True, False, True, False]
        device.disarm()
        assert driver.ring.used.flags == 0  # 2.7.10.1: must not be used with EVENT_IDX


def test_arm_sees_what_came_before_the_wish():
    for features in (0, EVENT):
        with joined(features=features) as (driver, device):
            device.disarm()
            driver.post([b"x"])
            driver.submit()
            assert device.arm() == 1


# ------------------------------------------------------------------------------------------- any shape


CHAINS = st.lists(
    st.tuples(st.lists(st.binary(min_size=1, max_size=40), max_size=5),
              st.lists(st.integers(1, 40), max_size=5),
              st.integers(0, 10)).filter(lambda chain: chain[0] or chain[1]),
    min_size=1, max_size=25)


@given(chains=CHAINS, size=st.sampled_from([16, 32]), base=st.sampled_from([0, 0xFFF8]), burst=st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_any_chains_come_back_as_the_device_left_them(chains, size, base, burst):
    """Regions so small that buffers cross them are in test_ring_guestmem.py; here it is the shapes."""
    with joined(size, INDIRECT | EVENT, base) as (driver, device):
        wanted = {}
        todo = list(chains)
        while todo or driver.outstanding:
            for readable, writable, direct in todo[:burst]:
                if len(driver.ring.free) < 10:
                    break
                head = driver.post(readable, writable, direct=min(direct, len(readable) + len(writable)))
                wanted[head] = (b"".join(readable), sum(writable))
                todo.pop(0)
            driver.submit()
            while (chain := device.pop()) is not None:
                sent, room = wanted[chain.head]
                assert chain.read() == sent and chain.writable_len == room
                device.push(chain, chain.write((sent * 201 or b"\x55" * 201)[:room]))
            device.publish()
            for done in driver.collect_all():
                sent, room = wanted.pop(done.head)
                assert done.data == (sent * 201 or b"\x55" * 201)[:room]
        assert not wanted and sorted(driver.ring.free) == list(range(size))
