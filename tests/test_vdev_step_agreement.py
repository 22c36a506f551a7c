"""The step engine and the pump do the same: one script, two guests with memory alike, one engine each.

What a script does happens to both guests while their lanes are detached. Then both are attached, so that each engine
has exactly one turn, and detached again. Everything is compared that a guest, a network or an operator could see: all
of guest memory (rings, notification wishes, bytes in buffers), frames on the wire, counters, notifications, broken
rules, and where the rings stand.
"""

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ring.driver import Buffer, DeviceError, DriverQueue, GuestMemory, OutOfGuestMemory, RingFull
from ring.driver_packed import DESC_F_AVAIL
from ring.driver_parts import DESC_F_NEXT
from vdev.net.features import Feature, mask
from vdev.testing.netdriver import GSO_TCPV4, GSO_UDP, NEEDS_CSUM, NetDriver, NetHeader
from vdev.testing.rig import ENGINES, WiredDevice

MEMORY = 1 << 20  # less than what one turn may deliver
WILD = 1 << 40  # no memory is there
PACKED, IN_ORDER = mask(Feature.RING_PACKED), mask(Feature.IN_ORDER)
MERGEABLE, GSO = mask(Feature.MRG_RXBUF), mask(Feature.GUEST_CSUM, Feature.GUEST_TSO4)
FORMATS = {"split": 0, "packed": PACKED, "split_in_order": IN_ORDER, "packed_in_order": PACKED | IN_ORDER}
QUEUES = ("transmitq", "receiveq")

NONE = NetHeader()
TSO = NetHeader(NEEDS_CSUM, GSO_TCPV4, 54, 1448, 34, 16)
HEADERS = (NONE, NONE, NetHeader(NEEDS_CSUM, csum_start=14), NetHeader(NEEDS_CSUM, csum_start=9000),
           NetHeader(0xFE, csum_start=1, csum_offset=2, num_buffers=9), NetHeader(gso_type=GSO_UDP, gso_size=100), TSO,
           NetHeader(NEEDS_CSUM, GSO_TCPV4, 54, 3, 34, 16))


def chain(kind: str, gpa: int, writable: bool) -> list[Buffer]:
    """Buffers at ``gpa`` that break a rule, or a limit, or suit the other queue only; ``writable`` suits this one."""
    return {
        "unmapped": [Buffer(WILD, 100, writable)],
        "unmapped_end": [Buffer(gpa, 100, writable), Buffer(WILD, 1, writable)],
        "other_way": [Buffer(gpa, 100, not writable)],
        "both_ways": [Buffer(gpa, 12), Buffer(gpa + 100, 1600, True)],
        "empty": [Buffer(gpa, 0, writable)],
        "too_long": [Buffer(gpa, 100, writable), Buffer(gpa, 0xFFFF_FFFF, writable)],
        "pieces_1021": [Buffer(gpa, 1, writable)] * 1021,
        "pieces_1022": [Buffer(gpa, 1, writable)] * 1022,
        "pieces_1023": [Buffer(gpa, 1, writable)] * 1023,
        "pieces_1024": [Buffer(gpa, 1, writable)] * 1024,
    }[kind]


KINDS = ("unmapped", "unmapped_end", "other_way", "both_ways", "empty", "too_long", "pieces_1021", "pieces_1022",
         "pieces_1023", "pieces_1024")


