"""What a lying driver gets from a packed ring, as far as only this format has it: flags in place of an index,
buffer ids in place of heads, and chains that end where a descriptor says so or not at all.

What both formats have is in tests/test_ring_hostile.py. Where a case is about something that only a split ring has,
the test here is about what takes its place, and says why.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ring.driver import DriverQueue, Extent, GuestMemory
from ring.driver_packed import DESC_F_AVAIL, DESC_F_USED
from ring.driver_parts import (
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    EVENT_IDX,
    IN_ORDER,
    INDIRECT_DESC,
    RING_PACKED,
)
from ring.errors import ChainError, RingBroken
from ring.virtqueue import CallReason
from vdev.testing.handmade import assert_broken, assert_goes_on, assert_refused, give_back, offer, table
from vdev.testing.rig import DeviceSide, joined

PACKED = 1 << RING_PACKED
INDIRECT = PACKED | 1 << INDIRECT_DESC
EVENT = PACKED | 1 << EVENT_IDX
ORDER = PACKED | 1 << IN_ORDER
NEXT, WRITE, TABLE = DESC_F_NEXT, DESC_F_WRITE, DESC_F_INDIRECT
TURN = DESC_F_AVAIL | DESC_F_USED
WILD = 0xFFFF_FFFF_FFFF_F000


@pytest.fixture
def ring():
    """A ring of 8 that stands at slot 6 of the first round."""
    with joined(size=8, features=INDIRECT, base=0x80068006) as (driver, device):
        yield driver, device


@pytest.fixture
def buffer(ring):
    return ring[0].memory.alloc(4096)


# ---------------------------------------------------------------------------------------- whose turn it is


@pytest.mark.parametrize("flags", [DESC_F_USED, TURN, 0])
def test_R02_available_descriptor_taken_back(ring, buffer, flags):
    """There is no index to move backwards; what can be taken back is the AVAIL flag (2.8.16 forbids it).

    Before the device has looked there is simply nothing, and afterwards nobody looks again.
    """
    driver, device = ring
    offer(driver, (buffer, 1, 0))
    driver.ring.desc[6].flags = flags
    assert device.see() == 0 and device.pop() is None and device.arm() == 0
    driver.ring.desc[6].flags = DESC_F_AVAIL
    chain = device.pop()
    driver.ring.desc[6].flags = flags
    give_back(driver, device, chain)
    assert_goes_on(driver, device)


@pytest.mark.parametrize("flags", [0, DESC_F_AVAIL, DESC_F_USED, TURN])
@pytest.mark.parametrize("wrap", [0, 1])
def test_R02_wrap_counter_that_lies(wrap, flags):
    """An index ahead by more than the size would be a round ahead, here that is the other wrap counter: it counts as
    not available yet, and a ring that is lied to stands still."""
    with joined(size=8, features=PACKED, base=(wrap << 15 | 3) * 0x10001) as (driver, device):
        driver.ring.desc[3].set(driver.memory.alloc(1), 1, flags)
        mine = flags == (DESC_F_AVAIL if wrap else DESC_F_USED)
        assert (device.pop() is not None) == mine
        assert device.state.broken is None


def test_R03_more_available_during_the_drain_is_bounded_by_the_ring(ring, buffer):
    """Descriptors made available for ever: each pop takes one chain and no more than the ring has slots."""
    driver, device = ring
    for slot in range(8):  # all of it, a round on from slot 6
        driver.ring.desc[slot].set(buffer, 1, DESC_F_AVAIL if slot >= 6 else DESC_F_USED, slot)
    taken = [chain.head for chain in iter(device.pop, None)]
    assert taken == [6, 7, 0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("features", [PACKED, ORDER], ids=["one_by_one", "as_a_batch"])
def test_R03_slots_offered_again_before_they_came_back(features):
    """2.8.16 forbids it, but then more chains can be outstanding than the ring has slots. All positions count modulo
    two rounds: nobody but the liar is confused, and nothing but its ring is written."""
    with joined(size=8, features=features) as (driver, device):
        buffer = driver.memory.alloc(4096)
        popped = []
        for turn in range(3):
            for slot in range(8):
                driver.ring.desc[slot].set(buffer, 1, DESC_F_USED if turn % 2 else DESC_F_AVAIL, slot)
            popped += iter(device.pop, None)
        assert [chain.head for chain in popped] == [*range(8)] * 3
        device.unpop(4)
        outside = driver.memory.read(buffer, 4096)
        if features & 1 << IN_ORDER:
            device.push_batch(popped[:20])
        else:
            for chain in popped[:20]:
                device.push(chain)
        device.publish()
        assert device.decide() == CallReason.FLAG_WANTS
        assert device.base == 0x80048004  # 20 slots on, for both directions: two rounds and a half
        assert driver.memory.read(buffer, 4096) == outside
        driver.ring.desc[4].set(buffer, 1, DESC_F_AVAIL, 77)
        assert device.pop().head == 77


# ------------------------------------------------------------------------------------------------ buffer ids


@pytest.mark.parametrize("id", [0, 8, 0x7FFF, 0xFFFF])
def test_R04_any_buffer_id_goes_back_as_it_came(ring, buffer, id):
    """An entry beyond the size breaks a split ring, because it names a descriptor. A buffer id names nothing that the
    device looks up: it only comes back, also if it is in use already."""
    driver, device = ring
    for _ in range(3):  # the same again before it was used
        offer(driver, (buffer, 1, 0), name=id)
    for chain in list(iter(device.pop, None)):
        assert chain.head == id
        device.push(chain)
    device.publish()
    assert [driver.ring.desc[slot].id for slot in (6, 7, 0)] == [id] * 3


# -------------------------------------------------------------------------------------------- where it ends


def test_R08_next_leads_around_the_end_of_the_ring_and_no_further(ring, buffer):
    """There is no field ``next`` that could point elsewhere: after the last slot comes the first."""
    driver, device = ring
    driver.memory.write(buffer, b"abcde")
    offer(driver, *[(buffer + i, 1, 0) for i in range(5)])
    chain = device.pop()
    assert (chain.slots, chain.read()) == (5, b"abcde")
    assert device.base == 0x80060003  # slot 3, in the next round
    give_back(driver, device, chain)


def test_R08_next_on_the_last_entry_of_an_indirect_table_leads_nowhere(ring, buffer):
    """Its length ends a table (2.8.7), whatever lies behind it."""
    driver, device = ring
    gpa, length = table(driver, (buffer, 1, NEXT), (buffer, 2, NEXT), (WILD, 1, NEXT))
    offer(driver, (gpa, length - 16, TABLE))
    chain = device.pop()
    assert (chain.descriptors, chain.readable_len) == (3, 3)
    give_back(driver, device, chain)


@pytest.mark.parametrize("length", [0, 1], ids=["R10_empty", "R09_one_byte"])
@pytest.mark.parametrize("size", [1, 2, 7, 256])
def test_R09_R10_chain_that_goes_once_around_the_ring(size, length):
    """VQ-PACKED-DR-05: no descriptor of the ring ends it. There is no other cycle in this format."""
    with joined(size=size, features=PACKED) as (driver, device):
        gpa = driver.memory.alloc(16)
        offer(driver, *[(gpa, length, NEXT)] * size)
        with pytest.raises(RingBroken, match="goes once around the ring without an end"):
            device.pop()
        assert_broken(driver, device, "RING_E_ENDLESS")


def test_R09_refused_chain_without_an_end(ring):
    """Which slots a refused chain takes has to be known; here none is its last."""
    driver, device = ring
    offer(driver, *[(WILD, 1, NEXT)] * 8)
    with pytest.raises(RingBroken):
        device.pop()
    assert_broken(driver, device, "RING_E_ENDLESS")


def test_R09_longest_chain_that_has_an_end(ring, buffer):
    driver, device = ring
    offer(driver, *[(buffer, 1, 0)] * 8)
    chain = device.pop()
    assert (chain.slots, chain.readable_len) == (8, 8)
    give_back(driver, device, chain)
    assert_goes_on(driver, device)


# --------------------------------------------------------------------------------------- indirect tables


@pytest.mark.parametrize("position", ["first", "last"])
def test_R21_indirect_descriptor_in_a_chain(ring, buffer, position):
    """VQ-PACKED-DR-10: unlike in a split ring, not even at its end."""
    driver, device = ring
    indirect, direct = (*table(driver, (buffer, 1, 0)), TABLE), (buffer, 1, 0)
    chain = (indirect, direct) if position == "first" else (direct, indirect)
    assert_refused(driver, device, "RING_E_INDIRECT_NEXT", *chain, at=chain.index(indirect))


def test_R22_indirect_flag_inside_an_indirect_table_means_nothing(ring, buffer):
    driver, device = ring
    offer(driver, (*table(driver, (buffer, 2, TABLE | NEXT), (buffer, 3, TABLE | WRITE)), TABLE))
    chain = device.pop()
    assert (chain.readable_len, chain.writable_len) == (2, 3)


# ------------------------------------------------------------------------------------- where it is started


@pytest.mark.parametrize("base", [(wrap << 15 | slot) * 0x10001 for wrap in (0, 1) for slot in range(8)] + [
    0x80068002, 0x00078007, 0x80008003], ids=hex)
def test_R58_nonsense_base_after_a_crash(base):
    """A packed ring keeps no position in memory, so the driver has none to falsify: it is the front-end's word, and
    what lies at a wrong place is either not the device's turn or a chain like any other. (A slot that is none is
    refused: test_ring_packed.py.)"""
    with GuestMemory() as memory, DriverQueue(memory, 8, PACKED) as driver, DeviceSide(memory) as side:
        kept = memory.alloc(4096)
        for i in range(6):  # a ring in full swing: two chains used, four offered
            driver.post([b"x"])
            if i == 1:
                driver.publish()
                first = side.queue(driver)
                for chain in list(iter(first.pop, None)):
                    first.push(chain)
                first.publish()
        driver.publish()
        device = side.queue(driver, base=base)
        popped = list(iter(device.pop, None))
        assert len(popped) <= 8
        for chain in popped:
            device.push(chain)
        device.publish()
        assert device.state.broken is None
        assert memory.read(kept, 4096) == bytes(4096)


# --------------------------------------------------------------------------------------- any ring contents


DESCRIPTOR = st.tuples(
    st.sampled_from([0, 0x10000, 0x10000 + 4000, 0x20000, WILD]), st.sampled_from([0, 1, 16, 32, 48, 5000, 0xFFFFFFFF]),
    st.integers(0, 7).flatmap(lambda low: st.sampled_from([low, low | DESC_F_AVAIL, low | DESC_F_USED, low | TURN])),
    st.integers(0, 0xFFFF))


@given(st.lists(DESCRIPTOR, min_size=8, max_size=8), st.sampled_from([PACKED, INDIRECT, INDIRECT | EVENT]),
       st.integers(0, 7), st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_ring_is_survived_and_nothing_beyond_it_is_written(descriptors, features, slot, wrap):
    """Whatever the ring holds; the buffers are not written here."""
    with GuestMemory(extents=[Extent(0x10000, 8192), Extent(0x20000, 4096)]) as memory:
        base = (slot | wrap << 15) * 0x10001
        with joined(size=8, features=features, memory=memory, base=base) as (driver, device):
            for i, fields in enumerate(descriptors):
                driver.ring.desc[i].set(*fields)
            kept = driver.memory.read(0x20000, 4096)
            try:
                for _ in range(20):
                    try:
                        chain = device.pop()
                        if chain is None:
                            break
                        assert 1 <= chain.slots <= 8
                        device.push(chain)
                    except ChainError as error:
                        assert 1 <= error.slots <= 8
                        device.push(error)
                    device.publish()
                    device.decide()
                    device.arm()
            except RingBroken as error:
                assert error.code == "RING_E_ENDLESS"
            assert driver.memory.read(0x20000, 4096) == kept
