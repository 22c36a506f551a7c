"""Where a device's connections come from: a listening socket, a socket to connect to, or one passed on.

A source hands each connection to ``deliver`` (a non-blocking socket, from then on the receiver's) and is told
by ``vacant`` when the device has none any more. ``ends`` is True for a source that has no second connection
to give. Listening sockets and the one passed on are the daemon's to close.
"""

import logging
import socket
import time
from collections.abc import Callable
from typing import Protocol

from vdev.listen import Listener
from vdev.logs import EventLog
from vdev.loop import Loop, Timer

Deliver = Callable[[socket.socket], None]

ACCEPT_PAUSE = 0.5  # seconds

RETRY_FIRST = 0.001  # seconds; a VMM that restarts is back within milliseconds
RETRY_LAST = 1.0
# A connection shorter than this does not count as success: a peer that accepts and closes is not hammered.
SETTLED = 1.0

# Of a client, which connects again and again.
SYSCALLS = {
    f"socket[0] == {socket.AF_UNIX}": "a socket to connect with",
    "connect": "to the path where the front-end listens",
}


class Source(Protocol):
    """What a service needs of where its connections come from. ``ends``: there is only one to give."""

    ends: bool

    def open(self, deliver: Deliver) -> None:
        """Begin to give connections."""

    def resume(self, deliver: Deliver) -> None:
        """The same for a device that has one, from a process before this one."""

    def vacant(self) -> None:
        """The device is free for another connection."""

    def close(self) -> None:
        """Give no more."""


class Inherited:
    """One connected socket, passed on by whoever started us."""

    ends = True

    def __init__(self, connection: socket.socket):
        self._connection = connection

    def open(self, deliver: Deliver) -> None:
        deliver(self._connection)

    def resume(self, deliver: Deliver) -> None:
        pass

    def vacant(self) -> None:
        pass

    def close(self) -> None:
        pass


class Accepting:
    """Connections to a listening socket. While the process has no descriptor left, accepting pauses and
    everything else goes on."""

    ends = False

    def __init__(self, listener: Listener, loop: Loop, log: EventLog):
        self._listener = listener
        self._loop = loop
        self._log = log
        self._pause: Timer | None = None

    def open(self, deliver: Deliver) -> None:
        self._deliver = deliver
        self._loop.watch(self._listener.fileno(), self._accept)

    resume = open

    def vacant(self) -> None:
        pass

    def _accept(self) -> None:
        try:
            connection = self._listener.accept()
        except OSError as error:
            # Out of descriptors or memory: it passes, but not by asking again at once.
            self._loop.unwatch(self._listener.fileno())
            self._pause = self._loop.call_later(ACCEPT_PAUSE, lambda: self.open(self._deliver))
            self._log.peer(logging.WARNING, "accept-paused",
                           f"cannot accept a connection: {error.strerror}; trying again in {ACCEPT_PAUSE} s "
                           "(raise the limit with ulimit -n)", reason=error.strerror)
            return
        if connection is not None:
            self._deliver(connection)

    def close(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
        self._loop.unwatch(self._listener.fileno())


def connect(path: str) -> socket.socket:
    """A non-blocking connection to the Unix stream socket at ``path``. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.connect(path)
    except BaseException:
        sock.close()
        raise
    return sock


class Connecting:
    """Connections we make to a socket on which the front-end listens: for ever, soon at first, then every
    RETRY_LAST seconds."""

    ends = False

    def __init__(self, path: str, loop: Loop, log: EventLog):
        self._path = path
        self._loop = loop
        self._log = log
        self._delay = RETRY_FIRST
        self._connected_at = 0.0
        self._reason: str | None = None  # why the last attempt failed
        self._retry: Timer | None = None

    def open(self, deliver: Deliver) -> None:
        self._deliver = deliver
        self._connect()

    def resume(self, deliver: Deliver) -> None:
        self._deliver = deliver
        self._connected_at = time.monotonic()

    def vacant(self) -> None:
        if time.monotonic() - self._connected_at >= SETTLED:
            self._delay = RETRY_FIRST
        self._later()

    def _later(self) -> None:
        self._retry = self._loop.call_later(self._delay, self._connect)
        self._delay = min(2 * self._delay, RETRY_LAST)

    def _connect(self) -> None:
        try:
            sock = connect(self._path)
        except OSError as error:
            if error.strerror != self._reason:
                self._log.peer(logging.INFO, "connect-waiting",
                               f"waiting for a front-end that listens on {self._path}: {error.strerror}",
                               path=self._path, reason=error.strerror)
            self._reason = error.strerror
            self._later()
            return
        self._reason = None
        self._connected_at = time.monotonic()
        self._deliver(sock)

    def close(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
