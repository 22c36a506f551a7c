"""The guest's half in Python: its memory, its ring by name, and what it thinks of a device that misbehaves.

The device here is the test itself, writing the used ring by hand; tests/test_ring_split.py joins both halves.
"""

import fcntl
import mmap
import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring.driver import Buffer, DeviceError, DriverQueue, Extent, GuestMemory, OutOfGuestMemory, RingFull
from ring.driver_parts import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, EVENT_IDX
from ring.driver_split import USED_F_NO_NOTIFY, SplitLayout, need_event

PAGE = mmap.PAGESIZE


@pytest.fixture
def memory():
    with GuestMemory(1 << 20) as made:
        yield made


@pytest.fixture
def queue(memory):
    with DriverQueue(memory, size=8) as made:
        yield made


def use(queue: DriverQueue, head: int, written: int = 0) -> None:
    """Be the device: one used element, published."""
    ring = queue.ring
    element = ring.used.ring[ring.used.idx]
    element.id, element.len = head, written
    ring.used.idx = (ring.used.idx + 1) & 0xFFFF


# ------------------------------------------------------------------------------------------------ memory


def test_region_is_what_a_device_would_map(memory):
    (region,) = memory.regions
    memory.write(region.gpa + 100, b"seen by both")
    with mmap.mmap(region.fd, region.size, offset=region.offset) as theirs:
        assert theirs[100:112] == b"seen by both"


def test_offset_shifts_the_region_in_its_file():
    with GuestMemory(extents=[Extent(0x1000, PAGE, offset=PAGE + 8)]) as memory:
        memory.store(0x1000, 4, 0xDEADBEEF)
        memory.store(0x1001, 2, 0xABCD)
        assert os.pread(memory.regions[0].fd, 4, PAGE + 8) == b"\xef\xcd\xab\xde"


def test_access_crosses_adjacent_regions_and_stops_at_a_hole():
    with GuestMemory(extents=[Extent(0, PAGE), Extent(PAGE, PAGE), Extent(3 * PAGE, PAGE)]) as memory:
        memory.write(PAGE - 3, b"abcdef")
        assert memory.read(PAGE - 3, 6) == b"abcdef"
        assert memory.load(PAGE - 2, 4) == int.from_bytes(b"bcde", "little")
        with pytest.raises(ValueError, match="in no region"):
            memory.write(2 * PAGE - 3, b"abcdef")
        with pytest.raises(ValueError, match="crosses regions"):
            memory.view(PAGE - 3, 6)


def test_uva_follows_the_region():
    with GuestMemory(extents=[Extent(0, PAGE, uva=0x5000), Extent(PAGE, PAGE, uva=0x1000)]) as memory:
        assert [memory.uva(0), memory.uva(PAGE - 1), memory.uva(PAGE)] == [0x5000, 0x5000 + PAGE - 1, 0x1000]


def test_sealed_memory_cannot_be_truncated():
    with GuestMemory(PAGE, sealed=True) as memory:
        seals = fcntl.fcntl(memory.regions[0].fd, fcntl.F_GET_SEALS)
        assert seals == fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
        with pytest.raises(PermissionError):
            memory.truncate()
        assert memory.load(memory.regions[0].gpa, 8) == 0


def test_truncated_memory_is_refused_instead_of_touched(memory):
    gpa = memory.regions[0].gpa
    memory.truncate()
    assert os.fstat(memory.regions[0].fd).st_size == 0
    for access in (lambda: memory.load(gpa, 2), lambda: memory.store(gpa, 2, 1), lambda: memory.read(gpa, 1)):
        with pytest.raises(ValueError):
            access()


def test_close_frees_descriptors_and_may_come_twice():
    memory = GuestMemory(PAGE)
    fd = memory.regions[0].fd
    memory.close()
    memory.close()
    with pytest.raises(OSError):
        os.fstat(fd)


def test_directory_makes_ordinary_files(tmp_path):
    with GuestMemory(PAGE, directory=str(tmp_path)) as memory:
        memory.write(memory.regions[0].gpa, b"x")
        with pytest.raises(OSError):  # no memfd: it knows no seals
            fcntl.fcntl(memory.regions[0].fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)


def test_allocations_are_zeroed_aligned_and_in_the_region_asked_for():
    with GuestMemory(extents=[Extent(0, PAGE), Extent(4 * PAGE, PAGE)]) as memory:
        memory.write(0, b"\xff" * PAGE)
        assert memory.alloc(1) == 0
        second = memory.alloc(100, align=64)
        assert second == 64 and memory.read(second, 100) == bytes(100)
        assert memory.alloc(16, region=1) == 4 * PAGE
        with pytest.raises(ValueError):
            memory.alloc(0)
        with pytest.raises(KeyError):
            memory.free(second + 1)


