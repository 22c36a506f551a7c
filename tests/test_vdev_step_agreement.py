"""The step engine and the pump do the same: one script, two guests with memory alike, one engine each.

Between two looks both lanes are attached, so that each engine has exactly one turn, and detached again. Then
everything is compared that a guest, a network or an operator could see: all of guest memory (rings, notification
wishes, bytes in buffers), frames on the wire, counters, notifications, broken rules, and where the rings stand.
"""

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ring.driver import Buffer, DeviceError, DriverQueue, GuestMemory, OutOfGuestMemory, RingFull
from ring.driver_parts import DESC_F_NEXT
from vdev.net.features import Feature, mask
from vdev.testing.netdriver import GSO_TCPV4, GSO_UDP, NEEDS_CSUM, NetDriver, NetHeader
from vdev.testing.rig import ENGINES, WiredDevice

MEMORY = 1 << 20  # less than one turn may deliver
WILD = 1 << 40  # no memory is there
HEADERS = (NetHeader(), NetHeader(), NetHeader(NEEDS_CSUM, csum_start=14), NetHeader(NEEDS_CSUM, csum_start=9000),
           NetHeader(0xFE, csum_start=1, csum_offset=2, num_buffers=9), NetHeader(gso_type=GSO_UDP, gso_size=100),
           NetHeader(NEEDS_CSUM, GSO_TCPV4, 54, 1448, 34, 16), NetHeader(NEEDS_CSUM, GSO_TCPV4, 54, 3, 34, 16))
FROM_GUEST_LENGTHS = (0, 2, 13, 14, 60, 60, 60, 1514, 9000, 65550, 65551)
TO_GUEST_LENGTHS = (0, 1, 13, 14, 60, 60, 60, 1514, 1515, 4000, 30_000, 65550, 65551, 66_000)
BUFFERS = ([12 + 1514], [1536], [1536], [600], [65562], [12], [13], [11], [5], [1, 11, 3, 2000], [12, 700],
           [4, 4, 4, 1])
OPTIONAL = (Feature.MRG_RXBUF, Feature.EVENT_IDX, Feature.CSUM, Feature.GUEST_CSUM, Feature.HOST_TSO4,
            Feature.GUEST_TSO4)
FORMATS = {"split": 0, "packed": mask(Feature.RING_PACKED), "split_in_order": mask(Feature.IN_ORDER),
           "packed_in_order": mask(Feature.RING_PACKED, Feature.IN_ORDER)}


