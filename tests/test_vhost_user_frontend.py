"""The front-end's half against a session behind a real socket, and against recordings of real front-ends."""

import os
import select
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from vhost_user.codec import encode
from vhost_user.errors import Close, Nack
from vhost_user.frontend import FrontEnd, NoAnswer, RequestRefused, RingSetup, SharedRegion
from vhost_user.handshake import QEMU_7_2, QEMU_10_0, Qemu, VirtioUser
from vhost_user.session import Accepted, Result, Session
from vhost_user.spec import ProtocolFeature, Request, mask
from vhost_user.state import Offer
from vhost_user.transport import Transport
from vhost_user.wire import Region

TRANSCRIPTS = Path(__file__).parent / "transcripts"
VERSION_1, RING_PACKED, BIT_30 = 1 << 32, 1 << 34, 1 << 30
PROTOCOL = mask(ProtocolFeature.MQ, ProtocolFeature.RARP, ProtocolFeature.REPLY_ACK, ProtocolFeature.MTU,
                ProtocolFeature.BACKEND_REQ, ProtocolFeature.RESET_DEVICE,
                ProtocolFeature.CONFIGURE_MEM_SLOTS, ProtocolFeature.STATUS)
OFFER = Offer(VERSION_1 | RING_PACKED | BIT_30 | 1 << 15, PROTOCOL, rings=4, queue_num=2)


class StubBackEnd(threading.Thread):
    """A session behind a socket, with a device that agrees to everything it is not told to refuse."""

    def __init__(self, sock: socket.socket, offer: Offer) -> None:
        super().__init__(daemon=True)
        self.session = Session(offer)
        self.heard: list[str] = []  # one line a request, in the form of the transcripts
        self.refuse: set[Request] = set()
        self.ended: Close | None = None
        self._sock = sock

    def run(self) -> None:
        transport = Transport(self._sock)
        self._sock = None
        try:
            while True:
                for message in transport.turn():
                    with message.fds:
                        self._serve(transport, message)
                _wait_readable(transport)
        except Close as end:
            self.ended = end
        finally:
            transport.close()

    def _serve(self, transport: Transport, message) -> None:
        asked = message.need_reply
        try:
            request = self.session.accept(message)
            self.heard.append(line(request, asked))
            result = Result.refused("no") if request.kind in self.refuse else Result.ok(11)
            reply = self.session.answer(request, result)
        except Nack as nack:
            reply = nack.reply
        if reply is not None:
            transport.send(reply)


def _wait_readable(transport: Transport) -> None:
    poller = select.poll()
    poller.register(transport, select.POLLIN)
    poller.poll(10_000)


def line(request: Accepted, need_reply: bool) -> str:
    """A request as the transcripts write it."""
    payload = request.payload
    words = [request.kind.name]
    if hasattr(payload, "index"):
        words.append(f"ring={payload.index}")
    if request.kind is Request.SET_VRING_ENABLE:
        words.append(f"num={payload.num}")
    if request.kind is Request.SET_VRING_BASE and payload.num:
        words.append(f"base={payload.num:#x}")
    if request.kind is Request.SET_STATUS:
        words.append(f"status={payload.value:#x}")
    if request.fds:
        words.append(f"fds={len(request.fds)}")
    if need_reply:
        words.append("need_reply")
    return " ".join(words)


def transcript(name: str) -> list[str]:
    text = (TRANSCRIPTS / name).read_text()
    return [entry for entry in text.splitlines() if not entry.startswith("#")]


@pytest.fixture
def connect() -> Iterator:
    """connect(offer) -> (front-end, the back-end it talks to)"""
    opened = []

    def connect(offer: Offer = OFFER, **options) -> tuple[FrontEnd, StubBackEnd]:
        ours, theirs = socket.socketpair()
        backend = StubBackEnd(theirs, offer)
        backend.start()
        opened.append((frontend := FrontEnd(ours, **options), backend))
        return frontend, backend

    yield connect
    for frontend, backend in opened:
        frontend.close()
        backend.join(10)
        assert not backend.is_alive()


