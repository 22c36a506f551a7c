"""vdev/dirty_log.py and what uses it: a front-end switches the dirty log on and off under a running device.

Everything is real but the network (a socket pair) and the guest (a driver in Python). Which bit is set by which
write is tested in test_ring_dirty.py.
"""

import contextlib
import dataclasses
import os
import select
import socket
import tempfile
import time
from collections.abc import Iterator

import pytest

from vdev.net.features import Feature, mask
from vdev.testing.dirty import FrontEndLog, changed, covering
from vdev.testing.scripted import ScriptedGuest
from vdev.testing.served import FRAME, ServedDevice, WirePort, both_ways, receive
from vdev.testing.waiting import wait_until
from vdev.testing.watch import noise
from vhost_user.errors import Disconnected
from vhost_user.frontend import FrontEnd, RequestRefused
from vhost_user.handshake import QEMU_7_2, QEMU_10_0
from vhost_user.spec import ProtocolFeature

RING = mask(Feature.VERSION_1, Feature.MRG_RXBUF, Feature.EVENT_IDX)
LOG_ALL = mask(Feature.LOG_ALL)
RINGS = pytest.mark.parametrize("ring", [0, mask(Feature.RING_PACKED)], ids=["split", "packed"])


@pytest.fixture
def served() -> Iterator[ServedDevice]:
    with ServedDevice() as device:
        yield device


@pytest.fixture
def guest(served) -> Iterator[ScriptedGuest]:
    with ScriptedGuest(served.connect(), features=RING) as scripted:
        yield scripted


@contextlib.contextmanager
def a_log(guest: ScriptedGuest, offset: int = 0) -> Iterator[FrontEndLog]:
    """A log for all of the guest's memory, which nobody was told of yet."""
    with FrontEndLog(covering(guest.memory), offset) as log:
        yield log


def resources() -> tuple[int, int]:
    """How many descriptors are open, and how many files are mapped."""
    with open("/proc/self/maps") as maps:
        return len(os.listdir("/proc/self/fd")), sum("memfd" in line for line in maps)


def standing(served: ServedDevice, guest: ScriptedGuest, log: FrontEndLog) -> tuple[list[bytes], set[int]]:
    """Guest memory, and the pages marked since the last time, at a moment when the device does nothing."""
    def look() -> tuple[list[bytes], set[int]]:
        with served.device.engine.paused():
            return guest.memory.snapshot(), log.take()
    return served.call(look)


def pages_of_rings(guest: ScriptedGuest) -> set[int]:
    """Those in which split used rings begin."""
    return {queue.ring.areas[2].gpa >> 12 for queue in (guest.driver.receiveq, guest.driver.transmitq)}


# -------------------------------------------------------------------------------------------- what is marked


@RINGS
@pytest.mark.parametrize("version", [QEMU_7_2, QEMU_10_0], ids=["qemu-7.2", "qemu-10.0"])
def test_VU_LOG_B_02_03_pages_changed_are_marked(served, ring, version) -> None:
    with (ScriptedGuest(served.connect(), features=RING | ring, version=version) as guest, a_log(guest) as log):
        both_ways(served, guest)
        guest.qemu.log(log.fd, log.size)
        for number in range(20):
            guest.driver.offer(noise(seed=number))
            guest.driver.transmitq.publish()
            before, _ = standing(served, guest, log)  # from here on only the device writes
            guest.driver.transmitq.kick()
            served.port.wire[0].send(bytes(12) + noise(1000, seed=number))
            assert receive(served.port.wire[0]) == noise(seed=number)
            wait_until(lambda: guest.driver.transmitq.ring.pending() and guest.driver.receiveq.ring.pending(),
                       "both rings are used")
            after, marked = standing(served, guest, log)
            written = changed(guest.memory, before, after)
            assert written <= marked and len(written) >= 2  # a ring's page and a buffer's
            assert guest.driver.reclaim_all(5) and guest.driver.receive_within(5).frame == noise(1000, seed=number)


@RINGS
def test_VU_LOG_B_10_suspended_means_silent(served, ring) -> None:
    with ScriptedGuest(served.connect(), features=RING | ring) as guest, a_log(guest) as log:
        guest.qemu.log(log.fd, log.size)
        both_ways(served, guest)
        guest.qemu.stop()
        before = guest.memory.snapshot()
        log.take()
        for _ in range(20):
            served.port.wire[0].send(bytes(12) + FRAME)
        time.sleep(0.05)
        assert guest.memory.snapshot() == before and log.take() == set()


def test_VU_LOG_B_05_P91_log_at_an_offset_of_its_file(served, guest) -> None:
    with a_log(guest, offset=0x1008) as log:
        guest.front_end.set_log_base(log.fd, log.size, offset=0x1008)
        guest.front_end.set_features(guest.front_end.features | LOG_ALL, need_reply=True)
        both_ways(served, guest)
        assert log.take()  # and nothing beside it, which take() holds


