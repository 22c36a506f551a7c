"""The C core and the reference in Python give the same answers, to honest drivers and to lying ones.

Two devices, one of each kind, each with its own copy of the same guest memory. One driver, made up by
hypothesis, works on one copy, which is then carried over to the other. Each verb is asked of both devices, and
what they answer (or the rule that was broken, and where), what they say of themselves and all of guest memory
are compared every time.
"""

import contextlib
import sys
import unittest
from collections.abc import Callable, Iterator
from random import Random

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from ring.driver import Buffer, DeviceError, DriverQueue, Extent, GuestMemory, OutOfGuestMemory, RingFull
from ring.driver_parts import EVENT_IDX, IN_ORDER, INDIRECT_DESC, RING_PACKED
from ring.errors import ChainError, RingError, SetupError
from ring.reference import Chain, PackedQueue, SplitQueue
from ring.reference import packed as packed_module
from ring.reference import split as split_module
from ring.reference.packed import Place
from ring.virtqueue import CallReason
from vdev.testing.agreement import BORDER, REGIONS, BothDevices, Disagreement, Two, answer, told
from vdev.testing.liar import Liar
from vdev.testing.rig import DeviceSide

INDIRECT, EVENT, ORDER, PACKED = (1 << bit for bit in (INDIRECT_DESC, EVENT_IDX, IN_ORDER, RING_PACKED))

# ----------------------------------------------------------------------------------------------------- drivers


class Enough(unittest.SkipTest):
    """As many operations as are wanted have been compared. Hypothesis ends at once at what looks like a skip."""


