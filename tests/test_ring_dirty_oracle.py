"""Pages that changed are a subset of the pages marked: all of guest memory is compared before and after.

Nor is any page marked that nobody could have written. test_ring_dirty.py says which bits exactly.
"""

import contextlib
import time
from collections import Counter
from random import Random

import pytest

from ring.dirty import PAGE
from ring.driver import Buffer, DriverQueue, Extent, GuestMemory, RingFull
from ring.driver_parts import EVENT_IDX, IN_ORDER, INDIRECT_DESC
from ring.errors import ChainError, MemoryGone, RingError
from ring.loadgen import LoadGenerator, Role
from ring.pump import LaneEvent
from ring.virtqueue import Chain, VirtQueue
from vdev.net.features import Feature, mask
from vdev.testing.agreement import BORDER, REGIONS
from vdev.testing.dirty import (
    FrontEndLog,
    changed,
    covering,
    log_all,
    logged,
    on_pages,
    pages,
    run,
    written_parts,
)
from vdev.testing.liar import Liar
from vdev.testing.netdriver import GSO_TCPV4, NetHeader
from vdev.testing.rig import ENGINES, USUAL, DeviceSide, pumped

PACKED = mask(Feature.RING_PACKED)
FORMATS = pytest.mark.parametrize("ring", [0, PACKED], ids=["split", "packed"])
EACH_ENGINE = pytest.mark.parametrize("serve", ENGINES.values(), ids=ENGINES.keys())
FRAME = bytes(range(1, 61))


# --------------------------------------------------------------------------------------------- step by step


class Steps:
    """A random driver and a device that steps at random, compared with memory after every step."""

    VERBS = ("pop", "pop", "write", "write", "push", "push", "push_batch", "publish", "arm", "disarm")

    def __init__(self, driver: DriverQueue, queue: VirtQueue, log: FrontEndLog, honest: bool, random: Random) -> None:
        self.driver, self.queue, self.log = driver, queue, log
        self.honest, self.random = honest, random
        self.held: list[Chain | ChainError] = []
        self.changed: set[int] = set()
        self.did: set[str] = set()

    def drive(self) -> None:
        """The driver's turn."""
        random, ring = self.random, self.driver.ring
        if not self.honest and random.random() < 0.5:
            Liar(self.driver.memory, ring.areas, self.driver.packed, ring.size).lie(random, self.queue.state)
            return
        buffers = [Buffer(random.choice((BORDER - 0x3000, REGIONS[2].gpa, REGIONS[3].gpa)) + random.randrange(0x800),
                          random.choice((1, 9, 100, 0x700)), writable) for writable in (False, True, True)]
        buffers.append(Buffer(BORDER - random.randrange(1, 0x1000), 0x1000, True))
        chain = sorted(random.sample(buffers, random.randrange(1, 4)), key=lambda buffer: buffer.writable)
        with contextlib.suppress(RingFull):
            self.driver.add(chain, direct=random.choice((0, None)))
            self.driver.publish()

    def step(self) -> None:
        """The device's turn: one verb, what it changed, and what it marked."""
        before = self.driver.memory.snapshot()
        verb = self.random.choice(self.VERBS)
        try:
            allowed = self.do(verb)
        except RingError:
            assert not self.honest
            allowed = set()
        found, marked = changed(self.driver.memory, before), self.log.take()
        inside = {page for page in found if page < 8 * self.log.size}
        assert inside <= marked, verb
        assert inside == found or self.log.log.skipped > 0
        if self.honest:
            assert marked <= allowed, verb
            self.driver.collect_all()
        self.changed |= inside

    def do(self, verb: str) -> set[int]:
        """-> the pages that may be marked for it."""
        chains = [chain for chain in self.held if isinstance(chain, Chain)]
        if verb == "pop":
            with contextlib.suppress(ChainError):
                chain = self.queue.pop()
                self.held += [chain] if chain else []
            return set()
        if verb == "write":
            return self.write(self.random.choice(chains)) if chains else set()
        if verb == "push":
            if self.held:
                self.did.add(verb)
                chain = self.held.pop(0)
                self.queue.push(chain, min(1, getattr(chain, "writable_len", 0)))
        elif verb == "push_batch":
            if self.held and self.driver.features >> IN_ORDER & 1:
                self.did.add(verb)
                batch, self.held = self.held, []
                self.queue.push_batch(batch)
        else:
            self.did.add(verb)
            getattr(self.queue, verb)()
        return pages(*written_parts(self.driver))

    def write(self, chain: Chain) -> set[int]:
        """Write somewhere into ``chain``, right over its end too."""
        self.did.add("write")
        length, offset = self.random.randrange(1, 0x1200), self.random.randrange(0x900)
        left = chain.write(self.random.randbytes(length), offset)
        parts = []
        for buffer in self.driver._outstanding[chain.head].buffers if self.honest else ():
            if buffer.writable:
                part = min(max(buffer.len - offset, 0), left)
                parts.append((buffer.gpa + offset, part))
                left -= part
                offset = max(offset - buffer.len, 0)
        return pages(*parts)


