"""The virtqueue in normal life, whatever its format: both halves, driver in Python and device in C, agree.

The device is used through the step API, one visible phase at a time. What is one format's own is in
tests/test_ring_split.py and tests/test_ring_packed.py; what a lying driver gets is in tests/test_ring_hostile.py.
"""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ring.driver import DeviceError, DriverQueue, Extent, GuestMemory
from ring.driver_packed import DESC_F_AVAIL
from ring.driver_parts import DESC_F_NEXT, EVENT_IDX, IN_ORDER, INDIRECT_DESC, RING_PACKED
from ring.driver_split import SplitLayout
from ring.errors import RingBroken, SetupError, named
from ring.virtqueue import CallReason, VirtQueue
from vdev.testing.rig import DeviceSide, joined

INDIRECT = 1 << INDIRECT_DESC
EVENT = 1 << EVENT_IDX
PACKED = 1 << RING_PACKED
ORDER = 1 << IN_ORDER

either_format = pytest.mark.parametrize("ring", [0, PACKED], ids=["split", "packed"])
every_ring = pytest.mark.parametrize("ring", [0, PACKED, ORDER, PACKED | ORDER],
                                     ids=["split", "packed", "split_in_order", "packed_in_order"])


def late(ring: int, size: int = 8) -> int:
    """A base just before whatever the format counts with wraps around."""
    return (size - 1 | 0x8000) * 0x10001 if ring & PACKED else 0xFFFF


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


@pytest.mark.parametrize("ring, direct", [
    *((0, direct) for direct in (None, 0, 1, 3, 5)), *((PACKED, direct) for direct in (None, 0, 5))])
def test_bytes_travel_both_ways(ring, direct):
    with joined(features=INDIRECT | ring, base=late(ring)) as (driver, device):
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
@either_format
def test_chain_of_one_kind(ring, chain, readable, writable):
    with joined(features=ring) as (driver, device):
        driver.post(*chain)
        driver.publish()
        popped = device.pop()
        assert (popped.readable_len, popped.writable_len) == (readable, writable)


@every_ring
def test_empty_ring(ring):
    with joined(features=ring) as (_, device):
        assert device.see() == 0
        assert device.take() is None
        assert device.pop() is None
        assert device.decide() == CallReason.NOTHING_NEW


@every_ring
def test_pushed_is_invisible_until_published(ring):
    with joined(features=ring) as (driver, device):
        driver.post([b"x"])
        driver.publish()
        device.push(device.pop())
        assert driver.collect() is None
        device.publish()
        assert driver.collect().written == 0


@either_format
def test_chains_may_be_used_in_any_order(ring):
    with joined(features=ring) as (driver, device):
        sent = [driver.post([bytes([i])], [1]) for i in range(4)]
        driver.publish()
        chains = list(iter(device.pop, None))
        for i in (2, 0, 3, 1):
            chains[i].write(chains[i].read())
            device.push(chains[i], 1)
        device.publish()
        assert [(done.head, done.data[0]) for done in driver.collect_all()] == [(sent[i], i) for i in (2, 0, 3, 1)]


@every_ring
def test_unpop_gives_back_in_order(ring):
    with joined(features=ring, base=late(ring)) as (driver, device):
        sent = [driver.post([b"x"] * (i + 1)) for i in range(3)]
        driver.publish()
        bases = []
        for _ in range(3):
            bases.append(device.base)
            device.pop()
        device.unpop(2)
        assert device.base == bases[1]
        device.unpop()
        assert device.base == bases[0]
        assert heads(device) == sent


@every_ring
def test_batch_of_chains(ring):
    """Without IN_ORDER each chain has a used entry of its own; with it the driver takes one for all of them."""
    with joined(size=16, features=ring, base=late(ring, 16)) as (driver, device):
        for count in (1, 5, 16, 7):
            sent = [driver.post([b"x"]) for _ in range(count)]
            driver.publish()
            chains = list(iter(device.pop, None))
            if ring & ORDER:
                device.push_batch(chains)
            else:
                for chain in chains:
                    device.push(chain)
            device.publish()
            assert [(done.head, done.written) for done in driver.collect_all()] == [(name, 0) for name in sent]
            assert driver.ring.room == 16


