"""The states of a ring: stopped or started, disabled or enabled; and which ring is meant."""

import os

from vdev.conformance import frames
from vdev.conformance.bench import Bench, Session, Stage
from vdev.conformance.verdict import Checks, NotReachable, expect
from vdev.net.features import Feature
from vdev.testing.netdriver import NetHeader
from vdev.testing.scripted import shared_regions
from vhost_user.spec import ProtocolFeature

CHECKS = Checks()
RECEIVE, TRANSMIT = 0, 1  # ring indices of the first pair


def offered_frame(session: Session, kick: bool = True) -> bytes:
    """A frame on the transmitq, published; with a kick or without. -> its mark."""
    mark = frames.tag()
    session.note(f"published a frame on ring 1, {'kicked' if kick else 'no kick'}")
    session.driver.offer(frames.plain(mark))
    session.driver.transmitq.publish()
    if kick:
        session.driver.transmitq.kick()
    return mark


@CHECKS.row("VU-RING-B-01", both=True)
def rings_begin_stopped(bench: Bench) -> None:
    """Tells where the rings are, but gives no kick descriptor and enables nothing; a frame published is not touched."""
    with bench.session(Stage.PLACED) as session:
        session.driver.fill()
        offered_frame(session)
        expect(session.untouched(TRANSMIT), "a ring that was never started was served")


@CHECKS.row("VU-RING-B-02", both=True)
def stopped_ring_is_left_alone(bench: Bench) -> None:
    """Enables rings that were not started; a frame published is not touched. Then the rings start, and it is taken."""
    with bench.session(Stage.PLACED) as session:
        session.driver.fill()
        session.enable(RECEIVE)
        session.enable(TRANSMIT)
        offered_frame(session)
        expect(session.untouched(TRANSMIT), "a ring that was enabled but not started was served")
        session.start_all()
        expect(session.reclaimed(), "after its start the ring was not served")


@CHECKS.row("VU-RING-B-03", both=True)
def enabling_is_remembered(bench: Bench) -> None:
    """Enables rings before they start, and in a second session after; either way a frame is taken."""
    for enable_first in True, False:
        with bench.session(Stage.PLACED) as session:
            session.driver.fill()
            for enabling in enable_first, not enable_first:
                if enabling:
                    session.enable(RECEIVE)
                    session.enable(TRANSMIT)
                else:
                    session.start_all()
            offered_frame(session)
            order = "before" if enable_first else "after"
            expect(session.reclaimed(), f"a ring enabled {order} its start was not served")
            if bench.wire is not None:
                mark = frames.tag()
                session.sends(frames.plain(mark), mark=mark)


@CHECKS.row("VU-RING-B-04", "VU-RING-B-05", both=True)
def start_needs_no_kick(bench: Bench) -> None:
    """Publishes frames before the ring starts, starts and enables it, and writes nothing to the kick descriptor."""
    with bench.session(Stage.PLACED) as session:
        session.driver.fill()
        for _ in range(3):
            offered_frame(session, kick=False)
        session.start_all()
        session.enable(RECEIVE)
        session.enable(TRANSMIT)
        expect(session.reclaimed(), "frames that were there when the ring started were not taken without a kick")


@CHECKS.row("VU-RING-B-06", both=True)
def kicked_before_the_start(bench: Bench) -> None:
    """Hands over a kick descriptor that was written before; the frame is taken."""
    with bench.session(Stage.PLACED) as session:
        session.driver.fill()
        offered_frame(session)
        session.start_all()
        session.enable(RECEIVE)
        session.enable(TRANSMIT)
        expect(session.reclaimed(), "a ring whose kick descriptor was signalled before the start was not served")


@CHECKS.row("VU-RING-B-07", both=True)
def base_stops_a_ring(bench: Bench) -> None:
    """Stops the transmitq with GET_VRING_BASE; a frame published and kicked after the reply is not touched."""
    with bench.session() as session:
        session.transmit(frames.plain(frames.tag()))
        session.stop(TRANSMIT)
        offered_frame(session)
        expect(session.untouched(TRANSMIT), "a ring was served after GET_VRING_BASE had been answered")


@CHECKS.row("VU-RING-B-08", both=True)
def stopped_ring_goes_on(bench: Bench) -> None:
    """Stops the transmitq after three frames, publishes one more, and starts it again from the base answered; the frame
    is taken, and more after it."""
    with bench.session() as session:
        for _ in range(3):
            session.transmit(frames.plain(frames.tag()))
        base = session.stop(TRANSMIT)
        offered_frame(session)
        session.place(TRANSMIT, base)
        session.start(TRANSMIT)
        expect(session.reclaimed(), "a ring started again did not go on")
        session.transmit(frames.plain(frames.tag()))


@CHECKS.row("VU-RING-B-09", "VU-RING-B-11", both=True)
def disabled_transmitq_drains(bench: Bench) -> None:
    """Disables the transmitq and sends a frame on it: it comes back used, and nothing leaves the back-end. After that
    it is enabled again, and the next frame is sent."""
    with bench.session() as session:
        session.transmit(frames.plain(frames.tag()))
        session.enable(TRANSMIT, False)
        mark = offered_frame(session)
        expect(session.reclaimed(), "the frame was not used: the guest's transmitq is stuck")
        if bench.wire is not None:
            expect(session.leaves(mark, bench.quiet) is None, "a frame on a disabled transmitq was sent")
        session.enable(TRANSMIT)
        session.transmit(frames.plain(frames.tag()))


