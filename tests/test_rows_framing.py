"""Rows P01 to P25 of docs/conformance/messages.tsv: what a hostile front-end does to messages and their descriptors.

Over a real socket, to a daemon that serves on after each test and holds no more than before (tests/conftest.py).
"""

import itertools
import os
import signal
import socket
import struct
import threading

import pytest

from vdev.testing.daemon import VISIBLE, Daemon
from vdev.testing.kept import FRAME, WAIT, KeptDaemon, Traced, arrives, ends, refused
from vdev.testing.process import ProcessDied
from vdev.testing.scripted import ScriptedGuest
from vhost_user.codec import encode
from vhost_user.errors import PeerError
from vhost_user.frontend import FrontEnd, NoAnswer
from vhost_user.requests import REQUESTS
from vhost_user.spec import NEED_REPLY_FLAG, PAYLOAD_MAX, REPLY_FLAG, VERSION, Request
from vhost_user.wire import (
    MEM_TABLE,
    SINGLE_REGION,
    U64,
    U64_LAYOUT,
    VRING_FD,
    MemTable,
    Region,
    VringFd,
)

pytestmark = pytest.mark.timeout(120)

CALL_0 = VRING_FD.encode(VringFd(0, True))
EIGHT = MEM_TABLE.encode(MemTable(tuple(Region(n << 12, 4096, n << 12, 0) for n in range(8))))
RING_FDS = (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR)
ANSWERED = (Request.GET_FEATURES, Request.GET_PROTOCOL_FEATURES, Request.GET_QUEUE_NUM, Request.GET_MAX_MEM_SLOTS)
CLOSE_ON_EXEC = 0o2000000  # in /proc/PID/fdinfo/N


def header(request: int = Request.GET_FEATURES, flags: int = VERSION, size: int = 0) -> bytes:
    """The twelve bytes that begin a message."""
    return struct.pack("=III", request, flags, size)


def test_P01_half_a_message_ends_at_its_deadline_and_rings_run_until_then(daemon) -> None:
    with ScriptedGuest.connect(daemon.path) as guest, Traced() as traced:
        guest.front_end.timeout = WAIT
        guest.front_end.send_raw(header()[:5], [traced.fd])
        for _ in range(3):
            assert guest.exchange(FRAME, WAIT) == FRAME
        assert guest.front_end.closed() and traced.closed()


def test_P02_the_end_in_the_middle_of_a_message(daemon) -> None:
    for sent in (5, 12, 15):
        with Traced() as traced:
            with daemon.connect() as front_end:
                front_end.send_raw(encode(Request.SET_VRING_CALL, CALL_0)[:sent], [traced.fd])
            assert traced.closed()


def test_P03_one_byte_at_a_time(daemon) -> None:
    with daemon.agreed() as front_end:
        message = encode(Request.SET_FEATURES, U64_LAYOUT.encode(U64(front_end.features)), need_reply=True)
        for position in range(len(message)):
            assert front_end.silent(0.001)
            front_end.send_raw(message[position:position + 1])
        assert U64_LAYOUT.decode(front_end.receive().payload).value == 0
        assert front_end.get_features()


def test_P04_impossible_payload_sizes(daemon) -> None:
    """Told by the header alone: nothing of the payload ever comes."""
    for size in (PAYLOAD_MAX + 1, 1 << 20, 0x7FFFFFFF, 0xFFFFFFFF):
        with daemon.connect() as front_end, Traced() as traced:
            front_end.timeout = 2  # less than what half a message may take
            assert ends(front_end, header(Request.SET_FEATURES, size=size), [traced.fd])
            assert traced.closed()


def test_P05_payloads_that_are_too_short(daemon) -> None:
    other_lengths(daemon, -8, -4, -1)
    with daemon.agreed() as front_end:
        for length in (0, 4, 7):
            assert refused(front_end, Request.SET_MEM_TABLE, bytes(length))


def test_P06_payloads_that_are_too_long(daemon) -> None:
    other_lengths(daemon, 1, 4, 8, 300)


def other_lengths(daemon: KeptDaemon, *offsets: int) -> None:
    """Every request of a fixed length that has an acknowledgement, with so many bytes more. What lies behind it is
    taken for another message if too few of them are read."""
    fixed = {kind: row.payload.size for kind, row in REQUESTS.items()
             if row.reply is None and hasattr(row.payload, "size")}
    with daemon.agreed() as front_end:
        for (kind, size), more in itertools.product(fixed.items(), offsets):
            if size + more >= 0:
                assert refused(front_end, kind, bytes(size + more)), f"{kind.name} with {size + more} bytes"


