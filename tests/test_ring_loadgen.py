"""The load generator finds what it is there to find: here the device is Python, and does one thing wrong.

That a right device gets no complaint is in tests/test_ring_pump.py.
"""

import contextlib
import struct
import time
from collections.abc import Callable
from typing import NamedTuple

import pytest

from ring.driver import DriverQueue, GuestMemory, OutOfGuestMemory
from ring.driver_packed import DESC_F_AVAIL, DESC_F_USED, EVENT_DESC, EVENT_DISABLE
from ring.driver_parts import DESC_F_WRITE, EVENT_IDX, INDIRECT_DESC
from ring.driver_split import USED_F_NO_NOTIFY
from ring.loadgen import ETHERNET_PREFIX, ERRORS, LoadGenerator, Role
from ring.virtqueue import Chain, VirtQueue
from vdev.net.features import Feature, mask
from vdev.testing.rig import joined

EVENT = 1 << EVENT_IDX
PACKED = mask(Feature.RING_PACKED)
IN_ORDER = mask(Feature.IN_ORDER)
MERGEABLE = 1 << Feature.MRG_RXBUF
HEADER = 12
STAMP = struct.Struct("<QII")
AT_STAMP = HEADER + len(ETHERNET_PREFIX)

in_each_format = pytest.mark.parametrize("ring", [0, PACKED], ids=["split", "packed"])
on_each_ring = pytest.mark.parametrize("ring", [0, PACKED, IN_ORDER, PACKED | IN_ORDER],
                                       ids=["split", "packed", "split_in_order", "packed_in_order"])


@contextlib.contextmanager
def loaded(role: Role, features: int = 0, size: int = 16, **load: object):
    """A generator, its queue, and the device's half for a test to play."""
    base = None if features & PACKED else 0xFFF0
    with (GuestMemory() as memory, joined(size, features, base, memory) as (driver, device),
          LoadGenerator(driver, role, **{"stall_ms": 5000, **load}) as generator):
        yield generator, driver, device


def chains(device: VirtQueue, count: int) -> list[Chain]:
    """Wait for so many chains."""
    popped: list[Chain] = []
    deadline = time.monotonic() + 10
    while len(popped) < count and time.monotonic() < deadline:
        chain = device.pop()
        if chain is None:
            time.sleep(0.0005)
        else:
            popped.append(chain)
    assert len(popped) == count
    return popped


def call(driver: DriverQueue) -> None:
    with open(driver.call_fd, "wb", closefd=False, buffering=0) as call_fd:
        call_fd.write(struct.pack("<Q", 1))


class Claimed(NamedTuple):
    """What a device may push that never was a chain."""

    head: int
    slots: int = 1


def use(driver: DriverQueue, device: VirtQueue, used: list[tuple[Chain | Claimed, int]]) -> None:
    """Push and publish, and call if the driver wants it."""
    for chain, written in used:
        device.push(chain, written)
    device.publish()
    if device.decide().due:
        call(driver)


def frames(count: int, **load: object) -> list[bytes]:
    """The first frames a transmitter sends, header included."""
    with loaded(Role.TRANSMIT, frames=count, **load) as (generator, driver, device):
        generator.start()
        taken = []
        while len(taken) < count:
            popped = chains(device, 1)
            taken.append(popped[0].read())
            use(driver, device, [(popped[0], 0)])
        assert generator.wait(10) and not generator.stats().errors
        return taken


# ---------------------------------------------------------------------------------------------- what it does


@on_each_ring
@pytest.mark.parametrize("load", [{}, {"pieces": 4}, {"pieces": 3, "indirect": True}, {"batch": 1}, {"full": False}])
def test_frames_are_stamped_and_each_is_different(load, ring):
    features = ring | ((1 << INDIRECT_DESC) if load.get("indirect") else 0)
    sent = frames(20, frame_bytes=100, header=bytes(range(12)), features=features, **load)
    for i, frame in enumerate(sent):
        assert len(frame) == HEADER + 100
        assert frame[:HEADER] == bytes(range(12)) and frame[HEADER:AT_STAMP] == ETHERNET_PREFIX
        assert STAMP.unpack_from(frame, AT_STAMP)[:2] == (i, 100)
    bodies = {frame[AT_STAMP + STAMP.size:] for frame in sent}
    assert len(bodies) == (20 if load.get("full", True) else 1)


