"""The fd pump against a guest that lies in its rings.

Each test carries the id of its case. Whatever comes, the worker goes on, the other guests in it do not notice, and
every frame is counted once: delivered, or lost for one reason. What a header may say is in
tests/test_ring_pump_header.py, floods and memory that vanishes in tests/test_ring_pump_faults.py.
"""

import contextlib
import random
import resource
import threading
import time

import pytest

from ring.driver import Buffer
from ring.driver_parts import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE
from ring.pump import LaneEvent
from vdev.net.features import HOST_GSO, Feature, mask
from vdev.testing.netdriver import GSO_TCPV4, NEEDS_CSUM, NetDriver, NetHeader
from vdev.testing.rig import assert_serves, pumped

BASE = mask(Feature.VERSION_1, Feature.INDIRECT_DESC, Feature.EVENT_IDX)
MERGEABLE = BASE | mask(Feature.MRG_RXBUF)
OFFLOADS = BASE | HOST_GSO | mask(Feature.CSUM)
FRAME = bytes(range(60))
GOOD = 255  # a descriptor of each 256-entry transmitq here that is a good frame
MAX_FRAME = 65550
either_format = pytest.mark.parametrize("ring", [0, mask(Feature.RING_PACKED)], ids=["split", "packed"])


def put_good(driver: NetDriver) -> None:
    gpa = driver.memory.alloc(12 + len(FRAME))
    driver.memory.write(gpa + 12, FRAME)
    driver.transmitq.ring.desc[GOOD].set(gpa, 12 + len(FRAME))


def offer(queue, *heads: int) -> None:
    """Make these heads available and kick."""
    for head in heads:
        queue.ring.offer(head)
    queue.submit()


def used(queue, count: int, seconds: float = 10) -> list[tuple[int, int]]:
    """Wait for ``count`` used elements -> (head, length) of each."""
    elements = []
    deadline = time.monotonic() + seconds
    while len(elements) < count and time.monotonic() < deadline:
        if (element := queue.ring.next_completion()) is None:
            time.sleep(0.001)
        else:
            elements.append(element)
    return elements


def cpu() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


# -------------------------------------------------------------------------------------------- broken rings


@pytest.mark.parametrize("rule, code", [("idx", "RING_E_AVAIL_AHEAD"), ("head", "RING_E_HEAD_RANGE")])
def test_R02_R04_broken_transmitq_is_reported_once_and_alone(rule, code):
    with pumped() as (driver, device):
        driver.fill()
        if rule == "idx":
            driver.transmitq.ring.avail.idx = 257
            driver.transmitq.kick()
        else:
            offer(driver.transmitq, 256)
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
        assert device.from_guest.frames == 0 and driver.transmitq.ring.used.idx == 0


def test_R02_R04_frames_before_the_bad_head_are_sent_and_used():
    with pumped() as (driver, device):
        put_good(driver)
        offer(driver.transmitq, GOOD, GOOD, 0xFFFF, GOOD)
        assert device.events() == LaneEvent.FROM_GUEST_BROKEN
        assert used(driver.transmitq, 3, 0.1) == [(GOOD, 0), (GOOD, 0)]
        assert device.from_guest.frames == 2


@pytest.mark.parametrize("bad", ["idx", "head"])
def test_R02_R04_broken_receiveq(bad):
    with pumped() as (driver, device):
        if bad == "idx":
            driver.receiveq.ring.avail.idx = 0x8000
            driver.receiveq.kick()
        else:
            offer(driver.receiveq, 0x8000)
        device.send(FRAME)
        assert device.events() == LaneEvent.TO_GUEST_BROKEN
        assert device.errors() == (0, 1)
        driver.transmit(FRAME)
        assert device.receive() == (NetHeader(), FRAME)
        busy = cpu()
        device.send(FRAME)
        time.sleep(0.2)
        assert cpu() - busy < 0.1  # the port is not read any more, and does not wake us


