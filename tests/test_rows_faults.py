"""Rows of docs/conformance/faults.tsv about a front-end that fails, and a host that has nothing left.

One daemon for all tests of this file, a process of its own. After each test it serves both its devices, and holds as
many descriptors, mappings and threads as before.
"""

import contextlib
import os
import resource
import signal
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ring.driver import Buffer, GuestMemory
from ring.driver_memory import DEFAULT_GPA, Extent
from vdev.net.features import Feature, mask
from vdev.testing.faults import flooding, goes_on, goes_round, limited, processor_seconds
from vdev.testing.kept import FRAME, WAIT, Traced, arrives, holding, refused
from vdev.testing.netdriver import NetHeader
from vdev.testing.scripted import ScriptedGuest, shared_regions
from vhost_user.codec import encode
from vhost_user.frontend import FrontEnd, SharedRegion
from vhost_user.spec import HEADER_SIZE, Request
from vhost_user.wire import MEM_TABLE, SINGLE_REGION, MemTable, Region

pytestmark = pytest.mark.timeout(120)

PAGE = 4096
UVA = 0x7F00_0000_0000
SPARSE = 1 << 30  # bytes of a region that takes address space and nothing else

@contextlib.contextmanager
def memory_file(size: int = PAGE) -> Iterator[int]:
    """A file of ``size`` bytes without a page in it."""
    fd = os.memfd_create("faults")
    try:
        os.ftruncate(fd, size)
        yield fd
    finally:
        os.close(fd)


def next_one_is_served(path: str) -> None:
    """A front-end that connects now gets its answer."""
    with FrontEnd.connect(path, timeout=WAIT) as front_end:
        assert front_end.get_features()


# --------------------------------------------------------------------------------------------- the front-end


def test_F01_front_end_is_gone_after_header_and_descriptors(daemon) -> None:
    for kind, payload in ((Request.ADD_MEM_REG, SINGLE_REGION.encode(Region(0, PAGE, UVA, 0))),
                          (Request.SET_MEM_TABLE, MEM_TABLE.encode(MemTable((Region(0, PAGE, UVA, 0),))))):
        for cut in (HEADER_SIZE, HEADER_SIZE + 8):
            with Traced() as traced:
                with daemon.agreed() as front_end:
                    front_end.send_raw(encode(kind, payload)[:cut], [traced.fd])
                next_one_is_served(daemon.path)
                assert traced.closed()


def test_F02_front_end_is_killed_under_traffic(daemon) -> None:
    with flooding(daemon.bystander) as other, flooding(daemon.path) as child:
        child.kill()
        with ScriptedGuest.connect(daemon.path, size=8) as guest:
            for _ in range(10):
                assert goes_round(guest)
        goes_on(other)


@pytest.mark.parametrize("seconds", [2, pytest.param(60, marks=pytest.mark.long)])
def test_F03_front_end_is_stopped_for_long(daemon, seconds) -> None:
    with flooding(daemon.path) as child:
        child.signal(signal.SIGSTOP)
        time.sleep(0.2)  # what was under way is done
        before, used = holding(daemon.pid), processor_seconds(daemon.pid)
        time.sleep(seconds)
        after = holding(daemon.pid)
        assert processor_seconds(daemon.pid) - used < 0.1 * seconds
        assert after.counts == before.counts and after.memory - before.memory < 1 << 20
        child.signal(signal.SIGCONT)
        goes_on(child)


def test_F10_front_end_that_waits_is_answered(daemon) -> None:
    """QEMU does nothing else until it is: while another floods, and after one that stopped in half a message."""
    with flooding(daemon.bystander) as other:
        for _ in range(30):
            with daemon.connect() as half:
                half.send_raw(encode(Request.GET_FEATURES)[:7])
                next_one_is_served_or_told(daemon.path)
            next_one_is_served(daemon.path)
        goes_on(other)


def next_one_is_served_or_told(path: str) -> None:
    """A second front-end is not left waiting: the device serves one, so its connection ends."""
    with FrontEnd.connect(path, timeout=WAIT) as second:
        assert second.closed()


