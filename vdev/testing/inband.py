"""A guest without a virtual machine whose front-end kicks and is called by messages (INBAND_NOTIFICATIONS).

Its messages are those of user-mode Linux, in their order: SET_OWNER first, and neither kick nor call is ever given as a
descriptor. Its driver writes and waits for eventfds as any other; :meth:`InBandGuest.serve` makes messages of the ones
and these of the others.
"""

import contextlib
import os
import select
import socket
import time
from collections.abc import Callable
from types import TracebackType

from ring.driver import DriverQueue, GuestMemory
from vdev.net.features import Feature, mask
from vdev.testing.netdriver import NetDriver
from vdev.testing.scripted import ring_setup, shared_regions
from vhost_user.codec import Message, encode
from vhost_user.frontend import FrontEnd
from vhost_user.spec import BackendRequest, ProtocolFeature
from vhost_user.spec import mask as protocol_mask
from vhost_user.wire import U64, U64_LAYOUT, VRING_STATE, VringState

NEEDED = protocol_mask(ProtocolFeature.REPLY_ACK, ProtocolFeature.BACKEND_REQ, ProtocolFeature.INBAND_NOTIFICATIONS)


class InBandGuest:
    """Connected and negotiated, its rings enabled and receive buffers posted; a context manager.

    heard: what the back-end said over its channel, in order, with the ring. response: what is answered to it; None:
    nothing. channel: whether the back-end gets its channel from the start.
    """

    def __init__(self, sock: socket.socket, *, features: int = mask(Feature.VERSION_1, Feature.MRG_RXBUF),
                 size: int = 64, protocol_features: int = NEEDED, channel: bool = True) -> None:
        self.heard: list[tuple[BackendRequest, VringState]] = []
        self.response: int | None = 0
        self.memory = GuestMemory()
        self.driver = NetDriver(self.memory, size=size, features=features)
        self.front_end = FrontEnd(sock)
        self.front_end.set_owner()
        offered = self.front_end.get_features()
        self.front_end.set_protocol_features(self.front_end.get_protocol_features() & protocol_features)
        if channel:
            self.front_end.set_backend_req_fd()
        self.front_end.set_features(features & offered | mask(Feature.PROTOCOL_FEATURES))
        self.front_end.set_mem_table(shared_regions(self.memory))
        for index in range(len(self.queues)):
            self.configure(index)
            self.front_end.set_vring_enable(index, True)
        self.driver.fill()

    @property
    def queues(self) -> tuple[DriverQueue, DriverQueue]:
        """receiveq and transmitq, as the rings are numbered."""
        return self.driver.receiveq, self.driver.transmitq

    def configure(self, index: int, base: int | None = None) -> None:
        """Tell all of ring ``index`` but its descriptors. base: None: where the driver begins."""
        ring = ring_setup(self.queues[index])
        self.front_end.set_vring_num(index, ring.num)
        self.front_end.set_vring_base(index, ring.base if base is None else base)
        self.front_end.set_vring_addr(index, ring.desc, ring.avail, ring.used)

    def serve(self, until: Callable[[], bool], seconds: float = 10.0) -> bool:
        """Carry notifications both ways until ``until()`` -> False if that is still not so after ``seconds``."""
        deadline = time.monotonic() + seconds
        poller = select.poll()
        for fd in (queue.kick_fd for queue in self.queues):
            poller.register(fd, select.POLLIN)
        channel = self.front_end.backend_channel
        if channel is not None:
            poller.register(channel, select.POLLIN)
        while not until():
            if time.monotonic() > deadline:
                return False
            poller.poll(10)  # what is waited for may come without a notification
            self.kick()
            self.listen()
        return True

    def kick(self) -> None:
        """Pass on what the driver has kicked, where messages were agreed on."""
        if not self.front_end.has(ProtocolFeature.INBAND_NOTIFICATIONS):
            return
        for index, queue in enumerate(self.queues):
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(queue.kick_fd)
                self.front_end.vring_kick(index)

    def listen(self) -> None:
        """Take, and answer, what the back-end has said."""
        channel = self.front_end.backend_channel
        while channel is not None and (message := channel.receive()) is not None:
            self._hear(message)

    def _hear(self, message: Message) -> None:
        request, ring = BackendRequest(message.request), VRING_STATE.decode(message.payload)
        self.heard.append((request, ring))
        if request is BackendRequest.VRING_CALL:
            os.eventfd_write(self.queues[ring.index].call_fd, 1)
        if message.need_reply and self.response is not None:
            answer = U64_LAYOUT.encode(U64(self.response))
            self.front_end.backend_channel.send(encode(message.request, answer, reply=True))

    def close(self) -> None:
        """Hang up. Idempotent."""
        self.front_end.close()
        self.driver.close()
        self.memory.close()

    def __enter__(self) -> "InBandGuest":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        self.close()
