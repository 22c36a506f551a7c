"""Log lines: one an event, as text or as JSON, to standard error.

Theory of operation
-------------------
Lines go through the standard ``logging`` tree under the logger ``vdev``, so that an embedding program or
a test can take them over. The daemon installs one handler (:func:`setup`) with three properties.

*It never blocks.* A log pipe that nobody reads must not stall the control thread, which answers a VMM that
waits synchronously. The handler writes without waiting; a line that does not fit is dropped and counted, and
the next line that goes through is preceded by that count.

*It cannot be flooded.* The peer and the guest can cause some lines at will. Those are written by
:meth:`EventLog.peer`, which holds each kind of event to a burst and then to one a second, and says how many
it left out.

*A line is a line.* Control characters are escaped; only a traceback, at debug level, has several.
"""

import json
import logging
import os
import select
import socket
import stat
import time
from datetime import UTC, datetime
from typing import Any

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
FORMATS = ("text", "json")

PEER_BURST = 20  # lines of one kind a peer may cause at once
PEER_PER_SECOND = 1.0  # and how many a second after that

SYSCALLS = {
    "write": "lines",
    "sendto": "lines, where the log is a socket",
    "poll": "would a line block",
    "ppoll": "the same, on machines without poll",
}

# A write of at most PIPE_BUF bytes to a pipe is whole or not at all (POSIX write()).
LINE_MAX = select.PIPE_BUF

_logger = logging.getLogger("vdev")


class _Bucket:
    """A token bucket on the monotonic clock, which remembers how much it refused."""

    def __init__(self) -> None:
        self.tokens = float(PEER_BURST)
        self.filled = time.monotonic()
        self.refused = 0

    def take(self) -> bool:
        now = time.monotonic()
        self.tokens = min(PEER_BURST, self.tokens + (now - self.filled) * PEER_PER_SECOND)
        self.filled = now
        if self.tokens < 1:
            self.refused += 1
            return False
        self.tokens -= 1
        return True


class EventLog:
    """The lines about one device, or about the process when ``device`` is None.

    Each method takes the event's stable name (a word for machines, e.g. ``connect``), the text a person
    reads, and fields for the JSON twin (JSON types only).
    """

    def __init__(self, device: str | None = None):
        self.device = device
        self._buckets: dict[str, _Bucket] = {}

    def debug(self, event: str, text: str, **fields: Any) -> None:
        self._write(logging.DEBUG, event, text, fields)

    def info(self, event: str, text: str, **fields: Any) -> None:
        self._write(logging.INFO, event, text, fields)

    def warning(self, event: str, text: str, **fields: Any) -> None:
        self._write(logging.WARNING, event, text, fields)

    def error(self, event: str, text: str, **fields: Any) -> None:
        self._write(logging.ERROR, event, text, fields)

    def peer(self, level: int, event: str, text: str, **fields: Any) -> None:
        """A line the front-end, the guest or the network can cause at will: rate-limited by ``event``."""
        if not _logger.isEnabledFor(level):
            return
        bucket = self._buckets.setdefault(event, _Bucket())
        if not bucket.take():
            return
        if bucket.refused:
            text += f" ({bucket.refused} more like it were left out)"
            fields["left_out"] = bucket.refused
            bucket.refused = 0
        self._write(level, event, text, fields)

    def bug(self, event: str, doing: str, exception: BaseException) -> None:
        """One line for an exception nobody foresaw; the traceback follows at debug level."""
        kind = type(exception).__name__
        self.peer(logging.ERROR, event, f"internal error while {doing}: {kind}: {exception}; this is a bug "
                  "in vdev, please report it with the output of --log-level debug", exception=kind)
        if _logger.isEnabledFor(logging.DEBUG):
            _logger.debug("traceback of the error above", exc_info=exception,
                          extra={"event": "traceback", "device": self.device, "fields": {}})

    def _write(self, level: int, event: str, text: str, fields: dict[str, Any]) -> None:
        _logger.log(level, "%s", text, extra={"event": event, "device": self.device, "fields": fields})