@every_ring
def test_chain_of_which_the_device_says_too_much_is_back_all_the_same(ring):
    """The driver says so each time, and has all of its ring to go on with."""
    with joined(size=2, features=ring) as (driver, device):
        free = driver.memory.alloc(1 << 16)
        driver.memory.free(free)
        for _ in range(5):
            driver.post([], [8])
            driver.submit()
            device.push(device.pop(), 9)
            device.publish()
            with pytest.raises(DeviceError, match="says 9 bytes, the chain has room for 8"):
                driver.collect()
        assert (driver.outstanding, driver.ring.room, sorted(driver.ring.free)) == (0, 2, [0, 1])
        assert driver.memory.alloc(1 << 16) == free  # and so is its buffer


# ----------------------------------------------------------------------------------------- sizes and wraps


def break_ring(driver: DriverQueue, device: VirtQueue) -> str:
    """Offer what takes the ring its meaning, and have the device see it -> the rule."""
    if driver.packed:
        for slot in range(driver.ring.size):
            driver.ring.desc[slot].flags |= DESC_F_NEXT
        driver.ring.desc[device.state.next_avail].flags = DESC_F_AVAIL | DESC_F_NEXT
    else:
        driver.ring.offer(driver.ring.size)
        driver.ring.publish()
    with pytest.raises(RingBroken) as caught:
        device.pop()
    return caught.value.code


@every_ring
def test_R04_R09_what_was_used_before_the_ring_broke_is_the_drivers(ring):
    with joined(features=ring) as (driver, device):
        for _ in range(3):
            driver.post([b"x"])
        driver.submit()
        chains = [device.pop() for _ in range(3)]
        batch = chains if ring & ORDER else []
        for chain in [] if batch else chains:
            device.push(chain)
        code = break_ring(driver, device)
        assert driver.ring.pending() == 0
        assert device.conclude(batch) is CallReason.FLAG_WANTS
        assert driver.ring.pending() == 3 and device.state.broken.code == code
        assert device.conclude() is CallReason.NOTHING_NEW
        with pytest.raises(RingBroken):
            device.publish()


@either_format
def test_nothing_is_written_to_a_ring_that_lost_its_memory(ring):
    with joined(features=ring) as (driver, device):
        driver.post([b"x"])
        driver.submit()
        device.push(device.pop())
        device.fail(named("RING_E_RING_UNMAPPED"))
        before = driver.memory.snapshot()
        with pytest.raises(SetupError):
            device.conclude()
        assert driver.memory.snapshot() == before