def test_R02_receiveq_that_breaks_under_a_frame_in_hand():
    """The frame was longer than expected and is out of the port already: it is lost, and counted."""
    with pumped(buffer_size=1000) as (driver, device):
        driver.fill(2)
        ring = driver.receiveq.ring
        ring.avail.ring[2] = 0xFFFF
        ring.avail.idx = 3
        device.send(bytes(4000))
        assert device.events() == LaneEvent.TO_GUEST_BROKEN
        assert (device.to_guest.frames, device.to_guest.dropped) == (0, {"bad_chain": 1})
        assert ring.used.idx == 0


# ----------------------------------------------------------------------------------------- refused chains


def bad_chains(driver: NetDriver) -> list[int]:
    """Heads of chains that each break a rule; the transmitq's descriptors are written by hand."""
    desc = driver.transmitq.ring.desc
    gpa = driver.memory.alloc(4096)
    next_, write, table = DESC_F_NEXT, DESC_F_WRITE, DESC_F_INDIRECT
    rows = [
        (gpa, 100, next_, 256),  # R08
        (gpa, 100, next_, 1),  # R09
        (gpa, 0, next_, 2),  # R10
        (1 << 60, 100, 0, 0),  # R15
        (gpa, 72, write, 0),  # R18
        (gpa, 15, table, 0),  # R26
        (gpa, 32, table | next_, 7),  # R21
        (1 << 60, 32, table, 0),  # R24
    ]
    for i, row in enumerate(rows):
        desc[i].set(*row)
    desc[8].set(gpa, 40, next_ | write, 9)  # R19
    desc[9].set(gpa, 40)
    desc[10].set(gpa, 40, next_, 11)  # R18: a frame with room to write behind it
    desc[11].set(gpa, 40, write)
    return [*range(9), 10]


def test_R18_R54_refused_chain_goes_back_with_length_0():
    with pumped() as (driver, device):
        put_good(driver)
        heads = [head for bad in bad_chains(driver) for head in (bad, GOOD)]
        kept = driver.memory.read(*descriptors_and_buffers(driver))
        offer(driver.transmitq, *heads)
        assert used(driver.transmitq, len(heads)) == [(head, 0) for head in heads]
        good = len(heads) // 2
        assert [device.receive() for _ in range(good)] == [(NetHeader(), FRAME)] * good
        stats = device.from_guest
        assert (stats.frames, stats.dropped, stats.bad_chains) == (good, {"bad_chain": good}, good)
        assert driver.memory.read(*descriptors_and_buffers(driver)) == kept


def descriptors_and_buffers(driver: NetDriver) -> tuple[int, int]:
    """Where the good frame and what bad_chains points at lie: behind all rings, to the end of memory."""
    region = driver.memory.regions[0]
    start = driver.transmitq.ring.used.gpa + driver.transmitq.ring.layout.used_bytes
    return start, region.gpa + region.size - start


def test_R55_100_000_bad_chains_and_the_good_one_behind_them():
    with pumped() as (driver, device):
        put_good(driver)
        queue = driver.transmitq
        queue.ring.desc[0].set(1 << 60, 100)
        rounds = 400
        for _ in range(rounds):
            offer(queue, *[0] * 250)
            elements = used(queue, 250)
            assert elements == [(0, 0)] * 250
        offer(queue, GOOD)
        assert device.receive() == (NetHeader(), FRAME)
        assert device.from_guest.dropped == {"bad_chain": 250 * rounds}


@pytest.mark.parametrize("length", [1, 11, 12, 13, 25])
def test_R42_transmitted_chain_without_a_frame(length):
    with pumped() as (driver, device):
        put_good(driver)
        driver.transmitq.ring.desc[0].set(driver.memory.alloc(64), length)
        offer(driver.transmitq, 0, GOOD)
        assert device.receive() == (NetHeader(), FRAME)
        assert device.from_guest.dropped == {"bad_length": 1}


def test_R42_empty_transmitted_chain():
    with pumped() as (driver, device):
        put_good(driver)
        driver.transmitq.ring.desc[0].set(0, 0)
        offer(driver.transmitq, 0, GOOD)
        assert device.receive() == (NetHeader(), FRAME)
        assert device.from_guest.dropped == {"bad_length": 1}


