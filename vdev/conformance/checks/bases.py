"""Where a ring begins and how far it came: sizes, bases; its descriptors, and rings without them."""

import os
import time

from vdev.conformance import frames
from vdev.conformance.bench import Bench, Session, Stage
from vdev.conformance.checks.messages import signalled
from vdev.conformance.checks.rings import RECEIVE, TRANSMIT, offered_frame
from vdev.conformance.verdict import Checks, NotReachable, expect

CHECKS = Checks()
WRAP = 1 << 15  # of a packed ring's half of a base


def traffic_from(session: Session, count: int) -> None:
    """``count`` frames out, one by one."""
    for _ in range(count):
        session.transmit(frames.plain(frames.tag()))


@CHECKS.row("VU-BASE-B-01", both=True)
def queue_sizes(bench: Bench) -> None:
    """Queues of 2, 16, 256 and 1024 descriptors, and more frames than each has, in bursts that fill it."""
    for size in 2, 16, 256, 1024:
        with bench.session(size=size) as session:
            for _ in range(3):
                for _ in range(size // 2 + 1):
                    session.driver.offer(frames.plain(frames.tag()))
                session.driver.transmitq.submit()
                expect(session.reclaimed(), f"a queue of {size} descriptors got stuck")


@CHECKS.row("VU-BASE-B-02")
def used_index_is_read_from_memory(bench: Bench) -> None:
    """Starts a split ring at base 100 whose used.idx says 90: the next chain is that at available index 100, and its
    used element goes to index 90."""
    with bench.session(Stage.SHARED, base=100) as session:
        session.driver.fill()
        ring = session.driver.transmitq.ring
        ring.used.idx = ring.next_used = 90
        for index in RECEIVE, TRANSMIT:
            session.place(index, base=100)
        session.start_all()
        for index in RECEIVE, TRANSMIT:
            session.enable(index)
        session.barrier()
        session.driver.transmit(frames.plain(frames.tag()))
        session.settle()
        expect(ring.used.idx == 91, f"used.idx is {ring.used.idx} after one chain, not 91")
        expect(session.driver.reclaim() == 1, "the chain was not used")


@CHECKS.row("VU-BASE-B-03")
def packed_ring_from_anywhere(bench: Bench) -> None:
    """Starts packed rings of 64 at slot 5 and 63, with either wrap counter; 70 frames go through each."""
    for half in 5 | WRAP, 5, 63 | WRAP, 63:
        with bench.session(packed=True, base=half * 0x10001) as session:
            traffic_from(session, 70)


@CHECKS.row("VU-BASE-B-04")
def base_of_a_split_ring(bench: Bench) -> None:
    """Stops the transmitq after five frames, once begun at 0 and once at 65534: bases 5 and 3."""
    for begin, due in (0, 5), (65534, 3):
        with bench.session(packed=False, base=begin) as session:
            traffic_from(session, 5)
            base = session.stop(TRANSMIT)
            expect(base == due, f"begun at {begin}, the base after five frames is {base:#x}, not {due}")


@CHECKS.row("VU-BASE-B-05")
def base_of_a_packed_ring(bench: Bench) -> None:
    """Stops packed rings of 16 descriptors after 0, 5, 16 and 20 frames: slot and wrap counter, of available ones in
    the low half and of used ones in the high half."""
    for count in 0, 5, 16, 20:
        with bench.session(packed=True, size=16) as session:
            traffic_from(session, count)
            base, due = session.stop(TRANSMIT), session.driver.transmitq.base
            expect(base == due, f"after {count} frames the base is {base:#010x}, not {due:#010x}")


@CHECKS.row("VU-BASE-B-06")
def base_may_lag_behind(bench: Bench) -> None:
    """Posts 64 receive buffers, lets three frames come, and stops the receiveq: the base is the number of buffers used,
    not of those posted."""
    with bench.session(packed=False) as session:
        for _ in range(3):
            mark = frames.tag()
            session.receives(frames.plain(mark), mark=mark)
        used = session.driver.receiveq.ring.used.idx
        base = session.stop(RECEIVE)
        expect(base == used, f"the base is {base}, {used} buffers were used and "
               f"{session.driver.receiveq.ring.avail.idx} posted")


@CHECKS.row("VU-BASE-B-07", both=True)
def stopping_completes_what_was_begun(bench: Bench) -> None:
    """Publishes 40 frames at once and stops the transmitq: when the reply comes, all chains before the base answered
    are used, and none after."""
    with bench.session() as session:
        for _ in range(40):
            session.driver.offer(frames.plain(frames.tag()))
        session.driver.transmitq.submit()
        base = session.stop(TRANSMIT)
        done = session.driver.reclaim()
        base, due = base & 0xFFFF, session.driver.transmitq.base & 0xFFFF
        expect(base == due, f"the base is {base:#x}, but the {done} chains used so far end at {due:#x}")


@CHECKS.row("VU-BASE-B-10")
def errors_of_a_ring_are_signalled(bench: Bench) -> None:
    """Lets available.idx leap by more than the ring has descriptors: the descriptor of SET_VRING_ERR is signalled."""
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        with bench.session(packed=False) as session:
            session.front_end.set_vring_err(TRANSMIT, fd)
            session.barrier()
            ring = session.driver.transmitq.ring
            ring.avail.idx = ring.next_avail + 1000
            session.note("available.idx leaps from 0 to 1000 on a ring of 64")
            session.driver.transmitq.kick()
            told = signalled(fd, min(1.0, bench.seconds))
            if not told and ring.used.idx:
                raise NotReachable("it took an available.idx that is 1000 ahead for no error, and went on")
            expect(told, "the ring stands still, and its error descriptor was not signalled")
    finally:
        os.close(fd)


@CHECKS.row("VU-BASE-B-11", both=True)
def ring_without_a_call_descriptor(bench: Bench) -> None:
    """Takes the call descriptor of the transmitq away while it runs; frames are still used."""
    with bench.session() as session:
        session.transmit(frames.plain(frames.tag()))
        session.front_end.set_vring_call(TRANSMIT, None)
        for _ in range(5):
            offered_frame(session)
            expect(polled(session), "without a call descriptor a frame was not used")


def polled(session: Session) -> bool:
    """All transmitted chains come back, though no call tells."""
    deadline = time.monotonic() + session.bench.seconds
    while session.driver.transmitq.outstanding and time.monotonic() < deadline:
        session.driver.reclaim()
        time.sleep(0.001)
    return not session.driver.transmitq.outstanding


@CHECKS.row("VU-BASE-B-12", both=True)
def ring_without_a_kick_descriptor(bench: Bench) -> None:
    """Starts the transmitq with SET_VRING_KICK without a descriptor; frames published then are used."""
    with bench.session(Stage.PLACED) as session:
        session.driver.fill()
        session.start(RECEIVE)
        session.front_end.set_vring_kick(TRANSMIT, None)
        session.enable(RECEIVE)
        session.enable(TRANSMIT)
        for _ in range(3):
            offered_frame(session, kick=False)
            expect(polled(session), "a ring without a kick descriptor was not looked at")
