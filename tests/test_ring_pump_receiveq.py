"""The fd pump against a guest that lies in its receiveq: buffers that are too small, too many, not its own to give,
or that lie on the rings.

Each test carries the id of its case; what the transmitq may bring is in tests/test_ring_pump_hostile.py.
"""

import contextlib
import random
import time

import pytest

from ring.driver import Buffer
from vdev.net.features import Feature, mask
from vdev.testing.netdriver import NetDriver
from vdev.testing.rig import assert_serves, pumped

BASE = mask(Feature.VERSION_1, Feature.INDIRECT_DESC, Feature.EVENT_IDX)
MERGEABLE = BASE | mask(Feature.MRG_RXBUF)
PACKED = mask(Feature.RING_PACKED)
IN_ORDER = mask(Feature.IN_ORDER)
FRAME = bytes(range(60))

with_and_without_merging = pytest.mark.parametrize("features", [BASE, MERGEABLE], ids=["plain", "mergeable"])
every_ring = pytest.mark.parametrize("ring", [0, PACKED, IN_ORDER, PACKED | IN_ORDER],
                                     ids=["split", "packed", "split_in_order", "packed_in_order"])


def used(driver: NetDriver, count: int) -> list[tuple[int, int]]:
    """Wait for ``count`` used elements of the receiveq -> (head, length) of each."""
    assert driver.receiveq.wait(10, count)
    return [driver.receiveq.ring.next_completion() for _ in range(count)]


# ------------------------------------------------------------------------------------------- chains refused


@with_and_without_merging
@every_ring
def test_R11_R45_receive_buffer_in_as_many_pieces_as_there_can_be(ring, features):
    with pumped(features | ring) as (driver, device):
        # no piece is the header's alone: our header, all of them and the tail are what one call takes
        for pieces in (1023, 1022):
            driver.receiveq.post(writable=[13] + [2] * (pieces - 1), direct=0)
        driver.receiveq.submit()
        device.send(FRAME)
        assert used(driver, 2) == [(0, 0), (1, 12 + len(FRAME))]
        assert (device.to_guest.bad_chains, device.to_guest.dropped) == (1, {})


@every_ring
def test_R18_R54_readable_descriptor_in_a_receive_chain_is_not_written(ring):
    with pumped(MERGEABLE | ring) as (driver, device):
        kept = driver.memory.alloc(2000)
        driver.memory.write(kept, b"\x77" * 2000)
        room = Buffer(driver.memory.alloc(2000), 2000, writable=True)
        bad = [driver.receiveq.add(chain) for chain in ([Buffer(kept, 2000)], [Buffer(kept, 2000), room],
                                                        [room, Buffer(kept, 2000)])]
        driver.fill(1)
        device.send(FRAME)
        assert used(driver, 3) == [(name, 0) for name in bad]
        assert driver.receive_within(10, refill=False).frame == FRAME
        assert driver.memory.read(kept, 2000) == b"\x77" * 2000
        assert device.to_guest.bad_chains == 3 and device.to_guest.dropped == {}


@every_ring
def test_R54_bad_chain_amid_the_buffers_of_one_frame(ring):
    """What was popped for the frame goes back before it, in the ring's order, with length 0; the frame goes into what
    comes behind."""
    with pumped(MERGEABLE | ring, buffer_size=1000) as (driver, device):
        driver.fill(2)
        driver.receiveq.add([Buffer(1 << 60, 100, writable=True)])
        driver.fill(5)
        device.send(bytes(4000))
        lengths = [written for _, written in used(driver, 8)]
        assert lengths == [0, 0, 0, 1000, 1000, 1000, 1000, 12]
        assert (device.to_guest.bad_chains, device.to_guest.frames, device.to_guest.dropped) == (1, 1, {})


# --------------------------------------------------------------------------------------- buffers too small


@every_ring
def test_R46_frame_larger_than_the_buffer_without_mergeable_buffers(ring):
    with pumped(BASE | ring, buffer_size=1000) as (driver, device):
        driver.fill(2)
        for length in (989, 5000, 988):
            device.send(bytes(length))
        assert len(driver.receive_within(10, refill=False).frame) == 988
        assert device.to_guest.dropped == {"too_small": 2}
        assert driver.receiveq.ring.pending() == 0  # the buffer was not used up by what did not fit