def test_only_what_was_asked_for_is_marked(served, guest) -> None:
    """LOG_ALL is about buffers, the flag of a ring about that ring."""
    receiveq = guest.qemu.rings[0]
    with a_log(guest) as log:
        guest.front_end.set_log_base(log.fd, log.size, need_reply=True)
        both_ways(served, guest)
        assert log.take() == set()
        guest.front_end.set_vring_addr(0, receiveq.desc, receiveq.avail, receiveq.used, flags=1, log=receiveq.log,
                                       need_reply=True)
        both_ways(served, guest)
        assert log.take() == {receiveq.log >> 12}
        guest.front_end.set_vring_addr(0, receiveq.desc, receiveq.avail, receiveq.used, need_reply=True)
        guest.front_end.set_features(guest.front_end.features | LOG_ALL, need_reply=True)
        both_ways(served, guest)
        marked = log.take()
        assert marked and not marked & pages_of_rings(guest)


def test_P74_P93_another_address_for_the_log_takes_effect_at_once(served, guest) -> None:
    ring = guest.qemu.rings[1]
    with a_log(guest) as log:
        guest.qemu.log(log.fd, log.size)
        for gpa in (0x3000, 0x7000):
            guest.front_end.set_vring_addr(1, ring.desc, ring.avail, ring.used, flags=1, log=gpa, need_reply=True)
            log.take()
            guest.driver.transmit(FRAME)
            assert receive(served.port.wire[0]) == FRAME and guest.driver.reclaim_all(5)
            assert log.take() == {gpa >> 12}
        guest.front_end.set_vring_addr(1, ring.desc, ring.avail, ring.used, flags=1, log=2**64 - 1, need_reply=True)
        both_ways(served, guest)
        log.take()  # holds that nothing was written beside the log


# ------------------------------------------------------------------------------------ on and off under way


def in_flight(served: ServedDevice, guest: ScriptedGuest, action) -> None:
    """Do ``action`` while 32 frames are on their way from the guest; all arrive, in order, and no other."""
    frames = [FRAME + bytes([number]) for number in range(32)]
    for frame in frames:
        guest.driver.offer(frame)
    guest.driver.transmitq.submit()
    action()
    assert [receive(served.port.wire[0]) for _ in frames] == frames
    assert guest.driver.reclaim_all(5)


@RINGS
@pytest.mark.parametrize("pairs", [1, 2])
def test_F28_VU_LOG_B_07_P28_on_and_off_under_load_restarts_no_ring(ring, pairs) -> None:
    features = RING | ring | (mask(Feature.MQ) if pairs > 1 else 0)
    with (ServedDevice(WirePort(pairs)) as served,
          ScriptedGuest(served.connect(), features=features, queue_pairs=pairs) as guest):
        def once() -> None:
            with a_log(guest) as log:
                in_flight(served, guest, lambda: guest.qemu.log(log.fd, log.size))
                log.take()
                both_ways(served, guest)
                assert log.take()
                in_flight(served, guest, guest.qemu.unlog)
                log.take()
                both_ways(served, guest)
                assert log.take() == set()

        once()
        before, told = resources(), len(served.port.told)
        for _ in range(10):
            once()
        assert resources() == before
        assert (len(served.lines("driver")), len(served.lines("log-on")), len(served.lines("log-off"))) == (1, 11, 11)
        assert not [what for what, *_ in served.port.told[told:] if what == "offloads"]


def test_VU_LOG_B_08_P92_a_later_log_replaces_it_under_load(served, guest) -> None:
    with a_log(guest) as first, a_log(guest) as second:
        guest.qemu.log(first.fd, first.size)
        both_ways(served, guest)
        before = resources()
        for old, new in ((first, second), (second, first)) * 5:
            in_flight(served, guest, lambda new=new: guest.front_end.set_log_base(new.fd, new.size))
            old.take(), new.take()
            both_ways(served, guest)
            assert new.take() and not old.take()
        assert resources() == before


def test_rings_that_are_to_log_wait_for_the_log(served, guest) -> None:
    """A guest that reboots while it migrates: QEMU shares the log last, after the rings have started."""
    with a_log(guest) as log:
        bases = guest.qemu.stop()
        guest.qemu.reset()
        guest.qemu.rings = [dataclasses.replace(ring, base=base)
                            for ring, base in zip(guest.qemu.rings, bases, strict=True)]
        guest.qemu.start([], RING & guest.qemu.offered | LOG_ALL)
        before = guest.memory.snapshot()
        served.port.wire[0].send(bytes(12) + FRAME)
        served.wait_for("log-missing")
        time.sleep(0.05)
        assert guest.memory.snapshot() == before
        guest.front_end.set_log_base(log.fd, log.size, need_reply=False)
        assert guest.driver.receive_within(5).frame == FRAME
        assert log.take() and served.lines("log-on")
        both_ways(served, guest)


