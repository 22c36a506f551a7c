"""What one vdev hands to the next: the types of it, and the channel it goes through.

Theory of operation
-------------------
Each part of a device knows what it has to hand on: ``export(put)`` gives it as a frozen dataclass, in which
``put(fd)`` has left a number for each descriptor, and ``adopt`` makes the same part of that in another process,
where ``take(number)`` gives the descriptor to its new owner. Nothing is changed by an export, and nothing runs after
adopting it. ``let_go`` gives up what a part has without undoing it, because another process goes on with it.

A message is a JSON object and descriptors. On the wire (a Unix stream socket): 8 bytes, then the JSON text, then for
each lot of descriptors (SCM_RIGHTS takes 253 at a time) one byte with them on it. A reader asks for exactly what is
due, so descriptors never come with the wrong byte.
"""

import contextlib
import gc
import json
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vhost_user.fds import OwnedFds

Put = Callable[[int], int]  # a descriptor, or -1 for none -> its number in the parcel, or -1
Take = Callable[[int], int]  # the way back; the descriptor is the caller's from then on

FORMAT = 1  # of everything that is said and handed over; a change that an older reader would misread gets another
_HEADER = struct.Struct("<II")  # bytes of JSON, descriptors
_TEXT_MAX = 64 << 20
_LOT = 250

# Of a process that hands over, or takes over, inside the sandbox: rule of vdev/seccomp.py -> reason.
SYSCALLS = {
    "sendto": "what is said",
    "sendmsg": "descriptors",
    "recvfrom": "what the other process says",
    "recvmsg": "its descriptors",
    "poll": "for as long as there is time",
    "ppoll": "the same, on machines without poll",
    "shutdown": "neither side can say anything any more",
    "getsockopt": "Python asks what kind of socket it was given",
    "getsockname": "the same",
}


class HandoverError(Exception):
    """The hand-over cannot go on. The text is one line: why, and what to do."""


class Gone(HandoverError):
    """The other process has ended, or hung up; what it said before has been received."""


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """No garbage is collected inside: of all objects of the process it takes as long as a hand-over."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


class Parcel:
    """Descriptors on their way, by number: collected with ``put``, or received and given away with ``take``."""

    def __init__(self, received: Sequence[int] | None = None) -> None:
        self.fds: list[int] = []  # collected: their owners' still
        self._received = [OwnedFds([fd]) for fd in received or ()]

    def put(self, fd: int) -> int:
        """-> the number of ``fd``; -1 stays -1."""
        if fd < 0:
            return -1
        self.fds.append(fd)
        return len(self.fds) - 1

    def take(self, number: int) -> int:
        """The descriptor received under ``number``, from now on the caller's; -1 for -1. Raises ValueError for a number
        under which there is none (any more)."""
        if number == -1:
            return -1
        if not 0 <= number < len(self._received) or not len(self._received[number]):
            raise ValueError(f"descriptor {number} is not there")
        return self._received[number].take()

    def close(self) -> None:
        """Close what was received and not taken."""
        for owned in self._received:
            owned.close()


class Channel:
    """Messages over the connected Unix stream socket ``sock``, which this object owns from now on.

    ``budget(seconds)`` bounds the time that everything from then on may take together.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(True)
        self._sock = sock
        self._deadline = 0.0
        self._begun = bytearray()  # a message that is not complete: a reader who ran out of time may ask again

    def fileno(self) -> int:
        return self._sock.fileno()

    def budget(self, seconds: float) -> None:
        """From now on, sending and receiving together may take so long."""
        self._deadline = time.monotonic() + seconds

    def send(self, say: str, fds: Sequence[int] = (), **fields: Any) -> None:
        """Send ``{"say": say, **fields}`` with ``fds``, which stay the caller's. Raises HandoverError."""
        text = json.dumps({"vdev-upgrade": FORMAT, "say": say, **fields}).encode()
        try:
            self._patience()
            # In one piece: a short message without descriptors is there as a whole or not at all.
            self._sock.sendall(_HEADER.pack(len(text), len(fds)) + text)
            for start in range(0, len(fds), _LOT):
                self._patience()
                socket.send_fds(self._sock, [b"\0"], fds[start:start + _LOT])
        except TimeoutError:
            raise HandoverError("the other process does not read") from None
        except (BrokenPipeError, ConnectionResetError):
            raise Gone("the other process has gone") from None
        except OSError as error:
            raise HandoverError(f"cannot be told to the other process: {os.strerror(error.errno).lower()}") from None

    def receive(self) -> tuple[dict[str, Any], Parcel]:
        """The next message and its descriptors. Raises HandoverError when none comes in time, and for one that is none;
        Gone when no other can come."""
        received: list[int] = []
        try:
            length, count = _HEADER.unpack(self._first(_HEADER.size))
            if length > _TEXT_MAX:
                raise ValueError
            text = self._first(_HEADER.size + length)[_HEADER.size:]
            self._begun.clear()
            while len(received) < count:
                received += self._lot()
            message = json.loads(text)
            if not isinstance(message, dict) or not isinstance(message.get("say"), str):
                raise ValueError
            if message.get("vdev-upgrade") != FORMAT:
                raise HandoverError(f"the other vdev speaks format {message.get('vdev-upgrade')} of the hand-over, "
                                    f"this one {FORMAT}; stop the one that runs and start the other")
            return message, Parcel(received)
        except BaseException as error:
            OwnedFds(received).close()
            if isinstance(error, TimeoutError):
                raise HandoverError("the other process does not answer in time") from None
            if isinstance(error, ConnectionResetError):
                raise Gone("the other process has gone") from None
            if isinstance(error, OSError):
                raise HandoverError(f"cannot hear the other process: {os.strerror(error.errno).lower()}") from None
            if isinstance(error, ValueError | RecursionError):
                raise HandoverError("what came is no message of a vdev") from None
            raise

    def expect(self, say: str) -> tuple[dict[str, Any], Parcel]:
        """The next message, which must be ``say``. Raises HandoverError, with the other side's own words where it says
        that it ``failed``."""
        message, parcel = self.receive()
        if message["say"] == say:
            return message, parcel
        parcel.close()
        if message["say"] == "failed":
            raise HandoverError(str(message.get("why")))
        raise HandoverError(f"the other vdev said {message['say']!r} where {say!r} was due")

    def hang_up(self) -> None:
        """Neither side can say anything any more; what was said before can still be received."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._sock.close()

    def _patience(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._sock.settimeout(left)

    def _first(self, size: int) -> bytes:
        """The first ``size`` bytes of the message that has begun."""
        while len(self._begun) < size:
            self._patience()
            piece = self._sock.recv(size - len(self._begun))
            if not piece:
                raise Gone("the other process has gone")
            self._begun += piece
        return bytes(self._begun[:size])

    def _lot(self) -> list[int]:
        self._patience()
        data, fds, flags, _ = socket.recv_fds(self._sock, 1, _LOT, socket.MSG_CMSG_CLOEXEC)
        if data and fds and not flags & socket.MSG_CTRUNC:
            return fds
        OwnedFds(fds).close()
        raise HandoverError("descriptors got lost on the way; raise the open files limit (ulimit -n)")
