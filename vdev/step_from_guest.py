"""From the guest to the port, one phase at a time: the transmitq of a stepped lane.

What is done, and why, is told in ring/plane/from_guest.inl, whose counterpart this is; both do the same to the ring,
the port and the counters. Here the frame is copied into private memory before it is written to the port.
"""

import os
from collections.abc import Generator, Iterator
from enum import Enum, auto

from ring.build import lib
from ring.errors import ChainError
from ring.header import Header
from ring.pump import LaneEvent
from ring.virtqueue import Chain
from vdev.net.features import Feature
from vdev.step_flow import (
    BURST_FRAMES,
    BURSTS,
    ETHERNET_HEADER,
    NET_HEADER,
    Direction,
    Phase,
    Shared,
    Step,
    port_is_dead,
)


class _Burst(Enum):
    FULL = auto()  # its budget is used up
    EMPTY = auto()  # the driver has made nothing more available
    BLOCKED = auto()  # the port takes no more


class FromGuest(Direction):
    """The transmitq. ``blocked``: a chain was given back, wait until the port is writable."""

    name = "from_guest"
    broken_event = LaneEvent.FROM_GUEST_BROKEN

    def __init__(self, lane: Shared):
        super().__init__(lane)
        self.blocked = False

    def serves(self) -> bool:
        return not self.blocked and super().serves()

    def _turn(self) -> Iterator[Step]:
        yield from self._disarm()
        for _ in range(BURSTS):
            end = yield from self._burst()
            yield from self._push_batch()
            yield from self._publish()
            if self.lane.leaving:
                return
            if end is _Burst.FULL or (end is _Burst.EMPTY and (yield from self._arm())):
                continue
            self.due = False
            return

    def _burst(self) -> Generator[Step, None, _Burst]:
        for _ in range(BURST_FRAMES):
            if self.lane.leaving:
                break
            try:
                chain = yield from self._pop(lib.RING_PIECES_MAX)
            except ChainError as bad:
                yield self._refuse(bad)
                yield self._drop("bad_chain")
                yield from self._finish(bad)
                continue
            if chain is None:
                return _Burst.EMPTY
            if not (yield from self._send(chain)):
                yield from self._give_back(1)
                self.blocked = True
                return _Burst.BLOCKED
            yield from self._finish(chain)
        return _Burst.FULL

    def _finish(self, chain: Chain | ChainError) -> Iterator[Step]:
        if self.queue.features >> Feature.IN_ORDER & 1:
            self._batch.append(chain)
        else:
            yield from self._push(chain)

    def _send(self, chain: Chain) -> Generator[Step, None, bool]:
        """Give the frame of one chain to the port -> False: the port takes no more."""
        config = self.lane.config
        if not self.flow.enabled:
            yield self._drop("disabled")
            return True
        if chain.writable_len:  # 5.1.6.2: a transmitted packet is device-readable only
            yield self._refuse(chain)
            yield self._drop("bad_chain")
            return True
        length = chain.readable_len - NET_HEADER
        if not ETHERNET_HEADER <= length <= config.max_frame:
            yield self._drop("bad_length")
            return True
        header = Header(chain.read(0, NET_HEADER))
        yield self.step(Phase.BYTES_READ, head=chain.head, length=NET_HEADER)
        lost = header.from_guest(length, config.features, config.gso_size_min)
        if lost is None and config.to_port < 0:
            lost = "null"
        if lost is None and self.lane.port_gone:
            lost = "no_port"
        if lost is not None:
            yield self._drop(lost)
            return True
        frame = chain.read(NET_HEADER)
        yield self.step(Phase.BYTES_READ, head=chain.head, length=len(frame))
        return (yield from self._write(chain.head, header, frame))

    def _write(self, head: int, header: Header, frame: bytes) -> Generator[Step, None, bool]:
        """One message -> False: the port takes no more."""
        parts = [bytes(header), frame] if self.lane.config.port_header else [frame]
        try:
            written = os.writev(self.lane.config.to_port, parts)
        except BlockingIOError as full:
            yield self.step(Phase.PORT_WRITE, head=head, length=0, reason=full.strerror)
            return False
        except OSError as error:
            lost = "no_port" if port_is_dead(error) else "port"
            yield self.step(Phase.PORT_WRITE, head=head, length=0, reason=error.strerror)
            if lost == "no_port":
                yield self.port_lost()
            yield self._drop(lost)
            return True
        if written != sum(map(len, parts)):
            yield self.step(Phase.PORT_WRITE, head=head, length=written, reason="a part only")
            yield self._drop("port")
            return True
        self.counts.frames += 1
        self.counts.bytes += len(frame)
        self.counts.gso_frames += header.segmented
        yield self.step(Phase.PORT_WRITE, head=head, length=len(frame))
        return True