@given(st.lists(st.tuples(st.integers(1, 700), st.sampled_from([1, 2, 16, 64])), max_size=30), st.randoms())
def test_allocator_never_overlaps_and_gets_everything_back(requests, random):
    with GuestMemory(PAGE, gpa=3 * PAGE) as memory:
        taken: dict[int, int] = {}
        for size, align in requests:
            try:
                gpa = memory.alloc(size, align)
            except OutOfGuestMemory:
                if not taken:
                    raise
                victim = random.choice(sorted(taken))
                memory.free(victim)
                del taken[victim]
                continue
            assert gpa % align == 0 and gpa >= 3 * PAGE and gpa + size <= 4 * PAGE
            assert all(gpa + size <= other or other + length <= gpa for other, length in taken.items())
            taken[gpa] = size
        for gpa in random.sample(sorted(taken), len(taken)):
            memory.free(gpa)
        assert memory.alloc(PAGE) == 3 * PAGE


# ------------------------------------------------------------------------------------------------ layout


def test_layout_is_that_of_the_specification():
    # virtio 1.2, 2.7: 16 * n, 6 + 2 * n and 6 + 8 * n bytes
    for size in (1, 8, 256, 32768):
        layout = SplitLayout(size)
        assert (layout.desc_bytes, layout.avail_bytes, layout.used_bytes) == (16 * size, 6 + 2 * size, 6 + 8 * size)
        assert (layout.used_event, layout.avail_event) == (4 + 2 * size, 4 + 8 * size)


def test_every_field_by_name(queue):
    ring, memory = queue.ring, queue.memory
    ring.desc[3].addr, ring.desc[3].len = 0x1122334455667788, 0x99AABBCC
    ring.desc[3].flags, ring.desc[3].next = 0xDDEE, 0xFF01
    assert memory.read(ring.desc.gpa + 48, 16) == struct.pack("<QIHH", 0x1122334455667788, 0x99AABBCC, 0xDDEE, 0xFF01)
    ring.avail.flags, ring.avail.idx, ring.avail.ring[9], ring.avail.used_event = 1, 2, 3, 4
    assert struct.unpack("<11H", memory.read(ring.avail.gpa, 22)) == (1, 2, 0, 3, 0, 0, 0, 0, 0, 0, 4)
    ring.used.flags, ring.used.idx, ring.used.avail_event = 5, 6, 7
    ring.used.ring[8].id, ring.used.ring[8].len = 8, 9
    assert struct.unpack("<HHII", memory.read(ring.used.gpa, 12)) == (5, 6, 8, 9)
    assert struct.unpack("<H", memory.read(ring.used.gpa + 68, 2)) == (7,)
    assert (ring.desc[3].next, ring.avail.ring[1], ring.used.ring[0].len) == (0xFF01, 3, 9)


def test_ring_parts_may_be_placed(memory):
    base = memory.alloc(3 * PAGE, align=PAGE)
    with DriverQueue(memory, 4, desc=base, avail=base + PAGE, used=base + 2 * PAGE, base=77) as queue:
        assert memory.load(base + PAGE + 2, 2) == 77 == memory.load(base + 2 * PAGE + 2, 2)
        assert queue.add([Buffer(1, 2)]) == 0
        assert memory.load(base, 8) == 1


# ------------------------------------------------------------------------------------------------- chains


def test_direct_chain(queue):
    head = queue.add([Buffer(10, 1), Buffer(20, 2), Buffer(30, 3, writable=True)])
    desc = queue.ring.desc
    seen = [(desc[i].addr, desc[i].len, desc[i].flags, desc[i].next) for i in range(3)]
    assert head == 0
    assert seen == [(10, 1, DESC_F_NEXT, 1), (20, 2, DESC_F_NEXT, 2), (30, 3, DESC_F_WRITE, 0)]


def test_direct_then_indirect_chain(queue):
    head = queue.add([Buffer(10, 1), Buffer(20, 2), Buffer(30, 3, writable=True)], direct=1)
    first, second = queue.ring.desc[head], queue.ring.desc[queue.ring.desc[head].next]
    assert (first.addr, first.flags, second.len, second.flags) == (10, DESC_F_NEXT, 32, DESC_F_INDIRECT)
    assert queue.memory.read(second.addr, 32) == struct.pack("<QIHHQIHH", 20, 2, DESC_F_NEXT, 1, 30, 3, DESC_F_WRITE, 0)


def test_offered_is_invisible_until_published(queue):
    queue.post([b"x"])
    assert queue.ring.avail.idx == 0
    queue.publish()
    assert queue.ring.avail.idx == 1


