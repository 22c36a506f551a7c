"""One device of the daemon, and the front-end it is serving.

Theory of operation
-------------------
A device has at most one connection. While it has one, a second is closed at once and shares nothing with the
first - unless the first has hung up and we merely have not read that far: a front-end that was killed and
comes back at once must not be refused for its own ghost.

A connection that never says anything was a probe (somebody asked whether the socket is alive). It is not a
session: it leaves no line above debug level and does not use up ``--one-off``.

Whatever goes wrong in a session ends that session only. The device's own teardown runs to its end before
the socket is closed, so that a front-end that sees the end of its connection finds everything released.
"""

import logging
import select
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from vdev import traffic
from vdev.handover import Put
from vdev.listen import peer_pid
from vdev.logs import EventLog
from vdev.loop import Callback, Loop, Timer
from vdev.ports.base import Needs, Port
from vdev.sources import Source
from vhost_user.errors import Disconnected, PeerError

SYSCALLS = {
    "recvfrom": "has a front-end said anything (MSG_PEEK)",
    "poll": "has it hung up",
    "ppoll": "the same, on machines without poll",
    "getsockopt": "which process it is",
}


@dataclass(frozen=True)
class SessionPart:
    """What a service hands on of its session, beside :attr:`Service.counters`. since: ``time.monotonic()`` of its
    start; heard: the front-end has said something."""

    socket: int
    since: float
    heard: bool


class Connection(Protocol):
    """A session in progress, as vdev/connection.py has it. All but close raise PeerError when it is over."""

    deadline: float | None  # time.monotonic() at which on_deadline is due

    def on_readable(self) -> None: ...

    def on_deadline(self) -> None: ...

    def let_go(self) -> None: ...

    def close(self) -> None: ...


class Device(Protocol):
    """A device, as vdev/device.py has it."""

    port: Port
    files: list[str]  # to be removed when it is closed
    needs: list[Needs]
    memory_files: int
    failed: bool  # a session was ended for what its driver did (--lint=strict)

    def start_workers(self) -> None: ...

    def set_link(self, up: bool) -> None: ...

    def open_session(self, sock: socket.socket) -> Connection: ...

    def watches(self) -> list[tuple[int, Callback]]: ...

    def stats(self) -> traffic.Reading: ...

    def close(self) -> None: ...


class _Session:
    """The connection a service has at present."""

    def __init__(self, sock: socket.socket, connection: Connection, counters: traffic.Reading):
        self.sock = sock
        self.fd = sock.fileno()
        self.connection = connection
        self.counters = counters
        self.pid = peer_pid(sock)
        self.since = time.monotonic()
        self.heard = False  # has the front-end said anything?
        self.timer: Timer | None = None


