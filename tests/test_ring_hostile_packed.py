"""What a lying driver gets from a packed ring: a refused chain, a broken ring, never more.

The cases of tests/test_ring_hostile.py and tests/test_ring_snapshot.py as far as this format has them, by the same
ids. There is no index that could be nonsense (R02, R04), no next field (R08), and flags inside an indirect table
mean nothing (R22); what takes their place is a chain that goes once around the ring.
"""

import random
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ring.driver import DriverQueue, Extent, GuestMemory
from ring.driver_packed import DESC_F_AVAIL, DESC_F_USED, PACKED_DESCRIPTOR
from ring.driver_parts import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, EVENT_IDX, INDIRECT_DESC, RING_PACKED
from ring.errors import ChainError, RingBroken
from ring.virtqueue import CallReason, VirtQueue
from vdev.testing.rig import DeviceSide, joined

PACKED = 1 << RING_PACKED
INDIRECT = PACKED | 1 << INDIRECT_DESC
EVENT = PACKED | 1 << EVENT_IDX
NEXT, WRITE, TABLE = DESC_F_NEXT, DESC_F_WRITE, DESC_F_INDIRECT
TURN = DESC_F_AVAIL | DESC_F_USED
PIECES_MAX = 1023
WILD = 0xFFFF_FFFF_FFFF_F000
ID = 5


@pytest.fixture
def ring():
    with joined(size=8, features=INDIRECT, base=0x80068006) as (driver, device):
        yield driver, device


@pytest.fixture
def buffer(ring):
    return ring[0].memory.alloc(4096)


def offer(driver: DriverQueue, *descriptors: tuple[int, int, int], id: int = ID) -> None:
    driver.ring.offer(descriptors, id)
    driver.publish()


def table(memory: GuestMemory, *entries: tuple[int, int, int]) -> tuple[int, int]:
    """An indirect table of these (addr, len, flags) in new memory -> (gpa, bytes)."""
    gpa = memory.alloc(16 * len(entries))
    memory.write(gpa, b"".join(PACKED_DESCRIPTOR.pack(addr, length, 0xBEEF, flags) for addr, length, flags in entries))
    return gpa, 16 * len(entries)


def assert_goes_on(driver: DriverQueue, device: VirtQueue) -> None:
    """The next good chain is served as if nothing had been."""
    offer(driver, (driver.memory.alloc(1), 1, 0), id=3)
    chain = device.pop()
    assert (chain.head, chain.read()) == (3, b"\0")
    device.push(chain)
    device.publish()
    assert driver.ring.next_completion() == (3, 0)


def assert_refused(driver: DriverQueue, device: VirtQueue, code: str, at: int, *descriptors: tuple) -> None:
    """The chain breaks rule ``code`` at descriptor ``at``; it goes back whole with length 0 (R54), and the ring goes
    on."""
    offer(driver, *descriptors)
    with pytest.raises(ChainError) as caught:
        device.pop()
    assert (caught.value.code, caught.value.at, caught.value.head) == (code, at, ID)
    assert caught.value.slots == len(descriptors)
    device.push(caught.value)
    device.publish()
    assert driver.ring.next_completion() == (ID, 0)
    assert device.state.broken is None
    assert_goes_on(driver, device)


def assert_broken(driver: DriverQueue, device: VirtQueue, code: str) -> None:
    """The ring has stopped at rule ``code`` for good, says so whatever is asked of it, and is not written any more."""
    before = driver.memory.snapshot()
    for verb in (device.see, device.pop, device.take, device.arm, device.publish, device.decide):
        with pytest.raises(RingBroken) as caught:
            verb()
        assert caught.value.code == code
    assert device.state.broken.code == code
    assert driver.memory.snapshot() == before


# ------------------------------------------------------------------------------------------------- chains


@pytest.mark.parametrize("length", [0, 1], ids=["R10_empty", "R09_one_byte"])
@pytest.mark.parametrize("size", [1, 2, 7, 256])
def test_R09_R10_chain_that_goes_once_around_the_ring(size, length):
    """VQ-PACKED-DR-05: no descriptor of the ring ends it."""
    with joined(size=size, features=PACKED) as (driver, device):
        gpa = driver.memory.alloc(16)
        offer(driver, *[(gpa, length, NEXT)] * size)
        with pytest.raises(RingBroken):
            device.pop()
        assert_broken(driver, device, "RING_E_ENDLESS")


def test_R09_refused_chain_without_an_end(ring):
    """Which slots a refused chain takes has to be known; here none is its last."""
    driver, device = ring
    offer(driver, *[(WILD, 1, NEXT)] * 8)
    with pytest.raises(RingBroken):
        device.pop()
    assert_broken(driver, device, "RING_E_ENDLESS")