@on_each_ring
def test_chains_have_the_shape_asked_for(ring):
    with loaded(Role.TRANSMIT, ring, frames=1, frame_bytes=100, pieces=4) as (generator, driver, device):
        generator.start()
        (chain,) = chains(device, 1)
        assert chain.descriptors == 4
        assert [driver.ring.desc[chain.head + i].len for i in range(4)] == [12, 33, 33, 34]


def test_kicks_follow_the_wish_of_the_device_split():
    with loaded(Role.TRANSMIT, frames=3, batch=1) as (generator, driver, device):
        driver.ring.used.flags = USED_F_NO_NOTIFY
        generator.start()
        chains(device, 3)
        assert generator.stats().kicks == 0 and generator.stats().publications == 3
    with loaded(Role.TRANSMIT, EVENT, frames=8, batch=1) as (generator, driver, device):
        driver.ring.used.avail_event = 0xFFF4
        generator.start()
        chains(device, 8)
        assert generator.stats().kicks == 1


def test_kicks_follow_the_wish_of_the_device_packed():
    with loaded(Role.TRANSMIT, PACKED, frames=3, batch=1) as (generator, driver, device):
        driver.ring.device_event.set(0, EVENT_DISABLE)
        generator.start()
        chains(device, 3)
        assert generator.stats().kicks == 0 and generator.stats().publications == 3
    with loaded(Role.TRANSMIT, PACKED | EVENT, frames=8, batch=1) as (generator, driver, device):
        driver.ring.device_event.set(driver.ring.off_wrap(4), EVENT_DESC)
        generator.start()
        chains(device, 8)
        assert generator.stats().kicks == 1


@in_each_format
def test_batch_in_order_is_believed(ring):
    with loaded(Role.TRANSMIT, ring | IN_ORDER, frames=4, frame_bytes=100) as (generator, driver, device):
        generator.start()
        device.push_batch(chains(device, 4))
        use(driver, device, [])
        assert generator.wait(10)
        stats = generator.stats()
        assert (stats.frames, stats.bytes, stats.buffers, stats.errors) == (4, 400, 4, {})


@in_each_format
def test_stop_in_the_middle(ring):
    with loaded(Role.TRANSMIT, ring) as (generator, driver, device):
        generator.start()
        popped = chains(device, 16)
        use(driver, device, [(chain, 0) for chain in popped[:5]])
        assert not generator.wait(0.02)
        generator.stop()
        assert generator.wait(0)
        stats = generator.stats()
        assert stats.buffers in (0, 5) and stats.errors == {}


# ------------------------------------------------------------------------------------- what it accuses of


def accused(role: Role, misbehave: Callable[[DriverQueue, VirtQueue], None], **load: object) -> dict[str, int]:
    """Run a generator against a device that does ``misbehave`` -> its errors, once it has ended or complained."""
    with loaded(role, **load) as (generator, driver, device):
        generator.start()
        misbehave(driver, device)
        deadline = time.monotonic() + 10
        while not generator.stats().errors and time.monotonic() < deadline:
            time.sleep(0.001)
        return dict(generator.stats().errors)


def test_used_index_too_far_ahead():
    def misbehave(driver, device):
        chains(device, 16)
        driver.ring.used.idx = (0xFFF0 + 17) & 0xFFFF
        call(driver)

    assert accused(Role.TRANSMIT, misbehave) == {"used_ahead": 1}


def test_used_flags_out_of_turn():
    """2.8.1: AVAIL and USED of a used descriptor are both equal to the wrap counter, here 1."""
    def misbehave(driver, device):
        chains(device, 16)
        driver.ring.desc[0].flags = DESC_F_USED
        call(driver)

    assert accused(Role.TRANSMIT, misbehave, features=PACKED) == {"used_ahead": 1}


