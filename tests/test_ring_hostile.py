"""What a lying driver gets from the ring: a refused chain, a broken ring, never more.

Each test carries the id of its case. The driver writes the ring by hand; the device is the C core through the
step API. What changes while the device looks is in tests/test_ring_snapshot.py, what only shows under a pump in
tests/test_ring_pump_hostile.py.
"""

import pytest

from ring.driver import DriverQueue, Extent, GuestMemory
from ring.driver_parts import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, INDIRECT_DESC
from ring.driver_split import DESCRIPTOR
from ring.errors import ChainError, RingBroken
from ring.virtqueue import VirtQueue
from vdev.testing.rig import DeviceSide, joined, table

INDIRECT = 1 << INDIRECT_DESC
NEXT, WRITE, TABLE = DESC_F_NEXT, DESC_F_WRITE, DESC_F_INDIRECT
PIECES_MAX = 1023
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


def assert_goes_on(driver: DriverQueue, device: VirtQueue) -> None:
    """The next good chain is served as if nothing had been."""
    offer(driver, GOOD)
    chain = device.pop()
    assert chain.head == GOOD and chain.read() == b"\0"
    device.push(chain)
    device.publish()
    assert driver.ring.next_completion() == (GOOD, 0)


def assert_refused(driver: DriverQueue, device: VirtQueue, code: str, at: int, head: int = 0) -> None:
    """The chain at ``head`` breaks rule ``code`` at descriptor ``at``, goes back with length 0 (R54), and the ring
    goes on."""
    offer(driver, head)
    with pytest.raises(ChainError) as caught:
        device.pop()
    assert (caught.value.code, caught.value.at, caught.value.head) == (code, at, head)
    assert f"descriptor {at}" in str(caught.value)
    device.push(caught.value)
    device.publish()
    assert driver.ring.next_completion() == (head, 0)
    assert device.state.broken is None
    assert_goes_on(driver, device)


def assert_broken(driver: DriverQueue, device: VirtQueue, code: str, at: int) -> None:
    """The ring stops at rule ``code`` about index ``at``, for good, and says so whatever is asked of it."""
    used = driver.memory.read(driver.ring.used.gpa, driver.ring.layout.used_bytes)
    for verb in (device.see, device.pop, device.take, device.arm, device.publish, device.decide):
        with pytest.raises(RingBroken) as caught:
            verb()
        assert (caught.value.code, caught.value.at) == (code, at)
    assert device.state.broken.code == code
    assert driver.memory.read(driver.ring.used.gpa, driver.ring.layout.used_bytes) == used


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


def test_R31_available_entry_changed_after_the_check(ring):
    driver, device = ring
    offer(driver, GOOD)
    assert device.see() == 1
    chain = device.take()
    driver.ring.avail.ring[0] = 0xFFFF
    assert not device.walk()
    assert (chain.head, chain.read()) == (GOOD, b"\0")


@pytest.mark.parametrize("idx", [100, 0x8000, 0xFFF0])
def test_R58_nonsense_base_after_a_crash(idx):
    """The front-end hands used.idx back as base, and the driver had written nonsense there."""
    with GuestMemory() as memory, DriverQueue(memory, 8) as driver, DeviceSide(memory) as side:
        driver.ring.used.idx = idx
        device = side.queue(driver, base=idx)
        with pytest.raises(RingBroken):
            device.see()
        assert_broken(driver, device, "RING_E_AVAIL_AHEAD", 0)


# ------------------------------------------------------------------------------------------------- chains


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


@pytest.mark.parametrize("count", [515, PIECES_MAX])
def test_R11_long_indirect_chain_is_legal(count):
    with joined(size=256, features=INDIRECT) as (driver, device):
        driver.post([b"%c" % (i & 0xFF) for i in range(count)], direct=0)
        driver.publish()
        chain = device.pop()
        assert chain.descriptors == count + 1
        assert chain.read() == bytes(i & 0xFF for i in range(count))


