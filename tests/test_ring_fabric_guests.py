"""Receivers at the switch that are more than a ring: guests that migrate, guests behind an IOMMU."""

import random
from dataclasses import replace

import pytest

from ring.dirty import PAGE
from ring.driver import Buffer, Extent, GuestMemory
from ring.iotlb import READ, WRITE, Iotlb, ring_parts
from ring.pump import LaneEvent
from ring.virtqueue import VirtQueue
from vdev.net.features import Feature, mask
from vdev.testing.dirty import FrontEndLog, changed, covering
from vdev.testing.rig import USUAL
from vdev.testing.switched import BROADCAST, Station, frame, switched

PACKED = mask(Feature.RING_PACKED)
RINGS = pytest.mark.parametrize("ring", [0, PACKED], ids=["split", "packed"])
TWO = [Extent(0, 8 << 20, uva=1 << 40), Extent(1 << 30, 1 << 20, uva=1 << 41)]


def migrate(station: Station, log: FrontEndLog) -> None:
    """Have all that the device writes of its receiveq, and to its buffers, marked from now on."""
    station.detach()
    station.configs[0].to_guest.queue.log(log.log, used=station.driver.receiveq.ring.areas[2].gpa)
    station.attach()
    log.take()


@RINGS
def test_what_a_sender_writes_to_a_guest_that_migrates_is_marked(ring):
    rng = random.Random(4)
    with switched(USUAL, USUAL | ring) as (_, (one, other)), FrontEndLog(covering(other.memory)) as log:
        migrate(other, log)
        for _ in range(12):
            before = other.memory.snapshot()
            sent = [frame(1, 0, rng.randbytes(rng.randrange(50, 5000))) for _ in range(rng.randrange(1, 4))]
            one.send(*sent)
            really = changed(other.memory, before)
            assert really and really <= log.take()
            assert other.received() == sent
        other.detach()
        other.configs[0].to_guest.queue.log(None)


@RINGS
def test_what_a_sender_wrote_before_its_memory_vanished_is_marked(ring):
    """Half a frame is in the guest's buffer, which stays the guest's."""
    with (switched(USUAL | ring) as (fabric, (other,)), FrontEndLog(covering(other.memory)) as log,
          GuestMemory(extents=TWO) as memory):
        one = Station(fabric, features=USUAL, memory=memory)
        try:
            migrate(other, log)
            kept, apart = memory.alloc(4096), memory.alloc(4096, region=1)
            memory.write(kept, bytes(12) + frame(BROADCAST, 1, b"\xaa" * 1000))
            before = other.memory.snapshot()
            one.driver.transmitq.add([Buffer(kept, 900), Buffer(apart, 400)])
            memory.truncate(region=1)
            one.driver.transmitq.submit()
            assert one.events() == LaneEvent.MEMORY_GONE
            other.detach()
            really = changed(other.memory, before)
            assert really and really <= log.take()
            assert other.received() == []
            other.configs[0].to_guest.queue.log(None)
        finally:
            one.close()


class Translated:
    """The receiveq of ``station`` behind an IOMMU, where an iova is the driver's gpa; nothing but the ring's own parts
    is translated."""

    def __init__(self, station: Station) -> None:
        self._station = station
        self._table = Iotlb()
        queue = station.driver.receiveq
        parts = dict(zip(("desc", "avail", "used"), (area.gpa for area in queue.ring.areas), strict=True))
        for part in ring_parts(size=queue.ring.size, **parts, features=queue.features):
            self.map(part.address, part.length)
        self.queue = VirtQueue(station.side.memory, size=queue.ring.size, **parts, features=queue.features,
                               base=queue.base, iotlb=self._table)
        station.detach()
        station.configs[0].to_guest = replace(station.configs[0].to_guest, queue=self.queue)
        station.attach()

    def map(self, iova: int, size: int) -> None:
        """Translate all pages of [iova, iova + size)."""
        for page in range(iova // PAGE * PAGE, iova + size, PAGE):
            self._table.update(self._station.side.memory, page, PAGE, self._station.memory.uva(page), READ | WRITE)

    def close(self) -> None:
        self.queue.close()
        self._table.close()


@RINGS
def test_a_receiver_that_lacks_a_translation_loses_frames_until_it_has_it(ring):
    with switched(USUAL, USUAL | ring, USUAL) as (_, (one, other, third)):
        behind = Translated(other)
        try:
            one.send(*[frame(BROADCAST, 0)] * 9)
            assert len(third.received()) == 9
            assert other.events() == LaneEvent.MISS
            arrived = len(other.received(refill=False))  # in buffers that share a page with the ring
            assert arrived < 9 and other.to_guest.dropped == {"stopped": 9 - arrived}
            fault = behind.queue.missing()
            other.detach()
            behind.map(fault.iova, 2 * other.driver.buffer_size)
            other.attach()
            one.send(frame(BROADCAST, 0, b"arrives"))
            assert other.received() == [frame(BROADCAST, 0, b"arrives")]
        finally:
            other.detach()
            behind.close()
