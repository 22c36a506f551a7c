"""A device that is killed at any instant, and the one that takes its rings over.

The pump's worker is run one instruction at a time while it serves a burst (vdev/testing/instants.py), and what a
successor would find is kept whenever it changed: the ring, the journal's line, and what has reached the port. From
each of these states a successor takes over, and the guest must get every chain back exactly once, in a ring that goes
on, while every frame it made available reached the port.
"""

import contextlib
import mmap
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from ring.build import ffi
from ring.driver import DriverQueue, GuestMemory
from ring.errors import RingBroken
from ring.pump import Flow, Lane, LaneConfig, Pump
from ring.virtqueue import CallReason, Takeover, VirtQueue
from vdev.net.features import Feature, mask
from vdev.testing.instants import CannotTrace, Stepped
from vdev.testing.netdriver import NetDriver, NetHeader
from vdev.testing.rig import DeviceSide

BASIC = mask(Feature.VERSION_1, Feature.MRG_RXBUF)
EVENT_IDX, IN_ORDER, PACKED = (mask(bit) for bit in (Feature.EVENT_IDX, Feature.IN_ORDER, Feature.RING_PACKED))
FORMATS = {"split": BASIC, "split-in-order": BASIC | IN_ORDER | EVENT_IDX, "packed": BASIC | PACKED | EVENT_IDX,
           "packed-in-order": BASIC | PACKED | IN_ORDER}
SIZE = 8
MEMORY = 1 << 18
BUFFER = 64  # of a receiveq: a frame of 100 bytes takes two
BINDING = 0xB1D


def frame(number: int) -> bytes:
    return bytes([number]) * 100


class Line:
    """A line of a journal, in memory that processes share and nothing else has."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, ffi.sizeof("struct journal_line"))
        self._memory = ffi.from_buffer(self._map)
        self.line = ffi.cast("struct journal_line *", self._memory)
        self._used = ffi.offsetof("struct journal_line", "entries") + SIZE * ffi.sizeof("struct journal_entry")

    def get(self) -> bytes:
        return self._map[:self._used]

    def put(self, data: bytes) -> None:
        self._map[:self._used] = data

    def close(self) -> None:
        ffi.release(self._memory)
        self._map.close()


class Scene:
    """A guest whose ring has been served for a while, and has more to do: always the same one.

    ``queue`` is the device's half, of the ring ``under_test``, which started at ``base``.
    """

    def __init__(self, features: int, to_guest: bool) -> None:
        self.cleanup = contextlib.ExitStack()
        memory = self.cleanup.enter_context(GuestMemory(MEMORY))
        self.base = 0x80068006 if features & PACKED else 0xFFFC
        self.driver = self.cleanup.enter_context(
            NetDriver(memory, size=SIZE, features=features, buffer_size=BUFFER, base=self.base))
        self.side = self.cleanup.enter_context(DeviceSide(memory))
        self.line = Line()
        self.cleanup.callback(self.line.close)
        self.ring = self.driver.receiveq if to_guest else self.driver.transmitq
        self.queue = self.side.queue(self.ring, base=self.base)
        self.queue.record(self.line.line, BINDING, self.base)
        (self.fill if to_guest else self.transmit)()

    def transmit(self) -> None:
        """Three frames sent and taken back, four to be sent, of one or two descriptors: past the ring's end."""
        self.offer(range(3))
        assert len(serve_from_guest(self.queue)) == 3
        assert self.driver.reclaim() == 3
        self.offer(range(3, 7))

    def offer(self, numbers: range) -> None:
        for number in numbers:
            # In order a batch completes whole chains: those of two descriptors are for the others.
            self.driver.offer(frame(number), cuts=[30] if number % 2 else [])
        self.driver.transmitq.publish()

    def fill(self) -> None:
        """Two frames delivered, and all buffers but one posted: past the ring's end."""
        for _ in range(5):
            self.ring.post(writable=[BUFFER])
        self.ring.publish()
        for number in range(2):
            serve_to_guest(self.queue, frame(number))
            assert self.driver.receive(refill=False).frame == frame(number)
        for _ in range(6):
            self.ring.post(writable=[BUFFER])
        self.ring.publish()

    def shared(self) -> bytes:
        """All of the ring, as cheaply as that goes: it is asked for after each instruction."""
        return b"".join(self.driver.memory.read(area.gpa, area.len) for area in self.ring.ring.areas)

    def close(self) -> None:
        self.cleanup.close()

    def __enter__(self) -> "Scene":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve_from_guest(queue: VirtQueue) -> list[bytes]:
    """Take every frame that is available, as any device would -> the frames."""
    frames = []
    while (chain := queue.pop()) is not None:
        frames.append(chain.read()[NetHeader.SIZE:])
        queue.push(chain)
        queue.publish()
    return frames


