"""The reference alone, on examples small enough to be followed with the specification in the other hand.

That it agrees with the C core is shown by tests/test_ring_agreement.py; nothing here needs the extension.
"""

import subprocess
import sys
from struct import pack, unpack

import pytest

from ring.driver_memory import GuestMemory
from ring.reference import CallReason, ChainError, PackedQueue, RingBroken, Rule, SplitQueue
from ring.reference.packed import Place, place_passed
from ring.reference.split import index_passed

SIZE = 4
NEXT, WRITE, TABLE = 1, 2, 4
AVAIL, USED = 1 << 7, 1 << 15
INDIRECT, EVENT = 1 << 28, 1 << 29
BUFFER = 0x4000_1000


@pytest.fixture
def memory():
    with GuestMemory(0x4000) as memory:
        memory.write(BUFFER, bytes(range(64)))
        yield memory


class Split:
    """A split ring of four at fixed places, written by hand as 2.7 lays it out."""

    desc, avail, used = 0x4000_0000, 0x4000_0100, 0x4000_0200

    def __init__(self, memory: GuestMemory, features: int = 0, base: int = 0) -> None:
        self.memory = memory
        parts = {name: memory.uva(getattr(self, name)) for name in ("desc", "avail", "used")}
        self.device = SplitQueue(memory, size=SIZE, features=features, base=base, **parts)

    def describe(self, at: int, gpa: int, length: int, flags: int = 0, next: int = 0) -> None:
        self.memory.write(self.desc + 16 * at, pack("<QIHH", gpa, length, flags, next))

    def offer(self, index: int, *heads: int) -> None:
        """Heads from available index ``index`` on."""
        for i, head in enumerate(heads, index):
            self.memory.store(self.avail + 4 + 2 * (i % SIZE), 2, head)
        self.memory.store(self.avail + 2, 2, index + len(heads) & 0xFFFF)

    def used_ring(self) -> tuple[int, list[tuple[int, int]]]:
        """The used index and all entries (id, len)."""
        _, idx, *entries = unpack("<HH8I", self.memory.read(self.used, 36))
        return idx, list(zip(entries[::2], entries[1::2], strict=True))


class Packed:
    """A packed ring of four at fixed places, written by hand as 2.8 lays it out."""

    desc, driver_event, device_event = 0x4000_0000, 0x4000_0100, 0x4000_0200

    def __init__(self, memory: GuestMemory, features: int = 0, base: int = 0x80008000) -> None:
        self.memory = memory
        self.device = PackedQueue(memory, size=SIZE, features=features, base=base, desc=memory.uva(self.desc),
                                  avail=memory.uva(self.driver_event), used=memory.uva(self.device_event))

    def offer(self, slot: int, wrap: int, *descriptors: tuple[int, int, int, int]) -> None:
        """Descriptors (gpa, length, flags, id) from a slot on, of the round with that wrap counter."""
        for at, (gpa, length, flags, id) in enumerate(descriptors, slot):
            mark = AVAIL if wrap ^ (at >= SIZE) else USED
            self.memory.write(self.desc + 16 * (at % SIZE), pack("<QIHH", gpa, length, id, flags | mark))

    def slot(self, at: int) -> tuple[int, int, int]:
        """(len, id, flags) there."""
        return unpack("<8xIHH", self.memory.read(self.desc + 16 * at, 16))


# --------------------------------------------------------------------------------------------------- split


def test_split_one_chain_from_end_to_end(memory):
    """2.7.6, 2.7.8: the used index moves on last, and shows the entry."""
    ring = Split(memory)
    ring.describe(2, BUFFER, 4, NEXT, next=0)
    ring.describe(0, BUFFER + 32, 8, WRITE)
    ring.offer(0, 2)
    assert ring.device.see() == 1
    chain = ring.device.pop()
    assert (chain.head, chain.slots, chain.descriptors) == (2, 1, 2)
    assert (chain.read(), chain.writable_len) == (bytes([0, 1, 2, 3]), 8)
    assert chain.write(b"answer") == 6
    ring.device.push(chain, 6)
    assert ring.used_ring()[0] == 0  # nothing is visible yet
    ring.device.publish()
    assert ring.used_ring() == (1, [(2, 6), (0, 0), (0, 0), (0, 0)])
    assert memory.read(BUFFER + 32, 6) == b"answer"
    assert ring.device.decide() == CallReason.FLAG_WANTS
    assert ring.device.pop() is None


