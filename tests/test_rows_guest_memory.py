"""Rows P39 to P60 of docs/conformance/messages.tsv: what a hostile front-end shares as guest memory.

Over a real socket, to a daemon that serves on after each test and holds no more than before (tests/conftest.py).
"""

import contextlib
import fcntl
import os
import select
import socket
import subprocess
from collections.abc import Iterator

import pytest

from ring.driver import Extent, GuestMemory
from vdev.testing.kept import FRAME, WAIT, KeptDaemon, arrives, ends, readable, refused
from vdev.testing.scripted import ScriptedGuest, shared_regions
from vhost_user.codec import encode
from vhost_user.frontend import SharedRegion
from vhost_user.spec import Request
from vhost_user.wire import MEM_TABLE, SINGLE_REGION, MemTable, Region

pytestmark = pytest.mark.timeout(180)

PAGE = 4096
UVA = 0x7F00_0000_0000  # any


@contextlib.contextmanager
def memfd(size: int, flags: int = os.MFD_CLOEXEC) -> Iterator[int]:
    """A memfd of ``size`` bytes."""
    fd = os.memfd_create("region", flags)
    try:
        os.ftruncate(fd, size)
        yield fd
    finally:
        os.close(fd)


def table(*regions: Region) -> bytes:
    """The payload of SET_MEM_TABLE."""
    return MEM_TABLE.encode(MemTable(regions))


def refuses_region(daemon: KeptDaemon, region: Region, fd: int) -> None:
    """Whichever way it comes."""
    daemon.refuses(Request.SET_MEM_TABLE, table(region), [fd])
    daemon.refuses(Request.ADD_MEM_REG, SINGLE_REGION.encode(region), [fd])


def test_P39_P40_impossible_numbers_of_regions(daemon) -> None:
    with memfd(PAGE) as fd:
        for count in (0, 9, 0x10000, 0xFFFFFFFF):
            regions = b"".join(table(Region(n * PAGE, PAGE, UVA + n * PAGE, 0))[8:] for n in range(8))
            daemon.refuses(Request.SET_MEM_TABLE, count.to_bytes(4, "little") + bytes(4) + regions, [fd] * 8)
        daemon.refuses(Request.SET_MEM_TABLE, bytes(8))


def test_P42_table_that_is_not_as_long_as_its_count_says(daemon) -> None:
    whole = table(Region(0, PAGE, UVA, 0), Region(PAGE, PAGE, UVA + PAGE, 0))
    with memfd(PAGE) as fd:
        for payload in (whole[:-1], whole + bytes(1), whole[:-32], whole + bytes(31), whole + bytes(7 * 32)):
            daemon.refuses(Request.SET_MEM_TABLE, payload, [fd] * 2)


def test_P43_P44_P45_impossible_regions(daemon) -> None:
    top = 1 << 64
    with memfd(2 * PAGE) as fd:
        for region in (Region(0, 0, UVA, 0),
                       Region(0, PAGE, UVA, top - PAGE), Region(0, PAGE, UVA, (1 << 63) - PAGE),
                       Region(0, PAGE, UVA, (1 << 63) - 2 * PAGE + 1), Region(0, top - 1, UVA, PAGE),
                       Region(top - PAGE, 2 * PAGE, UVA, 0), Region(0, PAGE, top - PAGE + 1, 0),
                       Region(top - 1, PAGE, UVA, 0)):
            refuses_region(daemon, region, fd)


def test_P46_regions_that_overlap(daemon) -> None:
    first = Region(0x10000, 4 * PAGE, UVA, 0)
    others = [Region(gpa, size, uva, 0) for gpa, size, uva in (
        (0x10000, 4 * PAGE, 1 << 32), (0x10000 + PAGE, PAGE, 1 << 32), (0x10000 - PAGE, 6 * PAGE, 1 << 32),
        (1 << 40, 4 * PAGE, UVA), (1 << 40, PAGE, UVA + 3 * PAGE), (1 << 40, 2 * PAGE, UVA - PAGE))]
    with memfd(8 * PAGE) as fd:
        for other in others:
            daemon.refuses(Request.SET_MEM_TABLE, table(first, other), [fd, fd])
            daemon.refuses(Request.ADD_MEM_REG, SINGLE_REGION.encode(other), [fd],
                           then=lambda front_end: front_end.add_mem_reg(shared(fd, first)))


