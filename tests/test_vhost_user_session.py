"""A session's life without a socket: what is answered, what is committed, what survives what."""

import os
import struct
from dataclasses import replace

import pytest

from vhost_user import wire
from vhost_user.codec import Message, encode
from vhost_user.errors import Close, Nack
from vhost_user.fds import OwnedFds
from vhost_user.requests import REQUESTS
from vhost_user.session import Result, Session
from vhost_user.spec import NEED_REPLY_FLAG, VERSION, ProtocolFeature, Request, mask
from vhost_user.state import Notifier, Offer, RingState, Run
from vhost_user.wire import U64, Log, MemTable, Region, VringAddr, VringFd, VringState

PROTOCOL = mask(ProtocolFeature.MQ, ProtocolFeature.RARP, ProtocolFeature.REPLY_ACK, ProtocolFeature.MTU,
                ProtocolFeature.BACKEND_REQ, ProtocolFeature.RESET_DEVICE,
                ProtocolFeature.CONFIGURE_MEM_SLOTS, ProtocolFeature.STATUS)
BIT_30, VERSION_1, LOG_ALL, RING_RESET, MRG_RXBUF = 1 << 30, 1 << 32, 1 << 26, 1 << 40, 1 << 15
FEATURES = BIT_30 | VERSION_1 | MRG_RXBUF
REGION = Region(0, 0x100000, 0x7F0000000000, 0)
ADDR = VringAddr(0, 0, 0x7F0000000000, 0x7F0000003000, 0x7F0000002000, 0)


OFFER = Offer(FEATURES, PROTOCOL, rings=4, queue_num=2, max_mem_slots=3)


def ask(session: Session, kind: Request, payload=None, fds: int = 0, need_reply: bool = True):
    """One request as it comes from the wire -> what accept() makes of it."""
    data = b"" if payload is None else REQUESTS[kind].payload.encode(payload)
    flags = VERSION | (NEED_REPLY_FLAG if need_reply else 0)
    return session.accept(Message(kind, flags, data, OwnedFds(os.eventfd(0) for _ in range(fds))))


def do(session: Session, kind: Request, payload=None, fds: int = 0, need_reply: bool = True) -> bytes | None:
    """One request that the device agrees to -> the answer."""
    result = Result.ok(7) if REQUESTS[kind].from_device else Result.ok()
    return session.answer(ask(session, kind, payload, fds, need_reply), result)


def negotiated(features: int = FEATURES, offer: Offer = OFFER) -> Session:
    session = Session(offer)
    do(session, Request.SET_PROTOCOL_FEATURES, U64(session.offer.protocol_features))
    do(session, Request.SET_FEATURES, U64(features))
    return session


def start(session: Session, index: int = 0) -> None:
    do(session, Request.SET_VRING_NUM, VringState(index, 256))
    do(session, Request.SET_VRING_BASE, VringState(index, 5))
    do(session, Request.SET_VRING_ADDR, replace(ADDR, index=index))
    do(session, Request.SET_VRING_KICK, VringFd(index, True), fds=1)


# ------------------------------------------------------------------------------------------ answers

def ack(kind: Request) -> bytes:
    return struct.pack("=IIIQ", kind, 0x5, 8, 0)


@pytest.mark.parametrize(("kind", "value"), [
    (Request.GET_FEATURES, FEATURES), (Request.GET_PROTOCOL_FEATURES, PROTOCOL), (Request.GET_QUEUE_NUM, 2),
    (Request.GET_MAX_MEM_SLOTS, 3), (Request.GET_STATUS, 0)])
@pytest.mark.parametrize("need_reply", [False, True])
def test_VU_REPLY_B_04_questions_are_answered_once_need_reply_or_not(kind, value, need_reply):
    assert do(negotiated(), kind, need_reply=need_reply) == struct.pack("=IIIQ", kind, 0x5, 8, value)


