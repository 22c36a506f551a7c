"""Rows of docs/conformance/hostile.tsv behind a real socket: what a hostile driver writes into its rings.

The rings alone, and what changes while the device looks at it, are in tests/test_ring_*.py and tests/c. Here a daemon
has to serve on after each test and to hold no more than before (tests/conftest.py).
"""

import os
import threading
import time
from collections.abc import Callable

import pytest

from ring.driver import Buffer, DriverQueue
from ring.driver_split import DescriptorTable, SplitRing
from ring.driver_packed import PackedDescriptors
from ring.driver_parts import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, DESCRIPTOR_BYTES
from vdev.net.features import Feature, mask
from vdev.testing.handmade import add_spoiled
from vdev.testing.headers import BASE, MAX_FRAME, MERGEABLE
from vdev.testing.kept import FRAME, WAIT, KeptDaemon, arrives, readable, stops
from vdev.testing.scripted import ScriptedGuest, ring_setup

pytestmark = pytest.mark.timeout(180)

PACKED = mask(Feature.RING_PACKED)
NOWHERE = 1 << 60
# A frame behind an empty header: were a rule not kept, it would be sent.
FILL = bytes(12) + b"\x77" * 4084
every_ring = pytest.mark.parametrize("ring", [0, PACKED], ids=["split", "packed"])


def attached(daemon: KeptDaemon, features: int, **options: int) -> ScriptedGuest:
    """A guest of the daemon's first device."""
    return ScriptedGuest.connect(daemon.path, features=features, **options)


def collected(queue: DriverQueue, count: int) -> list[tuple[int, int]]:
    """Wait for so many used chains -> (name, length) of each; fewer after WAIT seconds."""
    done, deadline = [], time.monotonic() + WAIT
    while len(done) < count and time.monotonic() < deadline:
        done += [(one.head, one.written) for one in queue.collect_all()]
        time.sleep(0.001)
    return done


class Bad:
    """Chains of a transmitq that break one rule each, by the id of their row. gpa: readable and writable bytes; end:
    the first address behind guest memory."""

    def __init__(self, queue: DriverQueue, gpa: int, end: int) -> None:
        self.queue, self.gpa, self.end = queue, gpa, end
        self.good, self.writable = Buffer(gpa, 40), Buffer(gpa, 40, writable=True)

    def _flags(self, position: int, flags: int) -> Callable[[list], None]:
        return lambda chain: setattr(chain[position], "flags", chain[position].flags | flags)

    def _beyond(self, chain: list) -> None:
        """There is a good descriptor at that place behind the table."""
        memory, table = self.queue.memory, self.queue.ring.desc.gpa
        behind = memory.alloc(DESCRIPTOR_BYTES)
        DescriptorTable(memory, behind)[0].set(self.gpa, 40, 0, 0)
        chain[0].next = (behind - table) // DESCRIPTOR_BYTES
        assert self.queue.ring.size <= chain[0].next and (behind - table) % DESCRIPTOR_BYTES == 0

    def _circle(self, chain: list) -> None:
        chain[1].flags |= DESC_F_NEXT
        chain[1].next = (chain[0].gpa - self.queue.ring.desc.gpa) // 16

    def _nested(self, chain: list) -> None:
        """The table's first and only entry names a copy of the table as it was: two good buffers."""
        memory = self.queue.memory
        copy = memory.alloc(chain[0].len)
        memory.write(copy, memory.read(chain[0].addr, chain[0].len))
        entries = (PackedDescriptors if self.queue.packed else DescriptorTable)(memory, chain[0].addr)
        entries[0].set(copy, chain[0].len, DESC_F_INDIRECT, 0)
        chain[0].len = DESCRIPTOR_BYTES

    def add(self, case: str) -> int:
        """Put the chain of ``case`` on the queue -> its name."""
        two = [self.good, self.good]
        buffers, spoil, direct = {
            "R08_next_beyond_the_table": (two, self._beyond, None),
            "R09_circle": (two, self._circle, None),
            "R10_circle_of_nothing": ([Buffer(0, 0), Buffer(0, 0)], self._circle, None),
            "R15_nowhere": ([Buffer(NOWHERE, 100)], None, None),
            "R15_one_of_three": ([self.good, Buffer(NOWHERE, 100), self.good], None, None),
            "R15_across_the_end": ([Buffer(self.end - 50, 100)], None, None),
            "R17_R44_longer_than_a_frame": ([Buffer(self.gpa & ~0xFFF, 12 + MAX_FRAME + 1)], None, None),
            "R17_R44_a_gibibyte": ([Buffer(self.queue.memory.regions[0].gpa, 1 << 20)] * 1020, None, 0),
            "R18_writable": ([self.writable], None, None),
            "R18_room_behind_the_frame": ([self.good, self.writable], None, None),
            "R19_readable_behind_writable": ([self.writable, self.good], None, None),
            "R20_indirect_not_negotiated": (two, None, 0),
            "R21_indirect_and_next": ((two, self._flags(1, DESC_F_INDIRECT), None) if self.queue.packed
                                      else (two, self._flags(0, DESC_F_NEXT), 0)),
            "R22_table_in_a_table": (two, self._nested, 0),
            "R24_table_nowhere": (two, lambda chain: setattr(chain[0], "addr", NOWHERE), 0),
            "R24_table_across_the_end": (two, lambda chain: setattr(chain[0], "addr", self.end - 24), 0),
            "R24_table_of_15_bytes": (two, lambda chain: setattr(chain[0], "len", 15), 0),
            "R42_no_frame": ([Buffer(self.gpa, 25)], None, None),
            "R42_part_of_a_header": ([Buffer(self.gpa, 11)], None, None),
            "R45_more_pieces_than_a_call_takes": ([Buffer(self.gpa, 1)] * 1024, None, 0),
        }[case]
        return add_spoiled(self.queue, buffers, spoil or (lambda chain: None), direct)


