"""vdev/service.py: a device and its sessions. The device is a fake that records; sockets, loop and listeners
are real."""

import contextlib
import json
import logging
import os
import resource
import select
import socket
import time
from types import SimpleNamespace

import pytest

from vdev import logs, sources
from vdev.listen import Publication
from vdev.logs import EventLog
from vdev.loop import Loop
from vdev.service import Service
from vdev.sources import Accepting, Inherited
from vhost_user.errors import Close, Disconnected


class FakeConnection:
    """Echoes lines; certain lines make it misbehave."""

    def __init__(self, sock, device):
        self.sock = sock
        self.device = device
        self.deadline = None

    def on_readable(self):
        data = self.sock.recv(100)
        if not data:
            raise Disconnected("the peer closed the connection")
        if data == b"lie":
            raise Close("rule broken")
        if data == b"bug":
            raise KeyError("unforeseen")
        if data == b"half":
            self.deadline = time.monotonic() + 0.05
        elif data == b"rest":
            self.deadline = None
        elif data == b"quiet":
            return
        self.device.frames += 1
        try:
            self.sock.send(data)
        except BrokenPipeError:
            raise Disconnected("the peer closed the connection") from None

    def on_deadline(self):
        raise Close("half a message")

    def close(self):
        # what a front-end sees: the socket must still be open while the device is being released
        self.device.events.append(("close", self.sock.fileno() >= 0))
        self.device.open_connections -= 1
        if self.device.close_fails:
            raise RuntimeError("cannot let go")
        self.sock.close()


class FakeDevice:
    def __init__(self):
        self.events = []
        self.frames = 0
        self.open_connections = 0
        self.open_fails = False
        self.close_fails = False
        self.news = os.eventfd(0)
        self.on_news = lambda: None

    def open_session(self, sock):
        if self.open_fails:
            raise MemoryError("no room")
        self.open_connections += 1
        assert self.open_connections == 1, "two sessions at once"
        return FakeConnection(sock, self)

    def watches(self):
        return [(self.news, self._news)]

    def _news(self):
        os.eventfd_read(self.news)
        self.on_news()

    def stats(self):
        flow = SimpleNamespace(frames=self.frames, bytes=10 * self.frames, gso_frames=0, kicks=0, calls=0, cycles=0,
                               bursts=0, dropped={})
        return flow, flow


