"""The rules that can be seen in a front-end's messages: its own, and those of the driver whose words it passes on.

A front-end stands between driver and device. QEMU masks what a guest's driver writes into the status and the features,
and adds steps of its own, so of the order of initialisation only what no front-end changes is judged.
"""

from collections.abc import Iterator
from itertools import combinations

from vdev.engine import ring_name
from vdev.lint.findings import Findings
from vdev.net.features import Feature, mask, names
from vdev.net.offer import without_orphans
from vhost_user.codec import Message
from vhost_user.errors import Refused
from vhost_user.requests import row_of
from vhost_user.session import Session
from vhost_user.spec import VRING_LOG_FLAG, ProtocolFeature, Request, Status
from vhost_user.wire import Region, VringAddr

Finding = tuple[str, str]

_LOG_PAGE = 4096  # bytes that a bit of the dirty log stands for ("Migration")
_SLOT_REQUESTS = (Request.ADD_MEM_REG, Request.REM_MEM_REG, Request.GET_MAX_MEM_SLOTS)
# vhost bits, which are no features of the device
_VHOST = mask(Feature.LOG_ALL, Feature.PROTOCOL_FEATURES)


class MessageWatch:
    """Looks at each message before the session does."""

    def __init__(self, findings: Findings) -> None:
        self._findings = findings

    def on(self, session: Session, message: Message) -> None:
        """``message`` came; ``session`` has not seen it yet."""
        self._findings.looked_at["messages"] += 1
        for id, evidence in self._broken(session, message):
            self._findings.add(id, f"{message.name}: {evidence}")

    def _broken(self, session: Session, message: Message) -> Iterator[Finding]:
        state = session.state
        if message.need_reply and not state.has(ProtocolFeature.REPLY_ACK):
            yield "VU-REPLY-F-01", "need_reply is set, and REPLY_ACK was not negotiated"
        if message.request in _SLOT_REQUESTS and not state.has(ProtocolFeature.CONFIGURE_MEM_SLOTS):
            yield "VU-MEM-F-03", "CONFIGURE_MEM_SLOTS was not negotiated"
        elif message.request == Request.ADD_MEM_REG and len(message.fds) != 1:
            yield "VU-MEM-F-03", f"{len(message.fds)} descriptors came along"
        if message.request == Request.SET_CONFIG:
            yield "NET-CFG-DR-01", "it would change the device's configuration"
        try:
            kind, row = row_of(message.request, state, len(message.payload))
            payload = row.payload.decode(message.payload)
        except Refused:
            return  # the session says what is wrong with it
        if row.ring is not None and payload.index >= len(session.rings):
            yield "VU-MQ-F-01", f"ring {payload.index} of {len(session.rings)}"
            return
        judge = _RULES.get(kind)
        if judge is not None:
            yield from judge(session, payload)


def _features(session: Session, payload) -> Iterator[Finding]:
    wanted, state = payload.value, session.state
    if extra := wanted & ~session.offer.features:
        yield "FEAT-DR-01", f"{', '.join(names(extra))} was not offered"
    if orphans := wanted & ~without_orphans(wanted):
        yield "FEAT-DR-02", f"{', '.join(names(orphans))} came without what it requires"
    if not wanted & mask(Feature.VERSION_1):
        yield "RSVF-DR-01", "VERSION_1 was offered and is not set"
    added = wanted & ~state.features & ~_VHOST
    if state.status & Status.FEATURES_OK and added:
        yield "INIT-DR-03", f"{', '.join(names(added))} came after FEATURES_OK"


def _status(session: Session, payload) -> Iterator[Finding]:
    before, now = session.state.status, payload.value
    change = f"the status goes from {before:#x} to {now:#x}"
    if now and before & Status.FAILED:
        yield "ST-DR-03", change
    elif now and before & ~now:
        yield "ST-DR-02", change
    if now & Status.DRIVER_OK and not now & Status.FEATURES_OK:
        yield "INIT-DR-01", f"{change}: DRIVER_OK without FEATURES_OK"
    elif now & Status.FEATURES_OK and not session.state.features:
        yield "INIT-DR-01", f"{change}: FEATURES_OK before any features"


def _enable(session: Session, payload) -> Iterator[Finding]:
    features = session.state.features
    if features and not features & mask(Feature.PROTOCOL_FEATURES):
        yield "VU-RING-F-02", "bit 30 was not negotiated"


def _num(session: Session, payload) -> Iterator[Finding]:
    packed = session.state.features & mask(Feature.RING_PACKED)
    if not 1 <= payload.num <= 32768 or (session.state.features and not packed and payload.num.bit_count() != 1):
        yield "VQ-SPLIT-DR-02", f"{ring_name(payload.index)} is to have size {payload.num}"


def _addr(session: Session, payload: VringAddr) -> Iterator[Finding]:
    state = session.state
    packed = bool(state.features & mask(Feature.RING_PACKED))
    due = (16, 4, 4) if packed else (16, 2, 4)
    parts = zip(("descriptors", "the driver's part", "the device's part"), (payload.desc, payload.avail, payload.used),
                due, strict=True)
    for part, address, alignment in parts:
        if address % alignment:
            yield (f"VQ-{'PACKED' if packed else 'SPLIT'}-DR-01",
                   f"{ring_name(payload.index)}: {part} at {address:#x}, not aligned to {alignment}")
    ring = state.rings[payload.index]
    if payload.flags & VRING_LOG_FLAG and state.log is not None and ring.num:
        last = payload.log + (4 if packed else 6 + 8 * ring.num) - 1
        if last // _LOG_PAGE // 8 >= state.log.size:
            yield "VU-LOG-F-01", f"the used ring ends at {last:#x}, the log has {state.log.size} bytes"


def _get_base(session: Session, payload) -> Iterator[Finding]:
    if payload.num:
        yield "VU-BASE-F-01", f"num is {payload.num}"


def _overlapping(regions: tuple[Region, ...]) -> Iterator[Finding]:
    for one, other in combinations(regions, 2):
        for what in ("gpa", "uva"):
            a, b = getattr(one, what), getattr(other, what)
            if a < b + other.size and b < a + one.size:
                yield "VU-MEM-F-01", f"{what} {a:#x} and {b:#x}, of {one.size:#x} and {other.size:#x} bytes, overlap"
                return


def _table(session: Session, payload) -> Iterator[Finding]:
    yield from _overlapping(payload.regions)


def _region(session: Session, payload: Region) -> Iterator[Finding]:
    if payload not in session.regions:  # QEMU before 8.0 adds each once for each queue pair
        yield from _overlapping((*dict.fromkeys(session.regions), payload))


_RULES = {
    Request.SET_FEATURES: _features,
    Request.SET_STATUS: _status,
    Request.SET_VRING_ENABLE: _enable,
    Request.SET_VRING_NUM: _num,
    Request.SET_VRING_ADDR: _addr,
    Request.GET_VRING_BASE: _get_base,
    Request.SET_MEM_TABLE: _table,
    Request.ADD_MEM_REG: _region,
}