def test_VU_REPLY_B_01_get_vring_base_answers_with_the_index_the_device_tells():
    answer = do(negotiated(), Request.GET_VRING_BASE, VringState(2, 0), need_reply=False)
    assert answer == struct.pack("=IIIII", Request.GET_VRING_BASE, 0x5, 8, 2, 7)


def test_VU_BASE_F_01_a_number_in_a_get_vring_base_request_is_tolerated():
    assert do(negotiated(), Request.GET_VRING_BASE, VringState(2, 99))[-4:] == struct.pack("=I", 7)


SETTERS = [
    (Request.SET_FEATURES, U64(FEATURES), 0), (Request.SET_PROTOCOL_FEATURES, U64(PROTOCOL), 0),
    (Request.SET_OWNER, None, 0), (Request.RESET_OWNER, None, 0), (Request.RESET_DEVICE, None, 0),
    (Request.SET_STATUS, U64(1), 0), (Request.SET_BACKEND_REQ_FD, None, 1),
    (Request.SET_MEM_TABLE, MemTable((REGION,)), 1), (Request.ADD_MEM_REG, REGION, 1),
    (Request.SET_VRING_NUM, VringState(0, 256), 0), (Request.SET_VRING_ADDR, ADDR, 0),
    (Request.SET_VRING_BASE, VringState(0, 1), 0), (Request.SET_VRING_CALL, VringFd(0, True), 1),
    (Request.SET_VRING_ERR, VringFd(0, False), 0), (Request.SET_VRING_ENABLE, VringState(0, 1), 0),
    (Request.SEND_RARP, U64(0x0605040302), 0), (Request.NET_SET_MTU, U64(1500), 0)]


@pytest.mark.parametrize(("kind", "payload", "fds"), SETTERS)
def test_VU_REPLY_B_06_need_reply_gets_a_zero_for_success(kind, payload, fds):
    assert do(negotiated(), kind, payload, fds) == ack(kind)


@pytest.mark.parametrize(("kind", "payload", "fds"), SETTERS)
def test_VU_REPLY_B_05_nothing_is_answered_unasked(kind, payload, fds):
    assert do(negotiated(), kind, payload, fds, need_reply=False) is None


def test_VU_REPLY_F_01_need_reply_before_it_was_negotiated_brings_no_answer():
    session = Session(OFFER)
    assert do(session, Request.SET_OWNER) is None
    lacking = PROTOCOL & ~mask(ProtocolFeature.REPLY_ACK)
    assert do(session, Request.SET_PROTOCOL_FEATURES, U64(lacking)) is None


def test_message_that_brings_acknowledgements_can_ask_for_one():
    session = Session(OFFER)
    assert do(session, Request.SET_PROTOCOL_FEATURES, U64(PROTOCOL)) == ack(Request.SET_PROTOCOL_FEATURES)
    assert do(session, Request.SET_OWNER) == ack(Request.SET_OWNER)
    assert do(Session(OFFER), Request.SET_PROTOCOL_FEATURES, U64(PROTOCOL), need_reply=False) is None


def test_VU_REPLY_B_07_a_refusal_by_the_device_is_told_and_leaves_no_trace():
    session = negotiated()
    before = session.state
    request = ask(session, Request.SET_MEM_TABLE, MemTable((REGION,)), fds=1)
    with pytest.raises(Nack, match="SET_MEM_TABLE: no room; buy some") as nack:
        session.answer(request, Result.refused("no room; buy some"))
    assert nack.value.reply == struct.pack("=IIIQ", Request.SET_MEM_TABLE, 0x5, 8, 1)
    assert session.state == before
    assert len(request.fds) == 0


def test_a_refusal_that_cannot_be_told_closes():
    session = negotiated()
    request = ask(session, Request.SET_VRING_CALL, VringFd(1, True), fds=1, need_reply=False)
    with pytest.raises(Close, match="SET_VRING_CALL ring 1: no; .*no acknowledgement was asked for"):
        session.answer(request, Result.refused("no"))
    assert session.rings[1].call is Notifier.UNSET


def test_a_question_has_no_way_to_be_refused():
    with pytest.raises(Close, match="no way to be refused"):
        ask(negotiated(), Request.GET_VRING_BASE, VringState(4, 0))