def test_R09_packed_ring_without_an_end_breaks_and_is_reported_once():
    with pumped(MERGEABLE | mask(Feature.RING_PACKED), size=16) as (driver, device):
        driver.fill()
        gpa = driver.memory.alloc(64)
        driver.transmitq.ring.offer([(gpa, 20, DESC_F_NEXT)] * 16, 0)
        driver.transmitq.submit()
        assert device.events() == LaneEvent.FROM_GUEST_BROKEN
        assert device.errors() == (1, 0)
        assert device.config.from_guest.queue.state.broken.code == "RING_E_ENDLESS"
        device.send(FRAME)
        assert driver.receive_within(10).frame == FRAME  # the other direction goes on
        driver.transmitq.kick()
        assert device.events(0.05) == LaneEvent(0) and device.errors() == (0, 0)


@pytest.mark.parametrize("length", [MAX_FRAME + 1, 200_000, 4 << 20])
def test_R17_R44_N13_transmitted_chain_longer_than_any_frame(length):
    with pumped() as (driver, device):
        put_good(driver)
        driver.transmitq.ring.desc[0].set(driver.memory.regions[0].gpa, 12 + length)
        offer(driver.transmitq, 0, GOOD)
        assert device.receive() == (NetHeader(), FRAME)
        assert device.from_guest.dropped == {"bad_length": 1}


@either_format
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


@pytest.mark.parametrize("features", [BASE, MERGEABLE])
@either_format
def test_R11_R45_receive_buffer_in_as_many_pieces_as_there_can_be(ring, features):
    with pumped(features | ring) as (driver, device):
        # no piece is the header's alone: our header, all of them and the tail are what one call takes
        for pieces in (1023, 1022):
            driver.receiveq.post(writable=[13] + [2] * (pieces - 1), direct=0)
        driver.receiveq.submit()
        device.send(FRAME)
        assert used(driver.receiveq, 2) == [(0, 0), (1, 12 + len(FRAME))]
        assert (device.to_guest.bad_chains, device.to_guest.dropped) == (1, {})


@either_format
def test_R18_readable_descriptor_in_a_receive_chain_is_not_written(ring):
    with pumped(MERGEABLE | ring) as (driver, device):
        kept = driver.memory.alloc(2000)
        driver.memory.write(kept, b"\x77" * 2000)
        room = Buffer(driver.memory.alloc(2000), 2000, writable=True)
        for chain in ([Buffer(kept, 2000)], [Buffer(kept, 2000), room]):
            driver.receiveq.add(chain)
        driver.fill(1)
        device.send(FRAME)
        assert [driver.receiveq.ring.next_completion()[1] for _ in used_heads(driver, 2)] == [0, 0]
        assert driver.receive_within(10, refill=False).frame == FRAME
        assert driver.memory.read(kept, 2000) == b"\x77" * 2000
        assert device.to_guest.bad_chains == 2 and device.to_guest.dropped == {}


def used_heads(driver: NetDriver, count: int) -> range:
    """Wait until the receiveq has ``count`` used elements."""
    assert driver.receiveq.wait(10, count)
    return range(count)


# --------------------------------------------------------------------------------- receive buffers too small


@either_format
def test_R46_frame_larger_than_the_buffer_without_mergeable_buffers(ring):
    with pumped(BASE | ring, buffer_size=1000) as (driver, device):
        driver.fill(2)
        for length in (989, 5000, 988):
            device.send(bytes(length))
        assert len(driver.receive_within(10, refill=False).frame) == 988
        assert device.to_guest.dropped == {"too_small": 2}
        assert driver.receiveq.ring.pending() == 0  # the buffer was not used up by what did not fit


@pytest.mark.parametrize("features", [BASE, MERGEABLE])
@pytest.mark.parametrize("room", [1, 11])
@either_format
def test_R47_receive_buffer_smaller_than_the_header(ring, features, room):
    with pumped(features | ring) as (driver, device):
        driver.receiveq.post(writable=[room])
        driver.fill(1)
        device.send(FRAME)
        assert used(driver.receiveq, 2) == [(0, 0), (1, 12 + len(FRAME))]
        assert device.to_guest.bad_chains == 1
        assert (device.to_guest.frames, device.to_guest.dropped) == (1, {})