def test_split_indirect_table_after_a_direct_descriptor(memory):
    """2.7.5.3.2: direct descriptors, then one that names a table, whose WRITE is ignored."""
    ring = Split(memory, INDIRECT)
    table = BUFFER + 0x100
    ring.describe(0, BUFFER, 1, NEXT, next=3)
    ring.describe(3, table, 32, TABLE | WRITE)  # WRITE is ignored there
    memory.write(table, pack("<QIHHQIHH", BUFFER + 1, 1, NEXT, 1, BUFFER + 8, 4, WRITE, 0))
    ring.offer(0, 0)
    chain = ring.device.pop()
    assert (chain.read(), chain.writable_len, chain.descriptors) == (b"\0\1", 4, 4)


@pytest.mark.parametrize("descriptors, code, at", [
    ([(BUFFER, 1, NEXT, 1), (BUFFER, 1, NEXT, 0)], Rule.LOOP, 0),
    ([(BUFFER, 1, NEXT, 4)], Rule.NEXT_RANGE, 0),
    ([(BUFFER, 1, WRITE | NEXT, 1), (BUFFER, 1, 0, 0)], Rule.ORDER, 1),
    ([(0x1000, 1, 0, 0)], Rule.UNMAPPED, 0),
    ([(BUFFER, 16, TABLE, 0)], Rule.INDIRECT_OFF, 0),
])
def test_split_chain_that_breaks_a_rule_goes_back_with_length_0(memory, descriptors, code, at):
    """And the ring goes on."""
    ring = Split(memory)
    for i, descriptor in enumerate(descriptors):
        ring.describe(i, *descriptor)
    ring.offer(0, 0)
    with pytest.raises(ChainError) as caught:
        ring.device.pop()
    assert (caught.value.code, caught.value.at, caught.value.head) == (code, at, 0)
    ring.device.push(caught.value)
    ring.device.publish()
    assert ring.used_ring()[:1] == (1,) and ring.device.state.broken is None


@pytest.mark.parametrize("heads, code, at", [((4,), Rule.HEAD_RANGE, 4), ((0,) * 5, Rule.AVAIL_AHEAD, 5)])
def test_split_ring_that_means_nothing_stops(memory, heads, code, at):
    """Whatever is asked of it, it says why."""
    ring = Split(memory)
    ring.offer(0, *heads)
    for verb in (ring.device.pop, ring.device.publish, ring.device.arm):
        with pytest.raises(RingBroken) as caught:
            verb()
        assert (caught.value.code, caught.value.at) == (code, at)


def test_split_indices_go_on_from_65535_to_0(memory):
    """2.7.13.3: and their entries are found modulo the queue size."""
    memory.store(Split.used + 2, 2, 65535)
    ring = Split(memory, base=65535)
    for i in (1, 2):
        ring.describe(i, BUFFER, 1)
    ring.offer(65535, 1, 2)
    assert ring.device.see() == 2
    for _ in range(2):
        ring.device.push(ring.device.pop())
    ring.device.publish()
    assert ring.used_ring() == (1, [(2, 0), (0, 0), (0, 0), (1, 0)])


