"""vdev/inband.py: a running device that is kicked, and calls, by messages."""

import fcntl
import gc
import os
import select
import weakref

import pytest

from vdev.backend_handover import export
from vdev.handover import HandoverError, Parcel
from vdev.net.features import Feature, mask
from vdev.testing.inband import NEEDED, InBandGuest
from vdev.testing.netdriver import NetHeader
from vdev.testing.served import FRAME, ServedDevice
from vhost_user.errors import Disconnected
from vhost_user.frontend import FrontEnd, RequestRefused
from vhost_user.spec import BackendRequest, ProtocolFeature, Request
from vhost_user.spec import mask as protocol_mask
from vhost_user.wire import VRING_STATE, VringState

RING = mask(Feature.VERSION_1, Feature.MRG_RXBUF)
FORMATS = pytest.mark.parametrize("ring", [
    0, mask(Feature.EVENT_IDX, Feature.INDIRECT_DESC)], ids=["split", "split-event-idx"])
RECEIVEQ, TRANSMITQ = 0, 1
CALL, ERR = BackendRequest.VRING_CALL, BackendRequest.VRING_ERR


@pytest.fixture
def served():
    with ServedDevice(personality="full") as device:
        yield device


@pytest.fixture
def guest(served):
    with InBandGuest(served.connect(), features=RING) as scripted:
        yield scripted


def arrived(served) -> bool:
    return bool(select.select([served.port.wire[0]], [], [], 0)[0])


def taken(served) -> bytes:
    return served.port.wire[0].recv(1 << 17)[NetHeader.SIZE:]


def send(served, guest, frame=FRAME) -> None:
    """One frame from the guest reaches the wire."""
    guest.driver.transmit(frame)
    assert guest.serve(lambda: arrived(served))
    assert taken(served) == frame


def get(served, guest, frame=FRAME) -> None:
    """One frame from the wire reaches the guest, whose driver looks only when it is called."""
    assert not guest.driver.receiveq.ring.want_calls(1)
    guest.kick()  # which starts the receiveq: until then frames are lost
    served.port.wire[0].send(NetHeader().pack() + frame)
    received = []

    def called() -> bool:
        if guest.driver.receiveq.called():
            received.append(guest.driver.receive())
        return any(received)

    assert guest.serve(called)
    assert received[-1].frame == frame


def heard(guest, request: BackendRequest, index: int) -> int:
    """How often the back-end said ``request`` of ring ``index``."""
    return guest.heard.count((request, VringState(index, 0)))


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# ------------------------------------------------------------------------------------------ traffic


@FORMATS
def test_VU_INB_B_02_frames_pass_both_ways_with_messages_only(served, ring) -> None:
    with InBandGuest(served.connect(), features=RING | ring) as guest:
        for _ in range(100):  # around the ring, which has 64 entries
            send(served, guest)
            get(served, guest)
            assert guest.serve(lambda: guest.driver.reclaim() or not guest.driver.transmitq.outstanding)
        assert heard(guest, CALL, RECEIVEQ) >= 100
        assert not heard(guest, ERR, RECEIVEQ)


def test_VU_INB_B_01_a_kick_starts_the_ring(served, guest) -> None:
    assert not served.call(served.device.engine.running)
    guest.driver.transmit(FRAME)
    guest.front_end.vring_kick(TRANSMITQ)
    assert served.call(served.device.engine.running) == [TRANSMITQ]
    assert guest.serve(lambda: arrived(served))


def test_VU_INB_B_01_every_kick_counts(served, guest) -> None:
    """A worker that has nothing to do is woken by the message."""
    for _ in range(1000):
        send(served, guest)
        if served.device.stats()[0].kicks:
            break
    assert served.device.stats()[0].kicks


def test_VU_RING_B_08_a_kick_starts_a_stopped_ring_again(served, guest) -> None:
    for _ in range(3):
        send(served, guest)
        base = guest.front_end.get_vring_base(TRANSMITQ)
        guest.configure(TRANSMITQ, base)
        guest.driver.transmit(FRAME)
        assert not guest.serve(lambda: False, 0) and not arrived(served)
        guest.front_end.vring_kick(TRANSMITQ)
        assert guest.serve(lambda: arrived(served))
        assert taken(served) == FRAME