def test_a_device_that_does_not_tell_the_base_is_a_mistake_of_ours():
    session = negotiated()
    with pytest.raises(ValueError, match="GET_VRING_BASE ring 0"):
        session.answer(ask(session, Request.GET_VRING_BASE, VringState(0, 0)), Result.ok())


# ------------------------------------------------------------------------------ commit and preview

def test_nothing_is_committed_before_the_answer():
    session = negotiated()
    before = session.state
    request = ask(session, Request.SET_VRING_ENABLE, VringState(3, 1))
    assert session.state == before
    assert session.after(request).rings[3].enabled
    assert session.state == before
    session.answer(request, Result.ok())
    assert session.rings[3].enabled
    assert [ring.enabled for ring in session.rings] == [False, False, False, True]


def test_the_preview_of_a_stop_knows_the_base_that_will_be_answered():
    session = negotiated()
    start(session)
    request = ask(session, Request.GET_VRING_BASE, VringState(0, 0))
    assert session.after(request, 40).rings[0].base == 40
    assert session.after(request).rings[0].base == 5
    session.answer(request, Result.ok(41))
    assert session.rings[0].base == 41


def test_descriptors_nobody_took_are_closed_with_the_answer():
    session = negotiated()
    request = ask(session, Request.SET_VRING_CALL, VringFd(0, True), fds=1)
    fd = request.fds.take()
    session.answer(request, Result.ok())
    os.close(fd)  # raises if the session had closed it
    request = ask(session, Request.SET_VRING_CALL, VringFd(0, True), fds=1)
    session.answer(request, Result.ok())
    assert len(request.fds) == 0


# -------------------------------------------------------------------------------------- negotiation

def test_VU_FEAT_B_02_and_03_protocol_features_come_before_features():
    session = Session(OFFER)
    assert do(session, Request.GET_PROTOCOL_FEATURES) is not None
    do(session, Request.SET_PROTOCOL_FEATURES, U64(PROTOCOL))
    assert session.protocol_features == PROTOCOL
    assert session.features == 0


def test_VU_FEAT_B_04_protocol_features_stay_valid_without_bit_30():
    session = negotiated(features=VERSION_1)
    assert do(session, Request.SET_OWNER) == ack(Request.SET_OWNER)
    assert session.protocol_features == PROTOCOL


def test_VU_RING_B_13_features_without_bit_30_enable_all_rings_at_once():
    session = Session(OFFER)
    do(session, Request.SET_FEATURES, U64(VERSION_1))
    assert all(ring.enabled for ring in session.rings)


def test_features_with_bit_30_leave_enabling_to_its_message():
    session = Session(OFFER)
    do(session, Request.SET_VRING_ENABLE, VringState(1, 1))
    do(session, Request.SET_FEATURES, U64(FEATURES))
    assert [ring.enabled for ring in session.rings] == [False, True, False, False]


def test_VU_FEAT_B_09_and_P34_reset_owner_is_ignored():
    session = negotiated()
    do(session, Request.SET_MEM_TABLE, MemTable((REGION,)), fds=1)
    start(session)
    before = session.state
    do(session, Request.RESET_OWNER)
    assert session.state == before


def test_P33_set_owner_twice_changes_nothing():
    session = negotiated()
    before = session.state
    assert do(session, Request.SET_OWNER) == ack(Request.SET_OWNER)
    assert do(session, Request.SET_OWNER) == ack(Request.SET_OWNER)
    assert session.state == before


def test_P98_the_socket_for_our_own_requests_may_come_again():
    session = negotiated()
    for _ in range(2):
        request = ask(session, Request.SET_BACKEND_REQ_FD, fds=1)
        os.close(request.fds.take())
        assert session.answer(request, Result.ok()) == ack(Request.SET_BACKEND_REQ_FD)