def test_F46_base_is_answered_at_once_under_full_load(daemon) -> None:
    """QEMU's main loop stands still until GET_VRING_BASE is answered.

    The answer is compared with one that no ring is asked for, sent right before it: how long a busy machine lets
    either process wait for a processor is not the device's doing. What stopping a ring adds has to stay below 50 ms,
    in the middle of many.
    """
    added = []
    with flooding(daemon.bystander), ScriptedGuest.connect(daemon.path, size=256, buffers=64) as guest:
        front_end, transmitq = guest.front_end, guest.driver.transmitq
        for _ in range(51):
            for _ in range(64):
                guest.driver.offer(FRAME)
            transmitq.submit()
            times = [time.monotonic()]
            front_end.get_features()
            times.append(time.monotonic())
            base = front_end.get_vring_base(1)
            times.append(time.monotonic())
            added.append((times[2] - times[1]) - (times[1] - times[0]))
            front_end.set_vring_base(1, base, need_reply=True)
            front_end.set_vring_kick(1, transmitq.kick_fd, need_reply=True)
            for _ in range(64):
                assert arrives(guest.driver) == FRAME
            assert guest.driver.reclaim_all(WAIT)
    assert statistics.median(added) < 0.05


# ------------------------------------------------------------------------------------------- the host is out of


def free_descriptors(pid: int, count: int) -> int:
    """The limit with which process ``pid`` can open exactly ``count`` more descriptors."""
    taken = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    free = [number for number in range(len(taken) + count + 1) if number not in taken]
    return free[count]


def test_F12_no_descriptor_to_accept_with(daemon) -> None:
    with ScriptedGuest.connect(daemon.bystander, size=8) as guest:
        assert goes_round(guest)
        before = len(daemon.daemon.events("accept-paused"))
        with limited(daemon.pid, resource.RLIMIT_NOFILE, free_descriptors(daemon.pid, 0)):
            waiting = daemon.connect()
            deadline = time.monotonic() + WAIT
            while len(daemon.daemon.events("accept-paused")) == before:
                assert time.monotonic() < deadline, daemon.daemon.child.log()
                assert goes_round(guest)
            used = processor_seconds(daemon.pid)
            time.sleep(1)
            assert processor_seconds(daemon.pid) - used < 0.2
            assert goes_round(guest)
        with waiting:
            assert waiting.get_features()


@pytest.mark.parametrize("left", [0, 1, 2])
def test_F13_no_descriptor_to_receive_with(daemon, left) -> None:
    """The kernel delivers the message with as many of its three descriptors as there is room for."""
    regions = tuple(Region(n * PAGE, PAGE, UVA + n * PAGE, 0) for n in range(3))
    with contextlib.ExitStack() as stack:
        guest = stack.enter_context(ScriptedGuest.connect(daemon.bystander, size=8))
        assert goes_round(guest)
        traced = [stack.enter_context(Traced()) for _ in regions]
        front_end = stack.enter_context(daemon.agreed())
        front_end.get_features()
        with limited(daemon.pid, resource.RLIMIT_NOFILE, free_descriptors(daemon.pid, left)):
            front_end.send_raw(encode(Request.SET_MEM_TABLE, MEM_TABLE.encode(MemTable(regions))),
                               [pipe.fd for pipe in traced])
            assert front_end.closed()
        assert all(pipe.closed() for pipe in traced)
        assert goes_round(guest)


