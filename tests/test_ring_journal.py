"""The journal's file: whose it is, what it is about, and when it says nothing."""

import contextlib
import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from ring.build import ffi
from ring.driver import DriverQueue, GuestMemory
from ring.errors import RingBroken
from ring.journal import Journal, JournalError
from ring.virtqueue import Takeover
from vdev.net.features import Feature, mask
from vdev.testing.rig import DeviceSide

PACKED = mask(Feature.VERSION_1, Feature.RING_PACKED)
FRESH = 0x80008000
RINGS = 4


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory(1 << 16) as made:
        yield made


@pytest.fixture
def driver(memory: GuestMemory) -> Iterator[DriverQueue]:
    with DriverQueue(memory, 8, PACKED) as made:
        yield made


def serve(path: Path, memory: GuestMemory, driver: DriverQueue, ring: int = 1, chains: int = 1) -> Takeover:
    """One process's life: take the ring over, serve ``chains`` chains, end."""
    journal = Journal(str(path), RINGS)
    with DeviceSide(memory) as side:
        queue = side.queue(driver, base=FRESH)
        found = journal.take_over(ring, queue, FRESH)
        for _ in range(chains):
            driver.post(readable=[b"chain"])
            driver.publish()
            queue.push(queue.pop())
            queue.publish()
            assert driver.collect() is not None
    journal.close()
    return found


def test_the_next_process_goes_on(path: Path, memory: GuestMemory, driver: DriverQueue) -> None:
    assert serve(path, memory, driver, chains=3) == Takeover(False, 0)
    for _ in range(12):  # no two rounds, after which it would stand at the base again
        assert serve(path, memory, driver).by_journal


@pytest.mark.parametrize("seed", range(4))
def test_whatever_journal_and_ring_hold_the_ring_is_taken_over_or_refused(path: Path, memory: GuestMemory,
                                                                          driver: DriverQueue, seed: int) -> None:
    """Neither a driver nor a broken file makes a takeover loop, or store beside what it puts back."""
    chance = random.Random(seed)
    descriptors = driver.ring.areas[0]
    header, line = 64, ffi.sizeof("struct journal_line")
    serve(path, memory, driver)
    with contextlib.closing(Journal(str(path), RINGS)) as journal, DeviceSide(memory) as side, \
            open(path, "r+b", buffering=0) as file:
        answers = set()
        for _ in range(500):
            for slot in range(8):
                flags = chance.choice((0, 0x80, 0x8000, 0x8080))
                memory.write(descriptors.gpa + 16 * slot + 14, struct.pack("<H", flags))
            for field, packed in ((8, struct.pack("<Q", chance.choice((chance.getrandbits(33), near(chance))))),
                                  (16, struct.pack("<Q", chance.choice((0, 1 << 32)) | near(chance))),
                                  (24, struct.pack("<I", near(chance) & 0xFFFF))):
                os.pwrite(file.fileno(), packed, header + line + field)
            for slot in range(8):
                os.pwrite(file.fileno(), struct.pack("<QII", chance.getrandbits(64), 5, chance.choice((0, 1, 2, 9))),
                          header + line + 64 + 16 * slot)
            before = memory.snapshot()
            queue = side.queue(driver, base=(chance.randrange(8) | chance.choice((0, 0x8000))) * 0x10001)
            try:
                answers.add(journal.take_over(1, queue, FRESH).by_journal)
                queue.arm()
            except RingBroken:
                answers.add(None)
            for region, old, new in zip(memory.regions, before, memory.snapshot(), strict=True):
                start = descriptors.gpa - region.gpa
                assert new[:start] == old[:start]
                assert all(new[at:at + 8] == old[at:at + 8] for at in range(start, start + descriptors.len, 16))
        assert answers >= {False, None}


def near(chance: random.Random) -> int:
    """Two places of a ring of 8, as a line has them."""
    return chance.randrange(9) | chance.choice((0, 0x8000)) | (chance.randrange(9) | chance.choice((0, 0x8000))) << 16


