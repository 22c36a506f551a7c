"""What a lying driver gets from a ring of either format: a refused chain, a broken ring, never more.

Each test carries the id of its case. The driver writes the ring by hand; the device is the C core through the
step API. What only one format has is in tests/test_ring_hostile_split.py and tests/test_ring_hostile_packed.py; what
changes while the device looks in tests/test_ring_snapshot.py; what only shows under a pump in
tests/test_ring_pump_hostile.py and tests/test_ring_pump_receiveq.py.
"""

import pytest

from ring.driver import DriverQueue, Extent, GuestMemory
from ring.driver_parts import DESC_F_INDIRECT, DESC_F_WRITE, INDIRECT_DESC, RING_PACKED
from ring.virtqueue import VirtQueue
from vdev.testing.handmade import assert_goes_on, assert_refused, give_back, offer, table
from vdev.testing.rig import joined

INDIRECT = 1 << INDIRECT_DESC
PACKED = 1 << RING_PACKED
WRITE, TABLE = DESC_F_WRITE, DESC_F_INDIRECT
PIECES_MAX = 1023
WILD = 0xFFFF_FFFF_FFFF_F000

FORMATS = pytest.mark.parametrize("format", [0, PACKED], ids=["split", "packed"])


@pytest.fixture(params=[0, PACKED], ids=["split", "packed"])
def ring(request):
    """Both halves of a ring of 8, close to where its format begins anew."""
    base = 0x80068006 if request.param else 0xFFFE
    with joined(size=8, features=INDIRECT | request.param, base=base) as (driver, device):
        yield driver, device


@pytest.fixture
def buffer(ring):
    return ring[0].memory.alloc(4096)


def test_every_test_here_starts_from_a_ring_that_works(ring):
    for _ in range(20):
        assert_goes_on(*ring)


# ---------------------------------------------------------------------------------------------- how many


@pytest.mark.parametrize("count", [515, PIECES_MAX])
@FORMATS
def test_R11_long_indirect_chain_is_legal(format, count):
    with joined(size=256, features=INDIRECT | format) as (driver, device):
        driver.post([b"%c" % (i & 0xFF) for i in range(count)], direct=0)
        driver.publish()
        chain = device.pop()
        assert (chain.descriptors, chain.slots) == (count + 1, 1)
        assert chain.read() == bytes(i & 0xFF for i in range(count))


@FORMATS
def test_R11_R45_more_pieces_than_one_call_of_the_kernel_takes(format):
    with joined(size=2048, features=format) as (driver, device):
        gpa = driver.memory.alloc(1)
        chain = offer(driver, *[(gpa, 1, 0)] * PIECES_MAX)
        popped = device.pop()
        assert (popped.head, popped.descriptors, popped.readable_len) == (chain.name, PIECES_MAX, PIECES_MAX)
        give_back(driver, device, popped)
        assert_refused(driver, device, "RING_E_PIECES", *[(gpa, 1, 0)] * (PIECES_MAX + 1), at=PIECES_MAX)


# ------------------------------------------------------------------------------------------------- where


def test_R12_empty_buffer_at_a_wild_address(ring, buffer):
    driver, device = ring
    offer(driver, (WILD, 0, 0), (buffer, 3, 0), (WILD, 0, WRITE))
    chain = device.pop()
    assert (chain.descriptors, chain.readable_len, chain.writable_len) == (3, 3, 0)
    assert chain.write(b"nowhere") == 0
    give_back(driver, device, chain)


def memory_ends(driver: DriverQueue) -> tuple[int, int]:
    region = driver.memory.regions[0]
    return region.gpa, region.gpa + region.size


@pytest.mark.parametrize("where, length", [
    ("before", 1), ("before", 4097), ("last", 2), ("last", 0xFFFFFFFF), ("behind", 1), ("wild", 1), ("wild", 4096)])
@pytest.mark.parametrize("flags", [0, WRITE], ids=["readable", "writable"])
@pytest.mark.parametrize("more", [0, 2], ids=["alone", "with_more_behind"])
def test_R15_buffer_not_wholly_in_guest_memory(ring, where, length, flags, more):
    driver, device = ring
    start, end = memory_ends(driver)
    addr = {"before": start - 4096 if length > 1 else start - 1, "last": end - 1, "behind": end, "wild": WILD}[where]
    assert_refused(driver, device, "RING_E_UNMAPPED", (addr, length, flags), *[(0, 0, WRITE)] * more)


ADJACENT = [Extent(0x10000, 1 << 20, uva=1 << 40), Extent(0x10000 + (1 << 20), 4096, uva=1 << 30)]
BORDER = 0x10000 + (1 << 20)


@FORMATS
def test_R15_buffer_across_adjacent_regions(format):
    with GuestMemory(extents=ADJACENT) as memory, joined(features=format, memory=memory) as (driver, device):
        memory.write(BORDER - 3, b"abcdef")
        offer(driver, (BORDER - 3, 6, 0), (BORDER - 100, 200, WRITE))
        chain = device.pop()
        assert (chain.read(), chain.writable_len) == (b"abcdef", 200)
        assert chain.write(bytes(range(200))) == 200
        assert memory.read(BORDER - 100, 200) == bytes(range(200))


