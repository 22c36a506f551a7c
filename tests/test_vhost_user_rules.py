"""What a hostile or confused front-end may send, and what it is told.

Every refusal is checked the same way: it is a Nack where an acknowledgement was asked for and Close where
not, the descriptors are closed, and the state is as before.
"""

import os
import struct
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vhost_user.codec import Message
from vhost_user.errors import Close, Nack, PeerError
from vhost_user.fds import OwnedFds
from vhost_user.requests import REQUESTS
from vhost_user.session import Result, Session
from vhost_user.spec import (
    NEED_REPLY_FLAG,
    VERSION,
    Direction,
    IotlbType,
    ProtocolFeature,
    Request,
    VirtioBit,
    mask,
)
from vhost_user.state import Offer
from vhost_user.wire import U64, Config, Iotlb, Log, MemTable, Region, StateTransfer, VringAddr, VringFd, VringState

LOG_ALL, BIT_30, VERSION_1, PACKED = 1 << 26, 1 << 30, 1 << 32, 1 << 34
FEATURES = BIT_30 | VERSION_1 | 1 << 15
REPLY_ACK = mask(ProtocolFeature.REPLY_ACK)
PROTOCOL = REPLY_ACK | mask(ProtocolFeature.MQ, ProtocolFeature.RARP, ProtocolFeature.MTU,
                            ProtocolFeature.BACKEND_REQ, ProtocolFeature.RESET_DEVICE,
                            ProtocolFeature.CONFIGURE_MEM_SLOTS, ProtocolFeature.STATUS,
                            ProtocolFeature.LOG_SHMFD, ProtocolFeature.DEVICE_STATE, ProtocolFeature.PAGEFAULT,
                            ProtocolFeature.INBAND_NOTIFICATIONS, ProtocolFeature.CONFIG)
OFFER = Offer(FEATURES, PROTOCOL, rings=4, queue_num=2, max_mem_slots=3)
REGION = Region(0x100000, 0x100000, 0x7F0000000000, 0)
ADDR = VringAddr(0, 0, 0x7F0000000000, 0x7F0000003000, 0x7F0000002000, 0)


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def message(kind: Request, payload=None, fds: int = 0, need_reply: bool = True) -> Message:
    """``payload``: bytes as they are, or what the request's layout takes."""
    data = payload if isinstance(payload, bytes) else (
        b"" if payload is None else REQUESTS[kind].payload.encode(payload))
    flags = VERSION | (NEED_REPLY_FLAG if need_reply else 0)
    return Message(kind, flags, data, OwnedFds(os.eventfd(0) for _ in range(fds)))


def do(session: Session, kind: Request, payload=None, fds: int = 0) -> None:
    result = Result.ok(0) if REQUESTS[kind].from_device else Result.ok()
    session.answer(session.accept(message(kind, payload, fds)), result)


def refuse(session: Session, kind: Request, payload=None, fds: int = 0, match: str = "") -> None:
    """``session`` refuses this, in either way, and nothing is left of it."""
    before, descriptors = session.state, open_fds()
    with pytest.raises(Nack, match=match) as nack:
        session.accept(message(kind, payload, fds))
    assert nack.value.reply == struct.pack("=IIIQ", kind, 0x5, 8, 1)
    text = str(nack.value)
    assert "\n" not in text
    assert "vhost-user" in text
    with pytest.raises(Close, match=match):
        session.accept(message(kind, payload, fds, need_reply=False))
    assert session.state == before
    assert open_fds() == descriptors


@pytest.fixture
def session() -> Session:
    """Negotiated, with one region of memory and no ring started."""
    session = Session(OFFER)
    do(session, Request.SET_PROTOCOL_FEATURES, U64(PROTOCOL))
    do(session, Request.SET_FEATURES, U64(FEATURES))
    do(session, Request.ADD_MEM_REG, REGION, fds=1)
    return session


@pytest.fixture
def started(session) -> Session:
    """Ring 0 runs."""
    do(session, Request.SET_VRING_NUM, VringState(0, 256))
    do(session, Request.SET_VRING_ADDR, ADDR)
    do(session, Request.SET_VRING_KICK, VringFd(0, True), fds=1)
    return session


# -------------------------------------------------------------------------------------- the envelope

