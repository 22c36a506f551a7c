"""A front-end that mostly keeps to the protocol and sometimes does not, against a real device: hypothesis chooses the
messages, a model says what has to come of them (vdev/testing/protocol_model.py).

After each message the answer is the model's, the same rings run, and nothing was left behind by what was refused; after
each session no descriptor is open and no memory mapped that was not before, and a front-end that behaves is served.
"""

import contextlib
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from vdev import connection, memory
from vdev.net.features import Feature, mask
from vdev.testing.protocol_model import File, Model, Refuse, Ring
from vdev.testing.scripted import ScriptedGuest
from vdev.testing.served import ServedDevice, WirePort, both_ways
from vhost_user import effects, requests, rules, wire
from vhost_user.codec import encode
from vhost_user.errors import Close, PeerError
from vhost_user.fds import OwnedFds
from vhost_user.frontend import FrontEnd, NoAnswer
from vhost_user.session import Session
from vhost_user.spec import ProtocolFeature, Request
from vhost_user.state import RUN, Event, Run
from vhost_user.wire import MemTable, Region, VringAddr, VringFd, VringState

RING = mask(Feature.VERSION_1, Feature.MRG_RXBUF)
# What the model knows of; a front-end that agrees on no more is told nothing else.
KNOWN = (ProtocolFeature.MQ, ProtocolFeature.RARP, ProtocolFeature.REPLY_ACK, ProtocolFeature.MTU,
         ProtocolFeature.BACKEND_REQ, ProtocolFeature.RESET_DEVICE, ProtocolFeature.CONFIGURE_MEM_SLOTS,
         ProtocolFeature.STATUS)
ANSWERED = (Request.GET_FEATURES, Request.GET_PROTOCOL_FEATURES, Request.GET_QUEUE_NUM, Request.GET_STATUS,
            Request.GET_MAX_MEM_SLOTS, Request.GET_VRING_BASE)
NO_PAYLOAD = (Request.GET_FEATURES, Request.GET_PROTOCOL_FEATURES, Request.SET_OWNER, Request.RESET_OWNER,
              Request.RESET_DEVICE, Request.GET_QUEUE_NUM, Request.GET_MAX_MEM_SLOTS, Request.GET_STATUS,
              Request.SET_BACKEND_REQ_FD)
UVA, GPA, SIZE = 0x7F50_0000_0000, 0x4000_0000, 0x10000


def often(usual: object, *others: object) -> st.SearchStrategy:
    """``usual`` fourteen times in fifteen: what is refused without an acknowledgement ends the session."""
    return st.sampled_from([usual] * 14 * len(others) + list(others))


indices = st.integers(0, 3).flatmap(lambda index: often(index, 4, 0x100, 0x10000, 0x10001, 0xFFFFFFFF))
places = st.sampled_from([UVA + step * 0x1000 for step in range(12)])
REGIONS = [Region(GPA, SIZE, UVA, 0), Region(GPA + SIZE, SIZE, UVA + SIZE, SIZE), Region(0, SIZE, 0x1000, 2 * SIZE)]
WRONG_REGIONS = [
    Region(GPA + 0x1000, SIZE, UVA + 4 * SIZE, 0),  # overlaps the first in gpa
    Region(GPA + 4 * SIZE, SIZE, UVA + 0x1000, 0),  # in uva
    Region(GPA, 0, UVA, 0), Region((1 << 64) - 0x1000, SIZE, UVA, 0), Region(GPA, SIZE, (1 << 64) - 0x1000, 0),
    Region(GPA, SIZE, UVA, 100 * SIZE), Region(GPA, SIZE, UVA, (1 << 64) - 0x1000), Region(0, 1 << 46, 0, 0),
]
regions = st.sampled_from(REGIONS).flatmap(lambda region: often(region, *WRONG_REGIONS))


def _memfd(size: int) -> int:
    fd = os.memfd_create("model")
    os.ftruncate(fd, size)
    return fd


def _one_end() -> int:
    ours, theirs = socket.socketpair()
    ours.close()
    return theirs.detach()