def test_each_ring_has_its_line(path: Path, memory: GuestMemory, driver: DriverQueue) -> None:
    with DriverQueue(memory, 4, PACKED) as other:
        serve(path, memory, driver, ring=0, chains=3)
        serve(path, memory, other, ring=3, chains=2)
        assert serve(path, memory, driver, ring=0).by_journal
        assert serve(path, memory, other, ring=3).by_journal


def unknown(path: Path, memory: GuestMemory, driver: DriverQueue) -> None:
    """The line of this ring is not believed: nothing but the base, which the ring contradicts."""
    with pytest.raises(Exception, match="no journal that fits"):
        serve(path, memory, driver, chains=0)


def test_a_file_of_another_boot_says_nothing(path: Path, memory: GuestMemory, driver: DriverQueue,
                                             monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    serve(path, memory, driver)
    other = tmp_path / "boot_id"
    other.write_text("01234567-89ab-cdef-0123-456789abcdef\n")
    monkeypatch.setattr("ring.journal._BOOT_ID", other)
    unknown(path, memory, driver)


@pytest.mark.parametrize("content", [b"", b"x", b"vdevring\x02\0\0\0" + bytes(100), b"\xff" * 4096])
def test_a_file_that_is_no_journal_starts_anew(path: Path, memory: GuestMemory, driver: DriverQueue,
                                               content: bytes) -> None:
    path.write_bytes(content)
    assert serve(path, memory, driver) == Takeover(False, 0)
    assert serve(path, memory, driver).by_journal


def test_the_ring_of_another_guest_is_another_ring(path: Path, memory: GuestMemory, driver: DriverQueue) -> None:
    """Same addresses, same size, other memory."""
    serve(path, memory, driver)
    with GuestMemory(1 << 16) as theirs, DriverQueue(theirs, 8, PACKED) as other:
        assert [area.gpa for area in other.ring.areas] == [area.gpa for area in driver.ring.areas]
        assert serve(path, theirs, other) == Takeover(False, 0)


def test_what_was_forgotten_is_unknown(path: Path, memory: GuestMemory, driver: DriverQueue) -> None:
    serve(path, memory, driver)
    keeper = os.open(path, os.O_RDONLY)
    journal = Journal(str(path), RINGS)
    journal.forget(1)
    journal.forget(2)  # of which nothing is known
    journal.close()
    os.close(keeper)
    assert not path.exists()
    unknown(path, memory, driver)


def test_the_file_stays_as_long_as_it_is_of_use(path: Path, memory: GuestMemory, driver: DriverQueue) -> None:
    Journal(str(path), RINGS).close()
    assert not path.exists()
    serve(path, memory, driver)
    assert path.exists() and path.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_blocks * 512 <= 64 << 10  # the rest are holes


def test_more_rings_than_before(path: Path, memory: GuestMemory, driver: DriverQueue) -> None:
    serve(path, memory, driver)
    journal = Journal(str(path), 4 * RINGS)
    with DriverQueue(memory, 8, PACKED) as other, DeviceSide(memory) as side:
        assert journal.take_over(4 * RINGS - 1, side.queue(other, base=FRESH), FRESH) == Takeover(False, 0)
    journal.close()
    assert serve(path, memory, driver).by_journal


def test_one_writer(path: Path) -> None:
    first = Journal(str(path), RINGS)
    with pytest.raises(JournalError, match="another process writes it; two vdev on one socket path"):
        Journal(str(path), RINGS)
    first.close()


def test_a_link_is_not_followed(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("data")
    path.symlink_to(target)
    with pytest.raises(JournalError, match="cannot be opened"):
        Journal(str(path), RINGS)
    assert target.read_text() == "data"


def test_what_is_no_file_of_ours_is_left_alone(path: Path) -> None:
    os.mkfifo(path)
    with pytest.raises(JournalError, match="no file of ours; remove it"):
        Journal(str(path), RINGS)


def test_no_room_is_an_error_and_no_signal(path: Path, memory: GuestMemory, driver: DriverQueue,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(str(path), RINGS)

    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with DeviceSide(memory) as side, pytest.raises(JournalError, match="No space left on device"):
        journal.take_over(0, side.queue(driver, base=FRESH), FRESH)
    journal.close()