@pytest.mark.parametrize("kind", [kind for kind, row in REQUESTS.items() if row.reply is None])
@pytest.mark.parametrize("size", [4, 7, 300])
def test_P05_P06_payloads_of_another_length(session, kind, size):
    refuse(session, kind, bytes(size), fds=REQUESTS[kind].fds[0], match=f"has {size} bytes|: 0 regions")


@pytest.mark.parametrize("fds", [1, 8])
def test_P12_descriptors_on_a_message_that_takes_none(session, fds):
    refuse(session, Request.SET_VRING_NUM, VringState(0, 256), fds, match=f"{fds} file descriptors came")


@pytest.mark.parametrize(("kind", "payload", "fds"), [
    (Request.SET_LOG_BASE, Log(0x1000, 0), 0), (Request.SET_LOG_BASE, Log(0x1000, 0), 2), (Request.SET_LOG_FD, None, 0),
    (Request.ADD_MEM_REG, REGION, 0), (Request.ADD_MEM_REG, REGION, 2), (Request.SET_BACKEND_REQ_FD, None, 0),
    (Request.SET_MEM_TABLE, MemTable((REGION, replace(REGION, gpa=0, uva=0))), 1),
    (Request.SET_MEM_TABLE, MemTable((REGION,)), 2), (Request.SET_MEM_TABLE, MemTable((REGION,)), 0),
    (Request.REM_MEM_REG, REGION, 2)])
def test_P15_and_VU_MEM_F_03_wrong_number_of_descriptors(session, kind, payload, fds):
    refuse(session, kind, payload, fds, match=f"{fds} file descriptors")


@pytest.mark.parametrize("kind", [Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR])
def test_P15_a_ring_descriptor_that_did_not_come(session, kind):
    refuse(session, kind, VringFd(0, True), match="no file descriptor came along")


@pytest.mark.parametrize("kind", [Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR])
def test_P16_a_ring_descriptor_that_was_said_not_to_come(started, kind):
    refuse(started, kind, VringFd(0, False), fds=1, match="although bit 8 says")
    do(started, kind, VringFd(0, False))


@pytest.mark.parametrize("number", [0, 46, 99, 0xFFFFFFFF])
def test_unknown_requests(session, number):
    refuse(session, number, b"", fds=1, match=f"request {number}: no such request")


@pytest.mark.parametrize("kind", [Request.SET_VRING_ENDIAN, Request.CREATE_CRYPTO_SESSION])
def test_P61_requests_of_features_that_are_not_offered(session, kind):
    refuse(session, kind, bytes(32), fds=1, match=f"^{kind.name}: .* was not offered")


def test_P61_postcopy_that_was_not_negotiated():
    session = Session(OFFER)
    do(session, Request.SET_PROTOCOL_FEATURES, U64(REPLY_ACK))
    refuse(session, Request.POSTCOPY_LISTEN, match="PAGEFAULT was not negotiated")


def test_P96_inflight_areas_are_not_offered(session):
    refuse(session, Request.SET_INFLIGHT_FD, struct.pack("=QQHH4x", 1 << 40, 0, 65535, 0), fds=1,
           match="INFLIGHT_SHMFD")


def test_P61_configuration_space_that_was_not_negotiated():
    session = Session(OFFER)
    do(session, Request.SET_PROTOCOL_FEATURES, U64(REPLY_ACK))
    refuse(session, Request.SET_CONFIG, Config(0, 0, bytes(6)), match="CONFIG was not negotiated")


@pytest.mark.parametrize("size", [0, 5, 7, 300])
def test_P05_P06_configuration_space_of_another_length_than_it_says(session, size):
    refuse(session, Request.SET_CONFIG, struct.pack("=III", 0, 6, 0) + bytes(size), match=f"has {12 + size} bytes")


@pytest.mark.parametrize(("offset", "size"), [(0, 0), (256, 1), (251, 6), (0xFFFFFFFF, 2)])
def test_P99_configuration_space_beyond_its_end(session, offset, size):
    refuse(session, Request.SET_CONFIG, Config(offset, 0, bytes(size)), match="are not within the 256 bytes")


@pytest.mark.parametrize("flags", [2, 3, 7, 0xFFFFFFFF])
def test_VU_CFG_B_03_flags_of_a_write_that_mean_nothing(session, flags):
    refuse(session, Request.SET_CONFIG, Config(0, flags, bytes(6)), match="flags")


# ---------------------------------------------------------------------------------------- negotiation

