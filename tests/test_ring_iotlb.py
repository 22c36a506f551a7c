"""The IOTLB on the device's side (core/iotlb.c): what a table says of any address, and what a queue makes of it."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ring.dirty import DirtyLog
from ring.driver import Buffer, DriverQueue, Extent, GuestMemory
from ring.driver_parts import INDIRECT_DESC, RING_PACKED
from ring.errors import ChainError, SetupError, TranslationMissing
from ring.iotlb import ENTRIES_MAX, READ, WRITE, Fault, Iotlb, Part, ring_parts
from ring.virtqueue import VirtQueue
from vdev.testing.rig import DeviceSide

PAGE = 4096
END = 1 << 64
# Two regions whose uva are far apart, so that what crosses them is not one run.
REGIONS = [Extent(0x100000, 16 * PAGE, uva=0x7000000), Extent(0x200000, 16 * PAGE, uva=0x9000000)]
UVA = REGIONS[0].uva
INDIRECT, PACKED = 1 << INDIRECT_DESC, 1 << RING_PACKED
FORMATS = pytest.mark.parametrize("ring", [0, PACKED], ids=["split", "packed"])


@pytest.fixture(scope="module")
def side() -> Iterator[DeviceSide]:
    with GuestMemory(extents=REGIONS) as memory, DeviceSide(memory) as device:
        yield device


@pytest.fixture
def table() -> Iterator[Iotlb]:
    made = Iotlb()
    yield made
    made.close()


# ----------------------------------------------------------------------------------------- the table


def says(table: Iotlb, side: DeviceSide, iova: int, access: int = READ) -> str:
    """What ``table`` says of one byte."""
    lacking = table.lacks(side.memory, [Part(iova, 1, access)])
    return "known" if lacking is None else lacking[0].removeprefix("RING_E_").lower()


@pytest.mark.parametrize(("iova", "size", "uva", "access"), [
    (0, 0, UVA, 3), (END - PAGE, PAGE + 1, UVA, 3), (END - 1, 2, UVA, 3), (0, 1, UVA - 1, 3),
    (0, 2, UVA + 16 * PAGE - 1, 3), (0, END - 1, UVA, 3), (0, 1, END - 1, 3), (0, 1, UVA, 0), (0, 1, UVA, 4),
    (0, 1, UVA, 255)])
def test_updates_that_cannot_be_are_refused(table, side, iova, size, uva, access):
    with pytest.raises(SetupError):
        table.update(side.memory, iova, size, uva, access)
    assert len(table) == 0


def test_the_whole_address_space_can_be_named(table, side):
    table.update(side.memory, END - PAGE, PAGE, UVA, READ)
    table.update(side.memory, 0, PAGE, UVA, READ)
    assert [says(table, side, iova) for iova in (0, PAGE - 1, PAGE, END - PAGE - 1, END - PAGE, END - 1)] == [
        "known", "known", "miss", "miss", "known", "known"]
    assert table.invalidate(END - 1, 2) == 1
    assert (says(table, side, END - 1), says(table, side, END - 2)) == ("miss", "known")
    table.clear()
    assert len(table) == 0


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40), st.integers(1, 12), st.integers(0, 8), st.integers(1, 3)),
                max_size=30))
@settings(max_examples=200, deadline=None)
def test_table_is_what_a_map_from_byte_to_byte_would_be(side, changes):
    table, known = Iotlb(), {}
    try:
        for update, iova, size, offset, access in changes:
            touched = {byte for byte in known if iova <= byte < iova + size}
            for byte in touched:
                del known[byte]
            if update:
                table.update(side.memory, iova, size, UVA + offset, access)
                known |= {iova + n: (UVA + offset + n, access) for n in range(size)}
            else:
                assert bool(table.invalidate(iova, size)) == bool(touched)
        for byte in range(60):
            for access in (READ, WRITE):
                expected = "miss" if byte not in known else "known" if known[byte][1] & access else "denied"
                assert says(table, side, byte, access) == expected
            if byte in known:
                assert table.has(side.memory, byte, 1, *known[byte])
                assert not table.has(side.memory, byte, 1, known[byte][0] + 1, known[byte][1])
    finally:
        table.close()


def test_a_full_table_stays_full_and_takes_what_is_new(table, side):
    for number in range(ENTRIES_MAX + 500):
        table.update(side.memory, 2 * number * PAGE, PAGE, UVA, READ)
        assert says(table, side, 2 * number * PAGE) == "known"
    assert len(table) == ENTRIES_MAX
    first = next(n for n in range(ENTRIES_MAX) if says(table, side, 2 * n * PAGE) == "known")
    table.invalidate(2 * first * PAGE + 1, 1)  # cut in two: one too many
    assert len(table) == ENTRIES_MAX


def test_a_run_is_one_piece_of_one_region(table, side):
    memory = side.memory
    table.update(memory, 0, PAGE, UVA, 3)
    table.update(memory, PAGE, PAGE, UVA + PAGE, 3)
    table.update(memory, 2 * PAGE, PAGE, UVA + 5 * PAGE, 3)
    table.update(memory, 3 * PAGE, PAGE, UVA + 6 * PAGE, READ)
    assert table.lacks(memory, [Part(100, 2 * PAGE - 100, 3)]) is None
    assert table.lacks(memory, [Part(100, 2 * PAGE - 99, 3)]) == ("RING_E_RING_UNMAPPED", Fault(2 * PAGE, 3))
    assert table.lacks(memory, [Part(2 * PAGE, 2 * PAGE, 3)]) == ("RING_E_DENIED", Fault(3 * PAGE, 3))
    assert table.lacks(memory, [Part(3 * PAGE, PAGE + 1, READ)]) == ("RING_E_MISS", Fault(4 * PAGE, READ))
    assert table.lacks(memory, [Part(0, 1, 3), Part(9 * PAGE, 1, 3)]) == ("RING_E_MISS", Fault(9 * PAGE, 3))


def test_parts_of_rings_have_the_lengths_of_the_specification():
    places = {"size": 256, "desc": 0, "avail": 1 << 20, "used": 2 << 20}
    assert [(part.length, part.access) for part in ring_parts(**places, features=0)] == [
        (4096, READ), (6 + 2 * 256, READ), (6 + 8 * 256, 3)]
    assert [(part.length, part.access) for part in ring_parts(**places, features=PACKED)] == [
        (4096, 3), (4, READ), (4, 3)]


# ----------------------------------------------------------------------------------------- the queue


class Behind:
    """Both halves of a queue whose driver is behind an IOMMU: an iova is the driver's gpa."""

    def __init__(self, memory: GuestMemory, driver: DriverQueue, side: DeviceSide, features: int) -> None:
        self.memory, self.driver, self.side, self.table = memory, driver, side, Iotlb()
        parts = dict(zip(("desc", "avail", "used"), (area.gpa for area in driver.ring.areas), strict=True))
        for part in ring_parts(size=driver.ring.size, **parts, features=features):
            self.map(part.address, part.length)
        self.queue = VirtQueue(side.memory, size=driver.ring.size, **parts, features=features, base=driver.base,
                               iotlb=self.table)

    def map(self, iova: int, size: int = PAGE, access: int = READ | WRITE) -> None:
        """Translate the pages of [iova, iova + size)."""
        for page in range(iova // PAGE * PAGE, iova + size, PAGE):
            self.table.update(self.side.memory, page, PAGE, self.memory.uva(page), access)


@contextmanager
def log_of(size: int) -> Iterator[tuple[DirtyLog, Callable[[], set[int]]]]:
    """A dirty log of ``size`` bytes, and the pages marked in it."""
    fd = os.memfd_create("log")
    os.ftruncate(fd, size)
    log = DirtyLog(fd, size)
    try:
        yield log, lambda: {8 * at + bit for at, byte in enumerate(os.pread(fd, size, 0)) for bit in range(8)
                            if byte >> bit & 1}
    finally:
        log.close()
        os.close(fd)


class ShiftedSide(DeviceSide):
    """Guest memory as the device is told of it: elsewhere by so many bytes than the driver's addresses say."""

    def __init__(self, memory: GuestMemory, gpa_shift: int) -> None:
        super().__init__(memory)
        self.memory.close()
        for mapping in self.mappings:
            mapping.gpa += gpa_shift
        self.memory = self.owner.table(self.mappings)


@contextmanager
def behind(features: int, gpa_shift: int = 0) -> Iterator[Behind]:
    with GuestMemory() as memory, DriverQueue(memory, 8, features) as driver, ShiftedSide(memory, gpa_shift) as side:
        made = Behind(memory, driver, side, features)
        yield made
        made.queue.close()
        made.table.close()


@FORMATS
@pytest.mark.parametrize("indirect", [0, INDIRECT], ids=["direct", "indirect"])
def test_chain_is_given_back_until_all_of_it_is_translated(ring, indirect):
    with behind(ring | indirect) as it:
        pages = [it.memory.alloc(PAGE, PAGE) for _ in range(3)]
        while it.memory.alloc(16) < pages[-1]:
            pass  # so that the indirect table lies in a page of its own
        for number, page in enumerate(pages):
            it.memory.write(page, bytes([number]) * 10)
        it.driver.add([Buffer(page, 10) for page in pages], direct=0 if indirect else None)
        it.driver.submit()
        asked = []
        while True:
            try:
                chain = it.queue.pop()
                break
            except TranslationMissing:
                it.queue.unpop()
                asked.append(it.queue.missing())
                assert it.queue.missing() is None
                it.map(asked[-1].iova)
        assert [fault.iova for fault in asked if fault.iova in pages] == pages
        assert {fault.access for fault in asked} == {READ}
        assert len(asked) == (4 if indirect else 3)  # the indirect table, too
        assert chain.read() == b"".join(bytes([number]) * 10 for number in range(3))
        it.queue.push(chain)
        it.queue.publish()
        assert it.driver.collect() is not None


@FORMATS
def test_all_that_a_chain_lacks_is_told_at_once(ring):
    with behind(ring) as it:
        first = it.memory.alloc(6 * PAGE, PAGE)
        it.map(first + 2 * PAGE)
        it.driver.add([Buffer(first + 100, 3 * PAGE), Buffer(first + 5 * PAGE, 10, True)])
        it.driver.add([Buffer(first + 4 * PAGE, 10)])
        it.driver.submit()
        before = it.queue.state
        assert it.queue.scout() == [Fault(first + 100, READ), Fault(first + PAGE, READ), Fault(first + 3 * PAGE, READ),
                                    Fault(first + 5 * PAGE, WRITE)]
        assert it.queue.scout(2) == [Fault(first + 100, READ), Fault(first + PAGE, READ)]
        assert it.queue.missing() is None
        assert (it.queue.state.next_avail, it.queue.base) == (before.next_avail, it.driver.base)
        it.map(first, 6 * PAGE)
        assert it.queue.scout() == [] and it.queue.pop().readable_len == 3 * PAGE


@FORMATS
def test_buffer_over_several_pages_is_several_pieces(ring):
    with behind(ring) as it:
        first = it.memory.alloc(3 * PAGE, PAGE)
        it.driver.add([Buffer(first + 100, 2 * PAGE, True)])
        it.driver.submit()
        it.map(first, 3 * PAGE)
        chain = it.queue.pop()
        assert (chain.pieces, chain.writable_len) == (3, 2 * PAGE)
        assert chain.write(bytes(range(256)) * 32) == 2 * PAGE
        assert it.memory.read(first + 100, 2 * PAGE) == bytes(range(256)) * 32


@FORMATS
@pytest.mark.parametrize(("access", "writable"), [(READ, True), (WRITE, False)])
def test_buffer_that_may_not_be_used_so_breaks_its_chain(ring, access, writable):
    with behind(ring) as it:
        page = it.memory.alloc(PAGE, PAGE)
        it.map(page, PAGE, access)
        it.driver.add([Buffer(page, 10, writable)])
        it.driver.submit()
        with pytest.raises(ChainError) as caught:
            it.queue.pop()
        assert caught.value.code == "RING_E_DENIED"
        assert it.queue.denied() == Fault(page, WRITE if writable else READ)
        assert it.queue.denied() is None and it.queue.missing() is None
        it.queue.push(caught.value)
        it.queue.publish()
        assert it.driver.collect().data == b""


@FORMATS
def test_what_is_refused_breaks_one_chain_only(ring):
    with behind(ring) as it:
        page = it.memory.alloc(PAGE, PAGE)
        for _ in range(2):
            it.driver.add([Buffer(page, 10)])
        it.driver.submit()
        it.queue.refuse(page)
        with pytest.raises(ChainError) as caught:
            it.queue.pop()
        assert caught.value.code == "RING_E_UNMAPPED"
        it.queue.push(caught.value)
        with pytest.raises(TranslationMissing):
            it.queue.pop()


@FORMATS
def test_buffer_over_the_end_of_the_address_space(ring):
    with behind(ring) as it:
        it.table.update(it.side.memory, END - PAGE, PAGE, it.memory.regions[0].uva, 3)
        it.table.update(it.side.memory, 0, PAGE, it.memory.regions[0].uva, 3)
        it.driver.add([Buffer(END - 10, 20)])
        it.driver.submit()
        with pytest.raises(ChainError) as caught:
            it.queue.pop()
        assert caught.value.code == "RING_E_UNMAPPED"


@FORMATS
def test_pages_are_marked_by_gpa_whatever_the_iova(ring):
    """log_guest_addr is an iova, too: the used ring is marked where it lies in guest memory."""
    with behind(ring, gpa_shift=-0x4000_0000) as it, log_of(1 << 12) as (log, marked):
        used = it.driver.ring.areas[2].gpa
        it.queue.log(log, used=used)
        page = it.memory.alloc(2 * PAGE, PAGE)
        it.map(page, 2 * PAGE)
        it.driver.add([Buffer(page + 100, PAGE, True)])
        it.driver.submit()
        chain = it.queue.pop()
        chain.write(bytes(PAGE))
        it.queue.push(chain, PAGE)
        it.queue.publish()
        first = (page - 0x4000_0000) // PAGE
        ring_pages = {(area.gpa - 0x4000_0000) // PAGE for area in it.driver.ring.areas}
        assert {first, first + 1} <= marked() <= {first, first + 1} | ring_pages
        assert marked() & ring_pages


def test_ring_whose_parts_are_not_translated_cannot_be_made():
    with behind(0) as it:
        it.table.clear()
        parts = dict(zip(("desc", "avail", "used"), (area.gpa for area in it.driver.ring.areas), strict=True))
        with pytest.raises(SetupError):
            VirtQueue(it.side.memory, size=8, **parts, iotlb=it.table)
