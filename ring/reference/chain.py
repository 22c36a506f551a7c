"""One chain of descriptors: the buffers it describes, and what may be wrong with each of them.

Both formats describe buffers alike and keep the same rules about them; how descriptors hang together is what
split.py and packed.py are about. Sections are those of virtio 1.2; constants have its names, less the prefix
VIRTQ_.
"""

from collections.abc import Iterable, Sequence

from ring.reference.memory import Memory, Piece, Region, pieces
from ring.reference.rules import ChainError, Rule

DESCRIPTOR_BYTES = 16  # in both formats (2.7.5, 2.8.13)

DESC_F_NEXT = 1  # the chain goes on
DESC_F_WRITE = 2  # the buffer is for the device to write; otherwise, to read
DESC_F_INDIRECT = 4  # the buffer is a table of descriptors

# Limits of this device (2.7.4.1, 2.8.18). readv and writev take 1024 pieces, one of which is the net header's.
PIECES_MAX = 1023
TABLE_ENTRIES_MIN_LIMIT = 1024  # some drivers have tables longer than their queue

_CHAIN_BYTES_MAX = (1 << 32) - 1  # what the 32-bit length of a used entry can tell


class Chain:
    """A chain taken from the ring.

    head: what its used entry names: the first descriptor's index (split) or the buffer id (packed).
    slots: entries of the ring it takes: 1 (split) or its descriptors in the ring (packed). descriptors: how
    many were read, those of an indirect table included. readable, writable: its buffers as pieces of memory.
    """

    def __init__(self, memory: Memory, head: int, slots: int) -> None:
        self._memory = memory
        self.head = head
        self.slots = slots
        self.descriptors = 0
        self.readable: list[Piece] = []
        self.writable: list[Piece] = []
        self._writable_met = False

    @property
    def readable_len(self) -> int:
        """Bytes the device may read."""
        return sum(piece.len for piece in self.readable)

    @property
    def writable_len(self) -> int:
        """Bytes the device may write."""
        return sum(piece.len for piece in self.writable)

    def refuse(self, rule: Rule, at: int) -> ChainError:
        """What to raise when descriptor ``at`` breaks ``rule``."""
        return ChainError(rule, at, self.head, self.slots)

    # ----------------------------------------------------------------------------- made by the walk

    def add_buffer(self, regions: Sequence[Region], gpa: int, length: int, writable: bool, at: int) -> None:
        """Take over the buffer of descriptor ``at``. Raises ChainError: ORDER, UNMAPPED, PIECES, LENGTH."""
        self._check_order(writable, at)
        for piece in pieces(regions, gpa, length):  # none for an empty buffer: its address means nothing
            if piece is None:
                raise self.refuse(Rule.UNMAPPED, at)
            if len(self.readable) + len(self.writable) == PIECES_MAX:
                raise self.refuse(Rule.PIECES, at)
            (self.writable if writable else self.readable).append(piece)
        if self.readable_len + self.writable_len > _CHAIN_BYTES_MAX:
            raise self.refuse(Rule.LENGTH, at)

    def _check_order(self, writable: bool, at: int) -> None:
        """Device-readable buffers come first (2.7.4.2, 2.8.17)."""
        if writable:
            self._writable_met = True
        elif self._writable_met:
            raise self.refuse(Rule.ORDER, at)

    def read_table(self, regions: Sequence[Region], gpa: int, length: int, limit: int,
                   at: int) -> list[bytes]:
        """All entries of the indirect table that descriptor ``at`` names, as they are now (2.7.5.3, 2.8.7).

        A driver that changes the table afterwards changes nothing. ``limit``: entries at most. Raises
        ChainError: INDIRECT_LENGTH, UNMAPPED.
        """
        entries, rest = divmod(length, DESCRIPTOR_BYTES)
        if entries == 0 or rest or entries > limit:
            raise self.refuse(Rule.INDIRECT_LENGTH, at)
        table = b""
        for piece in pieces(regions, gpa, length):
            if piece is None:
                raise self.refuse(Rule.UNMAPPED, at)
            table += self._memory.read(*piece)
        return [table[i:i + DESCRIPTOR_BYTES] for i in range(0, length, DESCRIPTOR_BYTES)]

    # -------------------------------------------------------------------------- used by the device

    def read(self, offset: int = 0, length: int | None = None) -> bytes:
        """Up to ``length`` bytes of what the device may read, from ``offset``."""
        end = self.readable_len if length is None else offset + length
        return b"".join(self._memory.read(*part) for part, _ in _cut(self.readable, offset, end))

    def write(self, data: bytes, offset: int = 0) -> int:
        """Write into what the device may write, and only there (2.7.5.1, 2.8.15) -> bytes that fitted."""
        written = 0
        for part, position in _cut(self.writable, offset, offset + len(data)):
            self._memory.write(part.gpa, data[position:position + part.len])
            written += part.len
        return written


def _cut(chain: Iterable[Piece], start: int, end: int) -> Iterable[tuple[Piece, int]]:
    """Bytes [start, end) of the pieces taken as one, each part with its distance from ``start``."""
    position = 0
    for piece in chain:
        first, last = max(start, position), min(end, position + piece.len)
        if first < last:
            yield Piece(piece.gpa + first - position, last - first), first - start
        position += piece.len
