"""vdev/logs.py: a line an event, in two formats, that neither blocks nor floods."""

import fcntl
import json
import logging
import os
import socket

import pytest

from vdev import logs
from vdev.logs import EventLog


@pytest.fixture(autouse=True)
def restored_logger():
    logger = logging.getLogger("vdev")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture
def pipe():
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    yield reading, writing
    os.close(reading)
    os.close(writing)


def lines(fd: int) -> list[str]:
    """What was written to a pipe so far."""
    data = b""
    while True:
        try:
            part = os.read(fd, 1 << 20)
        except BlockingIOError:
            break
        if not part:
            break
        data += part
    return data.decode().splitlines()


def test_text_line_names_program_device_and_event(pipe):
    logs.setup("info", "text", pipe[1])
    EventLog("net0").warning("connect", "something odd")
    (line,) = lines(pipe[0])
    assert line.endswith(" vdev: warning: net0: something odd")


def test_json_line_has_the_fields(pipe):
    logs.setup("info", "json", pipe[1])
    EventLog("net0").info("connect", "front-end connected", peer_pid=7)
    line = json.loads(lines(pipe[0])[0])
    assert line.pop("time").endswith("Z")
    assert line == {"level": "info", "event": "connect", "device": "net0", "text": "front-end connected",
                    "peer_pid": 7}


def test_level_hides_what_is_below(pipe):
    logs.setup("warning", "text", pipe[1])
    EventLog().info("a", "hidden")
    EventLog().error("b", "shown")
    assert [line.split("vdev: ")[1] for line in lines(pipe[0])] == ["error: shown"]


def test_control_characters_cannot_make_a_second_line(pipe):
    logs.setup("info", "text", pipe[1])
    EventLog("net0").info("a", "one\nnet0: forged\x1b[2J")
    (line,) = lines(pipe[0])
    assert r"one\nnet0: forged\x1b[2J" in line


def test_under_the_journal_a_line_has_a_level_instead_of_a_time(pipe, monkeypatch):
    status = os.fstat(pipe[1])
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
    logs.setup("info", "text", pipe[1])
    EventLog("net0").info("a", "fine")
    assert lines(pipe[0]) == ["<6>net0: fine"]


def test_traceback_only_at_debug_level(pipe):
    for level, shown in (("info", False), ("debug", True)):
        logs.setup(level, "text", pipe[1])
        try:
            raise ZeroDivisionError("by zero")
        except ZeroDivisionError as exception:
            EventLog("net0").bug("session-failed", "testing", exception)
        text = "\n".join(lines(pipe[0]))
        assert "internal error while testing: ZeroDivisionError: by zero; this is a bug in vdev" in text
        assert ("Traceback" in text) == shown


def test_P25_peer_lines_are_held_to_a_burst_and_the_rest_is_counted(pipe, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(logs.time, "monotonic", lambda: now[0])
    logs.setup("info", "text", pipe[1])
    log = EventLog("net0")
    for n in range(1000):
        log.peer(logging.WARNING, "nack", f"bad message {n}")
    assert len(lines(pipe[0])) == logs.PEER_BURST
    log.peer(logging.WARNING, "connect", "another kind of event is not held back")
    assert len(lines(pipe[0])) == 1
    now[0] += 1 / logs.PEER_PER_SECOND
    log.peer(logging.WARNING, "nack", "bad message")
    (line,) = lines(pipe[0])
    assert line.endswith(f"bad message ({1000 - logs.PEER_BURST} more like it were left out)")


def test_peer_lines_below_the_level_use_up_no_budget(pipe):
    logs.setup("info", "text", pipe[1])
    log = EventLog("net0")
    for _ in range(1000):
        log.peer(logging.DEBUG, "probe", "hidden")
    log.peer(logging.INFO, "probe", "shown")
    (line,) = lines(pipe[0])
    assert line.endswith("net0: shown")


def test_F34_full_pipe_does_not_block_and_the_loss_is_told(pipe):
    reading, writing = pipe
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    logs.setup("info", "text", writing)
    log = EventLog("net0")
    for n in range(200):  # far more than fits; would block for ever if writing waited
        log.info("fill", f"line {n} " + "x" * 100)
    before = lines(reading)
    log.info("after", "readable again")
    after = lines(reading)
    assert [line.partition("line ")[2].split()[0] for line in before] == [str(n) for n in range(len(before))]
    assert f"{200 - len(before)} log lines were lost" in after[0]
    assert after[1].endswith("net0: readable again")


def test_F34_the_inherited_description_stays_blocking(pipe):
    logs.setup("info", "text", pipe[1])
    EventLog().info("a", "line")
    assert os.get_blocking(pipe[1])


def test_F34_closed_reader_is_survived():
    reading, writing = os.pipe()
    logs.setup("info", "text", writing)
    EventLog().info("a", "read by somebody")
    os.close(reading)
    EventLog().info("b", "read by nobody")
    os.close(writing)


def test_F34_full_socket_does_not_block():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        logs.setup("info", "text", ours.fileno())
        log = EventLog("net0")
        for n in range(5000):
            log.info("fill", f"line {n} " + "x" * 1000)
        theirs.setblocking(False)
        received = 0
        while True:
            try:
                received += len(theirs.recv(1 << 20))
            except BlockingIOError:
                break
        assert 0 < received < 5000 * 1000
        log.info("after", "readable again")
        assert b"log lines were lost" in theirs.recv(1 << 20)


def test_F34_disk_full_is_survived():
    with open("/dev/full", "wb", buffering=0) as full:
        logs.setup("info", "text", full.fileno())
        EventLog().info("a", "no room for this")


def test_line_written_in_part_is_completed_before_the_next():
    written = bytearray()
    room = [25, 0, 10_000, 10_000]

    def write(data: bytes) -> int:
        fits = data[: room.pop(0)]
        if not fits:
            raise BlockingIOError
        written.extend(fits)
        return len(fits)

    handler = logs.NonBlockingHandler(2)
    handler._write = write
    handler.setFormatter(logs.TextFormatter(journal=True))
    for text in ("first line, longer than there is room", "second, lost", "third"):
        handler.emit(logging.makeLogRecord({"msg": text, "levelno": logging.INFO}))
    assert written.decode().splitlines() == [
        "<6>first line, longer than there is room",
        "<4>warning: 1 log lines were lost because the log could not be written",
        "<6>third"]


def test_overlong_line_is_cut(pipe):
    logs.setup("info", "text", pipe[1])
    EventLog().info("a", "y" * 10_000)
    (line,) = lines(pipe[0])
    assert len(line) < logs.LINE_MAX
    assert line.endswith("y ...")


def test_line_that_cannot_be_formatted_is_a_lost_line(pipe):
    logs.setup("info", "json", pipe[1])
    EventLog().info("a", "text", field=object())
    EventLog().info("b", "fine")
    assert [json.loads(line)["event"] for line in lines(pipe[0])] == ["log-lost", "b"]