def test_ring_starts_anew_after_the_device_was_reset(served) -> None:
    wanted = NEEDED | protocol_mask(ProtocolFeature.RESET_DEVICE)
    with InBandGuest(served.connect(), features=RING, protocol_features=wanted) as guest:
        send(served, guest)
        base = guest.front_end.get_vring_base(TRANSMITQ)
        guest.front_end.reset_device()
        guest.front_end.set_features(RING | mask(Feature.PROTOCOL_FEATURES))
        guest.configure(TRANSMITQ, base)
        guest.front_end.set_vring_enable(TRANSMITQ, True)
        send(served, guest)


def test_VU_INB_B_03_num_is_zero(served, guest) -> None:
    send(served, guest)
    get(served, guest)
    assert guest.heard and all(ring.num == 0 for _, ring in guest.heard)


def test_VU_INB_B_04_a_broken_ring_is_told_by_message(served, guest) -> None:
    send(served, guest)
    guest.driver.transmitq.ring.avail.idx = 0x8000
    guest.front_end.vring_kick(TRANSMITQ)
    assert guest.serve(lambda: heard(guest, ERR, TRANSMITQ) == 1)
    assert "transmitq 0 stopped" in served.wait_for("ring-broken")


# ------------------------------------------------------------------------- descriptors are preferred


def test_VU_INB_B_05_a_kick_descriptor_is_preferred(served, guest) -> None:
    guest.front_end.set_vring_kick(TRANSMITQ, guest.driver.transmitq.kick_fd)
    guest.driver.transmit(FRAME)  # kicks the descriptor, which nobody here makes a message of
    assert select.select([served.port.wire[0]], [], [], 10)[0]
    assert taken(served) == FRAME
    guest.front_end.vring_kick(TRANSMITQ)
    get(served, guest)


def test_VU_INB_B_05_polling_is_preferred(served, guest) -> None:
    send(served, guest)
    guest.front_end.set_vring_kick(TRANSMITQ, None)
    guest.driver.transmit(FRAME)
    assert select.select([served.port.wire[0]], [], [], 10)[0]


@pytest.mark.parametrize("while_running", [True, False])
def test_VU_INB_B_05_a_call_descriptor_is_preferred(served, guest, while_running) -> None:
    if while_running:
        get(served, guest)
    guest.front_end.set_vring_call(RECEIVEQ, guest.driver.receiveq.call_fd)
    before = heard(guest, CALL, RECEIVEQ)
    for _ in range(3):
        get(served, guest)
    assert heard(guest, CALL, RECEIVEQ) == before


def test_VU_INB_B_05_an_error_descriptor_is_preferred(served, guest) -> None:
    err = os.eventfd(0, os.EFD_NONBLOCK)
    guest.front_end.set_vring_err(TRANSMITQ, err)
    guest.driver.transmitq.ring.avail.idx = 0x8000
    guest.front_end.vring_kick(TRANSMITQ)
    assert guest.serve(lambda: bool(select.select([err], [], [], 0)[0]))
    get(served, guest)
    assert not heard(guest, ERR, TRANSMITQ)
    os.close(err)


# ------------------------------------------------------------------------------ what is acknowledged


def test_VU_INB_B_06_nothing_is_said_again_before_it_was_acknowledged(served, guest) -> None:
    get(served, guest)
    guest.response = None
    before = heard(guest, CALL, RECEIVEQ)
    for _ in range(20):
        served.port.wire[0].send(NetHeader().pack() + FRAME)
        assert guest.serve(lambda: guest.driver.receive() is not None)
    assert guest.serve(lambda: heard(guest, CALL, RECEIVEQ) == before + 1)
    assert not guest.serve(lambda: heard(guest, CALL, RECEIVEQ) > before + 1, 0.05)
    # what was used meanwhile is said as soon as the acknowledgement is there
    guest.front_end.set_backend_req_fd()
    guest.response = 0
    assert guest.serve(lambda: heard(guest, CALL, RECEIVEQ) > before + 1)
    get(served, guest)


def test_what_was_not_acknowledged_is_said_again_over_another_channel(served, guest) -> None:
    guest.response = None
    guest.kick()
    served.port.wire[0].send(NetHeader().pack() + FRAME)
    assert guest.serve(lambda: heard(guest, CALL, RECEIVEQ) == 1)
    guest.front_end.set_backend_req_fd()
    assert guest.serve(lambda: heard(guest, CALL, RECEIVEQ) == 2)


