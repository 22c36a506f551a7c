"""Ports made of sockets, without a responder behind them: loopback and null, and choosing a port."""

import os
import resource
import select

import pytest

from vdev.net.features import OFFLOADS
from vdev.ports import PortError, open_port
from vdev.ports.base import Ends
from vdev.ports.sockets import MESSAGE_MAX
from vdev.ports.spec import LoopbackSpec, NullSpec, ResponderSpec, parse_port


@pytest.fixture
def loopback():
    port = open_port(LoopbackSpec(), 2)
    yield port
    port.close()


def _open_descriptors():
    return len(os.listdir("/proc/self/fd"))


def test_each_frame_comes_back_on_its_own_pair(loopback):
    assert loopback.carries.header == 12 and loopback.carries.offloads == OFFLOADS
    assert loopback.carries.queue_pairs == 2
    for pair in 0, 1:
        os.write(loopback.ends(pair).to_port, b"header 12 by" + b"frame %d" % pair)
    for pair in 1, 0:
        assert os.read(loopback.ends(pair).from_port, MESSAGE_MAX) == b"header 12 by" + b"frame %d" % pair


def test_the_longest_frame_fits_several_times(loopback):
    ends = loopback.ends(0)
    message = os.urandom(MESSAGE_MAX)
    for _ in range(3):
        assert os.write(ends.to_port, message) == len(message)
    for _ in range(3):
        assert os.read(ends.from_port, MESSAGE_MAX + 1) == message


def test_a_full_loopback_says_so_and_recovers(loopback):
    ends = loopback.ends(0)
    sent = 0
    with pytest.raises(BlockingIOError):
        while True:
            os.write(ends.to_port, b"x" * 1000)
            sent += 1
    for _ in range(sent):
        os.read(ends.from_port, 2000)
    assert os.write(ends.to_port, b"x" * 1000) == 1000


def test_a_port_without_a_guest_forgets_what_waited(loopback):
    """Pair 0 stays enabled when a front-end leaves, and the next one's guest is another."""
    for pair in 0, 1:
        os.write(loopback.ends(pair).to_port, b"stale")
    loopback.set_offloads(0)
    for pair in 0, 1:
        with pytest.raises(BlockingIOError):
            os.read(loopback.ends(pair).from_port, 100)
    os.write(loopback.ends(0).to_port, b"fresh")
    loopback.set_offloads(OFFLOADS)
    assert os.read(loopback.ends(0).from_port, 100) == b"fresh"


def test_a_disabled_pair_forgets_what_waited(loopback):
    for pair in 0, 1:
        os.write(loopback.ends(pair).to_port, b"stale")
    loopback.enable(0, False)
    loopback.enable(0, True)
    os.write(loopback.ends(0).to_port, b"fresh")
    assert os.read(loopback.ends(0).from_port, 100) == b"fresh"
    assert os.read(loopback.ends(1).from_port, 100) == b"stale"


def test_null_has_no_ends():
    port = open_port(NullSpec(), 3)
    assert port.ends(2) == Ends(-1, -1)
    assert port.carries.queue_pairs == 3 and port.watches() == []


@pytest.mark.parametrize("text", ["loopback:", "null:", "responder:10.1.2.1/24"])
def test_ports_say_what_they_are_and_leave_nothing_open(text):
    before = _open_descriptors()
    port = open_port(parse_port(text), 4)
    assert str(port) == text
    port.close()
    port.close()
    assert _open_descriptors() == before


@pytest.mark.parametrize("spec", [LoopbackSpec(), ResponderSpec()])
def test_running_out_of_descriptors_is_one_line_and_leaks_none(spec):
    before = _open_descriptors()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 4, hard))
    try:
        with pytest.raises(PortError, match="too many open files.*ulimit -n"):
            open_port(spec, 200)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert _open_descriptors() == before


def test_nothing_is_readable_at_start(loopback):
    assert select.select([loopback.ends(0).from_port], [], [], 0)[0] == []
