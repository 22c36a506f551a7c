"""Several queue pairs: which of them frames come to. A front-end tells a back-end by SET_VRING_ENABLE how many the
driver uses."""

import time

from vdev.conformance import frames
from vdev.conformance.bench import NO_OFFLOAD, Bench, Session, Stage
from vdev.conformance.verdict import Checks, NotReachable, expect

CHECKS = Checks()
PAIRS = 2


def enabled(bench: Bench, pairs: int) -> Session:
    """A session of two queue pairs, of which the first ``pairs`` are enabled."""
    session = bench.session(Stage.STARTED, pairs=PAIRS)
    for driver in session.drivers:
        driver.fill()
    for index in range(len(session.queues)):
        session.enable(index, index < 2 * pairs)
    return session


def serves_both(bench: Bench) -> None:
    """Raises NotReachable where it is told that there are more queue pairs than are served, as testpmd does."""
    with enabled(bench, PAIRS) as session:
        for driver in session.drivers:
            driver.transmit(frames.plain(frames.tag()))
        if session.reclaimed(0) and not session.reclaimed(1, 0.5):
            raise NotReachable(f"it tells of {bench.queue_pairs} queue pairs, and serves the first; give it more")


def where(session: Session, mark: bytes, seconds: float) -> int | None:
    """The pair that the frame with ``mark`` comes to; None after ``seconds``."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for pair, driver in enumerate(session.drivers):
            received = driver.receive()
            if received is not None and mark in received.frame:
                return pair
        time.sleep(0.0005)
    return None


def linked(session: Session) -> None:
    """Wait until frames get through, on whatever pair. Raises Broken."""
    deadline = time.monotonic() + session.bench.seconds
    while True:
        mark = frames.tag()
        session.bench.wire.inject(session, frames.plain(mark), NO_OFFLOAD)
        if where(session, mark, 0.1) is not None:
            return
        expect(time.monotonic() < deadline, "no frame from the network reaches the guest at all")


def flows(session: Session, count: int = 16) -> list[list[int | None]]:
    """Three frames each of ``count`` UDP flows come -> the pairs they come to, by flow."""
    linked(session)
    found = []
    for flow in range(count):
        pairs = []
        for _ in range(3):
            mark = frames.tag()
            frame = frames.packet(mark + bytes(40), ports=(5000 + flow, 9000 + 7 * flow))
            session.bench.wire.inject(session, frame, NO_OFFLOAD)
            pairs.append(where(session, mark, session.bench.seconds))
        found.append(pairs)
    session.note(f"flows came to pairs {found}")
    return found


@CHECKS.row("NET-MQ-D-01", "NET-VQ-D-01")
def pairs_can_be_used(bench: Bench) -> None:
    """Uses two queue pairs, receiveqs 0 and 2, transmitqs 1 and 3: frames are taken from both transmitqs."""
    bench.once(serves_both)
    with enabled(bench, PAIRS) as session:
        for pair in range(PAIRS):
            session.transmit(frames.plain(frames.tag()), pair=pair)


@CHECKS.row("NET-MQ-D-03", "NET-MQ-D-05")
def flows_stay_together(bench: Bench) -> None:
    """Lets frames of 16 flows come to two queue pairs: those of one flow come to the same, and none is lost."""
    bench.needs_wire()
    bench.once(serves_both)
    with enabled(bench, PAIRS) as session:
        for pairs in flows(session):
            expect(None not in pairs, "a frame of a flow was lost")
            expect(len(set(pairs)) == 1, f"frames of one flow came to the pairs {pairs}")


@CHECKS.row("NET-MQ-D-06", "NET-MQ-D-07")
def pairs_that_are_off(bench: Bench) -> None:
    """Enables the first of two queue pairs only, as after initialization: frames of 16 flows all come to it. With both,
    and then one again, they do as well."""
    bench.needs_wire()
    bench.once(serves_both)
    with enabled(bench, 1) as session:
        for again in False, True:
            if again:
                for on in True, False:
                    session.enable(2, on)
                    session.enable(3, on)
                session.barrier()
            for pairs in flows(session):
                expect(set(pairs) == {0}, f"frames of a flow came to the pairs {pairs}, pair 0 alone is enabled")
