"""Kicks, calls and errors as messages (INBAND_NOTIFICATIONS)."""

import os
import select
import time
from collections.abc import Callable

from vdev.conformance import frames
from vdev.conformance.bench import Bench, Stage
from vdev.conformance.checks.messages import signalled
from vdev.conformance.checks.rings import RECEIVE, TRANSMIT
from vdev.conformance.verdict import Checks, NotOffered, NotReachable, expect
from vdev.testing.scripted import ring_setup
from vhost_user.codec import encode
from vhost_user.spec import BackendRequest, ProtocolFeature
from vhost_user.spec import mask as protocol_mask
from vhost_user.wire import U64, U64_LAYOUT, VRING_STATE, VringState

CHECKS = Checks()
NEEDED = protocol_mask(ProtocolFeature.INBAND_NOTIFICATIONS, ProtocolFeature.BACKEND_REQ, ProtocolFeature.REPLY_ACK)


class InBand:
    """A session whose rings have neither kick nor call descriptor, enabled and not started; a context manager.

    It begins with SET_OWNER, as front-ends that know such notifications do: there are back-ends that offer them to
    these only. heard: the back-end's requests, with the ring, and whether they asked for an answer.
    """

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.heard: list[tuple[int, VringState, bool]] = []
        self.answers = True
        self.session = session = bench.session(Stage.CONNECTED)
        session.front_end.close()
        session.front_end = front_end = bench.connect(owner_first=True)
        offered = front_end.get_protocol_features() if bench.protocol else 0
        if offered & NEEDED != NEEDED:
            session.close()
            raise NotOffered("INBAND_NOTIFICATIONS")
        if session.features & ~front_end.get_features():
            session.close()
            raise NotOffered("RING_PACKED beside INBAND_NOTIFICATIONS")
        session.protocol = NEEDED
        session.reach(Stage.SHARED)
        for index, queue in enumerate(session.queues):
            ring = ring_setup(queue)
            front_end.set_vring_num(index, ring.num)
            front_end.set_vring_base(index, ring.base)
            front_end.set_vring_addr(index, ring.desc, ring.avail, ring.used)
            session.enable(index)
        session.driver.fill()

    def listen(self, until: Callable[[], bool], seconds: float | None = None) -> bool:
        """Hear the back-end until ``until()`` -> False if that is not so after ``seconds`` (None: the bench's)."""
        channel = self.session.front_end.backend_channel
        poller = select.poll()
        poller.register(channel, select.POLLIN)
        deadline = time.monotonic() + (self.bench.seconds if seconds is None else seconds)
        while not until():
            if time.monotonic() > deadline:
                return False
            if poller.poll(5) and (message := channel.receive()) is not None:
                self.heard.append((message.request, VRING_STATE.decode(message.payload), message.need_reply))
                self.session.note(f"it tells request {message.request}: {self.heard[-1][1]}")
                if message.need_reply and self.answers:
                    channel.send(encode(message.request, U64_LAYOUT.encode(U64(0)), reply=True))
        return True

    def called(self, kind: BackendRequest = BackendRequest.VRING_CALL) -> list[VringState]:
        """What was told of ``kind``."""
        return [state for request, state, _ in self.heard if request == kind]

    def transmits(self) -> None:
        """A frame is taken after VRING_KICK. Raises Broken."""
        self.session.driver.offer(frames.plain(frames.tag()))
        self.session.driver.transmitq.publish()
        self.session.front_end.vring_kick(TRANSMIT)
        expect(self.listen(lambda: self.session.driver.reclaim() > 0), "a frame was not taken after VRING_KICK")

    def __enter__(self) -> "InBand":
        return self

    def __exit__(self, *_: object) -> None:
        self.session.close()


@CHECKS.row("VU-INB-B-01", both=True)
def kick_by_message(bench: Bench) -> None:
    """Gives no kick descriptor and sends VRING_KICK: the ring starts, and a frame is taken; so are others after it."""
    with InBand(bench) as in_band:
        in_band.session.front_end.vring_kick(RECEIVE)
        for _ in range(3):
            in_band.transmits()


@CHECKS.row("VU-INB-B-02", "VU-INB-B-03")
def call_by_message(bench: Bench) -> None:
    """Gives no call descriptor: VRING_CALL may come after a frame was taken, and if it does, it names the ring, and num
    is 0."""
    with InBand(bench) as in_band:
        in_band.session.front_end.vring_kick(RECEIVE)
        in_band.transmits()
        in_band.listen(lambda: bool(in_band.called()), 0.5)
        if not in_band.called():
            raise NotReachable("it calls by no message")
        for state in in_band.called():
            expect(state.index in (RECEIVE, TRANSMIT), f"VRING_CALL names ring {state.index}")
            expect(state.num == 0, f"num of VRING_CALL is {state.num}")


@CHECKS.row("VU-INB-B-04")
def error_by_message(bench: Bench) -> None:
    """Breaks the transmitq, with no error descriptor: VRING_ERR may come, and if it does, it names that ring, with num
    0."""
    with InBand(bench) as in_band:
        in_band.session.front_end.vring_kick(RECEIVE)
        in_band.transmits()
        ring = in_band.session.driver.transmitq.ring
        if in_band.session.driver.transmitq.packed:
            raise NotReachable("is about split rings")
        ring.avail.idx = ring.next_avail + 1000
        in_band.session.front_end.vring_kick(TRANSMIT)
        in_band.listen(lambda: bool(in_band.called(BackendRequest.VRING_ERR)), 0.5)
        for state in in_band.called(BackendRequest.VRING_ERR):
            expect((state.index, state.num) == (TRANSMIT, 0), f"VRING_ERR says {state}")


@CHECKS.row("VU-INB-B-05")
def descriptors_come_first(bench: Bench) -> None:
    """Gives kick and call descriptors for the transmitq all the same: they are used, and no VRING_CALL names it."""
    with InBand(bench) as in_band:
        queue = in_band.session.driver.transmitq
        in_band.session.front_end.vring_kick(RECEIVE)
        in_band.session.front_end.set_vring_call(TRANSMIT, queue.call_fd)
        in_band.session.front_end.set_vring_kick(TRANSMIT, queue.kick_fd)
        in_band.session.driver.offer(frames.plain(frames.tag()))
        queue.publish()
        os.eventfd_write(queue.kick_fd, 1)
        expect(in_band.listen(lambda: in_band.session.driver.reclaim() > 0), "a kick by descriptor was not heard")
        expect(signalled(queue.call_fd, bench.seconds), "the call descriptor was not written")
        in_band.listen(lambda: False, bench.quiet)
        expect(not any(state.index == TRANSMIT for state in in_band.called()),
               "VRING_CALL came for a ring that has a call descriptor")


@CHECKS.row("VU-INB-B-06")
def calls_ask_for_an_answer(bench: Bench) -> None:
    """Gives no call descriptor: the messages that come ask for an answer."""
    with InBand(bench) as in_band:
        in_band.session.front_end.vring_kick(RECEIVE)
        in_band.transmits()
        in_band.listen(lambda: bool(in_band.heard), 0.5)
        if not in_band.heard:
            raise NotReachable("it calls by no message")
        expect(all(asked for _, _, asked in in_band.heard), "VRING_CALL came without need_reply")
