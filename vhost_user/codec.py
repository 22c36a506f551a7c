"""Bytes to messages and back, without any I/O.

Theory of operation. The protocol has no marker by which a lost frame could be found again, so a header
that makes no sense ends the connection: it is :class:`Close <vhost_user.errors.Close>`, never a refusal.
A :class:`Decoder` asks for one part at a time - the 12-byte header, then the payload - and says in
:attr:`Decoder.needed` how many bytes complete it. Its caller never gives more than that, so it never holds
bytes of the next message, and descriptors cannot slip from one message to another. The size is checked
before anything is kept of the payload.
"""

from dataclasses import dataclass, field

from .errors import Close
from .fds import OwnedFds
from .spec import HEADER_SIZE, NEED_REPLY_FLAG, PAYLOAD_MAX, REPLY_FLAG, VERSION, VERSION_MASK, request_name
from .wire import HEADER, U64, U64_LAYOUT


@dataclass
class Message:
    """One message as it stands on the wire. ``fds`` belong to it until somebody takes them."""

    request: int
    flags: int
    payload: bytes
    fds: OwnedFds = field(default_factory=OwnedFds)

    @property
    def need_reply(self) -> bool:
        """The sender set the need_reply flag; whether that means anything was negotiated elsewhere."""
        return bool(self.flags & NEED_REPLY_FLAG)

    @property
    def name(self) -> str:
        """The request's name for people."""
        return request_name(self.request)


def encode(request: int, payload: bytes = b"", *, reply: bool = False, need_reply: bool = False) -> bytes:
    """The bytes of one message."""
    flags = VERSION | (REPLY_FLAG if reply else 0) | (NEED_REPLY_FLAG if need_reply else 0)
    return HEADER.build({"request": request, "flags": flags, "size": len(payload)}) + payload


def encode_ack(request: int, success: bool) -> bytes:
    """The u64 answer that REPLY_ACK asks for: zero for success ("VHOST_USER_PROTOCOL_F_REPLY_ACK")."""
    return encode(request, U64_LAYOUT.encode(U64(0 if success else 1)), reply=True)


@dataclass(frozen=True)
class Begun:
    """What has been read of a message that is not complete. header: (request, flags, size) once it is there; part:
    bytes of the header, or then of the payload; fds: descriptors that came with its first byte."""

    header: tuple[int, int, int] | None = None
    part: bytes = b""
    fds: tuple[int, ...] = ()


class Decoder:
    """Assembles messages from pieces of any size.

    ``replies`` tells which direction it reads: requests must not have the reply flag, replies must.
    """

    def __init__(self, *, replies: bool = False) -> None:
        self._replies = replies
        self._part = bytearray()
        self._header: tuple[int, int, int] | None = None
        self._fds = OwnedFds()

    @property
    def needed(self) -> int:
        """How many bytes complete the part now being read; always at least one."""
        whole = HEADER_SIZE if self._header is None else self._header[2]
        return whole - len(self._part)

    @property
    def started(self) -> bool:
        """Some bytes of a message have been read, but not all."""
        return self._header is not None or bool(self._part)

    @property
    def begun(self) -> Begun:
        """The message that is not complete; its descriptors stay this object's."""
        return Begun(self._header, bytes(self._part), tuple(self._fds[i] for i in range(len(self._fds))))

    def go_on(self, begun: Begun) -> None:
        """Go on where another Decoder was; ``begun.fds`` are this object's from now on. Raises Close, as feed does,
        for a header that is not one, ValueError for bytes that would have completed what was begun."""
        self._fds = OwnedFds(begun.fds)
        if begun.header is not None:
            self._check(*begun.header)
        self._header, self._part = begun.header, bytearray(begun.part)
        if self.needed <= 0:
            raise ValueError("a message that was begun is complete")

    def feed(self, data: bytes, fds: OwnedFds | None = None) -> Message | None:
        """Take at most :attr:`needed` bytes, and the descriptors that came with them.

        Returns a message when it is complete. Raises Close for a header that is not one, and for descriptors
        that do not come with the first byte of a message; the descriptors are closed then.
        """
        if len(data) > self.needed:
            raise ValueError(f"{len(data)} bytes given, {self.needed} needed")
        try:
            if fds:
                self._own(fds)
            self._part += data
            return self._complete() if self.needed == 0 else None
        except Close:
            self.close()
            raise

    def close(self) -> None:
        """Drop half a message and close its descriptors."""
        self._part.clear()
        self._header = None
        self._fds.close()

    def _own(self, fds: OwnedFds) -> None:
        if self.started:
            with fds:
                raise Close(f"{len(fds)} file descriptors came in the middle of a message, not with its "
                            'first byte (vhost-user "Communication"); the peer must attach them there')
        self._fds = fds

    def _complete(self) -> Message | None:
        if self._header is None:
            header = HEADER.parse(bytes(self._part))
            self._check(header.request, header.flags, header.size)
            self._header = (header.request, header.flags, header.size)
            self._part.clear()
            if header.size:
                return None
        request, flags, _ = self._header
        message = Message(request, flags, bytes(self._part), self._fds)
        self._fds = OwnedFds()
        self._header = None
        self._part.clear()
        return message

    def _check(self, request: int, flags: int, size: int) -> None:
        name = request_name(request)
        if flags & VERSION_MASK != VERSION:
            raise Close(f"header of {name}: version {flags & VERSION_MASK} is not {VERSION} (vhost-user "
                        '"Header"); the peer does not speak this protocol, or framing was lost')
        if bool(flags & REPLY_FLAG) != self._replies:
            expected, found = ("reply", "request") if self._replies else ("request", "reply")
            raise Close(f'header of {name}: a {found} came where a {expected} was due (vhost-user "Header"); '
                        f"the reply flag is bit 2 of the flags, here {flags:#x}")
        if size > PAYLOAD_MAX:
            raise Close(f"header of {name}: payload size {size} is above {PAYLOAD_MAX}, more than any has "
                        '(vhost-user "Payload"); the peer does not speak this protocol, or framing was lost')
