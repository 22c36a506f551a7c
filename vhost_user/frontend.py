"""The front-end's half: a blocking client, one method a message.

For tests, tools and lessons. It judges nothing: it sends what it is told, legal or not, and waits for an
answer where the protocol promises one. Each method that sets something takes ``need_reply``: whether to
ask for an acknowledgement, where REPLY_ACK is negotiated; None means as the front-end's ``ack`` says.
:meth:`FrontEnd.request` takes any request with any payload, and :meth:`FrontEnd.send_raw` any bytes. What
QEMU and others send, in their order, is in :mod:`vhost_user.handshake`.
"""

import select
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .codec import Message, encode
from .errors import Disconnected
from .spec import STOPPED_PHASE, ConfigWrite, IotlbType, ProtocolFeature, Request, VirtioBit, mask, request_name
from .transport import Transport
from .wire import (
    CONFIG,
    CONFIG_ANSWER,
    IOTLB,
    LOG,
    MEM_TABLE,
    NO_CONFIG,
    SINGLE_REGION,
    STATE_TRANSFER,
    U64,
    U64_LAYOUT,
    VRING_ADDR,
    VRING_FD,
    VRING_STATE,
    Config,
    Iotlb,
    Log,
    MemTable,
    Region,
    StateTransfer,
    VringAddr,
    VringFd,
    VringState,
)


# Whoever sets these, of the virtio or of the protocol features, must give addresses, or kick, otherwise.
ASKED_FOR_VIRTIO = mask(VirtioBit.ACCESS_PLATFORM)
ASKED_FOR = mask(ProtocolFeature.GPA_ADDRESSES, ProtocolFeature.INBAND_NOTIFICATIONS)


class NoAnswer(Exception):
    """The back-end did not answer in time, or not with what was asked."""


class RequestRefused(Exception):
    """The back-end acknowledged a request with something other than zero."""


@dataclass(frozen=True)
class SharedRegion:
    """A region of guest memory and the descriptor of the file it lies in, which stays the caller's."""

    fd: int
    gpa: int
    uva: int
    size: int
    offset: int = 0

    @property
    def region(self) -> Region:
        """What goes over the wire beside the descriptor."""
        return Region(self.gpa, self.size, self.uva, self.offset)


@dataclass(frozen=True)
class RingSetup:
    """All a back-end has to know of one ring. ``desc``, ``avail`` and ``used`` are uva (gpa with GPA_ADDRESSES, iova
    behind an IOMMU), ``log`` is the gpa of the used ring in the dirty log; ``kick``, ``call`` and ``err`` are eventfds
    that stay the caller's, None for none."""

    num: int
    desc: int
    avail: int
    used: int
    kick: int | None
    call: int | None
    err: int | None = None
    base: int = 0
    log: int = 0


