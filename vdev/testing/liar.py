"""A driver that writes what it likes, where it likes: contents of rings, tables and event structures made up
at random, most of them close enough to what is right to get past the first check.

It writes into guest memory behind the back of whoever drives the ring there. Section numbers are virtio 1.2's.
"""

import contextlib
from collections.abc import Sequence
from random import Random
from struct import Struct

from ring.driver import Buffer, GuestMemory
from ring.driver_packed import DESC_F_AVAIL, DESC_F_USED
from ring.driver_parts import DESC_F_INDIRECT as TABLE
from ring.driver_parts import DESC_F_NEXT as NEXT
from ring.driver_parts import DESC_F_WRITE as WRITE
from ring.driver_parts import Area
from ring.virtqueue import QueueState
from vdev.testing.agreement import BORDER, REGIONS

_DESCRIPTOR = Struct("<QIHH")  # the last two: flags and next (split, 2.7.5), id and flags (packed, 2.8.13)


class Liar:
    """Lies to the device of one ring of ``size`` descriptors in ``memory``, made of REGIONS. areas: its three parts."""

    def __init__(self, memory: GuestMemory, areas: Sequence[Area], packed: bool, size: int) -> None:
        self.memory = memory
        self.areas = areas
        self.packed = packed
        self.size = size

    def lie(self, random: Random, state: QueueState) -> None:
        """Tell one. state: where the device stands, for a lie has to be where it will look."""
        self._state = state
        lies = (self._offer_good, self._offer_anything, self._offer_table, self._disturb_events, self._disturb_ring,
                self._poke, self._offer_many_pieces)
        random.choices(lies, (10, 10, 10, 6, 2, 2, 1))[0](random)

    def _address(self, random: Random) -> int:
        """Where buffers may be that one should take a close look at."""
        region = random.choice(REGIONS)
        near = random.choice((0, 1, 8, 16, region.size // 2))
        part = random.choice(self.areas)
        return random.choice((region.gpa + near, region.gpa + region.size - near, region.gpa - near, part.gpa + near,
                              BORDER - near, (1 << 64) - 1 - near, random.getrandbits(64))) % (1 << 64)

    def _length(self, random: Random) -> int:
        return random.choice((0, 1, 8, 16, 17, 100, 256, 0x1000, 0x1001, (1 << 31) + 1, (1 << 32) - 1))

    def _buffer(self, random: Random) -> tuple[int, int]:
        """Mostly one there is."""
        if random.random() < 0.6:
            return random.choice(REGIONS).gpa + random.randrange(0x800), random.choice((0, 1, 5, 64, 300))
        return self._address(random), self._length(random)

    def _flags(self, random: Random, table: float = 0.1) -> int:
        return NEXT * (random.random() < 0.6) | WRITE * (random.random() < 0.4) | TABLE * (random.random() < table)

    def _offer(self, random: Random, descriptors: list[tuple[int, int, int]]) -> None:
        """Make these (addr, len, flags) available where the device will look for them."""
        state, size = self._state, self.size
        if self.packed:
            for i, (addr, length, flags) in reversed(list(enumerate(descriptors))):
                slot = state.next_avail + i
                wrap = state.avail_wrap ^ (slot // size % 2 == 1)
                flags |= DESC_F_AVAIL if wrap else DESC_F_USED
                self.memory.write(self.areas[0].gpa + 16 * (slot % size), _DESCRIPTOR.pack(
                    addr, length, random.choice((i, random.getrandbits(16))), flags))
            return
        head = at = random.randrange(size)
        for addr, length, flags in descriptors:
            following = random.choice([(at + 1) % size] * 8 + [random.randrange(size + 1)])
            self.memory.write(self.areas[0].gpa + 16 * at, _DESCRIPTOR.pack(addr, length, flags, following))
            at = min(following, size - 1)
        index = self.memory.load(self.areas[1].gpa + 2, 2)
        self.memory.store(self.areas[1].gpa + 4 + 2 * (index % size), 2, head)
        self.memory.store(self.areas[1].gpa + 2, 2, index + 1 & 0xFFFF)

    def _offer_good(self, random: Random) -> None:
        """A chain nobody can object to, unless another lies on it."""
        buffers = [(random.choice(REGIONS[:3]).gpa + random.randrange(0xE00), random.randrange(200)) for _ in range(3)]
        count = random.randrange(1, min(3, self.size) + 1)
        flags = sorted(WRITE * random.randrange(2) for _ in range(count))
        self._offer(random, [(*buffers[i], flags[i] | NEXT * (i + 1 < count)) for i in range(count)])

    def _offer_anything(self, random: Random) -> None:
        count = random.choice((1, 2, 3, self.size))
        self._offer(random, [(*self._buffer(random), self._flags(random) | NEXT * (i + 1 < count))
                             for i in range(count)])

    def _offer_table(self, random: Random) -> None:
        """An indirect table, behind some descriptors, wherever it falls."""
        count = random.randrange(1, 6)
        at = random.choice((BORDER - 24, REGIONS[2].gpa, self._address(random)))
        with contextlib.suppress(ValueError):
            for i in range(count):
                last = random.choice((i + 1, i + 1, i + 1, random.randrange(8), 0xFFFF))
                flags = self._flags(random, table=0.05) | NEXT * (i + 1 < count)
                self.memory.write(at + 16 * i, _DESCRIPTOR.pack(
                    *self._buffer(random), *((last, flags) if self.packed else (flags, last))))
        length = random.choice([16 * count] * 6 + [0, 8, 16 * count + 1, 16 * 1024, 16 * 1025, (1 << 32) - 16])
        before = [(*self._buffer(random), NEXT) for _ in range(random.choice((0, 0, 0, 1, 2)))]
        stray = random.choice([0] * 6 + [WRITE, NEXT])
        self._offer(random, [*before, (at, length, TABLE | stray)])

    def _offer_many_pieces(self, random: Random) -> None:
        """So many buffers across a border that readv would not take them all."""
        count, at = random.choice((511, 512, 700)), REGIONS[0].gpa + 0x4000
        for i in range(count):
            flags = WRITE | NEXT * (i + 1 < count)
            self.memory.write(at + 16 * i, _DESCRIPTOR.pack(BORDER - 1, 2, *((0, flags) if self.packed else
                                                                            (flags, i + 1))))
        self._offer(random, [(REGIONS[2].gpa, 4, WRITE | NEXT)][:random.randrange(2) * (not self.packed)]
                   + [(at, 16 * count, TABLE)])

    def _disturb_events(self, random: Random) -> None:
        """used_event and flags, or the driver's event suppression structure."""
        area, state = self.areas[1], self._state
        near = state.published + random.randrange(-3, 4)
        place = random.choice((near & 0xFFFF, near % state.size | random.getrandbits(1) << 15, random.getrandbits(16)))
        flags = random.choice((0, 1, 2, 3, 2, 2, random.getrandbits(16)))
        if self.packed:
            self.memory.write(area.gpa, Struct("<HH").pack(place, flags))
        else:
            self.memory.store(area.gpa, 2, flags)
            self.memory.store(area.gpa + area.len - 2, 2, place)

    def _disturb_ring(self, random: Random) -> None:
        """avail.idx or an entry; the flags of any descriptor."""
        size = self.size
        if self.packed:
            slot = random.choice((self._state.next_avail, random.randrange(size)))
            self.memory.store(self.areas[0].gpa + 16 * slot + 14, 2, random.getrandbits(16))
        else:
            index = self.memory.load(self.areas[1].gpa + 2, 2)
            self.memory.store(self.areas[1].gpa + 4 + 2 * (index % size), 2, random.choice((0, size - 1, size, 0xFFFF)))
            self.memory.store(self.areas[1].gpa + 2, 2, index + random.choice((-1, 1, 1, 1, size, size + 1)) & 0xFFFF)

    def _poke(self, random: Random) -> None:
        """Random bytes, mostly somewhere in the ring, the device's own part included."""
        part = random.choice((*self.areas, Buffer(REGIONS[0].gpa, REGIONS[0].size)))
        length = min(random.choice((1, 2, 4, 16)), part.len)
        self.memory.write(part.gpa + random.randrange(part.len - length + 1), random.randbytes(length))
