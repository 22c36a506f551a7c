"""Rows P36 and P62 to P86 of docs/conformance/messages.tsv: what a hostile front-end says about rings, and the
descriptors it gives them.

Over a real socket, to a daemon that serves on after each test and holds no more than before (tests/conftest.py).
"""

import contextlib
import dataclasses
import os
import select
import socket
import time
from collections.abc import Callable, Iterator

import pytest

from ring.driver import Extent, GuestMemory
from vdev.net.features import Feature, mask
from vdev.testing.kept import FEATURES, FRAME, PROTOCOL, WAIT, KeptDaemon, Traced, arrives, ends, readable, refused
from vdev.testing.netdriver import NetDriver
from vdev.testing.scripted import ScriptedGuest, ring_setup, shared_regions
from vhost_user.codec import encode
from vhost_user.frontend import FrontEnd
from vhost_user.spec import Request
from vhost_user.wire import VRING_ADDR, VRING_FD, VRING_STATE, VringAddr, VringFd, VringState

pytestmark = pytest.mark.timeout(120)

WILD = (2, 255, 0x10000, 0x10001, 0xFFFFFFFF)  # there are two rings
DRIVER_OK = 0xF
KICK_1 = VRING_FD.encode(VringFd(1, True))


def state(index: int, num: int) -> bytes:
    """The payload of SET_VRING_NUM, SET_VRING_BASE, SET_VRING_ENABLE and GET_VRING_BASE."""
    return VRING_STATE.encode(VringState(index, num))


def addresses(index: int, desc: int, avail: int, used: int) -> bytes:
    """The payload of SET_VRING_ADDR."""
    return VRING_ADDR.encode(VringAddr(index, 0, desc, used, avail, 0))


@contextlib.contextmanager
def eventfd(count: int = 0, flags: int = os.EFD_NONBLOCK) -> Iterator[int]:
    """An eventfd."""
    fd = os.eventfd(0, flags)
    if count:
        os.eventfd_write(fd, count)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def guest_memory(**options) -> Iterator[GuestMemory]:
    """Guest memory whose file is as long as its regions."""
    with GuestMemory(1 << 20, **options) as memory:
        yield memory


def configured(memory: GuestMemory, size: int = 64, **wrong: int) -> Callable[[FrontEnd], None]:
    """All that comes before the kick of ring 1, with ``wrong`` addresses instead of good ones."""
    base = memory.regions[0].uva
    places = {"desc": base, "avail": base + 0x8000, "used": base + 0x10000} | wrong

    def send(front_end: FrontEnd) -> None:
        front_end.share(shared_regions(memory))
        front_end.set_status(DRIVER_OK)
        front_end.set_vring_num(1, size)
        front_end.set_vring_addr(1, **places)

    return send


def restarted(guest: ScriptedGuest, **changes: int) -> None:
    """Stop both rings and start them again where they were; the transmitq with other addresses."""
    front_end = guest.front_end
    queues = (guest.driver.receiveq, guest.driver.transmitq)
    bases = [front_end.get_vring_base(index) for index in (0, 1)]
    for index, (queue, base) in enumerate(zip(queues, bases, strict=True)):
        setup = dataclasses.replace(ring_setup(queue), base=base)
        if index:
            setup = dataclasses.replace(setup, **changes)
            places = addresses(index, setup.desc, setup.avail, setup.used)
            assert not refused(front_end, Request.SET_VRING_ADDR, places)
        front_end.set_ring(index, setup)
    assert front_end.get_features()


def test_P36_what_is_said_of_a_ring_first_is_remembered(daemon) -> None:
    """ENABLE, CALL and ERR come before features, memory and the place of the rings; nothing happens yet."""
    with (daemon.connect() as front_end, guest_memory() as memory, eventfd() as error,
          NetDriver(memory, size=16, features=FEATURES) as driver):
        front_end.set_protocol_features(front_end.get_protocol_features() & PROTOCOL)
        queues = (driver.receiveq, driver.transmitq)
        for index, queue in enumerate(queues):
            assert not refused(front_end, Request.SET_VRING_ENABLE, state(index, 1))
            front_end.set_vring_call(index, queue.call_fd)
            front_end.set_vring_err(index, error)
        front_end.set_features(FEATURES | mask(Feature.PROTOCOL_FEATURES))
        front_end.share(shared_regions(memory))
        for index, queue in enumerate(queues):
            setup = ring_setup(queue)
            front_end.set_vring_num(index, setup.num)
            front_end.set_vring_addr(index, setup.desc, setup.avail, setup.used)
            front_end.set_vring_kick(index, setup.kick)
        front_end.set_status(DRIVER_OK)
        driver.fill()
        driver.transmit(FRAME)
        assert arrives(driver) == FRAME
        driver.transmitq.ring.avail.idx += 1000
        driver.transmitq.kick()
        assert readable(error)


