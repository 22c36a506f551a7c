"""A device all of whose rings are stopped: it is suspended, and silent."""

from vdev.conformance import frames
from vdev.conformance.bench import Bench, Session
from vdev.conformance.checks.rings import offered_frame
from vdev.conformance.verdict import Checks, expect
from vdev.testing.netdriver import NetHeader
from vhost_user.spec import ProtocolFeature

CHECKS = Checks()


def suspended(session: Session) -> None:
    """Traffic, and then all rings are stopped; after that there is work for all of them."""
    bench = session.bench
    session.transmit(frames.plain(frames.tag()))
    if bench.wire is not None:
        mark = frames.tag()
        session.receives(frames.plain(mark), mark=mark)
    for index in range(len(session.queues)):
        session.stop(index)
    for queue in session.queues:
        queue.called()


def provoked(session: Session) -> None:
    """A kick, and a frame from the network."""
    offered_frame(session)
    session.driver.receiveq.kick()
    if session.bench.wire is not None and not session.bench.wire.reflects:
        session.bench.wire.inject(session, frames.plain(frames.tag()), NetHeader())


@CHECKS.row("VU-SUSP-B-01", both=True)
def memory_stays_as_it_is(bench: Bench) -> None:
    """Stops all rings, then publishes a frame, kicks, and lets one come from the network: no byte of guest memory
    changes."""
    with bench.session() as session:
        suspended(session)
        offered_frame(session, kick=False)
        before = session.memory.snapshot()
        provoked_quietly(session)
        session.settle()
        after = session.memory.snapshot()
        changed = [i for i, (old, new) in enumerate(zip(before[0], after[0], strict=True)) if old != new] \
            if before != after else []
        expect(before == after, f"{len(changed)} bytes of guest memory changed, the first at "
               f"{session.memory.regions[0].gpa + changed[0] if changed else 0:#x}")


def provoked_quietly(session: Session) -> None:
    """As :func:`provoked`, without the driver writing to memory."""
    for queue in session.queues:
        queue.kick()
    if session.bench.wire is not None and not session.bench.wire.reflects:
        session.bench.wire.inject(session, frames.plain(frames.tag()), NetHeader())


@CHECKS.row("VU-SUSP-B-02", both=True)
def nobody_is_called(bench: Bench) -> None:
    """Stops all rings, then publishes a frame, kicks, and lets one come from the network: no call descriptor is
    written."""
    with bench.session() as session:
        suspended(session)
        provoked(session)
        session.settle()
        called = [index for index, queue in enumerate(session.queues) if queue.called()]
        expect(not called, f"the call descriptor of ring {called} was written")


@CHECKS.row("VU-SUSP-B-03")
def nothing_is_sent(bench: Bench) -> None:
    """Stops all rings, then publishes a frame, kicks, and lets one come from the network: no message comes, neither on
    the socket nor on the back-end's own channel."""
    needs = [ProtocolFeature.BACKEND_REQ] if bench.protocol >> ProtocolFeature.BACKEND_REQ & 1 else []
    with bench.session(needs=needs) as session:
        suspended(session)
        provoked(session)
        session.settle()
        expect(session.front_end.silent(), "a message came on the socket")
        if session.front_end.backend_channel is not None:
            expect(session.front_end.backend_channel.receive() is None, "a message came on the back-end's channel")


@CHECKS.row("VU-SUSP-B-04")
def messages_are_answered(bench: Bench) -> None:
    """Stops all rings, then asks for features and sets a ring up once more; it is served again."""
    with bench.session() as session:
        suspended(session)
        session.barrier()
        for index in range(len(session.queues)):
            session.place(index, session.queues[index].base)
            session.start(index)
            session.enable(index)
        session.transmit(frames.plain(frames.tag()))