# --------------------------------------------------------------------------------------------- hostile logs


def shorter(guest: ScriptedGuest) -> int:
    return os.memfd_create("log")  # of no bytes


def pipe(guest: ScriptedGuest) -> int:
    read_end, write_end = os.pipe()
    os.close(read_end)
    return write_end


def read_only(guest: ScriptedGuest) -> int:
    fd = os.memfd_create("log")
    os.ftruncate(fd, 1 << 20)
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    finally:
        os.close(fd)


@pytest.mark.parametrize("make", [shorter, pipe, read_only])
def test_P88_P90_file_that_cannot_be_the_log_leaves_the_old_one(served, guest, make) -> None:
    with a_log(guest) as log:
        guest.qemu.log(log.fd, log.size)
        fd = make(guest)
        before = resources()
        with pytest.raises(RequestRefused):
            guest.front_end.set_log_base(fd, log.size, need_reply=True)
        assert resources() == before
        os.close(fd)
        assert "SET_LOG_BASE: dirty log: " in served.wait_for("refused-request")
        both_ways(served, guest)
        assert log.take()


def test_P88_refusal_that_the_front_end_would_not_hear_ends_the_session(served, guest) -> None:
    fd = os.memfd_create("log")
    with pytest.raises(Disconnected):
        guest.front_end.set_log_base(fd, 0x1000, need_reply=False)
    os.close(fd)
    assert "its file has 0x0 bytes, the log needs 0x1000" in served.wait_for("session-end")


def test_P89_too_small_a_log_is_not_overrun_and_complained_of(served, guest) -> None:
    with FrontEndLog(1) as log:
        guest.qemu.log(log.fd, log.size)
        both_ways(served, guest)
        guest.qemu.stop()
        log.take()  # holds that nothing was written beside the log
        guest.front_end.close()
        assert "the 1 bytes of the dirty log" in served.wait_for("log-too-small")


@RINGS
def test_F27_log_that_vanishes_ends_the_session_with_a_line(served, ring) -> None:
    before = resources()
    with ScriptedGuest(served.connect(), features=RING | ring) as guest, a_log(guest) as log:
        guest.qemu.log(log.fd, log.size)
        log.truncate()
        guest.driver.transmit(FRAME)
        assert "the memory of the dirty log vanished" in served.wait_for("session-end")
    assert resources() == before
    with ScriptedGuest(served.connect(), features=RING | ring) as guest:
        both_ways(served, guest)


@pytest.mark.parametrize("make", [socket.socket, select.epoll, tempfile.TemporaryFile],
                         ids=["socket", "epoll", "file"])
def test_P94_log_descriptor_that_is_no_eventfd_is_refused(served, guest, make) -> None:
    with make() as made, pytest.raises(RequestRefused):
        guest.front_end.set_log_fd(made.fileno(), need_reply=True)
    assert "SET_LOG_FD: the log descriptor is no eventfd" in served.wait_for("refused-request")


def test_VU_LOG_B_09_P94_an_eventfd_for_the_log_is_taken_and_not_kept(served, guest) -> None:
    full = os.eventfd(0)
    os.eventfd_write(full, 0xFFFFFFFFFFFFFFFE)
    before = resources()
    for _ in range(20):
        guest.front_end.set_log_fd(full, need_reply=True)
    assert resources() == before
    with a_log(guest) as log:
        guest.qemu.log(log.fd, log.size)
        both_ways(served, guest)
    os.close(full)


# ------------------------------------------------------------------------------------ where there is no log


def test_F30_without_the_log_the_line_says_why_the_front_end_will_not_migrate() -> None:
    with ServedDevice(removed=LOG_ALL) as served, FrontEnd(served.connect()) as front_end:
        assert not front_end.get_features() & LOG_ALL
        assert not front_end.get_protocol_features() >> ProtocolFeature.LOG_SHMFD & 1
        front_end.negotiate()
        front_end.negotiate()
        (line,) = served.lines("no-migration")
        assert "--features -log_all" in line and "lacks VHOST_USER_PROTOCOL_F_LOG_SHMFD feature" in line


def test_F30_front_end_without_shared_logs_is_named(served) -> None:
    with FrontEnd(served.connect()) as front_end:
        front_end.negotiate(protocol_features=~(1 << ProtocolFeature.LOG_SHMFD))
        (line,) = served.lines("no-migration")
        assert "the front-end did not take LOG_SHMFD" in line


def test_front_end_that_can_migrate_needs_no_such_line(served, guest) -> None:
    both_ways(served, guest)
    assert not served.lines("no-migration")