@with_and_without_merging
@pytest.mark.parametrize("room", [1, 11])
@every_ring
def test_R47_receive_buffer_smaller_than_the_header(ring, features, room):
    with pumped(features | ring) as (driver, device):
        driver.receiveq.post(writable=[room])
        driver.fill(1)
        device.send(FRAME)
        assert used(driver, 2) == [(0, 0), (1, 12 + len(FRAME))]
        assert device.to_guest.bad_chains == 1
        assert (device.to_guest.frames, device.to_guest.dropped) == (1, {})


@every_ring
def test_R50_mergeable_buffers_of_one_byte(ring):
    """A frame may take no more chains than the queue has; this one needs more, and there never will be enough."""
    with pumped(MERGEABLE | ring, size=16) as (driver, device):
        driver.receiveq.post(writable=[12])
        for _ in range(15):
            driver.receiveq.post(writable=[1])
        driver.receiveq.submit()
        device.send(FRAME)
        device.send(bytes(15))
        received = driver.receive_within(10, refill=False)
        assert (received.frame, received.buffers) == (bytes(15), 16)
        assert device.to_guest.dropped == {"too_small": 1}


@every_ring
def test_R48_more_pieces_than_one_call_takes_in_many_buffers(ring):
    with pumped(MERGEABLE | ring, size=256) as (driver, device):
        for _ in range(256):
            driver.receiveq.post(writable=[12, 3, 3, 3, 3, 3], direct=0)  # 1536 pieces in all
        driver.receiveq.submit()
        device.send(bytes(5000))
        device.send(bytes(4000))
        received = driver.receive_within(10, refill=False)
        assert len(received.frame) == 4000
        assert device.to_guest.dropped == {"too_small": 1}


# ----------------------------------------------------------------------------- buffers and rings on each other


@every_ring
def test_R51_receive_buffers_on_the_rings(ring):
    """Frames are written over both rings: any outcome but a crash, and the guest beside it notices nothing."""
    choose = random.Random(3)
    outcomes = set()
    with pumped() as (neighbour, beside):
        for _ in range(30):
            with pumped(MERGEABLE | ring, size=64, attach=False) as (driver, device):
                far = driver.memory.alloc(1 << 20)
                parts = [part.gpa for queue in (driver.receiveq, driver.transmitq) for part in queue.ring.areas]
                for _ in range(20):
                    driver.receiveq.add([Buffer(choose.choice(parts) + 4 * choose.randrange(16), 1500, writable=True)])
                driver.offer(FRAME)
                driver.receiveq.submit()
                driver.transmitq.submit()
                device.lane.configure(device.config)
                beside.pump.attach(device.lane)
                for _ in range(5):
                    with contextlib.suppress(BlockingIOError):
                        device.send(choose.randbytes(1400))
                    driver.receiveq.kick()
                    driver.transmitq.kick()
                time.sleep(0.002)
                beside.pump.detach(device.lane, 5000)
                lost = device.to_guest
                outcomes.add(lost.frames > 0)
                assert lost.frames + sum(lost.dropped.values()) <= 5
                assert not any(driver.memory.read(far + 4096, (1 << 20) - 4096))
        assert True in outcomes
        assert_serves(neighbour, beside)


@every_ring
def test_R60_both_directions_on_one_ring(ring):
    """The two queues of a pair lie in the same memory: each direction takes the other's used entries, indices and
    suppression fields for the driver's. It is the driver's loss alone."""
    choose = random.Random(6)
    moved = 0
    with pumped() as (neighbour, beside):
        for _ in range(20):
            with pumped(MERGEABLE | ring, size=16, attach=False) as (driver, device):
                kept = driver.memory.alloc(4096)
                shared = driver.transmitq
                device.config.to_guest.queue = device.side.queue(shared)
                device.lane.configure(device.config)
                beside.pump.attach(device.lane)
                for _ in range(16):
                    if choose.random() < 0.5:
                        shared.post(readable=[bytes(12) + FRAME])
                    else:
                        shared.post(writable=[2000])
                    shared.publish()
                    shared.kick()
                    driver.receiveq.kick()
                    device.send(FRAME)
                beside.pump.detach(device.lane, 5000)
                sent, delivered = device.from_guest, device.to_guest
                assert sent.frames + sent.bad_chains <= 16  # each chain once, whatever the other direction made of it
                assert delivered.frames + sum(delivered.dropped.values()) <= 16
                assert driver.memory.read(kept, 4096) == bytes(4096)
                moved += sent.frames + delivered.frames
        assert moved > 0
        assert_serves(neighbour, beside)