def _disk_file() -> int:
    with tempfile.TemporaryFile() as file:
        file.truncate(100 * SIZE)
        return os.dup(file.fileno())


# Name of a kind of descriptor -> how it is made, and what it is to the model.
FILES: dict[str, tuple[Callable[[], int], File]] = {
    "eventfd": (lambda: os.eventfd(0), File(eventfd=True)),
    "channel": (_one_end, File(channel=True)),
    "memory": (lambda: _memfd(8 * SIZE), File(usable=True, bytes=8 * SIZE)),
    "short": (lambda: _memfd(SIZE // 2), File(usable=True, bytes=SIZE // 2)),
    "disk": (_disk_file, File(bytes=100 * SIZE)),
    "null": (lambda: os.open("/dev/null", os.O_RDWR), File()),
    "directory": (lambda: os.open("/", os.O_RDONLY), File()),
}


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def mapped() -> int:
    with open("/proc/self/maps") as maps:
        return maps.read().count("/memfd:model")


acks = often(True, False)
faults = often(None, "short", "long", "a descriptor more", "nine descriptors")


class FrontEndMachine(RuleBasedStateMachine):
    """One front-end on a device that others used before. ``served`` is set by the test."""

    served: ServedDevice
    patience = 30.0  # seconds for the device to see that a session is over
    front: FrontEnd | None = None
    differs = False  # what came was not what the model says

    @initialize(packed=st.booleans(), rings=st.sets(st.integers(0, 3)), far=st.sampled_from([True] * 4 + [False]))
    def begin(self, packed, rings, far):
        """Most of what can go wrong does so late: most sessions begin with rings that run."""
        self.beginning = (packed, rings, far)
        self.connect()

    def connect(self) -> None:
        """A new session, brought as far as the first."""
        packed, rings, far = self.beginning
        self.files = open_files()
        self.front = FrontEnd(self.served.connect(), timeout=30)
        offer = self.served.device.offer(Request.GET_FEATURES)
        self.model = Model(offer.features, offer.protocol_features, offer.queue_num, offer.max_mem_slots,
                           [Ring() for _ in range(offer.rings)])
        self.known = offer.protocol_features & mask(*KNOWN)
        self.say(Request.GET_FEATURES, b"")  # the first message decides what is offered
        if far:
            self.number(Request.SET_PROTOCOL_FEATURES, self.known)
            # Without what would have rings wait for a log or for translations.
            without = mask(Feature.LOG_ALL, Feature.ACCESS_PLATFORM, *([] if packed else [Feature.RING_PACKED]))
            self.number(Request.SET_FEATURES, self.model.features & ~without)
            self.say(Request.ADD_MEM_REG, wire.SINGLE_REGION.encode(REGIONS[0]), REGIONS[0], files=("memory",))
            self.number(Request.SET_STATUS, 0xF)
            for index in rings:
                self.start_ring(index, index)

    def teardown(self) -> None:
        """Nothing of the session is left, and a front-end that behaves is served."""
        if self.front is None:
            return
        self.front.close()
        if self.differs:
            return
        with ScriptedGuest(self.served.connect(), features=RING, queue_pairs=2) as guest:
            both_ways(self.served, guest)
        deadline = time.monotonic() + self.patience
        while (open_files(), mapped()) != (self.files, 0) and time.monotonic() < deadline:
            time.sleep(0.001)  # until the device has seen the end
        assert (open_files(), mapped()) == (self.files, 0)
        assert not self.served.lines("session-failed")

    # ----------------------------------------------------------------------------------------- one message

    def say(self, kind: Request, payload: bytes, *values: object, files: tuple[str, ...] = (), ack: bool = True,
            fault: str | None = None) -> None:
        """Send it, and compare what comes of it with what the model says."""
        if fault == "short" and payload:
            payload = payload[:-1]
        elif fault == "long":
            payload += b"x"
        elif fault == "a descriptor more":
            files = (*files, "eventfd")
        elif fault == "nine descriptors":
            files = ("eventfd",) * 9
        wrong_length = fault == "long" or (fault == "short" and kind not in NO_PAYLOAD)
        expected = None
        if not wrong_length and len(files) <= 8:
            with contextlib.suppress(Refuse):
                expected = self.model.after(kind, *values, files=tuple(FILES[name][1] for name in files))
        # The message that brings acknowledgements may ask for one.
        agreed = expected[0] if expected is not None and kind is Request.SET_PROTOCOL_FEATURES else self.model
        acknowledged = ack and any(model.has(ProtocolFeature.REPLY_ACK) for model in (self.model, agreed))
        self.send(encode(kind, payload, need_reply=ack), files)
        try:
            goes_on = self.check(kind, expected, acknowledged and len(files) <= 8)
        except (AssertionError, NoAnswer, PeerError):
            self.differs = True
            raise
        if not goes_on:
            self.teardown()
            self.connect()

    def send(self, data: bytes, files: tuple[str, ...]) -> None:
        """The message, and a question behind it whose answer shows that there is no other."""
        fds = [FILES[name][0]() for name in files]
        try:
            with contextlib.suppress(Close):  # seen again when the answer is read
                self.front.send_raw(data, fds)
                self.front.send_raw(encode(Request.GET_FEATURES))
        finally:
            for fd in fds:
                os.close(fd)

    def check(self, kind: Request, expected: tuple[Model, int | None] | None, acknowledged: bool) -> bool:
        """What came is ``expected`` (None: refused) -> whether the session goes on."""
        if expected is None:
            if kind in ANSWERED or not acknowledged:
                assert self.front.closed(), f"{kind.name} should have closed the connection"
                return False
            assert self.answer(kind) != 0, f"{kind.name} should have been refused"
        else:
            self.model, answer = expected
            if kind in ANSWERED:
                assert self.answer(kind) == answer, f"{kind.name} was answered wrongly"
            elif acknowledged:
                assert self.answer(kind) == 0, f"{kind.name} was refused; the device says {self.served.log[-1]}"
        assert self.answer(Request.GET_FEATURES) == self.model.features
        self.compare()
        return True

    def answer(self, kind: Request) -> int:
        """The number in the next answer, which must be to ``kind``."""
        reply = self.front.receive()
        assert reply.request == kind
        if kind is Request.GET_VRING_BASE:
            return wire.VRING_STATE.decode(reply.payload).num
        return wire.U64_LAYOUT.decode(reply.payload).value

    def compare(self) -> None:
        """The back-end's own view of the session is the model's."""
        engine = self.served.device.engine
        running, enabled, state = self.served.call(lambda: (
            engine.running(), [ring.enabled for ring in engine.rings],
            self.served.device._connection._session.state))
        model = self.model
        assert running == model.running()
        assert enabled == [ring.enabled for ring in model.rings]
        assert [(ring.num, ring.addr, ring.base, ring.started) for ring in state.rings] == [
            (ring.num, ring.addr, ring.base, ring.started) for ring in model.rings]
        assert (state.features, state.protocol_features, state.status, list(state.regions)) == (
            model.driver_features, model.agreed, model.status, model.regions)

    # ----------------------------------------------------------------------------------------- negotiation

    def number(self, kind: Request, value: int, **how: object) -> None:
        self.say(kind, wire.U64_LAYOUT.encode(wire.U64(value)), value, **how)

    @rule(kind=st.sampled_from(NO_PAYLOAD), ack=acks, fault=faults)
    def ask(self, kind, ack, fault):
        """What has no payload."""
        self.say(kind, b"", ack=ack, fault=fault)

    @rule(packed=st.booleans(), bit_30=st.booleans(), flip=often(None, *range(2, 64, 3)), ack=acks,
          fault=faults)
    def set_features(self, packed, bit_30, flip, ack, fault):
        value = RING | packed * mask(Feature.RING_PACKED) | bit_30 * mask(Feature.PROTOCOL_FEATURES)
        self.number(Request.SET_FEATURES, value ^ (0 if flip is None else 1 << flip), ack=ack, fault=fault)

    @rule(without=often(None, *KNOWN), stray=often(None, 40, 63), ack=acks, fault=faults)
    def set_protocol_features(self, without, stray, ack, fault):
        value = self.known & ~(0 if without is None else mask(without)) | (0 if stray is None else 1 << stray)
        self.number(Request.SET_PROTOCOL_FEATURES, value, ack=ack, fault=fault)

    @rule(value=st.sampled_from((0xF, 0xF, 0, 0xB, 0xFF, 0x100, 1 << 63)), ack=acks, fault=faults)
    def set_status(self, value, ack, fault):
        self.number(Request.SET_STATUS, value, ack=ack, fault=fault)

    @rule(value=st.sampled_from((0, 67, 68, 65535, 65536)), ack=acks, fault=faults)
    def net_set_mtu(self, value, ack, fault):
        self.number(Request.NET_SET_MTU, value, ack=ack, fault=fault)

    @rule(ack=acks, fault=faults)
    def send_rarp(self, ack, fault):
        self.number(Request.SEND_RARP, 0x563412005452, ack=ack, fault=fault)

    @rule(files=often(("channel",), (), ("eventfd",)), ack=acks, fault=faults)
    def set_backend_req_fd(self, files, ack, fault):
        self.say(Request.SET_BACKEND_REQ_FD, b"", files=files, ack=ack, fault=fault)

    # ---------------------------------------------------------------------------------------------- memory

    @rule(table=st.lists(st.tuples(regions, often("memory", *FILES)), max_size=4), ack=acks, fault=faults)
    def set_mem_table(self, table, ack, fault):
        listed = [region for region, _ in table]
        self.say(Request.SET_MEM_TABLE, wire.MEM_TABLE.encode(MemTable(tuple(listed))), listed,
                 files=tuple(file for _, file in table), ack=ack, fault=fault)

    @rule(region=regions, files=often(("memory",), (), *((name,) for name in FILES)), ack=acks, fault=faults)
    def add_mem_reg(self, region, files, ack, fault):
        self.say(Request.ADD_MEM_REG, wire.SINGLE_REGION.encode(region), region, files=files, ack=ack, fault=fault)

    @rule(region=regions, files=often((), ("memory",)), ack=acks, fault=faults)
    def rem_mem_reg(self, region, files, ack, fault):
        self.say(Request.REM_MEM_REG, wire.SINGLE_REGION.encode(region), region, files=files, ack=ack, fault=fault)

    # ----------------------------------------------------------------------------------------------- rings

    def ring(self, kind: Request, index: int, number: int, **how: object) -> None:
        self.say(kind, wire.VRING_STATE.encode(VringState(index, number)), index, number, **how)

    @rule(index=indices, num=st.sampled_from((64, 0, 3, 8, 32768, 32769, 0xFFFFFFFF)), ack=acks, fault=faults)
    def set_vring_num(self, index, num, ack, fault):
        self.ring(Request.SET_VRING_NUM, index, num, ack=ack, fault=fault)

    @rule(index=indices, base=st.sampled_from((0, 5, 0x4000, 0x10000, 0x80008000, 0x00050005, 0x7FFF7FFF)), ack=acks,
          fault=faults)
    def set_vring_base(self, index, base, ack, fault):
        self.ring(Request.SET_VRING_BASE, index, base, ack=ack, fault=fault)

    @rule(index=indices, ack=acks, fault=faults)
    def get_vring_base(self, index, ack, fault):
        self.ring(Request.GET_VRING_BASE, index, 0, ack=ack, fault=fault)

    @rule(index=indices, number=st.sampled_from((1, 0, 2)), ack=acks, fault=faults)
    def set_vring_enable(self, index, number, ack, fault):
        self.ring(Request.SET_VRING_ENABLE, index, number, ack=ack, fault=fault)

    @rule(index=indices, at=often((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 2)), places=st.tuples(places, places, places),
          flags=often(0, 1, 2), ack=acks, fault=faults)
    def set_vring_addr(self, index, at, places, flags, ack, fault):
        desc, avail, used = (place + off for place, off in zip(places, at, strict=True))
        addr = VringAddr(index, flags, desc=desc, used=used, avail=avail, log=0)
        self.say(Request.SET_VRING_ADDR, wire.VRING_ADDR.encode(addr), addr, ack=ack, fault=fault)

    @rule(kind=st.sampled_from([Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR]), index=indices,
          fd=often(True, False), file=often("eventfd", None, *FILES), ack=acks, fault=faults)
    def set_vring_fd(self, kind, index, fd, file, ack, fault):
        if index & 0x100:
            return  # the bit that says whether a descriptor comes along
        payload = wire.VRING_FD.encode(VringFd(index, fd))
        self.say(kind, payload, index, fd, files=(file,) if fd and file else (), ack=ack, fault=fault)

    # -------------------------------------------------------------------------------------- what leads far

    @precondition(lambda self: self.model.driver_features)
    @rule(index=st.integers(0, 3), place=st.integers(0, 3))
    def start_ring(self, index, place):
        """All that a ring needs."""
        at = UVA + 0x3000 * place
        addr = VringAddr(index, 0, desc=at, avail=at + 0x1000, used=at + 0x2000, log=0)
        self.ring(Request.SET_VRING_NUM, index, 64)
        self.ring(Request.SET_VRING_BASE, index, 0)
        self.say(Request.SET_VRING_ADDR, wire.VRING_ADDR.encode(addr), addr)
        self.say(Request.SET_VRING_KICK, wire.VRING_FD.encode(VringFd(index, True)), index, True, files=("eventfd",))
        self.ring(Request.SET_VRING_ENABLE, index, 1)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FrontEndMachine]]:
    """For a device that resumes no ring by itself: when it would is a matter of time, which a model does not know."""
    for delay in "RESUME_DELAY_KICKED", "RESUME_DELAY_QUIET":
        monkeypatch.setattr(connection, delay, 1e6)
    with ServedDevice(WirePort(2)) as device:
        with ScriptedGuest(device.connect(), features=RING, queue_pairs=2) as guest:
            both_ways(device, guest)  # what is opened once, is open
        device.wait_for("session-end")
        yield type("Machine", (FrontEndMachine,), {"served": device})