class TextFormatter(logging.Formatter):
    """``TIME vdev: DEVICE: text``; under the journal, which stamps lines itself, ``<LEVEL>DEVICE: text``."""

    SYSLOG = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3}

    def __init__(self, journal: bool):
        super().__init__()
        self.journal = journal

    def format(self, record: logging.LogRecord) -> str:
        device = getattr(record, "device", None)
        text = _one_line(record.getMessage())
        if device:
            text = f"{device}: {text}"
        if self.journal:
            prefix = f"<{self.SYSLOG.get(record.levelno, 6)}>"
        else:
            moment = datetime.fromtimestamp(record.created)
            prefix = f"{moment.isoformat(' ', 'milliseconds')} vdev: "
        if record.levelno >= logging.WARNING:
            prefix += f"{record.levelname.lower()}: "
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return prefix + text


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (RFC 3339, UTC), level, event, device, text, then the event's fields."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC)
        line = {
            "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "event": getattr(record, "event", record.name),
            "device": getattr(record, "device", None),
            "text": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class NonBlockingHandler(logging.Handler):
    """Writes lines to a file descriptor and never waits for it."""

    def __init__(self, fd: int):
        super().__init__()
        self._write = _writer(fd)
        self._rest = b""  # the end of a line of which only the beginning went through
        self._lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        # Logging is the last thing that may end a daemon: a line that cannot be formatted is a lost line.
        try:
            line = self.format(record).encode("utf-8", "backslashreplace")
        except Exception:
            self._lost += 1
            return
        if not record.exc_info and len(line) >= LINE_MAX:
            line = line[: LINE_MAX - 5] + b" ..."
        if not self._finish():
            self._lost += 1
            return
        if self._lost:
            notice = logging.makeLogRecord({
                "name": _logger.name, "levelno": logging.WARNING, "levelname": "WARNING", "event": "log-lost",
                "msg": f"{self._lost} log lines were lost because the log could not be written",
                "fields": {"lost": self._lost}})
            line = self.format(notice).encode() + b"\n" + line
        if self._begin(line + b"\n"):
            self._lost = 0
        else:
            self._lost += 1

    def _begin(self, data: bytes) -> bool:
        """Write ``data``; keep for later what does not fit. False when none of it could be written."""
        try:
            sent = self._write(data)
        except OSError:
            return False
        self._rest = data[sent:]
        return True

    def _finish(self) -> bool:
        """Write what is left of a line already begun. False while some of it is left."""
        return not self._rest or (self._begin(self._rest) and not self._rest)


def _writer(fd: int):
    """A function that writes bytes to ``fd`` without waiting: -> bytes written, or OSError.

    O_NONBLOCK belongs to the open file description, which we share with whoever started us (a shell, a
    VMM): it is set on a description of our own, never on the one inherited.
    """
    mode = os.fstat(fd).st_mode
    if stat.S_ISSOCK(mode):
        sock = socket.socket(fileno=os.dup(fd))
        return lambda data: sock.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    if stat.S_ISREG(mode):
        return lambda data: os.write(fd, data)
    try:
        own = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        # Another user's pipe or terminal, or no /proc: ask first. Only a second writer could make us wait.
        poll = select.poll()
        poll.register(fd, select.POLLOUT)

        def polled(data: bytes) -> int:
            if not any(event & select.POLLOUT for _, event in poll.poll(0)):
                raise BlockingIOError
            return os.write(fd, data)

        return polled
    return lambda data: os.write(own, data)


def _one_line(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _under_journal(fd: int) -> bool:
    """Is ``fd`` the stream that systemd says is connected to the journal (systemd.exec, $JOURNAL_STREAM)?"""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    status = os.fstat(fd)
    return (device, inode) == (str(status.st_dev), str(status.st_ino))


def setup(level: str, format: str, fd: int = 2) -> logging.Handler:
    """Send all lines of ``level`` (a key of LEVELS) and above to ``fd`` in ``format`` (one of FORMATS)."""
    handler = NonBlockingHandler(fd)
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter(_under_journal(fd)))
    _logger.handlers[:] = [handler]
    _logger.setLevel(LEVELS[level])
    _logger.propagate = False
    return handler