def shared(fd: int, region: Region) -> SharedRegion:
    """A region as the front-end's half takes it."""
    return SharedRegion(fd, region.gpa, region.uva, region.size, region.offset)


def test_P47_file_shorter_than_the_region(daemon) -> None:
    with memfd(PAGE) as fd:
        for region in (Region(0, PAGE + 1, UVA, 0), Region(0, PAGE, UVA, PAGE), Region(0, 1, UVA, 1 << 40)):
            refuses_region(daemon, region, fd)


def test_F25_P48_file_truncated_later(daemon) -> None:
    with ScriptedGuest.connect(daemon.bystander) as bystander:
        guest = ScriptedGuest.connect(daemon.path)
        guest.front_end.timeout = WAIT
        assert guest.exchange(FRAME, WAIT) == FRAME
        guest.memory.truncate()
        os.eventfd_write(guest.driver.transmitq.kick_fd, 1)
        assert guest.front_end.closed()
        assert bystander.exchange(FRAME, WAIT) == FRAME
        guest.close()


def test_P49_descriptor_that_is_no_file(daemon) -> None:
    with contextlib.ExitStack() as stack:
        a_socket, epoll = stack.enter_context(socket.socket()), stack.enter_context(select.epoll())
        fds = [*os.pipe(), os.eventfd(0), os.open("/dev/shm", os.O_RDONLY), os.open("/dev/zero", os.O_RDWR),
               os.open("/dev/null", os.O_RDWR)]
        for fd in fds:
            stack.callback(os.close, fd)
        for fd in (*fds, a_socket.fileno(), epoll.fileno()):
            refuses_region(daemon, Region(0, PAGE, UVA, 0), fd)


def test_P50_file_that_must_not_be_written(daemon) -> None:
    with memfd(PAGE) as fd:
        reading = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
        refuses_region(daemon, Region(0, PAGE, UVA, 0), reading)
        os.close(reading)
    with memfd(PAGE, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING) as fd:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        refuses_region(daemon, Region(0, PAGE, UVA, 0), fd)


def test_P51_file_system_whose_pages_may_never_arrive(daemon, tmp_path) -> None:
    kind = subprocess.run(["stat", "-f", "-c", "%T", tmp_path], capture_output=True, text=True, check=True).stdout
    if kind.strip() in ("tmpfs", "hugetlbfs"):
        pytest.skip(f"{tmp_path} lies on {kind.strip()}, and this needs a file that does not")
    with (tmp_path / "region").open("w+b") as file:
        file.truncate(PAGE)
        refuses_region(daemon, Region(0, PAGE, UVA, 0), file.fileno())


def test_P52_more_memory_than_is_accepted(daemon) -> None:
    """A sparse file may be as large as one likes."""
    size = 64 << 40
    with memfd(size) as fd:
        refuses_region(daemon, Region(0, size, UVA, 0), fd)
        half = 3 << 40  # one is accepted, two are not
        daemon.refuses(Request.ADD_MEM_REG, SINGLE_REGION.encode(Region(1 << 44, half, 1 << 46, 0)), [fd],
                       then=lambda front_end: front_end.add_mem_reg(shared(fd, Region(0, half, 0, 0))))


@pytest.mark.parametrize("offset", [1, PAGE - 1, PAGE + 24, 0x100000])
def test_P53_region_at_any_offset_of_its_file(daemon, offset) -> None:
    with memfd(offset + PAGE) as fd, daemon.agreed() as front_end:
        region = SINGLE_REGION.encode(Region(0, PAGE, UVA, offset))
        assert not refused(front_end, Request.ADD_MEM_REG, region, [fd])
    memory = GuestMemory(extents=[Extent(0x4000_0000, 1 << 20, offset=offset & ~0xF)])
    with ScriptedGuest.connect(daemon.path, size=16, memory=memory) as guest:
        assert guest.exchange(FRAME, WAIT) == FRAME