class HonestDriver(RuleBasedStateMachine):
    """A driver that keeps all rules, and devices that take, use and give back in all the orders there are.

    packed is the format, wanted how many operations are, rare what must come up, in PATIENCE times as many if it
    has to be. Over all runs: done counts them, heard holds the rules and the reasons of notifications that came up.
    """

    packed: bool
    wanted: int
    rare: set[str]
    done: int
    heard: set[str]
    honest = True

    @initialize(size=st.sampled_from((1, 2, 3, 4, 8, 8, 256)), features=st.integers(0, 7), base=st.integers(-9, 9),
                wrap=st.booleans())
    def begin(self, size: int, features: int, base: int, wrap: bool) -> None:
        self.features = INDIRECT * (features & 1) | EVENT * (features >> 1 & 1) | ORDER * (features >> 2)
        if self.packed:
            self.features |= PACKED
            base = base % size | wrap << 15
        else:
            size += size == 3
            base %= 1 << 16
        self.memory = GuestMemory(extents=REGIONS)
        self.reserve_border()
        self.driver = DriverQueue(self.memory, size, self.features, base=base)
        self.both = BothDevices(self.memory)
        descriptor, driver, device = self.driver.ring.areas
        self.ring = {"size": size, "desc": self.memory.uva(descriptor.gpa), "avail": self.memory.uva(driver.gpa),
                     "used": self.memory.uva(device.gpa), "features": self.features}
        self.parts = (descriptor, driver, device)
        self.start(self.driver.base)

    def reserve_border(self) -> None:
        """Keep what is near the border for the buffers that lie across it."""
        rest = self.memory.alloc(REGIONS[0].size - 0x100, region=0)
        self.memory.alloc(0x100, region=0)
        self.memory.alloc(0x100, region=1)
        self.memory.free(rest)

    def start(self, base: int) -> None:
        self.held: list[Two] = []  # popped and not pushed, in that order
        self.fresh = 0  # so many of the last of these may still be given back
        self.walking: Two | None = None
        self.both.start(base=base, **self.ring)

    def teardown(self) -> None:
        if hasattr(self, "both"):
            type(self).done += self.both.operations
            self.heard.update(self.both.heard)
            self.both.close()
            self.driver.close()
            self.memory.close()
        enough = self.wanted if self.heard >= self.rare else PATIENCE * self.wanted
        if self.done >= enough and sys.exception() is None:
            raise Enough

    @contextlib.contextmanager
    def driving(self) -> Iterator[None]:
        """What the driver does to memory happens to both copies. Only a liar may be at odds with the device."""
        confused = () if self.honest else (DeviceError,)
        with contextlib.suppress(RingFull, OutOfGuestMemory, *confused):
            yield
        self.both.carry_over()

    # ------------------------------------------------------------------------------------------ the driver

    @rule(count=st.integers(1, 5), sizes=st.tuples(*[st.integers(0, 3)] * 2), step=st.integers(0, 300),
          direct=st.booleans(), publish=st.booleans())
    def post(self, count: int, sizes: tuple[int, int], step: int, direct: bool, publish: bool) -> None:
        readable = [bytes([i + step & 0xFF]) * (1 + i * step) for i in range(sizes[0])] or [b"x"]
        writable = [1 + i * step for i in range(sizes[1])]
        buffers = len(readable) + len(writable)
        within = None if direct or not self.features & INDIRECT else 0 if self.packed else step % (buffers + 1)
        self.catch_up()
        with self.driving():
            for _ in range(count):
                self.driver.post(readable, writable, direct=within)
        if publish:
            with self.driving():
                self.driver.submit()

    def catch_up(self) -> None:
        """Nothing to do for who has kept count."""

    @rule()
    def post_across_the_border(self) -> None:
        with self.driving():
            self.driver.add([Buffer(BORDER - 3, 7), Buffer(BORDER - 100, 300, writable=True)])
            self.driver.submit()

    @rule(after=st.integers(0, 3))
    def collect(self, after: int) -> None:
        with self.driving():
            self.driver.collect_all()
            if after:
                self.driver.ring.want_calls(after)
            else:
                self.driver.ring.refuse_calls()

    # ----------------------------------------------------------------------------------------- the devices

    def ask(self, verb: str, *arguments: object) -> Two:
        """Ask both. A ring that broke says so again whatever is asked, and is set up anew."""
        answers = self.both.ask(verb, *arguments)
        if self.both.core.state.broken:
            for other in ("see", "pop", "publish", "decide", "arm", "disarm"):
                self.both.ask(other)
            self.both.ask("conclude")
            self.both.ask("publish")
            self.start_again()
        return answers

    def start_again(self) -> None:
        raise AssertionError("an honest driver broke its ring")

    def taken(self, answers: Two) -> bool:
        """Keep a chain, or the error it raised, to push it later -> is there one?"""
        error = isinstance(answers.core, ChainError)
        if answers.core is None or isinstance(answers.core, RingError) and not error:
            return False
        assert not (error and self.honest), answers.core
        self.held.append(answers)
        self.fresh = 0 if error else min(self.fresh + 1, self.ring["size"])
        return True

    @precondition(lambda self: self.walking is None)
    @rule(verb=st.sampled_from(("see", "arm", "disarm", "publish", "decide")))
    def ask_for(self, verb: str) -> None:
        self.ask(verb)

    @precondition(lambda self: self.walking is None)
    @rule()
    def take(self) -> None:
        answers = self.ask("take")
        if not isinstance(answers.core, RingError) and answers.core is not None:
            self.walking = answers

    @precondition(lambda self: self.walking is not None)
    @rule(steps=st.integers(0, 3))
    def walk(self, steps: int) -> None:
        chain = self.walking
        for _ in range(steps):
            answers = self.ask("walk")
            if isinstance(answers.core, ChainError):
                self.taken(answers)
            elif answers.core is False:
                self.both.compare("chain", *map(told, chain))
                self.taken(chain)
            if answers.core is not True:
                self.walking = None
                return

    @precondition(lambda self: self.walking is not None)
    @rule()
    def give_back_half_walked(self) -> None:
        """As a device does that has to wait for something in the middle of a chain."""
        self.walking = None
        self.both.ask("unpop", Two(1, 1))

    @precondition(lambda self: self.walking is None)
    @rule(count=st.integers(1, 6), data=st.binary(max_size=20), offset=st.integers(0, 40))
    def pop(self, count: int, data: bytes, offset: int) -> None:
        for _ in range(count):
            answers = self.ask("pop")
            if not self.taken(answers):
                return
            if not isinstance(answers.core, ChainError):
                self.both.transfer(answers, data, offset)

    @precondition(lambda self: self.walking is None and self.fresh)
    @rule(count=st.integers(1, 4))
    def unpop(self, count: int) -> None:
        count = min(count, self.fresh)
        self.ask("unpop", Two(count, count))
        del self.held[-count:]
        self.fresh -= count

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 5), count=st.integers(1, 4), written=st.integers(0, 400))
    def push(self, which: int, count: int, written: int) -> None:
        for _ in range(min(count, len(self.held))):
            which = 0 if self.features & ORDER else which % len(self.held)
            chain = self.held.pop(which)
            self.fresh = min(self.fresh, len(self.held) - which)
            room = 0 if isinstance(chain.core, ChainError) else chain.core.writable_len
            self.ask("push", chain, Two(*[min(written, room)] * 2))

    @precondition(lambda self: self.held and self.features & ORDER)
    @rule(count=st.integers(1, 6))
    def push_batch(self, count: int) -> None:
        batch, self.held = self.held[:count], self.held[count:]
        self.fresh = min(self.fresh, len(self.held))
        self.ask("push_batch", Two(*map(list, zip(*batch, strict=True))))

    @precondition(lambda self: self.walking is None)
    @rule(count=st.integers(1, 12))
    def serve(self, count: int) -> None:
        """The daily round."""
        self.ask("disarm")
        while count and self.taken(self.ask("pop")):
            count -= 1
        while self.held:
            self.push(0, 1, 100)
        self.ask("publish")
        self.ask("decide")
        self.ask("arm")


    # -------------------------------------------------------------------------------------- many of these

    @rule(seed=st.integers(0, (1 << 32) - 1), steps=st.integers(50, 250))
    def live(self, seed: int, steps: int) -> None:
        """A long piece of all this at once: drawing each step from hypothesis costs more than the step itself."""
        random = Random(seed)
        for _ in range(steps):
            self.act(random, random.randrange)

    def act(self, random: Random, below: Callable[[int], int]) -> None:
        """Something that can be done now."""
        if self.walking is not None and below(3):
            return self.give_back_half_walked() if below(8) == 0 else self.walk(below(4))
        deeds = [
            (8, lambda: self.post(1 + below(5), (below(4), below(4)), below(301), below(2), below(4))),
            (1, self.post_across_the_border),
            (3, lambda: self.collect(below(4))),
        ]
        if self.walking is None:
            deeds += [
                (2, lambda: self.ask_for(random.choice(("see", "arm", "disarm", "publish", "decide")))),
                (1, self.take),
                (6, lambda: self.pop(1 + below(6), random.randbytes(below(21)), below(41))),
                (3, lambda: self.serve(1 + below(12))),
                (3 * bool(self.fresh), lambda: self.unpop(1 + below(4))),
            ]
        if self.held:
            deeds += [
                (4, lambda: self.push(below(6), 1 + below(4), below(401))),
                (4 * bool(self.features & ORDER), lambda: self.push_batch(1 + below(6))),
            ]
        if not self.honest:
            deeds.append((10, lambda: self.lie(random.getrandbits(32))))
        weights, deeds = zip(*deeds, strict=True)
        random.choices(deeds, weights)[0]()