def test_F35_no_address_space_for_a_region(daemon) -> None:
    size = int(Path(f"/proc/{daemon.pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    region = Region(1 << 40, SPARSE, 1 << 41, 0)
    with memory_file(SPARSE) as fd, ScriptedGuest.connect(daemon.path, size=8) as guest:
        assert goes_round(guest)
        before = holding(daemon.pid).counts
        with limited(daemon.pid, resource.RLIMIT_AS, size + SPARSE // 2):
            assert refused(guest.front_end, Request.ADD_MEM_REG, SINGLE_REGION.encode(region), [fd])
            own = guest.memory.regions[0]
            table = MemTable((Region(own.gpa, own.size, own.uva, own.offset), region))
            assert refused(guest.front_end, Request.SET_MEM_TABLE, MEM_TABLE.encode(table), [own.fd, fd])
            assert goes_round(guest)
        assert holding(daemon.pid).counts == before
        assert goes_round(guest)
        guest.front_end.add_mem_reg(SharedRegion(fd, region.gpa, region.uva, region.size), need_reply=True)
        assert goes_round(guest)


# --------------------------------------------------------------------------------------------- memory


SLOTS = 509  # what QEMU counts on


def sends(guest: ScriptedGuest, region: int, number: int) -> bool:
    """Does frame ``number``, sent from region number ``region`` of guest memory, come round?"""
    frame = FRAME + number.to_bytes(2)
    gpa = guest.memory.alloc(NetHeader.SIZE + len(frame), region=region)
    guest.memory.write(gpa + NetHeader.SIZE, frame)
    guest.driver.transmitq.add([Buffer(gpa, NetHeader.SIZE + len(frame))])
    guest.driver.transmitq.submit()
    came = arrives(guest.driver)
    back = guest.driver.reclaim_all(WAIT)
    guest.memory.free(gpa)
    return back and came == frame


@pytest.mark.parametrize("ring", [0, mask(Feature.RING_PACKED)], ids=["split", "packed"])
def test_F24_every_slot_is_plugged_and_unplugged_under_traffic(daemon, ring) -> None:
    """Frames are sent from each region, while a guest beside this one floods and regions come and go."""
    extents = [Extent(DEFAULT_GPA, 1 << 20), *(Extent(DEFAULT_GPA + (n << 21), 1 << 14) for n in range(1, SLOTS))]
    features = mask(Feature.VERSION_1, Feature.MRG_RXBUF) | ring
    with (flooding(daemon.bystander) as other, memory_file() as fd,
          ScriptedGuest.connect(daemon.path, size=8, features=features, memory=GuestMemory(extents=extents)) as guest):
        front_end = guest.front_end
        assert front_end.get_max_mem_slots() == SLOTS
        assert refused(front_end, Request.ADD_MEM_REG, SINGLE_REGION.encode(Region(0, PAGE, UVA, 0)), [fd])
        for region in (*range(0, SLOTS, 8), SLOTS - 1):
            assert sends(guest, region, region)
        shared = shared_regions(guest.memory)
        for region in range(SLOTS - 1, 0, -1):
            if region % 8 == 0:
                guest.driver.transmit(FRAME)  # on its way while the table changes
            front_end.rem_mem_reg(shared[region], need_reply=region % 8 == 0)
            if region % 8 == 0:
                assert arrives(guest.driver) == FRAME and guest.driver.reclaim_all(WAIT)
                assert sends(guest, region - 1, region)
        for region in range(1, SLOTS):
            if region % 8 == 0:
                guest.driver.transmit(FRAME)
            front_end.add_mem_reg(shared[region], need_reply=region % 8 == 0)
            if region % 8 == 0:
                assert arrives(guest.driver) == FRAME and guest.driver.reclaim_all(WAIT)
                assert sends(guest, region, region)
        goes_on(other)


# ------------------------------------------------------------------------------------------------ soak


@pytest.mark.parametrize("cycles", [200, pytest.param(10_000, marks=[pytest.mark.long, pytest.mark.timeout(1800)])])
def test_F41_sessions_leave_nothing(daemon, cycles) -> None:
    def cycle() -> None:
        with ScriptedGuest.connect(daemon.path, size=8) as guest:
            assert goes_round(guest)

    for _ in range(20):
        cycle()
    with daemon.connect() as front_end:
        assert front_end.get_features()  # the session before it is over
        before = daemon.holding
    for _ in range(cycles):
        cycle()
    with daemon.connect() as front_end:
        assert front_end.get_features()
        after = daemon.holding
    assert after.counts == before.counts
    assert after.memory - before.memory < 1 << 20