class Bench:
    """A loop that is driven by the test, and the log as JSON."""

    def __init__(self, tmp_path):
        self.path = str(tmp_path / "vdev.sock")
        self.device = FakeDevice()
        self.log = EventLog("net0")
        self.loop = Loop(self.failed)
        self.finished = 0
        self.services = []
        self.closing = []
        self._log_reading, self._log_writing = os.pipe()
        os.set_blocking(self._log_reading, False)
        self._lines = b""
        logs.setup("debug", "json", self._log_writing)

    def failed(self, exception):
        raise exception

    def serve(self, source, one_off=False, device=None):
        service = Service(self.loop, device or self.device, source, self.log, one_off, self.finish)
        service.open()
        self.services.append(service)
        return service

    def listen(self, **options):
        publication = Publication(self.path)
        listener = publication.publish()
        publication.close()
        self.closing.append(listener)
        return self.serve(Accepting(listener, self.loop, self.log), **options)

    def connect(self, path=None):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(path or self.path)
        sock.settimeout(5)
        self.closing.append(sock)
        return sock

    def finish(self):
        self.finished += 1

    def turn(self, until=None, seconds=5.0):
        """Run the loop until ``until()`` holds, or for a few empty turns."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            timer = self.loop.call_later(0.01 if until else 0.001, lambda: None)
            self.loop._turn()
            timer.cancel()
            if until is None:
                deadline = min(deadline, time.monotonic() + 0.02)
                until = None
            elif until():
                return
        assert until is None, "did not happen in time"

    def ask(self, sock, data=b"hello"):
        sock.send(data)
        self.turn(lambda: select.select([sock], [], [], 0)[0])
        assert sock.recv(100) == data

    def events(self):
        """(event, line) of all log lines so far, tracebacks left out."""
        with contextlib.suppress(BlockingIOError):
            self._lines += os.read(self._log_reading, 1 << 20)
        lines = [json.loads(line) for line in self._lines.splitlines()]
        return [(line["event"], line) for line in lines if line["event"] != "traceback"]

    def names(self):
        return [name for name, _ in self.events()]

    def close(self):
        for service in self.services:
            service.close()
        for one in self.closing:
            one.close()
        self.loop.close()
        os.close(self._log_reading)
        os.close(self._log_writing)
        os.close(self.device.news)


@pytest.fixture
def bench(tmp_path):
    logger = logging.getLogger("vdev")
    before = logger.handlers[:], logger.level, logger.propagate
    bench = Bench(tmp_path)
    yield bench
    bench.close()
    logger.handlers[:], logger.level, logger.propagate = before


def gone(sock):
    """Did the other side close?"""
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


# -------------------------------------------------------------------------------------- sessions


def test_session_is_served_logged_and_followed_by_another(bench):
    bench.listen()
    for _ in range(2):
        client = bench.connect()
        bench.ask(client)
        bench.ask(client)
        client.close()
        bench.turn(lambda: not bench.device.open_connections)
    assert bench.names() == ["connect", "session-end"] * 2
    _, connect = bench.events()[0]
    assert connect["peer_pid"] == os.getpid()
    _, end = bench.events()[3]
    assert end["reason"] == "the peer closed the connection"
    assert end["from_guest"]["frames"] == 2  # of this session, not of the device
    assert end["level"] == "info"
    assert bench.finished == 0


def test_P22_second_client_is_refused_and_the_first_is_untouched(bench):
    bench.listen()
    first = bench.connect()
    bench.ask(first)
    second = bench.connect()
    bench.turn()
    assert gone(second)
    bench.ask(first)
    assert bench.names() == ["connect", "refused"]


def test_P22_second_client_after_the_first_was_refused_shares_nothing(bench):
    bench.listen()
    first = bench.connect()
    bench.ask(first)
    bench.connect().close()
    bench.turn()
    first.close()
    bench.turn(lambda: not bench.device.open_connections)
    bench.ask(bench.connect())


def test_P24_instant_reconnect_is_not_refused_for_its_own_ghost(bench):
    """Its last message is read in the same turn in which the new connection is accepted; its end is not yet."""
    bench.listen()
    client = bench.connect()
    for _ in range(50):
        bench.ask(client)
        client.send(b"quiet")
        client.close()
        client = bench.connect()
    bench.ask(client)
    assert "refused" not in bench.names()


def test_P24_device_is_released_before_the_socket_is_closed(bench):
    bench.listen()
    bench.ask(bench.connect())
    bench.services[0].close()
    assert bench.device.events == [("close", True)]


def test_probe_is_no_session(bench):
    bench.listen(one_off=True)
    bench.connect().close()
    bench.turn(lambda: bench.device.events)
    assert [(name, line["level"]) for name, line in bench.events()] == [("probe", "debug")]
    assert bench.finished == 0
    bench.ask(bench.connect())


def test_one_off_ends_after_the_first_session(bench):
    bench.listen(one_off=True)
    client = bench.connect()
    bench.ask(client)
    client.close()
    bench.turn(lambda: bench.finished)
    late = bench.connect()
    bench.turn()
    assert gone(late)
    assert bench.finished == 1
    assert bench.names() == ["connect", "session-end"]


def test_one_off_ends_although_the_next_front_end_is_waiting(bench):
    bench.listen(one_off=True)
    client = bench.connect()
    bench.ask(client)
    client.close()
    late = bench.connect()
    bench.turn(lambda: bench.finished)
    bench.turn()
    assert gone(late)
    assert bench.finished == 1


def test_broken_rule_closes_the_connection_with_one_warning(bench):
    bench.listen()
    client = bench.connect()
    client.send(b"lie")
    bench.turn(lambda: bench.device.events)
    assert gone(client)
    _, end = bench.events()[-1]
    assert (end["event"], end["level"], end["reason"]) == ("session-end", "warning", "rule broken")
    bench.ask(bench.connect())


def test_P01_half_a_message_has_a_deadline(bench):
    bench.listen()
    client = bench.connect()
    bench.ask(client, b"half")
    bench.turn(lambda: bench.device.events)
    assert gone(client)
    assert bench.events()[-1][1]["reason"] == "half a message"


def test_deadline_that_was_met_is_forgotten(bench):
    bench.listen()
    client = bench.connect()
    bench.ask(client, b"half")
    bench.ask(client, b"rest")
    bench.turn(seconds=0.1)
    time.sleep(0.06)
    bench.turn()
    bench.ask(client)


def test_F38_exception_nobody_foresaw_ends_the_session_only(bench):
    bench.listen()
    client = bench.connect()
    client.send(b"bug")
    bench.turn(lambda: bench.device.events)
    assert gone(client)
    assert bench.names() == ["connect", "session-failed", "session-end"]
    assert "KeyError" in bench.events()[1][1]["text"]
    bench.ask(bench.connect())


def test_F38_exception_while_closing_still_closes_the_socket(bench):
    bench.listen()
    bench.device.close_fails = True
    client = bench.connect()
    client.send(b"lie")
    bench.turn(lambda: bench.device.events)
    assert gone(client)
    assert "session-failed" in bench.names()
    bench.device.close_fails = False
    bench.ask(bench.connect())


def test_F38_exception_while_opening_closes_the_connection(bench):
    bench.listen()
    bench.device.open_fails = True
    client = bench.connect()
    bench.turn(lambda: "session-failed" in bench.names())
    assert gone(client)
    bench.device.open_fails = False
    bench.ask(bench.connect())


def test_device_may_end_the_session(bench):
    def memory_gone():
        raise Close("guest memory vanished")

    bench.listen()
    client = bench.connect()
    bench.ask(client)
    bench.device.on_news = memory_gone
    os.eventfd_write(bench.device.news, 1)
    bench.turn(lambda: bench.device.events)
    assert gone(client)
    assert bench.events()[-1][1]["reason"] == "guest memory vanished"


def test_news_of_the_device_may_set_a_deadline(bench):
    def begin():
        connection.deadline = time.monotonic() + 0.02

    bench.listen()
    client = bench.connect()
    bench.ask(client)
    connection = bench.services[0]._session.connection
    bench.device.on_news = begin
    os.eventfd_write(bench.device.news, 1)
    bench.turn(lambda: bench.device.events)
    assert bench.events()[-1][1]["reason"] == "half a message"


def test_device_whose_descriptor_changed_is_watched_anew(bench):
    bench.listen()
    client = bench.connect()
    bench.ask(client)
    old, bench.device.news = bench.device.news, os.eventfd(0)
    client.close()
    bench.turn(lambda: bench.device.events)
    seen = []
    bench.device.on_news = lambda: seen.append(1)
    os.eventfd_write(bench.device.news, 1)
    bench.turn(lambda: seen)
    os.close(old)


def test_trouble_of_one_device_does_not_reach_another(bench, tmp_path):
    bench.listen()
    other = FakeDevice()
    other_path, bench.path = bench.path, str(tmp_path / "other.sock")
    bench.listen(device=other)
    theirs, ours = bench.connect(), bench.connect(other_path)
    bench.ask(ours)
    theirs.send(b"bug")
    bench.turn(lambda: other.events)
    assert gone(theirs)
    bench.ask(ours)
    os.close(other.news)


# --------------------------------------------------------------------------------------- sources


def test_F12_no_descriptor_left_pauses_accepting_and_serves_on(bench, monkeypatch):
    monkeypatch.setattr(sources, "ACCEPT_PAUSE", 0.1)
    bench.listen()
    first = bench.connect()
    bench.ask(first)
    waiting = bench.connect()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
    try:
        bench.turn(lambda: bench.loop._timers)
        started = time.process_time()
        bench.turn(seconds=0.05)
        bench.ask(first)
        bench.turn(lambda: bench.names().count("accept-paused") >= 2)
        assert time.process_time() - started < 0.1  # waits, does not spin
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    first.close()
    bench.turn(lambda: not bench.device.open_connections)
    bench.turn(lambda: bench.device.open_connections)
    bench.ask(waiting)


def test_inherited_connection_is_the_only_session(bench):
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    bench.closing.append(theirs)
    theirs.settimeout(5)
    bench.serve(Inherited(ours))
    bench.ask(theirs)
    theirs.close()
    bench.turn(lambda: bench.finished)
    assert bench.finished == 1