def test_P62_ring_index_out_of_range(daemon) -> None:
    with Traced() as traced:
        for index in WILD:
            daemon.refuses(Request.SET_VRING_NUM, state(index, 64))
            daemon.refuses(Request.SET_VRING_BASE, state(index, 0))
            daemon.refuses(Request.SET_VRING_ENABLE, state(index, 1))
            daemon.refuses(Request.SET_VRING_ADDR, addresses(index, 0, 0, 0))
            with daemon.agreed() as front_end:
                assert ends(front_end, encode(Request.GET_VRING_BASE, state(index, 0)))
        for value in (2, 0xFF, 0x200, 0x10000, 0x10001, 1 << 32, 1 << 63):
            for kind in (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR):
                daemon.refuses(kind, value.to_bytes(8, "little"), [traced.fd])
        assert traced.closed()


def test_P63_P64_impossible_queue_sizes(daemon) -> None:
    for size in (0, 32769, 65536, 0xFFFFFFFF):
        daemon.refuses(Request.SET_VRING_NUM, state(0, size))
    # Which sizes a split ring may have is settled when it starts: a packed ring may have any.
    with guest_memory() as memory, eventfd() as kick:
        for size in (3, 48, 32767):
            daemon.refuses(Request.SET_VRING_KICK, KICK_1, [kick], then=configured(memory, size))


def test_P65_P74_P75_configuration_of_a_ring_that_runs(daemon) -> None:
    with ScriptedGuest.connect(daemon.path) as guest:
        setup = ring_setup(guest.driver.transmitq)
        others = [(setup.desc + 16, setup.avail, setup.used), (setup.desc, setup.avail + 2, setup.used),
                  (setup.desc, setup.avail, setup.used + 4)]
        for _ in range(3):
            assert guest.exchange(FRAME, WAIT) == FRAME
            assert refused(guest.front_end, Request.SET_VRING_NUM, state(1, 128))
            assert refused(guest.front_end, Request.SET_VRING_BASE, state(1, 0))
            for other in others:
                assert refused(guest.front_end, Request.SET_VRING_ADDR, addresses(1, *other))
            same = addresses(1, setup.desc, setup.avail, setup.used)
            assert not refused(guest.front_end, Request.SET_VRING_ADDR, same)
        assert guest.exchange(FRAME, WAIT) == FRAME
        assert ends(guest.front_end, encode(Request.SET_VRING_ADDR, addresses(1, *others[0])))


def test_P75_base_of_a_split_ring(daemon) -> None:
    for base in (0x10000, 0x80008000, 0xFFFFFFFF):
        daemon.refuses(Request.SET_VRING_BASE, state(0, base))


@pytest.mark.parametrize("part", ["desc", "avail", "used"])
def test_P67_P68_ring_part_outside_guest_memory(daemon, part) -> None:
    with guest_memory() as memory, eventfd() as kick:
        (region,) = memory.regions
        for place in (0, region.uva - 0x1000, region.uva - 16, region.uva + region.size - 64, region.uva + region.size,
                      (1 << 64) - 16):
            then = configured(memory, **{part: place})
            daemon.refuses(Request.SET_VRING_KICK, KICK_1, [kick], then=then)


@pytest.mark.parametrize("part", ["desc", "avail", "used"])
def test_P69_ring_part_in_two_regions(daemon, part) -> None:
    """Both are there, and touch."""
    half = 1 << 20
    extents = [Extent(0x4000_0000, half), Extent(0x4000_0000 + half, half)]
    with GuestMemory(extents=extents) as memory, eventfd() as kick:
        then = configured(memory, **{part: memory.regions[1].uva - 64})
        daemon.refuses(Request.SET_VRING_KICK, KICK_1, [kick], then=then)


def test_P70_ring_part_that_is_not_aligned(daemon) -> None:
    good = {"desc": 0x1000, "avail": 0x2000, "used": 0x3000}
    for part, offsets in {"desc": (1, 8, 15), "avail": (1, 3), "used": (1, 2, 3)}.items():
        for offset in offsets:
            daemon.refuses(Request.SET_VRING_ADDR, addresses(0, **good | {part: good[part] + offset}))


