"""The linter and the front-end's messages: for each rule a session that breaks it is named."""

import os
from dataclasses import dataclass, replace

import pytest

from vdev.lint.findings import Findings
from vdev.lint.messages import MessageWatch
from vdev.logs import EventLog
from vdev.net.features import Feature, mask
from vhost_user.codec import Message
from vhost_user.fds import OwnedFds
from vhost_user.requests import REQUESTS
from vhost_user.session import Session
from vhost_user.spec import NEED_REPLY_FLAG, VERSION, ProtocolFeature, Request, Status
from vhost_user.spec import mask as protocol_mask
from vhost_user.state import Offer
from vhost_user.wire import U64, Log, MemTable, Region, VringAddr, VringState

GOOD = mask(Feature.VERSION_1, Feature.PROTOCOL_FEATURES)
OFFER = Offer(GOOD | mask(Feature.CSUM, Feature.HOST_TSO4, Feature.RING_PACKED, Feature.LOG_ALL),
              protocol_mask(ProtocolFeature.REPLY_ACK, ProtocolFeature.STATUS, ProtocolFeature.CONFIGURE_MEM_SLOTS,
                            ProtocolFeature.LOG_SHMFD), rings=2, queue_num=1)
REGION = Region(0, 0x100000, 0x7F0000000000, 0)
ADDR = VringAddr(0, 0, desc=0x1000, used=0x3000, avail=0x2000, log=0)
READY = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK


@dataclass(frozen=True)
class Case:
    """The message breaks the rule ``id`` in a session of which ``state`` (fields of State) is known."""

    id: str
    request: Request
    payload: object = None
    need_reply: bool = False
    fds: int = 0
    state: tuple[tuple[str, object], ...] = ()
    name: str = ""


def state(**fields: object) -> tuple[tuple[str, object], ...]:
    return tuple(fields.items())


NEGOTIATED = state(features=GOOD, protocol_features=OFFER.protocol_features)
PACKED = state(features=GOOD | mask(Feature.RING_PACKED), protocol_features=OFFER.protocol_features)

CASES = [
    Case("FEAT-DR-01", Request.SET_FEATURES, U64(GOOD | mask(Feature.MQ))),
    Case("FEAT-DR-02", Request.SET_FEATURES, U64(GOOD | mask(Feature.HOST_TSO4))),
    Case("RSVF-DR-01", Request.SET_FEATURES, U64(mask(Feature.CSUM))),
    Case("INIT-DR-03", Request.SET_FEATURES, U64(GOOD | mask(Feature.CSUM)), state=(*NEGOTIATED, ("status", READY))),
    Case("INIT-DR-01", Request.SET_STATUS, U64(Status.ACKNOWLEDGE | Status.DRIVER | Status.DRIVER_OK),
         state=NEGOTIATED),
    Case("INIT-DR-01", Request.SET_STATUS, U64(READY), state=NEGOTIATED[1:], name="early"),
    Case("ST-DR-02", Request.SET_STATUS, U64(READY & ~Status.DRIVER), state=(*NEGOTIATED, ("status", READY))),
    Case("ST-DR-03", Request.SET_STATUS, U64(READY), state=(*NEGOTIATED, ("status", READY | Status.FAILED))),
    Case("NET-CFG-DR-01", Request.SET_CONFIG, None),
    Case("VU-REPLY-F-01", Request.SET_OWNER, need_reply=True),
    Case("VU-RING-F-02", Request.SET_VRING_ENABLE, VringState(0, 1), state=state(features=mask(Feature.VERSION_1))),
    Case("VU-BASE-F-01", Request.GET_VRING_BASE, VringState(0, 1), state=NEGOTIATED),
    Case("VU-MQ-F-01", Request.SET_VRING_NUM, VringState(2, 256), state=NEGOTIATED),
    Case("VU-MEM-F-01", Request.SET_MEM_TABLE, MemTable((REGION, replace(REGION, uva=0x7E0000000000))), name="gpa"),
    Case("VU-MEM-F-01", Request.SET_MEM_TABLE, MemTable((REGION, replace(REGION, gpa=0x100000))), name="uva"),
    Case("VU-MEM-F-01", Request.ADD_MEM_REG, replace(REGION, gpa=0x80000), fds=1,
         state=(*NEGOTIATED, ("regions", (REGION,))), name="added"),
    Case("VU-MEM-F-03", Request.ADD_MEM_REG, REGION, state=NEGOTIATED, name="no_descriptor"),
    Case("VU-MEM-F-03", Request.ADD_MEM_REG, REGION, fds=1, name="no_slots"),
    Case("VU-LOG-F-01", Request.SET_VRING_ADDR, replace(ADDR, flags=1, log=0x80000),
         state=(*NEGOTIATED, ("log", Log(16, 0)))),
    Case("VQ-SPLIT-DR-01", Request.SET_VRING_ADDR, replace(ADDR, desc=0x1008), state=NEGOTIATED),
    Case("VQ-SPLIT-DR-02", Request.SET_VRING_NUM, VringState(0, 3), state=NEGOTIATED),
    Case("VQ-SPLIT-DR-02", Request.SET_VRING_NUM, VringState(0, 65536), state=NEGOTIATED, name="too_large"),
    Case("VQ-PACKED-DR-01", Request.SET_VRING_ADDR, replace(ADDR, avail=0x2002), state=PACKED),
]


