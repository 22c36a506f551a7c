"""vdev/state_transfer.py: bytes through somebody else's pipe, without ever waiting for it."""

import fcntl
import os
import socket
import threading

import pytest

from vdev import state_transfer
from vdev.device_state import BYTES_MAX, StateError
from vdev.state_transfer import Transfer


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def filled(fd: int) -> int:
    """Fill the pipe behind ``fd`` -> bytes."""
    os.set_blocking(fd, False)
    total = 0
    try:
        while True:
            total += os.write(fd, bytes(4096))
    except BlockingIOError:
        os.set_blocking(fd, True)
        return total


def drained(fd: int) -> bytes:
    parts = []
    while part := os.read(fd, 1 << 16):
        parts.append(part)
    return b"".join(parts)


def test_VU_DST_B_02_a_state_is_written_and_the_pipe_closed() -> None:
    before = open_files()
    read_end, write_end = os.pipe()
    transfer = Transfer(write_end, b"state" * 1000)
    assert transfer.finished and transfer.failure is None and transfer.deadline is None
    assert drained(read_end) == b"state" * 1000
    os.close(read_end)
    assert open_files() == before


def test_VU_DST_B_01_a_state_is_read_to_its_end_and_given_on() -> None:
    got: list[bytes] = []
    read_end, write_end = os.pipe()
    transfer = Transfer(read_end, None, got.append)
    assert not transfer.finished and transfer.deadline is not None
    for part in (b"one ", b"two"):
        os.write(write_end, part)
        transfer.advance()
        assert not transfer.finished and got == []
    os.close(write_end)
    transfer.advance()
    assert transfer.finished and transfer.failure is None and got == [b"one two"]


def test_a_pipe_that_is_full_and_blocking_is_not_waited_for() -> None:
    read_end, write_end = os.pipe()
    fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 4096)
    full = filled(write_end)
    transfer = Transfer(write_end, b"x" * 20000)
    assert not transfer.finished  # and we are here
    received = b""
    while not transfer.finished:
        received += os.read(read_end, 1 << 16)
        transfer.advance()
    received += drained(read_end)
    assert transfer.failure is None and received[full:] == b"x" * 20000
    os.close(read_end)


def test_an_empty_blocking_pipe_is_not_waited_for() -> None:
    read_end, write_end = os.pipe()
    transfer = Transfer(read_end, None)
    for _ in range(10):
        transfer.advance()
    assert not transfer.finished
    transfer.close()
    os.close(write_end)


@pytest.mark.parametrize("saving", [False, True])
def test_a_front_end_that_does_not_get_done_is_given_up(monkeypatch, saving) -> None:
    monkeypatch.setattr(state_transfer, "TRANSFER_SECONDS", 0)
    before = open_files()
    read_end, write_end = os.pipe()
    filled(write_end) if saving else None
    transfer = Transfer(write_end, b"x") if saving else Transfer(read_end, None)
    assert transfer.finished and "it was not over after 0 s" in transfer.failure
    os.close(read_end if saving else write_end)
    assert open_files() == before


def test_nobody_reads() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    assert Transfer(write_end, b"x").failure == "the pipe failed: broken pipe"


def test_more_than_a_state_can_have_is_not_kept() -> None:
    read_end, write_end = os.pipe()
    os.write(write_end, bytes(BYTES_MAX + 1))
    transfer = Transfer(read_end, None)
    assert f"longer than {BYTES_MAX}" in transfer.failure and transfer.finished
    os.close(write_end)


def test_what_is_made_of_it_may_be_refused() -> None:
    def refuse(data: bytes) -> None:
        raise StateError(f"not {data!r}")

    read_end, write_end = os.pipe()
    os.write(write_end, b"this")
    os.close(write_end)
    assert Transfer(read_end, None, refuse).failure == "not b'this'"


@pytest.mark.parametrize("make", [lambda: os.eventfd(0), lambda: socket.socket().detach(),
                                  lambda: os.memfd_create("x"), lambda: os.open("/dev/null", os.O_RDWR)],
                         ids=["eventfd", "socket", "memfd", "null"])
def test_a_descriptor_that_is_no_pipe_is_refused_and_closed(make) -> None:
    before = open_files()
    with pytest.raises(StateError, match="is no pipe"):
        Transfer(make(), b"x")
    assert open_files() == before


def test_the_wrong_end_of_a_pipe_fails_in_order() -> None:
    read_end, write_end = os.pipe()
    assert "the pipe failed" in Transfer(read_end, b"x").failure
    assert "the pipe failed" in Transfer(write_end, None).failure


def test_a_reader_beside_it_gets_everything() -> None:
    read_end, write_end = os.pipe()
    fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 4096)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(drained(read_end)))
    reader.start()
    transfer = Transfer(write_end, os.urandom(1) * BYTES_MAX)
    while not transfer.finished:
        transfer.advance()
    reader.join(10)
    assert transfer.failure is None and len(got[0]) == BYTES_MAX
    os.close(read_end)
