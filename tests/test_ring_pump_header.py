"""What may stand in the header of a frame, both ways, and how long a frame may be: the pump against guest and network.

Each test carries the id of its case; what becomes of broken chains is in tests/test_ring_pump_hostile.py.
"""

import threading

import pytest

from ring.driver import Buffer
from vdev.net.features import HOST_GSO, Feature, mask
from vdev.testing.netdriver import (
    GSO_ECN,
    GSO_TCPV4,
    GSO_TCPV6,
    GSO_UDP,
    GSO_UDP_L4,
    NEEDS_CSUM,
    NetHeader,
)
from vdev.testing.rig import pumped

BASE = mask(Feature.VERSION_1, Feature.INDIRECT_DESC, Feature.EVENT_IDX)
MERGEABLE = BASE | mask(Feature.MRG_RXBUF)
OFFLOADS = BASE | HOST_GSO | mask(Feature.CSUM)
FRAME = bytes(range(60))
MAX_FRAME = 65550


# ------------------------------------------------------------------------------------------------ net headers


NONE = NetHeader()
REFUSED = "bad_header"


@pytest.mark.parametrize("header, features, outcome", [
    pytest.param(NetHeader(NEEDS_CSUM, csum_start=60), OFFLOADS, REFUSED, id="N01_start_at_the_end"),
    pytest.param(NetHeader(NEEDS_CSUM, csum_start=65534, csum_offset=65535), OFFLOADS, REFUSED, id="N01_huge"),
    pytest.param(NetHeader(NEEDS_CSUM, csum_start=0, csum_offset=0), OFFLOADS, REFUSED, id="N01_zero"),
    pytest.param(NetHeader(NEEDS_CSUM, csum_start=13, csum_offset=0), OFFLOADS, REFUSED, id="N01_in_ethernet"),
    pytest.param(NetHeader(NEEDS_CSUM, csum_start=34, csum_offset=25), OFFLOADS, REFUSED, id="N02_one_too_far"),
    pytest.param(NetHeader(NEEDS_CSUM, csum_start=34, csum_offset=24), OFFLOADS,
                 NetHeader(NEEDS_CSUM, csum_start=34, csum_offset=24), id="N02_just_fits"),
    pytest.param(NetHeader(NEEDS_CSUM, csum_start=34), BASE, REFUSED, id="N04_checksum_not_negotiated"),
    pytest.param(NetHeader(0, csum_start=65534, csum_offset=65535), OFFLOADS, NONE, id="N01_without_the_flag"),
    *(pytest.param(NetHeader(NEEDS_CSUM, kind, 54, 1448, 34, 16), OFFLOADS, REFUSED, id=f"N03_gso_type_{kind:#x}")
      for kind in (2, 6, 0x7F, 0x80, 0x82)),
    *(pytest.param(NetHeader(NEEDS_CSUM, kind, 54, 1448, 34, 16), OFFLOADS & ~mask(feature), REFUSED,
                   id=f"N04_without_{feature.name}")
      for kind, feature in ((GSO_TCPV4, Feature.HOST_TSO4), (GSO_TCPV6, Feature.HOST_TSO6),
                            (GSO_UDP, Feature.HOST_UFO), (GSO_UDP_L4, Feature.HOST_USO),
                            (GSO_TCPV4 | GSO_ECN, Feature.HOST_ECN))),
    *(pytest.param(NetHeader(NEEDS_CSUM, kind, 54, 1448, 34, 16), OFFLOADS,
                   NetHeader(NEEDS_CSUM, kind, 54, 1448, 34, 16), id=f"good_gso_type_{kind:#x}")
      for kind in (GSO_TCPV4, GSO_TCPV6, GSO_UDP, GSO_UDP_L4, GSO_TCPV4 | GSO_ECN, GSO_TCPV6 | GSO_ECN)),
    pytest.param(NetHeader(NEEDS_CSUM, GSO_TCPV4, 54, 0, 34, 16), OFFLOADS, REFUSED, id="N05_gso_size_0"),
    pytest.param(NetHeader(NEEDS_CSUM, GSO_TCPV4, 54, 1, 34, 16), OFFLOADS, REFUSED, id="N06_gso_size_1"),
    pytest.param(NetHeader(NEEDS_CSUM, GSO_TCPV4, 54, 47, 34, 16), OFFLOADS, REFUSED, id="N06_below_the_floor"),
    pytest.param(NetHeader(NEEDS_CSUM, GSO_TCPV4, 54, 48, 34, 16), OFFLOADS,
                 NetHeader(NEEDS_CSUM, GSO_TCPV4, 54, 48, 34, 16), id="N06_at_the_floor"),
    pytest.param(NetHeader(NEEDS_CSUM, GSO_TCPV4, 2000, 1448, 34, 16), OFFLOADS,
                 NetHeader(NEEDS_CSUM, GSO_TCPV4, 60, 1448, 34, 16), id="N07_hdr_len_beyond_the_frame"),
    pytest.param(NetHeader(0xFF, csum_start=34, csum_offset=16), OFFLOADS,
                 NetHeader(NEEDS_CSUM, csum_start=34, csum_offset=16), id="N09_unknown_flags"),
    pytest.param(NetHeader(0xFE), OFFLOADS, NONE, id="N09_unknown_flags_alone"),
    pytest.param(NetHeader(num_buffers=0xFFFF), OFFLOADS, NONE, id="N11_num_buffers"),
    pytest.param(NetHeader(gso_size=7), OFFLOADS, NONE, id="N05_gso_size_without_gso"),
])
def test_header_from_guest(header, features, outcome):
    with pumped(features) as (driver, device):
        driver.offer(FRAME, header, cuts=(7, 12))
        driver.offer(bytes(40))
        driver.transmitq.submit()
        sent, frame = device.receive()
        if outcome == REFUSED:
            assert frame == bytes(40) and device.from_guest.dropped == {REFUSED: 1}
        else:
            assert (sent, frame) == (outcome, FRAME) and device.from_guest.dropped == {}
        assert driver.reclaim_all(10)