def test_P54_several_regions_of_one_file(daemon) -> None:
    with memfd(8 * PAGE) as fd, ScriptedGuest.connect(daemon.path) as guest:
        (own,) = shared_regions(guest.memory)
        regions = [own.region, *(Region(n * PAGE, PAGE, UVA + n * PAGE, n * PAGE) for n in range(7))]
        assert not refused(guest.front_end, Request.SET_MEM_TABLE, table(*regions), [own.fd] + [fd] * 7)
        assert guest.exchange(FRAME, WAIT) == FRAME


@pytest.mark.parametrize("position", [0, 3, 6])
def test_P57_table_of_which_one_region_cannot_be_mapped(daemon, position) -> None:
    with ScriptedGuest.connect(daemon.path) as guest, memfd(PAGE) as good, memfd(1) as short:
        regions = [Region(n * PAGE, PAGE, UVA + n * PAGE, 0) for n in range(7)]
        fds = [good] * 7
        fds[position] = short
        before = daemon.holding
        for _ in range(3):
            assert refused(guest.front_end, Request.SET_MEM_TABLE, table(*regions), fds)
        assert (daemon.holding.fds, daemon.holding.mappings) == (before.fds, before.mappings)
        assert guest.exchange(FRAME, WAIT) == FRAME


def test_P59_region_that_is_not_there(daemon) -> None:
    region = Region(0, PAGE, UVA, 0)
    daemon.refuses(Request.REM_MEM_REG, SINGLE_REGION.encode(region))
    with memfd(PAGE) as fd:
        other = SINGLE_REGION.encode(Region(0, 2 * PAGE, UVA, 0))
        daemon.refuses(Request.REM_MEM_REG, other, [fd],
                       then=lambda front_end: front_end.add_mem_reg(shared(fd, region)))


def test_P59_region_of_a_live_ring(daemon) -> None:
    """Removed with a descriptor, as old front-ends do: that is closed, the ring stops and its err eventfd tells."""
    with ScriptedGuest.connect(daemon.path) as guest:
        assert guest.exchange(FRAME, WAIT) == FRAME
        (region,) = shared_regions(guest.memory)
        error = os.eventfd(0, os.EFD_NONBLOCK)
        guest.front_end.set_vring_err(1, error, need_reply=True)
        before = daemon.holding
        assert not refused(guest.front_end, Request.REM_MEM_REG, SINGLE_REGION.encode(region.region), [region.fd])
        assert readable(error)
        assert (daemon.holding.mappings, daemon.holding.fds) == (0, before.fds)
        guest.driver.transmit(FRAME)
        assert guest.driver.receive_within(0.05) is None
        guest.front_end.add_mem_reg(region, need_reply=True)
        for index, queue in enumerate((guest.driver.receiveq, guest.driver.transmitq)):
            guest.front_end.set_vring_base(index, guest.front_end.get_vring_base(index), need_reply=True)
            guest.front_end.set_vring_kick(index, queue.kick_fd, need_reply=True)
        assert arrives(guest.driver) == FRAME
        os.close(error)


@pytest.mark.parametrize("count", [1000, pytest.param(100_000, marks=pytest.mark.long)])
def test_P60_regions_added_and_removed(daemon, count) -> None:
    with memfd(PAGE) as fd, daemon.agreed() as front_end:
        region = shared(fd, Region(0, PAGE, UVA, 0))
        front_end.add_mem_reg(region)
        before = daemon.holding
        for number in range(count):
            front_end.add_mem_reg(shared(fd, Region(PAGE, PAGE, UVA + PAGE, 0)), need_reply=number % 16 == 15)
            front_end.rem_mem_reg(shared(fd, Region(PAGE, PAGE, UVA + PAGE, 0)), need_reply=number % 16 == 15)
        assert front_end.get_features()
        after = daemon.holding
        assert (after.fds, after.mappings, after.threads) == (before.fds, before.mappings, before.threads)


def test_P60_one_region_is_not_added_without_end(daemon) -> None:
    """QEMU before 8.0 adds all of memory once for each queue pair; a region is not counted beyond the rings."""
    with memfd(PAGE) as fd, daemon.agreed() as front_end:
        region = Region(0, PAGE, UVA, 0)
        for _ in range(2):
            front_end.add_mem_reg(shared(fd, region))
        assert refused(front_end, Request.ADD_MEM_REG, SINGLE_REGION.encode(region), [fd])
        assert ends(front_end, encode(Request.ADD_MEM_REG, SINGLE_REGION.encode(region)), [fd])