SPLIT_ONLY = ("R08_next_beyond_the_table", "R09_circle", "R10_circle_of_nothing")
BOTH = ("R15_nowhere", "R15_one_of_three", "R15_across_the_end", "R17_R44_longer_than_a_frame", "R17_R44_a_gibibyte",
        "R18_writable", "R18_room_behind_the_frame", "R19_readable_behind_writable", "R20_indirect_not_negotiated",
        "R21_indirect_and_next", "R22_table_in_a_table", "R24_table_nowhere", "R24_table_across_the_end",
        "R24_table_of_15_bytes", "R42_no_frame", "R42_part_of_a_header", "R45_more_pieces_than_a_call_takes")


@pytest.mark.parametrize("ring, case", [
    pytest.param(ring, case, id=f"{name}-{case}")
    for name, ring, cases in (("split", 0, SPLIT_ONLY + BOTH), ("packed", PACKED, BOTH)) for case in cases])
def test_R54_refused_chain_goes_back_with_length_0(daemon, ring, case) -> None:
    """The frames before and behind it are sent, and what it names is not written."""
    features = MERGEABLE | ring
    if case.startswith("R20"):
        features &= ~mask(Feature.INDIRECT_DESC)
    with attached(daemon, features) as guest:
        queue, memory = guest.driver.transmitq, guest.memory
        (region,) = memory.regions
        gpa = memory.alloc(4096)
        memory.write(gpa, FILL)
        bad = Bad(queue, gpa, region.gpa + region.size)
        for _ in range(3):
            name = bad.add(case)
            good = guest.driver.offer(FRAME)
            queue.submit()
            assert arrives(guest.driver) == FRAME
            assert collected(queue, 2) == [(name, 0), (good, 0)]
        assert memory.read(gpa, 4096) == FILL


@every_ring
def test_R11_R12_R27_R41_odd_chains_that_are_legal(daemon, ring) -> None:
    """As many pieces as one call takes, empty buffers nowhere, WRITE on an indirect descriptor, an odd table."""
    data = bytes(12) + bytes(i & 0xFF for i in range(1011))
    with attached(daemon, MERGEABLE | ring) as guest:
        queue, memory = guest.driver.transmitq, guest.memory
        queue.post(readable=[data[i:i + 1] for i in range(1023)], direct=0)
        queue.submit()
        assert arrives(guest.driver) == data[12:]
        gpa = memory.alloc(200)
        memory.write(gpa, bytes(12) + FRAME)
        frame = Buffer(gpa, 12 + len(FRAME))

        def odd(chain: list) -> None:
            moved = gpa + 101
            memory.write(moved, memory.read(chain[0].addr, chain[0].len))
            chain[0].addr = moved
            chain[0].flags |= DESC_F_WRITE

        names = [queue.add([Buffer(NOWHERE, 0), frame, Buffer(NOWHERE, 0)]), add_spoiled(queue, [frame], odd, 0)]
        queue.submit()
        assert [arrives(guest.driver) for _ in names] == [FRAME] * 2
        assert collected(queue, 3)[1:] == [(name, 0) for name in names]