def test_R11_R45_more_pieces_than_one_call_of_the_kernel_takes():
    with joined(size=2048) as (driver, device):
        gpa = driver.memory.alloc(1)
        for i in range(PIECES_MAX + 1):
            driver.ring.desc[i].set(gpa, 1, NEXT * (i < PIECES_MAX), i + 1)
        offer(driver, 0)
        with pytest.raises(ChainError) as caught:
            device.pop()
        assert (caught.value.code, caught.value.at) == ("RING_E_PIECES", PIECES_MAX)


def test_R12_empty_buffer_at_a_wild_address(ring, buffer):
    driver, device = ring
    driver.ring.desc[0].set(WILD, 0, NEXT, 1)
    driver.ring.desc[1].set(buffer, 3, NEXT, 2)
    driver.ring.desc[2].set(WILD, 0, WRITE)
    offer(driver, 0)
    chain = device.pop()
    assert (chain.descriptors, chain.readable_len, chain.writable_len) == (3, 3, 0)
    assert chain.write(b"nowhere") == 0


def memory_ends(driver: DriverQueue) -> tuple[int, int]:
    region = driver.memory.regions[0]
    return region.gpa, region.gpa + region.size


@pytest.mark.parametrize("where, length", [
    ("before", 1), ("before", 4097), ("last", 2), ("last", 0xFFFFFFFF), ("behind", 1), ("wild", 1), ("wild", 4096)])
@pytest.mark.parametrize("flags", [0, WRITE])
def test_R15_buffer_not_wholly_in_guest_memory(ring, where, length, flags):
    driver, device = ring
    start, end = memory_ends(driver)
    driver.ring.desc[0].set({"before": start - 4096 if length > 1 else start - 1, "last": end - 1, "behind": end,
                             "wild": WILD}[where], length, flags)
    assert_refused(driver, device, "RING_E_UNMAPPED", 0)


ADJACENT = [Extent(0x10000, 1 << 20, uva=1 << 40), Extent(0x10000 + (1 << 20), 4096, uva=1 << 30)]
BORDER = 0x10000 + (1 << 20)


def test_R15_buffer_across_adjacent_regions():
    with GuestMemory(extents=ADJACENT) as memory, joined(memory=memory) as (driver, device):
        memory.write(BORDER - 3, b"abcdef")
        driver.ring.desc[0].set(BORDER - 3, 6, NEXT, 1)
        driver.ring.desc[1].set(BORDER - 100, 200, WRITE)
        offer(driver, 0)
        chain = device.pop()
        assert (chain.read(), chain.writable_len) == (b"abcdef", 200)
        assert chain.write(bytes(range(200))) == 200
        assert memory.read(BORDER - 100, 200) == bytes(range(200))


def test_R15_pieces_of_a_crossing_buffer_count_one_by_one():
    with GuestMemory(extents=ADJACENT) as memory, joined(size=1024, memory=memory) as (driver, device):

        def offer_chain(descriptors: int) -> None:
            """Of one byte each, but for the last, which is two bytes and two pieces."""
            for i in range(descriptors - 1):
                driver.ring.desc[i].set(BORDER - 8, 1, NEXT, i + 1)
            driver.ring.desc[descriptors - 1].set(BORDER - 1, 2)
            offer(driver, 0)

        offer_chain(PIECES_MAX - 1)
        assert device.pop().readable_len == PIECES_MAX
        offer_chain(PIECES_MAX)
        with pytest.raises(ChainError) as caught:
            device.pop()
        assert (caught.value.code, caught.value.at) == ("RING_E_PIECES", PIECES_MAX - 1)