@pytest.fixture
def memory() -> Iterator[list[SharedRegion]]:
    fd = os.memfd_create("guest")
    yield [SharedRegion(fd, 0, 0x7F0000000000, 0xA0000),
           SharedRegion(fd, 0xC0000, 0x7F00000C0000, 0x40000, 0xC0000)]
    os.close(fd)


@pytest.fixture
def rings() -> Iterator[list[RingSetup]]:
    fds = [os.eventfd(0) for _ in range(3)]
    base = 0x7F0000000000
    yield [RingSetup(256, base + 0x10000 * n, base + 0x10000 * n + 0x1000, base + 0x10000 * n + 0x2000, *fds)
           for n in range(4)]
    for fd in fds:
        os.close(fd)


# ------------------------------------------------------------------------------------ real front-ends

@pytest.mark.parametrize(("name", "version", "protocol", "resets"), [
    ("qemu-7.2.txt", QEMU_7_2, PROTOCOL, 4), ("qemu-10.0.txt", QEMU_10_0, PROTOCOL, 2),
    ("qemu-10.0-plain.txt", QEMU_10_0, mask(ProtocolFeature.MQ), 4)])
def test_qemu_says_what_was_recorded(connect, memory, rings, name, version, protocol, resets):
    assert _life_of_a_qemu(connect, memory, rings, version, protocol, resets, VERSION_1) == transcript(name)


def test_qemu_says_what_was_recorded_with_packed_rings(connect, memory, rings):
    """Its bases have both positions; a split ring's is one index."""
    rings = [replace(ring, base=0x80008000) for ring in rings]
    said = _life_of_a_qemu(connect, memory[:1], rings, QEMU_10_0, PROTOCOL, 2, VERSION_1 | RING_PACKED)
    assert said == transcript("qemu-10.0-packed.txt")


def _life_of_a_qemu(connect, memory, rings, version, protocol: int, resets: int, features: int) -> list[str]:
    """Boot and quit -> what the back-end heard."""
    offer = Offer(OFFER.features, protocol, rings=4, queue_num=2)
    frontend, backend = connect(offer)
    qemu = Qemu(frontend, rings, version)
    qemu.connect()
    for _ in range(resets):
        qemu.reset()
    for _ in range(4 - resets):
        qemu.enable_pairs(1)
    qemu.start(memory, features, mtu=1500)
    qemu.enable_pairs(1)
    assert backend_state(frontend, backend) == [True] * 4
    assert qemu.stop() == [11] * 4
    frontend.close()
    backend.join()
    return backend.heard


def backend_state(frontend: FrontEnd, backend: StubBackEnd) -> list[bool]:
    """Which rings run once the back-end has heard everything sent so far."""
    frontend.get_features()
    backend.heard.pop()
    return [ring.started for ring in backend.session.rings]


@pytest.mark.parametrize(("name", "base", "features"), [
    ("virtio-user-22.11.txt", 0, VERSION_1), ("virtio-user-22.11-packed.txt", 0x8000, VERSION_1 | RING_PACKED)])
def test_virtio_user_says_what_was_recorded(connect, memory, rings, name, base, features):
    frontend, backend = connect()
    virtio_user = VirtioUser(frontend, [replace(ring, base=base) for ring in rings])
    assert virtio_user.connect() == OFFER.features
    virtio_user.start(memory[:1], features | BIT_30)
    assert backend_state(frontend, backend) == [True] * 4
    assert virtio_user.stop() == [11] * 4
    frontend.close()
    backend.join()
    assert backend.heard == transcript(name)


def test_a_guest_of_qemu_starts_again_without_its_memory_being_sent_again(connect, memory, rings):
    frontend, backend = connect()
    qemu = Qemu(frontend, rings)
    qemu.connect()
    for _ in range(2):
        qemu.reset()
        qemu.start(memory, VERSION_1)
        qemu.stop()
    frontend.get_features()
    assert backend.session.regions == tuple(shared.region for shared in memory)


def test_qemu_refuses_a_back_end_with_too_few_queues(connect, rings):
    frontend, _ = connect(Offer(OFFER.features, PROTOCOL, rings=2, queue_num=1))
    with pytest.raises(ValueError, match="fewer than 2 queue pairs"):
        Qemu(frontend, rings).connect()


