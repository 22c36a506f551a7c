"""What a lying driver gets from a split ring, as far as only this format has it: indices, entries of the available
ring, and the field ``next``.

What both formats have is in tests/test_ring_hostile.py.
"""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ring.driver import DriverQueue, Extent, GuestMemory
from ring.driver_parts import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, EVENT_IDX, INDIRECT_DESC
from ring.driver_split import DESCRIPTOR, DescriptorTable
from ring.errors import ChainError, RingBroken
from ring.virtqueue import VirtQueue
from vdev.testing.handmade import assert_broken, assert_goes_on, give_back
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


def assert_refused(driver: DriverQueue, device: VirtQueue, code: str, at: int) -> None:
    """The chain at descriptor 0 breaks rule ``code`` at descriptor ``at``, goes back with length 0 (R54), and the
    ring goes on."""
    offer(driver, 0)
    with pytest.raises(ChainError) as caught:
        device.pop()
    assert (caught.value.code, caught.value.at, caught.value.head) == (code, at, 0)
    assert f"descriptor {at}" in str(caught.value)
    give_back(driver, device, caught.value)
    assert_goes_on(driver, device)


# ------------------------------------------------------------------------------------ the available ring


@pytest.mark.parametrize("idx", [2, 1, 0, 0xFFFF])
def test_R02_available_index_moved_backwards(ring, idx):
    driver, device = ring
    for _ in range(3):
        offer(driver, GOOD)
        device.push(device.pop())
    driver.ring.avail.idx = idx
    with pytest.raises(RingBroken):
        device.see()
    assert_broken(driver, device, "RING_E_AVAIL_AHEAD", idx)


def test_R02_available_index_ahead_by_more_than_the_size(ring):
    driver, device = ring
    for i in range(8):
        driver.ring.avail.ring[i] = GOOD
    driver.ring.avail.idx = 8
    assert device.see() == 8  # exactly the size is a full ring
    driver.ring.avail.idx = 9
    with pytest.raises(RingBroken, match="available index 9 is ahead by more than the queue size"):
        device.see()
    assert_broken(driver, device, "RING_E_AVAIL_AHEAD", 9)


def test_R03_available_index_bumped_during_the_drain(ring):
    driver, device = ring
    for i in range(8):
        driver.ring.avail.ring[i] = GOOD
    driver.ring.avail.idx = 8
    assert device.see() == 8
    taken = 0
    while (chain := device.take()) is not None:
        device.push(chain)
        driver.ring.avail.idx = 8 + taken  # always more
        taken += 1
    assert taken == 8  # what was seen, and no further look


@pytest.mark.parametrize("head", [8, 9, 0x7FFF, 0xFFFF])
def test_R04_head_outside_the_table(ring, head):
    driver, device = ring
    offer(driver, head)
    with pytest.raises(RingBroken, match=f"names descriptor {head}, which is outside the table"):
        device.pop()
    assert_broken(driver, device, "RING_E_HEAD_RANGE", head)


@pytest.mark.parametrize("idx", [100, 0x8000, 0xFFF0])
def test_R58_nonsense_base_after_a_crash(idx):
    """The front-end hands used.idx back as base, and the driver had written nonsense there."""
    with GuestMemory() as memory, DriverQueue(memory, 8) as driver, DeviceSide(memory) as side:
        driver.ring.used.idx = idx
        device = side.queue(driver, base=idx)
        with pytest.raises(RingBroken):
            device.see()
        assert_broken(driver, device, "RING_E_AVAIL_AHEAD", 0)


# ------------------------------------------------------------------------------------------- where next leads


@pytest.mark.parametrize("next", [8, 9, 0xFFFF])
def test_R08_next_beyond_table(ring, buffer, next):
    driver, device = ring
    driver.ring.desc[0].set(buffer, 1, NEXT, next)
    assert_refused(driver, device, "RING_E_NEXT_RANGE", 0)


@pytest.mark.parametrize("next", [3, 0xFFFF])
def test_R08_next_beyond_indirect_table(ring, buffer, next):
    driver, device = ring
    # 3 is in the ring's table, but not in this one
    driver.ring.desc[0].set(*table(driver.memory, (buffer, 1, NEXT, 1), (buffer, 1, NEXT, next), (buffer, 1)), TABLE)
    assert_refused(driver, device, "RING_E_NEXT_RANGE", 1)


@pytest.mark.parametrize("length", [0, 1], ids=["R10_empty", "R09_one_byte"])
@pytest.mark.parametrize("links", [{0: 0}, {0: 1, 1: 0}, {0: 1, 1: 1}, {0: 1, 1: 2, 2: 3, 3: 1}])
def test_R09_R10_cycle(ring, buffer, length, links):
    driver, device = ring
    for at, to in links.items():
        driver.ring.desc[at].set(buffer, length, NEXT, to)
    at = 0
    for _ in range(8):
        at = links[at]
    assert_refused(driver, device, "RING_E_LOOP", at)


def test_R09_R10_cycle_in_an_indirect_table(ring):
    driver, device = ring
    driver.ring.desc[0].set(*table(driver.memory, (0, 0, NEXT, 1), (0, 0, NEXT, 2), (0, 0, NEXT, 0)), TABLE)
    assert_refused(driver, device, "RING_E_LOOP", 0)


# --------------------------------------------------------------------------------------- indirect tables


def test_R19_readable_in_the_table_after_a_writable_direct_one(ring, buffer):
    driver, device = ring
    driver.ring.desc[0].set(buffer, 1, NEXT | WRITE, 1)
    driver.ring.desc[1].set(*table(driver.memory, (buffer, 1)), TABLE)
    assert_refused(driver, device, "RING_E_ORDER", 0)


def test_R21_indirect_and_next_together(ring, buffer):
    driver, device = ring
    driver.ring.desc[0].set(*table(driver.memory, (buffer, 1)), TABLE | NEXT, 1)
    driver.ring.desc[1].set(buffer, 1)
    assert_refused(driver, device, "RING_E_INDIRECT_NEXT", 0)


def test_R21_chain_that_ends_in_an_indirect_descriptor_is_legal(ring, buffer):
    driver, device = ring
    driver.memory.write(buffer, b"abcd")
    driver.ring.desc[0].set(buffer, 1, NEXT, 1)
    driver.ring.desc[1].set(buffer + 1, 1, NEXT, 2)
    driver.ring.desc[2].set(*table(driver.memory, (buffer + 2, 2, NEXT, 1), (buffer + 8, 9, WRITE)), TABLE)
    offer(driver, 0)
    chain = device.pop()
    assert (chain.read(), chain.writable_len) == (b"abcd", 9)


def test_R22_indirect_inside_an_indirect_table(ring, buffer):
    driver, device = ring
    inner = table(driver.memory, (buffer, 1))
    driver.ring.desc[0].set(*table(driver.memory, (buffer, 1, NEXT, 1), (*inner, TABLE)), TABLE)
    assert_refused(driver, device, "RING_E_INDIRECT_NESTED", 1)


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
