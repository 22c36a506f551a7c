"""Payload layouts: bytes as the specification has them, lengths compared strictly."""

import struct

import pytest

from vhost_user import wire
from vhost_user.errors import Refused
from vhost_user.wire import U64, Log, MemTable, Region, StateTransfer, VringAddr, VringFd, VringState

REGIONS = (Region(0, 0xA0000, 0x7F0000000000, 0), Region(0xC0000, 0x7F40000, 0x7F00000C0000, 0xC0000))

# The expected bytes are written with struct, independently of the layouts ("Payload" of the specification).
SAMPLES = [
    (wire.U64_LAYOUT, U64(2**64 - 1), struct.pack("=Q", 2**64 - 1)),
    (wire.VRING_STATE, VringState(3, 0xDEADBEEF), struct.pack("=II", 3, 0xDEADBEEF)),
    (wire.VRING_ADDR, VringAddr(1, 1, 0x10, 0x20, 0x30, 0x40),
     struct.pack("=IIQQQQ", 1, 1, 0x10, 0x20, 0x30, 0x40)),
    (wire.VRING_FD, VringFd(5, True), struct.pack("=Q", 5)),
    (wire.VRING_FD, VringFd(5, False), struct.pack("=Q", 0x105)),
    (wire.SINGLE_REGION, REGIONS[1], struct.pack("=QQQQQ", 0, 0xC0000, 0x7F40000, 0x7F00000C0000, 0xC0000)),
    (wire.MEM_TABLE, MemTable(REGIONS),
     struct.pack("=II", 2, 0) + struct.pack("=QQQQ", 0, 0xA0000, 0x7F0000000000, 0)
     + struct.pack("=QQQQ", 0xC0000, 0x7F40000, 0x7F00000C0000, 0xC0000)),
    (wire.LOG, Log(0x800, 0x1000), struct.pack("=QQ", 0x800, 0x1000)),
    (wire.STATE_TRANSFER, StateTransfer(1, 0), struct.pack("=II", 1, 0)),
    (wire.NOTHING, wire.Nothing(), b""),
]


@pytest.mark.parametrize(("layout", "value", "data"), SAMPLES)
def test_layouts_match_the_specification_both_ways(layout, value, data):
    assert layout.encode(value) == data
    assert layout.decode(data) == value


@pytest.mark.parametrize("layout", [wire.U64_LAYOUT, wire.VRING_STATE, wire.VRING_ADDR, wire.SINGLE_REGION])
@pytest.mark.parametrize("size", [0, 4, 7])
def test_P05_payload_too_short(layout, size):
    with pytest.raises(Refused, match=f"has {size} bytes"):
        layout.decode(bytes(size))


@pytest.mark.parametrize(("layout", "value", "data"), SAMPLES)
def test_P06_payload_too_long(layout, value, data):
    with pytest.raises(Refused, match=f"has {len(data) + 1} bytes"):
        layout.decode(data + b"\0")


def test_the_header_has_twelve_bytes():
    assert wire.HEADER.sizeof() == 12
    assert wire.HEADER.build({"request": 1, "flags": 2, "size": 3}) == struct.pack("=III", 1, 2, 3)


def test_P62_the_index_of_a_kick_keeps_its_full_width():
    assert wire.VRING_FD.decode(struct.pack("=Q", 0x10001)).index == 0x10001
    assert wire.VRING_FD.decode(struct.pack("=Q", 1 << 63 | 0x100)) == VringFd(1 << 63, False)


@pytest.mark.parametrize("count", [0, 9, 10, 0xFFFFFFFF])
def test_P40_region_count_out_of_range_is_refused_before_the_array(count):
    with pytest.raises(Refused, match=f"^{count} regions"):
        wire.MEM_TABLE.decode(struct.pack("=II", count, 0) + bytes(64))


@pytest.mark.parametrize("size", [8, 8 + 31, 8 + 33, 8 + 63, 8 + 65, 8 + 9 * 32])
def test_P42_table_size_does_not_fit_its_count(size):
    with pytest.raises(Refused, match="has"):
        wire.MEM_TABLE.decode((struct.pack("=II", 1, 0) + bytes(300))[:size])


@pytest.mark.parametrize("room", [2, 8])
def test_table_with_room_for_more_regions_than_it_has(room):
    table = MemTable((Region(0x1000, 0x2000, 0x3000, 0x4000),))
    assert wire.MEM_TABLE.decode(wire.MEM_TABLE.encode(table) + b"?" * 32 * (room - 1)) == table


def test_P42_table_without_a_count():
    with pytest.raises(Refused, match="has 4 bytes"):
        wire.MEM_TABLE.decode(bytes(4))


def test_the_offset_does_not_tell_regions_apart():
    there = Region(0x1000, 0x2000, 0x3000, 0)
    assert there.same_place(Region(0x1000, 0x2000, 0x3000, 0x7000))
    assert not there.same_place(Region(0x1000, 0x2000, 0x4000, 0))