class FrontEnd:
    """A vhost-user front-end on a connected socket, which it owns from now on.

    timeout    seconds to wait for any answer
    ack        ask for an acknowledgement of every request that has no answer of its own, once REPLY_ACK is
               negotiated; a refusal then raises RequestRefused
    """

    def __init__(self, sock: socket.socket, *, timeout: float = 5.0, ack: bool = True) -> None:
        self.timeout = timeout
        self.ack = ack
        self.features = 0  # virtio features set
        self.protocol_features = 0  # protocol features set
        self.transport = Transport(sock, replies=True)
        self.backend_channel: Transport | None = None  # our end of SET_BACKEND_REQ_FD

    @classmethod
    def connect(cls, path: str, *, timeout: float = 5.0, ack: bool = True) -> "FrontEnd":
        """Connect to a listening back-end. Raises OSError."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(path)
        except OSError:
            sock.close()
            raise
        return cls(sock, timeout=timeout, ack=ack)

    def close(self) -> None:
        """Close the connection and the back-end's channel."""
        self.transport.close()
        if self.backend_channel is not None:
            self.backend_channel.close()
            self.backend_channel = None

    def __enter__(self) -> "FrontEnd":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def has(self, feature: ProtocolFeature) -> bool:
        """``feature`` was set with SET_PROTOCOL_FEATURES."""
        return bool(self.protocol_features >> feature & 1)

    # ------------------------------------------------------------------------------------ any message

    def send_raw(self, data: bytes, fds: Iterable[int] = ()) -> None:
        """Send these very bytes, with ``fds`` on the first of them. Raises Close as Transport.send."""
        self.transport.send(data, fds)

    def request(self, kind: int, payload: bytes = b"", fds: Iterable[int] = (), *, answered: bool = False,
                need_reply: bool | None = None) -> Message | None:
        """Send one request.

        answered    it has an answer of its own, which is returned
        need_reply  ask for an acknowledgement; None: as the attribute ``ack`` says

        Returns the reply, or None if none is due. Raises RequestRefused, NoAnswer, and Disconnected or Close
        when the back-end has closed the connection.
        """
        if need_reply is None:
            need_reply = self.ack and not answered
        need_reply = need_reply and self.has(ProtocolFeature.REPLY_ACK)
        self.send_raw(encode(kind, payload, need_reply=need_reply), fds)
        if not (answered or need_reply):
            return None
        reply = self.receive()
        if reply.request != kind:
            raise NoAnswer(f"{request_name(kind)} was answered with a reply to {reply.name}")
        if not answered and U64_LAYOUT.decode(reply.payload).value:
            raise RequestRefused(f"{request_name(kind)} was refused by the back-end; its log says why")
        return reply

    def receive(self) -> Message:
        """The next reply. Raises NoAnswer after ``timeout`` seconds, otherwise as Transport.receive."""
        deadline = time.monotonic() + self.timeout
        while (message := self.transport.receive()) is None:
            if not self._readable(deadline - time.monotonic()):
                raise NoAnswer(f"the back-end did not answer within {self.timeout} s")
        return message

    def silent(self, seconds: float = 0.05) -> bool:
        """Nothing comes from the back-end within ``seconds``, not even the end of the connection."""
        return not self._readable(seconds)

    def closed(self) -> bool:
        """Wait until the back-end has closed the connection; replies still under way are dropped.

        False if it has not done so within ``timeout`` seconds.
        """
        deadline = time.monotonic() + self.timeout
        while self._readable(deadline - time.monotonic()):
            try:
                self.transport.receive()
            except Disconnected:
                return True
        return False

    def _readable(self, seconds: float) -> bool:
        poller = select.poll()
        poller.register(self.transport, select.POLLIN)
        return bool(poller.poll(max(seconds, 0) * 1000))

    def _ask(self, kind: Request) -> int:
        return U64_LAYOUT.decode(self.request(kind, answered=True).payload).value

    def _set(self, kind: Request, value: int, need_reply: bool | None) -> None:
        self.request(kind, U64_LAYOUT.encode(U64(value)), need_reply=need_reply)

    # -------------------------------------------------------------------------------------- negotiation

    def get_features(self) -> int:
        """Virtio features offered."""
        return self._ask(Request.GET_FEATURES)

    def set_features(self, features: int, need_reply: bool | None = None) -> None:
        """Set virtio features, bit 30 among them where protocol features are used."""
        self._set(Request.SET_FEATURES, features, need_reply)
        self.features = features

    def get_protocol_features(self) -> int:
        """Protocol features offered."""
        return self._ask(Request.GET_PROTOCOL_FEATURES)

    def set_protocol_features(self, features: int, need_reply: bool | None = None) -> None:
        """Set protocol features."""
        self._set(Request.SET_PROTOCOL_FEATURES, features, need_reply)
        self.protocol_features = features

    def set_owner(self, need_reply: bool | None = None) -> None:
        """Start the session."""
        self.request(Request.SET_OWNER, need_reply=need_reply)

    def reset_owner(self, need_reply: bool | None = None) -> None:
        """The deprecated message that a back-end ignores."""
        self.request(Request.RESET_OWNER, need_reply=need_reply)

    def reset_device(self, need_reply: bool | None = None) -> None:
        """Bring the device back to its initial state; memory and session stay."""
        self.request(Request.RESET_DEVICE, need_reply=need_reply)

    def get_queue_num(self) -> int:
        """How many queues there are; for a net device most back-ends mean pairs."""
        return self._ask(Request.GET_QUEUE_NUM)

    def get_status(self) -> int:
        """The device status byte."""
        return self._ask(Request.GET_STATUS)

    def set_status(self, status: int, need_reply: bool | None = None) -> None:
        """Set the device status byte."""
        self._set(Request.SET_STATUS, status, need_reply)

    def set_backend_req_fd(self, need_reply: bool | None = None) -> None:
        """Give the back-end a socket for requests of its own; our end is ``backend_channel``."""
        ours, theirs = socket.socketpair()
        with theirs:
            self.request(Request.SET_BACKEND_REQ_FD, fds=[theirs.fileno()], need_reply=need_reply)
        if self.backend_channel is not None:
            self.backend_channel.close()
        self.backend_channel = Transport(ours)

    # ------------------------------------------------------------------------------------------- memory

    def get_max_mem_slots(self) -> int:
        """How many regions fit."""
        return self._ask(Request.GET_MAX_MEM_SLOTS)

    def set_mem_table(self, regions: Sequence[SharedRegion], need_reply: bool | None = None) -> None:
        """Replace all of guest memory."""
        table = MemTable(tuple(shared.region for shared in regions))
        self.request(Request.SET_MEM_TABLE, MEM_TABLE.encode(table), [shared.fd for shared in regions],
                     need_reply=need_reply)

    def add_mem_reg(self, shared: SharedRegion, need_reply: bool | None = None) -> None:
        """Add one region."""
        self.request(Request.ADD_MEM_REG, SINGLE_REGION.encode(shared.region), [shared.fd],
                     need_reply=need_reply)

    def rem_mem_reg(self, shared: SharedRegion, need_reply: bool | None = None) -> None:
        """Take one region away."""
        self.request(Request.REM_MEM_REG, SINGLE_REGION.encode(shared.region), need_reply=need_reply)

    def iotlb_update(self, iova: int, size: int, uva: int, access: int = 3) -> None:
        """[iova, iova + size) is at ``uva``; access: 1 reading, 2 writing, 3 both. Raises RequestRefused."""
        self._iotlb(Iotlb(iova, size, uva, access, IotlbType.UPDATE))

    def iotlb_invalidate(self, iova: int, size: int) -> None:
        """[iova, iova + size) is no longer what it was. Raises RequestRefused."""
        self._iotlb(Iotlb(iova, size, 0, 0, IotlbType.INVALIDATE))

    def _iotlb(self, message: Iotlb) -> None:
        reply = self.request(Request.IOTLB_MSG, IOTLB.encode(message), answered=True)
        if U64_LAYOUT.decode(reply.payload).value:
            raise RequestRefused("IOTLB_MSG was refused by the back-end; its log says why")

    def share(self, regions: Sequence[SharedRegion]) -> None:
        """Send guest memory as QEMU does: region by region where that was negotiated, else in one table."""
        if self.has(ProtocolFeature.CONFIGURE_MEM_SLOTS):
            for shared in regions:
                self.add_mem_reg(shared)
        else:
            self.set_mem_table(regions)

    # -------------------------------------------------------------------------------------------- rings

    def set_vring_num(self, index: int, num: int, need_reply: bool | None = None) -> None:
        """Set the size of a ring."""
        self._state(Request.SET_VRING_NUM, index, num, need_reply)

    def set_vring_base(self, index: int, base: int, need_reply: bool | None = None) -> None:
        """Set the index a ring starts from."""
        self._state(Request.SET_VRING_BASE, index, base, need_reply)

    def get_vring_base(self, index: int) -> int:
        """Stop a ring -> the index it would have gone on from. Raises NoAnswer if another ring is named."""
        payload = VRING_STATE.encode(VringState(index, 0))
        state = VRING_STATE.decode(self.request(Request.GET_VRING_BASE, payload, answered=True).payload)
        if state.index != index:
            raise NoAnswer(f"GET_VRING_BASE for ring {index} was answered for ring {state.index}")
        return state.num

    def set_vring_addr(self, index: int, desc: int, avail: int, used: int, *, flags: int = 0,
                       log: int = 0, need_reply: bool | None = None) -> None:
        """Say where a ring lies, in uva (gpa with GPA_ADDRESSES)."""
        payload = VRING_ADDR.encode(VringAddr(index, flags, desc, used, avail, log))
        self.request(Request.SET_VRING_ADDR, payload, need_reply=need_reply)

    def set_vring_enable(self, index: int, enabled: bool, need_reply: bool | None = None) -> None:
        """Enable or disable a ring."""
        self._state(Request.SET_VRING_ENABLE, index, int(enabled), need_reply)

    def set_vring_kick(self, index: int, fd: int | None, need_reply: bool | None = None) -> None:
        """Give a ring its kick eventfd, None for polling. Starts it."""
        self._vring_fd(Request.SET_VRING_KICK, index, fd, need_reply)

    def vring_kick(self, index: int, need_reply: bool | None = None) -> None:
        """Kick a ring by message (INBAND_NOTIFICATIONS). Starts it."""
        self._state(Request.VRING_KICK, index, 0, need_reply)

    def set_vring_call(self, index: int, fd: int | None, need_reply: bool | None = None) -> None:
        """Give a ring its call eventfd, None for polling."""
        self._vring_fd(Request.SET_VRING_CALL, index, fd, need_reply)

    def set_vring_err(self, index: int, fd: int | None, need_reply: bool | None = None) -> None:
        """Give a ring its error eventfd, None for none."""
        self._vring_fd(Request.SET_VRING_ERR, index, fd, need_reply)

    def set_ring(self, index: int, ring: RingSetup) -> None:
        """Configure and start one ring, in QEMU's order: the kick comes when all else is there."""
        self.set_vring_num(index, ring.num)
        self.set_vring_base(index, ring.base)
        self.set_vring_addr(index, ring.desc, ring.avail, ring.used)
        if ring.err is not None:
            self.set_vring_err(index, ring.err)
        self.set_vring_kick(index, ring.kick)
        self.set_vring_call(index, ring.call)

    def _state(self, kind: Request, index: int, num: int, need_reply: bool | None) -> None:
        self.request(kind, VRING_STATE.encode(VringState(index, num)), need_reply=need_reply)

    def _vring_fd(self, kind: Request, index: int, fd: int | None, need_reply: bool | None) -> None:
        fds = [] if fd is None else [fd]
        self.request(kind, VRING_FD.encode(VringFd(index, fd is not None)), fds, need_reply=need_reply)

    # ---------------------------------------------------------------------------------------- migration

    def set_log_base(self, fd: int, size: int, offset: int = 0, need_reply: bool | None = None) -> None:
        """Share a dirty log: ``size`` bytes of ``fd`` from ``offset``. Raises RequestRefused.

        It is answered in any case; need_reply is only whether the flag is set, which QEMU does not.
        """
        asked = (self.ack if need_reply is None else need_reply) and self.has(ProtocolFeature.REPLY_ACK)
        self.request(Request.SET_LOG_BASE, LOG.encode(Log(size, offset)), [fd], need_reply=asked, answered=not asked)

    def set_device_state_fd(self, direction: int, fd: int, phase: int = STOPPED_PHASE) -> int:
        """Give the back-end ``fd`` to save its state to or load it from -> what it answers: STATE_NOFD if it uses
        that descriptor, with a lower bit set if it refuses."""
        payload = STATE_TRANSFER.encode(StateTransfer(direction, phase))
        reply = self.request(Request.SET_DEVICE_STATE_FD, payload, [fd], answered=True)
        return U64_LAYOUT.decode(reply.payload).value

    def check_device_state(self) -> int:
        """What became of the transfer: 0 for success."""
        return self._ask(Request.CHECK_DEVICE_STATE)

    def set_log_fd(self, fd: int, need_reply: bool | None = None) -> None:
        """Give the back-end an eventfd that it may signal when it marked something."""
        self.request(Request.SET_LOG_FD, fds=[fd], need_reply=need_reply)

    # ------------------------------------------------------------------------------ configuration space

    def get_config(self, offset: int, size: int) -> bytes | None:
        """``size`` bytes of the configuration space from ``offset``; None: the back-end says that it has none such."""
        reply = self.request(Request.GET_CONFIG, CONFIG.encode(Config(offset, 0, bytes(size))), answered=True)
        config = CONFIG_ANSWER.decode(reply.payload)
        return None if config == NO_CONFIG else config.data

    def set_config(self, offset: int, data: bytes, flags: int = ConfigWrite.DRIVER,
                   need_reply: bool | None = None) -> None:
        """Write ``data`` to the configuration space at ``offset``. flags: of ConfigWrite."""
        self.request(Request.SET_CONFIG, CONFIG.encode(Config(offset, flags, data)), need_reply=need_reply)

    # ------------------------------------------------------------------------------------------ network

    def net_set_mtu(self, mtu: int, need_reply: bool | None = None) -> None:
        """Tell the device the MTU of the guest's network, in bytes."""
        self._set(Request.NET_SET_MTU, mtu, need_reply)

    def send_rarp(self, mac: bytes, need_reply: bool | None = None) -> None:
        """Ask the device to announce ``mac`` (6 bytes) to the network."""
        self.request(Request.SEND_RARP, mac + bytes(2), need_reply=need_reply)

    # --------------------------------------------------------------------------------------- short cuts

    def negotiate(self, features: int | None = None, protocol_features: int | None = None) -> int:
        """Agree on as much as both sides want: all that is offered, or what is offered of the masks given. Features
        that change what the other methods have to be given (see ASKED_FOR) only count in a mask.

        Bit 30 is set wherever it is offered, and LOG_ALL only if asked for: it is no feature of the guest but says
        that a migration is under way. Returns the virtio features set.
        """
        offered = self.get_features()
        protocol_bit = offered & 1 << VirtioBit.PROTOCOL_FEATURES
        if protocol_bit:
            there = self.get_protocol_features()
            self.set_protocol_features(there & (~ASKED_FOR if protocol_features is None else protocol_features))
        self.set_owner()
        wanted = ~(mask(VirtioBit.LOG_ALL) | ASKED_FOR_VIRTIO) if features is None else features
        self.set_features(offered & wanted | protocol_bit)
        return self.features
