"""Rows P87 to P94 of docs/conformance/messages.tsv: what a hostile front-end says about the dirty log.

Over a real socket, to a daemon that serves on after each test and holds no more than before (tests/conftest.py).
FrontEndLog.take() holds that nothing beside the log was written.
"""

import os
import select
import socket

import pytest

from vdev.net.features import Feature, mask
from vdev.testing.dirty import FrontEndLog, changed, covering
from vdev.testing.kept import FRAME, PROTOCOL, WAIT, Traced, refused
from vdev.testing.scripted import ScriptedGuest
from vhost_user.spec import ProtocolFeature, Request
from vhost_user.spec import mask as protocol_mask
from vhost_user.wire import LOG, Log

pytestmark = pytest.mark.timeout(120)

PAGE = 4096
LOGGING = PROTOCOL | protocol_mask(ProtocolFeature.LOG_SHMFD)
LOG_ALL = mask(Feature.LOG_ALL)


def test_P87_P88_logs_that_make_no_sense(daemon) -> None:
    top = 1 << 64
    fd = os.memfd_create("log")
    os.ftruncate(fd, PAGE)
    for size, offset in ((0, 0), (top - 1, 1), (PAGE, top - PAGE), (PAGE, (1 << 63) - PAGE), (top - 1, top - 1),
                         (PAGE + 1, 0), (PAGE, 1), (1, PAGE), (1 << 40, 0)):
        daemon.refuses(Request.SET_LOG_BASE, LOG.encode(Log(size, offset)), [fd], protocol_features=LOGGING)
    os.close(fd)


@pytest.mark.parametrize("size", [1, 8, PAGE])
def test_P89_log_too_small_for_the_highest_page(daemon, size) -> None:
    """Rings and buffers lie from 1 GiB on: pages that such a log has no bits for."""
    with ScriptedGuest.connect(daemon.path) as guest, FrontEndLog(size) as log:
        guest.qemu.log(log.fd, log.size)
        for _ in range(3):
            assert guest.exchange(FRAME, WAIT) == FRAME
        assert log.take() == set()


def test_P90_log_that_cannot_be_mapped_leaves_the_old_one(daemon) -> None:
    with ScriptedGuest.connect(daemon.path) as guest, FrontEndLog(covering(guest.memory)) as log:
        guest.qemu.log(log.fd, log.size)
        reading = os.open(f"/proc/self/fd/{log.fd}", os.O_RDONLY)
        pipe = os.pipe()
        before = daemon.holding.counts
        for fd in (reading, *pipe):
            assert refused(guest.front_end, Request.SET_LOG_BASE, LOG.encode(Log(log.size, 0)), [fd])
            os.close(fd)
        assert daemon.holding.counts == before
        assert guest.exchange(FRAME, WAIT) == FRAME
        assert log.take()


@pytest.mark.parametrize("offset", [8, PAGE, PAGE + 8])
def test_P91_log_at_an_offset_of_its_file(daemon, offset) -> None:
    with ScriptedGuest.connect(daemon.path) as guest, FrontEndLog(covering(guest.memory), offset) as log:
        before = guest.memory.snapshot()
        guest.front_end.set_log_base(log.fd, log.size, offset)
        guest.front_end.set_features(guest.front_end.features | LOG_ALL, need_reply=True)
        guest.driver.transmit(FRAME)
        received = guest.driver.receive_within(WAIT, refill=False)
        assert received is not None and received.frame == FRAME
        buffer = guest.driver.receiveq.ring.desc[0].addr
        assert buffer >> 12 in changed(guest.memory, before) & log.take()


def test_P92_log_after_log(daemon) -> None:
    with (ScriptedGuest.connect(daemon.path) as guest, FrontEndLog(covering(guest.memory)) as first,
          FrontEndLog(covering(guest.memory)) as last):
        guest.qemu.log(first.fd, first.size)
        assert guest.exchange(FRAME, WAIT) == FRAME
        before = daemon.holding.counts
        for _ in range(20):
            guest.front_end.set_log_base(last.fd, last.size)
        assert daemon.holding.counts == before
        first.take()
        assert guest.exchange(FRAME, WAIT) == FRAME
        assert last.take() and not first.take()


@pytest.mark.parametrize("place", [(1 << 64) - 1, (1 << 64) - 4, 1 << 63, 1 << 40])
def test_P93_used_ring_logged_beyond_the_log(daemon, place) -> None:
    with ScriptedGuest.connect(daemon.path) as guest, FrontEndLog(PAGE) as log:
        ring = guest.qemu.rings[1]
        guest.front_end.set_log_base(log.fd, log.size)
        guest.front_end.set_features(guest.front_end.features | LOG_ALL, need_reply=True)
        guest.front_end.set_vring_addr(1, ring.desc, ring.avail, ring.used, flags=1, log=place, need_reply=True)
        for _ in range(3):
            assert guest.exchange(FRAME, WAIT) == FRAME
        assert log.take() == set()


def test_P94_descriptors_to_be_called_for_the_log(daemon) -> None:
    with (Traced() as traced, select.epoll() as epoll, socket.socket(socket.AF_UNIX) as a_socket,
          open("/dev/null", "rb") as device):
        for fd in (traced.fd, epoll.fileno(), a_socket.fileno(), device.fileno()):
            daemon.refuses(Request.SET_LOG_FD, fds=[fd], protocol_features=LOGGING)
        assert traced.closed()
    daemon.refuses(Request.SET_LOG_FD, protocol_features=LOGGING)
    full = os.eventfd(0)  # blocking, and nobody reads it
    os.eventfd_write(full, (1 << 64) - 2)
    with ScriptedGuest.connect(daemon.path) as guest, FrontEndLog(covering(guest.memory)) as log:
        before = daemon.holding.fds
        for _ in range(5):
            guest.front_end.set_log_fd(full, need_reply=True)
        assert daemon.holding.fds == before
        guest.qemu.log(log.fd, log.size)
        assert guest.exchange(FRAME, WAIT) == FRAME
    os.close(full)
