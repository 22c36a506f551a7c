"""Ownership of the file descriptors that come with messages.

A descriptor received is a resource the peer spends from our table, so each one belongs to exactly one
object from the moment recvmsg() returns. Whoever wants to keep it takes it out; the rest is closed.
"""

import contextlib
import errno
import os
import select
import warnings
from collections.abc import Iterable

# What that takes (the sandbox of whoever serves a socket collects these): call, reason.
SYSCALLS = {
    "readlink": "is a descriptor that arrived an eventfd",
    "readlinkat": "the same, on machines without readlink",
    "poll": "can a descriptor that arrived be written without waiting",
    "ppoll": "the same, on machines without poll",
}


def is_eventfd(fd: int) -> bool:
    """Is ``fd``, which is open, an eventfd?"""
    return os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[eventfd]"


def ready(fd: int, events: int) -> bool:
    """Is ``fd`` ready for one of ``events`` (select.POLLIN, POLLOUT) this very moment?"""
    poll = select.poll()
    poll.register(fd, events)
    return any(happened & events for _, happened in poll.poll(0))


def signal(fd: int) -> None:
    """Signal an eventfd or pipe without blocking on its other side, which can clear O_NONBLOCK and fill it: a full
    counter is a delivered signal."""
    if ready(fd, select.POLLOUT):
        with contextlib.suppress(OSError):
            os.write(fd, (1).to_bytes(8, "little"))


class OwnedFds:
    """A short list of open descriptors with one owner.

    ``fds[i]`` lends a number, :meth:`take` gives the ownership away, :meth:`close` closes what is left.
    """

    __slots__ = ("_fds",)

    def __init__(self, fds: Iterable[int] = ()) -> None:
        self._fds = list(fds)

    def __len__(self) -> int:
        return len(self._fds)

    def __getitem__(self, position: int) -> int:
        """The number of the descriptor at ``position``, still owned by this object. Raises IndexError."""
        return self._fds[position]

    def __repr__(self) -> str:
        return f"OwnedFds({self._fds})"

    def take(self) -> int:
        """Transfer the first descriptor to the caller, who must close it. Raises IndexError without one."""
        return self._fds.pop(0)

    def take_all(self) -> list[int]:
        """Transfer all descriptors to the caller, in the order of their arrival."""
        taken, self._fds = self._fds, []
        return taken

    def close(self) -> None:
        """Close what is still owned. May be called any number of times."""
        for fd in self.take_all():
            try:
                os.close(fd)
            except OSError as error:
                # Linux releases the number whatever the file behind it answers (EIO, EDQUOT, ...), and
                # that file is the peer's. Only EBADF would be a mistake of ours.
                if error.errno == errno.EBADF:
                    raise

    def __enter__(self) -> "OwnedFds":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if self._fds:
            warnings.warn(f"descriptors never taken nor closed: {self._fds}", ResourceWarning, stacklevel=2)
            self.close()
