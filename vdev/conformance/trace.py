"""A front-end that keeps what it sent and what came back, as lines for people."""

import socket
from collections import deque
from collections.abc import Iterable

from vhost_user.codec import Message
from vhost_user.errors import Close, PeerError
from vhost_user.frontend import FrontEnd, NoAnswer
from vhost_user.spec import HEADER_SIZE, NEED_REPLY_FLAG, request_name
from vhost_user.wire import HEADER

KEPT = 40  # lines of one session
_SHOWN = 40  # bytes of a payload


class TracedFrontEnd(FrontEnd):
    """As FrontEnd; ``trace`` has the lines, oldest first."""

    def __init__(self, sock: socket.socket, *, timeout: float = 5.0, ack: bool = True) -> None:
        super().__init__(sock, timeout=timeout, ack=ack)
        self.trace: deque[str] = deque(maxlen=KEPT)

    def send_raw(self, data: bytes, fds: Iterable[int] = ()) -> None:
        fds = list(fds)
        self.trace.append(f"sent {_shown(data)}{f' with {len(fds)} descriptor(s)' if fds else ''}")
        try:
            super().send_raw(data, fds)
        except (Close, OSError):
            self.trace.append("could not be sent: the back-end has closed the connection")
            raise

    def receive(self) -> Message:
        try:
            message = super().receive()
        except NoAnswer:
            self.trace.append("nothing came")
            raise
        except PeerError as why:
            self.trace.append(f"came: {why or 'the end of the connection'}")
            raise
        self.trace.append(f"came a reply to {message.name}: {_payload(message.payload)}")
        return message


def _shown(data: bytes) -> str:
    if len(data) < HEADER_SIZE:
        return f"{len(data)} bytes: {data.hex(' ')}"
    header = HEADER.parse(data[:HEADER_SIZE])
    asks = ", need_reply" if header.flags & NEED_REPLY_FLAG else ""
    return f"{request_name(header.request)}{asks}: {_payload(data[HEADER_SIZE:])}"


def _payload(data: bytes) -> str:
    if len(data) == 8:
        return f"{int.from_bytes(data, 'little'):#x}"
    return (data[:_SHOWN].hex(" ", 4) + ("..." if len(data) > _SHOWN else "")) or "no payload"