@CHECKS.row("VU-RING-B-10", both=True)
def disabled_receiveq_gets_nothing(bench: Bench) -> None:
    """Disables the receiveq while frames come from the network: none reaches it."""
    with bench.session() as session:
        mark = frames.tag()
        session.receives(frames.plain(mark), mark=mark)
        session.enable(RECEIVE, False)
        session.barrier()
        mark = frames.tag()
        session.inject(frames.plain(mark))
        expect(session.arrives(mark, bench.quiet) is None, "a disabled receiveq got a frame")


@CHECKS.row("VU-RING-B-12", both=True)
def traffic(bench: Bench) -> None:
    """Sends 100 frames of all lengths, and lets some come from the network where there is a view of it."""
    with bench.session() as session:
        for length in range(60, 1500, 15):
            session.transmit(frames.plain(frames.tag(), length))
        if bench.wire is not None:
            for length in range(60, 1500, 99):
                mark = frames.tag()
                sent = frames.plain(mark, length)
                _, left = session.sends(sent, mark=mark)
                expect(left == sent, f"a frame of {length} bytes left with {len(left)} bytes or changed")
                mark = frames.tag()
                sent = frames.plain(mark, length)
                received = session.receives(sent, mark=mark)
                expect(received.frame == sent, f"a frame of {length} bytes arrived with {len(received.frame)} bytes or "
                       "changed")


@CHECKS.row("VU-RING-B-13", both=True)
def without_bit_30_rings_are_enabled(bench: Bench) -> None:
    """Sets features without bit 30 and sends no SET_VRING_ENABLE; frames are taken, and sent."""
    with bench.session(bit_30=False) as session:
        session.transmit(frames.plain(frames.tag()))
        if bench.wire is not None:
            mark = frames.tag()
            session.sends(frames.plain(mark), mark=mark)


@CHECKS.row("VU-RING-B-14", both=True)
def changed_while_running(bench: Bench) -> None:
    """While the rings run: another call descriptor, the same memory table once more, frames after each."""
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        with bench.session() as session:
            session.transmit(frames.plain(frames.tag()))
            session.front_end.set_vring_call(TRANSMIT, fd)
            session.barrier()
            queue = session.driver.transmitq
            os.close(queue.call_fd)
            queue.call_fd = os.dup(fd)
            session.transmit(frames.plain(frames.tag()))
            session.front_end.set_mem_table(shared_regions(session.memory))
            session.transmit(frames.plain(frames.tag()))
    finally:
        os.close(fd)


@CHECKS.row("VU-RING-B-15", both=True)
def one_ring_is_meant(bench: Bench) -> None:
    """Disables the receiveq and enables it again, while frames are sent; then a frame comes from the network."""
    with bench.session() as session:
        session.enable(RECEIVE, False)
        mark = offered_frame(session)
        expect(session.reclaimed(), "disabling ring 0 stopped ring 1")
        session.enable(RECEIVE)
        if bench.wire is not None:
            if not bench.wire.reflects:
                expect(session.leaves(mark) is not None, "disabling ring 0 disabled ring 1: its frame was not sent")
            mark = frames.tag()
            session.receives(frames.plain(mark), mark=mark)


@CHECKS.row("VU-MQ-B-01")
def as_many_rings_as_are_said(bench: Bench) -> None:
    """Sets up, starts and enables all the queue pairs that GET_QUEUE_NUM tells of (no more than 16), which is not
    refused, and sends a frame on the first."""
    bench.needs(ProtocolFeature.MQ)
    with bench.connect() as front_end:
        front_end.set_protocol_features(bench.protocol & 1 << ProtocolFeature.MQ)
        number = front_end.get_queue_num()
    expect(number >= 1, f"GET_QUEUE_NUM says {number}")
    with bench.session(pairs=min(bench.queue_pairs, 16), size=16) as session:
        session.transmit(frames.plain(frames.tag()))


@CHECKS.row("VU-MQ-B-02")
def rings_in_any_order(bench: Bench) -> None:
    """Sets up ring 1 before ring 0; frames go through."""
    with bench.session(Stage.SHARED) as session:
        for index in TRANSMIT, RECEIVE:
            session.place(index)
            session.start(index)
            session.enable(index)
        session.driver.fill()
        session.transmit(frames.plain(frames.tag()))
        if bench.wire is not None:
            mark = frames.tag()
            session.receives(frames.plain(mark), mark=mark)


@CHECKS.row("VQRST-D-01", both=True)
def queue_that_was_reset_is_left_alone(bench: Bench) -> None:
    """As the reset of a queue is told to a back-end: GET_VRING_BASE; frames published then are not touched."""
    bench.needs(Feature.RING_RESET)
    base_stops_a_ring(bench)


@CHECKS.row("VQRST-D-02")
def queue_that_was_reset_calls_nobody(bench: Bench) -> None:
    """Stops the receiveq while frames come from the network: its call descriptor stays silent."""
    bench.needs(Feature.RING_RESET)
    wire = bench.needs_wire()
    if wire.reflects:
        raise NotReachable("needs a wire that does not reflect")
    with bench.session(needs=[Feature.RING_RESET]) as session:
        session.stop(RECEIVE)
        session.driver.receiveq.called()
        wire.inject(session, frames.plain(frames.tag()), NetHeader())
        session.settle()
        expect(not session.driver.receiveq.called(), "the driver was called for a queue that was reset")
