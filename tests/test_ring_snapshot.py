"""One snapshot, then decide: what a driver rewrites while the device looks, and what it may make of the device's own.

The cases of tests/test_ring_hostile.py stand still; here descriptors, tables and indices change under the walk,
buffers lie on the rings, and at the end a ring holds anything at all.
"""

import random
import threading

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ring.driver import DriverQueue, Extent, GuestMemory
from ring.driver_parts import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, EVENT_IDX, INDIRECT_DESC
from ring.driver_split import DESCRIPTOR, DescriptorTable
from ring.errors import ChainError, RingBroken, RingError
from ring.virtqueue import CallReason
from vdev.testing.rig import DeviceSide, joined, table

INDIRECT = 1 << INDIRECT_DESC
EVENT = 1 << EVENT_IDX
NEXT, WRITE, TABLE = DESC_F_NEXT, DESC_F_WRITE, DESC_F_INDIRECT
GOOD = 7  # a descriptor of every 8-entry ring here that is a chain of one readable byte
WILD = 0xFFFF_FFFF_FFFF_F000


@pytest.fixture
def ring():
    with joined(size=8, features=INDIRECT) as (driver, device):
        driver.ring.desc[GOOD].set(driver.memory.alloc(64), 1)
        yield driver, device


@pytest.fixture
def buffer(ring):
    return ring[0].memory.alloc(4096)


def offer(driver: DriverQueue, head: int) -> None:
    driver.ring.offer(head)
    driver.publish()


def test_R26_indirect_table_changed_while_it_is_walked(ring, buffer):
    driver, device = ring
    gpa, length = table(driver.memory, (buffer, 1, NEXT, 1), (buffer, 2, NEXT, 2), (buffer, 3))
    driver.ring.desc[0].set(gpa, length, TABLE)
    offer(driver, 0)
    device.see()
    chain = device.take()
    assert device.walk()  # the descriptor that names the table: now the copy is made
    driver.memory.write(gpa, b"\xff" * length)
    assert device.walk() and device.walk() and not device.walk()
    assert chain.readable_len == 6


def test_R28_R29_descriptor_changed_after_it_was_read(ring, buffer):
    driver, device = ring
    driver.memory.write(buffer, b"abc")
    driver.ring.desc[0].set(buffer, 3, NEXT, 1)
    driver.ring.desc[1].set(buffer + 8, 5, WRITE)
    offer(driver, 0)
    device.see()
    chain = device.take()
    assert device.walk()
    driver.ring.desc[0].set(WILD, 0xFFFFFFFF, WRITE, 0)
    assert not device.walk()
    driver.ring.desc[1].set(WILD, 0xFFFFFFFF, NEXT, 0)
    assert (chain.read(), chain.write(b"123456789"), chain.writable_len) == (b"abc", 5, 5)
    assert driver.memory.read(buffer, 16) == b"abc\0\0\0\0\x0012345\0\0\0"


def test_R26_R28_R29_R31_ring_rewritten_at_full_speed(ring, buffer):
    """A thread flips descriptors and a table between two valid forms and a wild one while the device pops.

    Either form may come out, and any refusal; what must not come out is a mixture that was never written.
    """
    driver, device = ring
    low = table(driver.memory, (buffer, 1))
    high = table(driver.memory, (buffer + 1024, 2, NEXT, 1), (buffer + 2048, 512, WRITE))
    forms = [(buffer, 1), (*low, TABLE), (*high, TABLE), (WILD, 0xFFFF, NEXT | WRITE, 0), (buffer, 1, NEXT, 0)]
    stop = threading.Event()

    def mutate():
        choose = random.Random(1).choice
        while not stop.is_set():
            driver.ring.desc[0].set(*choose(forms))
            driver.memory.write(high[0], DESCRIPTOR.pack(*choose([(buffer + 1024, 2, NEXT, 1), (WILD, 1, 0, 0)])))

    thread = threading.Thread(target=mutate)
    thread.start()
    seen = set()
    try:
        for _ in range(4000):
            offer(driver, 0)
            try:
                chain = device.pop()
                seen.add((chain.readable_len, chain.writable_len))
                device.push(chain)
            except ChainError as error:
                seen.add(error.code)
                device.push(error)
            device.publish()
            assert driver.ring.next_completion() == (0, 0)
    finally:
        stop.set()
        thread.join()
    # the two halves of a descriptor are two loads: (address, length | flags | next) may be of different forms
    legal = {(1, 0), (2, 512), (0, 0xFFFF), "RING_E_UNMAPPED", "RING_E_ORDER", "RING_E_LOOP",
             "RING_E_INDIRECT_LENGTH", "RING_E_INDIRECT_NESTED", "RING_E_INDIRECT_NEXT", "RING_E_NEXT_RANGE"}
    assert len(seen) > 2 and seen <= legal