class Guest:
    """One guest with its device. Its methods are what a script consists of, by name and arguments."""

    def __init__(self, driver: NetDriver, device: WiredDevice) -> None:
        self.driver, self.device = driver, device
        self._frames = count()

    def _frame(self, length: int) -> bytes:
        return Random(next(self._frames)).randbytes(length)

    def _queue(self, name: str) -> DriverQueue:
        return getattr(self.driver, name)

    @contextlib.contextmanager
    def _offering(self, queue: DriverQueue) -> Iterator[None]:
        """A guest may run out of descriptors or memory; both do at the same place."""
        with contextlib.suppress(RingFull, OutOfGuestMemory):
            yield
        queue.submit()

    def transmit(self, frames: int, length: int, header: NetHeader = NONE, cuts: tuple[int, ...] = (),
                 indirect: bool = False) -> None:
        with self._offering(self.driver.transmitq):
            for _ in range(frames):
                self.driver.offer(self._frame(length), header, cuts=cuts, direct=0 if indirect else None)

    def post(self, buffers: int, sizes: list[int]) -> None:
        with self._offering(self.driver.receiveq):
            for _ in range(buffers):
                self.driver.receiveq.post(writable=sizes)

    def send(self, frames: int, length: int, header: NetHeader = NONE) -> None:
        with contextlib.suppress(BlockingIOError):
            for _ in range(frames):
                self.device.send(self._frame(length), header)

    def offer(self, queue: str, kind: str) -> None:
        """A chain of ``kind``."""
        of = self._queue(queue)
        if kind == "both_ways" and of.packed:
            return  # the driver writes none
        with self._offering(of):
            buffers = chain(kind, self.driver.memory.alloc(2000), queue == "receiveq")
            of.add(buffers, direct=0 if len(buffers) > 2 else None)

    def post_over_ring(self, queue: str, part: int, offset: int) -> None:
        """Whatever is received there happens to a ring."""
        area = self._queue(queue).ring.areas[part]
        with self._offering(self.driver.receiveq):
            self.driver.receiveq.add([Buffer(area.gpa + offset - 12, 1536, writable=True)])

    def break_ring(self, queue: str, by_index: bool) -> None:
        of = self._queue(queue)
        if of.packed:
            for slot in range(of.ring.size):  # whichever comes next
                of.ring.desc[slot].flags = (of.ring.desc[slot].flags & DESC_F_AVAIL) | DESC_F_NEXT
            with self._offering(of):
                of.ring.offer([(WILD, 1, DESC_F_NEXT)], 0)
        elif by_index:
            of.ring.avail.idx = (of.ring.used.idx + 2 * of.ring.size + 1) % (1 << 16)
        else:
            of.ring.offer(of.ring.size)
            of.ring.publish()

    def wish(self, queue: str, after: int) -> None:
        """What the driver wants to be notified of; 0: nothing."""
        if after:
            self._queue(queue).ring.want_calls(after)
        else:
            self._queue(queue).ring.refuse_calls()

    def enable(self, direction: str, enabled: bool) -> None:
        getattr(self.device.config, direction).enabled = enabled

    def negotiate(self, without: int, mtu: int) -> None:
        """Another driver took over, which knows less or more; the rings stay, for simplicity."""
        self.device.config.features = self.driver.features & ~without
        self.device.config.mtu = mtu

    def collect(self) -> object:
        return [queue.collect_all() for queue in (self.driver.transmitq, self.driver.receiveq)]

    def drain(self) -> object:
        """All that lies on the wire; until then the port may be full."""
        messages = []
        with contextlib.suppress(BlockingIOError):
            while True:
                messages.append(self.device.wire.recv(1 << 17))
        return messages

    def turn(self) -> None:
        """The engine looks at both queues and at the port, once."""
        self.device.attach()
        self.device.detach()

    def condition(self) -> dict[str, object]:
        """All there is to see but the frames, how often the engine looked, and how far: before a port that takes no
        more the pump has looked a group of chains ahead. What matters of it, where kicks begin, is in the memory."""
        rings = []
        for flow in (self.device.config.from_guest, self.device.config.to_guest):
            broken = flow.queue.state.broken
            rings.append(vars(flow.queue.state) | {"broken": broken and (broken.code, broken.at), "known": 0,
                                                   "known_wrap": False})
        return {
            "stats": [vars(stats) | {"kicks": 0, "bursts": 0, "cycles": 0}
                      for stats in (self.device.from_guest, self.device.to_guest)],
            "rings": rings,
            "called": [queue.called() for queue in (self.driver.transmitq, self.driver.receiveq)],
            "errors": self.device.errors(),
            "events": self.device.events(0),
        }


