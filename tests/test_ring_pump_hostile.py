"""The fd pump against a guest that lies in its transmitq, or in either ring so that it means nothing any more.

Each test carries the id of its case. Whatever comes, the worker goes on, the other guests in it do not notice, and
every frame is counted once: delivered, or lost for one reason. What a receiveq may be given is in
tests/test_ring_pump_receiveq.py, what a header may say in tests/test_ring_pump_header.py, floods and memory that
vanishes in tests/test_ring_pump_faults.py.
"""

import random
import resource
import time

import pytest

from ring.driver import Buffer, DriverQueue
from ring.driver_packed import DESC_F_AVAIL, DESC_F_USED, PACKED_DESCRIPTOR
from ring.driver_parts import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE
from ring.pump import LaneEvent
from vdev.net.features import HOST_GSO, Feature, mask
from vdev.testing.handmade import add_spoiled
from vdev.testing.netdriver import NetDriver, NetHeader
from vdev.testing.rig import PumpedDevice, pumped
from vdev.testing.waiting import wait_until

BASE = mask(Feature.VERSION_1, Feature.INDIRECT_DESC, Feature.EVENT_IDX)
MERGEABLE = BASE | mask(Feature.MRG_RXBUF)
OFFLOADS = BASE | HOST_GSO | mask(Feature.CSUM)
PACKED = mask(Feature.RING_PACKED)
IN_ORDER = mask(Feature.IN_ORDER)
FRAME = bytes(range(60))
MAX_FRAME = 65550
NOWHERE = 1 << 60

either_split = pytest.mark.parametrize("ring", [0, IN_ORDER], ids=["split", "split_in_order"])
every_ring = pytest.mark.parametrize("ring", [0, PACKED, IN_ORDER, PACKED | IN_ORDER],
                                     ids=["split", "packed", "split_in_order", "packed_in_order"])


# -------------------------------------------------------------------------------------------- broken rings


BROKEN = {
    "R02_split_index_ahead": (0, "RING_E_AVAIL_AHEAD"),
    "R04_split_head_outside": (0, "RING_E_HEAD_RANGE"),
    "R09_packed_without_an_end": (PACKED, "RING_E_ENDLESS"),  # there are neither indices nor heads
}


def break_ring(queue: DriverQueue, code: str) -> None:
    """Break the rule ``code`` of an unused ring, and kick."""
    if code == "RING_E_AVAIL_AHEAD":
        queue.ring.avail.idx = queue.ring.size + 1
    elif code == "RING_E_HEAD_RANGE":
        queue.ring.offer(queue.ring.size)
        queue.publish()
    else:
        queue.ring.offer([(queue.memory.alloc(64), 20, DESC_F_NEXT | DESC_F_WRITE)] * queue.ring.size, 0)
        queue.publish()
    queue.kick()


@pytest.mark.parametrize("ring, code", BROKEN.values(), ids=BROKEN)
def test_broken_transmitq_is_reported_once_and_alone(ring, code):
    with pumped(MERGEABLE | ring) as (driver, device):
        driver.fill()
        break_ring(driver.transmitq, code)
        assert device.events() == LaneEvent.FROM_GUEST_BROKEN
        assert device.errors() == (1, 0)
        assert device.config.from_guest.queue.state.broken.code == code
        for _ in range(3):
            driver.transmitq.kick()
            device.send(FRAME)
            assert driver.receive_within(10).frame == FRAME  # the other direction goes on
        device.detach()
        device.attach()
        assert device.events(0.05) == LaneEvent(0) and device.errors() == (0, 0)
        assert device.from_guest.frames == 0 and driver.transmitq.ring.next_completion() is None