def test_P26_features_that_were_not_offered(session):
    refuse(session, Request.SET_FEATURES, U64(FEATURES | 1 << 40 | 1 << 63),
           match="RING_RESET, bit 63 was not offered")


def test_P27_a_legacy_driver(session):
    refuse(session, Request.SET_FEATURES, U64(BIT_30), match="VERSION_1")


def test_P28_features_change_on_a_running_device(started):
    refuse(started, Request.SET_FEATURES, U64(BIT_30 | VERSION_1), match="bit 15 would change")


def test_P29_protocol_features_that_were_not_offered(session):
    refuse(session, Request.SET_PROTOCOL_FEATURES, U64(PROTOCOL | mask(ProtocolFeature.SHMEM, 40)),
           match="SHMEM, bit 40 was not offered")


@pytest.mark.parametrize("lacking", [ProtocolFeature.REPLY_ACK, ProtocolFeature.BACKEND_REQ])
def test_VU_FEAT_B_10_in_band_notifications_without_what_they_need(session, lacking):
    refuse(session, Request.SET_PROTOCOL_FEATURES, U64(PROTOCOL & ~mask(lacking)),
           match=f"INBAND_NOTIFICATIONS is set without {lacking.name} ")


def test_VU_INB_B_01_a_kick_starts_a_ring_that_lacks_nothing(session, started):
    refuse(started, Request.VRING_KICK, VringState(1, 0), match="SET_VRING_NUM, SET_VRING_ADDR never came")
    do(started, Request.SET_VRING_NUM, VringState(1, 256))
    do(started, Request.SET_VRING_ADDR, replace(ADDR, index=1))
    do(started, Request.VRING_KICK, VringState(1, 0))
    assert started.rings[1].started
    do(started, Request.VRING_KICK, VringState(0, 0))
    refuse(started, Request.VRING_KICK, VringState(4, 0), match="there are 4 rings")


def test_VU_INB_F_01_num_of_a_kick(started):
    refuse(started, Request.VRING_KICK, VringState(0, 1), match="num is 1, which means nothing yet")


def test_protocol_features_change_on_a_running_device(started):
    refuse(started, Request.SET_PROTOCOL_FEATURES, U64(REPLY_ACK), match="would change while a ring is")


@pytest.mark.parametrize(("kind", "payload", "fds", "feature"), [
    (Request.NET_SET_MTU, U64(1500), 0, "MTU"), (Request.SEND_RARP, U64(0), 0, "RARP"),
    (Request.SET_BACKEND_REQ_FD, None, 1, "BACKEND_REQ"), (Request.RESET_DEVICE, None, 0, "RESET_DEVICE"),
    (Request.ADD_MEM_REG, REGION, 1, "CONFIGURE_MEM_SLOTS"),
    (Request.REM_MEM_REG, REGION, 0, "CONFIGURE_MEM_SLOTS"), (Request.SET_STATUS, U64(1), 0, "STATUS")])
def test_P30_messages_of_a_protocol_feature_that_was_not_negotiated(kind, payload, fds, feature):
    session = Session(OFFER)
    do(session, Request.SET_PROTOCOL_FEATURES, U64(REPLY_ACK))
    refuse(session, kind, payload, fds, match=f"the protocol feature {feature} was not negotiated")


@pytest.mark.parametrize("kind", [Request.GET_STATUS, Request.GET_MAX_MEM_SLOTS])
def test_P30_questions_of_a_protocol_feature_that_was_not_negotiated(kind):
    with pytest.raises(Close, match="was not negotiated"):
        Session(OFFER).accept(message(kind))


def test_the_number_of_queues_may_be_asked_as_soon_as_mq_is_offered():
    do(Session(OFFER), Request.GET_QUEUE_NUM)
    with pytest.raises(Close, match="MQ was not offered"):
        Session(replace(OFFER, protocol_features=REPLY_ACK)).accept(message(Request.GET_QUEUE_NUM))


@pytest.mark.parametrize(("kind", "payload"), [
    (Request.SET_VRING_ENABLE, VringState(0, 1)), (Request.SET_PROTOCOL_FEATURES, U64(0)),
    (Request.GET_PROTOCOL_FEATURES, None)])
def test_P38_messages_that_bit_30_stands_for_where_it_was_not_offered(kind, payload):
    session = Session(replace(OFFER, features=VERSION_1))
    with pytest.raises(Close, match="bit 30"):
        session.accept(message(kind, payload))


