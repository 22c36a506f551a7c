"""Rows of docs/conformance/network.tsv: headers and frames that make no sense, from the driver and from the network.

Over a real socket: a device on a thread of the test, whose network the test holds, or a daemon with a TAP device in a
network namespace. Each device serves on after the test and leaves no descriptor, mapping or thread.
"""

import contextlib
import os
import re
import select
import socket
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest

from vdev.net.features import Feature, mask
from vdev.ports.base import Ends
from vdev.testing.daemon import Daemon
from vdev.testing.faults import processor_seconds
from vdev.testing.headers import BASE, FRAME, FROM_GUEST, MAX_FRAME, MERGEABLE, OFFLOADS, REFUSED, TO_GUEST
from vdev.testing.isolated import isolated
from vdev.testing.kept import WAIT, arrives, assert_returned, holding
from vdev.testing.netdriver import GSO_TCPV4, GSO_UDP_L4, NEEDS_CSUM, NetHeader
from vdev.testing.process import ProcessDied
from vdev.testing.scripted import ScriptedGuest
from vdev.testing.served import ServedDevice, WirePort

pytestmark = pytest.mark.timeout(120)

GOOD = bytes(range(64))
TCP_GSO = NetHeader(NEEDS_CSUM, GSO_TCPV4, 54, 1448, 34, 16)
_ETH_P_ALL = 3
_SOL_PACKET, _PACKET_VNET_HDR = 263, 15


@contextlib.contextmanager
def device(open_port: Callable[[], WirePort] = WirePort) -> Iterator[ServedDevice]:
    """A device that leaves this process as it was."""
    before = holding(os.getpid())
    with ServedDevice(open_port()) as served:
        yield served
    assert_returned(os.getpid(), before)


def sent(served: ServedDevice) -> tuple[NetHeader, bytes]:
    """The next header and frame on the network's side. Raises AssertionError where none comes."""
    wire = served.port.wire[0]
    wire.settimeout(WAIT)
    try:
        message = wire.recv(1 << 17)
    except TimeoutError:
        raise AssertionError("no frame on the network's side") from None
    finally:
        wire.setblocking(False)
    return NetHeader.unpack(message), message[NetHeader.SIZE:]


def lost(served: ServedDevice) -> tuple[dict[str, int], dict[str, int]]:
    """Frames dropped by reason, from and to the guest."""
    from_guest, to_guest = served.device.stats()
    return dict(from_guest.dropped), dict(to_guest.dropped)


@pytest.mark.parametrize("header, features, outcome", FROM_GUEST)
def test_header_from_guest(header, features, outcome) -> None:
    with device() as served, ScriptedGuest(served.connect(), features=features, size=8) as guest:
        guest.driver.transmit(FRAME, header, cuts=(7, 12))
        guest.driver.transmit(GOOD)
        if outcome == REFUSED:
            assert sent(served)[1] == GOOD and lost(served) == ({REFUSED: 1}, {})
        else:
            assert sent(served) == (outcome, FRAME)
            assert sent(served)[1] == GOOD and lost(served) == ({}, {})
        assert guest.driver.reclaim_all(WAIT)


@pytest.mark.parametrize("header, features, outcome", TO_GUEST)
def test_N22_header_from_the_network(header, features, outcome) -> None:
    with device() as served, ScriptedGuest(served.connect(), features=features, size=8) as guest:
        served.port.wire[0].send(header.pack() + FRAME)
        served.port.wire[0].send(bytes(12) + GOOD)
        if outcome is None:
            assert arrives(guest.driver) == FRAME
        assert arrives(guest.driver) == GOOD
        assert lost(served) == ({}, {outcome: 1} if outcome else {})


def test_N12_N13_R42_sent_frames_of_impossible_length() -> None:
    with device() as served, ScriptedGuest(served.connect(), features=BASE) as guest:
        for length in (0, 1, 13, MAX_FRAME + 1, 200_000, 4 << 20):
            guest.driver.transmit(bytes(length))
            guest.driver.transmit(GOOD)
            assert sent(served)[1] == GOOD
            assert guest.driver.reclaim_all(WAIT)
        assert sum(lost(served)[0].values()) == 6
        for length in (14, MAX_FRAME):
            guest.driver.transmit(bytes(length))
            assert sent(served)[1] == bytes(length)


def test_N12_N20_N21_received_frames_of_impossible_length() -> None:
    """The longest comes whole through buffers of 1536 bytes, whatever length came before it."""
    with device() as served, ScriptedGuest(served.connect(), features=MERGEABLE) as guest:
        for length in (0, 1, 13, MAX_FRAME + 1, MAX_FRAME + 400):
            served.port.wire[0].send(bytes(12 + length))
            served.port.wire[0].send(bytes(12 + MAX_FRAME))
            assert arrives(guest.driver) == bytes(MAX_FRAME)
        assert lost(served) == ({}, {"bad_length": 5})


