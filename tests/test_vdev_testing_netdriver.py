"""The virtio-net driver in Python: its header, its buffers, and what it says of a device that breaks a rule."""

import struct

import pytest

from ring.driver import DeviceError, GuestMemory
from vdev.net.features import Feature, mask
from vdev.testing.netdriver import NetDriver, NetHeader
from vdev.testing.rig import DeviceSide

MERGEABLE = mask(Feature.MRG_RXBUF)


def test_header_is_that_of_the_specification():
    # virtio 1.2, 5.1.6: flags, gso_type, then five little-endian u16
    header = NetHeader(1, 4, 0x1102, 0x2203, 0x3304, 0x4405, 0x5506)
    assert header.pack() == bytes.fromhex("01 04 0211 0322 0433 0544 0655")
    assert NetHeader.unpack(header.pack() + b"frame") == header
    with pytest.raises(DeviceError, match="11 does not cover the 12-byte header"):
        NetHeader.unpack(bytes(11))


@pytest.mark.parametrize("features, size", [
    (0, 1526), (mask(Feature.GUEST_TSO4), 65562), (mask(Feature.GUEST_UFO), 65562),
    (MERGEABLE | mask(Feature.GUEST_TSO4), 1536)])
def test_receive_buffers_are_as_long_as_the_specification_asks(features, size):
    with GuestMemory() as memory, NetDriver(memory, size=4, features=features) as driver:
        driver.fill()
        assert driver.receiveq.outstanding == 4
        assert {driver.receiveq.ring.desc[i].len for i in range(4)} == {size}


@pytest.fixture
def both():
    """A mergeable driver with four receive buffers of 100 bytes, and the device's half of each queue."""
    with (GuestMemory() as memory, NetDriver(memory, size=4, features=MERGEABLE, buffer_size=100) as driver,
          DeviceSide(memory) as side):
        driver.fill()
        yield driver, side.queue(driver.receiveq), side.queue(driver.transmitq)


def put(device, *buffers: bytes) -> None:
    for data in buffers:
        chain = device.pop()
        device.push(chain, chain.write(data))
    device.publish()


def header(num_buffers: int) -> bytes:
    return bytes(10) + struct.pack("<H", num_buffers)


def test_frame_over_several_buffers(both):
    driver, receiveq, _ = both
    assert driver.receive() is None
    put(receiveq, header(3) + b"a" * 88, b"b" * 100, b"c")
    received = driver.receive()
    assert (received.frame, received.buffers) == (b"a" * 88 + b"b" * 100 + b"c", 3)
    assert driver.receiveq.outstanding == 4  # as many posted again


@pytest.mark.parametrize("num_buffers, complaint", [(0, "num_buffers is 0"), (3, "but 2 buffers were used")])
def test_num_buffers_that_lies(both, num_buffers, complaint):
    driver, receiveq, _ = both
    put(receiveq, header(num_buffers) + b"a" * 88, b"b")
    with pytest.raises(DeviceError, match=complaint):
        driver.receive()


def test_more_buffers_than_negotiated(both):
    driver, receiveq, _ = both
    driver.mergeable = False
    put(receiveq, header(2) + b"a" * 88, b"b")
    with pytest.raises(DeviceError, match="num_buffers is 2"):
        driver.receive()


def test_transmit_and_reclaim(both):
    driver, _, transmitq = both
    sent = NetHeader(flags=1, csum_start=34)
    driver.transmit(b"frame", sent, cuts=(4, 12))
    chain = transmitq.pop()
    assert chain.descriptors == 3 and chain.read() == sent.pack() + b"frame"
    assert driver.reclaim() == 0 and not driver.reclaim_all(0.01)
    transmitq.push(chain)
    transmitq.publish()
    assert driver.reclaim_all(1)


def test_device_that_writes_to_a_transmitted_chain(both):
    driver, _, transmitq = both
    driver.transmit(b"frame")
    transmitq.push(transmitq.pop(), 1)
    transmitq.publish()
    with pytest.raises(DeviceError, match="says 1 bytes, the chain has room for 0"):
        driver.reclaim()
