"""vdev/session_state.py over a socket: a device's state leaves one vdev and comes to another."""

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator
from ipaddress import IPv4Address, ip_interface

import pytest

from vdev.net.features import Feature, mask
from vdev.ports.responder import Responder
from vdev.ports.spec import ResponderSpec
from vdev.testing.scripted import ScriptedGuest
from vdev.testing.served import FRAME, ServedDevice, WirePort, both_ways
from vhost_user.frontend import FrontEnd
from vhost_user.spec import STATE_NOFD, Direction

RING = mask(Feature.VERSION_1, Feature.MRG_RXBUF)
GOOD = {"vdev-state": 1, "features": ["VERSION_1"], "mtu": None, "queues": [], "macs": [], "port": {}, "counters": {
    way: {"frames": 7, "bytes": 1, "gso_frames": 0, "kicks": 0, "calls": 0, "dropped": {}}
    for way in ("from_guest", "to_guest")}}


@pytest.fixture
def served() -> Iterator[ServedDevice]:
    with ServedDevice() as device:
        yield device


@contextlib.contextmanager
def waiting(served: ServedDevice) -> Iterator[FrontEnd]:
    """A front-end whose guest has not come yet."""
    with FrontEnd(served.connect()) as front_end:
        front_end.negotiate()
        yield front_end


def save(front_end: FrontEnd) -> bytes:
    read_end, write_end = os.pipe()
    with open(read_end, "rb") as reader:
        assert front_end.set_device_state_fd(Direction.SAVE, write_end) == STATE_NOFD
        os.close(write_end)
        data = reader.read()
    assert front_end.check_device_state() == 0
    return data


def load(front_end: FrontEnd, data: bytes) -> int:
    """-> what CHECK_DEVICE_STATE answers."""
    read_end, write_end = os.pipe()
    assert front_end.set_device_state_fd(Direction.LOAD, read_end) == STATE_NOFD
    os.close(read_end)
    with contextlib.suppress(BrokenPipeError), open(write_end, "wb") as writer:
        writer.write(data)
    return front_end.check_device_state()


def test_VU_DST_B_01_06_a_guests_state_goes_along_and_the_source_goes_on(served) -> None:
    with ScriptedGuest(served.connect(), features=RING) as guest, ServedDevice() as elsewhere:
        both_ways(served, guest)
        guest.qemu.stop()
        data = save(guest.front_end)
        found = json.loads(data)
        assert found["features"] == ["MRG_RXBUF", "VERSION_1"]
        assert found["queues"] == 2 * [{"size": 64, "enabled": True}]
        assert found["macs"] == [FRAME[6:12].hex(":")]
        assert found["counters"]["from_guest"]["frames"] == 1
        with waiting(elsewhere) as front_end:
            assert load(front_end, data) == 0
            assert f"from guest 1 frames, {len(FRAME)} bytes" in elsewhere.wait_for("state-loaded")
            # and on, to a third: what went through is added up
            assert json.loads(save(front_end))["counters"] == found["counters"]
        # the migration failed after all: the source goes on where it stopped
        guest.qemu.rings = [dataclasses.replace(ring, base=1) for ring in guest.qemu.rings]  # one frame each way
        guest.qemu.start([], RING)
        both_ways(served, guest)


def test_a_guest_that_came_is_announced_once_its_rings_run(served) -> None:
    with ScriptedGuest(served.connect(), features=RING) as guest:
        guest.qemu.stop()
        data = json.dumps(GOOD | {"macs": ["52:54:00:12:34:56", "52:54:00:12:34:57"]}).encode()
        assert load(guest.front_end, data) == 0
        assert not [told for told in served.port.told if told[0] == "announce"]
        for _ in range(2):
            guest.qemu.start([], RING)
            guest.qemu.stop()
        announced = [mac.hex() for what, *rest in served.port.told if what == "announce" for mac in rest]
        assert announced == ["525400123456", "525400123457"]


def test_addresses_of_the_last_guest_are_not_those_of_the_next(served) -> None:
    with ScriptedGuest(served.connect(), features=RING) as guest:
        both_ways(served, guest)
    with ScriptedGuest(served.connect(), features=RING) as guest:
        guest.qemu.stop()
        assert json.loads(save(guest.front_end))["macs"] == []
        guest.qemu.start([], RING)
        both_ways(served, guest)
        for _ in range(2):  # it is not forgotten by being told
            guest.qemu.stop()
            assert json.loads(save(guest.front_end))["macs"] == [FRAME[6:12].hex(":")]
            guest.qemu.rings = [dataclasses.replace(ring, base=1) for ring in guest.qemu.rings]
            guest.qemu.start([], RING)


def test_counters_add_up_over_migrations(served) -> None:
    with waiting(served) as front_end:
        assert load(front_end, json.dumps(GOOD).encode()) == 0
    with ScriptedGuest(served.connect(), features=RING) as guest:
        both_ways(served, guest)
        guest.qemu.stop()
        # another session: it begins with nothing
        assert json.loads(save(guest.front_end))["counters"]["from_guest"]["frames"] == 1
        assert load(guest.front_end, json.dumps(GOOD).encode()) == 0
        assert json.loads(save(guest.front_end))["counters"]["from_guest"]["frames"] == 8


