"""vdev/handover.py: messages with descriptors between two processes, whole or not at all."""

import json
import os
import socket
import struct
import threading
from types import SimpleNamespace

import pytest

from vdev.errors import Failure
from vdev.handover import FORMAT, Channel, Gone, HandoverError, Parcel
from vdev.takeover import Takeover
from vdev.upgrade import Upgrades


@pytest.fixture
def pair():
    ends = [Channel(sock) for sock in socket.socketpair()]
    for end in ends:
        end.budget(10)
    yield ends
    for end in ends:
        end.close()


def open_fds():
    return len(os.listdir("/proc/self/fd"))


def test_message_with_more_descriptors_than_one_system_call_takes(pair):
    parcel = Parcel()
    fds = [os.eventfd(number) for number in range(600)]
    numbers = [parcel.put(fd) for fd in fds]
    assert (numbers, parcel.put(-1)) == (list(range(600)), -1)
    sender = threading.Thread(target=lambda: pair[0].send("state", parcel.fds, text="x" * 500_000))
    sender.start()
    message, received = pair[1].expect("state")
    sender.join()
    assert message["text"] == "x" * 500_000
    for number in (599, 0, 255):
        fd = received.take(number)
        assert number == 0 or os.eventfd_read(fd) == number
        os.close(fd)
    with pytest.raises(ValueError, match="descriptor 0 is not there"):
        received.take(0)
    with pytest.raises(ValueError, match="descriptor 600 is not there"):
        received.take(600)
    assert received.take(-1) == -1
    before = open_fds()
    received.close()
    assert open_fds() == before - 597
    for fd in fds:
        os.close(fd)


def raw(text, fds=0):
    return struct.pack("<II", len(text), fds) + text


@pytest.mark.parametrize("data, said", [
    (raw(b"{"), "no message of a vdev"),
    (raw(b"[]"), "no message of a vdev"),
    (raw(b"[" * 100_000), "no message of a vdev"),
    (raw(b'{"say": 1}'), "no message of a vdev"),
    (raw(b"\xff\xfe"), "no message of a vdev"),
    (struct.pack("<II", 1 << 31, 0), "no message of a vdev"),
    (raw(json.dumps({"say": "hello", "vdev-upgrade": FORMAT + 1}).encode()), f"speaks format {FORMAT + 1}"),
    (raw(b"{}", 1) + b"\0", "descriptors got lost on the way"),
    (raw(json.dumps({"say": "failed", "vdev-upgrade": FORMAT, "why": "it rains"}).encode()), "it rains"),
    (raw(json.dumps({"say": "bye", "vdev-upgrade": FORMAT}).encode()), "said 'bye' where 'ready' was due"),
    (b"\0\0", "has gone"),
    (b"", "has gone"),
])
def test_what_is_no_message(pair, data, said):
    pair[0]._sock.sendall(data)
    pair[0].hang_up()
    with pytest.raises(HandoverError, match=said):
        pair[1].expect("ready")


def test_message_that_does_not_come_and_then_does(pair):
    pair[1].budget(0.01)
    pair[0]._sock.sendall(raw(json.dumps({"say": "ready", "vdev-upgrade": FORMAT}).encode())[:10])
    with pytest.raises(HandoverError, match="does not answer in time"):
        pair[1].receive()
    pair[0]._sock.sendall(raw(json.dumps({"say": "ready", "vdev-upgrade": FORMAT}).encode())[10:])
    pair[1].budget(10)
    assert pair[1].expect("ready")[0]["say"] == "ready"


def test_peer_that_does_not_read(pair):
    pair[0].budget(0.05)
    with pytest.raises(HandoverError, match="does not read"):
        pair[0].send("state", text="x" * (1 << 24))


# ------------------------------------------------------------------------- both agree on who runs


def running(channel):
    """The running side, as far as _await_ready goes."""
    return SimpleNamespace(_channel=channel)


def successor(channel):
    """The successor, as far as commit goes."""
    made = Takeover.__new__(Takeover)
    made._config, made._channel = SimpleNamespace(upgrade_from="/run/upgrade"), channel
    return made


def test_ready_in_time(pair):
    successor(pair[1]).commit()
    Upgrades._await_ready(running(pair[0]))


def test_ready_that_came_when_nobody_waited_any_more_counts(pair):
    successor(pair[1]).commit()
    pair[0].budget(-1)
    Upgrades._await_ready(running(pair[0]))


def test_successor_that_is_too_late_does_not_run(pair):
    pair[0].budget(-1)
    with pytest.raises(HandoverError, match="does not answer in time"):
        Upgrades._await_ready(running(pair[0]))
    with pytest.raises(Failure, match="--upgrade-from /run/upgrade: not taken over: it waited too long"):
        successor(pair[1]).commit()


def test_successor_of_one_that_died_with_the_state_on_its_way_runs(pair):
    pair[0].close()
    successor(pair[1]).commit()


@pytest.mark.parametrize("round_", range(30))
def test_race_has_one_winner(pair, round_):
    """The running side gives up while the successor says that it is ready."""
    outcome = {}

    def other():
        try:
            successor(pair[1]).commit()
            outcome["new"] = True
        except Failure:
            outcome["new"] = False

    thread = threading.Thread(target=other)
    pair[0].budget(0.0002)
    thread.start()
    try:
        Upgrades._await_ready(running(pair[0]))
        outcome["old"] = False
    except HandoverError:
        outcome["old"] = True
    thread.join()
    assert outcome["old"] != outcome["new"]


def test_connection_that_ends_is_told_from_one_that_is_late(pair):
    pair[0].close()
    with pytest.raises(Gone):
        pair[1].receive()