@pytest.mark.parametrize("honest", [True, False], ids=["honest", "lying"])
@FORMATS
def test_pages_a_step_changes_are_marked(ring, honest):
    found, did = set(), set()
    for seed in range(10 if honest else 30):
        random = Random(seed)
        features = ring | 1 << INDIRECT_DESC | (seed & 1) << EVENT_IDX | (seed >> 1 & 1) << IN_ORDER
        with (GuestMemory(extents=REGIONS) as memory,
              logged(random.choice((1, 8, 256)), features, memory=memory,
                     log=REGIONS[2].gpa // PAGE // 8 + 1) as (driver, queue, log)):
            steps = Steps(driver, queue, log, honest, random)
            for _ in range(150):
                steps.drive()
                steps.step()
                if queue.state.broken:
                    break
            found |= steps.changed
            did |= steps.did
    assert did == {*Steps.VERBS} - {"pop"}
    assert found >= {BORDER // PAGE, BORDER // PAGE - 1, REGIONS[2].gpa // PAGE, REGIONS[0].gpa // PAGE}


# ------------------------------------------------------------------------------------------ pump and step engine


# Regions that touch in the middle of a page, and one apart.
WIDE = (Extent(0x4000_0000, 0x6_0800, 0x7F50_0000_0000), Extent(0x4006_0800, 0x4_0000, 0x7F60_0000_0000),
        Extent(0x5000_0000, 0x4_0000, 0x7F40_0000_0000))
BUFFERS = ((0x4004_0000, 0x6_0000), (0x5000_0000, 0x4_0000))  # away from rings and tables


def random_chain(random: Random, least: int) -> list[Buffer]:
    """A receive buffer of pieces anywhere, of ``least`` bytes at least; few break a rule."""
    kind = random.randrange(15)
    if kind == 0:
        return [Buffer(0x7000_0000, 100, True)]
    if kind == 1:
        return [Buffer(BUFFERS[0][0], 40), Buffer(BUFFERS[0][0], 100, True)]
    parts = [Buffer(WIDE[1].gpa - random.randrange(1, 400), 0x1200, True)] if kind < 5 else []
    while not parts or sum(part.len for part in parts) < least:
        start, room = random.choice(BUFFERS)
        length = random.choice((1, 12, 100, 1536, 5000))
        parts.append(Buffer(start + random.randrange(room - length), length, True))
    random.shuffle(parts)
    return parts


def random_frame(random: Random) -> tuple[bytes, NetHeader]:
    """A frame for the guest; some are refused when they have been read."""
    length = random.choice((3, 14, 60, 1514, 1515, 4000, 9001, 30000))
    needs_offload = random.randrange(8) == 0
    return random.randbytes(length), NetHeader(gso_type=GSO_TCPV4, gso_size=1000) if needs_offload else NetHeader()


PLAIN = USUAL & ~mask(Feature.MRG_RXBUF)
VARIANTS = {"mergeable": USUAL, "plain": PLAIN, "in_order": USUAL | mask(Feature.IN_ORDER),
            "flags": USUAL & ~mask(Feature.EVENT_IDX)}


@EACH_ENGINE
@pytest.mark.parametrize("variant", VARIANTS)
@FORMATS
def test_pages_an_engine_changes_are_marked(serve, ring, variant):
    """Frames of every kind, among them some that are written and dropped then."""
    random, features = Random(1), VARIANTS[variant] | ring
    mergeable = features >> Feature.MRG_RXBUF & 1
    with (GuestMemory(extents=WIDE) as memory, FrontEndLog(covering(memory)) as log,
          serve(features, memory, size=32, attach=False, max_frame=9000) as (driver, device)):
        log_all(device, driver, log.log)
        found_at_all: set[int] = set()
        buffers: list[Buffer] = []
        for _ in range(30):
            for _ in range(random.randrange(12)):
                chain = random_chain(random, 1 if mergeable else 9012)
                with contextlib.suppress(RingFull):
                    driver.receiveq.add(chain, direct=0 if len(chain) > 2 else None)
                buffers += [buffer for buffer in chain if buffer.writable]
            driver.receiveq.publish()
            for _ in range(random.randrange(3)):
                driver.offer(random.randbytes(80))
            driver.transmitq.publish()
            frames = [random_frame(random) for _ in range(random.randrange(1, 6))]
            for frame, header in frames:
                device.send(frame, header)
            before = memory.snapshot()
            run(device, len(frames))
            found, marked = changed(memory, before), log.take()
            assert found <= marked
            assert marked <= pages(*written_parts(driver.transmitq), *written_parts(driver.receiveq),
                                   *((buffer.gpa, buffer.len) for buffer in buffers))
            found_at_all |= found
            driver.receiveq.collect_all()
            driver.reclaim()
            while device.receive(0):
                pass
        stats = device.to_guest
        assert stats.frames > 10 and stats.bad_chains and {"bad_length", "offload"} <= stats.dropped.keys()
        assert found_at_all & pages(*BUFFERS) and found_at_all - pages(*BUFFERS)
        assert log.log.skipped == 0


@EACH_ENGINE
@pytest.mark.parametrize("frame, header, limits, why", [
    (FRAME * 20, NetHeader(gso_type=GSO_TCPV4, gso_size=1000), {}, "offload"),
    (FRAME * 20, NetHeader(), {"max_frame": 1000}, "bad_length"),
    (FRAME * 20, NetHeader(), {"mtu": 1000}, "bad_length"),
    (FRAME[:9], NetHeader(), {}, "bad_length")], ids=["offload", "longer", "above_mtu", "shorter"])
@FORMATS
def test_frame_dropped_after_it_was_written(serve, ring, frame, header, limits, why):
    """The buffer goes back to the ring with bytes in it that were not there before."""
    with (serve(USUAL | ring, attach=False, **limits) as (driver, device),
          FrontEndLog(covering(driver.memory)) as log):
        at = on_pages(driver.memory, 2)
        driver.receiveq.add([Buffer(at, 2 * PAGE, True)])
        driver.receiveq.publish()
        device.config.to_guest.queue.log(log.log)
        device.send(frame, header)
        run(device, 1)
        assert device.to_guest.dropped == {why: 1}
        assert driver.memory.read(at + 12, len(frame)) == frame
        assert log.take() == pages((at, PAGE))


@EACH_ENGINE
@pytest.mark.parametrize("header", [12, 0])
def test_port_with_and_without_header(serve, header):
    with (serve(PLAIN, attach=False, port_header=header) as (driver, device),
          FrontEndLog(covering(driver.memory)) as log):
        at = on_pages(driver.memory, 3)
        device.config.to_guest.queue.log(log.log)
        for length, marked in ((60, {0, 1}), (61, {0, 1, 2})):
            driver.receiveq.add([Buffer(at, 12, True), Buffer(at + 2 * PAGE - 60, 4000, True)])
            driver.receiveq.publish()
            device.wire.send(bytes(header) + b"x" * length)
            run(device, 1)
            assert driver.receiveq.collect().written == 12 + length
            assert log.take() == {at // PAGE + page for page in marked}


@EACH_ENGINE
@FORMATS
def test_frame_longer_than_expected(serve, ring):
    """It is gathered in private memory and spread over more buffers; those it does not need are not touched."""
    with (serve(USUAL | ring, attach=False) as (driver, device), FrontEndLog(covering(driver.memory)) as log):
        at = on_pages(driver.memory, 16)
        for page in range(16):
            driver.receiveq.add([Buffer(at + page * PAGE, PAGE, True)])
        driver.receiveq.publish()
        device.config.to_guest.queue.log(log.log)
        device.send(b"x" * (5 * PAGE))
        run(device, 1)
        assert driver.receive(refill=False).buffers == 6
        assert log.take() == pages((at, 6 * PAGE))


# ---------------------------------------------------------------------------- memory that vanishes meanwhile


TWO = (Extent(0, 8 << 20, uva=1 << 40), Extent(1 << 30, 1 << 20, uva=1 << 41))


@FORMATS
def test_F25_kernel_gives_up_in_the_middle(ring):
    """readv answers EFAULT, and has written what came before."""
    with (GuestMemory(extents=TWO) as memory, FrontEndLog(covering(memory)) as log,
          pumped(USUAL | ring, memory, attach=False) as (driver, device)):
        kept, apart = on_pages(memory), on_pages(memory, region=1)
        driver.receiveq.add([Buffer(kept, 100, True), Buffer(apart, 4000, True)])
        driver.receiveq.publish()
        memory.truncate(region=1)
        log_all(device, driver, log.log)
        device.send(FRAME * 20)
        device.attach()
        assert device.events() == LaneEvent.MEMORY_GONE
        assert memory.read(kept + 12, 60) == FRAME
        assert pages((kept, 1)) <= log.take()


@EACH_ENGINE
@FORMATS
def test_F25_we_are_stopped_in_the_middle(serve, ring):
    """A frame that was held is copied into three buffers of which the last one vanished."""
    with (GuestMemory(extents=TWO) as memory, FrontEndLog(covering(memory)) as log,
          serve(USUAL | ring, memory, attach=False) as (driver, device)):
        first, second, gone = on_pages(memory), on_pages(memory), on_pages(memory, region=1)
        log_all(device, driver, log.log)
        driver.receiveq.add([Buffer(first, PAGE, True)])
        driver.receiveq.publish()
        device.send(FRAME * 200)
        run(device, 1)
        assert memory.read(first + 12, 60) == FRAME and device.to_guest.frames == 0
        assert pages((first, 1)) <= log.take()
        for at in (second, gone, gone):
            driver.receiveq.add([Buffer(at, PAGE, True)])
        driver.receiveq.publish()
        memory.truncate(region=1)
        device.attach()
        assert device.events() == LaneEvent.MEMORY_GONE
        assert memory.read(second, 1) != b"\0"
        assert pages((first, 1), (second, 1)) <= log.take()


@FORMATS
def test_F25_a_step_is_stopped_in_the_middle(ring):
    with GuestMemory(extents=TWO) as memory, logged(8, ring, memory=memory) as (driver, queue, log):
        kept, apart = on_pages(memory), on_pages(memory, region=1)
        driver.add([Buffer(kept, 100, True), Buffer(apart, 100, True)])
        driver.publish()
        chain = queue.pop()
        memory.truncate(region=1)
        with pytest.raises(MemoryGone, match="guest memory"):
            chain.write(b"x" * 200)
        assert memory.read(kept, 1) == b"x"
        assert log.take() == pages((kept, 1), (apart, 1))


@FORMATS
def test_F25_everything_the_device_writes_counts_when_its_ring_vanished(ring):
    """How far a step came is not known then."""
    with (GuestMemory(extents=TWO) as memory, DriverQueue(memory, 512, ring, used=TWO[1].gpa) as driver,
          DeviceSide(memory) as side, FrontEndLog(covering(memory)) as log):
        queue = side.queue(driver)
        queue.log(log.log, used=TWO[1].gpa)
        memory.truncate(region=1)
        with pytest.raises(MemoryGone, match="guest memory"):
            queue.arm()
        assert log.take() == pages(*written_parts(driver))


# --------------------------------------------------------------------------------------- a running device


@FORMATS
def test_VU_LOG_B_07_08_switched_and_swapped_under_load(ring):
    """Traffic does not notice. The log in use gets marks, one that is not gets none."""
    frames = 20_000
    with (pumped(USUAL | ring, attach=False, loop=True) as (driver, device),
          FrontEndLog(covering(driver.memory)) as first, FrontEndLog(covering(driver.memory)) as second,
          LoadGenerator(driver.receiveq, Role.RECEIVE, frames=frames, stall_ms=20_000) as sink,
          LoadGenerator(driver.transmitq, Role.TRANSMIT, frames=frames, stall_ms=20_000) as source):
        sink.start()
        source.start()
        marked = Counter()
        for used in (first, None, second) * 20:
            log_all(device, driver, used and used.log)
            before = device.to_guest.frames
            device.attach()
            while device.to_guest.frames < min(before + 100, frames) and not source.wait(0):
                time.sleep(0.0005)
            device.detach()
            marked.update((log, log is used) for log in (first, second) if log.take())
        assert marked.keys() == {(first, True), (second, True)} and min(marked.values()) > 5
        device.attach()
        assert source.wait(60) and sink.wait(60)
        for side in (source.stats(), sink.stats()):
            assert (side.frames, side.errors, side.lost) == (frames, {}, 0)


@FORMATS
def test_VU_LOG_B_10_taken_back_nothing_is_changed_or_marked(ring):
    with (pumped(USUAL | ring, attach=False) as (driver, device), FrontEndLog(covering(driver.memory)) as log):
        log_all(device, driver, log.log)
        driver.fill(8)
        device.send(FRAME)
        run(device, 1)
        assert log.take()
        driver.fill(4)
        driver.transmit(FRAME)
        device.send(FRAME)
        before = driver.memory.snapshot()
        assert device.receive(0.05) is None
        assert (changed(driver.memory, before), log.take()) == (set(), set())
