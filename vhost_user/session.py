"""One session of the control protocol, seen from the back-end, without any I/O.

Theory of operation. A message takes two steps, with the device between them::

    accepted = session.accept(message)      # everything that can be judged without the device
    result = device.handle(accepted)        # session.state is still the old one; session.after() the new
    reply = session.answer(accepted, result)    # commits, and builds what goes back

:meth:`Session.answer` and :meth:`Session.resume` are the only writers of what was negotiated, so a request
that was refused, by us or by the device, leaves no trace. The way to say no is an acknowledgement other than
zero, and it exists only if the front-end asked for one (need_reply, under REPLY_ACK) and the request has no
reply body of its own. A few bodies can say no themselves (``refusal`` of their row); otherwise refusing means
closing the connection, as the front-end would go on in the belief that all is well ("Communication",
"VHOST_USER_PROTOCOL_F_REPLY_ACK").

Descriptors belong to the message, then to the accepted request, and are closed by the session wherever
nobody took them: on refusal and at the end of :meth:`Session.answer`.
"""

from dataclasses import dataclass
from typing import Any

from .codec import Message, encode, encode_ack
from .errors import Close, Nack, PeerError, Refused
from .fds import OwnedFds
from .requests import Row, row_of
from .spec import ProtocolFeature, Request
from .state import Event, Offer, RingState, State
from .wire import Region


@dataclass(frozen=True)
class Accepted:
    """A request that is well formed and legal now.

    kind        which request
    payload     its typed content, a dataclass of :mod:`vhost_user.wire`
    fds         the descriptors that came along: lend them, or take() what shall outlive the answer
    need_reply  an acknowledgement will be sent
    row         its row in the table of requests

    As a context manager it closes the descriptors at the end, whatever happened.
    """

    kind: Request
    payload: Any
    fds: OwnedFds
    need_reply: bool
    row: Row

    def __enter__(self) -> "Accepted":
        return self

    def __exit__(self, *_: object) -> None:
        self.fds.close()

    def __str__(self) -> str:
        return _subject(self.kind.name, self.payload)


@dataclass(frozen=True)
class Result:
    """What the device says about an accepted request: :meth:`ok` or :meth:`refused`."""

    reason: str | None = None
    value: Any = None
    fds: tuple[int, ...] = ()

    @classmethod
    def ok(cls, value: Any = None, fds: tuple[int, ...] = ()) -> "Result":
        """Done. ``value`` is due where only the device knows the answer: for GET_VRING_BASE the next available
        index, for guest memory that arrives by postcopy its address here (of a table, one for each region), else the
        whole of it. ``fds`` go with the answer and stay the device's."""
        return cls(value=value, fds=fds)

    @classmethod
    def refused(cls, reason: str) -> "Result":
        """Not done, and nothing changed. ``reason`` is one line for a person: cause and fix."""
        return cls(reason=reason)