@on_each_ring
@pytest.mark.parametrize("pieces, head", [(1, 16), (1, 0xFFFFFFFF), (2, 9), (1, "again")])
def test_head_that_is_not_outstanding(pieces, head, ring):
    def misbehave(driver, device):
        popped = chains(device, 4)
        bad = popped[0].head if head == "again" else head
        use(driver, device, [*((chain, 0) for chain in popped[:3]), (Claimed(bad), 0)])

    assert accused(Role.TRANSMIT, misbehave, features=ring, frames=4, pieces=pieces) == {"unknown_head": 1}


def test_batch_that_goes_on_beyond_the_used_index():
    def misbehave(driver, device):
        popped = chains(device, 16)
        use(driver, device, [(chain, 0) for chain in (*popped[:7], popped[15])])  # it waits for half of them

    assert accused(Role.TRANSMIT, misbehave, features=IN_ORDER) == {"used_ahead": 1}


@in_each_format
def test_batch_that_ends_with_a_chain_used_before(ring):
    def misbehave(driver, device):
        popped = chains(device, 4)
        device.push_batch(popped[:3])
        use(driver, device, [(Claimed(popped[1].head), 0)])

    assert accused(Role.TRANSMIT, misbehave, features=ring | IN_ORDER, frames=4) == {"unknown_head": 1}


@in_each_format
@pytest.mark.parametrize("role, written", [(Role.TRANSMIT, 1), (Role.RECEIVE, 11), (Role.RECEIVE, 12 + 1515)])
def test_used_length_that_cannot_be(role, written, ring):
    def misbehave(driver, device):
        (chain,) = chains(device, 1)
        if role == Role.RECEIVE:
            chain.write(bytes(10) + b"\x01\x00")
        use(driver, device, [(chain, written)])
        call(driver)

    assert accused(role, misbehave, features=ring, frames=1) == {"bad_length": 1}


@pytest.mark.parametrize("length, write", [(100, 0), (0, DESC_F_WRITE)])
def test_used_length_and_write_flag_that_differ(length, write):
    """2.8.3, 2.8.4: WRITE says that there is a length."""
    def misbehave(driver, device):
        (chain,) = chains(device, 1)
        driver.ring.desc[0].set(0, length, DESC_F_AVAIL | DESC_F_USED | write, chain.head)
        call(driver)

    assert accused(Role.RECEIVE, misbehave, features=PACKED) == {"bad_length": 1}


@in_each_format
@pytest.mark.parametrize("features, num_buffers", [(0, 0), (0, 2), (MERGEABLE, 0), (MERGEABLE, 3)])
def test_num_buffers_that_cannot_be(features, num_buffers, ring):
    def misbehave(driver, device):
        popped = chains(device, 2)
        popped[0].write(bytes(10) + struct.pack("<H", num_buffers))
        use(driver, device, [(popped[0], 100), (popped[1], 100)])

    assert accused(Role.RECEIVE, misbehave, features=features | ring) == {"bad_merge": 1}


@in_each_format
def test_device_that_stands_still(ring):
    idle = {"misbehave": lambda driver, device: None, "features": ring, "stall_ms": 50}
    assert accused(Role.TRANSMIT, **idle, busy_poll=True) == {"stall": 1}
    assert accused(Role.RECEIVE, **idle) == {"stall": 1}


@pytest.mark.parametrize("events", [0, EVENT], ids=["flags", "events"])
@in_each_format
def test_call_that_is_due_and_does_not_come(ring, events):
    def misbehave(driver, device):
        (chain,) = chains(device, 1)
        time.sleep(0.05)  # it sleeps by now
        device.push(chain)
        device.publish()

    assert accused(Role.TRANSMIT, misbehave, features=ring | events, frames=1, stall_ms=0) == {"lost_call": 1}