def test_P71_P72_parts_of_rings_at_one_address(daemon) -> None:
    """All of it is accepted, and what is then sent is garbage; that it hurts nobody is seen after the test."""
    with ScriptedGuest.connect(daemon.path) as guest:
        queue, other = ring_setup(guest.driver.transmitq), ring_setup(guest.driver.receiveq)
        buffers = guest.driver.receiveq.ring.desc[0].addr
        for changes in ({"desc": other.desc, "avail": other.avail, "used": other.used}, {"used": queue.desc},
                        {"used": queue.avail & ~3}, {"avail": queue.used}, {"avail": queue.desc, "used": queue.desc},
                        {"used": guest.memory.uva(buffers) & ~3}):
            restarted(guest, **changes)
            guest.driver.transmitq.kick()
            guest.driver.receiveq.kick()
            assert guest.front_end.get_features()


def test_P73_addresses_before_there_is_memory(daemon) -> None:
    with ScriptedGuest.connect(daemon.path) as guest:
        bases = guest.qemu.stop()
        (region,) = shared_regions(guest.memory)
        guest.front_end.rem_mem_reg(region, need_reply=True)
        queues = (guest.driver.receiveq, guest.driver.transmitq)
        for index, (queue, base) in enumerate(zip(queues, bases, strict=True)):
            setup = ring_setup(queue)
            guest.front_end.set_vring_num(index, setup.num, need_reply=True)
            guest.front_end.set_vring_base(index, base, need_reply=True)
            places = addresses(index, setup.desc, setup.avail, setup.used)
            assert not refused(guest.front_end, Request.SET_VRING_ADDR, places)
        guest.front_end.add_mem_reg(region, need_reply=True)
        for index, queue in enumerate(queues):
            guest.front_end.set_vring_kick(index, queue.kick_fd, need_reply=True)
        guest.front_end.set_status(DRIVER_OK, need_reply=True)
        assert guest.exchange(FRAME, WAIT) == FRAME


def test_P76_base_of_a_ring_never_set_up(daemon) -> None:
    with daemon.agreed() as front_end:
        for _ in range(3):
            assert [front_end.get_vring_base(index) for index in (0, 1)] == [0, 0]


def test_P77_base_while_frames_are_on_their_way(daemon) -> None:
    """It agrees with what was used, and nothing is written after it was answered."""
    with ScriptedGuest.connect(daemon.path) as guest:
        for _ in range(8):
            for _ in range(32):
                guest.driver.offer(FRAME)
            guest.driver.transmitq.submit()
            bases = [guest.front_end.get_vring_base(index) for index in (0, 1)]
            queues = (guest.driver.receiveq, guest.driver.transmitq)
            assert bases == [queue.ring.used.idx for queue in queues]
            guest.driver.offer(FRAME)
            guest.driver.transmitq.publish()
            before = guest.memory.snapshot()
            guest.driver.transmitq.kick()
            time.sleep(0.02)
            assert guest.memory.snapshot() == before
            for index, (queue, base) in enumerate(zip(queues, bases, strict=True)):
                guest.front_end.set_vring_base(index, base, need_reply=True)
                guest.front_end.set_vring_kick(index, queue.kick_fd, need_reply=True)
            assert guest.driver.reclaim_all(WAIT)
            while guest.driver.receive() is not None:
                pass


def test_P78_kick_descriptor_before_anything_else(daemon) -> None:
    with eventfd() as kick, guest_memory() as memory:
        daemon.refuses(Request.SET_VRING_KICK, KICK_1, [kick])
        daemon.refuses(Request.SET_VRING_KICK, KICK_1, [kick], then=lambda front_end: front_end.set_vring_num(1, 64))
        daemon.refuses(Request.SET_VRING_KICK, KICK_1, [kick], then=lambda front_end: front_end.set_vring_addr(
            1, memory.regions[0].uva, memory.regions[0].uva, memory.regions[0].uva))


def test_P79_kick_descriptor_is_replaced(daemon) -> None:
    with ScriptedGuest.connect(daemon.path) as guest:
        assert guest.exchange(FRAME, WAIT) == FRAME
        before = daemon.holding.fds
        queue = guest.driver.transmitq
        for _ in range(10):
            fresh = os.eventfd(0, os.EFD_NONBLOCK)
            guest.front_end.set_vring_kick(1, fresh, need_reply=True)
            os.close(queue.kick_fd)
            queue.kick_fd = fresh
            assert guest.exchange(FRAME, WAIT) == FRAME
            assert daemon.holding.fds == before


def test_P80_P81_kick_descriptor_that_is_no_eventfd(daemon, tmp_path) -> None:
    """A pipe whose writer is gone would signal for ever."""
    with ScriptedGuest.connect(daemon.path) as guest, contextlib.ExitStack() as stack:
        hung_up, writer = os.pipe()
        os.close(writer)
        fds = [hung_up, *os.pipe(), os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)]
        for fd in fds:
            stack.callback(os.close, fd)
        others = [stack.enter_context(one) for one in (select.epoll(), socket.socket(socket.AF_UNIX))]
        own = guest.front_end.transport.fileno()
        before = daemon.holding.fds
        for fd in (*fds, own, *(one.fileno() for one in others)):
            assert refused(guest.front_end, Request.SET_VRING_KICK, KICK_1, [fd])
            assert guest.exchange(FRAME, WAIT) == FRAME
        assert daemon.holding.fds == before