@pytest.mark.parametrize("size", [1, 2, 16, 1024, 32768], ids="split_size_{}".format)
def test_R06_R07_full_ring_of_every_size_across_the_wrap(size):
    with joined(size, base=0xFFFF - size // 2) as (driver, device):
        for _ in range(2 if size < 32768 else 1):
            for head in range(size):  # a table of zeros: each descriptor is an empty chain
                driver.ring.offer(head)
            driver.publish()
            assert device.see() == size
            chains = list(iter(device.pop, None))
            assert [chain.head for chain in chains] == list(range(size))
            for chain in chains:
                device.push(chain)
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


@pytest.mark.parametrize("ring, part, shift", [
    (0, "desc", 8), (0, "avail", 1), (0, "used", 2), (PACKED, "desc", 8), (PACKED, "avail", 2), (PACKED, "used", 2)])
def test_P70_alignment_is_refused(ring, part, shift):
    with GuestMemory() as memory, DeviceSide(memory) as side:
        at = {name: memory.uva(memory.alloc(4096, 64)) for name in ("desc", "avail", "used")}
        at[part] += shift
        with pytest.raises(SetupError) as caught:
            VirtQueue(side.memory, size=8, features=ring, **at)
        assert caught.value.code == "RING_E_RING_ALIGNMENT"


@pytest.mark.parametrize("part", ["desc", "avail", "used"])
@either_format
def test_P67_P68_P69_ring_part_outside_one_region_is_refused(ring, part):
    # the second region is adjacent both ways: nothing but the rule keeps a part from crossing over
    extents = [Extent(0, 1 << 16, uva=1 << 30), Extent(1 << 16, 1 << 16, uva=(1 << 30) + (1 << 16))]
    layout = SplitLayout(256)
    sizes = {"desc": layout.desc_bytes, "avail": layout.avail_bytes, "used": layout.used_bytes}
    if ring:
        sizes |= {"avail": 4, "used": 4}  # the event suppression structures
    with GuestMemory(extents=extents) as memory, DeviceSide(memory) as side:
        good = {"desc": 1 << 30, "avail": (1 << 30) + 0x2000, "used": (1 << 30) + 0x4000}
        end = (1 << 30) + (1 << 16)
        last = (end - sizes[part]) // 16 * 16
        VirtQueue(side.memory, size=256, features=ring, **good | {part: last}).close()
        crossing = [] if ring and part != "desc" else [last + 16, end - 16]  # 4 aligned bytes lie in one region
        for bad in (*crossing, (1 << 30) - 16, end + (1 << 16), 0, (1 << 64) - 16):
            with pytest.raises(SetupError, match="not inside one shared memory region"):
                VirtQueue(side.memory, size=256, features=ring, **good | {part: bad})


@either_format
def test_move_to_another_table_goes_on_where_it_was(ring):
    with GuestMemory() as memory, DriverQueue(memory, 8, ring) as driver, DeviceSide(memory) as old:
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


# ------------------------------------------------------------------------------------------ notifications


@pytest.mark.parametrize("features", [0, EVENT])
@every_ring
def test_kicks_come_when_wanted(ring, features):
    with joined(features=ring | features, base=late(ring)) as (driver, device):
        kicks = []
        assert device.pop() is None and device.arm() == 0
        for _ in range(10):
            driver.post([b"1"])
            kicks.append(driver.submit())
            serve(device)
            driver.collect()
            device.disarm()
            assert device.arm() == 0
        assert all(kicks)


@pytest.mark.parametrize("features", [0, EVENT])
@every_ring
def test_no_kicks_when_not_wanted(ring, features):
    with joined(features=ring | features, base=late(ring)) as (driver, device):
        assert device.pop() is None and device.arm() == 0
        driver.post([b"1"])
        assert driver.submit()
        serve(device)
        device.disarm()
        for _ in range(3):
            driver.post([b"2"])
            assert not driver.submit()
        assert device.arm() >= 1  # they arrived while nobody wanted to hear of them
        serve(device)
        assert device.arm() == 0
        driver.post([b"3"])
        assert driver.submit()


@pytest.mark.parametrize("features", [0, EVENT])
@every_ring
def test_driver_that_waits_is_called(ring, features):
    """Whatever number of chains it waits for, in any lap."""
    with joined(features=ring | features, base=late(ring)) as (driver, device):
        for count in (1, 2, 3, 8, 5, 1):
            for _ in range(count):
                driver.post([b"x"])
            driver.publish()
            assert not driver.ring.want_calls(count)
            reasons = []
            for _ in range(count):
                device.push(device.pop())
                device.publish()
                reasons.append(device.decide())
            assert reasons[-1].due and driver.ring.want_calls(count)
            assert len(driver.collect_all()) == count
            driver.ring.refuse_calls()
        assert device.decide() == CallReason.NOTHING_NEW


# ------------------------------------------------------------------------------------------- any shape


CHAINS = st.lists(
    st.tuples(st.lists(st.binary(min_size=1, max_size=40), max_size=5),
              st.lists(st.integers(1, 40), max_size=5),
              st.integers(0, 10)).filter(lambda chain: chain[0] or chain[1]),
    min_size=1, max_size=25)


@given(ring=st.sampled_from([0, PACKED, ORDER, PACKED | ORDER]), chains=CHAINS, size=st.sampled_from([16, 32]),
       is_late=st.booleans(), burst=st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_any_chains_come_back_as_the_device_left_them(ring, chains, size, is_late, burst):
    """Regions so small that buffers cross them are in test_ring_guestmem.py; here it is the shapes."""
    with joined(size, INDIRECT | EVENT | ring, late(ring, size) if is_late else None) as (driver, device):
        wanted = {}
        todo = list(chains)
        while todo or driver.outstanding:
            for readable, writable, direct in todo[:burst]:
                if driver.ring.room < 10:
                    break
                if ring & PACKED:  # all direct or all in a table
                    direct = 10 * (direct > 4)
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
        assert not wanted and sorted(driver.ring.free) == list(range(size)) and driver.ring.room == size