class Guest:
    """One guest with its device, which the script works on. Each operation draws from ``random`` what it does."""

    def __init__(self, driver: NetDriver, device: WiredDevice, random: Random) -> None:
        self.driver, self.device, self.random = driver, device, random
        self.frames = 0

    @contextlib.contextmanager
    def as_far_as_it_goes(self) -> Iterator[None]:
        """A guest may run out of descriptors or memory; both do at the same place."""
        with contextlib.suppress(RingFull, OutOfGuestMemory):
            yield

    def pattern(self, length: int) -> bytes:
        self.frames += 1
        return Random(self.frames).randbytes(length)

    def some_queue(self) -> DriverQueue:
        return self.random.choice((self.driver.transmitq, self.driver.receiveq))

    # ----------------------------------------------------------------------------------- what a script does

    def transmit(self) -> None:
        direct = self.random.choice((None, 0)) if self.driver.features >> Feature.INDIRECT_DESC & 1 else None
        cuts = self.random.choice(((), (), (12,), (5, 11), (3, 11, 12)))
        with self.as_far_as_it_goes():
            for _ in range(self.random.choice((1, 1, 3, 70))):
                length = self.random.choice(FROM_GUEST_LENGTHS)
                self.driver.offer(self.pattern(length), self.random.choice(HEADERS), cuts=cuts if length > 1 else (),
                                  direct=direct)
        self.driver.transmitq.submit()

    def post(self) -> None:
        sizes = self.random.choice(BUFFERS)
        with self.as_far_as_it_goes():
            for _ in range(self.random.choice((1, 2, 8, 50))):
                self.driver.receiveq.post(writable=sizes)
        self.driver.receiveq.submit()

    def send(self) -> None:
        with contextlib.suppress(BlockingIOError):
            for _ in range(self.random.choice((1, 1, 2, 10))):
                length = self.random.choice(TO_GUEST_LENGTHS)
                self.device.send(self.pattern(length), self.random.choice(HEADERS))

    def bad_chain(self) -> None:
        """Chains that break a rule, or suit the other queue only."""
        queue = self.some_queue()
        good = self.driver.memory.alloc(2000)
        written = queue is self.driver.receiveq
        chain = self.random.choice((
            [Buffer(WILD, 100, written)],
            [Buffer(good, 100, written), Buffer(WILD, 1, written)],
            [Buffer(good, 100, not written)],
            [Buffer(good, 0, written)],
            [Buffer(good, 12, False), Buffer(good + 100, 1600, True)],
            [Buffer(good, 1, written)] * self.random.choice((1021, 1022, 1023, 1024)),
            [Buffer(good, 100, written), Buffer(good, 0xFFFF_FFFF, written)],
        ))
        with self.as_far_as_it_goes(), contextlib.suppress(ValueError):  # both kinds, indirect, on a packed ring
            for _ in range(self.random.choice((1, 3))):
                queue.add(chain, direct=0 if len(chain) > 2 else None)
        queue.submit()

    def post_over_rings(self) -> None:
        """Whatever is received there happens to a ring."""
        area = self.random.choice((*self.driver.receiveq.ring.areas, *self.driver.transmitq.ring.areas))
        with self.as_far_as_it_goes():
            self.driver.receiveq.add([Buffer(area.gpa + 4 * self.random.randrange(16) - 12, 1536, writable=True)])
        self.driver.receiveq.submit()

    def break_ring(self) -> None:
        queue = self.some_queue()
        if queue.packed:
            with self.as_far_as_it_goes():
                queue.ring.offer([(WILD, 1, DESC_F_NEXT)] * queue.ring.size, 0)
        elif self.random.random() < 0.5:
            queue.ring.avail.idx = (queue.ring.avail.idx + queue.ring.size + 1) % (1 << 16)
        else:
            queue.ring.offer(queue.ring.size)
        queue.submit()

    def wish(self) -> None:
        """What the driver wants to be notified of."""
        ring = self.some_queue().ring
        if self.random.random() < 0.3:
            ring.refuse_calls()
        else:
            ring.want_calls(self.random.choice((1, 2, 5)))

    def enable(self) -> None:
        flow = self.random.choice((self.device.config.from_guest, self.device.config.to_guest))
        flow.enabled = not flow.enabled

    def negotiate(self) -> None:
        """Another driver took over, which knows less or more; the rings stay, for simplicity."""
        self.device.config.features = self.driver.features & ~self.random.choice(
            (0, 0, mask(Feature.MRG_RXBUF), mask(Feature.GUEST_TSO4), mask(Feature.GUEST_CSUM, Feature.CSUM)))
        self.device.config.mtu = self.random.choice((0, 0, 1500))

    def collect(self) -> object:
        return [queue.collect_all() for queue in (self.driver.transmitq, self.driver.receiveq)]

    def drain(self) -> object:
        """All that lies on the wire; until then the port may be full."""
        messages = []
        with contextlib.suppress(BlockingIOError):
            while True:
                messages.append(self.device.wire.recv(1 << 17))
        return messages

    # ---------------------------------------------------------------------------------------- looking at it

    def turn(self) -> None:
        """The engine looks at both queues and at the port, once."""
        self.device.attach()
        self.device.detach()

    def condition(self) -> dict[str, object]:
        """All there is to see but the frames, and how the engine was woken."""
        stats = [vars(stats) | {"kicks": 0, "bursts": 0}
                 for stats in (self.device.from_guest, self.device.to_guest)]
        rings = []
        for flow in (self.device.config.from_guest, self.device.config.to_guest):
            broken = flow.queue.state.broken
            rings.append(vars(flow.queue.state) | {"broken": broken and (broken.code, broken.at)})
        called = [queue.called() for queue in (self.driver.transmitq, self.driver.receiveq)]
        return {"stats": stats, "rings": rings, "called": called, "errors": self.device.errors(),
                "events": self.device.events(0)}


OPERATIONS = ("transmit", "transmit", "transmit", "post", "post", "send", "send", "send", "collect", "collect", "drain",
              "bad_chain", "bad_chain", "wish", "enable", "negotiate")