# -------------------------------------------------------------------------------- what the device owns


@pytest.mark.parametrize("idx", [0, 5, 0xFFFF])
def test_R34_used_ring_rewritten_by_the_driver(ring, idx):
    driver, device = ring
    offer(driver, GOOD)
    device.push(device.pop())
    device.publish()
    driver.memory.write(driver.ring.used.gpa, b"\xff" * driver.ring.layout.used_bytes)
    driver.ring.used.idx = idx
    offer(driver, GOOD)
    device.push(device.pop())
    device.publish()
    assert driver.ring.used.idx == 2  # ours, whatever stood there
    assert (driver.ring.used.ring[1].id, driver.ring.used.ring[1].len) == (GOOD, 0)


@pytest.mark.parametrize("features", [0, EVENT])
def test_R35_any_suppression_fields(features):
    with joined(features=features) as (driver, device):
        choose = random.Random(2)
        for _ in range(300):
            driver.ring.avail.flags = choose.randrange(0x10000)
            driver.ring.avail.used_event = choose.randrange(0x10000)
            driver.ring.used.avail_event = choose.randrange(0x10000)
            driver.ring.used.flags = choose.randrange(0x10000)
            device.disarm()
            offer(driver, 0)
            assert device.arm() == 1
            device.push(device.pop())
            device.publish()
            assert device.decide() in CallReason
            assert device.decide() == CallReason.NOTHING_NEW
            assert driver.ring.next_completion() == (0, 0)


def test_R37_first_publication_is_always_signalled():
    """What a predecessor signalled is unknown: with EVENT_IDX the driver may wait for ever otherwise."""
    with GuestMemory() as memory, DriverQueue(memory, 8, EVENT) as driver, DeviceSide(memory) as side:
        first = side.queue(driver)
        offer(driver, 0)
        first.push(first.pop())
        first.publish()  # and dies before it decides
        driver.ring.avail.used_event = 0
        second = side.queue(driver, base=first.base)
        offer(driver, 0)
        second.push(second.pop())
        second.publish()
        assert second.decide() == CallReason.FIRST and CallReason.FIRST.due


@pytest.mark.parametrize("part", ["desc", "avail", "used"])
def test_R51_P71_P72_buffer_on_the_ring_itself(ring, part):
    driver, device = ring
    gpa = getattr(driver.ring, part).gpa
    length = getattr(driver.ring.layout, f"{part}_bytes")
    driver.ring.desc[0].set(gpa, length, WRITE)
    offer(driver, 0)
    chain = device.pop()
    assert chain.write(b"\xff" * length) == length
    device.push(chain, length)
    device.publish()
    assert (driver.ring.used.idx, driver.ring.used.ring[0].id, driver.ring.used.ring[0].len) == (1, 0, length)
    driver.ring.avail.idx = 2  # whatever comes of it, it is a rule broken and not a crash
    with pytest.raises(RingError) if part != "used" else pytest.raises(AssertionError):
        assert device.pop() is None


@pytest.mark.parametrize("desc, avail, used", [("a", "a", "a"), ("a", "a", "b"), ("a", "b", "a"), ("b", "a", "a")])
def test_P71_ring_parts_at_one_address(desc, avail, used):
    with GuestMemory() as memory, DeviceSide(memory) as side:
        place = {"a": memory.alloc(4096, 64), "b": memory.alloc(4096, 64)}
        with DriverQueue(memory, 8, INDIRECT, desc=place[desc], avail=place[avail], used=place[used]) as driver:
            device = side.queue(driver)
            driver.ring.avail.idx = 8
            for _ in range(8):
                try:
                    chain = device.pop()
                    if chain is not None:
                        chain.write(b"\xff" * 64)
                        device.push(chain, 64)
                except ChainError as error:
                    device.push(error)
                except RingBroken:
                    break
                device.publish()
                device.arm()


