"""Every kind of ring through the whole back-end: sizes, bases, stops. vdev/backend.py and what is below it are
the product's, the network a socket pair, the guest a driver in Python."""

import dataclasses

import pytest

from ring.driver import GuestMemory
from vdev.net.features import Feature, mask
from vdev.testing.netdriver import NetDriver, NetHeader
from vdev.testing.scripted import ScriptedGuest, ring_setup, shared_regions
from vdev.testing.served import WAIT, ServedDevice
from vhost_user.frontend import FrontEnd, RequestRefused
from vhost_user.handshake import VirtioUser

FRAME = bytes.fromhex("52540012345602000000000188b5") + bytes(range(100))
USUAL = mask(Feature.VERSION_1, Feature.MRG_RXBUF, Feature.EVENT_IDX, Feature.INDIRECT_DESC)
PACKED = mask(Feature.RING_PACKED)
ORDER = mask(Feature.IN_ORDER)

every_ring = pytest.mark.parametrize("ring", [0, PACKED, ORDER, PACKED | ORDER],
                                     ids=["split", "packed", "split_in_order", "packed_in_order"])
in_any_order = pytest.mark.parametrize("order", [0, ORDER], ids=["any_order", "in_order"])


@pytest.fixture
def served():
    with ServedDevice() as device:
        yield device


def both_ways(served: ServedDevice, driver: NetDriver, rounds: int = 1) -> None:
    """A frame each way, ``rounds`` times; fails when one does not arrive."""
    wire = served.port.wire[0]
    wire.settimeout(WAIT)
    for number in range(rounds):
        frame = FRAME + number.to_bytes(2)
        driver.transmit(frame)
        assert wire.recv(4096)[NetHeader.SIZE:] == frame
        assert driver.reclaim_all(WAIT)
        wire.send(bytes(NetHeader.SIZE) + frame)
        received = driver.receive_within(WAIT)
        assert received is not None and received.frame == frame


@pytest.mark.parametrize("ring, words", [
    (0, "split rings"), (ORDER, "split rings, used in order"), (PACKED, "packed rings"),
    (PACKED | ORDER, "packed rings, used in order")])
def test_driver_line_says_which_rings(served, ring, words) -> None:
    with ScriptedGuest(served.connect(), features=USUAL | ring, size=8):
        assert f"1 queue pair of 1 enabled, {words}, queue size 8, " in served.wait_for("driver")


# --------------------------------------------------------------------------------------- sizes


def near_the_end(size: int, packed: bool) -> int:
    """A base from which a ring goes over its end with its third chain; of a small ring, with its next ones."""
    slot = max(size - 2, 0)
    return (slot | 0x8000) * 0x10001 if packed else 0xFFFE


@in_any_order
@pytest.mark.parametrize("size", [1, 2, 3, 5, 100, 1000, 4096, 32768])
def test_packed_ring_of_any_size(served, size, order) -> None:
    with ScriptedGuest(served.connect(), features=USUAL | PACKED | order, size=size, buffers=min(size, 4),
                       base=near_the_end(size, packed=True)) as guest:
        both_ways(served, guest.driver, rounds=7)


@in_any_order
@pytest.mark.parametrize("size", [1, 2, 4, 64, 1024, 4096, 32768])
def test_split_ring_of_any_power_of_two(served, size, order) -> None:
    with ScriptedGuest(served.connect(), features=USUAL | order, size=size, buffers=min(size, 4),
                       base=near_the_end(size, packed=False)) as guest:
        both_ways(served, guest.driver, rounds=7)


@every_ring
@pytest.mark.parametrize("size", [0, 32769, 0xFFFFFFFF])
def test_size_that_no_ring_has_is_refused(served, ring, size) -> None:
    with FrontEnd(served.connect()) as front_end:
        front_end.negotiate(features=USUAL | ring)
        with pytest.raises(RequestRefused, match="SET_VRING_NUM"):
            front_end.set_vring_num(0, size)


# --------------------------------------------------------------------------------------- bases


@every_ring
def test_paused_guest_goes_on_at_the_base_that_was_answered(served, ring) -> None:
    """QEMU hands back what GET_VRING_BASE said when a paused guest goes on."""
    with ScriptedGuest(served.connect(), features=USUAL | ring, size=8) as guest:
        for _ in range(4):
            both_ways(served, guest.driver, rounds=3)  # the fourth time round, the wrap counters are down
            bases = guest.qemu.stop()
            assert bases[1] == guest.driver.transmitq.base
            guest.qemu.rings = [dataclasses.replace(setup, base=base)
                                for setup, base in zip(guest.qemu.rings, bases, strict=True)]
            guest.qemu.start([], (USUAL | ring) & guest.qemu.offered)


def test_base_with_the_available_position_only() -> None:
    """DPDK's virtio-user leaves the used position of a packed ring's base 0 and means that of the other half."""
    features = USUAL | PACKED | mask(Feature.PROTOCOL_FEATURES)
    with (ServedDevice() as served, GuestMemory() as memory, NetDriver(memory, size=8, features=features) as driver,
          FrontEnd(served.connect()) as front_end):
        rings = [dataclasses.replace(ring_setup(queue), base=0x8000)
                 for queue in (driver.receiveq, driver.transmitq)]
        virtio_user = VirtioUser(front_end, rings)
        assert virtio_user.connect() & features == features
        virtio_user.start(shared_regions(memory), features)
        driver.fill()
        both_ways(served, driver, rounds=20)
        assert virtio_user.stop()[1] == driver.transmitq.base


@every_ring
def test_inspection_of_a_running_ring_does_not_make_it_deaf(served, ring) -> None:
    """QEMU's `info virtio-queue-status` sends GET_VRING_BASE for one ring and nothing after it."""
    with ScriptedGuest(served.connect(), features=USUAL | ring, size=8) as guest:
        both_ways(served, guest.driver, rounds=9)
        for index in (0, 1):
            guest.front_end.get_vring_base(index)
            guest.driver.offer(FRAME)
            guest.driver.transmitq.publish()
            guest.driver.transmitq.kick()
            served.wait_for("ring-resumed", index + 1)
            assert served.port.wire[0].recv(4096)[NetHeader.SIZE:] == FRAME
            assert guest.driver.reclaim_all(WAIT)
            both_ways(served, guest.driver, rounds=9)