def received(*sent: bytes, **load: object):
    """What a receiver says of these frames (each with its header)."""
    with loaded(Role.RECEIVE, **load) as (generator, driver, device):
        generator.start()
        for frame in sent:
            (chain,) = chains(device, 1)
            whole = frame[:10] + struct.pack("<H", 1) + frame[12:]
            use(driver, device, [(chain, chain.write(whole))])
        deadline = time.monotonic() + 10
        while generator.stats().buffers < len(sent) and time.monotonic() < deadline:
            time.sleep(0.001)
        generator.stop()
        return generator.stats()


@on_each_ring
def test_frames_that_are_right(ring):
    stats = received(*frames(30, frame_bytes=200), frames=30, features=ring)
    assert (stats.frames, stats.bytes, stats.lost, stats.foreign, stats.errors) == (30, 6000, 0, 0, {})


@pytest.mark.parametrize("at, error", [
    (AT_STAMP, "bad_stamp"), (AT_STAMP + 8, "bad_stamp"), (AT_STAMP + 12, "bad_stamp"),
    (AT_STAMP + STAMP.size, "bad_body"), (HEADER + 99, "bad_body")])
def test_one_wrong_bit(at, error):
    one, two = frames(2, frame_bytes=100)
    broken = bytearray(one)
    broken[at] ^= 0x10
    stats = received(bytes(broken), two)
    assert stats.errors == {error: 1} and stats.frames == 1


def test_one_byte_short_or_foreign():
    one, two, three = frames(3, frame_bytes=100)
    assert received(one[:-1]).errors == {"bad_stamp": 1}
    stats = received(one, bytes(HEADER) + b"\xff" * 60, two[:AT_STAMP], three)
    assert stats.errors == {}
    assert (stats.frames, stats.foreign, stats.lost) == (2, 2, 1)


def test_lost_repeated_and_reordered():
    sent = frames(6)
    stats = received(sent[0], sent[3], sent[3], sent[2], sent[5])
    assert (stats.frames, stats.lost, stats.errors) == (3, 3, {"bad_order": 2})


@pytest.mark.parametrize("flags, off_wrap", [(3, 0), (2, 0), (4, 0)])
def test_device_event_that_means_nothing(flags, off_wrap):
    """2.8.10: 3 is reserved, and DESC (2) needs EVENT_IDX."""
    with loaded(Role.TRANSMIT, PACKED, frames=1) as (generator, driver, device):
        driver.ring.device_event.off_wrap, driver.ring.device_event.flags = off_wrap, flags
        generator.start()
        chains(device, 1)
        assert generator.stats().errors == {"bad_event": 1}


def test_device_event_outside_the_ring():
    with loaded(Role.TRANSMIT, PACKED | EVENT, frames=1) as (generator, driver, device):
        driver.ring.device_event.off_wrap, driver.ring.device_event.flags = 0x8000 + driver.ring.size, 2
        generator.start()
        chains(device, 1)
        assert generator.stats().errors == {"bad_event": 1}


def test_every_error_has_a_test():
    """A check that nothing ever triggers might as well not be there."""
    with open(__file__, encoding="utf-8") as own:
        text = own.read()
    assert all(f'"{error}"' in text for error in ERRORS)


# ---------------------------------------------------------------------------------------------- bad wishes


@pytest.mark.parametrize("wish", [
    {"frame_bytes": 29}, {"frame_bytes": 65551}, {"batch": 0}, {"pieces": 0}, {"pieces": 17}, {"prefix": bytes(13)},
    {"prefix": bytes(65)}, {"header": bytes(10)}])
def test_wish_that_makes_no_sense(wish):
    with GuestMemory() as memory, DriverQueue(memory, 16) as queue:
        before = memory.alloc(1)
        memory.free(before)
        with pytest.raises(ValueError):
            LoadGenerator(queue, Role.TRANSMIT, **wish)
        assert memory.alloc(1) == before


def test_memory_that_does_not_suffice():
    with GuestMemory(1 << 16) as memory, DriverQueue(memory, 16) as queue, pytest.raises(OutOfGuestMemory):
        LoadGenerator(queue, Role.TRANSMIT, frame_bytes=60_000)