def test_P09_another_version(daemon) -> None:
    for flags in (0, 2, 3, NEED_REPLY_FLAG):
        with daemon.connect() as front_end, Traced() as traced:
            assert ends(front_end, header(Request.SET_VRING_CALL, flags, len(CALL_0)) + CALL_0, [traced.fd])
            assert traced.closed()


def test_P11_reply_flag_in_a_request(daemon) -> None:
    with daemon.connect() as front_end, Traced() as traced:
        message = header(Request.SET_VRING_CALL, VERSION | REPLY_FLAG, len(CALL_0)) + CALL_0
        assert ends(front_end, message, [traced.fd])
        assert traced.closed()


@pytest.mark.parametrize("count", [1, 8])
def test_P12_descriptors_on_a_request_that_takes_none(daemon, count) -> None:
    with Traced() as traced:
        for kind in (Request.SET_OWNER, Request.RESET_OWNER, Request.RESET_DEVICE):
            daemon.refuses(kind, fds=[traced.fd] * count)
        with daemon.connect() as front_end:
            assert ends(front_end, header(), [traced.fd] * count)
        assert traced.closed()


def test_P13_more_descriptors_than_any_message_has(daemon) -> None:
    for count in (9, 12, 253):
        with daemon.connect() as front_end, Traced() as traced:
            assert ends(front_end, header(Request.SET_OWNER), [traced.fd] * count)
            assert traced.closed()
    memory = os.memfd_create("regions")  # as many as may come, each of them good, and one more
    os.ftruncate(memory, 4096)
    with daemon.agreed() as front_end:
        assert ends(front_end, encode(Request.SET_MEM_TABLE, EIGHT, need_reply=True), [memory] * 9)
    os.close(memory)


def test_P14_descriptors_that_come_late(daemon) -> None:
    message = encode(Request.SET_VRING_CALL, CALL_0)
    for position in (1, 11, 12, 19):
        with daemon.agreed() as front_end, Traced() as first, Traced() as late:
            front_end.send_raw(message[:position], [first.fd])
            assert ends(front_end, message[position:], [late.fd])
            assert first.closed() and late.closed()


def test_P15_descriptors_that_did_not_come(daemon) -> None:
    region = SINGLE_REGION.encode(Region(0, 4096, 0, 0))
    table = MEM_TABLE.encode(MemTable((Region(0, 4096, 0, 0), Region(4096, 4096, 4096, 0))))
    with Traced() as traced:
        for kind in RING_FDS:
            daemon.refuses(kind, CALL_0)
        daemon.refuses(Request.SET_BACKEND_REQ_FD)
        daemon.refuses(Request.ADD_MEM_REG, region)
        for fds in ([], [traced.fd], [traced.fd] * 3):
            daemon.refuses(Request.SET_MEM_TABLE, table, fds)
        assert traced.closed()


def test_P16_descriptor_that_was_said_not_to_come(daemon) -> None:
    none = VRING_FD.encode(VringFd(1, False))
    with Traced() as traced:
        for kind in RING_FDS:
            daemon.refuses(kind, none, [traced.fd])
        assert traced.closed()
    with ScriptedGuest.connect(daemon.path) as guest:
        for setter in (guest.front_end.set_vring_call, guest.front_end.set_vring_err, guest.front_end.set_vring_kick):
            setter(1, None, need_reply=True)  # raises RequestRefused
        guest.driver.transmit(FRAME)
        assert arrives(guest.driver) == FRAME  # the transmitq is polled


@pytest.mark.parametrize("count", [3000, pytest.param(100_000, marks=pytest.mark.long)])
def test_P17_messages_with_a_descriptor_each(daemon, count) -> None:
    with Traced() as traced, daemon.agreed() as front_end:
        front_end.set_vring_call(0, traced.fd, need_reply=True)
        open_then = daemon.holding.fds
        for number in range(count):
            front_end.request(Request.SET_VRING_CALL, CALL_0, [traced.fd], need_reply=number % 16 == 15)
        assert front_end.get_features()
        assert daemon.holding.fds == open_then


