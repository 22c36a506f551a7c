"""Where a device's journal lies: in the runtime directory, under a name that its socket gives it.

A vdev that is started again has the same socket path, and so finds what its predecessor wrote (ring/journal.py).
"""

import hashlib
import os
import socket

from ring.journal import Journal, JournalError
from vdev.config import DeviceConfig
from vdev.logs import EventLog


def no_journal(reason: JournalError) -> str:
    """What it means that there is no journal, for the operator."""
    return (f"no journal: {reason}; a guest with packed rings loses its network if vdev is killed and restarted "
            "(split rings do not need it)")


def journal_path(socket_path: str) -> str:
    """The journal of the device on ``socket_path``: in systemd's RUNTIME_DIRECTORY, in ``vdev`` below
    XDG_RUNTIME_DIR, or beside the socket."""
    path = os.path.abspath(socket_path)
    for folder in (os.environ.get("RUNTIME_DIRECTORY", "").split(":")[0], _users_folder()):
        if folder:
            # Of two sockets with one name in two directories each has its own.
            mark = hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
            return os.path.join(folder, f"{os.path.basename(path)}.{mark}.journal")
    return path + ".journal"


def _users_folder() -> str | None:
    base = os.environ.get("XDG_RUNTIME_DIR")
    if not base or not os.access(base, os.W_OK):
        return None
    folder = os.path.join(base, "vdev")
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
    except OSError:
        return None
    return folder


def _socket_path(config: DeviceConfig) -> str | None:
    """The path of the device's socket; of one that was inherited, where somebody bound it, if anywhere."""
    if config.fd is None:
        return config.socket_path
    with socket.socket(fileno=os.dup(config.fd)) as inherited:
        names = [inherited.getsockname()]
        if not inherited.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            names.append(inherited.getpeername())
    return next((name for name in names if isinstance(name, str) and name), None)


def open_journal(config: DeviceConfig, log: EventLog) -> Journal | None:
    """The journal of a device whose number of queue pairs is settled. None, with a line in ``log``, where it cannot be
    had; None for a socket without a path, as there is nothing to find it again by."""
    path = _socket_path(config)
    if path is None:
        return None
    try:
        return Journal(journal_path(path), 2 * config.queue_pairs + (config.personality == "full"))
    except JournalError as reason:
        log.warning("no-journal", no_journal(reason))
        return None
