"""The only code that touches a vhost-user socket.

Theory of operation. The socket is a stream; descriptors ride on its bytes as SCM_RIGHTS. A receiver that
asked for more than the current message could be handed the next message's descriptors, so each read asks
for exactly what the :class:`Decoder <vhost_user.codec.Decoder>` needs: 12 bytes, then the payload. Room for
descriptors is given on every read, so that one in the wrong place is seen and named rather than discarded
in silence; more than eight do not fit, which the kernel reports as MSG_CTRUNC.
Nothing blocks: a half message has a deadline, a reply that the peer does not read has one, and how much
is read in one turn of the control loop is bounded.
"""

import os
import select
import socket
import time
from array import array
from collections.abc import Callable, Iterable, Iterator

from .codec import Begun, Decoder, Message
from .errors import Close, Disconnected
from .fds import OwnedFds
from .spec import FDS_MAX

MESSAGE_DEADLINE = 5.0  # seconds from the first byte of a message to its last
SEND_DEADLINE = 0.2  # seconds a full socket buffer may hold up the control loop
MESSAGES_PER_TURN = 32  # messages read before others get their turn

# What a process that serves a socket must be able to do (the sandbox of whoever does collects these): call, reason.
SYSCALLS = {
    "recvmsg": "messages with their descriptors",
    "sendmsg": "answers",
    "poll": "a peer that does not read its answers",
    "ppoll": "the same, on machines without poll",
}

_FD_SIZE = array("i").itemsize
_FD_ROOM = socket.CMSG_LEN(FDS_MAX * _FD_SIZE)


class Transport:
    """Messages over a connected Unix stream socket, which this object owns from now on.

    ``replies`` says which direction is read, as for :class:`Decoder`. ``clock`` gives monotonic seconds.
    """

    def __init__(self, sock: socket.socket, *, replies: bool = False,
                 clock: Callable[[], float] = time.monotonic) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._decoder = Decoder(replies=replies)
        self._clock = clock
        self._deadline: float | None = None

    def fileno(self) -> int:
        """The socket's descriptor, to be watched for reading; -1 when closed."""
        return self._socket.fileno()

    @property
    def deadline(self) -> float | None:
        """The clock's time by which the message now begun must be complete, and :meth:`expire` is due. None
        while there is none."""
        return self._deadline

    @property
    def begun(self) -> Begun:
        """The message that is not all there yet; its descriptors stay this object's."""
        return self._decoder.begun

    def go_on(self, begun: Begun, deadline: float | None) -> None:
        """Go on where another Transport was on the same connection; the descriptors of ``begun`` are this object's from
        now on. Raises as :meth:`Decoder.go_on`."""
        self._decoder.go_on(begun)
        self._deadline = deadline

    def expire(self) -> None:
        """Raises Close if a message was begun and not completed by its deadline."""
        if self._deadline is not None and self._clock() >= self._deadline:
            raise Close(f"a message was begun and is not complete after {MESSAGE_DEADLINE:.0f} s (vhost-user "
                        '"Communication"); the peer must send whole messages')

    def turn(self) -> Iterator[Message]:
        """The messages that are there now, at most MESSAGES_PER_TURN of them, in order.

        Each is read when the one before it has been dealt with. Raises as :meth:`receive`.
        """
        for _ in range(MESSAGES_PER_TURN):
            message = self.receive()
            if message is None:
                return
            yield message

    def receive(self) -> Message | None:
        """The next message, or None while it is not all there.

        Raises Disconnected if the peer left between messages, Close if it left in the middle of one or broke
        the framing; descriptors received so far are closed then.
        """
        while True:
            try:
                data, fds = self._read(self._decoder.needed)
            except BlockingIOError:
                self.expire()
                return None
            message = self._decoder.feed(data, fds)
            if message is not None:
                self._deadline = None
                return message
            if self._deadline is None:
                self._deadline = self._clock() + MESSAGE_DEADLINE

    def send(self, data: bytes, fds: Iterable[int] = ()) -> None:
        """Send ``data`` whole, with ``fds`` (which stay the caller's) on its first byte.

        Raises Disconnected if the peer is gone, Close if it does not read for SEND_DEADLINE seconds.
        """
        rest = memoryview(data)
        rights = array("i", fds).tobytes()
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if rights else []
        deadline = self._clock() + SEND_DEADLINE
        while rest:
            try:
                sent = self._socket.sendmsg([rest], ancillary, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
            except BlockingIOError:
                self._wait_writable(deadline)
            except (BrokenPipeError, ConnectionResetError):
                raise Disconnected("the peer closed the connection before it read the answer") from None
            else:
                rest = rest[sent:]
                ancillary = []

    def close(self) -> None:
        """Close the socket and the descriptors of half a message. May be called any number of times."""
        self._decoder.close()
        self._deadline = None
        self._socket.close()

    def _read(self, size: int) -> tuple[bytes, OwnedFds]:
        """1 to ``size`` bytes, and the descriptors on them. Raises BlockingIOError while there is none."""
        try:
            data, ancillary, flags, _ = self._socket.recvmsg(
                size, _FD_ROOM, socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT)
        except ConnectionResetError:
            data, ancillary, flags = b"", [], 0
        fds = OwnedFds(_received(ancillary))
        if flags & socket.MSG_CTRUNC:
            fds.close()
            self._decoder.close()
            raise Close(f"more than {FDS_MAX} file descriptors came with one message, or none is free here "
                        '(vhost-user "Communication"); send fewer, or raise the open files limit')
        if not data:
            raise self._end()
        return data, fds

    def _end(self) -> Close:
        if not self._decoder.started:
            return Disconnected("the peer closed the connection")
        self._decoder.close()
        return Close("the peer closed the connection in the middle of a message (vhost-user "
                     '"Communication"); it has probably died')

    def _wait_writable(self, deadline: float) -> None:
        # poll() and not select(), which cannot take a descriptor above 1023.
        poller = select.poll()
        poller.register(self._socket, select.POLLOUT)
        remaining = max(deadline - self._clock(), 0)
        if not poller.poll(remaining * 1000):
            raise Close(f"the peer has not read its answers for {SEND_DEADLINE} s; it must read what it asks "
                        "for")


class Pipe:
    """The writing end of a pipe, which this object owns from now on: user-mode Linux takes a back-end's requests that
    way."""

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self._fd = fd

    def fileno(self) -> int:
        """The descriptor; -1 when closed."""
        return self._fd

    def send(self, data: bytes) -> None:
        """Send ``data`` whole. Raises Disconnected if nobody reads any more, Close if the pipe is full."""
        try:
            # A message is shorter than PIPE_BUF, so all of it is written or nothing.
            os.write(self._fd, data)
        except BlockingIOError:
            raise Close("the pipe for the back-end's requests is full; the peer must read it") from None
        except OSError as error:
            raise Disconnected(f"the back-end's channel cannot be written: {os.strerror(error.errno)}") from None

    def close(self) -> None:
        """Close it. May be called any number of times."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _received(ancillary: Iterable[tuple[int, int, bytes]]) -> Iterator[int]:
    """The descriptors in what recvmsg() returned."""
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            yield from memoryview(data[:len(data) // _FD_SIZE * _FD_SIZE]).cast("i")
