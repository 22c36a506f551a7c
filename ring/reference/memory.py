"""Guest memory as the reference sees it: something to read and write by guest-physical address (gpa).

ring.driver_memory.GuestMemory is such a thing. Memory consists of regions with gaps between them. Two regions
may touch, and a buffer may lie across the border; a part of a ring may not.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

_ADDRESSES = 1 << 64


class Region(Protocol):
    """``size`` bytes of guest memory: where the guest has them (gpa), and where the front-end has (uva)."""

    gpa: int
    uva: int
    size: int


class Memory(Protocol):
    """What the reference needs of guest memory. Numbers are little-endian (virtio 1.2, 1.4)."""

    @property
    def regions(self) -> Sequence[Region]:
        """All there is."""

    def read(self, gpa: int, length: int) -> bytes:
        """The bytes at [gpa, gpa + length)."""

    def write(self, gpa: int, data: bytes) -> None:
        """Put ``data`` at ``gpa``."""

    def load(self, gpa: int, width: int) -> int:
        """The number in ``width`` bytes at ``gpa``."""

    def store(self, gpa: int, width: int, value: int) -> None:
        """Put the number ``value`` into ``width`` bytes at ``gpa``."""


class Piece(NamedTuple):
    """A run of ``len`` bytes inside one region."""

    gpa: int
    len: int


def pieces(regions: Sequence[Region], gpa: int, length: int) -> Iterator[Piece | None]:
    """[gpa, gpa + length) as pieces, one after the other; None, and the end, where there is no memory."""
    while length > 0:
        region = next((r for r in regions if r.gpa <= gpa < r.gpa + r.size), None)
        if region is None:
            yield None
            return
        part = min(length, region.gpa + region.size - gpa)
        yield Piece(gpa, part)
        length -= part
        gpa = (gpa + part) % _ADDRESSES  # a number of 64 bits, as in C: 0 comes after the last address


def find_ring_part(regions: Sequence[Region], uva: int, length: int) -> int | None:
    """The gpa of [uva, uva + length), which must lie inside one region; None if it does not."""
    for region in regions:
        if region.uva <= uva and uva + length <= region.uva + region.size:
            return uva - region.uva + region.gpa
    return None
