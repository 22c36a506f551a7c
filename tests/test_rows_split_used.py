"""Rows of docs/conformance/split.tsv about the used ring."""

import random

import pytest

from ring.driver import Buffer, DriverQueue
from vdev.net.features import Feature, mask
from vdev.testing.netdriver import NetDriver, NetHeader
from vdev.testing.watch import noise, on_wire, placed, until, watching

row = pytest.mark.row

PLAIN = mask(Feature.VERSION_1)
IN_ORDER = PLAIN | mask(Feature.IN_ORDER)
HEADER = NetHeader.SIZE
POISON = 0xA5


def used(queue: DriverQueue, count: int) -> list[tuple[int, int]]:
    """The first ``count`` used elements as they lie there: (id, len)."""
    elements = queue.ring.used.ring
    return [(elements[i].id, elements[i].len) for i in range(count)]


def blanked(queue: DriverQueue) -> None:
    """Fill the used ring with elements that no device writes."""
    queue.memory.write(queue.ring.used.ring[0].gpa, b"\xFF" * 8 * queue.ring.size)


@row("VQ-SPLIT-D-15")
def test_used_elements_name_head_and_bytes_written(engine):
    with engine(PLAIN) as (driver, device):
        lengths = [14, 60, 61, 1500]
        heads = [driver.receiveq.post(writable=[HEADER, 1000, 1000]) for _ in lengths]
        driver.receiveq.submit()
        sent = [driver.offer(noise(length), cuts=(7, HEADER)) for length in lengths]
        driver.transmitq.submit()
        for length in lengths:
            device.send(noise(length))
        assert until(device, lambda: driver.transmitq.ring.pending() == 4 and driver.receiveq.ring.pending() == 4)
        assert used(driver.receiveq, 4) == list(zip(heads, (HEADER + length for length in lengths), strict=True))
        assert used(driver.transmitq, 4) == [(head, 0) for head in sent]


def laps(driver: NetDriver, device, count: int) -> None:
    """Have one frame sent ``count`` times and hold used index and slots against the rule all the while."""
    queue, ring = driver.transmitq, driver.transmitq.ring
    size, before = ring.size, ring.used.idx
    buffer = placed(driver.memory, bytes(HEADER) + noise())
    for head in range(size):
        ring.desc[head].set(*buffer[:2])
        ring.avail.ring[head] = head
    for done in range(0, count, size // 2):
        start, half = (before + done) & 0xFFFF, size // 2
        blanked(queue)
        ring.avail.idx = (start + half) & 0xFFFF
        queue.kick()
        assert until(device, lambda: ring.used.idx == (start + half) & 0xFFFF)  # noqa: B023
        slots = [i for i in range(size) if ring.used.ring[i].id != 0xFFFFFFFF]
        assert slots == sorted((start + i) % size for i in range(half))
        assert all((ring.used.ring[i].id, ring.used.ring[i].len) == (i, 0) for i in slots)


@row("VQ-SPLIT-D-16")
def test_used_index_begins_at_0_and_wraps_at_65536(engine):
    with engine(PLAIN, size=16, to_port=-1) as (driver, device):
        assert driver.transmitq.ring.used.idx == 0
        laps(driver, device, 64)
        assert driver.transmitq.ring.used.idx == 64
    with engine(PLAIN, size=16, to_port=-1, base=65520) as (driver, device):
        laps(driver, device, 64)
        assert driver.transmitq.ring.used.idx == 48


@row("VQ-SPLIT-D-16")
@pytest.mark.parametrize("engine", ["pump", pytest.param("step", marks=pytest.mark.long)], indirect=True)
def test_more_than_65536_buffers(engine):
    with engine(PLAIN, size=1024, to_port=-1) as (driver, device):
        laps(driver, device, 70 * 1024)
        assert driver.transmitq.ring.used.idx == 70 * 1024 - 65536


class Receiveq:
    """A receiveq of ``count`` poisoned buffers; ``look`` tells what its used ring shows at this moment."""

    def __init__(self, driver: NetDriver, count: int, room: int) -> None:
        self.queue, self.memory, self.shown = driver.receiveq, driver.memory, 0
        self.places = {}
        for _ in range(count):
            gpa = self.memory.alloc(room)
            self.memory.write(gpa, bytes([POISON]) * room)
            self.places[self.queue.add([Buffer(gpa, room, writable=True)])] = gpa
        blanked(self.queue)
        self.queue.submit()
        self.chains: list[tuple[int, bytes]] = []  # (len, contents) at the moment they were seen

    def look(self) -> int:
        idx = self.queue.ring.used.idx
        for i in range(self.shown, idx):
            element = self.queue.ring.used.ring[i]
            length = element.len
            self.chains.append((length, self.memory.read(self.places.get(element.id, 0x4000_0000), min(length, 4096))))
        self.shown = idx
        return idx


@row("VQ-SPLIT-D-17", "VQ-SPLIT-D-18", "VQ-SPLIT-D-19")
def test_length_and_contents_are_there_when_the_index_moves(engine):
    with engine(PLAIN) as (driver, device):
        frames = [noise(random.Random(i).randrange(14, 1500), i) for i in range(100)]
        receiveq = Receiveq(driver, len(frames), 2000)
        with watching(receiveq.look):
            for data in frames:
                device.send(data)
            assert until(device, lambda: receiveq.shown == len(frames))
        header = NetHeader(num_buffers=1).pack()
        assert receiveq.chains == [(HEADER + len(data), header + data) for data in frames]


# ----------------------------------------------------------------------------------------------- in order


@row("VQ-SPLIT-D-20")
def test_batch_in_order_is_understood_by_the_driver(engine):
    with engine(IN_ORDER, attach=False) as (driver, device):
        frames = [noise(60 + i, i) for i in range(10)]
        heads = [driver.offer(data, cuts=(HEADER,) * (i % 3 == 0)) for i, data in enumerate(frames)]
        driver.transmitq.submit()
        device.attach()
        assert on_wire(device, len(frames)) == [(NetHeader(), data) for data in frames]
        assert until(device, lambda: driver.transmitq.ring.pending() == 10)
        # an element of its own for each chain would be right too
        batch = used(driver.transmitq, 1)[0][0] != heads[0]
        assert used(driver.transmitq, 1) == [(heads[-1] if batch else heads[0], 0)]
        assert [done.head for done in driver.transmitq.collect_all()] == heads