# -------------------------------------------------------------------------------------------- both at once

Operation = tuple  # name of a method of Guest, arguments
END = [[("drain",)], [("collect",)]]


@dataclass(frozen=True)
class Script:
    """What to run. turns: what happens before each turn of the engine. room: how much the port takes, in bytes, if not
    all."""

    turns: list[list[Operation]]
    features: int = 0
    size: int = 128
    room: int | None = None
    port_header: int = 12


def outcome(operation: Callable[..., object], *arguments: object) -> object:
    """What it answers, or in what way the device's traces no longer make sense to the driver."""
    try:
        return operation(*arguments)
    except (DeviceError, OutOfGuestMemory, KeyError, ValueError, IndexError) as error:
        return repr(error)


def compare(ring: int, script: Script) -> set[str]:
    """Run ``script`` on a guest with either engine and look at both after each turn -> what came up; see heard."""
    features = mask(Feature.VERSION_1, Feature.INDIRECT_DESC) | ring | script.features
    with contextlib.ExitStack() as stack:
        guests = []
        for served in ENGINES.values():
            memory = stack.enter_context(GuestMemory(MEMORY))
            driver, device = stack.enter_context(served(features, memory, size=script.size, attach=False,
                                                        port_header=script.port_header))
            if script.room is not None:
                with socket.socket(fileno=os.dup(device.config.to_port)) as port:
                    port.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, script.room)
            guests.append(Guest(driver, device))
        for number, operations in enumerate(script.turns + END):
            where = f"turn {number}: {operations}"
            for name, *arguments in operations:
                one, other = (outcome(getattr(guest, name), *arguments) for guest in guests)
                assert one == other, where
            for guest in guests:
                guest.turn()
            step, pump = (guest.condition() for guest in guests)
            assert step == pump, where
            one, other = (guest.driver.memory.snapshot() for guest in guests)
            assert one == other, where
        return heard(pump)


def heard(condition: dict[str, object]) -> set[str]:
    """The names of what happened, from the condition at the end of a script."""
    names = {name for ring in condition["rings"] if ring["broken"] for name in (ring["broken"][0], "broken")}
    for direction, stats in zip(("from_guest", "to_guest"), condition["stats"], strict=True):
        names |= {f"{direction} {reason}" for reason in stats["dropped"]}
        names |= {f"{direction} {name}" for name in ("frames", "gso_frames", "bad_chains") if stats[name]}
    return names


every_ring = pytest.mark.parametrize("ring", FORMATS.values(), ids=FORMATS)

# ------------------------------------------------------------------------------------- what chance seldom finds

