"""The host's end of a guest's serial line: send text, wait for text, keep all that was said."""

import select
import socket
import time
from collections.abc import Callable


class ConsoleClosed(RuntimeError):
    """The other end of the serial line went away."""


class ConsoleTimeout(RuntimeError):
    """What was waited for did not come in time. The text ends with the last lines that did."""


class Console:
    """A byte stream with a transcript. Waiting wakes on data; nothing is polled.

    stream: a connected socket; the console owns it.
    """

    def __init__(self, stream: socket.socket) -> None:
        self._stream = stream
        self._stream.setblocking(False)
        self._taken = 0
        self._received = bytearray()

    @property
    def transcript(self) -> str:
        """Everything the guest has said."""
        return self._received.decode(errors="replace")

    def send(self, data: bytes, timeout: float = 5) -> None:
        """Write all of ``data``. Raises ConsoleTimeout when the guest does not take it."""
        deadline = time.monotonic() + timeout
        while data:
            self._wait(deadline, "the guest to take input", for_writing=True)
            try:
                data = data[self._stream.send(data):]
            except OSError as error:
                raise ConsoleClosed(f"the serial line is closed: {error}") from None

    def wait_for(self, mark: bytes, timeout: float) -> bytes:
        """Wait until ``mark`` comes, and return what came before it since the last wait."""
        deadline = time.monotonic() + timeout
        return self._until(lambda: self._received.find(mark, self._taken), len(mark), deadline,
                           repr(mark.decode(errors="replace")))

    def wait_for_line(self, start: bytes, timeout: float) -> tuple[bytes, bytes]:
        """Wait for a whole line that begins with ``start``.

        Returns what came before it since the last wait, and the rest of the line.
        """
        deadline = time.monotonic() + timeout
        before = self.wait_for(b"\n" + start, timeout)
        rest = self.wait_for(b"\n", max(0.0, deadline - time.monotonic()))
        return before, rest

    def _until(self, find: Callable[[], int], length: int, deadline: float, what: str) -> bytes:
        while (at := find()) < 0:
            self._wait(deadline, what)
            self._read()
        before = bytes(self._received[self._taken:at])
        self._taken = at + length
        return before

    def _read(self) -> None:
        try:
            data = self._stream.recv(65536)
        except BlockingIOError:
            return
        except OSError as error:
            raise ConsoleClosed(f"the serial line is closed: {error}") from None
        if not data:
            raise ConsoleClosed("the serial line is closed")
        self._received += data

    def _wait(self, deadline: float, what: str, for_writing: bool = False) -> None:
        poll = select.poll()
        poll.register(self._stream, select.POLLOUT if for_writing else select.POLLIN)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            last = "\n".join(self.transcript.splitlines()[-15:])
            raise ConsoleTimeout(f"waited in vain for {what}; the guest's last words:\n{last}")

    def close(self) -> None:
        """Hang up. May be called again."""
        self._stream.close()
