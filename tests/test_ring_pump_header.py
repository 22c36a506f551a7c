"""What may stand in the header of a frame, both ways, and how long a frame may be: the pump against guest and network.

Each test carries the id of its case; what becomes of broken chains is in tests/test_ring_pump_hostile.py.
"""

import threading

import pytest

from ring.driver import Buffer
from vdev.net.features import Feature, mask
from vdev.testing.headers import BASE, FRAME, FROM_GUEST, MAX_FRAME, MERGEABLE, OFFLOADS, REFUSED, TO_GUEST
from vdev.testing.netdriver import GSO_TCPV4, NEEDS_CSUM, NetHeader
from vdev.testing.rig import pumped


@pytest.mark.parametrize("header, features, outcome", FROM_GUEST)
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


@pytest.mark.parametrize("header, features, outcome", TO_GUEST)
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