def test_front_end_that_does_not_read_holds_nothing_up(served, guest) -> None:
    """Thousands of frames in both directions; all that lies in the channel is a message for each ring."""
    send(served, guest)
    guest.listen()
    guest.heard.clear()
    before = descriptors()
    for _ in range(2000):
        guest.driver.transmit(FRAME)
        guest.kick()
        assert select.select([served.port.wire[0]], [], [], 10)[0]
        served.port.wire[0].recv(1 << 17)
        served.port.wire[0].send(NetHeader().pack() + FRAME)
        while guest.driver.receive() is None:
            guest.kick()
        while not guest.driver.reclaim():
            pass
    assert descriptors() == before
    guest.response = None
    guest.listen()
    assert sorted(ring.index for _, ring in guest.heard) == [RECEIVEQ, TRANSMITQ]


def test_call_that_is_refused_is_said_and_the_next_one_comes(served, guest) -> None:
    guest.response = 1
    get(served, guest)
    assert "receiveq 0: the front-end refused VRING_CALL" in served.wait_for("refused-notification")
    get(served, guest)


def test_front_end_that_acknowledges_what_was_not_said_loses_its_channel(served, guest) -> None:
    get(served, guest)
    guest.front_end.backend_channel.send(VRING_ACK)
    assert "came where none was due" in served.wait_for("channel-closed")
    with pytest.raises(Disconnected):
        guest.serve(lambda: False, 10)
    guest.front_end.set_backend_req_fd()
    get(served, guest)


VRING_ACK = (CALL.to_bytes(4, "little") + (0x5).to_bytes(4, "little") + (8).to_bytes(4, "little") + bytes(8))


def test_what_was_not_said_for_want_of_a_channel_is_said_when_there_is_one(served) -> None:
    with InBandGuest(served.connect(), features=RING, channel=False) as guest:
        guest.kick()
        served.port.wire[0].send(NetHeader().pack() + FRAME)
        assert guest.serve(lambda: guest.driver.receive() is not None)
        assert "the front-end must send SET_BACKEND_REQ_FD" in served.wait_for("no-channel")
        assert len(served.lines("no-channel")) == 1
        guest.front_end.set_backend_req_fd()
        assert guest.serve(lambda: heard(guest, CALL, RECEIVEQ) >= 1)
        get(served, guest)


def test_pipe_takes_calls_that_cannot_be_acknowledged(served) -> None:
    with InBandGuest(served.connect(), features=RING, channel=False) as guest:
        ours, theirs = os.pipe()
        fcntl.fcntl(theirs, fcntl.F_SETPIPE_SZ, 4096)
        guest.front_end.request(Request.SET_BACKEND_REQ_FD, fds=[theirs])
        os.close(theirs)
        guest.kick()
        for _ in range(3):
            served.port.wire[0].send(NetHeader().pack() + FRAME)
            assert guest.serve(lambda: bool(select.select([ours], [], [], 0)[0]))
            message = os.read(ours, 20)
            assert (message[:12], VRING_STATE.decode(message[12:])) == (
                CALL.to_bytes(4, "little") + b"\1\0\0\0" + b"\x08\0\0\0", VringState(RECEIVEQ, 0))
            assert guest.driver.receive() is not None
        for _ in range(4000):  # more than the pipe takes, as long as every tenth is not told along with others
            served.port.wire[0].send(NetHeader().pack() + FRAME)
            while guest.driver.receive() is None:
                guest.kick()
            if served.lines("channel-closed"):
                break
        assert "the pipe for the back-end's requests is full" in served.wait_for("channel-closed")
        os.close(ours)


# -------------------------------------------------------------------------------------- negotiation


@pytest.mark.parametrize("lacking", [ProtocolFeature.REPLY_ACK, ProtocolFeature.BACKEND_REQ])
def test_VU_FEAT_B_10_messages_without_a_channel_or_acknowledgements_end_the_session(served, lacking) -> None:
    with FrontEnd(served.connect()) as front:
        front.set_owner()
        front.set_protocol_features(NEEDED & ~protocol_mask(lacking))
        assert front.closed()
    assert f"INBAND_NOTIFICATIONS is set without {lacking.name}" in served.wait_for("session-end")