@either_format
def test_R50_mergeable_buffers_of_one_byte(ring):
    """A frame may take no more chains than the queue has; this one needs more, and there never will be enough."""
    with pumped(MERGEABLE | ring, size=16) as (driver, device):
        driver.receiveq.post(writable=[12])
        for _ in range(15):
            driver.receiveq.post(writable=[1])
        driver.receiveq.submit()
        device.send(FRAME)
        device.send(bytes(15))
        received = driver.receive_within(10, refill=False)
        assert (received.frame, received.buffers) == (bytes(15), 16)
        assert device.to_guest.dropped == {"too_small": 1}


@either_format
def test_R48_more_pieces_than_one_call_takes_in_many_buffers(ring):
    with pumped(MERGEABLE | ring, size=256) as (driver, device):
        for _ in range(256):
            driver.receiveq.post(writable=[12, 3, 3, 3, 3, 3], direct=0)  # 1536 pieces in all
        driver.receiveq.submit()
        device.send(bytes(5000))
        device.send(bytes(4000))
        received = driver.receive_within(10, refill=False)
        assert len(received.frame) == 4000
        assert device.to_guest.dropped == {"too_small": 1}


def test_R51_receive_buffers_on_the_rings():
    """Frames are written over both rings: any outcome but a crash, and the guest beside it notices nothing."""
    choose = random.Random(3)
    with pumped() as (neighbour, beside):
        for _ in range(30):
            with pumped(size=64, attach=False) as (driver, device):
                rings = [getattr(queue.ring, part).gpa for queue in (driver.receiveq, driver.transmitq)
                         for part in ("desc", "avail", "used")]
                for _ in range(20):
                    driver.receiveq.add([Buffer(choose.choice(rings) + 4 * choose.randrange(16), 1500, writable=True)])
                driver.offer(FRAME)
                driver.receiveq.submit()
                driver.transmitq.submit()
                device.lane.configure(device.config)
                beside.pump.attach(device.lane)
                for _ in range(5):
                    with contextlib.suppress(BlockingIOError):
                        device.send(choose.randbytes(1400))
                    driver.receiveq.kick()
                    driver.transmitq.kick()
                time.sleep(0.002)
                beside.pump.detach(device.lane, 5000)
                lost = device.to_guest
                assert lost.frames + sum(lost.dropped.values()) <= 5
        assert_serves(neighbour, beside)


# ------------------------------------------------------------------------------------------ the net header


def test_R32_header_rewritten_while_it_is_checked():
    """What goes out is what was checked, at whatever instant the guest rewrites it."""
    good = NetHeader(NEEDS_CSUM, GSO_TCPV4, 54, 1448, 34, 16)
    bad = NetHeader(0xFF, 0x7F, 0xFFFF, 0, 0xFFFF, 0xFFFF, 0xFFFF)
    with pumped(OFFLOADS) as (driver, device):
        put_good(driver)
        gpa = driver.transmitq.ring.desc[GOOD].addr
        stop = threading.Event()

        def mutate():
            while not stop.is_set():
                driver.memory.write(gpa, bad.pack())
                driver.memory.write(gpa, good.pack())

        mutator = threading.Thread(target=mutate)
        mutator.start()
        outcomes = set()
        try:
            for _ in range(40):
                offer(driver.transmitq, *[GOOD] * 50)
                assert len(used(driver.transmitq, 50)) == 50
                while (message := device.receive(0)) is not None:
                    outcomes.add(message[0])
        finally:
            stop.set()
            mutator.join()
        for header in outcomes:  # a torn copy may go out, if what it says is right
            assert header.flags in (0, NEEDS_CSUM) and header.num_buffers == 0
            assert header.gso_type in (0, GSO_TCPV4) and header.hdr_len <= len(FRAME)
            assert not header.flags or header.csum_start + header.csum_offset + 2 <= len(FRAME)
        stats = device.from_guest
        assert stats.frames + stats.dropped.get("bad_header", 0) == 2000
        assert set(stats.dropped) <= {"bad_header"}


# ----------------------------------------------------------------------------------------- nothing uncounted


@either_format
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
                driver.transmitq.add([Buffer(1 << 60, 100)])
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
