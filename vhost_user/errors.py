"""What can be wrong with what the peer sent, and what follows from it.

Every error here is the peer's fault. The class tells what follows; the text is one line that says what
was wrong, where, under which rule, and what to do.
"""


class PeerError(Exception):
    """The peer broke a rule of vhost-user.

    ``fault`` says whose it is, ``follows`` what the receiver has to do: ``"nack"`` or ``"close"``.
    """

    fault = "peer"
    follows = "close"


class Nack(PeerError):
    """The request is refused, the session goes on unchanged. ``reply`` is the message to send."""

    follows = "nack"

    def __init__(self, text: str, reply: bytes) -> None:
        super().__init__(text)
        self.reply = reply


class Close(PeerError):
    """The connection has to be closed: framing is lost, or there is no way to say no."""


class Disconnected(Close):
    """The peer closed the connection between two messages: the ordinary end of a session."""


class Refused(Exception):
    """Why one request cannot be accepted. Inside this package; a :class:`Session` makes a PeerError of it.

    ``reason`` says what is wrong, ``fix`` what the front-end must do instead, ``section`` where the
    vhost-user specification says so (None: in the entry of the request itself).
    """

    def __init__(self, reason: str, fix: str, section: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.fix = fix
        self.section = section