def serve_to_guest(queue: VirtQueue, data: bytes) -> None:
    """Deliver one frame, in as many buffers as it takes."""
    chains, left = [], NetHeader.SIZE + len(data)
    while left > 0:
        chain = queue.pop()
        chains.append((chain, min(left, chain.writable_len)))
        left -= chain.writable_len
    data = NetHeader(num_buffers=len(chains)).pack() + data
    for chain, length in chains:
        chain.write(data[:length])
        data = data[length:]
        queue.push(chain, length)
    queue.publish()


@dataclass
class Remains:
    """What a successor finds. sent: frames on the port when it came about; sent_later: when it ended."""

    memory: list[bytes]
    line: bytes
    sent: int
    sent_later: int = 0


def lives(features: int, to_guest: bool, arriving: list[bytes] = ()) -> Iterator[list[Remains]]:
    """The remains at all instants at which they change; frames ``arriving`` wait at the port."""
    wire, port = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    report = os.eventfd(0)
    with wire, port, Scene(features, to_guest) as scene:
        for end in (wire, port):
            end.setblocking(False)
        for data in arriving:
            wire.send(NetHeader().pack() + data)
        flow = Flow(scene.queue, True, scene.ring.kick_fd, scene.ring.call_fd)
        config = LaneConfig(to_port=port.fileno(), from_port=port.fileno(), features=features,
                            **{"to_guest" if to_guest else "from_guest": flow})
        lane = Lane(report)
        lane.configure(config)
        pumps: list[Pump] = []
        waiting = scene.ring.outstanding
        expected = sum(-(-(len(data) + NetHeader.SIZE) // BUFFER) for data in arriving) if to_guest else waiting
        found: list[Remains] = []
        sent = 0
        last = None
        with Stepped(lambda: pumps.append(Pump()), lambda: pumps[0].attach(lane)) as worker:
            for _ in worker.instants(lambda: scene.ring.ring.pending() == expected):
                now = scene.shared(), scene.line.get()
                if now == last:
                    continue
                last = now
                with contextlib.suppress(BlockingIOError):
                    while not to_guest:
                        assert wire.recv(1 << 16)[NetHeader.SIZE:] == frame(3 + sent)
                        sent += 1
                if found:
                    found[-1].sent_later = sent
                found.append(Remains(scene.driver.memory.snapshot(), now[1], sent))
        found[-1].sent_later = expected
        lane.close()
        os.close(report)
        yield found


def restore(scene: Scene, remains: Remains) -> None:
    for region, data in zip(scene.driver.memory.regions, remains.memory, strict=True):
        scene.driver.memory.write(region.gpa, data)
    scene.line.put(remains.line)


def remains_of(features: int, to_guest: bool, arriving: list[bytes] = ()) -> list[Remains]:
    try:
        (found,) = lives(features, to_guest, arriving)
    except CannotTrace as reason:
        pytest.skip(str(reason))
    return found


@pytest.mark.parametrize("features", FORMATS.values(), ids=FORMATS)
def test_F07_F08_killed_at_any_instant_while_sending(features: int) -> None:
    """Nothing the guest made available is missing on the port; what leaves twice was of one batch."""
    found = remains_of(features, to_guest=False)
    assert len({state.sent for state in found}) > 1 and len(found) >= 5
    twice = set()
    for state in found:
        with Scene(features, to_guest=False) as scene:
            restore(scene, state)
            published = scene.ring.ring.pending()
            queue = scene.side.queue(scene.ring, base=scene.base)
            queue.take_over(scene.line.line, BINDING)
            again = serve_from_guest(queue)
            # What was not seen to be used is sent: all that had not been, and not one that the guest has back.
            assert again == [frame(number) for number in range(3 + published, 7)]
            assert state.sent >= published
            twice.add(state.sent_later - published)
            assert scene.driver.reclaim() == 4 and scene.ring.outstanding == 0
            scene.offer(range(7, 9))
            assert serve_from_guest(queue) == [frame(7), frame(8)]
            assert scene.driver.reclaim() == 2
    assert max(twice) == 4 and min(twice) == 0


@pytest.mark.parametrize("features", [FORMATS["split"], FORMATS["packed"]], ids=["split", "packed"])
def test_F07_F08_killed_at_any_instant_while_receiving(features: int) -> None:
    """A frame the guest sees is whole, frames come in order, and every buffer comes back once."""
    arriving = [frame(number) for number in range(2, 5)]
    delivered = set()
    for state in remains_of(features, to_guest=True, arriving=arriving):
        with Scene(features, to_guest=True) as scene:
            restore(scene, state)
            queue = scene.side.queue(scene.ring, base=scene.base)
            queue.take_over(scene.line.line, BINDING)
            got = []
            while (received := scene.driver.receive(refill=False)) is not None:
                got.append(received.frame)
            assert got == arriving[:len(got)]
            delivered.add(len(got))
            for number in range(len(got), 3):
                serve_to_guest(queue, frame(10 + number))
                assert scene.driver.receive(refill=False).frame == frame(10 + number)
            assert scene.ring.outstanding == 1
    assert delivered == {0, 3}


def test_without_a_journal_a_packed_ring_is_not_served_from_the_wrong_slot() -> None:
    """What the journal is for: the front-end's base alone leaves nothing but to refuse the ring."""
    with Scene(FORMATS["packed"], to_guest=False) as scene:
        serve_from_guest(scene.queue)
        queue = scene.side.queue(scene.ring, base=scene.base)
        with pytest.raises(RingBroken, match=r"slot 6\).*no journal that fits"):
            queue.take_over()


# ------------------------------------------------------------------------- what QEMU does meanwhile


def drained(scene: Scene, base: int) -> int:
    """Complete what looks available from ``base`` on, as QEMU does with a transmitq while no back-end is there
    -> its base afterwards."""
    queue = scene.side.queue(scene.ring, base=base)
    while (chain := queue.pop()) is not None:
        queue.push(chain)
        queue.publish()
    return queue.base


class Busy(Scene):
    """A transmitq of one slot a frame that started at ``base``, has gone around and stands ``before`` slots in front of
    ``base`` again, all slots in use."""

    def __init__(self, before: int) -> None:
        self._before = before
        super().__init__(FORMATS["packed"], to_guest=False)

    def transmit(self) -> None:
        self.next = 0
        for _ in range(2 * SIZE - self._before):
            self.offer(range(self.next, self.next + 1))
            assert serve_from_guest(self.queue) == [frame(self.next)]
            assert self.driver.reclaim() == 1
            self.next += 1
        self.offer(range(self.next, self.next + SIZE))

    def offer(self, numbers: range) -> None:
        for number in numbers:
            self.driver.offer(frame(number))
        self.driver.transmitq.publish()


def serve_on(queue: VirtQueue) -> list[bytes]:
    """Serve until a kick would be waited for."""
    frames = serve_from_guest(queue)
    while queue.arm():
        queue.disarm()
        frames += serve_from_guest(queue)
    return frames


@pytest.mark.parametrize("deaths", [0, 1, 2])
@pytest.mark.parametrize("before", [0, 1, 3, 7])
def test_F04_what_qemu_completed_in_the_middle_of_a_packed_ring_is_passed_over(before: int, deaths: int) -> None:
    """QEMU goes on from the base of the last start, which lies ``before`` slots ahead of where the device stood."""
    with Busy(before) as scene:
        told = drained(scene, scene.base)
        assert told != scene.base
        mine = [frame(number) for number in range(scene.next, scene.next + before)]
        got: list[bytes] = []
        for _ in range(deaths):  # each before it has come so far, the last one in the middle
            queue = scene.side.queue(scene.ring, base=told)
            queue.take_over(scene.line.line, BINDING)
            queue.record(scene.line.line, BINDING, told)
            if len(mine) > len(got):
                got.append(queue.pop().read()[NetHeader.SIZE:])
                queue.unpop()
                queue.push(queue.pop())
                queue.publish()
        queue = scene.side.queue(scene.ring, base=told)
        found = queue.take_over(scene.line.line, BINDING)
        queue.record(scene.line.line, BINDING, told)
        assert found.completed == (SIZE - before if not deaths else 0)
        assert got + serve_on(queue) == mine
        assert scene.driver.reclaim() == SIZE and scene.ring.outstanding == 0
        scene.offer(range(100, 100 + SIZE))
        assert serve_on(queue) == [frame(number) for number in range(100, 100 + SIZE)]
        assert scene.driver.reclaim() == SIZE


@pytest.mark.parametrize("gap", [False, True], ids=["", "gap"])
@pytest.mark.parametrize("before", [0, 1, 3, 7])
def test_a_front_end_that_asked_where_the_ring_stands_has_dropped_nothing(before: int, gap: bool) -> None:
    """It hands that base back, or this device goes on by itself after it was only looked at."""
    with Busy(before) as scene:
        told = drained(scene, scene.base) if gap else scene.base
        queue = scene.side.queue(scene.ring, base=told)
        queue.take_over(scene.line.line, BINDING)
        queue.record(scene.line.line, BINDING, told)
        asked = scene.side.queue(scene.ring, base=queue.base)
        assert asked.take_over(scene.line.line, BINDING) == Takeover(by_journal=False, completed=0)
        asked.record(scene.line.line, BINDING, told)
        mine = before if gap else SIZE
        assert serve_on(asked) == [frame(number) for number in range(scene.next, scene.next + mine)]
        assert scene.driver.reclaim() == SIZE
        again = scene.side.queue(scene.ring, base=asked.base)
        assert again.take_over(scene.line.line, BINDING) == Takeover(by_journal=False, completed=0)
        scene.offer(range(100, 100 + SIZE))
        assert serve_on(again) == [frame(number) for number in range(100, 100 + SIZE)]


def test_F04_a_guest_that_waits_for_what_was_passed_over_is_called() -> None:
    with Busy(3) as scene:
        told = drained(scene, scene.base)
        queue = scene.side.queue(scene.ring, base=told)
        queue.take_over(scene.line.line, BINDING)
        assert not scene.ring.ring.want_calls(after=6)  # a slot that QEMU completed
        serve_from_guest(queue)
        assert queue.decide() is CallReason.FIRST  # whatever the guest wants
        assert queue.arm() == 1
        assert queue.decide() is CallReason.EVENT_REACHED


def test_chains_completed_meanwhile_are_counted_in_a_split_ring() -> None:
    with Scene(FORMATS["split"], to_guest=False) as scene:
        told = drained(scene, scene.queue.base)
        queue = scene.side.queue(scene.ring, base=told)
        assert queue.take_over(scene.line.line, BINDING) == Takeover(by_journal=False, completed=4)
        assert serve_from_guest(queue) == []


def test_a_split_ring_goes_on_at_its_used_index_whatever_base_is_told() -> None:
    """A front-end that, as QEMU for packed rings, tells the base of the last start."""
    with Scene(FORMATS["split"], to_guest=False) as scene:
        queue = scene.side.queue(scene.ring, base=scene.base)
        assert queue.take_over(scene.line.line, BINDING) == Takeover(by_journal=True, completed=0)
        assert serve_from_guest(queue) == [frame(number) for number in range(3, 7)]


# --------------------------------------------------------------------------- what is not believed


@pytest.mark.parametrize("to_guest", [False, True], ids=["transmitq", "receiveq"])
def test_a_driver_that_was_reset_meanwhile_starts_anew(to_guest: bool) -> None:
    """Same memory, same addresses, same base: only the ring tells."""
    features = FORMATS["packed"]
    with Scene(features, to_guest) as scene:
        scene.queue.record(scene.line.line, BINDING, 0x80008000)
        for area in scene.ring.ring.areas:
            scene.driver.memory.write(area.gpa, bytes(area.len))
        desc, avail, used = (area.gpa for area in scene.ring.ring.areas)
        with DriverQueue(scene.driver.memory, SIZE, features, desc=desc, avail=avail, used=used) as fresh:
            fresh.post(*((), [64]) if to_guest else ([b"x" * 64], ()))
            fresh.publish()
            queue = scene.side.queue(fresh, base=0x80008000)
            assert queue.take_over(scene.line.line, BINDING) == Takeover(by_journal=False, completed=0)
            assert queue.pop() is not None


@pytest.mark.parametrize("progress", [0x7FFF7FFF, 0x80088008, 0x80078003, 0x30008005])
def test_a_line_that_contradicts_the_ring_is_refused(progress: int) -> None:
    with Scene(FORMATS["packed"], to_guest=False) as scene:
        serve_from_guest(scene.queue)
        scene.line.line.progress = progress
        before = scene.shared()
        queue = scene.side.queue(scene.ring, base=scene.base)
        with pytest.raises(RingBroken, match="not known where the predecessor"):
            queue.take_over(scene.line.line, BINDING)
        assert scene.shared() == before
        with pytest.raises(RingBroken):
            queue.pop()


def test_a_line_of_another_ring_is_not_looked_at() -> None:
    with Scene(FORMATS["packed"], to_guest=False) as scene:
        scene.line.line.progress = 0x7FFF7FFF
        queue = scene.side.queue(scene.ring, base=scene.queue.base)
        assert queue.take_over(scene.line.line, BINDING + 1) == Takeover(by_journal=False, completed=0)
