"""Rows of docs/conformance/faults.tsv about rings: drivers that come back otherwise, rings that are stopped in the
middle of traffic, a network that takes nothing."""

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator

import pytest

from ring.driver import GuestMemory
from ring.driver_memory import DEFAULT_GPA, Extent, OutOfGuestMemory
from vdev.net.features import Feature, mask
from vdev.testing.faults import goes_round
from vdev.testing.kept import WAIT, arrives, assert_returned, holding
from vdev.testing.netdriver import NetDriver, NetHeader
from vdev.testing.scripted import ScriptedGuest, ring_setup
from vdev.testing.served import FRAME, ServedDevice, both_ways, receive

pytestmark = pytest.mark.timeout(120)

USUAL = mask(Feature.VERSION_1, Feature.MRG_RXBUF, Feature.EVENT_IDX)
PACKED = mask(Feature.RING_PACKED)
every_ring = pytest.mark.parametrize("ring", [0, PACKED], ids=["split", "packed"])


@contextlib.contextmanager
def served() -> Iterator[ServedDevice]:
    """A device that leaves this process as it was."""
    before = holding(os.getpid())
    with ServedDevice() as device:
        yield device
    assert_returned(os.getpid(), before)


def restart(guest: ScriptedGuest, driver: NetDriver) -> None:
    """Another driver takes the place of the guest's, in the same session; the rings of the old one are stopped."""
    guest.drivers = [driver]
    guest.qemu.rings = [ring_setup(queue) for queue in (driver.receiveq, driver.transmitq)]
    guest.qemu.reset()
    guest.qemu.start([], guest.features)
    driver.fill()


@every_ring
def test_F18_driver_comes_back_with_rings_of_another_size(daemon, ring) -> None:
    with ScriptedGuest.connect(daemon.path, features=USUAL | ring, size=256) as guest:
        assert goes_round(guest)
        for size in (128, 256, 1, 1024, 2):
            guest.qemu.stop()
            for old in guest.drivers:
                old.close()
            restart(guest, NetDriver(guest.memory, size=size, features=USUAL | ring))
            assert goes_round(guest)


@every_ring
def test_F19_next_kernel_has_its_memory_to_itself(ring) -> None:
    """The rings of the first are answered for, and those of the second lie elsewhere. Whatever the network sends then,
    what the first had lent stays as it was."""
    extents = [Extent(DEFAULT_GPA, 1 << 19), Extent(DEFAULT_GPA + (1 << 20), 1 << 19)]
    with (served() as device, GuestMemory(extents=extents) as memory,
          ScriptedGuest(device.connect(), features=USUAL | ring, size=64, memory=memory) as guest):
        first = guest.driver
        for _ in range(10):
            both_ways(device, guest)
        flood(device)
        guest.qemu.stop()
        use_up(memory, region=0)
        lent = memory.read(DEFAULT_GPA, 1 << 19)
        flood(device)
        restart(guest, NetDriver(memory, size=64, features=USUAL | ring))
        frames = 0
        while guest.driver.receive_within(0.2) is not None:
            frames += 1
        assert frames >= 40  # sent while nobody was there
        both_ways(device, guest)
        assert memory.read(DEFAULT_GPA, 1 << 19) == lent
        first.close()


def flood(device: ServedDevice) -> None:
    """The network sends some frames, wanted or not."""
    for _ in range(40):
        device.port.wire[0].send(bytes(NetHeader.SIZE) + FRAME)


def use_up(memory: GuestMemory, region: int) -> None:
    """Leave nothing of region number ``region`` for whoever comes next."""
    for size in (1 << 16, 1 << 12, 1 << 8, 16):
        with contextlib.suppress(OutOfGuestMemory):
            while True:
                memory.alloc(size, region=region)


def _digest(memory: GuestMemory) -> bytes:
    return b"".join(hashlib.blake2b(part).digest() for part in memory.snapshot())


@pytest.mark.parametrize("times", [150, pytest.param(10_000, marks=[pytest.mark.long, pytest.mark.timeout(900)])])
@every_ring
def test_F20_stopped_in_the_middle_of_a_burst(daemon, ring, times) -> None:
    """After the answers nothing in guest memory changes; started again, each frame comes, once and in order."""
    with ScriptedGuest.connect(daemon.path, features=USUAL | ring, size=64, memory=GuestMemory(1 << 19)) as guest:
        driver = guest.driver
        assert goes_round(guest)
        sent = seen = 0
        for turn in range(times):
            driver.reclaim()
            while sent - seen < 48 and driver.transmitq.ring.room:
                driver.offer(FRAME + sent.to_bytes(4))
                sent += 1
            driver.transmitq.submit()
            if turn % 4:
                time.sleep(0.0001 * (turn % 4))
            bases = [guest.front_end.get_vring_base(index) for index in (0, 1)]
            before = _digest(guest.memory)
            guest.front_end.get_features()  # time for whoever still writes
            assert _digest(guest.memory) == before
            for index, queue in enumerate((driver.receiveq, driver.transmitq)):
                guest.front_end.set_vring_base(index, bases[index], need_reply=True)
                guest.front_end.set_vring_kick(index, queue.kick_fd, need_reply=True)
            while (received := driver.receive()) is not None:
                assert received.frame == FRAME + seen.to_bytes(4)
                seen += 1
        while seen < sent:
            assert arrives(driver) == FRAME + seen.to_bytes(4)
            seen += 1
        assert driver.reclaim_all(WAIT) and driver.receive_within(0.05) is None


@every_ring
def test_F23_network_that_takes_nothing(ring) -> None:
    """What the guest sends waits in its ring; what comes for it does not wait."""
    with served() as device, ScriptedGuest(device.connect(), features=USUAL | ring, size=256) as guest:
        wire, driver, sent = device.port.wire[0], guest.driver, 0
        while driver.transmitq.outstanding < 256 or driver.transmitq.wait(0.5):  # until nothing comes back
            driver.reclaim()
            while driver.transmitq.ring.room:
                driver.offer(FRAME + sent.to_bytes(4))
                sent += 1
            driver.transmitq.submit()
        for number in range(100):
            wire.send(bytes(NetHeader.SIZE) + FRAME + number.to_bytes(4))
            assert arrives(driver) == FRAME + number.to_bytes(4)
        assert driver.reclaim() == 0
        for number in range(sent):
            assert receive(wire) == FRAME + number.to_bytes(4)
        assert driver.reclaim_all(WAIT)
        from_guest, to_guest = device.device.stats()
        assert from_guest.dropped == to_guest.dropped == {}
        both_ways(device, guest)
