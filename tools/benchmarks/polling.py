"""Comparisons in which both back-ends poll and DPDK's drivers are the load.

- ``drop``: 64-byte frames that go no further than the back-end.
- ``guest-to-guest``: frames that circle between two guests through the back-end: vdev's switch against a testpmd that
  hands on what comes in at one port to the other.
- ``many``: the same with sixteen guests in pairs, held against vdev itself with two.
"""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial

from benchmarks.figures import Figure
from benchmarks.parts import POLLING, RING_SIZE, SATURATED, NetVhost, PollingSide, Run, SessionSide, Vdev, front_end
from benchmarks.results import Outcome
from benchmarks.rounds import Samples, Side, interleave

from vdev.testing.scripted import ScriptedGuest
from vdev.testing.testpmd import Counters, Forwarder, Rings

FORMATS = ("split", "packed")
SECONDS = 0.2


def rings(ring_format: str) -> Rings:
    """The same for both sides."""
    return Rings(packed=ring_format == "packed", size=RING_SIZE)


def judged(samples: Samples, subject: str, peer: str, cost: float | None, rate: float | None = None) -> list[Figure]:
    """Cost and rate of both sides against their targets; a rate that a load could not go beyond is not judged."""
    saturated = [side for side in ("vdev", peer)
                 if sorted(samples.of(side, "load_busy"))[len(samples.of(side, "load_busy")) // 2] > SATURATED]
    notes = (f"the load of {' and of '.join(saturated)} was saturated: judge by cost",) if saturated else ()
    return [samples.figure(subject, "cost", "ns/frame", peer, target=cost),
            samples.figure(subject, "rate", "Mframes/s", peer, 1e-6, more_is_better=True,
                           target=None if saturated else rate, notes=notes)]


def side_of(backend: Vdev | NetVhost, connect: Callable[[], Forwarder], count: Callable[[Counters], int],
            stack: contextlib.ExitStack) -> Side:
    """A back-end under the load that ``connect`` starts, frozen, so that the next one starts on a quiet machine."""
    if isinstance(backend, Vdev) and backend.polls:
        side: Side = SessionSide(backend, connect, count)
    else:
        side = PollingSide(backend, stack.enter_context(connect()), count)
    side.freeze()
    return side


# ------------------------------------------------------------------------------------------------------- drop


def drop(run: Run) -> Outcome:
    """64 B frames from a guest's driver, dropped by the back-end: ``null:`` against rxonly."""
    figures: list[Figure] = []
    for ring_format in FORMATS:
        figures += _drop(run, ring_format)
    return Outcome("drop", "testpmd net_vhost, rxonly", tuple(figures))


def _drop(run: Run, ring_format: str) -> list[Figure]:
    ours, theirs = run.socket(), run.socket()
    with contextlib.ExitStack() as stack:
        vdev = stack.enter_context(Vdev(run, ["--socket-path", ours, "--port", "null:", *POLLING]))
        peer = stack.enter_context(NetVhost(run, [theirs], "rxonly"))
        sides = [side_of(backend, partial(sending, run, path, ring_format), lambda counters: counters.sent, stack)
                 for backend, path in ((vdev, ours), (peer, theirs))]
        return judged(interleave(sides, run.count(11, 4), SECONDS), f"64 B, {ring_format}", peer.name, 0.8)


def sending(run: Run, path: str, ring_format: str) -> Forwarder:
    """A guest's driver that sends 64-byte frames without pause."""
    load = front_end(run, [path], "txonly", rings(ring_format), ["--txpkts=64"])
    load.start()
    return load


# --------------------------------------------------------------------------------------------- guest to guest


def addresses(guests: int) -> list[str]:
    """The MAC addresses of so many guests, such that testpmd, which sends to 02:00:00:00:00:NN at its port NN, sends to
    the neighbour: guests 0 and 1 are a pair, 2 and 3, and so on."""
    return [f"02:00:00:00:00:{number ^ 1:02x}" for number in range(guests)]


def long_options(size: int) -> list[str]:
    """Of a testpmd that is to handle frames of ``size`` bytes."""
    return ["--max-pkt-len=9018", "--mbuf-size=9344", "--total-num-mbufs=16384"] if size > 1518 else []


def circling(run: Run, paths: Sequence[str], ring_format: str, size: int) -> Forwarder:
    """Drivers between which frames of ``size`` bytes circle, each with its neighbour, as many as half a ring holds."""
    load = front_end(run, paths, "io", rings(ring_format), [f"--txpkts={size}", *long_options(size)],
                     addresses(len(paths)))
    load.start(bursts=RING_SIZE // 2 // 32)
    return load


def arrived(counters: Counters) -> int:
    """Frames of such drivers that went through."""
    return counters.received


def switch_devices(paths: Sequence[str]) -> list[str]:
    """Options of a vdev with a device on each of ``paths``, all on one switch."""
    return [word for path in paths for word in ("--device", f"socket={path},port=switch:lan")]


def switch(run: Run, paths: Sequence[str]) -> Vdev:
    """A vdev that polls, with these devices."""
    # One worker for all, as the testpmd that it is held against has one thread.
    return Vdev(run, [*switch_devices(paths), *POLLING, "--workers", "1"])


def guest_to_guest(run: Run) -> Outcome:
    """Frames between two guests: ``switch:`` against testpmd io between two vhost ports."""
    figures: list[Figure] = []
    for size in (64, 1518) if run.quick else (64, 512, 1518, 9000):
        for ring_format in FORMATS:
            figures += _guest_to_guest(run, ring_format, size)
    return Outcome("guest-to-guest", "testpmd io between two net_vhost", tuple(figures))


def _guest_to_guest(run: Run, ring_format: str, size: int) -> list[Figure]:
    ours, theirs = [run.socket(), run.socket()], [run.socket(), run.socket()]
    with contextlib.ExitStack() as stack:
        vdev = stack.enter_context(switch(run, ours))
        peer = stack.enter_context(NetVhost(run, theirs, "io", options=long_options(size)))
        sides = [side_of(backend, partial(circling, run, paths, ring_format, size), arrived, stack)
                 for backend, paths in ((vdev, ours), (peer, theirs))]
        samples = interleave(sides, run.count(5, 2), SECONDS)
    return judged(samples, f"{size} B, {ring_format}", peer.name, 0.67, 1.4 if size >= 1518 else 1.0)


# ------------------------------------------------------------------------------------------------------- many


def many(run: Run) -> Outcome:
    """A switch with sixteen guests in pairs, and with one more that takes nothing, against one with two."""
    crowds = {"sixteen": (16, 0), "two": (2, 0), "one stopped": (16, 1)}  # guests that talk, guests without buffers
    sides = []
    with contextlib.ExitStack() as stack:
        for name, (guests, stopped) in crowds.items():
            paths = [run.socket() for _ in range(guests + stopped)]
            vdev = stack.enter_context(switch(run, paths))
            vdev.name = name
            for path in paths[guests:]:
                stack.enter_context(ScriptedGuest.connect(path, buffers=0))
            sides.append(side_of(vdev, partial(circling, run, paths[:guests], "split", 64), arrived, stack))
        samples = interleave(sides, run.count(5, 2), SECONDS)
    return Outcome("many", "vdev itself with fewer guests", tuple(
        samples.figure(subject, "cost", "ns/frame", peer, ours=ours, target=target) for subject, ours, peer, target in (
            ("16 guests : 2 guests", "sixteen", "two", 1.5),
            ("17th guest takes nothing : is not there", "one stopped", "sixteen", None))))