def move_index(by: int) -> Callable[[SplitRing], None]:
    """Spoils the available index."""
    return lambda ring: setattr(ring.avail, "idx", (ring.avail.idx + by) & 0xFFFF)


def offer_head(head: int) -> Callable[[SplitRing], None]:
    """Makes a chain available that begins at descriptor ``head``."""
    return lambda ring: (ring.offer(head), ring.publish())


@pytest.mark.parametrize("break_it", [
    pytest.param(move_index(65), id="R02_split_index_leaps"),
    pytest.param(move_index(-1), id="R02_split_index_goes_back"),
    pytest.param(offer_head(64), id="R04_split_head_outside"),
    pytest.param(offer_head(0xFFFF), id="R04_split_head_far_outside")])
def test_ring_that_means_nothing_any_more_stops(daemon, break_it) -> None:
    """It alone: its err eventfd tells once, frames to the guest go on, and a restart of the ring mends it."""
    with attached(daemon, MERGEABLE) as guest:
        front_end, queue = guest.front_end, guest.driver.transmitq
        assert guest.exchange(FRAME, WAIT) == FRAME
        assert guest.driver.reclaim_all(WAIT)
        error = os.eventfd(0, os.EFD_NONBLOCK)
        front_end.set_vring_err(1, error, need_reply=True)
        good = queue.ring.avail.idx
        break_it(queue.ring)
        queue.kick()
        assert readable(error)
        queue.kick()
        assert front_end.get_vring_base(1) == good
        assert os.eventfd_read(error) == 1
        os.close(error)


@every_ring
def test_R06_R07_R53_full_rings_across_the_end_of_their_indices(daemon, ring) -> None:
    base = None if ring else 65530
    with attached(daemon, MERGEABLE | ring, size=8, base=base) as guest:
        queue = guest.driver.transmitq
        for _ in range(3):
            names = [guest.driver.offer(FRAME) for _ in range(8)]
            queue.submit()
            for _ in names:
                assert arrives(guest.driver) == FRAME
            assert collected(queue, 8) == [(name, 0) for name in names]


def test_R03_available_index_that_is_moved_on_for_ever(daemon) -> None:
    """The control socket and the other device are served all the while."""
    with attached(daemon, MERGEABLE, size=1024) as guest, ScriptedGuest.connect(daemon.bystander) as other:
        ring, done = guest.driver.transmitq.ring, threading.Event()
        ring.desc[0].set(0, 0, DESC_F_NEXT, 0)  # a circle: it takes longer to follow than the index to be moved on

        def move_on() -> None:
            while not done.is_set():
                ring.avail.idx = (ring.used.idx + ring.size) & 0xFFFF
                guest.driver.transmitq.kick()

        thread = threading.Thread(target=move_on)
        thread.start()
        try:
            for _ in range(10):
                assert guest.front_end.get_features()
                assert other.exchange(FRAME, WAIT) == FRAME
            assert stops(guest.front_end, 1)
        finally:
            done.set()
            thread.join()


