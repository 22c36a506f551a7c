"""Root's rights one by one (capabilities(7)): giving up those that are not needed any more."""

import ctypes
from collections.abc import Iterable

from vdev.syscalls import checked, libc

NET_ADMIN = 12

_VERSION_3 = 0x20080522  # linux/capability.h
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4


def _sets() -> tuple[int, int, int]:
    """(effective, permitted, inheritable) of this thread as masks."""
    data = (ctypes.c_uint32 * 6)()
    checked(libc.capget((ctypes.c_uint32 * 2)(_VERSION_3, 0), data))
    return data[0] | data[3] << 32, data[1] | data[4] << 32, data[2] | data[5] << 32


def effective() -> frozenset[int]:
    """The capabilities this thread can use now."""
    mask = _sets()[0]
    return frozenset(bit for bit in range(64) if mask >> bit & 1)


def keep_only(kept: Iterable[int]) -> None:
    """Lose every capability but ``kept``, of which those are left that this thread has; for good.

    The user stays who it is. Raises OSError.
    """
    mask = sum(1 << bit for bit in effective().intersection(kept))
    if _sets() == (mask, mask, 0):
        return  # a service manager may have forbidden the calls below, having seen to it itself
    low, high = mask & 0xFFFFFFFF, mask >> 32
    header = (ctypes.c_uint32 * 2)(_VERSION_3, 0)
    checked(libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0))
    # effective, permitted, inheritable; the lower 32 capabilities first
    checked(libc.capset(header, (ctypes.c_uint32 * 6)(low, low, 0, high, high, 0)))
