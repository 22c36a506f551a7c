"""Which bits of the dirty log are set by which step, and what is refused or bounded.

test_ring_dirty_oracle.py compares with what really changed.
"""

import contextlib
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ring.dirty import PAGE, DirtyLog
from ring.driver import Buffer, DriverQueue, GuestMemory
from ring.errors import MemoryGone, SetupError
from ring.journal import Journal
from ring.pump import LaneEvent
from ring.virtqueue import Chain, VirtQueue
from vdev.net.features import Feature, mask
from vdev.testing.dirty import FrontEndLog, changed, covering, log_all, logged, pages, written_parts
from vdev.testing.netdriver import NetHeader
from vdev.testing.rig import ENGINES, USUAL, DeviceSide, assert_serves, pumped

PACKED = mask(Feature.RING_PACKED)
EVENT_IDX = mask(Feature.EVENT_IDX)
FORMATS = pytest.mark.parametrize("ring", [0, PACKED], ids=["split", "packed"])
DATA = 0x11_0000  # a page for buffers
USED = 0x17_F000  # a page far from where the used ring is


def served(driver: DriverQueue, queue: VirtQueue, *buffers: Buffer) -> Chain:
    """Offer these, let the device take them."""
    driver.add(buffers)
    driver.publish()
    return queue.pop()


def use(driver: DriverQueue, queue: VirtQueue, log: FrontEndLog) -> tuple[set[int], set[int]]:
    """One chain through the ring -> the pages marked by its push, and by its publication."""
    queue.push(served(driver, queue, Buffer(DATA, 1, True)))
    pushed = log.take()
    queue.publish()
    driver.collect_all()
    return pushed, log.take()


# ----------------------------------------------------------------------------------------- which bits, exactly


@pytest.mark.parametrize("gpa, length, marked", [
    (DATA, 1, {0x110}), (DATA + 0xFFF, 1, {0x110}), (DATA + 0xFFF, 2, {0x110, 0x111}),
    (DATA, 0x1000, {0x110}), (DATA + 1, 0x1000, {0x110, 0x111}),
    (DATA + 0x800, 0x11000, set(range(0x110, 0x122)))])
@pytest.mark.parametrize("offset", [0, 1, PAGE - 1, 5 * PAGE + 3])
def test_P91_and_VU_LOG_B_02_05_exactly_the_pages_written(offset, gpa, length, marked):
    with logged(offset=offset) as (driver, queue, log):
        chain = served(driver, queue, Buffer(gpa, length, True))
        assert log.take() == set()  # looking changes nothing
        assert chain.write(b"x" * (length + 9)) == length
        assert log.log.marked() == marked
        assert log.take() == marked
        assert (log.take(), log.log.skipped) == (set(), 0)


