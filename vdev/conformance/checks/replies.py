"""Which messages are answered, how, and how often."""

from collections.abc import Callable

from vdev.conformance.bench import Bench, Session, Stage, refused
from vdev.conformance.verdict import Checks, expect
from vdev.net.features import Feature, mask
from vdev.testing.scripted import ring_setup, shared_regions
from vhost_user.codec import encode
from vhost_user.frontend import FrontEnd
from vhost_user.spec import ProtocolFeature, Request
from vhost_user.wire import VRING_STATE, VringState

CHECKS = Checks()


def answered_once(front_end: FrontEnd, request: Request, payload: bytes = b"", *, size: int | None = 8,
                  need_reply: bool = False) -> None:
    """``request`` gets one reply, of ``size`` bytes of payload, and no more. Raises Broken."""
    front_end.send_raw(encode(request, payload, need_reply=need_reply))
    reply = front_end.receive()
    expect(reply.request == request, f"{request.name} was answered with a reply to {reply.name}")
    expect(size is None or len(reply.payload) == size, f"the reply to {request.name} has {len(reply.payload)} bytes of "
           f"payload, not {size}")
    follows_nothing(front_end, request.name)


def follows_nothing(front_end: FrontEnd, name: str) -> None:
    """The next reply is that to the question sent now. Raises Broken."""
    front_end.send_raw(encode(Request.GET_FEATURES))
    reply = front_end.receive()
    expect(reply.request == Request.GET_FEATURES, f"one more message came after {name}: a reply to {reply.name}")


def setting(session: Session) -> list[tuple[str, Callable[[bool], None]]]:
    """Messages that set something right, in the usual order: name, and a function that sends it with need_reply or
    without."""
    front_end, ring = session.front_end, ring_setup(session.queues[1])
    return [
        ("SET_OWNER", lambda ask: front_end.set_owner(ask)),
        ("SET_FEATURES", lambda ask: front_end.set_features(
            session.features | mask(Feature.PROTOCOL_FEATURES) & session.bench.offered, ask)),
        ("SET_MEM_TABLE", lambda ask: front_end.set_mem_table(shared_regions(session.memory), ask)),
        ("SET_VRING_NUM", lambda ask: front_end.set_vring_num(1, ring.num, ask)),
        ("SET_VRING_BASE", lambda ask: front_end.set_vring_base(1, ring.base, ask)),
        ("SET_VRING_ADDR", lambda ask: front_end.set_vring_addr(1, ring.desc, ring.avail, ring.used, need_reply=ask)),
        ("SET_VRING_CALL", lambda ask: front_end.set_vring_call(1, ring.call, ask)),
        ("SET_VRING_ERR", lambda ask: front_end.set_vring_err(1, ring.call, ask)),
        ("SET_VRING_KICK", lambda ask: front_end.set_vring_kick(1, ring.kick, ask)),
        ("SET_VRING_ENABLE", lambda ask: front_end.set_vring_enable(1, True, ask)),
    ]


@CHECKS.row("VU-REPLY-B-01")
def what_is_always_answered(bench: Bench) -> None:
    """GET_FEATURES, GET_PROTOCOL_FEATURES and GET_VRING_BASE, each of which gets one reply of 8 bytes."""
    with bench.session(Stage.PLACED) as session:
        answered_once(session.front_end, Request.GET_FEATURES)
        if bench.protocol:
            answered_once(session.front_end, Request.GET_PROTOCOL_FEATURES)
        answered_once(session.front_end, Request.GET_VRING_BASE, VRING_STATE.encode(VringState(1, 0)))


@CHECKS.row("VU-REPLY-B-03")
def inflight_is_answered(bench: Bench) -> None:
    """GET_INFLIGHT_FD, whose reply has a description and a descriptor."""
    with bench.session(Stage.NEGOTIATED, needs=[ProtocolFeature.INFLIGHT_SHMFD]) as session:
        payload = bytes(16) + (2).to_bytes(2, "little") + (64).to_bytes(2, "little")
        reply = session.front_end.request(Request.GET_INFLIGHT_FD, payload, answered=True)
        with reply.fds as fds:
            expect(len(fds) == 1, f"the reply has {len(fds)} descriptors, not one")


