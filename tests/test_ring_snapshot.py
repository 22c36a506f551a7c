"""One snapshot, then decide: what a driver rewrites while the device looks, and what it may make of the device's own.

The cases of tests/test_ring_hostile.py stand still; here descriptors, tables, indices and flags change under the walk,
buffers lie on the rings, and rings on each other.
"""

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from ring.driver import DriverQueue, GuestMemory
from ring.driver_packed import DESC_F_AVAIL, DESC_F_USED, PACKED_DESCRIPTOR
from ring.driver_parts import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, EVENT_IDX, INDIRECT_DESC, RING_PACKED
from ring.driver_split import DESCRIPTOR
from ring.errors import ChainError, RingBroken, RingError
from ring.virtqueue import CallReason, VirtQueue
from vdev.testing.handmade import assert_goes_on, give_back, offer, table
from vdev.testing.rig import DeviceSide, joined

INDIRECT = 1 << INDIRECT_DESC
EVENT = 1 << EVENT_IDX
PACKED = 1 << RING_PACKED
NEXT, WRITE, TABLE = DESC_F_NEXT, DESC_F_WRITE, DESC_F_INDIRECT
WILD = 0xFFFF_FFFF_FFFF_F000

FORMATS = pytest.mark.parametrize("format", [0, PACKED], ids=["split", "packed"])


@pytest.fixture(params=[0, PACKED], ids=["split", "packed"])
def ring(request):
    with joined(size=8, features=INDIRECT | request.param) as (driver, device):
        yield driver, device


@pytest.fixture
def buffer(ring):
    return ring[0].memory.alloc(4096)


# ------------------------------------------------------------------------------- changed while looked at


def test_R26_indirect_table_changed_while_it_is_walked(ring, buffer):
    driver, device = ring
    gpa, length = table(driver, (buffer, 1, 0), (buffer, 2, 0), (buffer, 3, 0))
    offer(driver, (gpa, length, TABLE))
    device.see()
    chain = device.take()
    assert device.walk()  # the descriptor that names the table: now the copy is made
    driver.memory.write(gpa, b"\xff" * length)
    assert device.walk() and device.walk() and not device.walk()
    assert chain.readable_len == 6


def test_R28_R29_descriptor_changed_after_it_was_read(ring, buffer):
    driver, device = ring
    driver.memory.write(buffer, b"abc")
    offered = offer(driver, (buffer, 3, 0), (buffer + 8, 5, WRITE))
    first, second = (driver.ring.desc[place] for place in offered.places)
    device.see()
    chain = device.take()
    assert device.walk()
    first.set(WILD, 0xFFFFFFFF, WRITE, 0)
    assert not device.walk()
    second.set(WILD, 0xFFFFFFFF, NEXT, 0)
    assert (chain.read(), chain.write(b"123456789"), chain.writable_len) == (b"abc", 5, 5)
    assert driver.memory.read(buffer, 16) == b"abc\0\0\0\0\x0012345\0\0\0"


def test_R31_what_names_the_chain_changed_after_it_was_read(ring, buffer):
    """Split: the entry of the available ring, after its check. Packed: the buffer id, which has no bounds to check,
    but has to be the same for all that is done with the chain."""
    driver, device = ring
    offered = offer(driver, (buffer, 1, 0))
    assert device.see() == 1
    chain = device.take()
    if driver.packed:
        assert not device.walk()
        driver.ring.desc[offered.places[0]].id = 0xFFFF
    else:
        driver.ring.avail.ring[0] = 0xFFFF
        assert not device.walk()
    assert (chain.head, chain.read()) == (offered.name, b"\0")
    give_back(driver, device, chain)