def found(case: Case) -> set[str]:
    """The rules that ``case`` breaks."""
    session = Session(OFFER)
    ring = session.state.rings[0]
    session.state = replace(session.state, **dict(case.state), rings=(replace(ring, num=256), ring))
    data = b"" if case.payload is None else REQUESTS[case.request].payload.encode(case.payload)
    flags = VERSION | (NEED_REPLY_FLAG if case.need_reply else 0)
    findings = Findings(EventLog("test"))
    with OwnedFds(os.eventfd(0) for _ in range(case.fds)) as fds:
        MessageWatch(findings).on(session, Message(case.request, flags, data, fds))
    return set(findings.counts)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(filter(None, (case.id, case.name))))
def test_rule(case: Case) -> None:
    assert found(case) == {case.id}


CLEAN = [
    Case("features", Request.SET_FEATURES, U64(GOOD | mask(Feature.CSUM, Feature.HOST_TSO4))),
    Case("log later", Request.SET_FEATURES, U64(GOOD | mask(Feature.LOG_ALL)),
         state=(*NEGOTIATED, ("status", READY | Status.DRIVER_OK))),
    Case("reset", Request.SET_STATUS, U64(0), state=(*NEGOTIATED, ("status", READY | Status.FAILED))),
    Case("ready", Request.SET_STATUS, U64(READY | Status.DRIVER_OK), state=(*NEGOTIATED, ("status", READY))),
    Case("early enable", Request.SET_VRING_ENABLE, VringState(0, 1)),
    Case("base", Request.GET_VRING_BASE, VringState(0, 0), state=NEGOTIATED),
    Case("two regions", Request.SET_MEM_TABLE, MemTable((REGION, Region(0x100000, 0x1000, 0x7E0000000000, 0)))),
    Case("once more", Request.ADD_MEM_REG, REGION, fds=1, state=(*NEGOTIATED, ("regions", (REGION,)))),
    Case("logged", Request.SET_VRING_ADDR, replace(ADDR, flags=1, log=0x7F000 - 0x1000),
         state=(*NEGOTIATED, ("log", Log(16, 0)))),
    Case("packed size", Request.SET_VRING_NUM, VringState(0, 3), state=PACKED),
    Case("acknowledged", Request.SET_OWNER, need_reply=True, state=NEGOTIATED),
    Case("cut short", Request.SET_FEATURES),
]


@pytest.mark.parametrize("case", CLEAN, ids=lambda case: case.id)
def test_what_is_right_is_not_named(case: Case) -> None:
    assert found(case) == set()
