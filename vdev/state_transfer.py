"""The device's state through a pipe of the front-end: never waiting for it, and with an end.

Theory of operation. SET_DEVICE_STATE_FD brings a pipe. To save, the state is written and the pipe closed; to load, it
is read to its end and taken over. CHECK_DEVICE_STATE, which the front-end sends when it is done with the pipe, is
answered with the outcome. (vhost-user, "Migrating back-end state".)

The control loop must never wait for a pipe, and O_NONBLOCK is no help: it belongs to the open file, which the
front-end has too and can change at any moment. splice() with SPLICE_F_NONBLOCK does not wait whatever that flag says,
but moves bytes only between pipes; so there is a pipe of our own in between. A state usually fits into the pipe at
once. What does not is tried again every few milliseconds, for as long as TRANSFER_SECONDS.
"""

import os
import stat
import time
from collections.abc import Callable

from vdev.device_state import BYTES_MAX, StateError

TRANSFER_SECONDS = 5.0
RETRY_SECONDS = 0.005
_CHUNK = 1 << 16

SYSCALLS = {
    "pipe2": "a pipe of our own, which never blocks",
    "splice": "between theirs and ours",
}


class Transfer:
    """One state on its way through pipe ``fd``, which it owns from now on. Raises StateError if it is no pipe.

    data: what is to be written; None: to read. done: called with what was read, when all of it was; it may raise
    StateError. ``finished``: it is over; ``failure``: why it is no good; ``deadline``: when :meth:`advance` is due
    (``time.monotonic``), None when it is over; ``saving``: it is written.
    """

    def __init__(self, fd: int, data: bytes | None, done: Callable[[bytes], None] = lambda data: None) -> None:
        self.failure: str | None = None
        self.finished = False
        self.deadline: float | None = None
        self.saving = data is not None
        self._fds = [fd]
        self._until = time.monotonic() + TRANSFER_SECONDS
        self._bytes = bytearray(data or b"")
        self._between = 0  # bytes in our own pipe
        self._done = done
        if not stat.S_ISFIFO(os.fstat(fd).st_mode):
            self.close()
            raise StateError("the descriptor is no pipe; the front-end must send one end of a pipe")
        try:
            self._fds += os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            self.close()
            raise
        self.advance()

    def advance(self) -> None:
        """Move what can be moved now."""
        if self.finished:
            return
        self.deadline = time.monotonic() + RETRY_SECONDS
        try:
            if self._write() if self.saving else self._read():
                self._end(None)
            elif time.monotonic() > self._until:
                self._end(f"it was not over after {TRANSFER_SECONDS:g} s; the front-end must "
                          + ("read to the end" if self.saving else "close its end when all is written"))
        except StateError as reason:
            self._end(str(reason))
        except OSError as error:
            self._end(f"the pipe failed: {os.strerror(error.errno).lower()}")

    def _write(self) -> bool:
        theirs, near, far = self._fds
        while self._bytes or self._between:
            try:
                sent = os.write(far, self._bytes[:_CHUNK]) if self._bytes else 0
                del self._bytes[:sent]
                self._between += sent
            except BlockingIOError:
                pass  # our own pipe is full: go on with theirs
            try:
                self._between -= os.splice(near, theirs, _CHUNK, flags=os.SPLICE_F_NONBLOCK)
            except BlockingIOError:
                return False
        return True

    def _read(self) -> bool:
        theirs, near, far = self._fds
        while True:
            try:
                moved = os.splice(theirs, far, _CHUNK, flags=os.SPLICE_F_NONBLOCK)
            except BlockingIOError:
                return False
            if not moved:
                self._done(bytes(self._bytes))
                return True
            self._bytes += os.read(near, moved)
            if len(self._bytes) > BYTES_MAX:
                raise StateError(f"it is longer than {BYTES_MAX} bytes, the most a state of vdev has")

    def _end(self, failure: str | None) -> None:
        self.failure = failure
        self.finished = True
        self.deadline = None
        self.close()

    def close(self) -> None:
        """Close the pipe, which tells the front-end that it is over. May be called again."""
        while self._fds:
            os.close(self._fds.pop())