@CHECKS.row("VU-REPLY-B-04")
def what_has_a_reply_is_answered(bench: Bench) -> None:
    """GET_QUEUE_NUM, GET_MAX_MEM_SLOTS and GET_STATUS, as far as they are offered, each of which gets one reply."""
    asked = {ProtocolFeature.MQ: Request.GET_QUEUE_NUM, ProtocolFeature.CONFIGURE_MEM_SLOTS: Request.GET_MAX_MEM_SLOTS,
             ProtocolFeature.STATUS: Request.GET_STATUS}
    offered = [feature for feature in asked if bench.protocol >> feature & 1]
    if not offered:
        bench.needs(ProtocolFeature.MQ)
    with bench.session(Stage.NEGOTIATED, needs=offered) as session:
        for feature in offered:
            answered_once(session.front_end, asked[feature])


@CHECKS.row("VU-REPLY-B-05")
def what_has_no_reply_is_not_answered(bench: Bench) -> None:
    """All messages that set up a ring, none with need_reply, and GET_FEATURES after each: no reply but to that."""
    with bench.session(Stage.NEGOTIATED) as session:
        for name, send in setting(session):
            send(False)
            follows_nothing(session.front_end, name)
        session.settle()
        expect(session.front_end.silent(), "a message came that nobody asked for")


@CHECKS.row("VU-REPLY-B-06")
def what_is_asked_for_is_answered(bench: Bench) -> None:
    """All messages that set up a ring, each with need_reply: a reply of 8 bytes each, and no more."""
    bench.needs(ProtocolFeature.REPLY_ACK)
    with bench.session(Stage.NEGOTIATED) as session:
        for name, send in setting(session):
            send(True)
            follows_nothing(session.front_end, name)


@CHECKS.row("VU-REPLY-B-07")
def zero_for_success(bench: Bench) -> None:
    """With need_reply: messages that are right, for which zero is due; then SET_VRING_ENABLE of ring 60000 and
    SET_MEM_TABLE of one region without its descriptor, for which zero is wrong."""
    bench.needs(ProtocolFeature.REPLY_ACK)
    with bench.session(Stage.NEGOTIATED) as session:
        for _, send in setting(session):
            send(True)
    with bench.session(Stage.NEGOTIATED) as session:
        expect(refused(session, lambda: session.enable(60000)), "SET_VRING_ENABLE of ring 60000 was acknowledged")
    with bench.session(Stage.NEGOTIATED) as session:
        table = (1).to_bytes(8, "little") + bytes(32)
        expect(refused(session, lambda: session.front_end.request(Request.SET_MEM_TABLE, table)),
               "SET_MEM_TABLE without a descriptor was acknowledged with 0")


@CHECKS.row("VU-REPLY-B-08")
def need_reply_adds_nothing_to_a_reply(bench: Bench) -> None:
    """GET_FEATURES, GET_PROTOCOL_FEATURES and GET_VRING_BASE with need_reply: one reply each, the usual one."""
    bench.needs(ProtocolFeature.REPLY_ACK)
    with bench.session(Stage.PLACED) as session:
        answered_once(session.front_end, Request.GET_FEATURES, need_reply=True)
        answered_once(session.front_end, Request.GET_PROTOCOL_FEATURES, need_reply=True)
        answered_once(session.front_end, Request.GET_VRING_BASE, VRING_STATE.encode(VringState(1, 0)), need_reply=True)


@CHECKS.row("VU-REPLY-B-09")
def channel_is_acknowledged(bench: Bench) -> None:
    """SET_BACKEND_REQ_FD with need_reply, which is acknowledged with zero; and without a descriptor, which is not."""
    bench.needs(ProtocolFeature.BACKEND_REQ, ProtocolFeature.REPLY_ACK)
    with bench.session(Stage.NEGOTIATED, needs=[ProtocolFeature.BACKEND_REQ]) as session:
        session.front_end.set_backend_req_fd(need_reply=True)
        expect(refused(session, lambda: session.front_end.request(Request.SET_BACKEND_REQ_FD)),
               "SET_BACKEND_REQ_FD without a descriptor was acknowledged with 0")


@CHECKS.row("VU-REPLY-B-02")
def log_is_answered(bench: Bench) -> None:
    """SET_LOG_BASE without need_reply, which gets one reply."""
    with bench.session(Stage.SHARED, needs=[ProtocolFeature.LOG_SHMFD]) as session:
        session.front_end.set_log_base(session.memory.regions[0].fd, 1 << 20, need_reply=False)
        follows_nothing(session.front_end, "SET_LOG_BASE")
