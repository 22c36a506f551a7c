"""vdev/control_queue.py over time: what is forgotten by a reset and kept by a pause, and what travels with a guest."""

import contextlib
import os
import socket
import struct
import tempfile

import pytest

from vdev.net.features import Feature, mask
from vdev.testing.daemon import Daemon
from vdev.testing.full_guest import BROADCAST, GROUP, OTHER, OWN, PLAIN, FullGuest, frame, gets, served
from vdev.testing.served import ServedDevice
from vhost_user.spec import Direction

row = pytest.mark.row

F = Feature
OK, ERR = 0, 1
RX, MAC, ANNOUNCE = 0, 1, 3
FILTERS = PLAIN | mask(F.CTRL_RX, F.CTRL_RX_EXTRA, F.CTRL_MAC_ADDR, F.CTRL_VLAN, F.MAC)


def table(unicast: list[bytes], multicast: list[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(each)) + b"".join(each) for each in (unicast, multicast))


# ----------------------------------------------------------------------------------------- reset and going on


@row("NET-MAC-D-01", "NET-MQ-D-06")
def test_reset_forgets_what_the_driver_has_set() -> None:
    with served(1, FILTERS) as (device, guest):
        before = guest.config
        assert guest.command(MAC, 1, OWN) == (OK, b"")
        assert guest.command(RX, 0, b"\1") == (OK, b"")
        guest.reset()
        assert guest.config == before
        assert gets(device, guest, frame(OWN), frame(before[:6])) == [frame(before[:6])]


def test_guest_that_was_only_paused_keeps_what_it_has_set() -> None:
    with served(1, FILTERS) as (device, guest):
        assert guest.command(MAC, 1, OWN) == (OK, b"")
        guest.stop()
        guest.front_end.set_features(guest.features | mask(F.PROTOCOL_FEATURES))
        assert guest.config[:6] != OWN
        guest.start()
        assert guest.config[:6] == OWN
        assert gets(device, guest, frame(OWN), frame(OTHER)) == [frame(OWN)]


def test_driver_that_goes_on_with_another_vdev_gets_everything() -> None:
    with ServedDevice(personality="full") as first, FullGuest(first.connect(), features=FILTERS) as guest:
        assert guest.command(MAC, 1, OWN) == (OK, b"")
        with ServedDevice(personality="full") as second:
            guest.reconnect(second.connect())
            assert "not known" in second.wait_for("settings-unknown")
            assert gets(second, guest, frame(OTHER), frame(GROUP)) == [frame(OTHER), frame(GROUP)]


@row("NET-CFG-D-05")
def test_frames_longer_than_the_mtu_do_not_come() -> None:
    with served(1, PLAIN | mask(F.MTU)) as (device, guest):
        (mtu,) = struct.unpack_from("<H", guest.config, 10)
        longest = frame(BROADCAST, bytes(mtu))[:14 + mtu]
        assert gets(device, guest, longest, longest + b"\0") == [longest]


def test_guests_at_a_switch_filter_each_for_itself() -> None:
    """A device with a control queue may be at a switch, in place of a wire of its own."""
    with tempfile.TemporaryDirectory(prefix="vdev-") as folder:
        paths = [f"{folder}/{n}" for n in range(2)]
        devices = [f"--device=socket={path},port=switch:lan" for path in paths]
        with Daemon([*devices, "--personality", "full"]), contextlib.ExitStack() as stack:
            socks = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in paths]
            for sock, path in zip(socks, paths, strict=True):
                sock.connect(path)
            here, there = (stack.enter_context(FullGuest(sock, features=FILTERS)) for sock in socks)
            stranger = frame(OTHER[:5] + b"\3")  # a switch knows where OTHER is
            for one in (stranger, frame(GROUP), frame(there.config[:6]), frame(BROADCAST)):
                here.drivers[0].transmit(one)
            assert there.drivers[0].receive_within(5).frame == frame(there.config[:6])
            assert there.drivers[0].receive_within(5).frame == frame(BROADCAST)
            assert there.command(RX, 0, b"\1") == (OK, b"")
            here.drivers[0].transmit(stranger)
            assert there.drivers[0].receive_within(5).frame == stranger


# ------------------------------------------------------------------------------------------------- migration


def saved(guest: FullGuest) -> bytes:
    read, write = os.pipe()
    with os.fdopen(read, "rb") as file:
        guest.front_end.set_device_state_fd(Direction.SAVE, write)
        os.close(write)
        state = file.read()
    assert guest.front_end.check_device_state() == 0
    return state


def load(guest: FullGuest, state: bytes) -> None:
    read, write = os.pipe()
    guest.front_end.set_device_state_fd(Direction.LOAD, read)
    os.close(read)
    os.write(write, state)
    os.close(write)
    assert guest.front_end.check_device_state() == 0


def test_what_was_set_travels_with_the_guest_which_is_asked_to_announce_itself() -> None:
    features = FILTERS | mask(F.STATUS, F.GUEST_ANNOUNCE)
    with ServedDevice(personality="full") as first, FullGuest(first.connect(), features=features) as guest:
        assert guest.command(MAC, 1, OWN) == (OK, b"")
        assert guest.command(MAC, 0, table([], [GROUP])) == (OK, b"")
        guest.drivers[0].transmit(frame(BROADCAST))
        assert guest.drivers[0].reclaim_all(5)
        guest.stop()
        state = saved(guest)
        with ServedDevice(personality="full") as second:
            guest.reconnect(second.connect(), lambda: load(guest, state))
            assert guest.config[:8] == OWN + b"\3\0"
            assert gets(second, guest, frame(OWN), frame(GROUP), frame(OTHER)) == [frame(OWN), frame(GROUP)]
            assert not second.lines("settings-unknown")
            assert guest.command(ANNOUNCE, 0) == (OK, b"")
            assert guest.config[6] == 1