def test_P38_enable_before_features_is_legal_where_bit_30_is_offered():
    session = Session(OFFER)
    do(session, Request.SET_VRING_ENABLE, VringState(0, 1))
    assert session.rings[0].enabled


@pytest.mark.parametrize("status", [0x100, 1 << 63])
def test_a_status_of_more_than_a_byte(session, status):
    refuse(session, Request.SET_STATUS, U64(status), match="more than a byte")


@pytest.mark.parametrize("mtu", [0, 20, 67, 65536, 1 << 63])
def test_P100_and_VU_NET_B_02_impossible_mtu(session, mtu):
    refuse(session, Request.NET_SET_MTU, U64(mtu), match=f"MTU {mtu} is not between 68 and 65535")


@pytest.mark.parametrize("mtu", [68, 1500, 65535])
def test_P100_possible_mtu(session, mtu):
    do(session, Request.NET_SET_MTU, U64(mtu))
    assert session.state.mtu == mtu


# ---------------------------------------------------------------------------------------------- rings

RING_STATES = [Request.SET_VRING_NUM, Request.SET_VRING_BASE, Request.SET_VRING_ENABLE]


@pytest.mark.parametrize("index", [4, 0x10000, 0x10001, 0xFFFFFFFF])
def test_P62_ring_index_out_of_range(session, index):
    for kind in RING_STATES:
        refuse(session, kind, VringState(index, 1), match=f"ring {index}: there are 4 rings")
    refuse(session, Request.SET_VRING_ADDR, replace(ADDR, index=index), match="there are 4 rings")


@pytest.mark.parametrize("kind", [Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR])
@pytest.mark.parametrize("index", [4, 255, 0x200, 0x10001, 1 << 63])
def test_P62_and_VU_MSG_B_08_ring_index_out_of_range_with_descriptor(session, kind, index):
    refuse(session, kind, VringFd(index, True), fds=1, match=f"ring {index}: there are 4 rings")


def test_P62_base_of_a_ring_that_does_not_exist_closes(session):
    with pytest.raises(Close, match="ring 65536: there are 4 rings"):
        session.accept(message(Request.GET_VRING_BASE, VringState(0x10000, 0)))


def test_P63_queue_size_zero(session):
    refuse(session, Request.SET_VRING_NUM, VringState(3, 0), match="ring 3: size 0 is not between 1 and 3276")


@pytest.mark.parametrize("size", [32769, 65536, 0xFFFFFFFF])
def test_P64_queue_size_too_large(session, size):
    refuse(session, Request.SET_VRING_NUM, VringState(0, size), match=f"size {size} is not between")


def test_P64_queue_size_above_our_own_maximum():
    session = Session(replace(OFFER, max_queue_size=1024))
    do(session, Request.SET_PROTOCOL_FEATURES, U64(PROTOCOL))
    refuse(session, Request.SET_VRING_NUM, VringState(0, 2048), match="between 1 and 1024")


def test_P64_split_queue_size_is_judged_when_the_ring_starts(session):
    do(session, Request.SET_VRING_NUM, VringState(0, 3))
    do(session, Request.SET_VRING_ADDR, ADDR)
    refuse(session, Request.SET_VRING_KICK, VringFd(0, True), fds=1, match="size 3 is not a power of two")


def test_P64_a_packed_queue_may_have_any_size():
    session = Session(replace(OFFER, features=FEATURES | PACKED))
    do(session, Request.SET_FEATURES, U64(FEATURES | PACKED))
    do(session, Request.SET_VRING_NUM, VringState(0, 3))
    do(session, Request.SET_VRING_ADDR, ADDR)
    do(session, Request.SET_VRING_KICK, VringFd(0, True), fds=1)
    assert session.rings[0].started


def test_P65_queue_size_of_a_started_ring(started):
    refuse(started, Request.SET_VRING_NUM, VringState(0, 128), match="the ring is started")


