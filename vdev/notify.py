"""Telling whoever started us that we are ready, and taking the sockets that a service manager passes.

Sources: sd_notify(3), sd_listen_fds(3); both protocols are meant to be implemented anew.
"""

import contextlib
import fcntl
import os
import socket

from vdev.errors import Failure, Misuse

LISTEN_FDS_START = 3

SYSCALLS = {
    f"socket[0] == {socket.AF_UNIX}": "to the service manager",
    "connect": "the same",
    "sendto": "READY and STOPPING",
}


def passed_fds() -> list[int]:
    """The descriptors a service manager passed to this very process; the variables are removed.

    Raises Misuse when LISTEN_FDS is not a number.
    """
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    # Another process's variables, inherited by accident, are not for us.
    if pid != str(os.getpid()):
        return []
    if not count.isdecimal():
        raise Misuse(f"LISTEN_FDS={count} is not a number; the service manager sets it, nobody else should")
    fds = list(range(LISTEN_FDS_START, LISTEN_FDS_START + int(count)))
    for fd in fds:
        with contextlib.suppress(OSError):  # one that is not open is named when its device takes it
            os.set_inheritable(fd, False)
    return fds


def tell_manager(state: str) -> None:
    """Send ``state`` (e.g. ``READY=1``) to the service manager, if there is one.

    Raises OSError when the manager's socket cannot be reached.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if address[0] == "@":
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.connect(address)
        sock.send(state.encode())


def is_abstract() -> bool:
    """Does the service manager listen on an abstract name, which is not in the file system?"""
    return os.environ.get("NOTIFY_SOCKET", "").startswith("@")


def check_ready_fd(fd: int) -> None:
    """Raise Failure unless ``fd`` is open for writing."""
    try:
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    except OSError:
        raise Failure(f"--ready-fd {fd}: descriptor {fd} is not open; whoever starts vdev must pass it on"
                      ) from None
    if flags & os.O_ACCMODE == os.O_RDONLY:
        raise Failure(f"--ready-fd {fd}: descriptor {fd} is open for reading only; pass the writing end")


def write_ready_fd(fd: int) -> None:
    """Write ``READY\\n`` to ``fd`` and close it. Whoever waited may be gone by now: that is no error."""
    with contextlib.suppress(OSError):
        os.write(fd, b"READY\n")
    # 0, 1 and 2 keep existing for as long as the program does (vhost-user, "Backend program conventions").
    if fd > 2:
        os.close(fd)