def test_P18_every_descriptor_is_close_on_exec(daemon) -> None:
    with ScriptedGuest.connect(daemon.path) as guest:
        guest.front_end.set_vring_err(0, guest.driver.receiveq.call_fd, need_reply=True)
        folder = f"/proc/{daemon.pid}/fdinfo"
        inherited = []
        for fd in os.listdir(folder):
            with open(f"{folder}/{fd}") as about:
                flags = next(line.split()[1] for line in about if line.startswith("flags:"))
            if not int(flags, 8) & CLOSE_ON_EXEC:
                inherited.append(int(fd))
        assert sorted(inherited) == [0, 1, 2]


MANY_DESCRIPTORS = """
import os, resource, runpy
resource.setrlimit(resource.RLIMIT_NOFILE, (4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
while os.open(os.devnull, os.O_RDONLY) < 1100:
    pass
runpy.run_module("vdev", run_name="__main__")
"""


def test_P19_descriptors_above_1023(tmp_path) -> None:
    path = str(tmp_path / "device.sock")
    options = ["run", "--socket-path", path, "--port", "loopback:", *VISIBLE]
    try:
        with (Daemon(options, program=["-c", MANY_DESCRIPTORS]) as crowded,
              ScriptedGuest.connect(path) as guest):
            assert guest.exchange(FRAME, WAIT) == FRAME
            assert max(map(int, os.listdir(f"/proc/{crowded.child.pid}/fd"))) > 1100
    except (ProcessDied, OSError, PeerError) as died:
        raise AssertionError(str(died)) from None


def test_P21_thousands_of_messages_at_once_in_order(daemon) -> None:
    with daemon.agreed() as front_end:
        unanswered = encode(Request.SET_OWNER) * 20
        for _ in range(3):
            front_end.send_raw(b"".join(unanswered + encode(kind) for kind in ANSWERED) * 25)
            assert [front_end.receive().request for _ in range(100)] == [*ANSWERED] * 25


def test_P21_another_device_is_served_during_a_flood(daemon) -> None:
    """SET_OWNER has no answer, so that nothing but the bound of a turn holds the flood back."""
    done = threading.Event()

    def flood() -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(daemon.path)
            while not done.is_set():
                sock.sendall(encode(Request.SET_OWNER) * 3000)

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        with FrontEnd.connect(daemon.bystander, timeout=WAIT) as other:
            for _ in range(8):
                assert answered(other)
    finally:
        done.set()
        thread.join()


def answered(front_end: FrontEnd) -> bool:
    """Is a question answered?"""
    try:
        return bool(front_end.get_features())
    except (PeerError, NoAnswer):
        return False


def test_P22_second_front_end(daemon) -> None:
    with ScriptedGuest.connect(daemon.path) as guest:
        before = daemon.holding
        for _ in range(5):
            with daemon.connect() as second:
                assert ends(second, header())
            assert guest.exchange(FRAME, WAIT) == FRAME
        assert daemon.holding.fds == before.fds


def test_P24_front_end_that_comes_back_at_once(daemon) -> None:
    """Before it left it said more than is read in one turn: the new connection is seen before the end of the old."""
    for _ in range(10):
        with ScriptedGuest.connect(daemon.path, size=8) as guest:
            assert guest.exchange(FRAME, WAIT) == FRAME
            os.kill(daemon.pid, signal.SIGSTOP)
            try:
                guest.front_end.send_raw(encode(Request.SET_OWNER) * 1000)
                guest.front_end.close()
                again = daemon.connect()
            finally:
                os.kill(daemon.pid, signal.SIGCONT)
            with again:
                assert answered(again)


def test_P24_session_is_gone_when_its_socket_closes(daemon) -> None:
    for _ in range(5):
        with ScriptedGuest.connect(daemon.path, size=8) as guest:
            assert ends(guest.front_end, header(flags=0))
            now = daemon.holding
            assert (now.mappings, now.threads) == (0, daemon.baseline.threads)


def test_P25_flood_of_bad_messages_writes_few_lines(daemon) -> None:
    lines = daemon.daemon.child.log().count("\n")
    with daemon.agreed() as front_end:
        for _ in range(150):
            assert refused(front_end, Request.SET_VRING_CALL, b"")
    for _ in range(50):
        with daemon.connect() as front_end:
            assert ends(front_end, b"\xff" * 12)
    assert daemon.daemon.child.log().count("\n") - lines < 100