def test_P81_kick_descriptor_that_signals_for_ever(daemon) -> None:
    """A semaphore with a count that nobody ever reads down."""
    endless = os.EFD_NONBLOCK | os.EFD_SEMAPHORE
    with ScriptedGuest.connect(daemon.path) as guest, eventfd(1 << 63, endless) as kick:
        for index in (0, 1):
            guest.front_end.set_vring_kick(index, kick, need_reply=True)
        with ScriptedGuest.connect(daemon.bystander) as other:
            for _ in range(10):
                guest.driver.offer(FRAME)
                guest.driver.transmitq.publish()
                os.eventfd_write(kick, 1)
                assert arrives(guest.driver) == FRAME
                assert other.exchange(FRAME, WAIT) == FRAME
                assert guest.front_end.get_features()


def test_P82_P83_call_descriptors_that_block_or_break(daemon) -> None:
    """A full blocking eventfd, a full pipe, and one whose reader goes away."""
    with ScriptedGuest.connect(daemon.path) as guest, contextlib.ExitStack() as stack:
        full = stack.enter_context(eventfd((1 << 64) - 2, 0))
        full_pipe, broken_pipe = os.pipe(), os.pipe()
        os.set_blocking(full_pipe[1], False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(full_pipe[1], bytes(4096))
        for fd in (*full_pipe, broken_pipe[1]):
            stack.callback(os.close, fd)
        for call in (full, full_pipe[1], broken_pipe[1]):
            guest.front_end.set_vring_call(1, call, need_reply=True)
            os.set_blocking(call, True)  # the peer changes its mind: it is the same open file
            if call == broken_pipe[1]:
                os.close(broken_pipe[0])
            for _ in range(3):
                assert guest.exchange(FRAME, WAIT) == FRAME
                assert guest.front_end.get_features()
        guest.front_end.set_vring_call(1, guest.driver.transmitq.call_fd, need_reply=True)
        assert guest.driver.reclaim_all(WAIT)


def test_P84_one_eventfd_for_everything(daemon) -> None:
    with ScriptedGuest.connect(daemon.path) as guest, eventfd() as one:
        for index in (0, 1):
            guest.front_end.set_vring_call(index, one, need_reply=True)
            guest.front_end.set_vring_kick(index, one, need_reply=True)
        for _ in range(5):
            guest.driver.offer(FRAME)
            guest.driver.transmitq.publish()
            os.eventfd_write(one, 1)
            deadline = time.monotonic() + WAIT
            while (received := guest.driver.receive()) is None and time.monotonic() < deadline:
                time.sleep(0.001)
            assert received is not None and received.frame == FRAME
        begin = cpu_time(daemon)
        time.sleep(1)
        assert cpu_time(daemon) - begin < 0.05  # a loop that feeds itself takes all it can get


def cpu_time(daemon: KeptDaemon) -> float:
    """Seconds of processor time the daemon has used."""
    with open(f"/proc/{daemon.pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_P85_err_descriptor_comes_again(daemon) -> None:
    with ScriptedGuest.connect(daemon.path) as guest, eventfd() as last, Traced() as first:
        guest.front_end.set_vring_err(1, first.fd, need_reply=True)
        before = daemon.holding.fds
        for _ in range(10):
            guest.front_end.set_vring_err(1, last, need_reply=True)
        assert daemon.holding.fds == before and first.closed()
        assert guest.exchange(FRAME, WAIT) == FRAME
        guest.driver.transmitq.ring.avail.idx += 1000
        guest.driver.transmitq.kick()
        assert readable(last)
        assert guest.front_end.get_features()


def test_P86_what_waits_when_a_ring_starts_needs_no_kick(daemon) -> None:
    with ScriptedGuest.connect(daemon.path) as guest:
        for _ in range(3):
            bases = [guest.front_end.get_vring_base(index) for index in (0, 1)]
            guest.driver.offer(FRAME)
            guest.driver.transmitq.publish()  # and nobody kicks
            for index, queue in enumerate((guest.driver.receiveq, guest.driver.transmitq)):
                guest.front_end.set_ring(index, dataclasses.replace(ring_setup(queue), base=bases[index]))
            assert arrives(guest.driver) == FRAME
            assert guest.driver.reclaim_all(WAIT)