def test_VU_LOG_B_05_place_of_a_bit_in_the_file():
    with logged(offset=7) as (driver, queue, log):
        served(driver, queue, Buffer(0x11_3000, 1, True)).write(b"x")
        assert os.pread(log.fd, 1, 7 + 0x113 // 8) == bytes([1 << 3])


def test_only_as_many_bytes_as_were_written():
    with logged() as (driver, queue, log):
        chain = served(driver, queue, Buffer(DATA, 3 * PAGE, True), Buffer(DATA + 8 * PAGE, 3 * PAGE, True))
        for offset, data, marked in ((0, b"", set()), (0, b"x", {0}), (PAGE, b"x" * PAGE, {1}), (6 * PAGE, b"x", set()),
                                     (3 * PAGE - 1, b"xx", {2, 8}), (5 * PAGE, b"x" * 2 * PAGE, {10})):
            chain.write(data, offset)
            assert log.take() == {DATA // PAGE + page for page in marked}, (offset, len(data))


@pytest.mark.parametrize("used", [USED, 0, 0x1234_5000], ids=hex)
def test_VU_LOG_B_03_04_split_used_ring_at_its_own_address(used):
    """It need not be in guest memory."""
    with logged(1024, used=used, log=1 << 14) as (driver, queue, log):
        for entry in range(1024):
            assert use(driver, queue, log) == (pages((used + 4 + 8 * entry, 8)), pages((used + 2, 2))), entry
        queue.publish()
        queue.decide()
        assert log.take() == set()  # nothing new, nothing written
        queue.disarm()
        queue.arm()
        assert log.take() == pages((used, 2))


def test_split_avail_event_is_the_last_field_of_the_used_ring():
    with logged(512, EVENT_IDX, used=USED) as (_, queue, log):
        queue.arm()
        assert log.take() == pages((USED + 4 + 8 * 512, 2)) == {USED // PAGE + 1}
        queue.disarm()  # with EVENT_IDX it writes nothing
        assert log.take() == set()


@pytest.mark.parametrize("features", [0, EVENT_IDX], ids=["flags", "event_idx"])
def test_VU_LOG_B_03_04_packed_ring_where_it_is_and_its_event_structure_at_the_address(features):
    """2.8.14, 2.8.13: the device writes descriptors, and its own event suppression structure."""
    with logged(1024, features | PACKED, used=USED) as (driver, queue, log):
        ring = driver.ring.areas[0].gpa
        for entry in range(1024):
            assert use(driver, queue, log) == (pages((ring + 16 * entry, 16)),) * 2, entry
        queue.arm()
        assert log.take() == pages((USED, 4))
        queue.disarm()
        assert log.take() == (set() if features else pages((USED, 4)))


@FORMATS
def test_buffers_and_ring_are_switched_one_by_one(ring):
    """VHOST_F_LOG_ALL and VHOST_VRING_F_LOG come and go in requests of their own."""
    with logged(8, ring) as (driver, queue, log):
        for buffers, used, on in [(b, u, o) for b in (True, False) for u in (USED, None) for o in (True, False)]:
            queue.log(log.log if on else None, used=used, buffers=buffers)
            chain = served(driver, queue, Buffer(DATA, 9, True))
            chain.write(b"data")
            assert log.take() == (pages((DATA, 9)) if on and buffers else set())
            queue.push(chain, 4)
            queue.publish()
            queue.arm()
            descriptors = pages(driver.ring.areas[0]) if ring else set()
            assert log.take() == (descriptors | {USED // PAGE} if on and used else set())


def test_memory_table_replaced():
    """Addresses are those of the new table, the packed ring's own included."""
    with (GuestMemory(1 << 20, gpa=1 << 20) as memory, DeviceSide(memory) as side,
          DriverQueue(memory, 8, PACKED) as driver):
        moved = [side.owner.map(r.fd, r.gpa + (1 << 20), r.uva, r.size, r.offset) for r in memory.regions]
        table = side.owner.table(moved)
        queue = side.queue(driver)
        with FrontEndLog(2 * covering(memory)) as log:
            queue.log(log.log, used=USED)
            queue.move(table)
            chain = served(driver, queue, Buffer(DATA + (1 << 20), 9, True))
            chain.write(b"data")
            assert log.take() == pages((DATA + (1 << 20), 9))
            queue.push(chain, 4)
            assert log.take() == pages((driver.ring.areas[0].gpa + (1 << 20), 16))
            queue.close()
        table.close()
        for mapping in moved:
            mapping.close()


def test_closed_queue_marks_nothing():
    with logged() as (driver, queue, log):
        chain = served(driver, queue, Buffer(DATA, 9, True))
        queue.close()
        chain.write(b"data")
        assert log.take() == set()


# ------------------------------------------------------------------------------- of a predecessor that died


class Successors:
    """The processes that serve ring 0 of ``driver`` one after the other, each ending without being asked."""

    def __init__(self, driver: DriverQueue, path: Path) -> None:
        self._driver, self._path = driver, str(path / "journal")
        self._base = driver.base

    @contextlib.contextmanager
    def next(self) -> Iterator[tuple[VirtQueue, Callable[[], object]]]:
        """Its queue, and what takes the ring over."""
        journal = Journal(self._path, 1)
        with DeviceSide(self._driver.memory) as side:
            queue = side.queue(self._driver, base=self._base)
            yield queue, lambda: journal.take_over(0, queue, self._base)
        journal.close()


@pytest.mark.parametrize("log_first", [True, False], ids=["log, ring", "ring, log"])
@FORMATS
def test_F07_VU_LOG_B_02_what_a_killed_device_left_unmarked_is_marked(ring, log_first, tmp_path):
    """What it stored last, and of a packed ring what its successor puts back. QEMU starts rings before it sends the
    log; others may not."""
    with (GuestMemory(1 << 20, gpa=1 << 20) as memory, DriverQueue(memory, 8, ring) as driver,
          FrontEndLog(covering(memory)) as log):
        lives = Successors(driver, tmp_path)
        with lives.next() as (queue, take_over):
            take_over()
            chains = [served(driver, queue, Buffer(DATA, 9, True)) for _ in range(2)]
            for chain in chains:  # and dies before it publishes, and before any mark
                queue.push(chain, 4)
        before = memory.snapshot()
        with lives.next() as (queue, take_over):
            if log_first:
                queue.log(log.log, used=driver.ring.areas[2].gpa)
                assert log.take() == set()
                take_over()
            else:
                take_over()
                queue.log(log.log, used=driver.ring.areas[2].gpa)
            put_right = changed(memory, before)
            assert bool(put_right) == bool(ring)
            assert put_right <= pages(*written_parts(driver)) == log.take()
            queue.log(log.log, used=driver.ring.areas[2].gpa)
            assert log.take() == set()  # once
            assert [queue.pop().writable_len for _ in chains] == [9, 9]


def test_ring_begun_where_nobody_died_marks_nothing(tmp_path):
    with logged(8, PACKED) as (driver, queue, log), contextlib.closing(Journal(str(tmp_path / "j"), 1)) as journal:
        journal.take_over(0, queue, driver.base)
        assert log.take() == set()


@FORMATS
def test_log_truncated_under_a_takeover(ring):
    """With no journal it is not known whether somebody died."""
    for log_first in (True, False):
        with logged(8, ring) as (driver, queue, log):
            if not log_first:
                queue.log(None)
                queue.take_over()
            log.truncate()
            if log_first:
                with pytest.raises(MemoryGone, match="^the dirty log vanished"):
                    queue.take_over()
            else:
                queue.log(log.log, used=USED)
            assert queue.state.broken.code == "RING_E_LOG_GONE"


# ------------------------------------------------------------------------------------------ what is no log


@contextlib.contextmanager
def file_of(size: int) -> Iterator[int]:
    """A memfd of ``size`` bytes."""
    fd = os.memfd_create("dirty-log", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        yield fd
    finally:
        os.close(fd)


def resources() -> tuple[int, int]:
    """How many mappings and descriptors this process has."""
    with open("/proc/self/maps", encoding="utf-8") as lines:
        return sum(1 for _ in lines), len(os.listdir("/proc/self/fd"))


def assert_refused(text: str, fd: int, size: int = PAGE, offset: int = 0) -> None:
    before = resources()
    with pytest.raises(SetupError, match=text) as caught:
        DirtyLog(fd, size, offset)
    assert str(caught.value).startswith("dirty log: ")
    assert "\n" not in str(caught.value) and "region" not in str(caught.value)
    assert resources() == before


@pytest.mark.parametrize("size, offset", [(0, 0), (0, PAGE), (1 << 63, 0), (PAGE, 1 << 63), ((1 << 64) - 1, 1),
                                          ((1 << 64) - 1, (1 << 64) - 1)])
def test_P87_size_or_offset_that_makes_no_sense(size, offset):
    with file_of(PAGE) as fd:
        assert_refused("makes no sense", fd, size, offset)


@pytest.mark.parametrize("size, offset", [(PAGE + 1, 0), (PAGE, 1), (1, PAGE), (PAGE, 1 << 40)])
def test_P88_file_shorter_than_the_log(size, offset):
    with file_of(PAGE) as fd:
        assert_refused(f"its file has 0x1000 bytes, the log needs {size + offset:#x}", fd, size, offset)


def test_P90_log_that_cannot_be_mapped():
    near, far = socket.socketpair()
    with near, far, file_of(PAGE) as fd:
        assert_refused("is no regular file", near.fileno())
        read_only = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
        try:
            assert_refused("not open for reading and writing", read_only)
        finally:
            os.close(read_only)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        assert_refused("cannot be mapped .*sealed against writing", fd)
    with file_of(1 << 47) as fd:  # sparse; more than the address space holds
        assert_refused("cannot be mapped", fd, 1 << 47)


def test_descriptor_may_be_closed_once_it_is_mapped():
    with file_of(1 << 16) as fd, logged() as (driver, queue, _):
        copy = os.dup(fd)
        log = DirtyLog(copy, 1 << 16)
        os.close(copy)
        queue.log(log, used=USED)
        served(driver, queue, Buffer(DATA, 1, True)).write(b"x")
        assert log.marked() == {DATA // PAGE}
        queue.log(None)
        log.close()


def test_P92_log_after_log():
    """Each replaces the one before, whose mapping goes; no descriptor is kept."""
    with logged() as (driver, queue, first):
        before = resources()
        for _ in range(50):
            with FrontEndLog(covering(driver.memory)) as log:
                queue.log(log.log, used=USED)
                assert use(driver, queue, log) == ({USED // PAGE},) * 2
                queue.log(None)
        assert resources() == before
        assert first.take() == set()


# ----------------------------------------------------------------------------------------- where the log ends


@pytest.mark.parametrize("size", [1, 0x21, 0x22, 0x23, 0x24])
def test_P89_log_too_small_for_the_highest_page(size):
    """What is beyond it is skipped and counted, what is inside is marked."""
    at, length = 0x10_6800, 0x11000
    with logged(log=size, used=0) as (driver, queue, log):
        chain = served(driver, queue, Buffer(at, length, True))
        chain.write(b"x" * length)
        inside = {page for page in pages((at, length)) if page < 8 * size}
        assert log.take() == inside
        assert log.log.skipped == 0x12 - len(inside)
        queue.push(chain, length)
        queue.publish()
        assert log.take() == {0}  # the used ring's


@pytest.mark.parametrize("used", [(1 << 64) - 1, (1 << 64) - 3, (1 << 64) - 5, (1 << 64) - 12, (1 << 64) - 0x1000,
                                  64 * 8 * PAGE, 1 << 63], ids=hex)
def test_P93_used_ring_logged_beyond_the_log(used):
    """Nor does it come round to page 0."""
    with logged(log=64, used=used) as (driver, queue, log):
        assert use(driver, queue, log) == (set(), set())
        assert log.log.skipped == 2
        queue.arm()
        assert log.take() == set()
        assert log.log.skipped == 3


def test_P93_used_ring_logged_across_the_end_of_the_log():
    end = 64 * 8 * PAGE
    with logged(512, log=64, used=end - PAGE) as (driver, queue, log):
        for _ in range(512):
            queue.push(served(driver, queue, Buffer(DATA, 1, True)))
        assert log.take() == {end // PAGE - 1}
        assert log.log.skipped == 1  # the last entry lies on both sides


# ---------------------------------------------------------------------------------------- a log that vanishes


@FORMATS
def test_log_truncated_under_the_steps(ring):
    """The device must not go on as if it logged. It says that it was the log, not guest memory."""
    with logged(8, ring) as (driver, queue, log):
        chain = served(driver, queue, Buffer(DATA, 9, True))
        log.truncate()
        with pytest.raises(MemoryGone, match="^the dirty log vanished: its file was truncated") as caught:
            chain.write(b"data")
        assert caught.value.code == "RING_E_LOG_GONE"
        for verb in (lambda: queue.push(chain, 4), queue.publish, queue.see, log.log.marked):
            with pytest.raises(MemoryGone, match="dirty log"):
                verb()
        assert log.log.gone and queue.state.broken.code == "RING_E_LOG_GONE"


@pytest.mark.parametrize("serve", ENGINES.values(), ids=ENGINES.keys())
@FORMATS
def test_log_truncated_under_an_engine(serve, ring):
    """The device is lost and says why; neither its memory nor the guest beside it is blamed."""
    with (pumped() as (neighbour, beside), serve(USUAL | ring, attach=False) as (driver, device),
          FrontEndLog(covering(driver.memory)) as log):
        log_all(device, driver, log.log)
        driver.fill(4)
        log.truncate()
        device.send(NetHeader().pack())
        device.attach()
        assert device.events() == LaneEvent.LOG_GONE
        device.detach()
        assert log.log.gone and not device.side.owner.gone
        queues = (device.config.from_guest.queue, device.config.to_guest.queue)
        assert "RING_E_LOG_GONE" in {queue.state.broken.code for queue in queues if queue.state.broken}
        assert_serves(neighbour, beside)


def test_log_of_several_queues_counts_once_for_all():
    """What one queue skips and another one skips is one number."""
    with logged(log=1) as (driver, queue, log), DriverQueue(driver.memory, 8) as other, \
            DeviceSide(driver.memory) as side:
        second = side.queue(other)
        second.log(log.log)
        for half, chains in ((driver, queue), (other, second)):
            served(half, chains, Buffer(DATA, 1, True)).write(b"x")
        assert log.log.skipped == 2