def test_the_same_features_again_are_fine_while_rings_run():
    # QEMU sends both once a queue pair, when the first pair has started already.
    session = negotiated()
    start(session)
    do(session, Request.SET_FEATURES, U64(FEATURES))
    do(session, Request.SET_PROTOCOL_FEATURES, U64(PROTOCOL))
    assert session.rings[0].started


def test_P28_only_log_all_may_change_while_a_ring_runs():
    session = negotiated(offer=replace(OFFER, features=FEATURES | LOG_ALL))
    start(session)
    do(session, Request.SET_FEATURES, U64(FEATURES | LOG_ALL))
    assert session.features == FEATURES | LOG_ALL
    with pytest.raises(Nack, match="bit 15 would change while a ring is started"):
        ask(session, Request.SET_FEATURES, U64(FEATURES & ~MRG_RXBUF))
    do(session, Request.GET_VRING_BASE, VringState(0, 0))
    do(session, Request.SET_FEATURES, U64(FEATURES & ~MRG_RXBUF))


def test_VU_STAT_B_01_the_status_byte_reads_back():
    session = negotiated()
    for status in (0x1, 0x3, 0xB, 0xF, 0x40, 0x0):
        do(session, Request.SET_STATUS, U64(status))
        assert do(session, Request.GET_STATUS)[-8:] == struct.pack("=Q", status)


# --------------------------------------------------------------------------------------------- rings

def test_VU_RING_B_04_07_08_kick_starts_base_stops_kick_starts_again():
    session = negotiated()
    start(session)
    assert session.rings[0] == RingState(run=Run.STARTED, num=256, base=5, addr=ADDR, kick=Notifier.FD)
    do(session, Request.GET_VRING_BASE, VringState(0, 0))
    assert not session.rings[0].started
    assert session.rings[0].base == 7
    do(session, Request.SET_VRING_KICK, VringFd(0, False))
    assert session.rings[0].started
    assert session.rings[0].kick is Notifier.POLL


@pytest.mark.parametrize("kind", [Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR])
def test_P79_P85_descriptors_of_a_running_ring_may_be_replaced(kind):
    session = negotiated()
    start(session)
    do(session, kind, VringFd(0, True), fds=1)
    do(session, kind, VringFd(0, False))
    assert session.rings[0].started


def test_P36_enable_call_and_err_before_anything_else_are_remembered():
    session = Session(OFFER)
    do(session, Request.SET_VRING_ENABLE, VringState(2, 1))
    do(session, Request.SET_VRING_CALL, VringFd(2, True), fds=1)
    do(session, Request.SET_VRING_ERR, VringFd(2, False))
    ring = session.rings[2]
    assert (ring.enabled, ring.call, ring.err, ring.started) == (True, Notifier.FD, Notifier.POLL, False)


def test_VU_RING_B_15_enable_touches_exactly_the_ring_it_names():
    session = negotiated()
    for index in (1, 2):
        do(session, Request.SET_VRING_ENABLE, VringState(index, 1))
    do(session, Request.SET_VRING_ENABLE, VringState(2, 0))
    assert [ring.enabled for ring in session.rings] == [False, True, False, False]


def test_P76_base_of_a_ring_never_configured():
    session = negotiated()
    request = ask(session, Request.GET_VRING_BASE, VringState(3, 0))
    assert session.after(request).rings[3].base == 0
    answer = session.answer(request, Result.ok(0))
    assert answer == encode(Request.GET_VRING_BASE, struct.pack("=II", 3, 0), reply=True)


def test_P102_status_zero_stops_rings_and_forgets_nothing():
    session = negotiated()
    start(session)
    do(session, Request.SET_VRING_ENABLE, VringState(0, 1))
    before = session.rings[0]
    do(session, Request.SET_STATUS, U64(0xF))
    do(session, Request.SET_STATUS, U64(0))
    assert session.rings[0] == replace(before, run=Run.STOPPED)
    assert session.features == FEATURES