@contextlib.contextmanager
def at_full_speed(change: Callable[[random.Random], None]) -> Iterator[None]:
    """Another thread changes something, without a pause."""
    stop = threading.Event()

    def mutate() -> None:
        choose = random.Random(1)
        while not stop.is_set():
            change(choose)

    thread = threading.Thread(target=mutate)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_R26_R28_R29_R31_split_ring_rewritten_at_full_speed():
    """A thread flips descriptors and a table between two valid forms and a wild one while the device pops.

    Either form may come out, and any refusal; what must not come out is a mixture that was never written.
    """
    with joined(size=8, features=INDIRECT) as (driver, device):
        buffer = driver.memory.alloc(4096)
        low = table(driver, (buffer, 1, 0))
        high = table(driver, (buffer + 1024, 2, 0), (buffer + 2048, 512, WRITE))
        forms = [(buffer, 1), (*low, TABLE), (*high, TABLE), (WILD, 0xFFFF, NEXT | WRITE, 0), (buffer, 1, NEXT, 0)]

        def change(choose: random.Random) -> None:
            driver.ring.desc[0].set(*choose.choice(forms))
            driver.memory.write(high[0], DESCRIPTOR.pack(*choose.choice([(buffer + 1024, 2, NEXT, 1),
                                                                         (WILD, 1, 0, 0)])))

        seen = set()
        with at_full_speed(change):
            for _ in range(4000):
                driver.ring.offer(0)
                driver.publish()
                try:
                    chain = device.pop()
                    seen.add((chain.readable_len, chain.writable_len))
                except ChainError as error:
                    seen.add(error.code)
                    chain = error
                give_back(driver, device, chain)
    # the two halves of a descriptor are two loads: (address, length | flags | next) may be of different forms; and the
    # one that names itself as the next is another when it is read again
    ends = {(1, 0), (2, 512), (0, 0xFFFF)}
    legal = {(times + readable, writable) for times in range(8) for readable, writable in ends} | {
        "RING_E_UNMAPPED", "RING_E_ORDER", "RING_E_LOOP", "RING_E_INDIRECT_LENGTH",
        "RING_E_INDIRECT_NESTED", "RING_E_INDIRECT_NEXT", "RING_E_NEXT_RANGE"}
    assert len(seen) > 2 and seen <= legal


def test_R26_R28_R29_R31_packed_ring_rewritten_at_full_speed():
    """A thread rewrites descriptors and a table while the device pops: any chain of a form that was written, any
    refusal, and all of them go back; the ring is long enough never to be one chain."""
    with joined(size=64, features=INDIRECT | PACKED) as (driver, device):
        buffer = driver.memory.alloc(4096)
        low = table(driver, (buffer, 1, 0))
        high = table(driver, (buffer + 1024, 2, 0), (buffer + 2048, 512, WRITE))
        forms = [(buffer, 1, 0), (*low, TABLE), (*high, TABLE), (WILD, 0xFFFF, NEXT | WRITE), (buffer, 1, NEXT)]

        def change(choose: random.Random) -> None:
            near = (device.base & 0x7FFF) + choose.randrange(3)  # where the device is just looking
            descriptor = driver.ring.desc[near % 64]
            descriptor.addr, descriptor.len, flags = choose.choice(forms)
            descriptor.id = choose.randrange(4)
            descriptor.flags = flags | choose.choice((0, DESC_F_AVAIL, DESC_F_USED, DESC_F_AVAIL | DESC_F_USED))
            driver.memory.write(high[0], PACKED_DESCRIPTOR.pack(*choose.choice([(buffer, 2, 0, 0), (WILD, 1, 0, 0)])))

        lengths, codes, names = set(), set(), set()
        served = refused = 0
        deadline = time.monotonic() + 30
        with at_full_speed(change):
            while (served < 300 or refused < 300) and time.monotonic() < deadline:
                try:
                    chain = device.pop()
                    if chain is None:
                        time.sleep(1e-5)  # the other thread's turn
                        continue
                    lengths.add(chain.writable_len)
                    served += 1
                except ChainError as error:
                    codes.add(error.code)
                    refused += 1
                    chain = error
                names.add(chain.head)
                device.push(chain)
                device.publish()
    assert served >= 300 and refused >= 300
    assert lengths <= {0, 512} and names <= set(range(4))
    assert len(codes) > 1
    assert codes <= {"RING_E_UNMAPPED", "RING_E_ORDER", "RING_E_INDIRECT_LENGTH", "RING_E_INDIRECT_NEXT"}