@pytest.mark.parametrize("header, features, outcome", [
    pytest.param(NetHeader(NEEDS_CSUM, csum_start=34), MERGEABLE, "offload", id="checksum"),
    pytest.param(NetHeader(NEEDS_CSUM, GSO_TCPV4, 54, 1448, 34, 16), MERGEABLE | mask(Feature.GUEST_CSUM), "offload",
                 id="tso"),
    pytest.param(NetHeader(NEEDS_CSUM, GSO_TCPV4 | GSO_ECN, 54, 1448, 34, 16),
                 MERGEABLE | mask(Feature.GUEST_CSUM, Feature.GUEST_TSO4), "offload", id="ecn"),
    pytest.param(NetHeader(NEEDS_CSUM, GSO_UDP_L4, 54, 1448, 34, 6),
                 MERGEABLE | mask(Feature.GUEST_CSUM, Feature.GUEST_USO4), "offload", id="one_half_of_uso"),
    pytest.param(NetHeader(NEEDS_CSUM, GSO_TCPV4, 54, 1448, 34, 16),
                 MERGEABLE | mask(Feature.GUEST_CSUM, Feature.GUEST_TSO4), None, id="tso_negotiated"),
    pytest.param(NetHeader(flags=2), MERGEABLE, None, id="data_valid"),
])
def test_N22_offload_the_guest_did_not_negotiate(header, features, outcome):
    with pumped(features) as (driver, device):
        driver.fill()
        device.send(FRAME, header)
        device.send(bytes(40))
        received = driver.receive_within(10)
        if outcome:
            assert received.frame == bytes(40) and device.to_guest.dropped == {outcome: 1}
        else:
            assert received.frame == FRAME and received.header.gso_type == header.gso_type
            assert received.header.flags == (header.flags if features & mask(Feature.GUEST_CSUM) else 0)
            assert driver.receive_within(10).frame == bytes(40) and device.to_guest.dropped == {}


@pytest.mark.parametrize("length", [0, 1, 13, MAX_FRAME + 1, MAX_FRAME + 400])
@pytest.mark.parametrize("features, buffer_size", [(MERGEABLE, 1536), (BASE, 70_000)])
def test_N12_N21_frame_from_the_port_that_is_none(length, features, buffer_size):
    with pumped(features, buffer_size=buffer_size, size=64) as (driver, device):
        driver.fill()
        for _ in range(2):  # the second meets a pump that expects a long one
            device.send(bytes(length))
            device.send(bytes(MAX_FRAME))
            assert len(driver.receive_within(10).frame) == MAX_FRAME
        assert device.to_guest.dropped == {"bad_length": 2}


def test_held_frame_that_the_next_driver_cannot_take():
    """A frame waits for buffers; the guest reboots into a driver that negotiated less."""
    with pumped(MERGEABLE | mask(Feature.GUEST_CSUM, Feature.GUEST_TSO4), buffer_size=1000) as (driver, device):
        driver.fill(1)
        device.send(bytes(4000), NetHeader(NEEDS_CSUM, GSO_TCPV4, 54, 1448, 34, 16))
        assert not driver.receiveq.wait(0.05)
        device.detach()
        device.config.features = MERGEABLE
        device.attach()
        driver.fill(10)
        device.send(FRAME)
        assert driver.receive_within(10).frame == FRAME
        assert device.to_guest.dropped == {"offload": 1}


@pytest.mark.parametrize("ring", [0, mask(Feature.RING_PACKED)], ids=["split", "packed"])
def test_R32_header_rewritten_while_it_is_checked(ring):
    """What goes out is what was checked, at whatever instant the guest rewrites it."""
    good = NetHeader(NEEDS_CSUM, GSO_TCPV4, 54, 1448, 34, 16)
    bad = NetHeader(0xFF, 0x7F, 0xFFFF, 0, 0xFFFF, 0xFFFF, 0xFFFF)
    with pumped(OFFLOADS | ring) as (driver, device):
        gpa = driver.memory.alloc(12 + len(FRAME))
        driver.memory.write(gpa + 12, FRAME)
        stop = threading.Event()

        def mutate():
            while not stop.is_set():
                driver.memory.write(gpa, bad.pack())
                driver.memory.write(gpa, good.pack())

        mutator = threading.Thread(target=mutate)
        mutator.start()
        outcomes = set()
        try:
            for _ in range(40):
                for _ in range(50):
                    driver.transmitq.add([Buffer(gpa, 12 + len(FRAME))])
                driver.transmitq.submit()
                assert driver.reclaim_all(10)
                while (message := device.receive(0)) is not None:
                    outcomes.add(message[0])
        finally:
            stop.set()
            mutator.join()
        for header in outcomes:  # a torn copy may go out, if what it says is right
            assert header.flags in (0, NEEDS_CSUM) and header.num_buffers == 0
            assert header.gso_type in (0, GSO_TCPV4) and header.hdr_len <= len(FRAME)
            assert not header.flags or header.csum_start + header.csum_offset + 2 <= len(FRAME)
        stats = device.from_guest
        assert stats.frames + stats.dropped.get("bad_header", 0) == 2000
        assert set(stats.dropped) <= {"bad_header"}