def explore(machine: type[FrontEndMachine], examples: int, steps: int,
            phases: tuple[Phase, ...] = tuple(Phase)) -> None:
    run_state_machine_as_test(machine, settings=settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, phases=phases, database=None,
        suppress_health_check=list(HealthCheck), print_blob=True))


def test_any_front_end_gets_what_the_model_says(machine: type[FrontEndMachine]) -> None:
    explore(machine, 40, 40)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_any_front_end_gets_what_the_model_says_for_long(machine: type[FrontEndMachine]) -> None:
    explore(machine, 300, 60)


def row(kind: Request, **changes: object) -> Callable[[pytest.MonkeyPatch], None]:
    """The row of a request is another one."""
    return lambda patch: patch.setitem(requests.REQUESTS, kind, replace(requests.REQUESTS[kind], **changes))


MISTAKES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "a limit is off": lambda patch: patch.setattr(rules, "MTU_MAX", 65536),
    "a check is missing": row(Request.SET_VRING_ADDR, rule=rules.anything),
    "a running ring can be changed": lambda patch: patch.setitem(RUN[Run.STARTED], Event.NUM, Run.STARTED),
    "an effect is missing": row(Request.SET_VRING_ENABLE, effect=effects.nothing),
    "too much is forgotten": row(Request.SET_STATUS, effect=effects.reset_device),
    "an answer too many": lambda patch: patch.setattr(Session, "_body", lambda self, accepted, base: wire.U64(7)),
    "descriptors leak": lambda patch: patch.setattr(OwnedFds, "close", OwnedFds.take_all),
    "memory stays mapped": lambda patch: patch.setattr(memory, "_close", lambda mappings: None),
}


@pytest.mark.long
@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_the_model_notices(machine: type[FrontEndMachine], monkeypatch: pytest.MonkeyPatch, mistake) -> None:
    mistake(monkeypatch)
    machine.patience = 1.0
    with pytest.raises((AssertionError, NoAnswer, PeerError, TimeoutError, Flaky)):
        explore(machine, 60, 40, phases=(Phase.generate,))