@FORMATS
def test_R15_pieces_of_a_crossing_buffer_count_one_by_one(format):
    def crossing(descriptors: int) -> list[tuple[int, int, int]]:
        """Of one byte each, but for the last, which is two bytes and two pieces."""
        return [(BORDER - 8, 1, 0)] * (descriptors - 1) + [(BORDER - 1, 2, 0)]

    with (GuestMemory(extents=ADJACENT) as memory,
          joined(size=2048, features=format, memory=memory) as (driver, device)):
        offer(driver, *crossing(PIECES_MAX - 1))
        chain = device.pop()
        assert chain.readable_len == PIECES_MAX
        give_back(driver, device, chain)
        assert_refused(driver, device, "RING_E_PIECES", *crossing(PIECES_MAX), at=PIECES_MAX - 1)


@pytest.mark.parametrize("flags", [0, WRITE], ids=["readable", "writable"])
@FORMATS
def test_R17_lengths_add_up_to_more_than_4_GiB(format, flags):
    with GuestMemory(2 << 30) as memory, joined(features=format, memory=memory) as (driver, device):
        start = memory.regions[0].gpa  # sparse: nothing is touched
        half = (start, 2 << 30, flags)
        short = (start, (2 << 30) - 1, flags)
        assert_refused(driver, device, "RING_E_LENGTH", short, half, (start, 1, flags), at=2)
        offer(driver, short, half)
        chain = device.pop()
        assert chain.readable_len + chain.writable_len == (4 << 30) - 1
        give_back(driver, device, chain)


# ------------------------------------------------------------------------------------------- in which order


def test_R19_readable_after_writable(ring, buffer):
    driver, device = ring
    assert_refused(driver, device, "RING_E_ORDER",
                   (buffer, 1, 0), (buffer, 1, WRITE), (buffer, 1, 0), (buffer, 1, WRITE), at=2)


def test_R19_readable_after_writable_in_an_indirect_table(ring, buffer):
    driver, device = ring
    wrong = table(driver, (buffer, 1, 0), (buffer, 1, WRITE), (buffer, 1, 0))
    assert_refused(driver, device, "RING_E_ORDER", (*wrong, TABLE), in_table=2)


# --------------------------------------------------------------------------------------- indirect tables


@FORMATS
def test_R20_indirect_without_negotiation(format):
    with joined(size=8, features=format) as (driver, device):
        gpa = driver.memory.alloc(1)
        assert_refused(driver, device, "RING_E_INDIRECT_OFF", (*table(driver, (gpa, 1, 0)), TABLE))


@pytest.mark.parametrize("length", [0, 1, 15, 17, 0xFFFFFFFF, 0xFFFFFFF0, 16 * 1025])
def test_R26_indirect_table_of_a_bad_length(ring, length):
    driver, device = ring
    assert_refused(driver, device, "RING_E_INDIRECT_LENGTH", (driver.memory.alloc(32768), length, TABLE))


@pytest.mark.parametrize("shift", [-16, 0])
def test_R24_indirect_table_not_wholly_in_guest_memory(ring, shift):
    driver, device = ring
    assert_refused(driver, device, "RING_E_UNMAPPED", (memory_ends(driver)[1] + shift, 32, TABLE))


def test_R24_buffer_of_an_indirect_table_not_in_guest_memory(ring, buffer):
    driver, device = ring
    wild = table(driver, (buffer, 1, 0), (buffer, 1, 0), (WILD, 1, 0))
    assert_refused(driver, device, "RING_E_UNMAPPED", (*wild, TABLE), in_table=2)


@pytest.mark.parametrize("before_border", [16, 8, 3, 17, 31])
@FORMATS
def test_R24_indirect_table_split_inside_a_descriptor(format, before_border):
    with (GuestMemory(extents=ADJACENT) as memory,
          joined(features=INDIRECT | format, memory=memory) as (driver, device)):
        assert_table_works_at(driver, device, BORDER - before_border, memory.alloc(16))


@pytest.mark.parametrize("shift", [1, 3, 7, 15])
def test_R41_indirect_table_at_an_odd_address(ring, buffer, shift):
    driver, device = ring
    assert_table_works_at(driver, device, driver.memory.alloc(64) + shift, buffer)


def assert_table_works_at(driver: DriverQueue, device: VirtQueue, gpa: int, buffer: int) -> None:
    """A table there, wherever that is, serves as well as any."""
    driver.memory.write(buffer, b"abcd")
    made = table(driver, (buffer, 2, 0), (buffer + 2, 2, 0))
    driver.memory.write(gpa, driver.memory.read(*made))
    offer(driver, (gpa, made[1], TABLE))
    chain = device.pop()
    assert chain.read() == b"abcd"
    give_back(driver, device, chain)


def test_R27_write_flag_on_the_indirect_descriptor_is_ignored(ring, buffer):
    driver, device = ring
    offer(driver, (*table(driver, (buffer, 5, 0)), TABLE | WRITE))
    chain = device.pop()
    assert (chain.readable_len, chain.writable_len) == (5, 0)
    give_back(driver, device, chain)
