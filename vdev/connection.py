"""One front-end's connection: messages in, effects on the device, answers out.

The way of a message: ``Transport.turn`` -> ``Session.accept`` -> ``Backend.handle`` -> ``Session.answer``
-> ``Transport.send``. Everything that ends the connection leaves here as a PeerError.
"""

import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ring.errors import MemoryGone
from ring.pump import LaneEvent
from vdev import backend_handover
from vdev.backend import Backend
from vdev.backend_handover import BackendPart
from vdev.dirty_log import GONE
from vdev.engine import EnginePart, EngineStuck
from vdev.handover import Put, Take
from vhost_user.codec import Begun, Message
from vhost_user.errors import Close, Disconnected, Nack
from vhost_user.session import Session
from vhost_user.spec import Request
from vhost_user.state import Notifier, Offer, Postcopy, State
from vhost_user.transport import Transport

if TYPE_CHECKING:
    from vdev.lint.linter import Linter

# A ring asked for its base while others run is started again, but not before the front-end had time to stop
# the others too: then it was a real stop. A kick tells that the driver goes on, so that little time is enough;
# a driver that only waits for frames does not kick, and silence of the front-end has to do.
RESUME_DELAY_KICKED = 0.02  # seconds
RESUME_DELAY_QUIET = 1.0
PORT_RETRY = 1.0  # seconds between attempts to get a lost port back

_VANISHED = ("guest memory vanished: the front-end truncated its file, or the file system behind it ran out of room; "
             "give QEMU memory-backend-memfd, and enough of it")


@dataclass(frozen=True)
class ConnectionPart:
    """A connection as it is handed on. Times are those of ``time.monotonic``, which all processes share."""

    begun: Begun
    deadline: float | None
    opened: bool  # the first message has come
    offer: Offer
    state: State
    resume_at: float | None
    port_retry_at: float | None
    backend: BackendPart