# -------------------------------------------------------------------------------------- every method

def test_every_message_reaches_the_session(connect, memory, rings):
    frontend, backend = connect()
    assert frontend.negotiate() == OFFER.features
    assert frontend.protocol_features == PROTOCOL
    assert frontend.get_queue_num() == 2
    assert frontend.get_max_mem_slots() == OFFER.max_mem_slots
    frontend.set_backend_req_fd()
    frontend.share(memory)
    frontend.rem_mem_reg(memory[1])
    assert backend.session.regions == (Region(0, 0xA0000, 0x7F0000000000, 0),)
    frontend.set_mem_table(memory)
    assert len(backend.session.regions) == 2
    frontend.net_set_mtu(1500)
    assert backend.session.state.mtu == 1500
    frontend.set_ring(1, rings[1])
    frontend.set_vring_enable(1, True)
    ring = backend.session.rings[1]
    assert (ring.started, ring.enabled, ring.num, ring.addr.desc) == (True, True, 256, rings[1].desc)
    frontend.set_status(0xF)
    assert frontend.get_status() == 0xF
    frontend.send_rarp(bytes.fromhex("525400123456"))
    assert frontend.get_vring_base(1) == 11
    assert not backend.session.rings[1].started
    frontend.reset_owner()
    frontend.reset_device()
    assert backend.session.features == 0


def test_memory_goes_in_one_table_where_slots_were_not_negotiated(connect, memory):
    frontend, backend = connect()
    frontend.negotiate(protocol_features=mask(ProtocolFeature.REPLY_ACK))
    frontend.share(memory)
    assert backend.heard[-1] == "SET_MEM_TABLE fds=2 need_reply"


def test_a_refusal_is_raised(connect):
    frontend, backend = connect()
    frontend.negotiate()
    backend.refuse.add(Request.NET_SET_MTU)
    with pytest.raises(RequestRefused, match="NET_SET_MTU"):
        frontend.net_set_mtu(1500)
    with pytest.raises(RequestRefused, match="SET_VRING_NUM"):
        frontend.set_vring_num(9, 256)
    frontend.set_vring_num(0, 256)


def test_without_acknowledgements_the_end_of_the_connection_is_the_answer(connect):
    frontend, backend = connect(ack=False)
    frontend.negotiate()
    frontend.set_vring_num(9, 256)
    assert frontend.closed()
    backend.join()
    assert "SET_VRING_NUM ring 9" in str(backend.ended)


def test_silence_is_told_from_an_answer(connect):
    frontend, _ = connect(ack=False)
    frontend.negotiate()
    frontend.set_vring_num(0, 256)
    assert frontend.silent()
    frontend.send_raw(encode(Request.GET_FEATURES))
    assert not frontend.silent(seconds=10)
    assert frontend.receive().request == Request.GET_FEATURES


def test_no_answer_in_time():
    ours, theirs = socket.socketpair()
    with theirs, FrontEnd(ours, timeout=0.01) as frontend:
        with pytest.raises(NoAnswer, match="within 0.01 s"):
            frontend.get_features()
        assert not frontend.closed()


def test_an_answer_to_another_question():
    ours, theirs = socket.socketpair()
    with theirs, FrontEnd(ours) as frontend:
        theirs.sendall(encode(Request.GET_STATUS, bytes(8), reply=True))
        with pytest.raises(NoAnswer, match="GET_FEATURES was answered with a reply to GET_STATUS"):
            frontend.get_features()


def test_a_base_for_another_ring():
    ours, theirs = socket.socketpair()
    with theirs, FrontEnd(ours) as frontend:
        theirs.sendall(encode(Request.GET_VRING_BASE, bytes(8), reply=True))
        with pytest.raises(NoAnswer, match="for ring 1 was answered for ring 0"):
            frontend.get_vring_base(1)


def test_connecting_to_nobody(tmp_path):
    with pytest.raises(FileNotFoundError):
        FrontEnd.connect(str(tmp_path / "nobody"))


def test_connecting_to_a_socket_that_listens(tmp_path):
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        with FrontEnd.connect(path) as frontend:
            accepted, _ = listener.accept()
            accepted.close()
            assert frontend.closed()