FULL_BURST = [[("transmit", 70, 60)], [("transmit", 128, 14)]]
DIRECTED = {
    "burst": (Script(FULL_BURST), {"from_guest frames"}),
    "limits_of_length": (Script([[("transmit", 1, length)] for length in (0, 13, 14, 65550, 65551)]
                                + [[("post", 1, [70_000]), ("send", 1, length)]
                                   for length in (0, 13, 14, 65550, 65551)]),
                         {"from_guest frames", "from_guest bad_length", "to_guest frames", "to_guest bad_length"}),
    "header_across_pieces": (Script([[("post", 3, [1, 11, 3, 2000]), ("post", 2, [4, 4, 4, 1]), ("post", 2, [5, 600]),
                                      ("send", 4, 500)]], features=MERGEABLE), {"to_guest frames"}),
    "buffers_too_small_for_a_header": (Script([[("post", 1, [11]), ("post", 1, [12]), ("post", 4, [600]),
                                                ("send", 3, 1514)]]), {"to_guest bad_chains", "to_guest too_small"}),
    "one_bad_chain_after_the_other": (Script([[("offer", "receiveq", "other_way")] * 100 + [("send", 1, 60)],
                                              [("post", 2, [1600])]]), {"to_guest bad_chains", "to_guest frames"}),
    "bad_chain_among_good_ones": (Script([[("post", 2, [600]), ("offer", "receiveq", "unmapped"), ("post", 3, [600]),
                                           ("send", 2, 1514)], [("post", 5, [600])]], features=MERGEABLE),
                                  {"to_guest bad_chains", "to_guest frames"}),
    "all_buffers_too_small": (Script([[("post", 8, [600]), ("send", 1, 9000)], [("send", 1, 60)]],
                                     features=MERGEABLE, size=8), {"to_guest too_small", "to_guest frames"}),
    "guess_after_a_loss": (Script([[("post", 1, [600]), ("send", 1, 4000, TSO)],
                                   [("negotiate", GSO, 0), ("post", 2, [600]), ("offer", "receiveq", "unmapped"),
                                    ("post", 5, [600]), ("send", 1, 60)]], features=MERGEABLE | GSO),
                           {"to_guest offload", "to_guest bad_chains"}),
    "guess_after_the_last_frame": (Script([[("post", 4, [1600]), ("send", 1, length), ("post", 1, [100]),
                                            ("offer", "receiveq", "unmapped")] for length in (1514, 1515, 1514)]
                                          + [[("post", 9, [1600]), ("send", 4, 60)]], features=MERGEABLE),
                                   {"to_guest frames", "to_guest bad_chains"}),
    "held_frame_and_another_driver": (Script([[("post", 1, [600]), ("send", 1, 4000, TSO), ("send", 1, 60)],
                                              [("negotiate", GSO, 0)], [("post", 9, [600])]],
                                             features=MERGEABLE | GSO), {"to_guest offload", "to_guest frames"}),
    "held_frame_and_a_broken_ring": (Script([[("post", 1, [600]), ("send", 1, 4000)],
                                             [("post", 1, [600]), ("break_ring", "receiveq", False)]],
                                            features=MERGEABLE), {"to_guest bad_chain"}),
    "mtu": (Script([[("negotiate", 0, 1500), ("post", 9, [4000]), ("send", 1, 1514), ("send", 1, 1515),
                     ("send", 1, 1518), ("send", 1, 3000, TSO)]], features=GSO), {"to_guest bad_length"}),
    "full_port": (Script([[("transmit", 20, 900)], [("transmit", 3, 60)], [("drain",)], [("transmit", 3, 60)]],
                         room=8192), {"from_guest frames"}),
    "port_that_takes_no_long_frame": (Script([[("transmit", 2, 9000)]], room=4096), {"from_guest port"}),
    "disabled": (Script([[("enable", "from_guest", False), ("enable", "to_guest", False), ("transmit", 3, 60),
                          ("post", 3, [1600]), ("send", 2, 60)], [("enable", "to_guest", True)],
                         [("enable", "from_guest", True), ("transmit", 3, 60)]]),
                 {"from_guest disabled", "from_guest frames", "to_guest frames"}),
    **{f"{queue}_that_breaks_{'by_index' if index else 'by_entry'}": (
        Script([[("wish", queue, 1), ("transmit", 3, 60), ("post", 3, [1600]), ("offer", queue, "unmapped"),
                 ("send", 4, 60), ("break_ring", queue, index)], [("transmit", 1, 60), ("send", 1, 60)]]), {"broken"})
       for queue in QUEUES for index in (False, True)},
}


LARGE_TABLES = {
    "limits_of_pieces": (Script([[("offer", queue, kind)] for queue in QUEUES for kind in KINDS]
                                + [[("send", 5, 900)]] * 2 + [[("post", 3, [1600])]]),
                         {"from_guest bad_chain", "to_guest bad_chains", "to_guest frames"}),
    "pieces_of_several_chains": (Script([[("post", 1, [600]), ("offer", "receiveq", "pieces_1022"),
                                          ("post", 1, [1600]), ("send", 1, 1500), ("send", 1, 60)]],
                                        features=MERGEABLE), {"to_guest too_small", "to_guest frames"}),
}