class Connection:
    """A session in progress. All methods but close, export and let_go raise PeerError when it is over."""

    def __init__(self, sock: socket.socket, backend_of, offer: Callable[[int], Offer], log, state: State | None = None,
                 opening: int = Request.GET_FEATURES, linter: "Linter | None" = None):
        """offer: what to offer a front-end whose first message is the request with this number. state: what was agreed
        on so far, over a connection that another process had, which was offered as to ``opening``; see :meth:`adopt`.
        linter: what looks at the messages, too.
        """
        self._transport = Transport(sock)
        self._session = Session(offer(opening), state)
        self._offer: Callable[[int], Offer] | None = offer  # None: the first message has come
        self._backend: Backend = backend_of(self._session)
        self._log = log
        self._resume_at: float | None = None
        self._port_retry_at: float | None = None
        self._linter = linter

    def fileno(self) -> int:
        """The socket, to be watched for reading."""
        return self._transport.fileno()

    @property
    def deadline(self) -> float | None:
        """When :meth:`on_deadline` is due (``time.monotonic``); None: nothing is pending."""
        pending = [when for when in (self._transport.deadline, self._resume_at, self._port_retry_at,
                                     self._backend.state.deadline, self._backend.commands_due,
                                     self._linter and self._linter.deadline) if when is not None]
        return min(pending, default=None)

    def on_readable(self) -> None:
        """Serve the messages that are there, a bounded number of them."""
        try:
            for message in self._transport.turn():
                self._serve(message)
        except Disconnected as end:
            raise Disconnected(f"{end}{self._left_early()}") from None
        self._resume_at = time.monotonic() + RESUME_DELAY_QUIET if self._backend.rings.parked else None

    def _left_early(self) -> str:
        """What it probably means when a front-end leaves so soon. One whose guest was reset, or has no driver yet,
        enables a ring before anything else."""
        state = self._session.state
        if state.features or any(ring.enabled or ring.call is Notifier.UNSET for ring in state.rings[:2]):
            return ""
        return (" after it saw what is offered: QEMU does that, again and again, when the guest's driver uses a "
                "feature that is missing; start vdev with the port, --queue-pairs and --features it had before")

    def _serve(self, message: Message) -> None:
        if self._offer is not None:
            self._session.offer_instead(self._offer(message.request))
            self._offer = None
        if self._linter is not None:
            try:
                self._linter.message(self._session, message)
            except Close:
                message.fds.close()
                raise
        try:
            request = self._session.accept(message)
            try:
                result = self._backend.handle(request)
            except EngineStuck as stuck:
                request.fds.close()
                raise Close(f"{request}: {stuck}; closing") from None
            except MemoryGone:
                request.fds.close()
                raise Close(f"{request}: {_VANISHED}") from None
            reply = self._session.answer(request, result)
            fds = result.fds
        except Nack as no:
            self._log.peer(logging.WARNING, "refused-request", str(no))
            reply, fds = no.reply, ()
        if reply is not None:
            self._transport.send(reply, fds)

    def on_deadline(self) -> None:
        """Something is due: half a message, a parked ring, a lost port, the device's state."""
        self._transport.expire()
        self._backend.state.advance()
        if self._linter is not None:
            self._linter.on_deadline()
        now = time.monotonic()
        due = self._backend.commands_due
        if due is not None and now >= due:
            self._guarded(self._backend.control.serve)
        if self._resume_at is not None and now >= self._resume_at:
            self._resume_at = None
            if self._backend.rings.parked:
                self._guarded(self._backend.rings.resume_parked)
        if self._port_retry_at is not None and now >= self._port_retry_at:
            self._port_retry_at = None
            self._recover_port()

    def on_answers(self) -> None:
        """The front-end answered requests of ours."""
        self._guarded(self._backend.reverse.on_ready)

    def on_news(self, events: LaneEvent) -> None:
        """A worker reported something."""
        if self._backend.engine.lost_worker:
            self._guarded(self._backend.engine.refresh)
        if events & LaneEvent.LOG_GONE:
            raise Close(GONE)
        if events & LaneEvent.MEMORY_GONE:
            raise Close(_VANISHED)
        if events & (LaneEvent.FROM_GUEST_BROKEN | LaneEvent.TO_GUEST_BROKEN):
            self._backend.rings.report_broken()
        if events & LaneEvent.MISS:
            self._guarded(self._backend.translations_missing)
        if events & LaneEvent.DENIED:
            self._backend.access_denied()
        if events & LaneEvent.KICKED and self._resume_at is not None:
            self._resume_at = min(self._resume_at, time.monotonic() + RESUME_DELAY_KICKED)
        if events & LaneEvent.PORT_GONE and self._port_retry_at is None:
            self._log.peer(logging.WARNING, "port-gone", f"{self._backend.port} is gone: frames are dropped until it is"
                           " back; was the interface deleted?")
            self._recover_port()

    def set_link(self, up: bool) -> None:
        """The operator has switched the link, of a device whose configuration space is ours."""
        self._backend.config.change(link_up=up)

    def _recover_port(self) -> None:
        port = self._backend.port
        if not port.lost():
            self._port_retry_at = time.monotonic() + PORT_RETRY
            return
        self._guarded(self._backend.engine.refresh)
        self._log.info("port-back", f"{port} is back")

    @staticmethod
    def _guarded(action) -> None:
        try:
            action()
        except EngineStuck as stuck:
            raise Close(f"{stuck}; closing") from None
        except MemoryGone:
            raise Close(_VANISHED) from None

    def export(self, put: Put) -> ConnectionPart:
        """What another process needs to go on with this session. Raises HandoverError."""
        begun = self._transport.begun
        begun = replace(begun, fds=tuple(map(put, begun.fds)))
        # A log that is not written to is left behind, the next migration begins with one of its own; and so is postcopy
        # that was announced and never came.
        state = replace(self._session.state, log=None, postcopy=Postcopy.OFF)
        return ConnectionPart(begun, self._transport.deadline, self._offer is None, self._session.offer, state,
                              self._resume_at, self._port_retry_at, backend_handover.export(self._backend, put))

    def adopt(self, part: ConnectionPart, engine: EnginePart, take: Take) -> None:
        """Be what another process exported; socket and state are those of the constructor. Raises SetupError,
        HandoverError, ValueError, Close."""
        self._transport.go_on(replace(part.begun, fds=tuple(map(take, part.begun.fds))), part.deadline)
        if part.opened:
            self._offer = None
        self._resume_at, self._port_retry_at = part.resume_at, part.port_retry_at
        backend_handover.adopt(self._backend, part.backend, engine, take)

    def let_go(self) -> None:
        """Another process goes on with the session: give up what it consists of, and tell nobody."""
        self._backend.let_go()
        self._transport.close()

    def close(self) -> None:
        """Release everything that came over the connection, then the socket."""
        try:
            self._backend.close()
        finally:
            self._transport.close()
            if self._linter is not None:
                self._linter.session_over()
