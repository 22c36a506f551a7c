"""vdev/notify.py: readiness, and sockets from a service manager."""

import os
import socket

import pytest

from vdev.errors import Failure, Misuse
from vdev.notify import check_ready_fd, passed_fds, tell_manager, write_ready_fd


@pytest.fixture
def manager(tmp_path, monkeypatch):
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(str(tmp_path / "notify"))
    sock.settimeout(5)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with sock:
        yield sock


def test_state_reaches_the_manager(manager):
    tell_manager("READY=1")
    assert manager.recv(100) == b"READY=1"


def test_abstract_notify_socket(monkeypatch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        name = f"vdev-test-{os.getpid()}"
        sock.bind("\0" + name)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name)
        tell_manager("STOPPING=1")
        assert sock.recv(100) == b"STOPPING=1"


@pytest.mark.parametrize("value", [None, "", "vsock:2:1234"])
def test_no_manager_or_one_we_cannot_reach_by_unix_socket(monkeypatch, value):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    if value is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", value)
    tell_manager("READY=1")


def test_manager_that_is_gone_is_an_error_of_the_system(monkeypatch, tmp_path):
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    with pytest.raises(OSError):
        tell_manager("READY=1")


def test_passed_sockets_are_those_of_this_very_process(monkeypatch):
    monkeypatch.setenv("LISTEN_FDS", "2")
    monkeypatch.setenv("LISTEN_FDNAMES", "a:b")
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    assert passed_fds() == [3, 4]
    assert not {"LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"} & os.environ.keys()


def test_sockets_passed_to_somebody_else_are_left_alone(monkeypatch):
    monkeypatch.setenv("LISTEN_FDS", "2")
    monkeypatch.setenv("LISTEN_PID", str(os.getpid() + 1))
    assert passed_fds() == []


def test_no_passed_sockets(monkeypatch):
    monkeypatch.delenv("LISTEN_FDS", raising=False)
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    with pytest.raises(Misuse, match="LISTEN_FDS= is not a number"):
        passed_fds()
    monkeypatch.delenv("LISTEN_PID", raising=False)
    assert passed_fds() == []


def test_ready_fd_is_written_and_closed():
    reading, writing = os.pipe()
    check_ready_fd(writing)
    write_ready_fd(writing)
    assert os.read(reading, 100) == b"READY\n"
    assert os.read(reading, 100) == b""
    os.close(reading)


def test_ready_fd_whose_reader_left():
    reading, writing = os.pipe()
    os.close(reading)
    write_ready_fd(writing)
    with pytest.raises(OSError):
        os.fstat(writing)


def test_ready_fd_that_cannot_be_written():
    reading, writing = os.pipe()
    with pytest.raises(Failure, match="open for reading only; pass the writing end"):
        check_ready_fd(reading)
    os.close(reading)
    os.close(writing)
    with pytest.raises(Failure, match=f"--ready-fd {writing}: descriptor {writing} is not open"):
        check_ready_fd(writing)