def test_R03_more_available_during_the_drain_is_bounded_by_the_ring(ring, buffer):
    """Descriptors made available for ever: each pop takes one chain and no more than the ring has slots."""
    driver, device = ring
    for slot in range(8):  # two laps look available at once
        driver.ring.desc[slot].set(buffer, 1, DESC_F_AVAIL if slot >= 6 else DESC_F_USED, slot)
    taken = [chain.head for chain in iter(device.pop, None)]
    assert taken == [6, 7, 0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("id", [0, 8, 0x7FFF, 0xFFFF])
def test_R04_R05_any_buffer_id_goes_back_as_it_came(ring, buffer, id):
    driver, device = ring
    for _ in range(3):  # the same again before it was used
        offer(driver, (buffer, 1, 0), id=id)
    for chain in list(iter(device.pop, None)):
        assert chain.head == id
        device.push(chain)
    device.publish()
    assert [driver.ring.desc[slot].id for slot in (6, 7, 0)] == [id] * 3


@pytest.mark.parametrize("count", [515, PIECES_MAX])
def test_R11_long_indirect_chain_is_legal(count):
    with joined(size=256, features=INDIRECT) as (driver, device):
        driver.post([b"%c" % (i & 0xFF) for i in range(count)], direct=0)
        driver.publish()
        chain = device.pop()
        assert (chain.descriptors, chain.slots) == (count + 1, 1)
        assert chain.read() == bytes(i & 0xFF for i in range(count))


def test_R11_R45_more_pieces_than_one_call_of_the_kernel_takes():
    with joined(size=1500, features=PACKED) as (driver, device):
        gpa = driver.memory.alloc(1)
        assert_refused(driver, device, "RING_E_PIECES", PIECES_MAX,
                       *[(gpa, 1, NEXT)] * PIECES_MAX, (gpa, 1, 0))


def test_R12_empty_buffer_at_a_wild_address(ring, buffer):
    driver, device = ring
    offer(driver, (WILD, 0, NEXT), (buffer, 3, NEXT), (WILD, 0, WRITE))
    chain = device.pop()
    assert (chain.slots, chain.readable_len, chain.writable_len) == (3, 3, 0)
    assert chain.write(b"nowhere") == 0


@pytest.mark.parametrize("where, length", [
    ("before", 4097), ("last", 2), ("last", 0xFFFFFFFF), ("behind", 1), ("wild", 4096)])
@pytest.mark.parametrize("flags", [0, WRITE])
@pytest.mark.parametrize("after", [0, 2])
def test_R15_buffer_not_wholly_in_guest_memory(ring, where, length, flags, after):
    driver, device = ring
    region = driver.memory.regions[0]
    end = region.gpa + region.size
    addr = {"before": region.gpa - 4096, "last": end - 1, "behind": end, "wild": WILD}[where]
    assert_refused(driver, device, "RING_E_UNMAPPED", 6,
                   (addr, length, flags | NEXT * (after > 0)), *[(0, 0, NEXT | WRITE), (0, 0, WRITE)][:after])


ADJACENT = [Extent(0x10000, 1 << 20, uva=1 << 40), Extent(0x10000 + (1 << 20), 4096, uva=1 << 30)]
BORDER = 0x10000 + (1 << 20)


def test_R15_buffer_across_adjacent_regions():
    with GuestMemory(extents=ADJACENT) as memory, joined(features=PACKED, memory=memory) as (driver, device):
        memory.write(BORDER - 3, b"abcdef")
        offer(driver, (BORDER - 3, 6, NEXT), (BORDER - 100, 200, WRITE))
        chain = device.pop()
        assert (chain.read(), chain.writable_len) == (b"abcdef", 200)
        assert chain.write(bytes(range(200))) == 200
        assert memory.read(BORDER - 100, 200) == bytes(range(200))


@pytest.mark.parametrize("flags", [0, WRITE])
def test_R17_lengths_add_up_to_more_than_4_GiB(flags):
    with GuestMemory(2 << 30) as memory, joined(features=PACKED, memory=memory) as (driver, device):
        start = memory.regions[0].gpa  # sparse: nothing is touched
        offer(driver, *[(start, (2 << 30) - (i == 0), NEXT * (i < 2) | flags) for i in range(3)])
        with pytest.raises(ChainError) as caught:
            device.pop()
        assert (caught.value.code, caught.value.at) == ("RING_E_LENGTH", 2)


def test_R19_readable_after_writable(ring, buffer):
    driver, device = ring
    assert_refused(driver, device, "RING_E_ORDER", 0,
                   (buffer, 1, NEXT), (buffer, 1, NEXT | WRITE), (buffer, 1, NEXT), (buffer, 1, WRITE))


# --------------------------------------------------------------------------------------- indirect tables


def test_R20_indirect_without_negotiation():
    with joined(size=8, features=PACKED) as (driver, device):
        gpa = driver.memory.alloc(16)
        assert_refused(driver, device, "RING_E_INDIRECT_OFF", 0, (*table(driver.memory, (gpa, 1, 0)), TABLE))


@pytest.mark.parametrize("position", ["first", "last"])
def test_R21_indirect_descriptor_in_a_chain(ring, buffer, position):
    """VQ-PACKED-DR-10: unlike in a split ring, not even at its end."""
    driver, device = ring
    indirect = table(driver.memory, (buffer, 1, 0))
    if position == "first":
        chain, at = [(*indirect, TABLE | NEXT), (buffer, 1, 0)], 6
    else:
        chain, at = [(buffer, 1, NEXT), (*indirect, TABLE)], 7
    assert_refused(driver, device, "RING_E_INDIRECT_NEXT", at, *chain)


def test_R22_indirect_flag_inside_an_indirect_table_means_nothing(ring, buffer):
    driver, device = ring
    offer(driver, (*table(driver.memory, (buffer, 2, TABLE | NEXT), (buffer, 3, TABLE | WRITE)), TABLE))
    chain = device.pop()
    assert (chain.readable_len, chain.writable_len) == (2, 3)


def test_R19_R15_rules_inside_an_indirect_table(ring, buffer):
    driver, device = ring
    wrong = table(driver.memory, (buffer, 1, WRITE), (buffer, 1, 0))
    assert_refused(driver, device, "RING_E_ORDER", 1, (*wrong, TABLE))
    wild = table(driver.memory, (buffer, 1, 0), (buffer, 1, 0), (WILD, 1, 0))
    assert_refused(driver, device, "RING_E_UNMAPPED", 2, (*wild, TABLE))


@pytest.mark.parametrize("length", [0, 1, 15, 17, 0xFFFFFFFF, 0xFFFFFFF0, 16 * 1025])
def test_R26_indirect_table_of_a_bad_length(ring, length):
    driver, device = ring
    assert_refused(driver, device, "RING_E_INDIRECT_LENGTH", 6, (driver.memory.alloc(32768), length, TABLE))


@pytest.mark.parametrize("shift", [-16, 0])
def test_R24_indirect_table_not_wholly_in_guest_memory(ring, shift):
    driver, device = ring
    region = driver.memory.regions[0]
    assert_refused(driver, device, "RING_E_UNMAPPED", 6, (region.gpa + region.size + shift, 32, TABLE))


@pytest.mark.parametrize("before_border", [16, 8, 3, 17, 31])
def test_R24_R41_indirect_table_split_inside_a_descriptor_and_at_an_odd_address(before_border):
    with GuestMemory(extents=ADJACENT) as memory, joined(features=INDIRECT, memory=memory) as (driver, device):
        memory.write(0x18000, b"abcd")
        memory.write(BORDER - before_border, PACKED_DESCRIPTOR.pack(0x18000, 2, 0, 0)
                     + PACKED_DESCRIPTOR.pack(0x18002, 2, 0, 0))
        offer(driver, (BORDER - before_border, 32, TABLE))
        assert device.pop().read() == b"abcd"


def test_R27_write_flag_on_the_indirect_descriptor_is_ignored(ring, buffer):
    """VQ-PACKED-D-18."""
    driver, device = ring
    offer(driver, (*table(driver.memory, (buffer, 5, 0)), TABLE | WRITE))
    chain = device.pop()
    assert (chain.readable_len, chain.writable_len) == (5, 0)


# ---------------------------------------------------------------------------------- changed while looked at


def test_R26_indirect_table_changed_while_it_is_walked(ring, buffer):
    driver, device = ring
    gpa, length = table(driver.memory, (buffer, 1, 0), (buffer, 2, 0), (buffer, 3, 0))
    offer(driver, (gpa, length, TABLE))
    chain = device.take()
    assert device.walk()  # the descriptor that names the table: now the copy is made
    driver.memory.write(gpa, b"\xff" * length)
    assert device.walk() and device.walk() and not device.walk()
    assert chain.readable_len == 6


def test_R28_R29_descriptor_changed_after_it_was_read(ring, buffer):
    driver, device = ring
    driver.memory.write(buffer, b"abc")
    offer(driver, (buffer, 3, NEXT), (buffer + 8, 5, WRITE))
    chain = device.take()
    assert device.walk()
    driver.ring.desc[6].set(WILD, 0xFFFFFFFF, WRITE, 9)
    assert not device.walk()
    driver.ring.desc[7].set(WILD, 0xFFFFFFFF, NEXT, 9)
    assert (chain.head, chain.slots) == (ID, 2)
    assert (chain.read(), chain.write(b"123456789"), chain.writable_len) == (b"abc", 5, 5)


def test_R26_R28_R29_ring_rewritten_at_full_speed():
    """A thread rewrites descriptors and a table while the device pops: any chain of a form that was written, any
    refusal, and all of them go back; the ring is long enough never to be one chain."""
    with joined(size=64, features=INDIRECT) as (driver, device):
        buffer = driver.memory.alloc(4096)
        low = table(driver.memory, (buffer, 1, 0))
        high = table(driver.memory, (buffer + 1024, 2, 0), (buffer + 2048, 512, WRITE))
        forms = [(buffer, 1, 0), (*low, TABLE), (*high, TABLE), (WILD, 0xFFFF, NEXT | WRITE), (buffer, 1, NEXT)]
        stop = threading.Event()

        def mutate():
            choose = random.Random(1)
            while not stop.is_set():
                near = (device.base & 0x7FFF) + choose.randrange(3)  # where the device is just looking
                descriptor = driver.ring.desc[near % 64]
                descriptor.addr, descriptor.len, flags = choose.choice(forms)
                descriptor.flags = flags | choose.choice((0, DESC_F_AVAIL, DESC_F_USED, TURN))
                entry = choose.choice([(buffer, 2, 0, 0), (WILD, 1, 0, 0)])
                driver.memory.write(high[0], PACKED_DESCRIPTOR.pack(*entry))

        thread = threading.Thread(target=mutate)
        thread.start()
        lengths, codes = set(), set()
        served = refused = 0
        deadline = time.monotonic() + 30
        try:
            while (served < 300 or refused < 300) and time.monotonic() < deadline:
                try:
                    chain = device.pop()
                    if chain is None:
                        time.sleep(1e-5)  # the other thread's turn
                        continue
                    lengths.add(chain.writable_len)
                    device.push(chain)
                    served += 1
                except ChainError as error:
                    codes.add(error.code)
                    device.push(error)
                    refused += 1
                device.publish()
        finally:
            stop.set()
            thread.join()
    assert served >= 300 and refused >= 300
    assert lengths <= {0, 512}
    assert len(codes) > 1
    assert codes <= {"RING_E_UNMAPPED", "RING_E_ORDER", "RING_E_INDIRECT_LENGTH", "RING_E_INDIRECT_NEXT"}


# -------------------------------------------------------------------------------- what the device owns


def test_R34_used_descriptors_rewritten_by_the_driver(ring, buffer):
    driver, device = ring
    for _ in range(5):
        offer(driver, (buffer, 1, 0))
        device.push(device.pop())
        device.publish()
        slot = driver.ring.next_used % 8
        assert (driver.ring.desc[slot].id, driver.ring.desc[slot].len) == (ID, 0)
        assert driver.ring.next_completion() == (ID, 0)
        base = device.base
        driver.ring.desc[slot].set(WILD, 77, 0xFFFF, 77)
        driver.ring.device_event.set(0xFFFF, 0xFFFF)
        assert device.base == base


@pytest.mark.parametrize("features", [PACKED, EVENT])
def test_R35_any_suppression_fields(features):
    with joined(features=features) as (driver, device):
        choose = random.Random(2)
        for _ in range(300):
            driver.ring.driver_event.set(choose.randrange(0x10000), choose.choice((0, 1, 2, 3, 4, 0xFFFF)))
            driver.ring.device_event.set(choose.randrange(0x10000), choose.randrange(0x10000))
            device.disarm()
            assert device.pop() is None
            offer(driver, (0, 0, 0))
            assert device.arm() == 1
            device.push(device.pop())
            device.publish()
            assert device.decide() in CallReason
            assert device.decide() == CallReason.NOTHING_NEW
            assert driver.ring.next_completion() == (ID, 0)


def test_R37_first_publication_is_always_signalled():
    """What a predecessor signalled is unknown: with EVENT_IDX the driver may wait for ever otherwise."""
    with GuestMemory() as memory, DriverQueue(memory, 8, EVENT) as driver, DeviceSide(memory) as side:
        first = side.queue(driver)
        offer(driver, (0, 0, 0))
        first.push(first.pop())
        first.publish()  # and dies before it decides
        driver.ring.driver_event.set(0x8000, 2)
        second = side.queue(driver, base=first.base)
        offer(driver, (0, 0, 0), id=6)
        second.push(second.pop())
        second.publish()
        assert second.decide() == CallReason.FIRST and CallReason.FIRST.due


@pytest.mark.parametrize("part", [0, 1, 2], ids=["desc", "driver_event", "device_event"])
def test_R51_P71_P72_buffer_on_the_ring_itself(ring, part):
    driver, device = ring
    gpa, length = driver.ring.areas[part]
    offer(driver, (gpa, length, WRITE))
    chain = device.pop()
    assert chain.write(b"\xff" * length) == length
    device.push(chain, length)
    device.publish()
    assert (driver.ring.desc[6].id, driver.ring.desc[6].len, driver.ring.desc[6].flags) == (ID, length, TURN | WRITE)
    assert device.state.broken is None


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
