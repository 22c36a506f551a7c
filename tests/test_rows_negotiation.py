"""Rows P26 to P38, P61 and P96 to P102 of docs/conformance/messages.tsv: what a hostile front-end negotiates, and
requests that do not concern rings or memory.

Over a real socket, to a daemon that serves on after each test and holds no more than before (tests/conftest.py).
"""

import time

import pytest

from vdev.net.features import Feature, mask
from vdev.testing.kept import FRAME, WAIT, Traced, ends, refused
from vdev.backend import RARP_INTERVAL
from vdev.testing.scripted import ScriptedGuest
from vdev.testing.served import ServedDevice
from vhost_user.codec import encode
from vhost_user.frontend import FrontEnd
from vhost_user.spec import ProtocolFeature, Request
from vhost_user.spec import mask as protocol_mask
from vhost_user.wire import IOTLB, SINGLE_REGION, U64, U64_LAYOUT, VRING_STATE, Region, VringState

pytestmark = pytest.mark.timeout(120)

MAC = bytes.fromhex("525400123456")
REPLY_ACK = protocol_mask(ProtocolFeature.REPLY_ACK)
# Of features that are not offered, with a payload of the right length.
POSTCOPY = {Request.POSTCOPY_LISTEN: 0}  # those that have no answer
OTHERS = {Request.SET_VRING_ENDIAN: 8}


def u64(value: int) -> bytes:
    """The payload that is one number."""
    return U64_LAYOUT.encode(U64(value))


def test_P26_features_that_were_not_offered(daemon) -> None:
    with daemon.agreed() as front_end:
        agreed, offered = front_end.features, front_end.get_features()
        for bit in range(64):
            if not offered >> bit & 1:
                assert refused(front_end, Request.SET_FEATURES, u64(agreed | 1 << bit)), f"bit {bit}"
    daemon.refuses(Request.SET_FEATURES, u64(mask(Feature.VERSION_1, Feature.HASH_REPORT)))


def test_P27_legacy_driver(daemon) -> None:
    daemon.refuses(Request.SET_FEATURES, u64(0))
    daemon.refuses(Request.SET_FEATURES, u64(mask(Feature.MRG_RXBUF)))


def test_P28_features_change_while_rings_run(daemon) -> None:
    with ScriptedGuest.connect(daemon.path) as guest:
        front_end = guest.front_end
        others = front_end.features ^ mask(Feature.MRG_RXBUF)
        assert refused(front_end, Request.SET_FEATURES, u64(others))
        front_end.set_features(front_end.features, need_reply=True)  # the same again is legal
        assert guest.exchange(FRAME, WAIT) == FRAME
        assert ends(front_end, encode(Request.SET_FEATURES, u64(others)))


def test_P29_protocol_features_that_were_not_offered(daemon) -> None:
    with daemon.agreed() as front_end:
        offered = front_end.get_protocol_features()
        for bit in range(64):
            if not offered >> bit & 1:
                wanted = front_end.protocol_features | 1 << bit
                assert refused(front_end, Request.SET_PROTOCOL_FEATURES, u64(wanted)), f"bit {bit}"
    daemon.refuses(Request.SET_PROTOCOL_FEATURES, u64(1 << 63))


@pytest.mark.parametrize("kind, payload, fds", [
    (Request.NET_SET_MTU, u64(1500), 0), (Request.SEND_RARP, MAC + bytes(2), 0), (Request.SET_BACKEND_REQ_FD, b"", 1),
    (Request.RESET_DEVICE, b"", 0), (Request.ADD_MEM_REG, SINGLE_REGION.encode(Region(0, 4096, 0, 0)), 1),
    (Request.REM_MEM_REG, SINGLE_REGION.encode(Region(0, 4096, 0, 0)), 0), (Request.SET_STATUS, u64(1), 0)],
    ids=lambda value: value.name if isinstance(value, Request) else "")
def test_P30_request_whose_feature_was_not_negotiated(daemon, kind, payload, fds) -> None:
    with Traced() as traced:
        with daemon.agreed(protocol_features=REPLY_ACK) as front_end:
            assert refused(front_end, kind, payload, [traced.fd] * fds)
            assert ends(front_end, encode(kind, payload), [traced.fd] * fds)
        assert traced.closed()


@pytest.mark.parametrize("kind", [Request.GET_STATUS, Request.GET_MAX_MEM_SLOTS])
def test_P30_question_whose_feature_was_not_negotiated(daemon, kind) -> None:
    with daemon.agreed(protocol_features=REPLY_ACK) as front_end:
        assert ends(front_end, encode(kind))


def test_P32_P96_P97_inflight_areas_are_not_offered(daemon) -> None:
    inflight = protocol_mask(ProtocolFeature.INFLIGHT_SHMFD)
    with daemon.agreed() as front_end, Traced() as traced:
        assert not front_end.get_protocol_features() & inflight
        assert refused(front_end, Request.SET_PROTOCOL_FEATURES, u64(front_end.protocol_features | inflight))
        for queues in (0, 1, 65535):
            area = (4096).to_bytes(8, "little") + bytes(8) + queues.to_bytes(2, "little") + (256).to_bytes(2, "little")
            assert refused(front_end, Request.SET_INFLIGHT_FD, area + bytes(4), [traced.fd])
        assert ends(front_end, encode(Request.GET_INFLIGHT_FD, area + bytes(4)))
        assert traced.closed()