@pytest.mark.parametrize("ring, code", BROKEN.values(), ids=BROKEN)
def test_broken_receiveq_is_reported_once_and_alone(ring, code):
    with pumped(MERGEABLE | ring) as (driver, device):
        break_ring(driver.receiveq, code)
        device.send(FRAME)
        assert device.events() == LaneEvent.TO_GUEST_BROKEN
        assert device.errors() == (0, 1)
        driver.transmit(FRAME)
        assert device.receive() == (NetHeader(), FRAME)
        bursts, busy = device.to_guest.bursts, resource.getrusage(resource.RUSAGE_SELF).ru_utime
        device.send(FRAME)
        time.sleep(0.2)
        assert device.to_guest.bursts == bursts  # the port is not read any more, and does not wake us
        assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - busy < 0.1
        assert device.events(0) == LaneEvent(0) and device.errors() == (0, 0)


@either_split
def test_R02_R04_frames_before_the_bad_head_are_sent_and_used(ring):
    """In one burst with it. (A packed ring has no second entry to break: it would be the chain's next descriptor.)"""
    with pumped(MERGEABLE | ring) as (driver, device):
        heads = [driver.offer(FRAME) for _ in range(2)]
        driver.transmitq.ring.offer(0xFFFF)
        driver.transmitq.submit()
        assert device.events() == LaneEvent.FROM_GUEST_BROKEN
        assert [done.head for done in driver.transmitq.collect_all()] == heads
        assert device.from_guest.frames == 2


@either_split
def test_R02_receiveq_that_breaks_under_a_frame_in_hand(ring):
    """The frame was longer than expected and is out of the port already: it is lost, and counted."""
    with pumped(MERGEABLE | ring, buffer_size=1000) as (driver, device):
        driver.fill(2)
        driver.receiveq.ring.offer(0xFFFF)
        driver.receiveq.publish()
        device.send(bytes(4000))
        assert device.events() == LaneEvent.TO_GUEST_BROKEN
        assert (device.to_guest.frames, device.to_guest.dropped) == (0, {"bad_chain": 1})
        assert driver.receiveq.ring.used.idx == 0


@pytest.mark.parametrize("ring", [PACKED, PACKED | IN_ORDER], ids=["packed", "packed_in_order"])
def test_R02_available_frames_taken_back(ring):
    """The packed counterpart of an index that moves backwards: AVAIL is withdrawn before the device looks. What is
    not there is not sent, and the ring goes on with what is."""
    with pumped(MERGEABLE | ring, attach=False) as (driver, device):
        queue = driver.transmitq.ring
        driver.offer(FRAME)
        driver.transmitq.publish()
        good = queue.desc[0].flags
        queue.desc[0].flags = good ^ (DESC_F_AVAIL | DESC_F_USED)
        device.attach()
        driver.transmitq.kick()
        assert device.receive(0.05) is None
        queue.desc[0].flags = good
        driver.transmitq.kick()
        assert device.receive() == (NetHeader(), FRAME)
        assert driver.reclaim_all(10) and device.events(0) == LaneEvent(0)


# ----------------------------------------------------------------------------------------- refused chains


def add_bad_chains(driver: NetDriver, gpa: int) -> list[int]:
    """Put chains that each break a rule on the transmitq, a good frame behind each -> the names of all, in order."""
    queue, names = driver.transmitq, []

    def bad(*buffers: Buffer, spoil=lambda chain: None, direct: int | None = None) -> None:
        names.append(add_spoiled(queue, list(buffers), spoil, direct))
        names.append(driver.offer(FRAME))

    def make_circle(chain: list) -> None:
        chain[1].flags |= DESC_F_NEXT
        chain[1].next = (chain[0].gpa - queue.ring.desc.gpa) // 16

    good, writable = Buffer(gpa, 40), Buffer(gpa, 40, writable=True)
    bad(Buffer(NOWHERE, 100))  # R15
    bad(good, Buffer(NOWHERE, 100), good)
    bad(writable)  # R18
    bad(good, writable)  # a frame with room to write behind it
    bad(writable, good)  # R19
    bad(good, good, direct=0, spoil=lambda chain: setattr(chain[0], "len", 15))  # R26
    bad(good, good, direct=0, spoil=lambda chain: setattr(chain[0], "addr", NOWHERE))  # R24
    bad(*[Buffer(gpa, 1)] * 1024, direct=0)  # R45
    if queue.packed:
        bad(good, good, spoil=lambda chain: setattr(chain[1], "flags", chain[1].flags | DESC_F_INDIRECT))  # R21
    else:
        bad(good, good, spoil=lambda chain: setattr(chain[0], "next", 256))  # R08
        bad(good, good, spoil=make_circle)  # R09
        bad(Buffer(0, 0), Buffer(0, 0), spoil=make_circle)  # R10
        bad(good, good, direct=0, spoil=lambda chain: setattr(chain[0], "flags", DESC_F_INDIRECT | DESC_F_NEXT))  # R21
    return names