# -------------------------------------------------------------------------------- what the device owns


def test_R34_used_entries_rewritten_by_the_driver(ring):
    """Split: the used ring and its index. Packed, where the used descriptors lie in the driver's own ring: the one
    used last, and the device's event suppression structure."""
    driver, device = ring
    choose = random.Random(3)
    for _ in range(20):
        assert_goes_on(driver, device)
        base = device.base
        spoilt = driver.ring.areas.device
        driver.memory.write(spoilt.gpa, choose.randbytes(spoilt.len))
        if driver.packed:
            last = driver.ring.desc[(driver.ring.next_used - 1) % 8]
            driver.memory.write(last.gpa, choose.randbytes(16))
        assert device.base == base


@pytest.mark.parametrize("features", [0, EVENT], ids=["flags", "event_idx"])
@FORMATS
def test_R35_any_suppression_fields(format, features):
    with joined(features=format | features) as (driver, device):
        choose = random.Random(2)
        for _ in range(300):
            if driver.packed:
                driver.ring.driver_event.set(choose.randrange(0x10000), choose.choice((0, 1, 2, 3, 4, 0xFFFF)))
                driver.ring.device_event.set(choose.randrange(0x10000), choose.randrange(0x10000))
            else:
                driver.ring.avail.flags = choose.choice((0, 1, 2, 3, choose.randrange(0x10000)))
                driver.ring.avail.used_event = choose.randrange(0x10000)
                driver.ring.used.avail_event = choose.randrange(0x10000)
                driver.ring.used.flags = choose.randrange(0x10000)
            device.disarm()
            assert device.pop() is None
            chain = offer(driver, (0, 0, 0))
            assert device.arm() == 1
            device.push(device.pop())
            device.publish()
            assert device.decide() in CallReason
            assert device.decide() == CallReason.NOTHING_NEW
            assert driver.ring.next_completion() == (chain.name, 0)


@FORMATS
def test_R37_first_publication_is_always_signalled(format):
    """What a predecessor signalled is unknown: with EVENT_IDX the driver may wait for ever otherwise."""
    with GuestMemory() as memory, DriverQueue(memory, 8, EVENT | format) as driver, DeviceSide(memory) as side:
        driver.ring.want_calls()  # when the first chain is used
        first = side.queue(driver)
        offer(driver, (0, 0, 0))
        first.push(first.pop())
        first.publish()  # and dies before it decides
        second = side.queue(driver, base=first.base)
        offer(driver, (0, 0, 0), name=2)
        second.push(second.pop())
        second.publish()
        assert second.decide() == CallReason.FIRST and CallReason.FIRST.due
        assert [driver.ring.next_completion() for _ in range(2)] == [(1, 0), (2, 0)]


# ------------------------------------------------------------------------- rings and buffers on each other


@pytest.mark.parametrize("part", [0, 1, 2], ids=["descriptors", "driver_area", "device_area"])
def test_R51_P71_P72_buffer_on_the_ring_itself(ring, part):
    driver, device = ring
    gpa, length = driver.ring.areas[part]
    chain = offer(driver, (gpa, length, WRITE))
    popped = device.pop()
    assert popped.write(b"\xff" * length) == length
    device.push(popped, length)
    device.publish()
    assert driver.ring.next_completion() == (chain.name, length)  # written after all the ones
    for _ in range(20):  # whatever comes of it, it is nothing or a rule broken
        with contextlib.suppress(RingError):
            assert device.pop() is None


@FORMATS
def test_R51_buffer_on_the_indirect_table_that_names_it(format):
    """The walk goes on in its private copy."""
    with joined(features=INDIRECT | format) as (driver, device):
        gpa, length = table(driver, (0, 0, 0), (0, 0, 0))
        made = table(driver, (gpa, length, WRITE), (gpa, length, WRITE))
        driver.memory.write(gpa, driver.memory.read(*made))
        offer(driver, (gpa, length, TABLE))
        chain = device.pop()
        assert chain.write(b"\xff" * 2 * length) == 2 * length
        assert driver.memory.read(gpa, length) == b"\xff" * length
        give_back(driver, device, chain, 2 * length)


