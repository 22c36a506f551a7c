"""The socket: descriptors, half messages, floods, and peers that do not read."""

import fcntl
import os
import resource
import select
import socket
import struct
import termios
import threading

import pytest

from vhost_user.codec import encode
from vhost_user.errors import Close, Disconnected
from vhost_user.spec import Request
from vhost_user.transport import MESSAGE_DEADLINE, MESSAGES_PER_TURN, Transport

KICK = encode(Request.SET_VRING_KICK, bytes(8))


class Clock:
    """Time that passes when told."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def pair(clock):
    """(our transport, the peer's socket)"""
    ours, theirs = socket.socketpair()
    transport = Transport(ours, clock=clock)
    with theirs:
        yield transport, theirs
    transport.close()


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def send_with_fds(sock: socket.socket, data: bytes, count: int) -> None:
    fds = [os.eventfd(0) for _ in range(count)]
    socket.send_fds(sock, [data], fds)
    for fd in fds:
        os.close(fd)


def test_nothing_there_is_not_the_end(pair):
    transport, _ = pair
    assert transport.receive() is None
    assert transport.deadline is None


def test_P18_descriptors_arrive_with_their_message_and_close_on_exec(pair):
    transport, peer = pair
    send_with_fds(peer, KICK, 2)
    peer.sendall(encode(Request.GET_FEATURES))
    with transport.receive().fds as fds:
        assert len(fds) == 2
        assert all(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC for fd in (fds[0], fds[1]))
    message = transport.receive()
    assert message.request == Request.GET_FEATURES
    assert len(message.fds) == 0


def test_VU_MSG_B_03_several_messages_in_one_segment_keep_their_own_descriptors(pair):
    transport, peer = pair
    peer.sendall(encode(Request.SET_OWNER) + encode(Request.SET_VRING_NUM, b"12345678"))
    send_with_fds(peer, KICK + encode(Request.SET_VRING_BASE, b"abcdefgh"), 1)
    found = []
    for message in transport.turn():
        with message.fds:
            found.append((message.request, message.payload, len(message.fds)))
    assert found == [(3, b"", 0), (8, b"12345678", 0), (12, bytes(8), 1), (10, b"abcdefgh", 0)]


def test_P03_a_message_dribbled_byte_by_byte_is_put_together(pair):
    transport, peer = pair
    send_with_fds(peer, KICK[:1], 1)
    for byte in KICK[1:]:
        assert transport.receive() is None
        peer.sendall(bytes([byte]))
    with transport.receive().fds as fds:
        assert len(fds) == 1


def test_P01_half_a_message_has_a_deadline(pair, clock):
    transport, peer = pair
    send_with_fds(peer, KICK[:5], 1)
    assert transport.receive() is None
    assert transport.deadline == clock.now + MESSAGE_DEADLINE
    clock.now += MESSAGE_DEADLINE - 0.1
    transport.expire()
    peer.sendall(KICK[5:6])
    assert transport.receive() is None
    assert transport.deadline == clock.now + 0.1, "more of the message does not move its deadline"
    clock.now += 0.1
    with pytest.raises(Close, match="not complete after 5 s"):
        transport.expire()


def test_P01_a_peer_that_keeps_dribbling_is_closed_without_a_timer(pair, clock):
    transport, peer = pair
    peer.sendall(KICK[:5])
    assert transport.receive() is None
    clock.now += MESSAGE_DEADLINE
    peer.sendall(KICK[5:6])
    with pytest.raises(Close, match="not complete"):
        transport.receive()


def test_a_complete_message_has_no_deadline(pair):
    transport, peer = pair
    peer.sendall(KICK[:5])
    assert transport.receive() is None
    peer.sendall(KICK[5:])
    assert transport.receive() is not None
    assert transport.deadline is None


def test_the_end_between_messages_is_a_disconnection(pair):
    transport, peer = pair
    peer.sendall(KICK)
    peer.close()
    assert transport.receive() is not None
    with pytest.raises(Disconnected):
        transport.receive()


@pytest.mark.parametrize("at", [1, 11, 12, 15])
def test_P02_the_end_in_the_middle_of_a_message(pair, at):
    transport, peer = pair
    before = open_fds()
    send_with_fds(peer, KICK[:at], 1)
    peer.close()
    with pytest.raises(Close, match="in the middle of a message") as close:
        transport.receive()
    assert not isinstance(close.value, Disconnected)
    assert open_fds() == before - 1, "the peer's socket is gone, and so is the descriptor it sent"


def test_a_connection_reset_is_a_disconnection(pair):
    transport, peer = pair
    transport.send(KICK)  # unread at the peer's close: the kernel resets the connection
    peer.close()
    with pytest.raises(Disconnected):
        transport.receive()


@pytest.mark.parametrize("count", [9, 12, 253])
def test_P13_more_descriptors_than_any_message_has(pair, count):
    transport, peer = pair
    before = open_fds()
    send_with_fds(peer, KICK, count)
    with pytest.raises(Close, match="more than 8 file descriptors"):
        transport.receive()
    assert open_fds() == before


def test_P14_descriptors_on_the_payload(pair):
    transport, peer = pair
    before = open_fds()
    peer.sendall(KICK[:12])
    assert transport.receive() is None
    send_with_fds(peer, KICK[12:], 1)
    with pytest.raises(Close, match="in the middle of a message"):
        transport.receive()
    assert open_fds() == before


def test_P17_many_messages_with_descriptors_leave_none_behind(pair):
    transport, peer = pair
    before = open_fds()
    for _ in range(2000):
        send_with_fds(peer, KICK, 1)
        transport.receive().fds.close()
    assert open_fds() == before


def test_P19_descriptors_above_1023(pair):
    transport, peer = pair
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1200:
        pytest.skip(f"the hard limit on open files is {hard}, below the 1200 this needs")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
    fillers = []
    try:
        while not fillers or fillers[-1] < 1100:
            fillers.append(os.dup(peer.fileno()))
        ours, theirs = socket.socketpair()
        with theirs:
            high = Transport(ours)
            assert high.fileno() > 1023
            send_with_fds(theirs, KICK, 1)
            with high.receive().fds as fds:
                assert fds[0] > 1023
                high.send(KICK, [fds[0]])
            _fill(ours)
            with pytest.raises(Close, match="has not read its answers"):
                high.send(KICK)
            high.close()
    finally:
        for fd in fillers:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_P21_a_flood_is_read_a_bounded_part_at_a_time_and_in_order(pair):
    transport, peer = pair
    total = 3 * MESSAGES_PER_TURN + 1
    peer.sendall(b"".join(encode(Request.SET_VRING_NUM, struct.pack("=II", n, 1)) for n in range(total)))
    turns = []
    while transport_readable(transport):
        turns.append([struct.unpack("=II", message.payload)[0] for message in transport.turn()])
    assert [len(turn) for turn in turns] == [MESSAGES_PER_TURN] * 3 + [1]
    assert sum(turns, []) == list(range(total))


def transport_readable(transport: Transport) -> bool:
    return bool(select.select([transport], [], [], 0)[0])


def test_P21_a_message_is_read_only_when_the_one_before_was_dealt_with(pair):
    transport, peer = pair
    peer.sendall(KICK * 2)
    turn = transport.turn()
    next(turn)
    assert transport_readable(transport)
    turn.close()
    assert transport.receive() is not None


def _fill(sock: socket.socket) -> None:
    """Send until nothing more goes in."""
    for size in (4096, 1):
        try:
            while True:
                sock.send(bytes(size), socket.MSG_DONTWAIT)
        except BlockingIOError:
            continue


def test_a_peer_that_does_not_read_its_answers_is_closed():
    ours, theirs = socket.socketpair()
    transport = Transport(ours)
    with theirs:
        _fill(ours)
        with pytest.raises(Close, match="has not read its answers"):
            transport.send(KICK)
    transport.close()


def test_a_peer_that_reads_late_still_gets_its_answer_whole():
    ours, theirs = socket.socketpair()
    with theirs:
        transport = Transport(ours)
        _fill(ours)
        backlog = struct.unpack("i", fcntl.ioctl(theirs, termios.FIONREAD, bytes(4)))[0]
        received = bytearray()

        def read() -> None:
            while len(received) < backlog + len(KICK):
                received.extend(theirs.recv(65536))

        reader = threading.Thread(target=read)
        waiting = threading.Timer(0.02, reader.start)
        waiting.start()
        transport.send(KICK)
        waiting.join()
        reader.join()
        transport.close()
    assert received[-len(KICK):] == KICK


def test_sending_to_a_peer_that_is_gone(pair):
    transport, peer = pair
    peer.close()
    with pytest.raises(Disconnected):
        transport.send(KICK)


def test_descriptors_are_sent_on_the_first_byte(pair):
    transport, peer = pair
    fd = os.eventfd(0)
    transport.send(KICK, [fd, fd])
    data, fds, _, _ = socket.recv_fds(peer, 1, 8)
    assert data == KICK[:1]
    assert len(fds) == 2
    for number in (fd, *fds):
        os.close(number)


def test_descriptors_are_sent_once_even_if_the_bytes_go_in_several_parts():
    ours, theirs = socket.socketpair()
    fd = os.eventfd(0)
    data = bytes(1 << 20)
    received, descriptors = bytearray(), []

    def read() -> None:
        while len(received) < len(data):
            part, fds, _, _ = socket.recv_fds(theirs, 65536, 8)
            received.extend(part)
            descriptors.extend(fds)

    reader = threading.Thread(target=read)
    reader.start()
    transport = Transport(ours)
    transport.send(data, [fd])
    reader.join()
    transport.close()
    theirs.close()
    for number in (fd, *descriptors):
        os.close(number)
    assert len(descriptors) == 1


def test_close_may_be_repeated_and_drops_half_a_message(pair):
    transport, peer = pair
    before = open_fds()
    send_with_fds(peer, KICK[:3], 1)
    assert transport.receive() is None
    transport.close()
    transport.close()
    assert open_fds() == before - 1
    assert transport.fileno() == -1
    assert transport.deadline is None