class LyingDriver(HonestDriver):
    """A driver that writes what it likes, where it likes."""

    honest = False

    def start_again(self) -> None:
        """Where the driver seems to be, so that the next ring does not break at once."""
        if self.packed:
            self.start(self.both.core.base)
        else:
            self.start(self.memory.load(self.parts[1].gpa + 2, 2) - self.both.operations % 3 & 0xFFFF)

    def catch_up(self) -> None:
        """Post behind what was offered by hand, or the index would go back."""
        if not self.packed:
            self.driver.ring.next_avail = self.driver.ring.avail.idx

    @rule(seed=st.integers(0, (1 << 32) - 1))
    def lie(self, seed: int) -> None:
        Liar(self.memory, self.parts, self.packed, self.ring["size"]).lie(Random(seed), self.both.core.state)
        self.both.carry_over()


# --------------------------------------------------------------------------------------------------- agreement


OPERATIONS = 12_000  # of each of these
PATIENCE = 10

KINDS = [pytest.param(driver, packed, id=f"{name}-{'packed' if packed else 'split'}")
         for packed in (False, True) for name, driver in (("honest", HonestDriver), ("lying", LyingDriver))]

REASONS = set(CallReason.__members__)
CHAIN_RULES = {"RING_E_ORDER", "RING_E_INDIRECT_OFF", "RING_E_INDIRECT_NEXT", "RING_E_INDIRECT_LENGTH",
               "RING_E_UNMAPPED", "RING_E_PIECES"}
SPLIT_RULES = {"RING_E_NEXT_RANGE", "RING_E_LOOP", "RING_E_INDIRECT_NESTED", "RING_E_AVAIL_AHEAD",
               "RING_E_HEAD_RANGE"}
PACKED_RULES = {"RING_E_ENDLESS"}


def agree(driver: type[HonestDriver], packed: bool, operations: int) -> set[str]:
    """Run drivers of this kind until so many operations were compared -> the rules and reasons that came up.

    Raises Disagreement.
    """
    kind = type(driver.__name__, (driver,), {"packed": packed, "wanted": operations, "done": 0, "heard": set(),
                                             "rare": all_there_is(driver, packed)})
    # Nothing is shrunk: seeds do not shrink, and Disagreement tells what led to it.
    with pytest.raises(Enough):
        run_state_machine_as_test(kind, settings=settings(
            max_examples=operations, stateful_step_count=30, derandomize=True, database=None, deadline=None,
            phases=[Phase.generate], report_multiple_bugs=False, suppress_health_check=list(HealthCheck)))
    assert kind.done >= operations
    return kind.heard


def all_there_is(driver: type[HonestDriver], packed: bool) -> set[str]:
    """What a driver of this kind can make a device say."""
    return REASONS if driver.honest else REASONS | CHAIN_RULES | (PACKED_RULES if packed else SPLIT_RULES)