@pytest.mark.parametrize("desc, driver_area, device_area", [
    ("a", "a", "a"), ("a", "a", "b"), ("a", "b", "a"), ("b", "a", "a")])
@FORMATS
def test_P71_ring_parts_at_one_address(format, desc, driver_area, device_area):
    with GuestMemory() as memory, DeviceSide(memory) as side:
        place = {"a": memory.alloc(4096, 64), "b": memory.alloc(4096, 64)}
        kept = memory.alloc(4096)
        with DriverQueue(memory, 8, INDIRECT | format, desc=place[desc], avail=place[driver_area],
                         used=place[device_area]) as driver:
            device = side.queue(driver)
            for i in range(8):
                offer(driver, (place["a"], 64, WRITE), name=i % 7)
                serve_whatever_comes(device)
        assert memory.read(kept, 4096) == bytes(4096)


def serve_whatever_comes(device: VirtQueue, most: int = 20) -> set[str]:
    """A device's round -> what came: "served", and the rules that were broken."""
    came = set()
    with contextlib.suppress(RingBroken):
        for _ in range(most):
            try:
                chain = device.pop()
                if chain is None:
                    break
                device.push(chain, chain.write(b"\xff" * 64))
                came.add("served")
            except ChainError as error:
                came.add(error.code)
                device.push(error)
            device.publish()
            device.decide()
            device.arm()
    return came | ({device.state.broken.code} if device.state.broken else set())


@FORMATS
def test_R60_two_queues_on_the_same_ring_memory(format):
    """Each device writes what the other has just written, and neither believes a byte of it: where it stands is its
    own, and what it pops is served or refused as what it is."""
    with GuestMemory() as memory, DriverQueue(memory, 8, format) as driver, DeviceSide(memory) as side:
        kept = memory.alloc(4096)
        one, other = side.queue(driver), side.queue(driver)
        for _ in range(3):
            driver.post([b"x"])
        driver.publish()
        chains = [one.pop() for _ in range(3)]
        mine = one.base
        one.push(chains[0])
        one.publish()
        again = list(iter(other.pop, None))  # split: the same three; packed: the first slot is used already
        assert len(again) == (0 if format else 3)
        for chain in again:
            other.push(chain)
        other.publish()
        after_one = mine if not format else (mine & 0xFFFF) | 0x8001 << 16
        assert one.base == after_one and one.state.published == 1
        one.push(chains[1])
        one.push(chains[2])
        one.publish()
        assert one.state.published == 3 and one.state.broken is None and other.state.broken is None
        assert memory.read(kept, 4096) == bytes(4096)


@FORMATS
def test_R60_ring_written_by_the_device_for_another_queue(format):
    """The buffers of one queue are the ring of another, which is served in between."""
    with (GuestMemory() as memory, DriverQueue(memory, 8, format) as victim, DriverQueue(memory, 64, format) as writer,
          DeviceSide(memory) as side):
        kept = memory.alloc(4096)
        choose = random.Random(5)
        attacked, attacking = side.queue(victim), side.queue(writer)
        came = set()
        for _ in range(300):
            gpa, length = victim.ring.areas[choose.randrange(3)]
            offer(writer, (gpa, length, WRITE), name=1)
            chain = attacking.pop()
            give_back(writer, attacking, chain, chain.write(choose.randbytes(length)))
            came |= serve_whatever_comes(attacked)
            if attacked.state.broken:
                attacked = side.queue(victim, base=choose.choice((0, 0x80008000)) if format else 0)
        assert ("RING_E_UNMAPPED" if format else "RING_E_AVAIL_AHEAD") in came
        assert memory.read(kept, 4096) == bytes(4096)