@pytest.mark.parametrize("features, flags, event, reasons", [
    (0, 0, 9, ["FLAG_WANTS", "FLAG_WANTS", "FLAG_WANTS"]),  # used_event is ignored
    (0, 1, 0, ["FLAG_SUPPRESSED", "FLAG_SUPPRESSED", "FLAG_SUPPRESSED"]),
    (EVENT, 1, 1, ["FIRST", "EVENT_REACHED", "EVENT_AHEAD"]),  # flags are
    (EVENT, 0, 2, ["FIRST", "EVENT_AHEAD", "EVENT_REACHED"]),
])
def test_split_driver_is_called_as_it_wishes(memory, features, flags, event, reasons):
    """2.7.7.2, but for the first decision, which is never no."""
    ring = Split(memory, features)
    ring.describe(0, BUFFER, 1)
    ring.offer(0, 0, 0, 0)
    memory.store(ring.avail, 2, flags)
    memory.store(ring.avail + 4 + 2 * SIZE, 2, event)
    for reason in reasons:
        ring.device.push(ring.device.pop())
        assert ring.device.decide() == CallReason.NOTHING_NEW
        ring.device.publish()
        assert ring.device.decide() == CallReason[reason]


@pytest.mark.parametrize("features, flag", [(0, 1), (EVENT, 0)])
def test_split_refuses_kicks_with_the_flag_unless_there_is_an_index(memory, features, flag):
    """2.7.10.2: with EVENT_IDX the flag stays 0."""
    ring = Split(memory, features)
    ring.device.disarm()
    assert memory.load(ring.used, 2) == flag
    ring.device.arm()
    assert memory.load(ring.used, 2) == 0


def test_split_batch_in_order_is_one_entry(memory):
    """2.7.9: it stands where the first one's would, names the last, and the index passes all."""
    ring = Split(memory)
    for i in range(3):
        ring.describe(i, BUFFER, 1)
    ring.offer(0, 0, 1, 2)
    ring.device.push_batch([ring.device.pop() for _ in range(3)])
    ring.device.publish()
    assert ring.used_ring() == (3, [(2, 0), (0, 0), (0, 0), (0, 0)])


def test_split_asks_for_the_chain_after_the_last_one_known(memory):
    """2.7.10.2: not after the last one used."""
    ring = Split(memory, EVENT)
    ring.describe(0, BUFFER, 1)
    ring.offer(0, 0, 0)
    ring.device.pop()
    ring.device.unpop()
    assert ring.device.arm() == 0  # both are known: no kick will come for them
    assert memory.load(ring.used + 4 + 8 * SIZE, 2) == 2
    ring.offer(2, 0)
    assert ring.device.arm() == 1


@pytest.mark.parametrize("event, before, now, passed", [
    (5, 5, 6, True), (6, 5, 6, False), (4, 5, 6, False), (65535, 65534, 1, True), (1, 65534, 1, False)])
def test_split_event_index(event, before, now, passed):
    """2.7.7.2: the entry with that index was filled in."""
    assert index_passed(event, before, now) == passed


# -------------------------------------------------------------------------------------------------- packed


def test_packed_one_chain_from_end_to_end(memory):
    """2.8.6: one used descriptor, over the first slot, with the id of the last one."""
    ring = Packed(memory)
    ring.offer(0, 1, (BUFFER, 4, NEXT, 99), (BUFFER + 32, 8, WRITE, 7))
    assert ring.device.see() == 1
    chain = ring.device.pop()
    assert (chain.head, chain.slots) == (7, 2)  # the id of its last descriptor
    assert chain.read() == bytes([0, 1, 2, 3])
    ring.device.push(chain, chain.write(b"answer"))
    assert ring.slot(0) == (6, 7, NEXT | AVAIL)  # flags, which show it, are still the driver's
    ring.device.publish()
    assert ring.slot(0) == (6, 7, WRITE | AVAIL | USED)
    assert ring.slot(1) == (8, 7, WRITE | AVAIL)  # skipped
    assert ring.device.base == 0x8002_8002
    assert ring.device.pop() is None


