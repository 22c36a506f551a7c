"""Kicks, calls and errors as messages, over one session (vhost-user, "In-band notifications").

Theory of operation. Workers know eventfds only. So a ring gets eventfds of ours for what the front-end has told no
descriptor for: VRING_KICK writes the ring's kick, and the control loop watches call and err and says over the
back-end's channel (vdev/reverse.py) that a worker has signalled one. What the front-end sets explicitly, a descriptor
or polling, is preferred.

A message over the channel asks for an acknowledgement, and until it is there the same eventfd only counts. So a
front-end that does not read has at most two messages for each ring on their way: nothing waits for it, and nothing
grows. What was not acknowledged when the channel is replaced is said again; a call too many does no harm.

The acknowledgement of VRING_KICK says that the worker was told, not that the ring was processed.
"""

import contextlib
import itertools
import logging
import os
from collections.abc import Iterable

from vdev.engine import Engine, ring_name
from vdev.logs import EventLog
from vdev.reverse import ReverseChannel
from vhost_user.spec import BackendRequest, ProtocolFeature
from vhost_user.state import Notifier, State
from vhost_user.wire import VRING_STATE, VringState

_SAID_BY = {"kick": None, "call": BackendRequest.VRING_CALL, "err": BackendRequest.VRING_ERR}

SYSCALLS = {
    "eventfd2": "descriptors in place of those that the front-end does not give",
    "read": "what a worker signalled",
    "write": "a kick that came as a message",
}


class InBand:
    """The eventfds of ours that stand in for messages. They belong to the rings of ``engine``, with whom they are
    closed."""

    def __init__(self, engine: Engine, reverse: ReverseChannel, log: EventLog) -> None:
        self._engine = engine
        self._reverse = reverse
        self._log = log
        self._own: dict[int, tuple[int, str]] = {}  # descriptor -> ring, and what it is to the ring
        self._asked: set[int] = set()  # said, and not acknowledged yet
        self._mute = False  # it was logged that there is no channel

    @staticmethod
    def on(state: State) -> bool:
        """Were messages agreed on?"""
        return state.has(ProtocolFeature.INBAND_NOTIFICATIONS)

    def wire(self, state: State, indices: Iterable[int]) -> None:
        """Give these rings, which are about to run, the descriptors they lack. Raises OSError."""
        if not self.on(state):
            return
        for index, which in itertools.product(indices, _SAID_BY):
            ring = self._engine.rings[index]
            if getattr(state.rings[index], which) is Notifier.UNSET and getattr(ring, which) < 0:
                fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                setattr(ring, which, fd)
                self._own[fd] = (index, which)
                if _SAID_BY[which] is not None:
                    self._reverse.watch(fd, lambda fd=fd: self._signalled(fd))

    def kick(self, index: int) -> None:
        """VRING_KICK came for ring ``index``. One that has not got our eventfd is kicked otherwise."""
        fd = self._engine.rings[index].kick
        if fd in self._own:
            os.eventfd_write(fd, 1)

    def _signalled(self, fd: int) -> None:
        """A worker signalled ``fd``, which is not watched now until :meth:`ReverseChannel.rearm`."""
        index, which = self._own[fd]
        if not self._reverse.open:
            self._say_mute(index)
            return
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(fd)
        self._asked.add(fd)
        request = _SAID_BY[which]
        payload = VRING_STATE.encode(VringState(index, 0))
        if self._reverse.send(request, payload, lambda done: self._answered(fd, done)) and not self._reverse.answers:
            self._answered(fd, True)

    def _say_mute(self, index: int) -> None:
        if not self._mute:
            self._mute = True
            self._log.peer(logging.WARNING, "no-channel", f"{ring_name(index)}: the driver cannot be told of used "
                           "buffers, as there is no channel for VRING_CALL; the front-end must send "
                           "SET_BACKEND_REQ_FD, or SET_VRING_CALL with an eventfd", ring=index)

    def _answered(self, fd: int, done: bool) -> None:
        if fd not in self._asked:
            return  # the front-end has set a descriptor in its place since
        self._asked.discard(fd)
        index, which = self._own[fd]
        if not done:
            self._log.peer(logging.WARNING, "refused-notification", f"{ring_name(index)}: the front-end refused "
                           f"{_SAID_BY[which].name}, so its driver may not have been told", ring=index)
        self._reverse.rearm(fd)

    def channel_changed(self) -> None:
        """There is another channel: what was not acknowledged over the last one is said over this."""
        for fd in self._asked:
            os.eventfd_write(fd, 1)
        self._asked.clear()
        for fd, (_, which) in self._own.items():
            if _SAID_BY[which] is not None:
                self._reverse.rearm(fd)

    def forget(self, fd: int) -> None:
        """``fd`` is about to be closed. Harmless when it is none of ours."""
        if fd in self._own:
            self._asked.discard(fd)
            _, which = self._own.pop(fd)
            if _SAID_BY[which] is not None:
                self._reverse.unwatch(fd)

    def drop(self) -> None:
        """Messages are no longer agreed on, and no ring runs: take the descriptors away. Raises EngineStuck."""
        if not self._own:
            return
        with self._engine.paused():
            for fd, (index, which) in list(self._own.items()):
                setattr(self._engine.rings[index], which, -1)
                self.forget(fd)
                os.close(fd)

    def close(self) -> None:
        """End of the session: look at nothing any more. The descriptors are closed with the others of their rings."""
        for fd in list(self._own):
            self.forget(fd)
