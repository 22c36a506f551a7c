"""The dirty log, for a guest that migrates."""

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

from vdev.conformance import frames
from vdev.conformance.bench import Bench, Session
from vdev.conformance.checks.messages import signalled
from vdev.conformance.checks.rings import RECEIVE, TRANSMIT
from vdev.conformance.verdict import Checks, expect
from vdev.net.features import Feature, mask
from vhost_user.spec import VRING_LOG_FLAG, ProtocolFeature

CHECKS = Checks()
PAGE = 4096  # of the log, whatever the machine has
NEEDS = [ProtocolFeature.LOG_SHMFD, Feature.LOG_ALL]
OUTSIDE = 0x3F00_0000  # a page below all guest memory, for log_guest_addr


class Log:
    """A log for all of a session's memory, from byte ``offset`` of a file of its own."""

    def __init__(self, session: Session, offset: int = 0) -> None:
        end = max(region.gpa + region.size for region in session.memory.regions)
        self.size = -(-end // PAGE // 8 // PAGE) * PAGE
        self.offset = offset
        self.fd = os.memfd_create("dirty-log", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, offset + self.size)
        self._file = mmap.mmap(self.fd, offset + self.size)

    def marked(self) -> set[int]:
        """The pages marked so far."""
        data = self._file[self.offset:]
        return {8 * at + bit for at, byte in enumerate(data) if byte for bit in range(8) if byte >> bit & 1} \
            if data.strip(b"\0") else set()

    def clear(self) -> None:
        """Forget them; while nobody marks."""
        self._file[self.offset:] = bytes(self.size)

    def close(self) -> None:
        """Unmap it."""
        self._file.close()
        os.close(self.fd)


@contextmanager
def logging(bench: Bench, *, offset: int = 0, used_at: int | None = None, ring_flag: bool = True,
            ) -> Iterator[tuple[Session, Log]]:
    """A running session whose writes are logged. used_at: log_guest_addr; None: where the used rings are."""
    with bench.session(needs=NEEDS, without=mask(Feature.LOG_ALL)) as session:
        log = Log(session, offset)
        try:
            if bench.wire is not None:
                mark = frames.tag()
                session.receives(frames.plain(mark), mark=mark)
            session.front_end.set_log_base(log.fd, log.size, offset, need_reply=False)
            switch(session, True, used_at=used_at, ring_flag=ring_flag)
            yield session, log
        finally:
            log.close()


def switch(session: Session, on: bool, *, used_at: int | None = None, ring_flag: bool = True) -> None:
    """Switch logging while the rings run, as QEMU does."""
    log_all = mask(Feature.LOG_ALL) if on else 0
    session.front_end.set_features(session.features | mask(Feature.PROTOCOL_FEATURES) | log_all)
    for index, queue in enumerate(session.queues):
        desc, avail, used = (session.memory.uva(area.gpa) for area in queue.ring.areas)
        session.front_end.set_vring_addr(index, desc, avail, used, flags=VRING_LOG_FLAG if on and ring_flag else 0,
                                         log=queue.ring.areas[2].gpa if used_at is None else used_at)


def pages(gpa: int, length: int) -> set[int]:
    """Those of [gpa, gpa + length)."""
    return set(range(gpa // PAGE, (gpa + length - 1) // PAGE + 1))


def received_pages(session: Session) -> set[int]:
    """Let a frame come -> the pages it was written to."""
    mark = frames.tag()
    queue, found = session.driver.receiveq, []
    gather = queue._gather
    def watched(buffers, length):
        found.append((buffers, length))
        return gather(buffers, length)
    queue._gather = watched
    session.receives(frames.plain(mark, 900), mark=mark)
    buffers, length = found[-1]
    return pages(buffers[0].gpa, length)


@CHECKS.row("VU-LOG-B-01", "VU-LOG-B-02", both=True)
def buffers_are_marked(bench: Bench) -> None:
    """With LOG_ALL lets frames come from the network: the pages of the buffers they are in are marked."""
    bench.needs(*NEEDS)
    bench.needs_wire()
    with logging(bench) as (session, log):
        for _ in range(5):
            log.clear()
            due = received_pages(session)
            session.settle()
            missing = due - log.marked()
            expect(not missing, f"pages {sorted(map(hex, missing))} were written, and are not marked")


def used_page(session: Session, index: int) -> set[int]:
    """The pages of the part of ring ``index`` that is logged at log_guest_addr and that one used chain changes."""
    area = session.queues[index].ring.areas[2]
    return pages(area.gpa, area.len)


@CHECKS.row("VU-LOG-B-03")
def used_ring_is_marked(bench: Bench) -> None:
    """With LOG_ALL and VHOST_VRING_F_LOG sends a frame: the page of the used ring is marked."""
    with logging(bench) as (session, log):
        log.clear()
        session.transmit(frames.plain(frames.tag()))
        session.settle()
        expect(log.marked() & used_page(session, TRANSMIT), "the used ring was written, and its page is not marked")


@CHECKS.row("VU-LOG-B-04")
def used_ring_is_marked_where_told(bench: Bench) -> None:
    """Tells a log_guest_addr that is in no region at all: a frame sent marks the page there."""
    with logging(bench, used_at=OUTSIDE) as (session, log):
        log.clear()
        session.transmit(frames.plain(frames.tag()))
        session.settle()
        expect(OUTSIDE // PAGE in log.marked(), f"page {OUTSIDE // PAGE:#x} of log_guest_addr is not marked, but "
               f"{sorted(map(hex, log.marked()))}")


@CHECKS.row("VU-LOG-B-05")
def position_in_the_log(bench: Bench) -> None:
    """Shares a log that begins two pages into its file: a frame sent marks the page of log_guest_addr, no other outside
    of guest memory, and nothing in front of the log is written."""
    with logging(bench, offset=2 * PAGE, used_at=OUTSIDE) as (session, log):
        log.clear()
        session.transmit(frames.plain(frames.tag()))
        session.settle()
        (region,) = session.memory.regions
        marked = log.marked() - pages(region.gpa, region.size)
        expect(marked == {OUTSIDE // PAGE}, f"page {OUTSIDE // PAGE:#x} is due, and outside of guest memory "
               f"{sorted(map(hex, marked))} are marked")
        expect(not any(os.pread(log.fd, 2 * PAGE, 0)), "the file was written in front of the log")


@CHECKS.row("VU-LOG-B-06")
def marks_are_added(bench: Bench) -> None:
    """Marks the other seven pages of a byte of the log beforehand: they are still marked when the device has added its
    own."""
    with logging(bench, used_at=OUTSIDE) as (session, log):
        page = OUTSIDE // PAGE
        others = set(range(page // 8 * 8, page // 8 * 8 + 8)) - {page}
        log._file[log.offset + page // 8] = 0xFF & ~(1 << page % 8)
        session.transmit(frames.plain(frames.tag()))
        session.settle()
        expect(page in log.marked(), "its own mark is missing")
        expect(others <= log.marked(), "marks of others are gone")


@CHECKS.row("VU-LOG-B-07", both=True)
def logging_is_switched(bench: Bench) -> None:
    """Switches logging off and on again while frames are sent: none is lost; marks come only while it is on."""
    with logging(bench, used_at=OUTSIDE) as (session, log):
        for on in False, True, False, True:
            switch(session, on, used_at=OUTSIDE)
            session.settle()
            log.clear()
            for _ in range(5):
                session.transmit(frames.plain(frames.tag()))
            session.settle()
            marked = OUTSIDE // PAGE in log.marked()
            expect(marked == on, f"logging is {'on' if on else 'off'}, and a page was {'' if marked else 'not '}marked")


@CHECKS.row("VU-LOG-B-08")
def log_is_replaced(bench: Bench) -> None:
    """Shares another log while logging: marks go there, and no more to the first."""
    with logging(bench, used_at=OUTSIDE) as (session, log):
        other = Log(session)
        try:
            session.front_end.set_log_base(other.fd, other.size, need_reply=False)
            session.settle()
            log.clear()
            session.transmit(frames.plain(frames.tag()))
            session.settle()
            expect(OUTSIDE // PAGE in other.marked(), "nothing is marked in the new log")
            expect(not log.marked(), "the log that was replaced is still marked")
        finally:
            other.close()


@CHECKS.row("VU-LOG-B-09")
def log_descriptor(bench: Bench) -> None:
    """Sends SET_LOG_FD with an eventfd, and a frame: it may be signalled, and does no harm."""
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        with logging(bench) as (session, _):
            session.front_end.set_log_fd(fd)
            session.transmit(frames.plain(frames.tag()))
            session.note(f"signalled: {signalled(fd, 0.02)}")
    finally:
        os.close(fd)


@CHECKS.row("VU-LOG-B-10", both=True)
def nothing_is_marked_after_the_end(bench: Bench) -> None:
    """Stops all rings while logging, then publishes frames and kicks: neither log nor memory changes any more."""
    with logging(bench) as (session, log):
        session.transmit(frames.plain(frames.tag()))
        for index in RECEIVE, TRANSMIT:
            session.stop(index)
        session.driver.offer(frames.plain(frames.tag()))
        session.driver.transmitq.publish()
        log.clear()
        before = session.memory.snapshot()
        for queue in session.queues:
            queue.kick()
        session.settle()
        expect(not log.marked(), "pages were marked after all rings had stopped")
        expect(session.memory.snapshot() == before, "guest memory changed after all rings had stopped")