class Service:
    """Serves ``device`` to the connections of ``source``, one after the other.

    on_finished is called when no further session will come: the source has ended, or ``one_off`` was asked
    for and the first session is over.
    """

    def __init__(self, loop: Loop, device: Device, source: Source, log: EventLog, one_off: bool,
                 on_finished: Callable[[], None]):
        self._loop = loop
        self._device = device
        self._source = source
        self._log = log
        self._one_off = one_off
        self._on_finished = on_finished
        self._finished = False
        self._session: _Session | None = None
        self._watched: set[int] = set()

    def open(self) -> None:
        """Begin to serve; with the session that was adopted, if one was."""
        self._watch_device()
        if self._session is not None:
            self._watch_session()
            self._source.resume(self._connected)
        elif not self._finished:
            self._source.open(self._connected)

    def close(self) -> None:
        """Take no connection any more, and end the session if there is one. The device stays open."""
        self._finished = True
        self._source.close()
        if self._session is not None:
            self._end(logging.INFO, "vdev is ending")
        for fd in self._watched:
            self._loop.unwatch(fd)

    # ------------------------------------------------------------------------------ handing on

    @property
    def finished(self) -> bool:
        """No further session will come."""
        return self._finished

    @property
    def counters(self) -> traffic.Reading | None:
        """The device's counters at the start of the session; None without one."""
        return self._session.counters if self._session is not None else None

    @property
    def failed(self) -> bool:
        """A session was ended because its driver broke a rule (--lint=strict)."""
        return self._device.failed

    def export(self, put: Put) -> SessionPart | None:
        """What another process needs to go on with the session, beside its connection; None without one."""
        session = self._session
        return None if session is None else SessionPart(put(session.fd), session.since, session.heard)

    def adopt(self, part: SessionPart, sock: socket.socket, connection: Connection, counters: traffic.Reading) -> None:
        """Have the session that another process exported, when :meth:`open` is called."""
        self._session = _Session(sock, connection, counters)
        self._session.since, self._session.heard = part.since, part.heard

    def retire(self) -> None:
        """No session is to come any more."""
        self._finished = True

    def set_link(self, up: bool) -> None:
        """Have the guest's link go up or down; what goes wrong with it ends the session."""
        self._attempt(lambda: self._device.set_link(up))

    def abort(self, reason: str) -> None:
        """End the session, if there is one, for a reason of ours."""
        self._end(logging.WARNING, reason)

    def let_go(self) -> None:
        """Another process goes on with the session and takes the connections: give them up, and tell nobody."""
        session, self._session = self._session, None
        if session is not None:
            self._loop.unwatch(session.fd)
            session.connection.let_go()
            if session.timer is not None:
                session.timer.cancel()
        self._finished = True
        self._source.close()
        for fd in self._watched:
            self._loop.unwatch(fd)

    def _watch_device(self) -> None:
        """Watch what the device wants watched now; a session that went badly may have changed that."""
        wanted = dict(self._device.watches())
        for fd in self._watched - wanted.keys():
            self._loop.unwatch(fd)
        for fd in wanted.keys() - self._watched:
            self._loop.watch(fd, lambda callback=wanted[fd]: self._attempt(callback))
        self._watched = set(wanted)

    # ------------------------------------------------------------------------- a connection comes

    def _connected(self, sock: socket.socket) -> None:
        if self._session is not None and _hung_up(self._session.fd):
            self._end(logging.INFO, "the front-end closed the connection")
        if self._finished:
            sock.close()
            return
        if self._session is not None:
            self._refuse(sock)
            return
        try:
            connection = self._device.open_session(sock)
        except Exception as exception:
            sock.close()
            self._log.bug("session-failed", "opening a session", exception)
            self._vacant(used=False)
            return
        self._session = _Session(sock, connection, self._device.stats())
        self._watch_session()

    def _watch_session(self) -> None:
        self._loop.watch(self._session.fd, self._readable)
        self._rearm()

    def _refuse(self, sock: socket.socket) -> None:
        second, first = peer_pid(sock), self._session.pid
        sock.close()
        self._log.peer(logging.WARNING, "refused", f"refused a second connection, of process {second}: a "
                       f"device serves one front-end, now process {first}; use a --device for each",
                       peer_pid=second, connected_pid=first)

    # --------------------------------------------------------------------------- and says something

    def _readable(self) -> None:
        session = self._session
        if not session.heard:
            try:
                session.heard = bool(session.sock.recv(1, socket.MSG_PEEK))
            except BlockingIOError:
                return
            except OSError:
                pass  # reset: as good as closed
            if not session.heard:
                self._end(logging.DEBUG, "it said nothing")
                return
            self._log.peer(logging.INFO, "connect", f"front-end connected, process {session.pid}",
                           peer_pid=session.pid)
        self._attempt(session.connection.on_readable)

    def _on_deadline(self) -> None:
        self._attempt(self._session.connection.on_deadline)

    def _rearm(self) -> None:
        """Have the timer stand where the connection's deadline now is."""
        session = self._session
        if session is None:
            return
        deadline = session.connection.deadline
        if session.timer is not None:
            if session.timer.when == deadline:
                return
            session.timer.cancel()
        session.timer = None if deadline is None else self._loop.call_at(deadline, self._on_deadline)

    def _attempt(self, action: Callback) -> None:
        """Run something on behalf of the session; whatever it raises ends the session, and nothing else."""
        try:
            action()
        except Disconnected as end:
            self._end(logging.INFO, str(end))
        except PeerError as error:
            self._end(logging.WARNING, str(error))
        except Exception as exception:
            self._log.bug("session-failed", "serving a front-end", exception)
            self._end(logging.ERROR, "internal error")
        self._rearm()

    # ------------------------------------------------------------------------------- and leaves

    def _end(self, level: int, reason: str) -> None:
        """Tear the session down, if there is one, and say how it went."""
        session, self._session = self._session, None
        if session is None:
            return
        self._loop.unwatch(session.fd)
        if session.timer is not None:
            session.timer.cancel()
        try:
            session.connection.close()
        except Exception as exception:
            self._log.bug("session-failed", "closing a session", exception)
        session.sock.close()
        self._watch_device()
        counters = self._device.stats()
        counts = traffic.between(session.counters, counters)
        seconds = time.monotonic() - session.since
        self._log.peer(level, "session-end" if session.heard else "probe",
                       f"session over after {seconds:.1f} s: {reason}; {traffic.sentence(counts)}",
                       peer_pid=session.pid, reason=reason, seconds=round(seconds, 3),
                       **traffic.effort(session.counters, counters), **counts)
        self._vacant(used=session.heard)

    def _vacant(self, used: bool) -> None:
        if self._finished:
            return
        if self._source.ends or (self._one_off and used):
            self._finished = True
            self._on_finished()
        else:
            self._source.vacant()


def _hung_up(fd: int) -> bool:
    """Has the peer closed its end of ``fd``, whatever is still to be read?"""
    poll = select.poll()
    poll.register(fd, select.POLLRDHUP)
    return bool(poll.poll(0))