@pytest.mark.parametrize("flags", [0, WRITE])
def test_R17_lengths_add_up_to_more_than_4_GiB(flags):
    with GuestMemory(2 << 30) as memory, joined(memory=memory) as (driver, device):  # sparse: nothing is touched
        start = memory.regions[0].gpa
        for i in range(3):
            driver.ring.desc[i].set(start, (2 << 30) - (i == 0), NEXT * (i < 2) | flags, i + 1)
        offer(driver, 0)
        with pytest.raises(ChainError) as caught:
            device.pop()
        assert (caught.value.code, caught.value.at) == ("RING_E_LENGTH", 2)
        driver.ring.desc[2].set(start, 0)
        driver.ring.desc[1].flags = flags
        offer(driver, 0)
        chain = device.pop()
        assert chain.readable_len + chain.writable_len == (4 << 30) - 1


def test_R19_readable_after_writable(ring, buffer):
    driver, device = ring
    driver.ring.desc[0].set(buffer, 1, NEXT, 1)
    driver.ring.desc[1].set(buffer, 1, NEXT | WRITE, 2)
    driver.ring.desc[2].set(buffer, 1)
    assert_refused(driver, device, "RING_E_ORDER", 2)


def test_R19_readable_in_the_table_after_a_writable_direct_one(ring, buffer):
    driver, device = ring
    driver.ring.desc[0].set(buffer, 1, NEXT | WRITE, 1)
    driver.ring.desc[1].set(*table(driver.memory, (buffer, 1)), TABLE)
    assert_refused(driver, device, "RING_E_ORDER", 0)


# --------------------------------------------------------------------------------------- indirect tables


def test_R20_indirect_without_negotiation():
    with joined(size=8) as (driver, device):
        driver.ring.desc[GOOD].set(driver.memory.alloc(64), 1)
        driver.ring.desc[0].set(*table(driver.memory, (driver.memory.alloc(1), 1)), TABLE)
        assert_refused(driver, device, "RING_E_INDIRECT_OFF", 0)


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


@pytest.mark.parametrize("length", [0, 1, 15, 17, 0xFFFFFFFF, 0xFFFFFFF0, 16 * 1025])
def test_R26_indirect_table_of_a_bad_length(ring, length):
    driver, device = ring
    driver.ring.desc[0].set(driver.memory.alloc(32768), length, TABLE)
    assert_refused(driver, device, "RING_E_INDIRECT_LENGTH", 0)


@pytest.mark.parametrize("shift", [-16, 0])
def test_R24_indirect_table_not_wholly_in_guest_memory(ring, shift):
    driver, device = ring
    driver.ring.desc[0].set(memory_ends(driver)[1] + shift, 32, TABLE)
    assert_refused(driver, device, "RING_E_UNMAPPED", 0)


@pytest.mark.parametrize("before_border", [16, 8, 3, 17, 31])
def test_R24_indirect_table_split_inside_a_descriptor(before_border):
    with GuestMemory(extents=ADJACENT) as memory, joined(features=INDIRECT, memory=memory) as (driver, device):
        memory.write(0x10000 + 0x8000, b"abcd")
        memory.write(BORDER - before_border, DESCRIPTOR.pack(0x18000, 2, NEXT, 1) + DESCRIPTOR.pack(0x18002, 2, 0, 0))
        driver.ring.desc[0].set(BORDER - before_border, 32, TABLE)
        offer(driver, 0)
        assert device.pop().read() == b"abcd"


@pytest.mark.parametrize("shift", [1, 3, 7, 15])
def test_R41_indirect_table_at_an_odd_address(ring, buffer, shift):
    driver, device = ring
    driver.memory.write(buffer, b"odd")
    gpa = driver.memory.alloc(64) + shift
    driver.memory.write(gpa, DESCRIPTOR.pack(buffer, 3, 0, 0))
    driver.ring.desc[0].set(gpa, 16, TABLE)
    offer(driver, 0)
    assert device.pop().read() == b"odd"


def test_R27_write_flag_on_the_indirect_descriptor_is_ignored(ring, buffer):
    driver, device = ring
    driver.ring.desc[0].set(*table(driver.memory, (buffer, 5)), TABLE | WRITE)
    offer(driver, 0)
    chain = device.pop()
    assert (chain.readable_len, chain.writable_len) == (5, 0)