@pytest.mark.parametrize("length", [60, 1524, 1525, 5000, MAX_FRAME])
def test_N19_num_buffers_is_the_devices(length) -> None:
    """The driver (NetDriver) raises DeviceError where it does not fit the buffers that were used."""
    with device() as served, ScriptedGuest(served.connect(), features=MERGEABLE) as guest:
        for said in (0, 1, 0xFFFF):
            served.port.wire[0].send(NetHeader(num_buffers=said).pack() + bytes(length))
            received = guest.driver.receive_within(WAIT)
            assert received.frame == bytes(length)
            assert received.header.num_buffers == -(-(length + 12) // 1536)


def test_N23_segments_of_64_kib_from_the_network() -> None:
    features = MERGEABLE | mask(Feature.GUEST_CSUM, Feature.GUEST_TSO4)
    with device() as served, ScriptedGuest(served.connect(), features=features, size=256) as guest:
        frame = os.urandom(65_000)
        for _ in range(20):
            served.port.wire[0].send(TCP_GSO.pack() + frame)
            received = guest.driver.receive_within(WAIT)
            assert received.frame == frame and received.header.gso_type == GSO_TCPV4
        assert lost(served) == ({}, {})


def test_N24_flood_while_the_guest_has_no_buffers() -> None:
    with device() as served, ScriptedGuest(served.connect(), features=MERGEABLE, buffers=0) as guest:
        count = 0
        before = holding(os.getpid()).memory
        with contextlib.suppress(BlockingIOError):
            while True:
                served.port.wire[0].send(bytes(12) + count.to_bytes(4, "big") * 20)
                count += 1
        assert count > 64 and holding(os.getpid()).memory - before < 8 << 20
        guest.driver.fill()
        for number in range(count):
            assert arrives(guest.driver) == number.to_bytes(4, "big") * 20
        assert lost(served) == ({}, {})


class _OtherEnd(WirePort):
    """Frames go to ``fd`` instead."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd

    def ends(self, pair: int) -> Ends:
        return Ends(self._fd, super().ends(pair).from_port)


def test_N16_port_that_refuses_every_frame() -> None:
    with (select.epoll() as refuses, device(lambda: _OtherEnd(refuses.fileno())) as served,
          ScriptedGuest(served.connect(), features=BASE) as guest):
        for _ in range(20):
            guest.driver.transmit(FRAME)
        assert guest.driver.reclaim_all(WAIT)
        assert lost(served) == ({"port": 20}, {})
        served.port.wire[0].send(bytes(12) + GOOD)
        assert arrives(guest.driver) == GOOD


def test_N17_port_that_takes_half_a_frame() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with device(lambda: _OtherEnd(writer)) as served, ScriptedGuest(served.connect(), features=BASE) as guest:
        for _ in range(2):
            guest.driver.transmit(bytes(40_000))  # a pipe holds 65 536
        assert guest.driver.reclaim_all(WAIT)
        assert lost(served) == ({"port": 1}, {})
    os.close(reader)
    os.close(writer)


# ----------------------------------------------------------------------------------------- a daemon with a TAP device


class _OnTap:
    """A daemon on TAP v0 in the namespace of this process, its guest, and what the host sees of v0."""

    def __init__(self, folder, features: int, **options: object) -> None:
        with contextlib.ExitStack() as stack:
            path = str(folder / "device.sock")
            self.daemon = stack.enter_context(Daemon(["--socket-path", path, "--port", "tap:v0"]))
            with ScriptedGuest.connect(path, size=8):
                pass
            self.guest = stack.enter_context(ScriptedGuest.connect(path, features=features, **options))
            self.watch()
            self._stack = stack.pop_all()

    def watch(self) -> None:
        """Look at v0 from now on; after it was made anew, again."""
        self.host = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        self.host.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
        self.host.bind(("v0", _ETH_P_ALL))
        self.host.settimeout(WAIT)

    def passes(self) -> bool:
        """Does a frame that the guest sends arrive at the host?"""
        self.guest.driver.transmit(GOOD)
        deadline = time.monotonic() + WAIT
        with contextlib.suppress(TimeoutError):
            while time.monotonic() < deadline:
                if self.host.recv(1 << 17)[-len(GOOD):] == GOOD:
                    return True
        return False

    def dropped(self) -> dict[str, int]:
        """Frames of the guest that were lost in its session, by reason; the session ends."""
        self.guest.close()
        deadline = time.monotonic() + WAIT
        while len(ended := self.daemon.events("session-end")) < 2:
            assert time.monotonic() < deadline, self.daemon.child.log()
            time.sleep(0.01)
        return ended[-1]["from_guest"]["dropped"]

    def __enter__(self) -> "_OnTap":
        return self

    def __exit__(self, *exc) -> None:
        self.host.close()
        self._stack.__exit__(*exc)


def ip(*words: str) -> None:
    """Run ip."""
    subprocess.run(["ip", *words], check=True, timeout=30)


@isolated
def test_N04_N08_segments_that_do_not_fit_their_frame(tmp_path) -> None:
    """The kernel may take such a frame or not: the device does not read what is behind the header."""
    ethernet = bytes.fromhex("ffffffffffff 525400123456")
    tcp = ethernet + bytes.fromhex("0800 4500 0fa0 00000000 4006 0000 0a090002 0a090001") + bytes(4000)
    with _OnTap(tmp_path, OFFLOADS) as tap:
        for header, frame in ((NetHeader(0, GSO_TCPV4, 54, 1448), ethernet + bytes.fromhex("88b5") + bytes(4000)),
                              (TCP_GSO, ethernet + bytes.fromhex("88b5") + bytes(4000)),
                              (NetHeader(NEEDS_CSUM, GSO_UDP_L4, 42, 1448, 34, 6), tcp),
                              (TCP_GSO, tcp[:12] + bytes.fromhex("86dd") + tcp[14:])):
            tap.guest.driver.transmit(frame, header)
            assert tap.guest.driver.reclaim_all(WAIT)
            assert tap.passes()


@isolated
def test_F15_N15_link_down_and_up(tmp_path) -> None:
    with _OnTap(tmp_path, BASE) as tap:
        assert tap.passes()
        ip("link", "set", "v0", "down")
        for _ in range(20):
            tap.guest.driver.transmit(GOOD)
        assert tap.guest.driver.reclaim_all(WAIT)
        tap.host.close()
        ip("link", "set", "v0", "up")
        tap.watch()
        assert tap.passes()
        assert tap.dropped() == {"port": 20}


@isolated
def test_F14_N18_interface_is_deleted(tmp_path) -> None:
    with _OnTap(tmp_path, BASE) as tap:
        assert tap.passes()
        ip("link", "del", "v0")
        tap.guest.driver.transmit(GOOD)
        deadline = time.monotonic() + WAIT
        while not tap.daemon.events("port-back"):
            assert time.monotonic() < deadline, tap.daemon.child.log()
            time.sleep(0.01)
        tap.host.close()
        tap.watch()
        assert tap.passes()
        assert len(tap.daemon.events("port-gone")) == 1


@isolated
def test_F16_mtu_and_carrier_change(tmp_path) -> None:
    with _OnTap(tmp_path, BASE) as tap:
        for words in (("mtu", "9000"), ("mtu", "68"), ("mtu", "1500"), ("carrier", "off"), ("carrier", "on")):
            ip("link", "set", "v0", *words)
            if words[-1] == "off":
                tap.guest.driver.transmit(GOOD)
                assert tap.guest.driver.reclaim_all(WAIT)
            else:
                assert tap.passes()


@isolated
@pytest.mark.parametrize("seconds", [2, pytest.param(120, marks=[pytest.mark.long, pytest.mark.timeout(300)])])
def test_F21_flood_while_there_are_no_buffers(tmp_path, seconds) -> None:
    with _OnTap(tmp_path, MERGEABLE, buffers=0) as tap:
        pid = tap.daemon.child.pid
        frame = bytes(12) + bytes.fromhex("525400123456 020000000001 88b5") + bytes(50)
        for _ in range(2000):  # the queue of the interface is full, what else is to come came
            tap.host.send(frame[2:])
        before, used = holding(pid), processor_seconds(pid)
        count, deadline = 0, time.monotonic() + seconds
        while time.monotonic() < deadline:
            for _ in range(20):
                tap.host.send(frame[2:])
            count += 20
            time.sleep(0.001)
        assert count > 1000 and processor_seconds(pid) - used < 0.1 * seconds
        assert holding(pid).memory - before.memory < 1 << 20
        tap.guest.driver.fill()
        for _ in range(100):
            assert arrives(tap.guest.driver) is not None
        assert tap.passes()


@isolated
def test_N19_N23_segments_from_the_kernel(tmp_path) -> None:
    features = MERGEABLE | mask(Feature.GUEST_CSUM, Feature.GUEST_TSO4)
    length = 65_000
    frame = (bytes.fromhex("525400123456 020000000001 0800 4500") + (length - 14).to_bytes(2, "big")
             + bytes.fromhex("00000000 4006 0000 0a090001 0a090002 0001 0002 00000000 00000000 5010 ffff 0000 0000"))
    frame += bytes(length - len(frame))
    with _OnTap(tmp_path, features) as tap:
        tap.host.send(NetHeader(NEEDS_CSUM, GSO_TCPV4, 54, 1448, 34, 16).pack()[:10] + frame)
        deadline = time.monotonic() + WAIT
        while time.monotonic() < deadline:  # the host has things of its own to say to its neighbours
            received = tap.guest.driver.receive_within(WAIT)
            assert received is not None
            if received.frame[:6] == frame[:6]:
                break
        assert received.frame == frame and received.header.gso_type == GSO_TCPV4
        assert received.buffers == received.header.num_buffers > 40


@isolated
def test_N25_second_opener_of_a_single_queue(tmp_path) -> None:
    ip("tuntap", "add", "dev", "v0", "mode", "tap")
    with _OnTap(tmp_path, BASE) as tap:
        with pytest.raises(ProcessDied) as refused:
            Daemon(["--socket-path", str(tmp_path / "second.sock"), "--port", "tap:v0"])
        assert re.search(r"ended with status 1\n\S.*tap:v0: v0 is in use by another program; stop .*$",
                         str(refused.value))
        assert tap.passes()