def test_full_ring_takes_nothing_and_loses_nothing(queue):
    before = queue.memory.alloc(1)
    queue.memory.free(before)
    for _ in range(7):
        queue.add([Buffer(0, 1)])
    for chain in ({"writable": [1, 1]}, {"writable": [1, 1, 1], "direct": 1}):
        with pytest.raises(RingFull, match="needs 2 descriptors, 1 of 8 are free"):
            queue.post(**chain)
    assert queue.memory.alloc(1) == before
    assert queue.outstanding == 7


@pytest.mark.parametrize("arguments", [{"buffers": []}, {"buffers": [Buffer(0, 1)], "direct": 2}])
def test_impossible_chain(queue, arguments):
    with pytest.raises(ValueError):
        queue.add(**arguments)


def test_collect_gives_data_and_descriptors_back(queue):
    free = sorted(queue.ring.free)
    head = queue.post([b"request"], [4, 8])
    queue.memory.write(queue.ring.desc[1].addr, b"abcd")
    queue.memory.write(queue.ring.desc[2].addr, b"efgh")
    use(queue, head, 6)
    done = queue.collect()
    assert (done.head, done.written, done.data) == (head, 6, b"abcdef")
    assert queue.collect() is None and queue.outstanding == 0 and sorted(queue.ring.free) == free


@pytest.mark.parametrize("head, written, complaint", [
    (5, 0, "names head 5, which is not outstanding"),
    (0, 9, "says 9 bytes, the chain has room for 8"),
])
def test_device_that_lies_is_named(queue, head, written, complaint):
    queue.post([b"x"], [8])
    use(queue, head, written)
    with pytest.raises(DeviceError, match=complaint):
        queue.collect()


def test_used_index_too_far_ahead(queue):
    queue.ring.used.idx = 9
    with pytest.raises(DeviceError, match="9 ahead of 0"):
        queue.collect()


# ------------------------------------------------------------------------------------------ notifications


def brute_force(event: int, new: int, old: int) -> bool:
    """2.7.10 in words: an entry was made visible at the index the other side named."""
    return any((old + i) & 0xFFFF == event for i in range((new - old) & 0xFFFF))


@given(st.integers(0, 0xFFFF), st.integers(0, 300), st.integers(-400, 400))
def test_need_event_is_brute_force(old, moved, distance):
    event = (old + distance) & 0xFFFF
    assert need_event(event, (old + moved) & 0xFFFF, old) == brute_force(event, (old + moved) & 0xFFFF, old)


def test_kick_follows_the_flag(queue):
    queue.post([b"1"])
    assert queue.submit() and os.eventfd_read(queue.kick_fd) == 1
    queue.ring.used.flags = USED_F_NO_NOTIFY
    queue.post([b"2"])
    assert not queue.submit()
    queue.ring.used.flags = 0
    assert not queue.submit()  # nothing new
    assert queue.kicks == 1


def test_kick_follows_the_event(memory):
    with DriverQueue(memory, 8, 1 << EVENT_IDX, base=0xFFFE) as queue:
        queue.ring.used.avail_event = 0  # reached by the third chain, across the wrap
        due = []
        for _ in range(4):
            queue.post([b"x"])
            due.append(queue.submit())
        assert due == [False, False, True, False]


def test_kick_covers_a_whole_batch(memory):
    with DriverQueue(memory, 8, 1 << EVENT_IDX, base=0xFFFE) as queue:
        queue.ring.used.avail_event = 0xFFFF
        for _ in range(4):
            queue.post([b"x"])
        assert queue.submit()


def test_wait_sleeps_for_a_call_and_does_not_excuse_a_missing_one(queue):
    head = queue.post([b"x"])
    assert not queue.wait(0.01)
    os.eventfd_write(queue.call_fd, 1)  # a spurious call is no used chain
    assert not queue.wait(0.01)
    use(queue, head)
    assert queue.wait(0)
    assert queue.collect().head == head


def test_wish_for_calls(memory):
    with DriverQueue(memory, 8, 1 << EVENT_IDX, base=0xFFFF) as queue:
        assert not queue.ring.want_calls(3)
        assert queue.ring.avail.used_event == 1
        queue.ring.refuse_calls()
        assert queue.ring.avail.used_event == 0xFFFE
        assert queue.ring.avail.flags == 0  # 2.7.7.1: must be with EVENT_IDX
    with DriverQueue(memory, 8) as queue:
        queue.ring.refuse_calls()
        assert queue.ring.avail.flags == 1
        queue.ring.want_calls()
        assert queue.ring.avail.flags == 0