@pytest.mark.parametrize(("part", "alignment"), [("desc", 16), ("avail", 2), ("used", 4)])
def test_P70_misplaced_rings(session, part, alignment):
    wrong = replace(ADDR, **{part: getattr(ADDR, part) + alignment // 2})
    refuse(session, Request.SET_VRING_ADDR, wrong, match=f"not aligned to {alignment} bytes")
    do(session, Request.SET_VRING_ADDR, replace(ADDR, **{part: getattr(ADDR, part) + alignment}))


def test_P73_addresses_before_any_memory_are_stored():
    session = Session(OFFER)
    do(session, Request.SET_VRING_ADDR, ADDR)
    assert session.rings[0].addr == ADDR


@pytest.mark.parametrize("part", ["desc", "avail", "used"])
def test_P74_other_addresses_for_a_started_ring(started, part):
    moved = replace(ADDR, **{part: getattr(ADDR, part) + 0x1000})
    refuse(started, Request.SET_VRING_ADDR, moved, match="the ring is started and these are other addresses")


def test_P74_the_same_addresses_again_for_a_started_ring(started):
    do(started, Request.SET_VRING_ADDR, replace(ADDR, log=0x5000))
    assert started.rings[0].addr.log == 0x5000
    assert started.rings[0].started


def test_P74_the_log_flag_of_a_started_ring_may_change():
    session = Session(replace(OFFER, features=FEATURES | LOG_ALL))
    do(session, Request.SET_FEATURES, U64(FEATURES))
    do(session, Request.SET_VRING_NUM, VringState(0, 256))
    do(session, Request.SET_VRING_ADDR, ADDR)
    do(session, Request.SET_VRING_KICK, VringFd(0, True), fds=1)
    do(session, Request.SET_VRING_ADDR, replace(ADDR, flags=1, log=0x5000))
    assert (session.rings[0].addr.flags, session.rings[0].started) == (1, True)


@pytest.mark.parametrize("flags", [1, 2, 0xFFFFFFFF])
def test_address_flags_that_were_not_offered(session, flags):
    refuse(session, Request.SET_VRING_ADDR, replace(ADDR, flags=flags), match="flags")


# -------------------------------------------------------------------------------------------- migration

@pytest.mark.parametrize(("log", "text"), [
    (Log(0, 0), "the log has no bytes"), (Log(0, 0x1000), "the log has no bytes"),
    (Log(0x1000, 2**64 - 0x1000), "goes beyond"), (Log(2**64 - 1, 1), "goes beyond"), (Log(1 << 63, 0), "goes beyond"),
    (Log(0x1000, (1 << 63) - 0x1000), "goes beyond")])
def test_P87_a_log_that_makes_no_sense(session, log, text):
    refuse(session, Request.SET_LOG_BASE, log, fds=1, match=text)


def test_the_log_and_its_descriptor_need_LOG_SHMFD(session):
    do(session, Request.SET_PROTOCOL_FEATURES, U64(REPLY_ACK))
    for kind, payload in ((Request.SET_LOG_BASE, Log(0x1000, 0)), (Request.SET_LOG_FD, None)):
        refuse(session, kind, payload, fds=1, match="LOG_SHMFD was not negotiated")


@pytest.mark.parametrize(("transfer", "text"), [
    (StateTransfer(2, 0), "direction 2 is neither"), (StateTransfer(0xFFFFFFFF, 0), "is neither"),
    (StateTransfer(Direction.SAVE, 1), "phase 1 is not 0"), (StateTransfer(Direction.LOAD, 0xFFFFFFFF), "is not 0")])
@pytest.mark.parametrize("need_reply", [True, False])
def test_VU_DST_B_03_a_refused_transfer_is_answered_without_descriptor(session, transfer, text, need_reply):
    before, descriptors = session.state, open_fds()
    with pytest.raises(Nack, match=text) as nack:
        session.accept(message(Request.SET_DEVICE_STATE_FD, transfer, 1, need_reply))
    assert nack.value.reply == struct.pack("=IIIQ", Request.SET_DEVICE_STATE_FD, 0x5, 8, 0x101)
    assert (session.state, open_fds()) == (before, descriptors)


def test_no_state_is_transferred_while_a_ring_runs(started):
    with pytest.raises(Nack, match="a ring is started"):
        started.accept(message(Request.SET_DEVICE_STATE_FD, StateTransfer(0, 0), 1))


# ------------------------------------------------------------------------------------------------ rings, on

@pytest.mark.parametrize("base", [0x10000, 0x80008000, 0xFFFFFFFF])
def test_P75_base_of_more_than_16_bits(session, base):
    refuse(session, Request.SET_VRING_BASE, VringState(0, base), match="does not fit in 16 bits")


def test_P75_base_of_a_started_ring(started):
    refuse(started, Request.SET_VRING_BASE, VringState(0, 1), match="the ring is started")


@pytest.mark.parametrize("num", [2, 0xFFFFFFFF])
def test_neither_enable_nor_disable(session, num):
    refuse(session, Request.SET_VRING_ENABLE, VringState(0, num), match="neither 1")


def test_P78_kick_before_everything_else_starts_nothing():
    session = Session(OFFER)
    do(session, Request.SET_PROTOCOL_FEATURES, U64(PROTOCOL))
    refuse(session, Request.SET_VRING_KICK, VringFd(0, True), fds=1,
           match="cannot start: SET_FEATURES, SET_VRING_NUM, SET_VRING_ADDR never came")
    do(session, Request.SET_FEATURES, U64(FEATURES))
    do(session, Request.SET_VRING_NUM, VringState(0, 256))
    refuse(session, Request.SET_VRING_KICK, VringFd(0, False), match="start: SET_VRING_ADDR never came")


# --------------------------------------------------------------------------------------------- memory

def table(*regions: Region) -> dict:
    return {"kind": Request.SET_MEM_TABLE, "payload": MemTable(regions), "fds": len(regions)}


@pytest.mark.parametrize("count", [0, 9, 0xFFFFFFFF])
def test_P39_P40_impossible_number_of_regions(started, count):
    refuse(started, Request.SET_MEM_TABLE, struct.pack("=II", count, 0), fds=1, match=f": {count} regions")


BAD_REGIONS = [
    pytest.param(replace(REGION, size=0), "size is zero", id="P43"),
    pytest.param(replace(REGION, offset=2**64 - 0x1000), r"offset \+ size goes beyond", id="P44-wraps"),
    pytest.param(replace(REGION, offset=2**63 - 0x40000000), r"offset \+ size goes beyond", id="P44-aligned"),
    pytest.param(replace(REGION, gpa=2**64 - 0x100000), r"gpa \+ size goes beyond", id="P45-gpa"),
    pytest.param(replace(REGION, uva=2**64 - 1), r"uva \+ size goes beyond", id="P45-uva"),
    pytest.param(replace(REGION, size=2**64 - 1), r"gpa \+ size goes beyond", id="P45-size")]


@pytest.mark.parametrize(("region", "match"), BAD_REGIONS)
def test_P43_P44_P45_impossible_regions(session, region, match):
    refuse(session, **table(region), match=match)
    do(session, Request.REM_MEM_REG, REGION)
    refuse(session, Request.ADD_MEM_REG, region, fds=1, match=match)


FAR = Region(0x10000000, 0x100000, 0x7F1000000000, 0)


@pytest.mark.parametrize(("region", "which"), [
    (replace(FAR, gpa=REGION.gpa), "gpa"), (replace(FAR, gpa=REGION.gpa + REGION.size - 1), "gpa"),
    (replace(FAR, gpa=0, size=0x10000000), "gpa"), (replace(FAR, uva=REGION.uva + 0x1000), "uva"),
    (replace(FAR, uva=REGION.uva - FAR.size + 1), "uva")])
def test_P46_and_VU_MEM_F_01_overlapping_regions(session, region, which):
    refuse(session, Request.ADD_MEM_REG, region, fds=1, match=f"overlaps region .* in its {which}")
    apart = replace(REGION, gpa=0, size=0x1000, uva=0)
    refuse(session, **table(FAR, apart, replace(region, offset=5), REGION), match="overlaps")


def test_P46_regions_that_touch_do_not_overlap(session):
    after = Region(REGION.gpa + REGION.size, 0x1000, REGION.uva + REGION.size, 0)
    before = Region(REGION.gpa - 0x1000, 0x1000, REGION.uva - 0x1000, 0)
    do(session, Request.ADD_MEM_REG, after, fds=1)
    do(session, Request.ADD_MEM_REG, before, fds=1)
    do(session, **table(before, REGION, after))


def test_P59_a_region_that_is_not_there(session):
    for other in (replace(REGION, gpa=0), replace(REGION, uva=0), replace(REGION, size=0x1000)):
        refuse(session, Request.REM_MEM_REG, other, match="there is no region")


def test_VU_MEM_B_09_more_regions_than_there_are_slots(session):
    for number in range(1, 3):
        do(session, Request.ADD_MEM_REG, replace(FAR, gpa=number << 32, uva=number << 32), fds=1)
    refuse(session, Request.ADD_MEM_REG, FAR, fds=1, match="all 3 memory slots are taken")


def test_P60_the_same_region_is_not_added_without_end(session):
    for _ in range(3):
        do(session, Request.ADD_MEM_REG, REGION, fds=1)
    refuse(session, Request.ADD_MEM_REG, REGION, fds=1, match="was added 4 times already")


# ------------------------------------------------------------------------------------------ at random

NUMBERS = st.one_of(st.integers(0, 5), st.sampled_from([256, 0xFFFF, 0x10000, 2**32 - 1, 2**63, 2**64 - 1]))
WORDS = NUMBERS.map(lambda n: n & 0xFFFFFFFF)
REGIONS = st.one_of(st.sampled_from([REGION, FAR]), st.builds(Region, NUMBERS, NUMBERS, NUMBERS, NUMBERS))
PAYLOADS = st.one_of(
    st.builds(U64, st.one_of(NUMBERS, st.sampled_from([FEATURES, PROTOCOL]))),
    st.builds(VringState, WORDS, WORDS),
    st.builds(VringFd, st.integers(0, 5), st.booleans()), st.builds(VringAddr, WORDS, WORDS, *[NUMBERS] * 4),
    st.just(ADDR), REGIONS, st.builds(MemTable, st.lists(REGIONS, max_size=3).map(tuple)))


@st.composite
def anything(draw) -> tuple[int, bytes, int, bool, str | None]:
    """A request, mostly with a payload of its own kind: number, payload, fds, need_reply, what the device
    has against it."""
    kind = draw(st.one_of(st.sampled_from(list(REQUESTS)), st.integers(0, 50)))
    row = REQUESTS.get(kind)
    payload = draw(st.one_of(PAYLOADS, st.binary(max_size=48)))
    if not isinstance(payload, bytes):
        try:
            payload = row.payload.encode(payload) if row else b""
        except (KeyError, AttributeError):
            payload = b""
    return (kind, payload, draw(st.integers(0, 2)), draw(st.booleans()),
            draw(st.sampled_from([None, None, "no"])))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(anything(), max_size=25), st.booleans())
def test_P17_random_sequences_raise_only_peer_errors_and_leak_nothing(sequence, negotiated):
    session = Session(OFFER)
    if negotiated:
        do(session, Request.SET_PROTOCOL_FEATURES, U64(PROTOCOL))
        do(session, Request.SET_FEATURES, U64(FEATURES))
    descriptors = open_fds()
    for kind, payload, fds, need_reply, refusal in sequence:
        before = session.state
        try:
            request = session.accept(message(kind, payload, fds, need_reply))
            assert session.state is before
            expected = session.after(request, 3)
            session.answer(request, Result(refusal, 3))
            assert refusal is None
            assert session.state == expected
        except PeerError:
            assert session.state is before
        assert open_fds() == descriptors


# --------------------------------------------------------------------------------- GPA_ADDRESSES

GPA_ADDRESSES = mask(ProtocolFeature.GPA_ADDRESSES)


@pytest.fixture
def by_gpa() -> Session:
    """A session in which rings are named by guest-physical address."""
    session = Session(replace(OFFER, protocol_features=PROTOCOL | GPA_ADDRESSES))
    do(session, Request.SET_PROTOCOL_FEATURES, U64(PROTOCOL | GPA_ADDRESSES))
    return session


def test_regions_named_by_gpa_may_share_a_user_address(by_gpa):
    do(by_gpa, Request.ADD_MEM_REG, REGION, fds=1)
    do(by_gpa, Request.ADD_MEM_REG, replace(FAR, uva=REGION.uva), fds=1)
    do(by_gpa, Request.REM_MEM_REG, replace(FAR, uva=REGION.uva))
    refuse(by_gpa, Request.ADD_MEM_REG, replace(REGION, uva=0), fds=1, match="overlaps .* in its gpa")


def test_a_user_address_that_means_nothing_cannot_overflow(by_gpa):
    do(by_gpa, Request.ADD_MEM_REG, replace(REGION, uva=2**64 - 1), fds=1)
    refuse(by_gpa, Request.ADD_MEM_REG, replace(REGION, gpa=2**64 - 1), fds=1, match=r"gpa \+ size goes beyond")


def test_what_addresses_mean_does_not_change_once_memory_is_shared(by_gpa):
    do(by_gpa, Request.ADD_MEM_REG, REGION, fds=1)
    do(by_gpa, Request.SET_PROTOCOL_FEATURES, U64(PROTOCOL | GPA_ADDRESSES))
    refuse(by_gpa, Request.SET_PROTOCOL_FEATURES, U64(PROTOCOL), match="GPA_ADDRESSES would change")
    do(by_gpa, Request.REM_MEM_REG, REGION)
    do(by_gpa, Request.SET_PROTOCOL_FEATURES, U64(PROTOCOL))


# ------------------------------------------------------------------------------------------ IOMMU

ACCESS_PLATFORM = 1 << VirtioBit.ACCESS_PLATFORM
UPDATE = Iotlb(0x10000, 0x1000, REGION.uva, 3, IotlbType.UPDATE)


@pytest.fixture
def behind_iommu() -> Session:
    """A session whose driver is behind an IOMMU."""
    session = Session(replace(OFFER, features=FEATURES | ACCESS_PLATFORM))
    do(session, Request.SET_PROTOCOL_FEATURES, U64(PROTOCOL))
    do(session, Request.SET_FEATURES, U64(FEATURES | ACCESS_PLATFORM))
    return session


def answer_to_iotlb(session: Session, payload: Iotlb | bytes, fds: int = 0) -> str | None:
    """Why an IOTLB message, sent without need_reply, is answered with no; None: the answer is yes."""
    try:
        accepted = session.accept(message(Request.IOTLB_MSG, payload, fds, need_reply=False))
    except Nack as nack:
        assert nack.reply == struct.pack("=IIIQ", Request.IOTLB_MSG, 0x5, 8, 1)
        return str(nack)
    assert session.answer(accepted, Result.ok()) == struct.pack("=IIIQ", Request.IOTLB_MSG, 0x5, 8, 0)
    return None


@pytest.mark.parametrize("payload", [
    UPDATE, replace(UPDATE, iova=2**64 - 0x1000), replace(UPDATE, access=1), replace(UPDATE, access=2),
    Iotlb(0, 0, 0, 0, IotlbType.INVALIDATE), Iotlb(2**64 - 1, 2**64 - 1, 0, 0, IotlbType.INVALIDATE)])
def test_VU_IOTLB_B_01_every_iotlb_message_is_answered(behind_iommu, payload):
    before = behind_iommu.state
    assert answer_to_iotlb(behind_iommu, payload) is None
    assert behind_iommu.state == before


@pytest.mark.parametrize(("payload", "fds", "reason"), [
    (replace(UPDATE, size=0), 0, "is empty or goes beyond"),
    (replace(UPDATE, iova=2**64 - 0x1000, size=0x1001), 0, "goes beyond"),
    (replace(UPDATE, uva=2**64 - 0x1000, size=0x1001), 0, "goes beyond"),
    (replace(UPDATE, access=0), 0, "access 0 is neither"), (replace(UPDATE, access=4), 0, "access 4 is neither"),
    (replace(UPDATE, kind=IotlbType.MISS), 0, "type 1 is neither"), (replace(UPDATE, kind=4), 0, "type 4 is neither"),
    (replace(UPDATE, kind=255), 0, "type 255 is neither"), (UPDATE, 1, "1 file descriptors"),
    (bytes(31), 0, "has 31 bytes"), (bytes(33), 0, "has 33 bytes")])
def test_wrong_iotlb_messages_are_answered_with_no(behind_iommu, payload, fds, reason):
    assert reason in answer_to_iotlb(behind_iommu, payload, fds)


def test_P61_translations_where_there_is_no_iommu(session):
    assert "ACCESS_PLATFORM (bit 33) was not negotiated" in answer_to_iotlb(session, UPDATE)


def test_an_iommu_that_cannot_be_asked_is_refused():
    session = Session(replace(OFFER, features=FEATURES | ACCESS_PLATFORM))
    do(session, Request.SET_PROTOCOL_FEATURES, U64(REPLY_ACK))
    refuse(session, Request.SET_FEATURES, U64(FEATURES | ACCESS_PLATFORM), match="no way to ask for translations")
    do(session, Request.SET_FEATURES, U64(FEATURES))
