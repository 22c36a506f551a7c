"""Landlock: this process gives up the file system, TCP and other processes (landlock(7)).

What is open stays open. The right is given up by the calling thread and all threads it makes from then on, and
cannot be taken back.
"""

import ctypes
import os
from collections.abc import Iterable

from vdev.syscalls import call

_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1
_REMOVE_FILE = 1 << 5  # LANDLOCK_ACCESS_FS_REMOVE_FILE: sockets too

# First version of the interface -> how many LANDLOCK_ACCESS_FS_* rights it knows
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 5: 16}
_TCP_SINCE, _TCP = 4, 0b11  # bind, connect
_SCOPES_SINCE, _SCOPE_ABSTRACT, _SCOPE_SIGNAL = 6, 1, 2


class _Ruleset(ctypes.Structure):
    """struct landlock_ruleset_attr"""

    _fields_ = (("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    """struct landlock_path_beneath_attr"""

    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("directory", ctypes.c_int32))


def version() -> int:
    """The version of the interface, from 1 on. Raises OSError: ENOSYS or EOPNOTSUPP where the kernel has none."""
    return call("landlock_create_ruleset", None, ctypes.c_size_t(0), _CREATE_RULESET_VERSION)


def restrict(removable: Iterable[str], abstract_sockets: bool) -> int:
    """Give up everything this kernel lets one give up, but for removing files in the directories ``removable``.

    abstract_sockets: sockets with abstract names, made by others, may still be reached. Needs no_new_privs.
    -> the version of the interface. Raises OSError.
    """
    known = version()
    rights = max(count for since, count in _FILE_RIGHTS.items() if known >= since)
    ruleset = _Ruleset((1 << rights) - 1, _TCP if known >= _TCP_SINCE else 0, 0)
    if known >= _SCOPES_SINCE:
        ruleset.scoped = _SCOPE_SIGNAL | (0 if abstract_sockets else _SCOPE_ABSTRACT)
    # An older kernel refuses fields it does not know unless they are zero: they are.
    fd = call("landlock_create_ruleset", ctypes.byref(ruleset), ctypes.c_size_t(ctypes.sizeof(ruleset)), 0)
    try:
        for path in removable:
            _allow_removal(fd, path)
        call("landlock_restrict_self", fd, 0)
    finally:
        os.close(fd)
    return known


def _allow_removal(ruleset: int, path: str) -> None:
    directory = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        rule = _PathBeneath(_REMOVE_FILE, directory)
        call("landlock_add_rule", ruleset, _RULE_PATH_BENEATH, ctypes.byref(rule), 0)
    finally:
        os.close(directory)
