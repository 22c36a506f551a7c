"""vdev/sources.py: where connections come from. Sockets and loop are real, whoever gets the connections is not."""

import errno
import os
import resource
import socket
import time

import pytest

from vdev import sources
from vdev.listen import Listener
from vdev.loop import Loop
from vdev.sources import Accepting, Connecting


class Reasons:
    """An event log that keeps why it was written to."""

    def __init__(self):
        self.said = []

    def peer(self, level, event, text, *, reason, **fields):
        self.said.append((event, reason))


def fail(exception):
    raise exception


@pytest.fixture
def loop():
    loop = Loop(fail)
    yield loop
    loop.close()


@pytest.fixture
def log():
    return Reasons()


@pytest.fixture
def delivered():
    sockets = []
    yield sockets
    for sock in sockets:
        sock.close()


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "front-end.sock")


@pytest.fixture
def listening(path):
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(path)
    sock.listen()
    sock.setblocking(False)
    with sock:
        yield sock


@pytest.fixture
def no_descriptor_left():
    """Call it, and no descriptor can be opened until the end of the test."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    def take_away():
        lowest = os.dup(0)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))

    def give_back():
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    take_away.undo = give_back
    yield take_away
    give_back()


def run_until(loop, condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        timer = loop.call_later(0.005, lambda: None)
        loop._turn()
        timer.cancel()


# ------------------------------------------------------------------------------------- accepting


def test_connections_are_delivered_one_after_the_other(loop, log, delivered, listening, path):
    source = Accepting(Listener(listening), loop, log)
    source.open(delivered.append)
    clients = [socket.socket(socket.AF_UNIX) for _ in range(3)]
    for client in clients:
        client.connect(path)
    run_until(loop, lambda: len(delivered) == 3)
    source.close()
    for client in clients:
        client.close()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOBUFS, errno.EPERM])
def test_F12_whatever_accept_says_it_is_asked_again_later(loop, log, delivered, listening, path, monkeypatch, number):
    monkeypatch.setattr(sources, "ACCEPT_PAUSE", 0.05)
    listener = Listener(listening)
    attempts = []

    def accept():
        attempts.append(time.monotonic())
        if len(attempts) < 3:
            raise OSError(number, os.strerror(number))
        return Listener.accept(listener)

    listener.accept = accept
    source = Accepting(listener, loop, log)
    source.open(delivered.append)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        run_until(loop, lambda: delivered)
    assert len(attempts) == 3
    assert attempts[1] - attempts[0] >= 0.05
    assert log.said == [("accept-paused", os.strerror(number))] * 2
    source.close()


def test_source_closed_while_it_pauses_does_not_come_back(loop, log, delivered, listening, path, monkeypatch):
    monkeypatch.setattr(sources, "ACCEPT_PAUSE", 0.01)
    listener = Listener(listening)
    listener.accept = lambda: fail(OSError(errno.EMFILE, "Too many open files"))
    source = Accepting(listener, loop, log)
    source.open(delivered.append)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        run_until(loop, lambda: log.said)
        source.close()
        del listener.accept
        ended = time.monotonic() + 0.05
        run_until(loop, lambda: time.monotonic() > ended)
    assert not delivered


# ------------------------------------------------------------------------------------ connecting


def test_client_waits_for_the_front_end_and_connects_when_it_is_there(loop, log, delivered, path):
    source = Connecting(path, loop, log)
    source.open(delivered.append)
    started = time.monotonic()
    run_until(loop, lambda: time.monotonic() > started + 0.1)
    assert log.said == [("connect-waiting", "No such file or directory")]  # once, not for each attempt
    with socket.socket(socket.AF_UNIX) as front_end:
        front_end.bind(path)
        run_until(loop, lambda: len(log.said) == 2)
        front_end.listen()
        run_until(loop, lambda: delivered)
        assert not delivered[0].getblocking()
    assert log.said[1] == ("connect-waiting", "Connection refused")
    source.close()


def test_client_that_is_closed_stops_trying(loop, log, delivered, path):
    source = Connecting(path, loop, log)
    source.open(delivered.append)
    source.close()
    with socket.socket(socket.AF_UNIX) as front_end:
        front_end.bind(path)
        front_end.listen()
        ended = time.monotonic() + 0.05
        run_until(loop, lambda: time.monotonic() > ended)
    assert not delivered


@pytest.fixture
def delays(loop, monkeypatch):
    """The delays a source asks for, none of which passes."""
    asked = []
    monkeypatch.setattr(loop, "call_later", lambda delay, callback: asked.append(delay))
    return asked


def test_client_backs_off_to_a_second(loop, log, path, delays):
    source = Connecting(path, loop, log)
    source.open(fail)
    for _ in range(15):
        source._connect()
    assert delays[0] == sources.RETRY_FIRST
    assert all(later == min(2 * earlier, sources.RETRY_LAST)
               for earlier, later in zip(delays, delays[1:], strict=False))
    assert delays[-1] == sources.RETRY_LAST


@pytest.mark.parametrize("lasted, next_delay", [(sources.SETTLED, sources.RETRY_FIRST),
                                                (0.0, 4 * sources.RETRY_FIRST)])
def test_client_hurries_back_only_after_a_session_that_lasted(loop, log, delivered, path, delays, monkeypatch,
                                                              lasted, next_delay):
    now = [100.0]
    monkeypatch.setattr(sources.time, "monotonic", lambda: now[0])
    source = Connecting(path, loop, log)
    source.open(delivered.append)
    source._connect()
    with socket.socket(socket.AF_UNIX) as front_end:
        front_end.bind(path)
        front_end.listen()
        source._connect()
    assert delivered
    now[0] += lasted
    source.vacant()
    assert delays[-1] == next_delay


def test_F12_client_without_a_descriptor_left_tries_again(loop, log, delivered, listening, path, no_descriptor_left):
    source = Connecting(path, loop, log)
    no_descriptor_left()
    source.open(delivered.append)
    assert log.said == [("connect-waiting", "Too many open files")]
    no_descriptor_left.undo()
    run_until(loop, lambda: delivered)
    source.close()
