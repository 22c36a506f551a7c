"""From the port to the guest, one phase at a time: the receiveq of a stepped lane.

What is done, and why, is told in ring/plane/to_guest.inl, whose counterpart this is; both do the same to the ring,
the port and the counters. Here a frame is read into private memory first, and copied into the chains from there.
"""

import os
from collections.abc import Generator, Iterator
from enum import Enum, auto

from ring.build import lib
from ring.errors import ChainError, MemoryGone, RingBroken
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

PIECES_MAX = lib.RING_PIECES_MAX - 1  # the pump's readv takes a tail, too
_ORDINARY_FRAME = 1514  # bytes; a longer one announces more of its kind
_VLAN_TAG = 4


class _Took(Enum):
    """How an attempt to take one more chain ended."""

    ONE = auto()
    NONE = auto()  # there is none
    NO_PIECES = auto()  # the frame would lie in too many pieces
    BAD = auto()  # a bad chain: all popped for this frame went back used, start again


class _Received(Enum):
    """How an attempt to deliver one frame ended."""

    DONE = auto()  # delivered, held or dropped: the next one, please
    IDLE = auto()  # the port has nothing
    STARVED = auto()  # the guest has too few buffers


class _Intake:
    """The chains a frame is being put into. capacity: bytes, header included."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Nothing taken yet."""
        self.chains: list[Chain] = []
        self.capacity = 0
        self.pieces = 0

    def add(self, chain: Chain) -> None:
        self.chains.append(chain)
        self.capacity += chain.writable_len
        self.pieces += chain.pieces