@pytest.mark.parametrize("data, why", [
    (b"", "no JSON"), (b"\0\1\2", "no JSON"), (json.dumps(GOOD | {"vdev-state": 9}).encode(), "its version is 9"),
    (json.dumps(GOOD).encode()[:-1], "no JSON"), (bytes(1 << 16), "longer than"),
    (json.dumps(GOOD | {"features": ["HASH_REPORT"]}).encode(), "uses HASH_REPORT, which is not offered"),
    (json.dumps(GOOD | {"queues": 9 * [{"size": 8, "enabled": True}]}).encode(), "has 9 queues, here are 2")])
def test_VU_DST_B_05_a_state_that_is_no_good_is_told_by_the_check(served, data, why) -> None:
    with waiting(served) as front_end:
        assert load(front_end, data) != 0
        assert why in served.wait_for("refused-request") and not served.lines("state-loaded")
        assert load(front_end, json.dumps(GOOD).encode()) == 0  # the session goes on


def test_VU_DST_B_05_check_before_the_end_and_without_a_transfer(served) -> None:
    read_end, write_end = os.pipe()
    with waiting(served) as front_end:
        assert front_end.check_device_state() == 1
        assert "no state was transferred" in served.wait_for("refused-request")
        front_end.set_device_state_fd(Direction.LOAD, read_end)
        os.write(write_end, json.dumps(GOOD).encode())
        assert front_end.check_device_state() == 1
        assert "the pipe is not at its end" in served.wait_for("refused-request", 2)
    os.close(read_end)
    os.close(write_end)


@pytest.mark.parametrize("direction, phase", [(2, 0), (0, 1), (0xFFFFFFFF, 0xFFFFFFFF)])
def test_VU_DST_B_03_a_transfer_that_makes_no_sense(served, direction, phase) -> None:
    read_end, write_end = os.pipe()
    with waiting(served) as front_end:
        assert front_end.set_device_state_fd(direction, write_end, phase) == STATE_NOFD | 1
        os.close(write_end)
        assert os.read(read_end, 1) == b""  # ours is closed too
        os.close(read_end)


def test_a_descriptor_that_is_no_pipe_and_transfers_never_ended_leave_nothing(served) -> None:
    def files() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = files()
    with waiting(served) as front_end:
        for _ in range(20):
            ends = os.pipe()
            assert front_end.set_device_state_fd(Direction.LOAD, ends[0]) == STATE_NOFD
            for end in ends:
                os.close(end)
            event = os.eventfd(0)
            assert front_end.set_device_state_fd(Direction.LOAD, event) == STATE_NOFD | 1
            os.close(event)
    served.wait_for("session-end")
    assert files() == before


def test_a_state_of_a_front_end_that_reads_slowly_is_written_all_the_same(served) -> None:
    read_end, write_end = os.pipe()
    fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 4096)
    os.write(write_end, bytes(4096))
    with waiting(served) as front_end, open(read_end, "rb") as reader:
        front_end.set_device_state_fd(Direction.SAVE, write_end)
        os.close(write_end)
        data = reader.read()  # the loop goes on with it when there is room
        assert json.loads(data[4096:])["vdev-state"] == 1
        assert front_end.check_device_state() == 0


def responder() -> Responder:
    return Responder(ResponderSpec(ip_interface("10.0.76.1/24")), 1)


def test_leases_of_the_responder_go_along() -> None:
    one, other = responder(), responder()
    mac = bytes.fromhex("525400123456")
    one.dhcp.leases[mac] = IPv4Address("10.0.76.9")
    other.recall(json.loads(json.dumps(one.learned())))
    assert other.dhcp.leases == one.dhcp.leases
    for port in (one, other):
        port.close()


@pytest.mark.parametrize("leases", [
    {"525400123456": "10.0.76.999"}, {"xx": "10.0.76.2"}, {"52:54": "10.0.76.2"}, ["x"], None, {"525400123456": 5.5},
    {"525400123456": "10.0.76.2", "525400123457": "10.0.76.2"},
    {f"5254001234{number:02x}": f"10.0.76.{number + 2}" for number in range(65)}])
def test_leases_that_make_no_sense_change_nothing(leases) -> None:
    port = responder()
    with pytest.raises((ValueError, KeyError, TypeError, AttributeError)):
        port.recall({"leases": leases})
    assert not port.dhcp.leases
    port.close()


def test_leases_of_another_network_are_left_out() -> None:
    port = responder()
    port.recall({"leases": {"525400123456": "10.0.99.2", "525400123457": "10.0.76.1", "525400123458": "10.0.76.3"}})
    assert list(port.dhcp.leases.values()) == [IPv4Address("10.0.76.3")]
    port.close()


def test_what_another_kind_of_port_learned_is_not_taken(served) -> None:
    with waiting(served) as front_end:
        assert load(front_end, json.dumps(GOOD | {"port": {"responder": {"leases": "?"}}}).encode()) == 0


def test_what_a_port_cannot_take_is_refused() -> None:
    class Forgetful(WirePort):
        def recall(self, learned) -> None:
            raise KeyError("leases")

    with ServedDevice(Forgetful()) as served, waiting(served) as front_end:
        assert load(front_end, json.dumps(GOOD | {"port": {"wire": {}}}).encode()) == 1
        assert "what its port wire has learned makes no sense" in served.wait_for("refused-request")