@pytest.mark.parametrize("driver, packed", KINDS)
def test_core_and_reference_agree(driver, packed):
    assert agree(driver, packed, OPERATIONS) == all_there_is(driver, packed)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("driver, packed", KINDS)
def test_core_and_reference_agree_at_length(driver, packed):
    assert agree(driver, packed, 20 * OPERATIONS) == all_there_is(driver, packed)


# ------------------------------------------------------------------------- what no driver above comes across


@pytest.mark.parametrize("changed", [
    {"size": 0}, {"size": 3}, {"size": 32768}, {"size": 32769}, {"size": 65536}, {"desc": 8}, {"avail": 1},
    {"avail": 2}, {"used": 2}, {"desc": 0x7FF0}, {"avail": 0x7FFE}, {"used": 0x7FFC}, {"desc": 0xF000_0000},
    {"base": 0}, {"base": 7}, {"base": 8}, {"base": 0x8008}, {"base": 0x8007_8003}, {"base": 0x0008_0003},
    {"base": 0x8000_0000}, {"base": 0x1_0005}], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_both_accept_or_refuse_a_ring(packed, changed):
    ring = {"size": 8, "desc": 0, "avail": 0x1000, "used": 0x2000, "base": 0x8000_8000 if packed else 0} | changed
    places = {name: REGIONS[0].uva + ring[name] for name in ("desc", "avail", "used")}
    with (GuestMemory(extents=REGIONS) as memory, contextlib.closing(BothDevices(memory)) as both,
          contextlib.suppress(SetupError)):
        both.start(features=PACKED * packed, **ring | places)


@pytest.mark.parametrize("lengths", [(0xFFFF_FFFF,), (0x8000_0000, 0x7FFF_FFFF), (0x8000_0000, 0x8000_0000),
                                     (0xFFFF_FFFF, 1), (0xFFFF_FFFF, 0, 1)])
@pytest.mark.parametrize("features", [0, PACKED], ids=["split", "packed"])
def test_R17_both_refuse_chains_beyond_4_gib(features, lengths):
    """In one memory, for it is too large to be compared, and nothing is written."""
    huge = [Extent(0x4000_0000, 1 << 32, 0x7F50_0000_0000)]
    with GuestMemory(extents=huge) as memory, DeviceSide(memory) as side, DriverQueue(memory, 8, features) as driver:
        driver.add([Buffer(huge[0].gpa, length) for length in lengths])
        driver.publish()
        core = side.queue(driver)
        uva = [memory.uva(area.gpa) for area in driver.ring.areas]
        reference = (PackedQueue if features else SplitQueue)(
            memory, size=8, desc=uva[0], avail=uva[1], used=uva[2], features=features, base=driver.base)
        answers = told(answer(core.pop)), told(answer(reference.pop))
        assert answers[0] == answers[1]
        refused = sum(lengths) > 0xFFFF_FFFF
        assert ("RING_E_LENGTH" in answers[0]) == refused


# ------------------------------------------------------------------------------------ the comparison can fail


def wrong_index_passed(event: int, before: int, now: int) -> bool:
    """An index too far."""
    return (event - before) % 65536 <= (now - before) % 65536


def forgetful_move(place: Place, slots: int, size: int) -> Place:
    """The wrap counter is never flipped."""
    return Place((place.slot + slots) % size, place.wrap)


def hasty_write(queue: PackedQueue, id: int, written: int) -> None:
    """Flags of the first descriptor are shown at once."""
    flags = queue.desc + 16 * queue.next_used.slot + 14
    WRITE_USED(queue, id, written)
    queue.memory.store(flags, 2, queue._held_flags)


def blind_place_passed(event: Place, moved: int, now: Place, size: int) -> bool:
    """The round is not looked at."""
    return PLACE_PASSED(Place(event.slot, now.wrap), moved, now, size)


WRITE_USED = PackedQueue._write_used
PLACE_PASSED = packed_module.place_passed


@pytest.mark.parametrize("driver, packed, where, name, wrong", [
    (HonestDriver, False, split_module, "index_passed", wrong_index_passed),
    (LyingDriver, False, Chain, "_check_order", lambda *_: None),
    (HonestDriver, True, Place, "moved", forgetful_move),
    (HonestDriver, True, PackedQueue, "_write_used", hasty_write),
    (HonestDriver, True, packed_module, "place_passed", blind_place_passed),
    (LyingDriver, True, PackedQueue, "_skip_rest", lambda *_: None),
], ids=lambda value: value if isinstance(value, str) else None)
def test_a_wrong_reference_is_noticed(monkeypatch, driver, packed, where, name, wrong):
    monkeypatch.setattr(where, name, wrong)
    with pytest.raises(Disagreement):
        agree(driver, packed, OPERATIONS)