class ToGuest(Direction):
    """The receiveq. ``starved``: the guest has no buffers, the port is not read until it kicks."""

    name = "to_guest"
    broken_event = LaneEvent.TO_GUEST_BROKEN

    def __init__(self, lane: Shared):
        super().__init__(lane)
        self.starved = False
        self._expect: int = lib.SMALL_FRAME
        self._held: tuple[Header, bytes] | None = None  # a frame that waits for buffers
        self._room = bytearray(lib.FRAME_ROOM)

    @property
    def held(self) -> bytes:
        """The frame that waits for buffers, behind its net header; empty: none."""
        return b"" if self._held is None else bytes(self._held[0]) + self._held[1]

    @property
    def _mergeable(self) -> bool:
        return bool(self.lane.config.features >> Feature.MRG_RXBUF & 1)

    def serves(self) -> bool:
        return self.flow.enabled and self.lane.config.from_port >= 0 and super().serves()

    def _turn(self) -> Iterator[Step]:
        yield from self._disarm()
        self.starved = False
        for _ in range(BURSTS):
            end = yield from self._burst()
            yield from self._publish()
            if self.lane.leaving:
                return
            if end is _Received.STARVED:
                if (yield from self._arm()):
                    continue
                self.starved = True
            if end is not _Received.DONE:
                self.due = False
                return

    def _burst(self) -> Generator[Step, None, _Received]:
        until = self.counts.bytes + lib.BURST_BYTES
        for _ in range(BURST_FRAMES):
            if self.counts.bytes >= until or self.lane.leaving:
                break
            if self._held:
                end = yield from self._place_held(*self._held)
            elif self.lane.port_gone:
                end = _Received.IDLE
            else:
                end = yield from self._receive()
            if end is not _Received.DONE:
                return end
        return _Received.DONE

    # ----------------------------------------------------------------------------------- taking chains

    def _take_chain(self, intake: _Intake) -> Generator[Step, None, _Took]:
        if len(intake.chains) == self.queue.state.size:
            return _Took.NONE
        try:
            chain = yield from self._pop(PIECES_MAX - intake.pieces)
        except ChainError as bad:
            if bad.code == "RING_E_PIECES" and intake.pieces:
                yield from self._give_back(1)  # not the chain's fault
                return _Took.NO_PIECES
            chain = bad
        if chain is None:
            return _Took.NONE
        least = 1 if intake.chains else NET_HEADER
        if not isinstance(chain, ChainError) and not chain.readable_len and chain.writable_len >= least:
            intake.add(chain)
            return _Took.ONE
        yield self._refuse(chain)
        for popped in (*intake.chains, chain):  # the order of the ring allows nothing else
            yield from self._push(popped)
        intake.clear()
        return _Took.BAD

    def _take_chains(self, intake: _Intake, wanted: int) -> Generator[Step, None, _Took]:
        """Take chains until ``wanted`` bytes fit, or, without mergeable buffers, one -> how that ended. With NONE or
        NO_PIECES ``intake`` has some, but not enough; BAD: one bad chain after the other, go on later."""
        bad = 0
        while intake.capacity < wanted and (self._mergeable or not intake.chains):
            took = yield from self._take_chain(intake)
            bad += took is _Took.BAD
            if took is _Took.BAD and bad <= self.queue.state.size and not self.lane.leaving:
                continue
            if took is not _Took.ONE:
                return took
        return _Took.ONE

    # ----------------------------------------------------------------------------------------- placing

    def _fill(self, intake: _Intake, frame: bytes) -> Iterator[Step]:
        """Copy the frame behind the room for its header, as much as fits."""
        rest, offset = memoryview(frame), NET_HEADER
        for chain in intake.chains:
            written = chain.write(rest[:chain.writable_len - offset], offset)
            if written:
                yield self.step(Phase.BYTES_WRITTEN, head=chain.head, length=written)
            rest, offset = rest[written:], 0

    def _complete(self, intake: _Intake, header: Header, length: int) -> Iterator[Step]:
        """Finish a frame whose bytes are all in guest memory: surplus chains, header, used entries."""
        left = NET_HEADER + length
        used: list[tuple[Chain, int]] = []
        for chain in intake.chains:
            if left:
                used.append((chain, min(left, chain.writable_len)))
                left -= used[-1][1]
        yield from self._give_back(len(intake.chains) - len(used))
        header.set_num_buffers(len(used))
        first = used[0][0]
        first.write(bytes(header))
        yield self.step(Phase.BYTES_WRITTEN, head=first.head, length=NET_HEADER)
        for chain, written in used:
            yield from self._push(chain, written)
        self.counts.frames += 1
        self.counts.bytes += length
        self.counts.gso_frames += header.segmented
        self._expect = lib.LARGE_FRAME if length > _ORDINARY_FRAME else lib.SMALL_FRAME

    def _place(self, header: Header, frame: bytes) -> Generator[Step, None, _Received]:
        """Put a frame that lies in private memory into chains, or hold it until the guest posts enough."""
        intake = _Intake()
        try:
            took = yield from self._take_chains(intake, NET_HEADER + len(frame))
        except MemoryGone:
            raise
        except RingBroken:
            self._held = None
            yield self._drop("bad_chain")
            raise
        self._held = None
        if intake.capacity >= NET_HEADER + len(frame):
            yield from self._fill(intake, frame)
            yield from self._complete(intake, header, len(frame))
            return _Received.DONE
        never = (len(intake.chains) == self.queue.state.size or took is _Took.NO_PIECES
                 or (intake.chains and not self._mergeable))
        yield from self._give_back(len(intake.chains))
        if never:
            yield self._drop("too_small")
            return _Received.DONE
        self._held = header, frame
        yield self.step(Phase.FRAME_HELD, length=len(frame))
        return _Received.DONE if took is _Took.BAD else _Received.STARVED

    def _place_held(self, header: Header, frame: bytes) -> Generator[Step, None, _Received]:
        """The lane may have been detached meanwhile, and another driver, which negotiated less, taken over."""
        lost = header.to_guest(self.lane.config.features)
        if lost:
            self._held = None
            yield self._drop(lost)
            return _Received.DONE
        return (yield from self._place(header, frame))

    # --------------------------------------------------------------------------------------- receiving

    def _above_mtu(self, header: Header, frame: memoryview) -> bool:
        """5.1.4: is a frame without segmentation longer than the driver was told? A VLAN tag is not counted."""
        if not self.lane.config.mtu or header.segmented:
            return False
        limit = ETHERNET_HEADER + self.lane.config.mtu
        tagged = frame[12:14] == b"\x81\x00"
        return len(frame) > limit + (_VLAN_TAG if tagged else 0)

    def _receive(self) -> Generator[Step, None, _Received]:
        """Read one frame from the port and deliver it."""
        config, intake = self.lane.config, _Intake()
        took = yield from self._take_chains(intake, self._expect)
        if not intake.chains:
            return _Received.DONE if took is _Took.BAD else _Received.STARVED
        if self.lane.leaving:
            yield from self._give_back(len(intake.chains))
            return _Received.DONE
        raw = bytearray(NET_HEADER)
        try:
            got = os.readv(config.from_port, [raw, self._room] if config.port_header else [self._room])
        except OSError as error:
            yield self.step(Phase.PORT_READ, reason=error.strerror)
            yield from self._give_back(len(intake.chains))
            if port_is_dead(error):
                yield self.port_lost()
            return _Received.IDLE
        if got == 0:
            yield self.step(Phase.PORT_READ, reason="end of file")
            yield from self._give_back(len(intake.chains))
            yield self.port_lost()
            return _Received.IDLE
        frame = memoryview(self._room)[:max(0, got - config.port_header)]
        header = Header(bytes(raw))
        yield self.step(Phase.PORT_READ, length=len(frame))
        yield from self._fill(intake, frame)
        lost = "bad_length" if len(frame) < ETHERNET_HEADER else header.to_guest(config.features)
        if lost is None and (len(frame) > config.max_frame or self._above_mtu(header, frame)):
            lost = "bad_length"
        if lost:
            yield from self._give_back(len(intake.chains))
            yield self._drop(lost)
            return _Received.DONE
        if NET_HEADER + len(frame) <= intake.capacity:
            yield from self._complete(intake, header, len(frame))
            return _Received.DONE
        yield from self._give_back(len(intake.chains))  # longer than expected
        self._expect = lib.LARGE_FRAME
        return (yield from self._place(header, bytes(frame)))
