"""vdev/guest_config.py: a front-end that reads and writes the configuration space, and is told of changes."""

from collections.abc import Iterator

import pytest

from vdev.net.config_space import SIZE
from vdev.net.features import Feature, mask
from vdev.testing.served import ServedDevice
from vhost_user.frontend import FrontEnd, RequestRefused
from vhost_user.spec import BackendRequest, ConfigWrite, ProtocolFeature, Request
from vhost_user.spec import mask as protocol_mask

row = pytest.mark.row
STATUS = slice(6, 8)


@pytest.fixture
def served() -> Iterator[ServedDevice]:
    with ServedDevice(personality="full") as device:
        yield device


@pytest.fixture
def front(served) -> Iterator[FrontEnd]:
    with FrontEnd(served.connect()) as front_end:
        front_end.negotiate()
        yield front_end


@row("VU-CFG-B-01")
def test_any_part_of_it_can_be_read(front) -> None:
    whole = front.get_config(0, SIZE)
    assert len(whole) == SIZE
    for offset in range(SIZE):
        for size in (1, 2, 6, SIZE - offset):
            if offset + size <= SIZE:
                assert front.get_config(offset, size) == whole[offset:offset + size]


@row("VU-CFG-B-02")
@pytest.mark.parametrize(("offset", "size"), [(0, SIZE + 1), (SIZE, 1), (255, 1), (256, 1), (0xFFFFFFF0, 8), (0, 0)])
def test_what_is_not_there_is_answered_with_nothing(served, front, offset, size) -> None:
    assert front.get_config(offset, size) is None
    assert "GET_CONFIG" in served.wait_for("refused-request")
    assert front.get_config(0, 6) is not None


@row("VU-CFG-B-03", "VU-CFG-B-04", "NET-CFG-D-15", "NET-CFG-DR-01")
def test_driver_can_write_nothing_and_a_migration_the_address(front) -> None:
    before, other = front.get_config(0, SIZE), bytes.fromhex("020000000001")
    for flags in (ConfigWrite.DRIVER, 2, 7, 0xFFFFFFFF):
        with pytest.raises(RequestRefused):
            front.set_config(0, other, flags)
    with pytest.raises(RequestRefused):
        front.set_config(6, b"\x00\x00", ConfigWrite.MIGRATION)
    assert front.get_config(0, SIZE) == before
    front.set_config(0, other, ConfigWrite.MIGRATION)
    assert front.get_config(0, SIZE) == other + before[6:]
    front.set_config(0, front.get_config(0, SIZE), ConfigWrite.MIGRATION)


def test_what_a_guest_brought_is_gone_after_a_reset(front) -> None:
    before = front.get_config(0, SIZE)
    for reset in (front.reset_device, lambda: front.set_status(0)):
        front.set_config(0, bytes.fromhex("020000000001"), ConfigWrite.MIGRATION)
        reset()
        assert front.get_config(0, SIZE) == before


@row("NET-CFG-D-17", "VU-BCH-B-03")
def test_link_is_switched_and_the_front_end_told(served, front) -> None:
    front.set_backend_req_fd()
    assert front.get_config(0, SIZE)[STATUS] == b"\x01\x00"
    for up in (False, True):
        served.call(lambda up=up: served.device.set_link(up))
        assert front.backend_channel.receive().request == BackendRequest.CONFIG_CHANGE_MSG
        assert front.get_config(0, SIZE)[STATUS] == bytes([up, 0])
    served.call(lambda: served.device.set_link(True))  # which it is
    assert front.backend_channel.receive() is None


def test_change_without_a_channel_is_told_when_there_is_one(served, front) -> None:
    served.call(lambda: served.device.set_link(False))
    front.set_backend_req_fd()
    assert front.backend_channel.receive().request == BackendRequest.CONFIG_CHANGE_MSG


def test_nobody_is_told_who_did_not_take_the_configuration_space(served) -> None:
    with FrontEnd(served.connect()) as front:
        front.negotiate(protocol_features=protocol_mask(ProtocolFeature.REPLY_ACK, ProtocolFeature.BACKEND_REQ))
        front.set_backend_req_fd()
        served.call(lambda: served.device.set_link(False))
        assert front.backend_channel.receive() is None


def test_link_that_is_down_stays_down_for_the_next_session(served) -> None:
    served.call(lambda: served.device.set_link(False))
    for _ in range(2):
        with FrontEnd(served.connect()) as front:
            front.negotiate()
            assert front.get_config(0, SIZE)[STATUS] == b"\x00\x00"
        served.wait_for("session-end")


@row("NET-CFG-D-02", "NET-CFG-D-03", "NET-CFG-D-04")
def test_mtu_is_the_front_ends_if_it_has_one(front) -> None:
    assert front.get_config(10, 2) == (1500).to_bytes(2, "little")
    front.net_set_mtu(9000)
    assert front.get_config(10, 2) == (9000).to_bytes(2, "little")


@row("NET-CFG-D-10", "NET-CFG-D-11")
def test_speed_and_duplex(front) -> None:
    assert front.get_config(12, 5) == (10_000).to_bytes(4, "little") + b"\x01"


def test_fields_whose_feature_was_taken_out_read_as_zeroes() -> None:
    removed = mask(Feature.MAC, Feature.STATUS, Feature.SPEED_DUPLEX, Feature.MTU, Feature.CTRL_VQ)
    with ServedDevice(personality="full", removed=removed) as served, FrontEnd(served.connect()) as front:
        front.negotiate()
        assert front.get_config(0, SIZE) == bytes(SIZE)


def test_configuration_space_cannot_be_asked_for_where_it_is_qemus() -> None:
    with ServedDevice() as served, FrontEnd(served.connect()) as front:
        front.negotiate()
        assert not front.has(ProtocolFeature.CONFIG)
        with pytest.raises(RequestRefused):
            front.set_config(0, bytes(6))
        assert front.get_config(0, 6) is None
        assert f"{Request.GET_CONFIG.name}: the protocol feature CONFIG" in served.wait_for("refused-request", 2)
