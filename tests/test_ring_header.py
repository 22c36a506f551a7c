"""The checks of the net header from Python. What they check is in tests/test_ring_pump_header.py and, for the step
engine, compared in tests/test_vdev_step_agreement.py."""

import pytest

from ring.header import Header
from vdev.net.features import Feature, mask
from vdev.testing.netdriver import GSO_TCPV4, NEEDS_CSUM, NetHeader

GOOD = NetHeader(NEEDS_CSUM, GSO_TCPV4, 54, 1448, 34, 16)
MAY_SEND, MAY_RECEIVE = mask(Feature.CSUM, Feature.HOST_TSO4), mask(Feature.GUEST_CSUM, Feature.GUEST_TSO4)


def test_header_is_a_private_copy():
    data = bytearray(GOOD.pack())
    header = Header(data)
    data[0] = 0xFF
    assert bytes(header) == GOOD.pack() and header.segmented
    assert bytes(Header()) == bytes(12) and not Header().segmented


@pytest.mark.parametrize("length", [0, 11, 13])
def test_header_of_another_length(length):
    with pytest.raises(ValueError, match=f"a net header has 12 bytes, not {length}"):
        Header(bytes(length))


def test_header_from_the_guest():
    header = Header(NetHeader(0xFF, GSO_TCPV4, 2000, 1448, 34, 16, 7).pack())
    assert header.from_guest(100, MAY_SEND, 48) is None
    assert NetHeader.unpack(bytes(header)) == NetHeader(NEEDS_CSUM, GSO_TCPV4, 100, 1448, 34, 16)
    assert Header(GOOD.pack()).from_guest(51, MAY_SEND, 48) == "bad_header"
    assert Header(GOOD.pack()).from_guest(100, MAY_SEND, 1449) == "bad_header"


def test_header_to_the_guest():
    header = Header(GOOD.pack())
    assert header.to_guest(MAY_RECEIVE) is None
    header.set_num_buffers(3)
    assert NetHeader.unpack(bytes(header)) == NetHeader(NEEDS_CSUM, GSO_TCPV4, 54, 1448, 34, 16, 3)
    assert Header(GOOD.pack()).to_guest(0) == "offload"