@pytest.mark.parametrize("personality", ["qemu-net", "full"])
def test_front_end_that_begins_as_qemu_does_is_not_offered_messages(personality) -> None:
    with ServedDevice(personality=personality) as served, FrontEnd(served.connect()) as front:
        front.get_features()
        assert not front.get_protocol_features() >> ProtocolFeature.INBAND_NOTIFICATIONS & 1


def test_kick_that_was_not_agreed_on_is_refused(served) -> None:
    wanted = NEEDED & ~protocol_mask(ProtocolFeature.INBAND_NOTIFICATIONS)
    with InBandGuest(served.connect(), features=RING, protocol_features=wanted) as guest:
        with pytest.raises(RequestRefused):
            guest.front_end.vring_kick(TRANSMITQ)
        assert "INBAND_NOTIFICATIONS was not negotiated" in served.wait_for("refused-request")


def test_messages_that_are_agreed_on_no_more_are_sent_no_more(served, guest) -> None:
    """The rings go on with descriptors, in the same session."""
    send(served, guest)
    get(served, guest)
    front, rings = guest.front_end, (RECEIVEQ, TRANSMITQ)
    bases = [front.get_vring_base(index) for index in rings]
    assert guest.serve(lambda: not guest.driver.reclaim())
    front.set_protocol_features(NEEDED & ~protocol_mask(ProtocolFeature.INBAND_NOTIFICATIONS))
    guest.heard.clear()
    for index, queue in zip(rings, guest.queues, strict=True):
        guest.configure(index, bases[index])
        front.set_vring_kick(index, queue.kick_fd)
    guest.driver.transmit(FRAME)
    assert select.select([served.port.wire[0]], [], [], 10)[0]
    assert guest.serve(lambda: guest.driver.reclaim())
    assert not guest.serve(lambda: bool(guest.heard), 0.05)


# ---------------------------------------------------------------------------------- nothing is left


def test_descriptors_are_flat_over_sessions(served) -> None:
    counts = set()
    for number in range(1, 6):
        with InBandGuest(served.connect(), features=RING) as guest:
            send(served, guest)
            get(served, guest)
            guest.front_end.set_vring_call(RECEIVEQ, guest.driver.receiveq.call_fd)
            guest.front_end.set_vring_kick(TRANSMITQ, guest.driver.transmitq.kick_fd)
        served.wait_for("session-end", number)
        counts.add(descriptors())
    assert len(counts) == 1


def test_nothing_of_a_session_is_kept(served) -> None:
    with InBandGuest(served.connect(), features=RING) as guest:
        get(served, guest)
        inband = weakref.ref(served.device._connection._backend.inband)
    served.wait_for("session-end")
    with FrontEnd(served.connect()) as front:
        front.get_features()
        gc.collect()
        assert inband() is None


def test_descriptor_that_was_closed_is_not_taken_for_ours(served, guest) -> None:
    """Its number may come to be that of a descriptor of the front-end."""
    send(served, guest)
    for index in (TRANSMITQ, RECEIVEQ):
        guest.front_end.get_vring_base(index)
    guest.front_end.set_vring_kick(RECEIVEQ, None)  # the rings change: what a stopped one was kicked by is closed
    ours, rings = served.call(lambda: (set(served.device._connection._backend.inband._own), served.device.engine.rings))
    assert rings[TRANSMITQ].kick == -1
    assert ours == {rings[0].call, rings[0].err, rings[1].call, rings[1].err}


def test_no_descriptor_for_messages_is_free(served, guest, monkeypatch) -> None:
    """The kick is refused, nothing is half done, and the next one is served."""
    def none_free(*_: object) -> int:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr("vdev.inband.os.eventfd", none_free)
        with pytest.raises(RequestRefused):
            guest.front_end.vring_kick(TRANSMITQ)
    assert not served.call(served.device.engine.running)
    send(served, guest)


def test_session_with_messages_is_not_handed_over(served, guest) -> None:
    with pytest.raises(HandoverError, match="notified by messages"):
        served.call(lambda: export(served.device._connection._backend, Parcel().put))
