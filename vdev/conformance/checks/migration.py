"""The device's state, which goes from one host to another with its guest."""

import os
import select
import time

from vdev.conformance import frames
from vdev.conformance.bench import Bench, Session, Stage
from vdev.conformance.verdict import Checks, expect
from vhost_user.spec import STATE_NOFD, STOPPED_PHASE, Direction, ProtocolFeature, Request
from vhost_user.wire import STATE_TRANSFER, StateTransfer

CHECKS = Checks()
NEEDS = [ProtocolFeature.DEVICE_STATE]
ERROR = 0xFF  # of the answer: not zero is an error


def saved(session: Session) -> bytes:
    """Stop the rings and have the state written. Raises Broken."""
    for index in range(len(session.queues)):
        session.stop(index)
    read, write = os.pipe()
    os.set_blocking(read, False)
    try:
        answer = transfer(session, Direction.SAVE, write)
    finally:
        os.close(write)
    try:
        expect(not answer & ERROR, f"saving was answered with {answer:#x}")
        return until_end(read, session.bench.seconds)
    finally:
        os.close(read)


def transfer(session: Session, direction: int, fd: int) -> int:
    """SET_DEVICE_STATE_FD -> the answer; a descriptor that comes with it is closed. Raises Broken for an error that
    comes with one."""
    payload = STATE_TRANSFER.encode(StateTransfer(direction, STOPPED_PHASE))
    reply = session.front_end.request(Request.SET_DEVICE_STATE_FD, payload, [fd], answered=True)
    value = int.from_bytes(reply.payload, "little")
    with reply.fds as fds:
        expect(not (value & ERROR and len(fds)), f"the answer {value:#x} is an error, and a descriptor came with it")
        expect(bool(value & STATE_NOFD) == (len(fds) == 0), f"the answer is {value:#x}, with {len(fds)} descriptors")
    return value


def until_end(fd: int, seconds: float) -> bytes:
    """All that comes from ``fd`` until it is closed. Raises Broken when that takes longer."""
    data, deadline = b"", time.monotonic() + seconds
    while True:
        left = deadline - time.monotonic()
        expect(left > 0 and bool(select.select([fd], [], [], left)[0]), f"{len(data)} bytes of state came, and no end")
        part = os.read(fd, 1 << 16)
        if not part:
            return data
        data += part


def loaded(session: Session, data: bytes) -> int:
    """Have ``data`` loaded -> what CHECK_DEVICE_STATE says."""
    read, write = os.pipe()
    try:
        answer = transfer(session, Direction.LOAD, read)
    finally:
        os.close(read)
    try:
        expect(not answer & ERROR, f"loading was answered with {answer:#x}")
        os.write(write, data)
    finally:
        os.close(write)
    return session.front_end.check_device_state()


def running(bench: Bench) -> Session:
    """A session that has sent a frame."""
    session = bench.session(needs=NEEDS)
    session.transmit(frames.plain(frames.tag()))
    return session


@CHECKS.row("VU-DST-B-01")
def state_is_loaded(bench: Bench) -> None:
    """Saves the state of one session and loads it in another, whose rings then start: it succeeds, and frames go
    through."""
    with running(bench) as session:
        data = saved(session)
    with bench.session(Stage.PLACED, needs=NEEDS) as session:
        session.driver.fill()
        answer = loaded(session, data)
        expect(answer == 0, f"CHECK_DEVICE_STATE says {answer:#x} for a state that was saved before")
        session.start_all()
        for index in range(len(session.queues)):
            session.enable(index)
        session.transmit(frames.plain(frames.tag()))


@CHECKS.row("VU-DST-B-02")
def state_has_an_end(bench: Bench) -> None:
    """Has the state saved into a pipe, and reads it to its end; CHECK_DEVICE_STATE then says zero."""
    with running(bench) as session:
        saved(session)
        answer = session.front_end.check_device_state()
        expect(answer == 0, f"CHECK_DEVICE_STATE says {answer:#x}")


@CHECKS.row("VU-DST-B-03")
def an_error_has_no_descriptor(bench: Bench) -> None:
    """Asks for a transfer in direction 7: the answer is an error, and no descriptor comes with it."""
    with running(bench) as session:
        for index in range(len(session.queues)):
            session.stop(index)
        read, write = os.pipe()
        try:
            answer = transfer(session, 7, write)
        finally:
            os.close(read)
            os.close(write)
        expect(answer & ERROR, f"direction 7 was answered with {answer:#x}, which is no error")


@CHECKS.row("VU-DST-B-04")
def whose_descriptor(bench: Bench) -> None:
    """Has the state saved: the answer has bit 8 and no descriptor, or a descriptor and not bit 8."""
    with running(bench) as session:
        saved(session)


@CHECKS.row("VU-DST-B-05")
def half_a_state_is_refused(bench: Bench) -> None:
    """Loads the first half of a state: CHECK_DEVICE_STATE does not say zero."""
    with running(bench) as session:
        data = saved(session)
    with bench.session(Stage.PLACED, needs=NEEDS) as session:
        answer = loaded(session, data[:len(data) // 2])
        expect(answer != 0 or not data, "half a state was loaded, and CHECK_DEVICE_STATE says zero")


@CHECKS.row("VU-DST-B-06")
def source_goes_on(bench: Bench) -> None:
    """Saves the state, as for a migration that then fails, and starts the rings again: frames go through."""
    with running(bench) as session:
        saved(session)
        for index, queue in enumerate(session.queues):
            session.place(index, queue.base)
            session.start(index)
            session.enable(index)
        session.transmit(frames.plain(frames.tag()))