def test_P33_P34_owner_set_twice_and_reset_under_traffic(daemon) -> None:
    with ScriptedGuest.connect(daemon.path) as guest:
        for kind in (Request.SET_OWNER, Request.RESET_OWNER) * 3:
            assert not refused(guest.front_end, kind)
            assert guest.exchange(FRAME, WAIT) == FRAME


def test_P38_enable_before_features_is_legal_where_bit_30_is_offered(daemon) -> None:
    with daemon.connect() as front_end:
        front_end.set_protocol_features(front_end.get_protocol_features())
        assert not refused(front_end, Request.SET_VRING_ENABLE, VRING_STATE.encode(VringState(0, 1)))
        for value in (2, 0xFFFFFFFF):
            assert refused(front_end, Request.SET_VRING_ENABLE, VRING_STATE.encode(VringState(0, value)))


@pytest.mark.parametrize("kind, size", [*POSTCOPY.items(), *OTHERS.items()],
                         ids=lambda value: value.name if isinstance(value, Request) else "")
def test_P61_request_of_what_is_not_offered(daemon, kind, size) -> None:
    daemon.refuses(kind, bytes(size), protocol_features=REPLY_ACK)
    with Traced() as traced:
        daemon.refuses(kind, bytes(size), [traced.fd], protocol_features=REPLY_ACK)
        assert traced.closed()


def test_P61_translations_for_a_driver_without_an_iommu(daemon) -> None:
    """IOTLB_MSG always has an answer, asked for or not: that it was refused."""
    with daemon.agreed() as front_end, Traced() as traced:
        for need_reply in (False, True):
            for fds in ((), (traced.fd,)):
                reply = front_end.request(Request.IOTLB_MSG, bytes(IOTLB.size), fds, answered=True,
                                          need_reply=need_reply)
                assert U64_LAYOUT.decode(reply.payload).value == 1
        assert traced.closed()
        assert front_end.get_features()


def test_P61_postcopy_that_was_not_offered_where_it_has_an_answer(daemon) -> None:
    with daemon.agreed(protocol_features=REPLY_ACK) as front_end:
        end = front_end.request(Request.POSTCOPY_END, answered=True)
        assert U64_LAYOUT.decode(end.payload) == U64(1)
        assert ends(front_end, encode(Request.POSTCOPY_ADVISE))


def test_P98_channel_for_our_requests_comes_again(daemon) -> None:
    """Nobody reads or answers on any of them."""
    with ScriptedGuest.connect(daemon.path) as guest:
        guest.front_end.set_backend_req_fd(need_reply=True)
        before = daemon.holding.fds
        for _ in range(20):
            guest.front_end.set_backend_req_fd(need_reply=True)
            assert guest.exchange(FRAME, WAIT) == FRAME
        assert daemon.holding.fds == before


@pytest.mark.parametrize("offset, size, payload", [(0, 257, 257), (256, 1, 1), (0xFFFFFFFF, 2, 2), (0, 8, 4)])
def test_P99_configuration_space_is_not_offered_to_qemu(daemon, offset, size, payload) -> None:
    content = offset.to_bytes(4, "little") + size.to_bytes(4, "little") + bytes(4) + bytes(payload)
    daemon.refuses(Request.SET_CONFIG, content)
    with daemon.agreed() as front_end:
        assert not front_end.request(Request.GET_CONFIG, content, answered=True).payload


def test_P100_impossible_mtu(daemon) -> None:
    for mtu in (0, 67, 65536, 1 << 63):
        daemon.refuses(Request.NET_SET_MTU, u64(mtu))
    with daemon.agreed() as front_end:
        for mtu in (68, 1500, 65535):
            assert not refused(front_end, Request.NET_SET_MTU, u64(mtu))


def test_P101_announcements_are_limited() -> None:
    with ServedDevice() as served, FrontEnd(served.connect()) as front_end:
        front_end.negotiate()
        begin = time.monotonic()
        for _ in range(300):
            front_end.send_rarp(MAC)
        at_most = (time.monotonic() - begin) / RARP_INTERVAL + 2
        announced = served.port.told.count(("announce", MAC))
        assert 1 <= announced <= at_most and announced < 300


def test_P101_storm_of_announcements_also_before_rings_start(daemon) -> None:
    with daemon.agreed() as front_end:
        for _ in range(500):
            front_end.send_rarp(MAC, need_reply=False)
        assert front_end.get_features()
    with ScriptedGuest.connect(daemon.path) as guest:
        for _ in range(500):
            guest.front_end.send_rarp(MAC)
        assert guest.exchange(FRAME, WAIT) == FRAME


@pytest.mark.parametrize("frames", [0, 3])
def test_P102_status_zero_and_then_the_base(daemon, frames) -> None:
    with ScriptedGuest.connect(daemon.path) as guest:
        for _ in range(frames):
            assert guest.exchange(FRAME, WAIT) == FRAME
        guest.front_end.set_status(0, need_reply=True)
        assert [guest.front_end.get_vring_base(index) for index in (0, 1)] == [frames, frames]
