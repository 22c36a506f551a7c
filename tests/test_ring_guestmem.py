"""Guest memory on the device's side: what is accepted, how ranges translate, and what happens when it vanishes."""

import contextlib
import fcntl
import mmap
import os
import shutil
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ring.build import ffi, lib
from ring.driver import Buffer, DriverQueue, Extent, GuestMemory
from ring.driver_parts import DESC_F_INDIRECT, DESC_F_WRITE, INDIRECT_DESC
from ring.errors import MemoryGone, SetupError
from ring.guestmem import Owner, Policy
from vdev.testing.rig import DeviceSide, joined

PAGE = mmap.PAGESIZE
INDIRECT = 1 << INDIRECT_DESC


@contextlib.contextmanager
def file_of(size: int):
    """A memfd of ``size`` bytes."""
    fd = os.memfd_create("guest-memory", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        yield fd
    finally:
        os.close(fd)


def maps() -> int:
    """How many mappings this process has."""
    with open("/proc/self/maps", encoding="utf-8") as lines:
        return sum(1 for _ in lines)


def assert_refused(text: str, fd: int, size: int = PAGE, offset: int = 0, **policy: object) -> None:
    before = maps()
    with pytest.raises(SetupError, match=text) as caught:
        Owner().map(fd, 0x7000, 0, size, offset, Policy(**policy))
    assert str(caught.value).startswith("memory region at 0x7000: ")
    assert maps() == before


# ---------------------------------------------------------------------------------------- what is accepted


@pytest.mark.parametrize("size, offset", [(2 * PAGE, 0), (PAGE, 1), (1, PAGE), (PAGE, 1 << 40)])
def test_P47_file_shorter_than_the_region(size, offset):
    with file_of(PAGE) as fd:
        assert_refused(f"its file has 0x1000 bytes, the region needs {offset + size:#x}", fd, size, offset)


@pytest.mark.parametrize("size, offset", [(0, 0), (1 << 63, 0), (PAGE, 1 << 63), ((1 << 64) - 1, (1 << 64) - 1)])
def test_P43_P44_size_or_offset_that_makes_no_sense(size, offset):
    with file_of(PAGE) as fd:
        assert_refused("makes no sense", fd, size, offset)


def test_P49_descriptor_that_is_no_regular_file(tmp_path):
    near, far = socket.socketpair()
    reader, writer = os.pipe()
    counter = os.eventfd(0)
    opened = [reader, writer, counter, os.open(tmp_path, os.O_RDONLY), os.open("/dev/zero", os.O_RDWR)]
    try:
        for fd in (near.fileno(), *opened):
            assert_refused("is no regular file; use a memfd", fd)
    finally:
        near.close()
        far.close()
        for fd in opened:
            os.close(fd)


def test_P49_P51_file_system_whose_pages_may_never_arrive():
    """The file of this very test: on whatever the project lies on. procfs stands in where that is a tmpfs."""
    here = Path(__file__)
    kind = subprocess.run(["stat", "-f", "-c", "%T", here], capture_output=True, text=True, check=True).stdout.strip()
    with open("/proc/self/status" if kind == "tmpfs" else here, "rb") as file:
        assert_refused("neither on tmpfs .* nor on hugetlbfs", file.fileno())


def test_P49_P51_any_file_system_may_be_asked_for(tmp_path):
    with open(tmp_path / "ram", "w+b") as file:
        file.truncate(PAGE)
        Owner().map(file.fileno(), 0, 0, PAGE, 0, Policy(any_file_system=True)).close()


def test_P50_read_only_descriptor():
    with file_of(PAGE) as fd:
        reopened = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
        try:
            assert_refused("not open for reading and writing", reopened)
        finally:
            os.close(reopened)


def test_P50_file_sealed_against_writing():
    with file_of(PAGE) as fd:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        assert_refused("cannot be mapped .*sealed against writing", fd)


def test_P52_more_memory_than_accepted():
    with pytest.raises(SetupError, match="0x40000000001 bytes of guest memory are more than the 0x40000000000"):
        Policy().check_total((4 << 40) + 1)
    Policy().check_total(4 << 40)


def test_P52_P57_more_than_the_address_space_holds():
    with file_of(1 << 47) as fd:  # sparse
        assert_refused("cannot be mapped", fd, 1 << 47)


@pytest.mark.parametrize("offset", [0, 0x100000, 1, PAGE - 1, PAGE + 24])
def test_P53_any_offset_works(offset):
    with GuestMemory(extents=[Extent(0x10000, 3 * PAGE + 8, offset=offset)]) as memory:
        memory.write(0x10000, b"first")
        memory.write(0x10000 + 3 * PAGE, b"the last")
        with DeviceSide(memory) as side:
            assert read(side, 0x10000, 5) == b"first"
            assert read(side, 0x10000 + 3 * PAGE, 8) == b"the last"
            assert translate(side, 0x10000 + 3 * PAGE, 9) == lib.RING_E_UNMAPPED


def test_P54_several_regions_of_one_file():
    with file_of(2 * PAGE) as fd:
        os.pwrite(fd, b"low", 0)
        os.pwrite(fd, b"high", PAGE)
        owner = Owner()
        mappings = [owner.map(fd, gpa, gpa, PAGE, offset) for gpa, offset in ((0, PAGE), (PAGE, 0), (8 * PAGE, PAGE))]
        guest = owner.table(mappings)
        pieces = ffi.new("struct piece[3]")
        for gpa, text in ((0, b"high"), (PAGE, b"low"), (8 * PAGE, b"high")):
            assert lib.guestmem_pieces(guest.handle, gpa, len(text), pieces, 3) == 1
            assert ffi.buffer(pieces[0].base, len(text))[:] == text
        guest.close()
        for mapping in mappings:
            mapping.close()


@pytest.mark.parametrize("second", [
    {"gpa": PAGE}, {"gpa": 3 * PAGE - 1}, {"gpa": 2 * PAGE, "size": 1}, {"uva": 11 * PAGE}, {"uva": 9 * PAGE},
    {"gpa": (1 << 64) - PAGE}, {"uva": (1 << 64) - PAGE},
], ids=str)
def test_P45_P46_regions_that_overlap_or_overflow(second):
    with file_of(2 * PAGE) as fd:
        owner = Owner()
        first = {"gpa": PAGE, "uva": 10 * PAGE, "size": 2 * PAGE}
        other = {"gpa": 64 * PAGE, "uva": 64 * PAGE, "size": 2 * PAGE} | second
        mappings = [owner.map(fd, **region) for region in (first, other)]
        for order in (mappings, mappings[::-1]):
            with pytest.raises(SetupError, match="empty, overflow or overlap"):
                owner.table(order)
        owner.table(mappings[:1]).close()
        for mapping in mappings:
            mapping.close()


def test_P39_table_of_no_regions():
    with pytest.raises(SetupError):
        Owner().table([])


def test_P60_mapping_and_unmapping_leaves_nothing():
    with file_of(4 * PAGE) as fd:
        owner = Owner()
        owner.map(fd, 0, 0, PAGE).close()
        before = maps(), len(os.listdir("/proc/self/fd"))
        for _ in range(2000):
            mapping = owner.map(fd, 0, 0, 4 * PAGE)
            guest = owner.table([mapping])
            guest.close()
            mapping.close()
            mapping.close()
        assert (maps(), len(os.listdir("/proc/self/fd"))) == before


# --------------------------------------------------------------------------------------------- translation


def translate(side: DeviceSide, gpa: int, length: int, most: int = 16) -> int | list[tuple[int, int]]:
    """-> the status, or the pieces as (our address, bytes)."""
    pieces = ffi.new("struct piece[]", most)
    n = lib.guestmem_pieces(side.memory.handle, gpa, length, pieces, most)
    return n if n < 0 else [(int(ffi.cast("uintptr_t", pieces[i].base)), pieces[i].len) for i in range(n)]


def read(side: DeviceSide, gpa: int, length: int) -> bytes:
    return b"".join(ffi.buffer(ffi.cast("char *", base), size)[:] for base, size in translate(side, gpa, length))


LAYOUT = [Extent(0x3000, PAGE, uva=0x9000), Extent(0x1000, 2 * PAGE, uva=0x5000), Extent(0x8000, 3 * PAGE, uva=0x20000)]
NEAR = st.integers(0, 0xC000)


@given(gpa=st.one_of(NEAR, st.sampled_from([(1 << 64) - 1, (1 << 64) - 0x1000])),
       length=st.one_of(st.integers(0, 0x9000), st.sampled_from([1 << 32, (1 << 64) - 1])))
@settings(max_examples=150, deadline=None)
def test_translation_is_by_range(gpa, length):
    """Against a model that walks byte by byte, in pages: a range is in guest memory or it is not."""
    with GuestMemory(extents=LAYOUT) as memory, DeviceSide(memory) as side:
        start_of = {extent.gpa: translate(side, extent.gpa, 1)[0][0] for extent in LAYOUT}
        expected: int | list[tuple[int, int]] = []
        at, left = gpa, length
        while left:
            home = next((e for e in LAYOUT if e.gpa <= at < e.gpa + e.size), None)
            if home is None:
                expected = lib.RING_E_UNMAPPED
                break
            part = min(left, home.gpa + home.size - at)
            expected.append((start_of[home.gpa] + at - home.gpa, part))
            at, left = at + part, left - part
        assert translate(side, gpa, length) == expected


def test_pieces_are_bounded():
    with GuestMemory(extents=[Extent(i * PAGE, PAGE) for i in range(4)]) as memory, DeviceSide(memory) as side:
        assert len(translate(side, 0, 4 * PAGE, most=4)) == 4
        assert translate(side, 0, 4 * PAGE, most=3) == lib.RING_E_PIECES


@given(uva=st.integers(0, 0x30000), length=st.integers(0, 0x5000))
@settings(max_examples=100, deadline=None)
def test_uva_must_lie_in_one_region(uva, length):
    with GuestMemory(extents=LAYOUT) as memory, DeviceSide(memory) as side:
        found = lib.guestmem_uva(side.memory.handle, uva, length)
        home = next((e for e in LAYOUT if e.uva <= uva < e.uva + e.size), None)
        if home is None or uva + length > home.uva + home.size:
            assert found == ffi.NULL
        else:
            assert int(ffi.cast("uintptr_t", found)) == translate(side, home.gpa, 1)[0][0] + uva - home.uva


# ------------------------------------------------------------------------------------ memory that vanishes


def test_F25_memory_under_the_ring_is_truncated():
    with joined() as (driver, device):
        driver.post([b"x"])
        driver.publish()
        driver.memory.truncate()
        for verb in (device.see, device.pop, device.publish, device.arm):
            with pytest.raises(MemoryGone, match="guest memory vanished"):
                verb()
        assert device.state.broken.code == "RING_E_MEMORY_GONE"


TWO = [Extent(0, 16 * PAGE, uva=1 << 40), Extent(1 << 30, 16 * PAGE, uva=1 << 41)]


@contextlib.contextmanager
def buffers_apart():
    """Rings in one region, and another, region 1, for what is to vanish."""
    with GuestMemory(extents=TWO) as memory, joined(features=INDIRECT, memory=memory) as (driver, device):
        yield driver, device, memory


@pytest.mark.parametrize("writable", [False, True])
def test_F25_memory_under_a_buffer_is_truncated(writable):
    with buffers_apart() as (driver, device, memory):
        driver.add([Buffer(memory.alloc(PAGE, region=1), PAGE, writable)])
        driver.publish()
        chain = device.pop()
        memory.truncate(region=1)
        with pytest.raises(MemoryGone):
            chain.write(b"x") if writable else chain.read()
        assert device.state.broken is None  # a copy is no ring access: the ring itself is still there
        device.push(chain)
        device.publish()
        assert driver.collect().written == 0


def test_F25_memory_under_an_indirect_table_is_truncated():
    with buffers_apart() as (driver, device, memory):
        gpa = memory.alloc(16, region=1)
        driver.ring.desc[0].set(gpa, 16, DESC_F_INDIRECT)
        driver.ring.offer(0)
        driver.publish()
        memory.truncate(region=1)
        with pytest.raises(MemoryGone):
            device.pop()


def test_F25_only_the_owner_of_the_memory_is_marked():
    with (joined() as (driver, device), GuestMemory() as other, DriverQueue(other, 8) as neighbour,
          DeviceSide(other) as side):
        theirs = side.queue(neighbour)
        neighbour.post([b"innocent"])
        neighbour.publish()
        driver.memory.truncate()
        with pytest.raises(MemoryGone):
            device.see()
        assert not side.owner.gone
        assert theirs.pop().read() == b"innocent"


def test_F25_new_ring_on_truncated_memory_is_refused():
    with GuestMemory() as memory, DriverQueue(memory, 8) as driver, DeviceSide(memory) as side:
        memory.truncate()
        with pytest.raises(MemoryGone):
            side.queue(driver)


def run(program: str, *command: str) -> subprocess.CompletedProcess:
    """Run ``program`` in a Python of its own, behind ``command``."""
    return subprocess.run([*command, sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True,
                          timeout=60, check=False, cwd=os.getcwd())


def test_guard_survives_a_handler_that_replaced_it():
    """As faulthandler does; a ring made afterwards is guarded all the same."""
    done = run("""
        import faulthandler
        from ring.errors import MemoryGone
        from ring.virtqueue import guard
        from vdev.testing.rig import joined
        guard()
        faulthandler.enable()
        with joined() as (driver, device):
            driver.memory.truncate()
            try:
                device.see()
            except MemoryGone as error:
                print(error.code)
    """)
    assert done.stdout == "RING_E_MEMORY_GONE\n", done.stderr


def test_guard_lets_real_bugs_crash():
    """A SIGBUS outside guest memory is a bug of ours: it must end the process, not be jumped over."""
    done = run("""
        import mmap, os
        from ring.virtqueue import guard
        guard()
        fd = os.memfd_create("mine")
        os.ftruncate(fd, 4096)
        mine = mmap.mmap(fd, 4096)
        os.ftruncate(fd, 0)
        print("touching", flush=True)
        mine[0]
    """)
    assert done.stdout == "touching\n" and done.returncode == -7, done.stderr


def test_F26_file_system_runs_full():
    """The file has the right size and no room behind it: sealing does not help against that."""
    if not shutil.which("unshare"):
        pytest.skip("no unshare (util-linux): a small tmpfs needs a mount namespace")
    namespace = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    mount = 'mount -t tmpfs -o size=64k none /mnt && exec "$@"'
    if subprocess.run([*namespace, "sh", "-c", mount, "sh", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine grants no mount namespace: no tmpfs that can be filled")
    done = run(f"""
        from ring.driver import Buffer, DriverQueue, GuestMemory
        from ring.errors import MemoryGone
        from vdev.testing.rig import DeviceSide
        with GuestMemory(1 << 20, directory="/mnt") as memory, DriverQueue(memory, 8) as driver:
            with DeviceSide(memory) as side:
                device = side.queue(driver)
                start = memory.regions[0].gpa
                driver.add([Buffer(start + (512 << 10), 256 << 10, {bool(DESC_F_WRITE)})])
                driver.publish()
                chain = device.pop()
                try:
                    chain.write(b"x" * (256 << 10))
                except MemoryGone as error:
                    print(error, side.owner.gone)
                device.push(chain)
                device.publish()
                print(driver.collect().written)
    """, *namespace, "sh", "-c", mount, "sh")
    assert done.stdout.splitlines() == [
        "guest memory vanished: its file was truncated or its file system is full True", "0"], done.stderr
