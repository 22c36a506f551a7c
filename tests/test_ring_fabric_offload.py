"""A receiver at the switch that negotiated less than the sender uses: it gets what scapy would make of the frame, and
one that negotiated enough gets the frame as it was sent."""

import random

import pytest
from scapy.layers.inet6 import IPv6ExtHdrFragment
from scapy.layers.l2 import Ether

from vdev.net.features import OFFLOADS, Feature, mask
from vdev.testing.netdriver import GSO_TCPV4, NEEDS_CSUM, NetHeader
from vdev.testing.oversized import KINDS, partial, random_oversized, random_whole
from vdev.testing.rig import USUAL
from vdev.testing.switched import BROADCAST, Station, frame, switched

STRONG = USUAL | OFFLOADS
CSUM_ONLY = USUAL | mask(Feature.CSUM, Feature.GUEST_CSUM)
PACKED = mask(Feature.RING_PACKED)
ROUNDS = 4
RINGS = pytest.mark.parametrize("ring", [0, PACKED], ids=["split", "packed"])


def flooded(sent: bytes) -> bytes:
    """The same to a station that nobody has heard of."""
    return bytes(6 * [4]) + sent[6:]


def parts(station: Station) -> list[tuple[NetHeader, bytes]]:
    """Headers, without the number of buffers, and frames."""
    got = iter(station.driver.receive, None)
    return [(NetHeader(r.header.flags, r.header.gso_type, r.header.hdr_len, r.header.gso_size, r.header.csum_start,
                       r.header.csum_offset), r.frame) for r in got]


def fragment_id(received: bytes) -> int:
    """Of an IPv6 fragment; 0 where there is none."""
    packet = Ether(received)
    return packet[IPv6ExtHdrFragment].id if IPv6ExtHdrFragment in packet else 0


@RINGS
@pytest.mark.parametrize("kind", KINDS)
def test_a_frame_is_cut_for_whom_it_is_too_much(kind, ring):
    rng = random.Random(kind)
    with switched(STRONG | ring, USUAL | ring, CSUM_ONLY, STRONG, size=2048) as (_, (one, weak, summing, strong)):
        ids = []
        for _ in range(ROUNDS):
            sent = random_oversized(rng, kind)
            data = flooded(sent.frame)
            one.send(data, header=sent.header, cuts=sorted(rng.sample(range(1, len(data)), rng.randrange(4))))
            assert parts(strong) == [(sent.header, data)]
            for station in (weak, summing):
                got = parts(station)
                ids.append(fragment_id(got[0][1]))
                assert {header for header, _ in got} == {NetHeader()}
                assert [data.hex() for _, data in got] == [flooded(part).hex() for part in sent.segments(ids[-1])]
        assert one.from_guest.frames == one.from_guest.gso_frames == ROUNDS
        assert not any(station.to_guest.dropped for station in (weak, summing, strong))
        if kind == "ufo6":
            assert len(set(ids)) == ROUNDS  # another one each time, at either receiver


@RINGS
def test_a_checksum_is_completed_for_whom_it_is_too_much(ring):
    rng = random.Random(5)
    with switched(STRONG | ring, USUAL | ring, CSUM_ONLY | ring) as (_, (one, weak, summing)):
        for _ in range(40):
            packet = random_whole(rng)
            start, offset, data = partial(packet)
            one.send(flooded(data), header=NetHeader(NEEDS_CSUM, 0, 0, 0, start, offset), cuts=[20, 40])
            assert parts(weak) == [(NetHeader(), flooded(bytes(Ether(bytes(packet)))))]
            assert parts(summing) == [(NetHeader(NEEDS_CSUM, 0, 0, 0, start, offset), flooded(data))]


@pytest.mark.parametrize("header", [
    NetHeader(NEEDS_CSUM, GSO_TCPV4, 54, 1000, 34, 16),
    NetHeader(0, GSO_TCPV4, 0xFFFF, 48, 0, 0),
    NetHeader(NEEDS_CSUM, GSO_TCPV4, 54, 65535, 14, 2),
])
def test_what_is_no_such_packet_is_lost_for_the_weaker_alone(header):
    with switched(STRONG, USUAL, STRONG) as (_, (one, weak, strong)):
        data = frame(BROADCAST, 0, random.Random(1).randbytes(3000))
        one.send(data, header=header)
        assert len(strong.received()) == 1
        assert weak.received() == []
        assert weak.to_guest.dropped == {"bad_header": 1}
        one.send(frame(BROADCAST, 0))
        assert len(weak.received()) == 1


def test_segments_for_which_there_is_no_room_are_counted():
    rng = random.Random(2)
    sent = next(each for each in (random_oversized(rng, "tcp4") for _ in range(100))
                if each.header.gso_size < 1000 and len(each.segments()) > 4)
    with switched(STRONG, USUAL, size=64) as (fabric, (one, _)):
        weak = Station(fabric, features=USUAL, buffers=3)
        try:
            one.send(flooded(sent.frame), header=sent.header)
            stats = weak.to_guest
            assert stats.frames >= 1
            assert stats.frames + stats.dropped["no_buffers"] == len(sent.segments())
        finally:
            weak.close()


def test_a_segment_above_the_mtu_is_lost():
    rng = random.Random(9)
    sent = next(each for each in (random_oversized(rng, "tcp4") for _ in range(100)) if each.header.gso_size > 2000)
    with switched(STRONG, USUAL, mtu=1500, size=1024) as (_, (one, weak)):
        one.send(flooded(sent.frame), header=sent.header)
        assert weak.to_guest.dropped["bad_length"] >= 1
