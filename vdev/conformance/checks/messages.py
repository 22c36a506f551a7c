"""Messages themselves: numbers, sizes, descriptors, and what follows from errors."""

import os
import time

from ring.driver import Buffer
from vdev.conformance import frames
from vdev.conformance.bench import Bench, Stage
from vdev.conformance.verdict import Checks, expect
from vhost_user.codec import encode
from vhost_user.errors import PeerError
from vhost_user.frontend import NoAnswer
from vhost_user.spec import HEADER_SIZE, VERSION, ProtocolFeature, Request
from vhost_user.wire import HEADER, VRING_FD, VRING_STATE, VringFd, VringState

CHECKS = Checks()


@CHECKS.row("VU-MSG-B-01")
def native_byte_order(bench: Bench) -> None:
    """Asks for the base of ring 1 in host byte order, and looks at size, ring and flags of the answer in that order."""
    with bench.session(Stage.PLACED) as session:
        reply = session.front_end.request(Request.GET_VRING_BASE, VRING_STATE.encode(VringState(1, 0)), answered=True)
        expect(len(reply.payload) == 8, f"the reply has {len(reply.payload)} bytes of payload, not 8")
        state = VRING_STATE.decode(reply.payload)
        expect(state.index == 1, f"the reply is about ring {state.index:#x}, the question was about ring 1")


@CHECKS.row("VU-MSG-B-02")
def reply_header(bench: Bench) -> None:
    """Sends GET_FEATURES, GET_PROTOCOL_FEATURES, GET_VRING_BASE and a request with need_reply, and looks at the headers
    of the replies."""
    with bench.session(Stage.PLACED) as session:
        asked = [(Request.GET_FEATURES, b""), (Request.GET_VRING_BASE, VRING_STATE.encode(VringState(0, 0)))]
        if bench.protocol:
            asked.append((Request.GET_PROTOCOL_FEATURES, b""))
        replies = [(request, session.front_end.request(request, payload, answered=True)) for request, payload in asked]
        if session.front_end.has(ProtocolFeature.REPLY_ACK):
            payload = VRING_STATE.encode(VringState(0, 64))
            replies.append((Request.SET_VRING_NUM, session.front_end.request(Request.SET_VRING_NUM, payload)))
        for request, reply in replies:
            expect(reply.request == request, f"{request.name} was answered with request code {reply.request}")
            expect(reply.flags & 7 == 5, f"the flags of the reply to {request.name} are {reply.flags:#x}: of the low "
                   "three bits version 1 and the reply flag make 5")


@CHECKS.row("VU-MSG-B-03")
def several_messages_in_one_write(bench: Bench) -> None:
    """Writes GET_FEATURES, SET_OWNER, GET_FEATURES and GET_PROTOCOL_FEATURES at once, and expects three replies in that
    order."""
    with bench.connect() as front_end:
        wanted = [Request.GET_FEATURES, Request.SET_OWNER, Request.GET_FEATURES]
        if bench.protocol:
            wanted.append(Request.GET_PROTOCOL_FEATURES)
        front_end.send_raw(b"".join(encode(request) for request in wanted))
        for request in wanted:
            if request is not Request.SET_OWNER:
                reply = front_end.receive()
                expect(reply.request == request, f"a reply to {reply.name} came where that to {request.name} was due")
        expect(front_end.silent(bench.quiet), "one more message came than was due")


@CHECKS.row("VU-MSG-B-04")
def header_and_payload_apart(bench: Bench) -> None:
    """Sends a new call descriptor for ring 1 with the header, the payload a moment later, and a request without
    descriptors behind it; then a frame, and waits on the new descriptor."""
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        with bench.session() as session:
            data = encode(Request.SET_VRING_CALL, VRING_FD.encode(VringFd(1, True)))
            session.front_end.send_raw(data[:HEADER_SIZE], [fd])
            time.sleep(0.02)
            session.front_end.send_raw(data[HEADER_SIZE:])
            session.barrier()
            session.driver.transmitq.ring.want_calls()
            session.driver.transmit(frames.plain(frames.tag()))
            expect(signalled(fd, bench.seconds), "the driver was not called with the descriptor that came along")
    finally:
        os.close(fd)


def signalled(fd: int, seconds: float) -> bool:
    """The eventfd ``fd`` is written within ``seconds``; it is read then."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return os.eventfd_read(fd) > 0
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.001)


@CHECKS.row("VU-MSG-B-05")
def forty_bytes_of_address(bench: Bench) -> None:
    """Sends SET_VRING_ADDR with 40 bytes: index, flags, and the addresses of descriptor table, used ring, available
    ring and log, in this order; then frames."""
    with bench.session() as session:
        for _ in range(3):
            session.transmit(frames.plain(frames.tag()))


@CHECKS.row("VU-MSG-B-06")
def value_of_a_kick(bench: Bench) -> None:
    """Kicks by writing 1, 3 and 2^40 to the eventfd, a frame each."""
    with bench.session() as session:
        for value in 1, 3, 1 << 40:
            session.driver.offer(frames.plain(frames.tag()))
            session.driver.transmitq.publish()
            session.note(f"kicked by writing {value:#x}")
            os.eventfd_write(session.driver.transmitq.kick_fd, value)
            expect(session.reclaimed(), f"the frame was not taken after a kick of value {value:#x}")


@CHECKS.row("VU-MSG-B-08")
def index_and_flag_in_one_number(bench: Bench) -> None:
    """Sends SET_VRING_CALL and SET_VRING_ERR of ring 1 with bit 8 and without a descriptor, then a call descriptor
    again, and a frame."""
    with bench.session() as session:
        session.front_end.set_vring_call(1, None)
        session.front_end.set_vring_err(1, None)
        session.front_end.set_vring_call(1, session.driver.transmitq.call_fd)
        session.transmit(frames.plain(frames.tag()))


@CHECKS.row("VU-ERR-B-01")
def nonsense_ends_at_most_the_connection(bench: Bench) -> None:
    """Sends a header of version 2, which may end the connection; then a new one has to be served."""
    with bench.connect() as front_end:
        front_end.send_raw(HEADER.build({"request": Request.SET_OWNER, "flags": VERSION + 1, "size": 0}))
        try:
            front_end.get_features()
        except (PeerError, NoAnswer, OSError):
            front_end.trace.append("the connection is of no use any more, which is allowed")
    with bench.session() as session:
        session.transmit(frames.plain(frames.tag()))


@CHECKS.row("VU-ERR-B-02", both=True)
def fault_of_a_ring_leaves_the_connection(bench: Bench) -> None:
    """Offers a chain that lies in no guest memory at all; then the connection still has to be there."""
    with bench.session() as session:
        nowhere = session.memory.regions[-1].gpa + (1 << 40)
        session.driver.transmitq.add([Buffer(nowhere, 100)])
        session.driver.transmitq.publish()
        session.driver.transmitq.kick()
        session.settle()
        session.barrier()


@CHECKS.row("VU-ERR-B-03")
def connections_one_after_the_other(bench: Bench) -> None:
    """Ten sessions one after the other, each negotiating anew, with a frame in each."""
    for _ in range(10):
        with bench.session() as session:
            session.transmit(frames.plain(frames.tag()))