@every_ring
def test_R18_R54_refused_chain_goes_back_with_length_0(ring):
    """In its turn, be it one of many that one used entry completes; and the good ones between are sent."""
    with pumped(MERGEABLE | ring) as (driver, device):
        gpa = driver.memory.alloc(4096)
        driver.memory.write(gpa, b"\x77" * 4096)
        names = add_bad_chains(driver, gpa)
        driver.transmitq.submit()
        done = collect(driver.transmitq, len(names))
        assert [one.head for one in done] == names
        if not ring & IN_ORDER:  # there an entry that was skipped says nothing of its length
            assert {one.written for one in done} == {0}
        good = len(names) // 2
        assert [device.receive() for _ in range(good)] == [(NetHeader(), FRAME)] * good
        stats = device.from_guest
        assert (stats.frames, stats.dropped, stats.bad_chains) == (good, {"bad_chain": good}, good)
        assert driver.memory.read(gpa, 4096) == b"\x77" * 4096
        assert device.events(0) == LaneEvent(0)


def collect(queue: DriverQueue, count: int) -> list:
    """Wait for so many used chains."""
    done = []
    wait_until(lambda: len(done) >= count or done.extend(queue.collect_all()), f"{count} chains are used")
    return done


def make_available(queue: DriverQueue, name: int, gpa: int, length: int, position: int, count: int = 1) -> None:
    """A chain of one descriptor, ``count`` times, behind the ``position`` chains made available before; and a kick."""
    ring = queue.ring
    if queue.packed:
        for at in range(position, position + count):
            flags = DESC_F_USED if at // ring.size % 2 else DESC_F_AVAIL
            ring.memory.write(ring.desc[at % ring.size].gpa, PACKED_DESCRIPTOR.pack(gpa, length, name, flags))
    else:
        ring.desc[name].set(gpa, length)
        for at in range(position, position + count):
            ring.avail.ring[at] = name
        ring.avail.idx = (position + count) & 0xFFFF
    queue.kick()


@every_ring
def test_R55_100_000_bad_chains_and_the_good_one_behind_them(ring):
    with pumped(MERGEABLE | ring) as (driver, device):
        good = driver.memory.alloc(12 + len(FRAME))
        driver.memory.write(good + 12, FRAME)
        queue, modulo = device.config.from_guest.queue, 256 if ring & PACKED else 65536
        turns, count = 400, 255  # no whole turn: the place published tells one from the next
        for turn in range(turns):
            make_available(driver.transmitq, 0, NOWHERE, 100, turn * count, count)
            published = (turn + 1) * count % modulo
            wait_until(lambda place=published: queue.state.published == place, f"{published} is published", pause=0.001)
        assert device.from_guest.frames == 0
        make_available(driver.transmitq, 1, good, 12 + len(FRAME), turns * count)
        assert device.receive() == (NetHeader(), FRAME)
        assert device.from_guest.dropped == {"bad_chain": turns * count}


# ------------------------------------------------------------------------------- too short, too long, in pieces


def assert_lost(driver: NetDriver, device: PumpedDevice, reason: str) -> None:
    """What is on the transmitq is lost for one ``reason``, and the frame behind it is sent."""
    driver.transmit(FRAME)
    assert device.receive() == (NetHeader(), FRAME)
    assert driver.reclaim_all(10)
    assert (device.from_guest.frames, device.from_guest.dropped) == (1, {reason: 1})