def test_VU_RST_B_01_reset_device_keeps_what_belongs_to_the_session():
    session = negotiated()
    do(session, Request.ADD_MEM_REG, REGION, fds=1)
    do(session, Request.SET_STATUS, U64(0xF))
    do(session, Request.NET_SET_MTU, U64(1500))
    for index in range(2):
        do(session, Request.SET_VRING_CALL, VringFd(index, True), fds=1)
        do(session, Request.SET_VRING_ERR, VringFd(index, True), fds=1)
        do(session, Request.SET_VRING_ENABLE, VringState(index, 1))
    start(session)
    do(session, Request.RESET_DEVICE)
    state = session.state
    assert state.rings[:2] == (RingState(call=Notifier.FD, err=Notifier.FD),) * 2
    assert (state.features, state.status, state.mtu) == (0, 0, None)
    assert (state.protocol_features, state.regions) == (PROTOCOL, (REGION,))


# ------------------------------------------------------------- a ring stopped behind the driver's back

def running(features: int = FEATURES, offer: Offer = OFFER) -> Session:
    session = negotiated(features, offer)
    start(session, 0)
    start(session, 1)
    if session.state.has(ProtocolFeature.STATUS):
        do(session, Request.SET_STATUS, U64(0xF))
    return session


def test_a_ring_asked_for_its_base_while_others_run_can_be_resumed():
    session = running()
    assert not session.state.resumable(0)
    do(session, Request.GET_VRING_BASE, VringState(0, 0))
    assert session.state.resumable(0)
    session.resume(0)
    assert session.rings[0].started
    assert session.rings[0].base == 7


@pytest.mark.parametrize("then", [
    (Request.GET_VRING_BASE, VringState(1, 0)), (Request.SET_STATUS, U64(0)), (Request.SET_STATUS, U64(0xB)),
    (Request.RESET_DEVICE, None), (Request.SET_VRING_NUM, VringState(0, 256)),
    (Request.SET_VRING_BASE, VringState(0, 0)), (Request.SET_VRING_ADDR, ADDR)])
def test_a_ring_that_was_really_stopped_is_not_resumed(then):
    session = running()
    do(session, Request.GET_VRING_BASE, VringState(0, 0))
    do(session, *then)
    with pytest.raises(ValueError, match="ring 0"):
        session.resume(0)


def test_a_ring_that_did_not_run_when_asked_for_its_base_is_not_resumed():
    session = running()
    do(session, Request.GET_VRING_BASE, VringState(2, 0))
    assert not session.state.resumable(2)


def test_no_ring_is_resumed_where_the_driver_could_have_reset_it():
    session = running(FEATURES | RING_RESET, replace(OFFER, features=FEATURES | RING_RESET))
    do(session, Request.GET_VRING_BASE, VringState(0, 0))
    assert not session.state.resumable(0)


def test_no_ring_is_resumed_where_the_status_is_not_known():
    session = running(offer=replace(OFFER, protocol_features=mask(ProtocolFeature.REPLY_ACK)))
    do(session, Request.GET_VRING_BASE, VringState(0, 0))
    assert not session.state.resumable(0)


# -------------------------------------------------------------------------------------------- memory

def test_VU_MEM_B_05_and_06_regions_come_and_go_one_by_one():
    session = negotiated()
    other = Region(0x200000, 0x1000, 0x7F1000000000, 0x5000)
    do(session, Request.ADD_MEM_REG, REGION, fds=1)
    do(session, Request.ADD_MEM_REG, other, fds=1)
    assert session.regions == (REGION, other)
    do(session, Request.REM_MEM_REG, replace(REGION, offset=0x9000))
    assert session.regions == (other,)


def test_VU_MEM_B_07_and_P59_a_descriptor_with_rem_mem_reg_is_accepted_and_closed():
    session = negotiated()
    do(session, Request.ADD_MEM_REG, REGION, fds=1)
    request = ask(session, Request.REM_MEM_REG, REGION, fds=1)
    session.answer(request, Result.ok())
    assert session.regions == ()
    assert len(request.fds) == 0


