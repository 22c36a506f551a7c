"""The dirty log of one session: the memory a front-end shares for it, and which ring has to mark what.

A front-end that moves its guest to another host shares a log (SET_LOG_BASE), asks that all writes to buffers are
marked in it (SET_FEATURES with LOG_ALL) and those to each ring (SET_VRING_ADDR with its log flag), on rings that run;
when the migration fails it takes both back (vhost-user, "Migration"). What is marked, and in which order with the
write, is the business of ring/core/dirty.c.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from ring.dirty import DirtyLog
from vdev.engine import Marks
from vdev.logs import EventLog
from vdev.workers import leave_to_worker
from vhost_user.spec import ProtocolFeature, VirtioBit
from vhost_user.state import Offer, State

GONE = ("the memory of the dirty log vanished: the front-end truncated its file while it migrates the guest; what the "
        "device writes could not be marked any more, so the guest on the other host would be corrupt")


class SessionLog:
    """What one front-end shares to have writes marked in."""

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._current: DirtyLog | None = None
        self._told = "log-off"  # the last line of report
        self._explained = False

    @contextmanager
    def replaced(self, fd: int, size: int, offset: int) -> Iterator[None]:
        """SET_LOG_BASE: inside, rings are to be told of the new log; after it the old one is unmapped.

        What fails inside leaves the old one. Raises SetupError for a file that cannot be a log.
        """
        old, self._current = self._current, DirtyLog(fd, size, offset)
        try:
            yield
        except BaseException:
            self._current.close()
            self._current = old
            raise
        self._retire(old)

    @property
    def on(self) -> bool:
        """The front-end wants writes to be logged."""
        return self._told != "log-off"

    def marks(self, state: State, index: int) -> Marks | None:
        """What ring ``index`` marks in ``state``, in which it may run."""
        buffers, ring = state.logs_buffers, state.logs_ring(index)
        if self._current is None or not (buffers or ring):
            return None
        return Marks(self._current, buffers, state.rings[index].addr.log if ring else None)

    def report(self, state: State) -> None:
        """A line when marking begins and when it ends; and one when rings wait for a log."""
        wanted = state.logs_buffers or any(state.logs_ring(index) for index in range(len(state.rings)))
        event = "log-off" if not wanted else "log-missing" if state.log is None else "log-on"
        if event == self._told:
            return
        self._told = event
        if event == "log-off":
            self._log.peer(logging.INFO, event, "writes to guest memory are no longer logged")
        elif event == "log-missing":
            self._log.peer(logging.INFO, event, "the front-end asks for writes to be logged (LOG_ALL) and has "
                           "shared no log: the rings wait for it (SET_LOG_BASE), so that no write is missed")
        else:
            self._log.peer(logging.INFO, event, "writes to guest memory are logged from now on: the front-end "
                           f"migrates the guest (the log has {state.log.size} bytes)", log_bytes=state.log.size)

    def explain(self, offer: Offer, protocol_features: int) -> None:
        """One line a session where the front-end will refuse to migrate, which it does without telling us."""
        if self._explained:
            return
        if not offer.features >> VirtioBit.LOG_ALL & 1:
            why = ("the dirty log was taken out of the offer, so the front-end refuses (QEMU: \"Migration disabled: "
                   'vhost-user backend lacks VHOST_USER_PROTOCOL_F_LOG_SHMFD feature"); start vdev without --features '
                   "-log_all")
        elif not protocol_features >> ProtocolFeature.LOG_SHMFD & 1:
            why = "the front-end did not take LOG_SHMFD, without which it cannot learn what the device writes"
        else:
            return
        self._explained = True
        self._log.info("no-migration", f"this guest cannot be migrated: {why}")

    def _retire(self, log: DirtyLog | None) -> None:
        if log is None:
            return
        if log.skipped:
            self._log.peer(logging.WARNING, "log-too-small", f"{log.skipped} times a page was written that lies beyond "
                           f"the {log.size} bytes of the dirty log; the front-end must share one with a bit for each "
                           "page of guest memory, and a guest migrated so far is corrupt", skipped=log.skipped)
        log.close()

    def close(self) -> None:
        """Unmap the log. No ring may be left."""
        self._retire(self._current)
        self._current = None

    def abandon(self) -> None:
        """Leave it mapped for good: a worker is stuck in it."""
        leave_to_worker(self._current)
        self._current = None
