"""A guest without a virtual machine whose driver is behind an IOMMU.

What the driver takes for guest-physical are iovas: its memory is shared with the back-end as lying elsewhere
(:data:`GPA_SHIFT`), so that an address that is taken for the wrong kind is outside of it. A page is translated when the
back-end asks, and answers are given only inside :meth:`IommuGuest.serve`.
"""

import select
import socket
import time
from collections.abc import Callable
from dataclasses import replace

from vdev.net.features import Feature, mask
from vdev.testing.scripted import ScriptedGuest
from vhost_user.codec import Message, encode
from vhost_user.frontend import SharedRegion
from vhost_user.spec import BackendRequest, IotlbType
from vhost_user.wire import IOTLB, U64, U64_LAYOUT, Iotlb

PAGE = 4096
GPA_SHIFT = 1 << 40
READ, WRITE = 1, 2


class IommuGuest(ScriptedGuest):
    """Connected and negotiated as ScriptedGuest; its rings run when the misses for them are served.

    heard: what the back-end said over its channel, in order. access: what the IOMMU allows, by page address, where it
    is not reading and writing; 0: the page has no translation. answers: False leaves answers to need_reply out.
    """

    def __init__(self, sock: socket.socket, *, features: int = mask(Feature.VERSION_1, Feature.MRG_RXBUF),
                 **options) -> None:
        self.heard: list[Iotlb] = []
        self.access: dict[int, int] = {}
        self.answers = True
        super().__init__(sock, features=features | mask(Feature.ACCESS_PLATFORM), **options)

    def regions(self, gpa_addresses: bool = False) -> list[SharedRegion]:
        return [replace(region, gpa=region.gpa + GPA_SHIFT, uva=region.gpa + GPA_SHIFT if gpa_addresses else region.uva)
                for region in super().regions()]

    def uva(self, iova: int) -> int:
        """What the front-end calls ``iova`` in IOTLB messages."""
        return self.memory.uva(iova)

    def serve(self, until: Callable[[], bool], seconds: float = 10.0) -> bool:
        """Answer the back-end until ``until()`` -> False if that is still not so after ``seconds``."""
        deadline = time.monotonic() + seconds
        poller = select.poll()
        poller.register(self.front_end.backend_channel, select.POLLIN)
        while not until():
            if time.monotonic() > deadline:
                return False
            if poller.poll(10) and (message := self.front_end.backend_channel.receive()) is not None:
                self._serve(message)
        return True

    def _serve(self, message: Message) -> None:
        asked = IOTLB.decode(message.payload)
        self.heard.append(asked)
        done = asked.kind == IotlbType.MISS and self.translate(asked.iova)
        if message.need_reply and self.answers:
            answer = U64_LAYOUT.encode(U64(0 if done else 1))
            self.front_end.backend_channel.send(encode(BackendRequest.IOTLB_MSG, answer, reply=True))

    def translate(self, iova: int) -> bool:
        """Send the translation of the page that has ``iova`` -> is there one?"""
        page = iova // PAGE * PAGE
        access = self.access.get(page, READ | WRITE)
        if access:
            self.front_end.iotlb_update(page, PAGE, self.uva(page), access)
        return bool(access)

    def misses(self) -> list[Iotlb]:
        """The translations that were asked for."""
        return [message for message in self.heard if message.kind == IotlbType.MISS]