NASTY = (*OPERATIONS, "post_over_rings", "break_ring")


def outcome(operation: Callable[[], object]) -> object:
    """What it answers, or in what way the device's traces no longer make sense to the driver."""
    try:
        return operation()
    except (DeviceError, OutOfGuestMemory, KeyError, IndexError) as error:
        return repr(error)


@dataclass(frozen=True)
class Script:
    """What to run. optional: which of OPTIONAL are negotiated, a bit each. room: how much the port takes, in bytes, if
    not all."""

    optional: int
    size: int
    seed: int
    names: list[str]
    room: int | None
    port_header: int

    @property
    def features(self) -> int:
        chosen = [feature for i, feature in enumerate(OPTIONAL) if self.optional >> i & 1]
        return mask(Feature.VERSION_1, Feature.INDIRECT_DESC, *chosen)


def scripts(operations: tuple[str, ...]) -> st.SearchStrategy[Script]:
    return st.builds(Script, optional=st.integers(0, (1 << len(OPTIONAL)) - 1), size=st.sampled_from((8, 128, 128)),
                     seed=st.integers(0, 1 << 32), names=st.lists(st.sampled_from(operations), min_size=8, max_size=30),
                     room=st.sampled_from((None, None, 4096, 90_000)), port_header=st.sampled_from((12, 12, 0)))


def compare(ring: int, script: Script) -> set[str]:
    """Run ``script`` on a guest with either engine and look at both after each operation -> what came up: reasons of
    losses, broken rules, "frames" each way."""
    with contextlib.ExitStack() as stack:
        guests = []
        for served in ENGINES.values():
            memory = stack.enter_context(GuestMemory(MEMORY))
            driver, device = stack.enter_context(served(
                ring | script.features, memory, size=script.size, attach=False, port_header=script.port_header))
            if script.room is not None:
                with socket.socket(fileno=os.dup(device.config.to_port)) as port:
                    port.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, script.room)
            guests.append(Guest(driver, device, Random(script.seed)))
        for i, name in enumerate([*script.names, "drain", "collect"]):
            answers = [outcome(getattr(guest, name)) for guest in guests]
            assert answers[0] == answers[1], (i, name)
            for guest in guests:
                guest.turn()
            step, pump = (guest.condition() for guest in guests)
            assert step == pump, (i, name)
            memories = [guest.driver.memory.snapshot() for guest in guests]
            assert memories[0] == memories[1], (i, name)
        return heard(pump)


def heard(condition: dict[str, object]) -> set[str]:
    """The names of what happened, from the condition at the end of a script."""
    names = {ring["broken"][0] for ring in condition["rings"] if ring["broken"]}
    for direction, stats in zip(("from_guest", "to_guest"), condition["stats"], strict=True):
        names |= {f"{direction} {reason}" for reason in stats["dropped"]}
        names |= {f"{direction} {name}" for name in ("frames", "gso_frames", "bad_chains") if stats[name]}
    return names


def agree(ring: int, operations: tuple[str, ...], examples: int) -> set[str]:
    """Compare so many scripts -> all that came up."""
    names: set[str] = set()

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))
    @given(scripts(operations))
    def run(script: Script) -> None:
        names.update(compare(ring, script))

    run()
    return names


# What a few scripts come upon whatever they are; more is welcome.
USUAL = {"from_guest frames", "from_guest bad_length", "from_guest bad_header", "from_guest bad_chain",
         "from_guest disabled", "to_guest frames", "to_guest bad_length", "to_guest offload", "to_guest too_small",
         "to_guest bad_chains"}
every_ring = pytest.mark.parametrize("ring", FORMATS.values(), ids=FORMATS)


@every_ring
def test_engines_agree(ring: int) -> None:
    assert agree(ring, OPERATIONS, 30) >= USUAL


@every_ring
def test_engines_agree_on_nasty_guests(ring: int) -> None:
    broken = {"RING_E_ENDLESS"} if ring & mask(Feature.RING_PACKED) else {"RING_E_AVAIL_AHEAD", "RING_E_HEAD_RANGE"}
    assert agree(ring, NASTY, 30) >= broken


@pytest.mark.long
@every_ring
def test_engines_agree_for_long(ring: int) -> None:
    assert agree(ring, NASTY, 3000) >= USUAL