# --------------------------------------------------------------------------------------- any ring contents


# Three regions of this length: rings and the indirect table lie in the last one, behind a hole, where no buffer
# points; or a chain could legally rewrite the next one, and nobody could tell what may be written.
SPAN = 1 << 13
START = 0x10000
HOLE = START + 2 * SPAN
RINGS = START + 3 * SPAN
REGIONS = [Extent(RINGS, SPAN, uva=1 << 42), Extent(START, SPAN, uva=1 << 40),
           Extent(START + SPAN, SPAN, uva=1 << 41)]
TABLE_ENTRIES = 12

# Numbers that are in range often enough to get somewhere.
INDEX = st.one_of(st.integers(0, 9), st.sampled_from([0x7FFF, 0x8000, 0xFFFF]))
ADDRESS = st.one_of(st.integers(START - 64, HOLE + 64), st.integers(START + SPAN - 64, START + SPAN + 64),
                    st.sampled_from([0, HOLE - 1, WILD, (1 << 64) - 1]))
LENGTH = st.one_of(st.integers(0, 200), st.sampled_from([SPAN, 0xFFFFFFFF]))
BUFFER = st.tuples(ADDRESS, LENGTH, st.integers(0, 7), INDEX)
TO_TABLE = st.tuples(st.just(RINGS), st.integers(0, TABLE_ENTRIES).map(lambda n: n * DESCRIPTOR.size),
                     st.sampled_from([TABLE, TABLE, TABLE | WRITE, TABLE | NEXT]), INDEX)
DESCRIPTORS = st.lists(st.one_of(BUFFER, BUFFER, TO_TABLE), min_size=1, max_size=8)


@given(direct=DESCRIPTORS, indirect=st.lists(st.one_of(BUFFER, TO_TABLE), max_size=TABLE_ENTRIES),
       entries=st.lists(INDEX, min_size=1, max_size=8), ahead=st.integers(0, 9),
       features=st.sampled_from([0, INDIRECT, INDIRECT | EVENT]))
@example(direct=[(RINGS, 160, TABLE, 0)], indirect=[(START + SPAN - 50, 100, WRITE | NEXT, 1)] * 10, entries=[0],
         ahead=1, features=INDIRECT)
@settings(max_examples=100, deadline=None)
def test_any_ring_is_survived_and_only_writable_memory_is_written(direct, indirect, entries, ahead, features):
    with GuestMemory(extents=REGIONS) as memory:
        assert memory.alloc(TABLE_ENTRIES * DESCRIPTOR.size) == RINGS
        with joined(size=8, features=features, memory=memory) as (driver, device):
            ring, layout = driver.ring, driver.ring.layout
            for where, descriptors in ((ring.desc, direct), (DescriptorTable(memory, RINGS), indirect)):
                for i, fields in enumerate(descriptors):
                    where[i].set(*fields)
            for i, head in enumerate(entries):
                ring.avail.ring[i] = head
            ring.avail.idx = ahead
            writable = [(ring.used.gpa, layout.used_bytes)]
            writable += [(addr, length) for addr, length, flags, _ in [*direct, *indirect]
                         if flags & (WRITE | TABLE) == WRITE]
            before = without(memory, writable)
            try:
                for _ in range(2 * len(entries)):
                    try:
                        chain = device.pop()
                        if chain is None:
                            break
                        assert chain.write(b"\xa5" * 4096) == min(4096, chain.writable_len)
                        device.push(chain, 1)
                    except ChainError as error:
                        device.push(error)
                    device.publish()
                    device.decide()
                    device.arm()
            except RingBroken as error:
                assert error.code == ("RING_E_AVAIL_AHEAD" if ahead > 8 else "RING_E_HEAD_RANGE")
                assert ahead > 8 or max(entries) > 7
            assert without(memory, writable) == before


def without(memory: GuestMemory, ranges: list[tuple[int, int]]) -> list[bytes]:
    """The bytes of every region, those in ``ranges`` (gpa, length) blanked."""
    left = []
    for region, data in zip(memory.regions, map(bytearray, memory.snapshot()), strict=True):
        for gpa, length in ranges:
            low, high = max(gpa, region.gpa), min(gpa + length, region.gpa + region.size)
            if low < high:
                data[low - region.gpa:high - region.gpa] = bytes(high - low)
        left.append(bytes(data))
    return left