def test_memory_added_once_for_each_queue_pair_goes_with_its_last_removal():
    # QEMU before 8.0 does that.
    session = negotiated()
    do(session, Request.ADD_MEM_REG, REGION, fds=1)
    do(session, Request.ADD_MEM_REG, REGION, fds=1)
    do(session, Request.REM_MEM_REG, REGION)
    assert session.regions == (REGION,)
    do(session, Request.REM_MEM_REG, REGION)
    assert session.regions == ()


def test_a_table_replaces_all_of_memory():
    session = negotiated()
    other = Region(0x200000, 0x1000, 0x7F1000000000, 0x5000)
    do(session, Request.SET_MEM_TABLE, MemTable((REGION,)), fds=1)
    do(session, Request.SET_MEM_TABLE, MemTable((other, REGION)), fds=2)
    assert session.regions == (other, REGION)


def test_the_request_tells_its_content():
    request = ask(negotiated(), Request.SET_VRING_CALL, VringFd(1, True), fds=1)
    with request:
        assert (request.kind, request.payload, request.need_reply) == (
            Request.SET_VRING_CALL, VringFd(1, True), True)
        assert str(request) == "SET_VRING_CALL ring 1"
    assert len(request.fds) == 0
    assert str(ask(negotiated(), Request.SET_OWNER)) == "SET_OWNER"
    assert wire.Nothing() == ask(negotiated(), Request.SET_OWNER).payload


# ------------------------------------------------------------------------------------------ migration

@pytest.mark.parametrize("need_reply", [False, True])
def test_VU_REPLY_B_02_the_log_is_answered_for_whether_asked_or_not(need_reply):
    session = negotiated(offer=replace(OFFER, protocol_features=PROTOCOL | mask(ProtocolFeature.LOG_SHMFD)))
    request = ask(session, Request.SET_LOG_BASE, Log(0x800, 0x1000), fds=1, need_reply=need_reply)
    assert session.answer(request, Result.ok()) == ack(Request.SET_LOG_BASE)
    assert session.state.log == Log(0x800, 0x1000)


def test_P90_a_log_that_is_no_good_is_only_refused_where_that_is_heard():
    session = negotiated(offer=replace(OFFER, protocol_features=PROTOCOL | mask(ProtocolFeature.LOG_SHMFD)))
    do(session, Request.SET_LOG_BASE, Log(0x800, 0), fds=1)
    for need_reply, error in ((True, Nack), (False, Close)):
        request = ask(session, Request.SET_LOG_BASE, Log(0x1000, 0), fds=1, need_reply=need_reply)
        with pytest.raises(error, match="too short"):
            session.answer(request, Result.refused("too short"))
    assert session.state.log == Log(0x800, 0)


def test_reset_device_keeps_the_log_and_forgets_LOG_ALL():
    session = negotiated(offer=replace(OFFER, features=FEATURES | LOG_ALL,
                                       protocol_features=PROTOCOL | mask(ProtocolFeature.LOG_SHMFD)))
    do(session, Request.SET_LOG_BASE, Log(0x800, 0), fds=1)
    do(session, Request.SET_FEATURES, U64(FEATURES | LOG_ALL))
    assert session.state.logs_buffers
    do(session, Request.RESET_DEVICE)
    assert session.state.log == Log(0x800, 0) and not session.state.logs_buffers


def test_a_ring_that_has_to_log_waits_for_the_log():
    session = negotiated(offer=replace(OFFER, features=FEATURES | LOG_ALL,
                                       protocol_features=PROTOCOL | mask(ProtocolFeature.LOG_SHMFD)))
    do(session, Request.SET_STATUS, U64(0xF))
    start(session, 0)
    assert session.state.runnable(0) and not session.state.runnable(1)
    do(session, Request.SET_VRING_ADDR, replace(ADDR, flags=1, log=0x5000))
    assert not session.state.runnable(0)
    do(session, Request.SET_VRING_ADDR, ADDR)
    do(session, Request.SET_FEATURES, U64(FEATURES | LOG_ALL))
    assert not session.state.runnable(0)
    do(session, Request.SET_LOG_BASE, Log(0x800, 0), fds=1)
    assert session.state.runnable(0)
