"""The device status and its reset."""

from vdev.conformance import frames
from vdev.conformance.bench import STARTED_STATUS, Bench, Session, Stage
from vdev.conformance.checks.rings import RECEIVE, TRANSMIT, offered_frame
from vdev.conformance.verdict import Checks, NotReachable, expect
from vdev.net.features import Feature, mask
from vhost_user.spec import BackendRequest, ProtocolFeature, Status

CHECKS = Checks()
STATUS = ProtocolFeature.STATUS


def resets(session: Session) -> None:
    """Reset the device, as the front-end does: by SET_STATUS 0, which stops the rings."""
    session.front_end.set_status(0)
    session.barrier()


@CHECKS.row("ST-D-01", "RST-D-01")
def status_begins_at_zero(bench: Bench) -> None:
    """Reads the status of a fresh session, of a running device, and of one reset by SET_STATUS 0: zero, what was set,
    and zero."""
    with bench.session(Stage.CONNECTED, needs=[STATUS]) as session:
        session.front_end.set_protocol_features(session.protocol)
        status = session.front_end.get_status()
        expect(status == 0, f"the status of a fresh session is {status:#x}")
    with bench.session(needs=[STATUS]) as session:
        session.transmit(frames.plain(frames.tag()))
        status = session.front_end.get_status()
        expect(status == STARTED_STATUS, f"the status of a running device is {status:#x}, not {STARTED_STATUS:#x}")
        resets(session)
        status = session.front_end.get_status()
        expect(status == 0, f"after SET_STATUS 0 the status is {status:#x}")


@CHECKS.row("ST-D-02", both=True)
def nothing_before_driver_ok(bench: Bench) -> None:
    """Sets up everything but DRIVER_OK and the kick descriptors: a frame published is not touched. Then both come, and
    it is taken."""
    with bench.session(Stage.PLACED, needs=[STATUS]) as session:
        session.driver.fill()
        session.enable(RECEIVE)
        session.enable(TRANSMIT)
        offered_frame(session)
        expect(session.untouched(TRANSMIT), "a buffer was used before DRIVER_OK and before the ring was started")
        session.start_all()
        expect(session.reclaimed(), "with DRIVER_OK and a started ring the frame was not taken")


@CHECKS.row("ST-D-03")
def no_call_before_driver_ok(bench: Bench) -> None:
    """Sets up everything but DRIVER_OK and the kick descriptors, with a frame published: the call descriptor is not
    written."""
    with bench.session(Stage.PLACED, needs=[STATUS]) as session:
        session.driver.fill()
        session.enable(RECEIVE)
        session.enable(TRANSMIT)
        for queue in session.queues:
            queue.called()
        offered_frame(session)
        session.settle()
        expect(not any(queue.called() for queue in session.queues), "the driver was called before DRIVER_OK")


def broken(session: Session) -> bool:
    """Let available.idx of the transmitq leap ahead -> False when the device goes on as if nothing was wrong."""
    ring = session.driver.transmitq.ring
    before = ring.used.idx
    ring.avail.idx = ring.next_avail + 1000
    session.note("available.idx leaps by 1000 on a ring of 64")
    session.driver.transmitq.kick()
    session.settle()
    return ring.used.idx == before


@CHECKS.row("ST-D-04")
def needs_reset_after_an_error(bench: Bench) -> None:
    """Breaks the transmitq by an available.idx that leaps; the status should have DEVICE_NEEDS_RESET."""
    with bench.session(needs=[STATUS], packed=False) as session:
        session.transmit(frames.plain(frames.tag()))
        if not broken(session):
            raise NotReachable("it took an available.idx that is 1000 ahead for no error, and went on")
        status = session.front_end.get_status()
        expect(status & Status.DEVICE_NEEDS_RESET, f"the status is {status:#x}: DEVICE_NEEDS_RESET is not there")


@CHECKS.row("ST-D-05")
def needs_reset_is_told(bench: Bench) -> None:
    """Breaks the transmitq; if the status then has DEVICE_NEEDS_RESET, CONFIG_CHANGE_MSG has to come."""
    needs = [STATUS, ProtocolFeature.CONFIG, ProtocolFeature.BACKEND_REQ]
    with bench.session(needs=needs, packed=False) as session:
        session.transmit(frames.plain(frames.tag()))
        broken(session)
        if not session.front_end.get_status() & Status.DEVICE_NEEDS_RESET:
            raise NotReachable("DEVICE_NEEDS_RESET is not raised")
        message = session.front_end.backend_channel.receive()
        expect(message is not None and message.request == BackendRequest.CONFIG_CHANGE_MSG,
               "DEVICE_NEEDS_RESET was raised, and no CONFIG_CHANGE_MSG came")


@CHECKS.row("RST-D-02", both=True)
def nothing_after_a_reset(bench: Bench) -> None:
    """Resets a running device with SET_STATUS 0 (and GET_VRING_BASE, as front-ends do), then kicks with a frame
    published: no byte of guest memory changes and nobody is called."""
    with bench.session(needs=[STATUS]) as session:
        session.transmit(frames.plain(frames.tag()))
        resets(session)
        for index in range(len(session.queues)):
            session.stop(index)
        offered_frame(session, kick=False)
        for queue in session.queues:
            queue.called()
        before = session.memory.snapshot()
        for queue in session.queues:
            queue.kick()
        session.settle()
        expect(session.memory.snapshot() == before, "guest memory changed after the reset")
        expect(not any(queue.called() for queue in session.queues), "the driver was called after the reset")


@CHECKS.row("VU-STAT-B-01")
def status_is_kept(bench: Bench) -> None:
    """Sets the status bit by bit, and reads each back."""
    with bench.session(Stage.CONNECTED, needs=[STATUS]) as session:
        front_end = session.front_end
        front_end.set_protocol_features(session.protocol)
        front_end.set_owner()
        status = 0
        for bit in Status.ACKNOWLEDGE, Status.DRIVER, Status.FEATURES_OK:
            if bit == Status.FEATURES_OK:
                front_end.set_features(session.features | mask(Feature.PROTOCOL_FEATURES))
            status |= bit
            front_end.set_status(status)
            read = front_end.get_status()
            expect(read == status, f"the status {status:#x} was set, and {read:#x} is read")


@CHECKS.row("VU-RST-B-01", both=True)
def reset_device(bench: Bench) -> None:
    """Sends RESET_DEVICE to a running device: a frame published then is not touched. On the same connection the device
    is set up anew, its rings from the beginning, and works."""
    with bench.session(needs=[ProtocolFeature.RESET_DEVICE]) as session:
        session.transmit(frames.plain(frames.tag()))
        session.front_end.reset_device()
        offered_frame(session)
        expect(session.untouched(TRANSMIT), "a ring was served after RESET_DEVICE")
        front_end = session.front_end
        front_end.set_owner()
        front_end.set_features(session.features | mask(Feature.PROTOCOL_FEATURES))
        session.new_queues()
        session.place_all()
        session.start_all()
        session.run_all()
        session.transmit(frames.plain(frames.tag()))