def test_packed_chain_over_the_end_of_the_ring(memory):
    """2.8.1: there the wrap counter flips."""
    ring = Packed(memory, base=0x8003_8003)
    ring.offer(3, 1, (BUFFER, 1, NEXT, 0), (BUFFER + 1, 1, 0, 5))
    chain = ring.device.pop()
    assert chain.read() == b"\0\1"
    ring.device.push(chain)
    ring.device.publish()
    assert ring.slot(3) == (0, 5, AVAIL | USED)
    assert ring.device.base == 0x0001_0001  # the second round


def test_packed_first_descriptor_of_a_batch_is_shown_last(memory):
    """2.8.9: a driver finds all of it or nothing."""
    ring = Packed(memory)
    ring.offer(0, 1, (BUFFER, 8, WRITE, 0), (BUFFER + 8, 8, WRITE, 1))
    for _ in range(2):
        ring.device.push(ring.device.pop(), 8)
    assert [ring.slot(i)[2] for i in range(2)] == [WRITE | AVAIL, WRITE | AVAIL | USED]
    ring.device.publish()
    assert ring.slot(0)[2] == WRITE | AVAIL | USED


def test_packed_used_descriptors_lie_in_the_order_of_use(memory):
    """2.8.12: not in the order in which they were made available."""
    ring = Packed(memory)
    ring.offer(0, 1, (BUFFER, 1, NEXT, 0), (BUFFER, 1, 0, 10), (BUFFER, 1, 0, 11))
    first, second = ring.device.pop(), ring.device.pop()
    ring.device.push(second)
    ring.device.push(first)
    ring.device.publish()
    assert [ring.slot(i)[1] for i in range(2)] == [11, 10]
    assert ring.device.state.next_used == 3


def test_packed_batch_in_order_is_one_descriptor(memory):
    """2.8.8: over the first one's first slot, with the last one's id."""
    ring = Packed(memory)
    ring.offer(0, 1, *[(BUFFER, 1, 0, id) for id in (20, 21, 22)])
    ring.device.push_batch([ring.device.pop() for _ in range(3)])
    ring.device.publish()
    assert ring.slot(0) == (0, 22, AVAIL | USED)
    assert [ring.slot(i)[2] for i in (1, 2)] == [AVAIL, AVAIL]
    assert ring.device.state.next_used == 3


def test_packed_indirect_table_has_consecutive_entries(memory):
    """2.8.7: of an entry's flags only WRITE counts, and its id does not."""
    ring = Packed(memory, INDIRECT)
    table = BUFFER + 0x100
    memory.write(table, pack("<QIHHQIHH", BUFFER, 2, 0xFFFF, AVAIL, BUFFER + 8, 4, 0xFFFF, WRITE | NEXT | TABLE))
    ring.offer(0, 1, (table, 32, TABLE | WRITE, 3))
    chain = ring.device.pop()
    assert (chain.head, chain.slots, chain.read(), chain.writable_len) == (3, 1, b"\0\1", 4)


def test_packed_chain_that_breaks_a_rule_is_skipped_to_its_end(memory):
    """2.8.6: it has to be given back with its id and its length in the ring."""
    ring = Packed(memory)
    ring.offer(0, 1, (0x1000, 1, NEXT, 1), (BUFFER, 1, NEXT, 2), (BUFFER, 1, 0, 3), (BUFFER, 1, 0, 4))
    with pytest.raises(ChainError) as caught:
        ring.device.pop()
    assert (caught.value.code, caught.value.at, caught.value.head, caught.value.slots) == (Rule.UNMAPPED, 0, 3, 3)
    assert ring.device.pop().head == 4


@pytest.mark.parametrize("first", [BUFFER, 0x1000])
def test_packed_chain_without_an_end_stops_the_ring(memory, first):
    """2.8.17: a list is no longer than the ring, whether its first buffer is good or not."""
    ring = Packed(memory)
    ring.offer(0, 1, (first, 1, NEXT, 1), *[(BUFFER, 1, NEXT, 1)] * 3)
    with pytest.raises(RingBroken) as caught:
        ring.device.pop()
    assert (caught.value.code, caught.value.at) == (Rule.ENDLESS, 0)


