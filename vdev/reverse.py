"""The back-end's own requests to the front-end, over what came with SET_BACKEND_REQ_FD.

Theory of operation. Nothing here waits for the front-end: while it handles a request of ours, QEMU sends requests of
its own and waits for our answers. A request that wants an answer is sent with need_reply, and what is to be done with
the answer is kept; answers come in the order of the requests (vhost-user, "Back-end communication").

The channel belongs to a device and outlives sessions, so that the control loop can watch one descriptor, an epoll
instance, for as long as the device is there; the channel of a session is a member of it, and so is what has to be
looked at before something is sent. The channel may be the writing end of a pipe: requests go out, and no answer can
come.
"""

import logging
import os
import select
import socket
import stat
from collections import deque
from collections.abc import Callable

from vdev.logs import EventLog
from vhost_user.codec import encode
from vhost_user.errors import Close, Disconnected, PeerError, Refused
from vhost_user.spec import BackendRequest
from vhost_user.transport import Pipe, Transport
from vhost_user.wire import U64_LAYOUT

Answered = Callable[[bool], None]  # told whether the front-end did what was asked
WAITING_MAX = 4096  # answers outstanding; there are fewer, unless the front-end does not answer at all

SYSCALLS = {
    "epoll_ctl": "a channel comes and goes",
    "fstat": "what kind of channel it is",
    "write": "requests, where it is a pipe",
}


class ReverseChannel:
    """Requests to the front-end of the present session, if it gave a channel."""

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._epoll = select.epoll()
        self._peer: Transport | Pipe | None = None
        self._waiting: deque[tuple[BackendRequest, Answered]] = deque()
        self._watched: dict[int, Callable[[], None]] = {}

    @property
    def watch_fd(self) -> int:
        """Readable when :meth:`on_ready` is due."""
        return self._epoll.fileno()

    def fileno(self) -> int:
        """The channel's descriptor; -1: there is none."""
        return -1 if self._peer is None else self._peer.fileno()

    @property
    def open(self) -> bool:
        """Is there a channel?"""
        return self._peer is not None

    @property
    def answers(self) -> bool:
        """Can an answer come back?"""
        return isinstance(self._peer, Transport)

    @staticmethod
    def suits(fd: int) -> bool:
        """Can ``fd`` be a channel? Writing to anything but a socket or a pipe could take for ever."""
        mode = os.fstat(fd).st_mode
        return stat.S_ISSOCK(mode) or stat.S_ISFIFO(mode)

    def adopt(self, fd: int) -> None:
        """Use ``fd``, which suits and is from now on ours, in place of the channel there was; answers due on that one
        never come."""
        self.drop()
        if stat.S_ISSOCK(os.fstat(fd).st_mode):
            self._peer = Transport(socket.socket(fileno=fd), replies=True)
            self._epoll.register(self._peer.fileno(), select.EPOLLIN)
        else:
            self._peer = Pipe(fd)

    def send(self, request: BackendRequest, payload: bytes, answered: Answered | None = None) -> bool:
        """Send a request -> was it sent? answered: asks for an answer (where :attr:`answers`), and gets it."""
        if self._peer is None or len(self._waiting) >= WAITING_MAX:
            return False
        asked = answered is not None and self.answers
        try:
            self._peer.send(encode(request, payload, need_reply=asked))
        except (PeerError, OSError) as error:
            self._give_up(error)
            return False
        if asked:
            self._waiting.append((request, answered))
        return True

    def watch(self, fd: int, signalled: Callable[[], None], *, edges: bool = False) -> None:
        """Call ``signalled`` once when ``fd`` is readable, and once more after each :meth:`rearm`; with ``edges``
        whenever it was signalled, without its being read."""
        self._epoll.register(fd, select.EPOLLIN | (select.EPOLLET if edges else select.EPOLLONESHOT))
        self._watched[fd] = signalled

    def rearm(self, fd: int) -> None:
        """Look at ``fd``, which is watched, again."""
        self._epoll.modify(fd, select.EPOLLIN | select.EPOLLONESHOT)

    def unwatch(self, fd: int) -> None:
        """Forget ``fd``, which is watched and must not be closed yet."""
        self._epoll.unregister(fd)
        del self._watched[fd]

    def on_ready(self) -> None:
        """Take the answers that are there, and look at what was signalled."""
        for fd, _ in self._epoll.poll(0):
            if fd == self.fileno():
                self._take_answers()
            elif fd in self._watched:  # not taken away by what was done before it
                self._watched[fd]()

    def _take_answers(self) -> None:
        try:
            for message in self._peer.turn():
                with message.fds:
                    self._take(message.request, message.payload)
        except (PeerError, Refused, OSError) as error:  # OSError: the socket is of another kind, or not connected
            self._give_up(error)

    def _take(self, number: int, payload: bytes) -> None:
        if not self._waiting or self._waiting[0][0] != number:
            raise Close(f"an answer to back-end request {number} came where none was due (vhost-user \"Back-end "
                        "communication\"); the front-end must answer in order")
        value = U64_LAYOUT.decode(payload).value
        self._waiting.popleft()[1](value == 0)

    def _give_up(self, error: Exception) -> None:
        self.drop()
        # The end of the session comes with it as a rule, and has a line of its own.
        level = logging.DEBUG if isinstance(error, Disconnected) else logging.WARNING
        self._log.peer(level, "channel-closed", f"the back-end's channel to the front-end is closed: {error}")

    def drop(self) -> None:
        """Close the channel, if there is one."""
        if self._peer is None:
            return
        if self.answers:
            self._epoll.unregister(self._peer.fileno())
        self._peer.close()
        self._peer = None
        self._waiting.clear()

    def close(self) -> None:
        """Close everything."""
        self.drop()
        self._epoll.close()