class Session:
    """The back-end's view of one connection. Not thread safe.

    state: what another process had agreed on over the same connection; None: nothing yet. Raises ValueError when it is
    not one of ``offer``.
    """

    def __init__(self, offer: Offer, state: State | None = None) -> None:
        self.offer = offer
        self.state = state or State(rings=(RingState(),) * offer.rings)
        if len(self.state.rings) != offer.rings or self.state.features & ~offer.features:
            raise ValueError("what was agreed on is not what is offered")

    def offer_instead(self, offer: Offer) -> None:
        """Offer this rather than what the session was made with: the first message told who is there. It has as many
        rings, and nothing was negotiated yet (ValueError)."""
        if offer.rings != len(self.rings) or self.state != State(rings=(RingState(),) * offer.rings):
            raise ValueError("the session has begun, or the number of rings would change")
        self.offer = offer

    @property
    def features(self) -> int:
        """Negotiated virtio features, 0 before SET_FEATURES."""
        return self.state.features

    @property
    def protocol_features(self) -> int:
        """Negotiated protocol features."""
        return self.state.protocol_features

    @property
    def status(self) -> int:
        """The device status byte as last set."""
        return self.state.status

    @property
    def rings(self) -> tuple[RingState, ...]:
        """Every ring, by its index."""
        return self.state.rings

    @property
    def regions(self) -> tuple[Region, ...]:
        """Guest memory as the front-end described it; see :class:`State <vhost_user.state.State>`."""
        return self.state.regions

    def accept(self, message: Message) -> Accepted:
        """Judge ``message`` by its row. The state does not change.

        Returns the request, which now owns the descriptors. Raises Nack (send its ``reply`` and go on) or
        Close; the descriptors are closed then.
        """
        need_reply = message.need_reply and self.state.has(ProtocolFeature.REPLY_ACK)
        row = None
        payload = None
        try:
            kind, row = row_of(message.request, self.state, len(message.payload))
            row.gate(self.offer, self.state)
            payload = row.payload.decode(message.payload)
            self._check_ring(row, payload)
            self._check_fds(row, len(message.fds))
            row.rule(self.offer, self.state, payload, len(message.fds))
            # Asked for by the very message that brings REPLY_ACK, user-mode Linux waits for it.
            need_reply = need_reply or (message.need_reply and _brings_reply_ack(kind, payload))
        except Refused as refused:
            message.fds.close()
            section = refused.section or f"VHOST_USER_{message.name}"
            subject = _subject(message.name, payload)
            text = f'{subject}: {refused.reason} (vhost-user "{section}"); {refused.fix}'
            raise _no(message.request, text, need_reply, row) from None
        return Accepted(kind, payload, message.fds, need_reply, row)

    def after(self, accepted: Accepted, base: Any = None) -> State:
        """The state that :meth:`answer` will commit if the device says yes. ``base`` is what the device will
        answer to GET_VRING_BASE; without it the ring's last one stands in."""
        return accepted.row.effect(self.state, accepted.payload, self._body(accepted, base))

    def answer(self, accepted: Accepted, result: Result) -> bytes | None:
        """Commit what ``accepted`` changes; if the device refused, nothing.

        Returns the bytes to send, or None where no answer is due. Raises Nack or Close, as :meth:`accept`
        does, where the device refused. Descriptors that nobody took are closed in any case.
        """
        row = accepted.row
        with accepted:
            if result.reason is not None:
                raise _no(accepted.kind, f"{accepted}: {result.reason}", accepted.need_reply, row)
            if row.from_device and result.value is None:
                raise ValueError(f"{accepted} is answered with a value of the device")
            body = self._body(accepted, result.value)
            self.state = row.effect(self.state, accepted.payload, body)
            if row.reply is not None:
                return encode(accepted.kind, row.reply.encode(body), reply=True)
            return encode_ack(accepted.kind, success=True) if accepted.need_reply or row.acked else None

    def resume(self, index: int) -> None:
        """Start ring ``index`` again, at the base last answered, after it was stopped behind the driver's
        back. Raises ValueError unless :meth:`State.resumable <vhost_user.state.State.resumable>`."""
        if not self.state.resumable(index):
            raise ValueError(f"ring {index} was not stopped behind the driver's back")
        self.state = self.state.with_ring(index, self.state.rings[index].after(Event.RESUME))

    def _check_ring(self, row: Row, payload: Any) -> None:
        if row.ring is None:
            return
        # The index has its full width: cut to 8 or 16 bits, a wild one would hit a ring that exists.
        if payload.index >= len(self.rings):
            raise Refused(f"there are {len(self.rings)} rings, counted from 0",
                          "the front-end must stay within them (QEMU: fewer queues=)",
                          "Multiple queue support")
        if not self.rings[payload.index].permits(row.ring):
            raise Refused("the ring is started", "the front-end must stop it with GET_VRING_BASE first",
                          "Ring states")

    @staticmethod
    def _check_fds(row: Row, count: int) -> None:
        fewest, most = row.fds
        if not fewest <= count <= most:
            allowed = f"{fewest}" if fewest == most else f"{fewest} to {most}"
            raise Refused(f"{count} file descriptors came along where {allowed} are due",
                          "the front-end must attach what the message is specified with")

    def _body(self, accepted: Accepted, value: Any) -> Any:
        """The body of a reply: the session's own knowledge, or what the device answered; None while it has not."""
        row, payload = accepted.row, accepted.payload
        if row.from_device:
            if value is None and row.ring:
                value = self.rings[payload.index].base
            return None if value is None else row.body(payload, value)
        return row.source(self.offer, self.state) if row.source else None


def _brings_reply_ack(kind: Request, payload: Any) -> bool:
    return kind is Request.SET_PROTOCOL_FEATURES and bool(payload.value >> ProtocolFeature.REPLY_ACK & 1)


def _subject(name: str, payload: Any) -> str:
    """What a message is about, for a person: its name, and the ring where it names one."""
    return f"{name} ring {payload.index}" if hasattr(payload, "index") else name


def _no(request: int, text: str, need_reply: bool, row: Row | None) -> PeerError:
    """The refusal as what it means for the connection."""
    if row is not None and row.refusal is not None:
        return Nack(text, encode(request, row.reply.encode(row.refusal), reply=True))
    if need_reply and (row is None or row.reply is None):
        return Nack(text, encode_ack(request, success=False))
    why = "the request has no way to be refused" if need_reply else "no acknowledgement was asked for"
    return Close(f"{text}; closing, as {why}")