def test_packed_asks_for_the_place_where_nothing_was_found(memory):
    """2.8.10: not for the next one to take."""
    ring = Packed(memory, EVENT)
    ring.offer(0, 1, (BUFFER, 1, 0, 0))
    chain = ring.device.pop()
    assert ring.device.see() == 0
    ring.device.unpop()
    assert ring.device.arm() == 0
    assert memory.read(ring.device_event, 4) == pack("<HH", 1 | 1 << 15, 2)
    assert ring.device.pop().head == chain.head


@pytest.mark.parametrize("features, wish, reasons", [
    (EVENT, pack("<HH", 0, 0), ["FLAG_WANTS", "FLAG_WANTS", "FLAG_WANTS"]),
    (EVENT, pack("<HH", 0, 1), ["FLAG_SUPPRESSED", "FLAG_SUPPRESSED", "FLAG_SUPPRESSED"]),
    (EVENT, pack("<HH", 1 << 15 | 2, 2), ["FIRST", "EVENT_AHEAD", "EVENT_REACHED"]),
    (EVENT, pack("<HH", 2, 2), ["FIRST", "EVENT_AHEAD", "EVENT_AHEAD"]),  # not in this round
    (0, pack("<HH", 1 << 15 | 2, 2), ["FLAG_WANTS", "FLAG_WANTS", "FLAG_WANTS"]),  # DESC needs the feature
    (EVENT, pack("<HH", 0, 3), ["FLAG_WANTS", "FLAG_WANTS", "FLAG_WANTS"]),  # a reserved value
])
def test_packed_driver_is_called_as_it_wishes(memory, features, wish, reasons):
    """2.8.10, but for the first decision about a place, which is never no."""
    ring = Packed(memory, features)
    ring.offer(0, 1, *[(BUFFER, 1, 0, id) for id in range(3)])
    memory.write(ring.driver_event, wish)
    for reason in reasons:
        ring.device.push(ring.device.pop())
        assert ring.device.decide() == CallReason.NOTHING_NEW
        ring.device.publish()
        assert ring.device.decide() == CallReason[reason]


@pytest.mark.parametrize("features, refused, wanted", [(0, (0, 1), (0, 0)), (EVENT, (0, 0), (1 << 15, 2))])
def test_packed_refuses_kicks_with_the_flags_unless_there_is_a_place(memory, features, refused, wanted):
    """2.8.10, 2.8.14."""
    ring = Packed(memory, features)
    ring.device.disarm()
    assert memory.read(ring.device_event, 4) == pack("<HH", *refused)
    ring.device.arm()
    assert memory.read(ring.device_event, 4) == pack("<HH", *wanted)


@pytest.mark.parametrize("event, moved, now, passed", [
    (Place(2, True), 1, Place(3, True), True),
    (Place(3, True), 1, Place(3, True), False),  # the next one
    (Place(2, False), 1, Place(3, True), False),  # one round earlier
    (Place(3, True), 2, Place(1, False), True),  # the counter has flipped since
    (Place(0, True), 5, Place(1, False), True),
])
def test_packed_event_place(event, moved, now, passed):
    """2.8.10: the descriptor at that offset was used in the round with that wrap counter."""
    assert place_passed(event, moved, now, SIZE) == passed


@pytest.mark.parametrize("slots, place", [
    (0, Place(1, True)), (2, Place(3, True)), (3, Place(0, False)), (-1, Place(0, True)), (-2, Place(3, False)),
    (8, Place(1, True))])
def test_packed_places_move(slots, place):
    """2.8.1: the wrap counter flips at the end of the ring, in either direction."""
    assert Place(1, True).moved(slots, SIZE) == place


# ------------------------------------------------------------------------------------------------- the package


def test_needs_nothing_compiled():
    """Nor does what docs/rings.md uses beside it."""
    code = "import sys, ring.reference.show, ring.driver; sys.exit('ring._core' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
