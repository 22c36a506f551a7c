"""The dirty log from Python: whose mapping it is, and what was marked (core/dirty.c has the rules)."""

import re

from ring.build import ffi, lib
from ring.errors import error
from ring.guestmem import DEFAULT_POLICY, Policy, SharedFile

PAGE = lib.DIRTY_PAGE


class DirtyLog(SharedFile):
    """``size`` bytes of bits in the front-end's file ``fd``, from ``offset``: page p is bit p % 8 of byte p // 8.

    A page has PAGE bytes; page 0 begins at gpa 0. VirtQueue.log makes a queue mark in it. Raises SetupError as
    SharedFile does; ``fd`` may be closed afterwards. vhost-user, "Migration" and "Log description".
    """

    def __init__(self, fd: int, size: int, offset: int = 0, policy: Policy = DEFAULT_POLICY):
        flag = ffi.new("int32_t *")
        super().__init__(fd, size, offset, flag, policy, noun="log", where="dirty log", remedy="use a memfd")
        self.handle = ffi.new("struct dirty_log *", {"bits": self._hva, "size": size, "owner": flag})

    @property
    def gone(self) -> bool:
        """Did its memory vanish?"""
        return bool(self._owner[0])

    @property
    def skipped(self) -> int:
        """How often a page was to be marked that lies beyond the log: the front-end made it too small."""
        return self.handle.skipped

    def marked(self) -> set[int]:
        """The pages that are marked now. Raises MemoryGone."""
        bits = ffi.new("uint8_t[]", self.size)
        n = lib.pieces_read(ffi.new("struct piece *", (self._hva, self.size)), 1, 0, bits, self.size)
        if n < 0:
            raise error(lib.RING_E_LOG_GONE)
        return {8 * byte.start() + bit for byte in re.finditer(rb"[^\0]", ffi.buffer(bits))
                for bit in range(8) if byte[0][0] >> bit & 1}
