"""Guest memory over one session: the mappings the front-end has sent, and the table in force.

Every change follows the engine's three steps: map and build outside the pause, swap inside it, unmap
after. A change that fails leaves everything as it was.
"""

from dataclasses import dataclass

from ring.guestmem import GuestMemory, Mapping, Owner, Policy
from vdev.engine import Engine
from vdev.handover import HandoverError, Put, Take
from vdev.workers import leave_to_worker
from vhost_user.fds import OwnedFds
from vhost_user.wire import Region


@dataclass(frozen=True)
class SharedRegion:
    """A region that is mapped, and its file (see vdev/handover.py)."""

    region: Region
    file: int


class SessionMemory:
    """What one front-end shares. ``table`` is None while there is none."""

    def __init__(self, engine: Engine, policy: Policy):
        self._engine = engine
        self._policy = policy
        self._owner = Owner()
        self._mappings: list[Mapping] = []
        self.table: GuestMemory | None = None

    @property
    def size(self) -> int:
        """Bytes shared."""
        return sum(mapping.size for mapping in self._mappings)

    def _map(self, region: Region, fd: int) -> Mapping:
        return self._owner.map(fd, region.gpa, region.uva, region.size, region.offset, self._policy)

    def replace(self, regions: tuple[Region, ...], fds: list[int]) -> list[int]:
        """SET_MEM_TABLE. -> rings that lost their memory. Raises SetupError."""
        fresh: list[Mapping] = []
        try:
            for region, fd in zip(regions, fds, strict=True):
                fresh.append(self._map(region, fd))
            return self._swap(fresh)
        except Exception:
            _close(fresh)
            raise

    def add(self, region: Region, fd: int) -> list[int]:
        """ADD_MEM_REG. -> rings that lost their memory (none). Raises SetupError."""
        mapping = self._map(region, fd)
        try:
            return self._swap([*self._mappings, mapping])
        except Exception:
            mapping.close()
            raise

    def remove(self, region: Region) -> list[int]:
        """REM_MEM_REG of a region that is there. -> rings that lost their memory."""
        return self._swap([m for m in self._mappings if not m.covers(region.gpa, region.uva, region.size)])

    def _swap(self, mappings: list[Mapping]) -> list[int]:
        total = sum(mapping.size for mapping in mappings)
        self._policy.check_total(total)
        table = self._owner.table(mappings) if mappings else None
        try:
            with self._engine.paused():
                lost = self._engine.move(table)
                old_mappings, self._mappings = self._mappings, mappings
                old_table, self.table = self.table, table
        except Exception:
            if table is not None:
                table.close()
            raise
        _close(mapping for mapping in old_mappings if mapping not in mappings)
        if old_table is not None:
            old_table.close()
        return lost

    def export(self, put: Put) -> tuple[SharedRegion, ...]:
        """What is mapped. Raises HandoverError if the files were not kept (Policy.keep_files)."""
        if any(mapping.file < 0 for mapping in self._mappings):
            raise HandoverError("the files of guest memory were not kept open")
        return tuple(SharedRegion(Region(m.gpa, m.size, m.uva, m.offset), put(m.file)) for m in self._mappings)

    def adopt(self, regions: tuple[SharedRegion, ...], take: Take) -> None:
        """Map what another process has mapped. No ring may run yet. Raises SetupError."""
        for shared in regions:
            with OwnedFds([take(shared.file)]) as fds:
                self._mappings.append(self._map(shared.region, fds[0]))
        self.table = self._owner.table(self._mappings) if self._mappings else None

    def address(self, region: Region) -> int:
        """Where we have ``region``, which is shared."""
        return next(m.address for m in self._mappings if m.covers(region.gpa, region.uva, region.size))

    def extents(self) -> list[tuple[int, int]]:
        """(address, bytes) of all that is mapped, in whole pages."""
        return [mapping.extent for mapping in self._mappings]

    def identities(self) -> set[tuple[int, int]]:
        """(device, inode) of the files."""
        return {mapping.identity for mapping in self._mappings}

    def sever(self, empty: int) -> None:
        """Take the memory away from whoever uses it, as if the front-end had; ``empty``: a file without a byte. Raises
        OSError."""
        for mapping in self._mappings:
            mapping.sever(empty)

    def close(self) -> None:
        """Unmap everything. No ring may be left."""
        _close(self._mappings)
        self._mappings = []
        if self.table is not None:
            self.table.close()
            self.table = None

    def abandon(self) -> None:
        """Leave everything mapped for good: a worker is stuck in it."""
        leave_to_worker(self._owner, self._mappings, self.table)
        self._mappings, self.table = [], None


def _close(mappings) -> None:
    for mapping in mappings:
        mapping.close()