@pytest.mark.parametrize("count", [2000, pytest.param(100_000, marks=pytest.mark.long)])
@every_ring
def test_R55_bad_chains_and_the_good_one_behind_them(daemon, ring, count) -> None:
    with attached(daemon, MERGEABLE | ring) as guest:
        queue = guest.driver.transmitq
        for _ in range(count // 50):
            names = [queue.add([Buffer(NOWHERE, 100)]) for _ in range(50)]
            queue.submit()
            assert collected(queue, 50) == [(name, 0) for name in names]
        assert guest.exchange(FRAME, WAIT) == FRAME


@every_ring
def test_R46_R47_receive_buffers_that_are_too_small(daemon, ring) -> None:
    """Of 11 bytes: goes back with length 0. Of 60: the frame is lost, the buffer is not, and nothing behind it is
    written."""
    with attached(daemon, BASE | ring, buffers=0) as guest:
        queue, memory = guest.driver.receiveq, guest.memory
        kept = memory.alloc(4096)
        memory.write(kept, FILL)
        names = [queue.add([Buffer(kept, size, writable=True)]) for size in (11, 60, 2000)]
        queue.submit()
        guest.driver.transmit(FRAME + bytes(1000))
        guest.driver.transmit(FRAME[:40])
        assert collected(queue, 2) == [(names[0], 0), (names[1], 52)]
        assert memory.read(kept + 60, 4096 - 60) == FILL[60:]


@every_ring
def test_R48_R50_frame_that_needs_more_buffers_than_there_are(daemon, ring) -> None:
    """Held until there are enough; where there never can be, lost. Nothing is used up by either."""
    with attached(daemon, MERGEABLE | ring, size=16, buffers=0) as guest:
        guest.driver.receiveq.post(writable=[12])
        for _ in range(15):
            guest.driver.receiveq.post(writable=[1])
        guest.driver.receiveq.submit()
        guest.driver.transmit(FRAME)
        guest.driver.transmit(FRAME[:15])
        received = guest.driver.receive_within(WAIT, refill=False)
        assert received is not None and (received.frame, received.buffers) == (FRAME[:15], 16)
        guest.driver.fill(1)
        guest.driver.transmit(FRAME + bytes(2000))
        assert guest.driver.receive_within(0.05) is None
        guest.driver.fill(2)
        assert arrives(guest.driver) == FRAME + bytes(2000)


@every_ring
def test_R18_receive_buffer_that_is_not_to_be_written(daemon, ring) -> None:
    with attached(daemon, MERGEABLE | ring, buffers=0) as guest:
        queue, memory = guest.driver.receiveq, guest.memory
        kept = memory.alloc(2000)
        memory.write(kept, FILL[:2000])
        room = Buffer(memory.alloc(2000), 2000, writable=True)
        names = [queue.add(chain) for chain in ([Buffer(kept, 2000)], [Buffer(kept, 2000), room],
                                                [room, Buffer(kept, 2000)])]
        queue.add([room])
        queue.submit()
        guest.driver.transmit(FRAME)
        assert collected(queue, 4)[:3] == [(name, 0) for name in names]
        assert memory.read(kept, 2000) == FILL[:2000]


@every_ring
def test_R51_receive_buffers_on_the_rings(daemon, ring) -> None:
    """Any outcome will do, but for one: the daemon serves on (which is seen after the test)."""
    with attached(daemon, MERGEABLE | ring, buffers=0) as guest:
        guest.front_end.timeout = WAIT
        parts = [part.gpa for queue in (guest.driver.receiveq, guest.driver.transmitq) for part in queue.ring.areas]
        for part in parts:
            guest.driver.receiveq.add([Buffer(part, 1500, writable=True)])
        for _ in parts:
            guest.driver.offer(os.urandom(1400))
        guest.driver.receiveq.submit()
        guest.driver.transmitq.submit()
        for _ in range(20):
            guest.driver.receiveq.kick()
            guest.driver.transmitq.kick()
            assert guest.front_end.get_features()


@pytest.mark.parametrize("used", [1, 100, 0x8000, 0xFFFF])
def test_R34_R58_nonsense_in_the_used_index_of_a_split_ring(daemon, used) -> None:
    """While it runs it is never read; when the ring starts, it is the base or the ring stops."""
    with attached(daemon, MERGEABLE) as guest:
        assert guest.exchange(FRAME, WAIT) == FRAME
        queue = guest.driver.transmitq
        good = queue.ring.used.idx
        queue.ring.used.idx = (good + used) & 0xFFFF
        guest.driver.offer(FRAME)
        queue.publish()
        queue.kick()
        assert arrives(guest.driver) == FRAME
        base = guest.front_end.get_vring_base(1)
        assert base == queue.ring.used.idx == good + 1
        queue.ring.used.idx = (good + used) & 0xFFFF
        setup = ring_setup(queue)
        guest.front_end.set_vring_base(1, (base + used) & 0xFFFF, need_reply=True)
        guest.front_end.set_vring_kick(1, setup.kick, need_reply=True)
        queue.kick()
        assert guest.front_end.get_features()


@pytest.mark.parametrize("event", [0, 1, 0x7FFF, 0x8000, 0xFFFF])
@every_ring
def test_F22_R35_any_value_in_the_fields_that_suppress_notifications(daemon, ring, event) -> None:
    with attached(daemon, MERGEABLE | ring) as guest:
        for queue in (guest.driver.transmitq, guest.driver.receiveq):
            area = queue.ring.areas[1]  # of a packed ring its event suppression; of a split ring flags, and the event
            if ring:
                guest.memory.write(area.gpa, event.to_bytes(2, "little") * 2)
            else:
                guest.memory.write(area.gpa, event.to_bytes(2, "little"))
                queue.ring.avail.used_event = event
        for _ in range(3):
            guest.driver.offer(FRAME)
            guest.driver.transmitq.publish()
            guest.driver.transmitq.kick()
            deadline = time.monotonic() + WAIT
            while (received := guest.driver.receive()) is None and time.monotonic() < deadline:
                time.sleep(0.001)
            assert received is not None and received.frame == FRAME