@pytest.mark.parametrize("script, names", DIRECTED.values(), ids=DIRECTED)
@every_ring
def test_engines_agree_where_chance_seldom_leads(ring: int, script: Script, names: set[str]) -> None:
    assert compare(ring, script) >= names


@pytest.mark.parametrize("script, names", LARGE_TABLES.values(), ids=LARGE_TABLES)
@pytest.mark.parametrize("ring", [0, PACKED], ids=["split", "packed"])
def test_engines_agree_on_large_tables(ring: int, script: Script, names: set[str]) -> None:
    assert compare(ring, script) >= names


# --------------------------------------------------------------------------------------------------- chance

queues = st.sampled_from(QUEUES)
headers = st.sampled_from(HEADERS)
USUAL = (
    st.tuples(st.just("transmit"), st.sampled_from((1, 1, 3, 70)), st.sampled_from((13, 60, 60, 1514, 9000, 65550)),
              headers, st.sampled_from(((), (), (12,), (5, 11), (3, 11, 12))), st.booleans()),
    st.tuples(st.just("post"), st.sampled_from((1, 2, 8, 50)), st.sampled_from((
        [1536], [1536], [600], [65562], [12], [13], [11], [5], [1, 11, 3, 2000], [12, 700], [4, 4, 4, 1]))),
    st.tuples(st.just("send"), st.sampled_from((1, 1, 2, 10)),
              st.sampled_from((0, 1, 13, 14, 60, 60, 1514, 1515, 4000, 30_000, 65550, 65551, 66_000)), headers),
    st.tuples(st.just("offer"), queues, st.sampled_from(KINDS)),
    st.tuples(st.just("wish"), queues, st.sampled_from((0, 1, 2, 5))),
    st.tuples(st.just("enable"), st.sampled_from(("from_guest", "to_guest")), st.sampled_from((True, True, False))),
    st.tuples(st.just("negotiate"), st.sampled_from((0, MERGEABLE, GSO, mask(Feature.CSUM))),
              st.sampled_from((0, 0, 1500))),
    st.just(("collect",)),
    st.just(("drain",)),
)
NASTY = (
    *USUAL,
    st.tuples(st.just("post_over_ring"), queues, st.integers(0, 2), st.sampled_from((0, 2, 4, 16, 40))),
    st.tuples(st.just("break_ring"), queues, st.booleans()),
)
OPTIONAL = (Feature.MRG_RXBUF, Feature.EVENT_IDX, Feature.CSUM, Feature.GUEST_CSUM, Feature.HOST_TSO4,
            Feature.GUEST_TSO4)


def scripts(operations: tuple[st.SearchStrategy, ...]) -> st.SearchStrategy[Script]:
    turns = st.lists(st.lists(st.one_of(*operations), min_size=1, max_size=4), min_size=4, max_size=12)
    features = st.sets(st.sampled_from(OPTIONAL)).map(lambda chosen: mask(*chosen))
    return st.builds(Script, turns, features, st.sampled_from((8, 128, 128)),
                     st.sampled_from((None, None, 4096, 90_000)), st.sampled_from((12, 12, 0)))


def agree(ring: int, operations: tuple[st.SearchStrategy, ...], examples: int) -> set[str]:
    """Compare so many scripts -> all that came up."""
    names: set[str] = set()

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))
    @given(scripts(operations))
    def run(script: Script) -> None:
        names.update(compare(ring, script))

    run()
    return names


@every_ring
def test_engines_agree(ring: int) -> None:
    assert agree(ring, USUAL, 15) >= {"from_guest frames", "to_guest frames"}


@every_ring
def test_engines_agree_on_nasty_guests(ring: int) -> None:
    assert agree(ring, NASTY, 15) >= {"from_guest frames"}


@pytest.mark.long
@pytest.mark.timeout(1800)
@every_ring
def test_engines_agree_for_long(ring: int) -> None:
    assert agree(ring, NASTY, 1000) >= {"from_guest frames", "to_guest frames"}