@pytest.mark.parametrize("length", [0, 1, 11, 12, 13, 25])
@every_ring
def test_R42_transmitted_chain_without_a_frame(ring, length):
    with pumped(MERGEABLE | ring) as (driver, device):
        driver.transmitq.add([Buffer(driver.memory.alloc(64), length)])
        assert_lost(driver, device, "bad_length")


@pytest.mark.parametrize("length", [MAX_FRAME + 1, 200_000, 4 << 20])
@every_ring
def test_R17_R44_N13_transmitted_chain_longer_than_any_frame(ring, length):
    with pumped(MERGEABLE | ring) as (driver, device):
        driver.transmitq.add([Buffer(driver.memory.regions[0].gpa, 12 + length)])
        assert_lost(driver, device, "bad_length")


@every_ring
def test_R17_R44_transmitted_chain_of_a_gibibyte(ring):
    """The same mebibyte over and over, in an indirect table."""
    with pumped(MERGEABLE | ring) as (driver, device):
        driver.transmitq.add([Buffer(driver.memory.regions[0].gpa, 1 << 20)] * 1020, direct=0)
        assert_lost(driver, device, "bad_length")


@every_ring
def test_R11_R45_transmitted_frame_in_as_many_pieces_as_there_can_be(ring):
    data = bytes(12) + bytes(i & 0xFF for i in range(1012))
    with pumped(MERGEABLE | ring) as (driver, device):
        for pieces in (1023, 1024):
            driver.transmitq.post(readable=[data[i:i + 1] for i in range(pieces)], direct=0)
            driver.transmitq.submit()
        driver.transmit(FRAME)
        assert device.receive() == (NetHeader(), data[12:1023])
        assert device.receive() == (NetHeader(), FRAME)
        assert device.from_guest.dropped == {"bad_chain": 1}


# ----------------------------------------------------------------------------------------- nothing uncounted


@every_ring
def test_every_frame_is_counted_exactly_once(ring):
    """A thousand chains of every kind, in any order: sent, or lost for one reason; and so for the way back."""
    choose = random.Random(4)
    with pumped(OFFLOADS | mask(Feature.MRG_RXBUF) | ring, size=256) as (driver, device):
        kinds = {
            "sent": (FRAME, NetHeader()),
            "bad_header": (FRAME, NetHeader(gso_type=0x7F)),
            "bad_length": (b"short", NetHeader()),
            "bad_chain": None,
        }
        expected = dict.fromkeys(kinds, 0)
        wire = 0
        for _ in range(1000):
            kind = choose.choice(sorted(kinds))
            expected[kind] += 1
            if kind == "bad_chain":
                driver.transmitq.add([Buffer(NOWHERE, 100)])
            else:
                driver.offer(*kinds[kind])
            if choose.random() < 0.1:
                driver.transmitq.submit()
                assert driver.reclaim_all(10)
                while device.receive(0) is not None:
                    wire += 1
        driver.transmitq.submit()
        assert driver.reclaim_all(10)
        while device.receive(0) is not None:
            wire += 1
        stats = device.from_guest
        assert wire == stats.frames == expected.pop("sent")
        assert stats.dropped == expected

        driver.fill()
        sent = {"good": 0, "bad_length": 0, "offload": 0}
        for _ in range(300):
            kind = choose.choice(sorted(sent))
            sent[kind] += 1
            device.send({"bad_length": b"short"}.get(kind, FRAME), {"offload": NetHeader(1, csum_start=34)}.get(kind))
            if kind == "good":
                assert driver.receive_within(10).frame == FRAME
        device.send(bytes(70))
        assert driver.receive_within(10).frame == bytes(70)
        stats = device.to_guest
        assert stats.frames == sent.pop("good") + 1 and stats.dropped == sent
