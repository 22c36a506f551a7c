"""Comparisons on TAP devices.

- ``tap-ceiling``: vdev against the most that one thread can do with a system call a frame (tap_loop.c).
- ``net_tap``: vdev against a testpmd that forwards between a vhost port and a TAP.

From the guest, the load is a driver that sends as fast as it can. To the guest, the TAP's queue is filled while the
back-end stands still; then it has to drain it. The rate is that of a processor that is the back-end's alone: frames
a second of processor time.
"""

import contextlib
import time
from collections.abc import Callable, Iterator

from benchmarks.figures import Figure
from benchmarks.lan import QUEUE, Driver, TapLoop, add_tap, namespace
from benchmarks.parts import RING_SIZE, NetVhost, Run, Vdev, front_end, processors, spinning
from benchmarks.quiet import Watch, thread_ids
from benchmarks.results import Outcome
from benchmarks.rounds import Sample, Side, go_on, interleave, stand_still

from vdev.testing.netns import Namespace
from vdev.testing.testpmd import Forwarder, Rings

SECONDS = 0.2
SEGMENT = 1460
LONG = 54 + 44 * SEGMENT  # the longest TCP segment to be cut up, as a kernel makes them: 64 KB
LONG_RING = 2048  # with a buffer of that length a slot: 128 MiB
FED = {64: QUEUE, 1514: QUEUE, LONG: 512}
TARGETS = {64: 0.9, 1514: 0.9, LONG: 0.95}
# virtio_net_hdr and the head of a frame: TCP over IPv4 from 198.18.0.1 to .2, to be cut up (virtio 1.2, 5.1.6).
LONG_HEADER = (bytes([1, 1, 54, 0]) + SEGMENT.to_bytes(2, "little") + bytes([34, 0, 16, 0, 0, 0])).hex()


def long_prefix() -> str:
    """The headers before 64 KB of TCP, in hexadecimal."""
    ip = bytearray.fromhex("4500 0000 0000 4000 4006 0000 c6120001 c6120002")
    ip[2:4] = (LONG - 14).to_bytes(2, "big")
    total = sum(int.from_bytes(ip[at:at + 2], "big") for at in range(0, 20, 2))
    ip[10:12] = (~((total & 0xffff) + (total >> 16)) & 0xffff).to_bytes(2, "big")
    return ("020000000009 020000000001 0800".replace(" ", "") + ip.hex() + bytes(12).hex() + "5000" + bytes(6).hex())


def subject(size: int, way: str) -> str:
    """As people say it."""
    return f"{'64 KB' if size == LONG else f'{size} B'}, {way}"


class FromGuest(Side):
    """A back-end whose driver sends without pause."""

    def __init__(self, backend: Vdev | NetVhost, load: Forwarder | Driver) -> None:
        self.name, self.pids = backend.name, (backend.pid, load.child.pid)
        self._backend, self._load = backend, load

    def sample(self, seconds: float) -> tuple[Sample, float]:
        before, sent = self._backend.account(), self._load.counters().sent
        watch = Watch(thread for pid in self.pids for thread in thread_ids(pid))
        time.sleep(seconds)
        disturbance = watch.disturbance()
        after, sent = self._backend.account(), self._load.counters().sent - sent
        frames = sent if after.frames is None else after.frames - before.frames
        return {"rate": frames / (after.busy - before.busy)}, disturbance


class ToGuest(Side):
    """A back-end whose driver takes what comes, and the program that fills its TAP."""

    def __init__(self, backend: Vdev | NetVhost, load: Forwarder | Driver, feed: TapLoop, number: int) -> None:
        self.name, self.pids = backend.name, (load.child.pid, backend.pid)
        self._backend, self._load, self._feed, self._number = backend, load, feed, number

    def sample(self, seconds: float) -> tuple[Sample, float]:
        stand_still(self._backend.pid)
        began = self._load.counters().received
        fed, _ = self._feed.moved(self._number)
        # Between the two, vdev may do nothing; a testpmd can only be asked while it runs, and tells both at once.
        before = self._backend.account() if isinstance(self._backend, Vdev) else None
        watch = Watch(thread_ids(self._backend.pid))
        go_on(self._backend.pid)
        before = before or self._backend.account()
        received = settled(lambda: self._load.counters().received, began + fed)
        disturbance = watch.disturbance()
        after = self._backend.account()
        frames = received - began if after.frames is None else after.frames - before.frames
        # The queue was still full, it was done before it was asked, or never got a processor.
        if frames < self._number // 4:
            return {"rate": 0.0}, 1.0
        return {"rate": frames / (after.busy - before.busy)}, disturbance


def settled(count: Callable[[], int], most: int, patience: float = 0.1) -> int:
    """Wait until a count is ``most``, or has not grown for ``patience`` seconds -> it."""
    last, since = count(), time.monotonic()
    while last < most and time.monotonic() < since + patience:
        time.sleep(0.005)
        now = count()
        if now != last:
            last, since = now, time.monotonic()
    return last


class Ceiling(Side):
    """tap_loop alone, beside a processor that is as busy as a driver would keep it."""

    name = "loop"

    def __init__(self, loop: TapLoop, spinner: int, feed: TapLoop | None, number: int) -> None:
        self.pids = (loop.pid, spinner)
        self._loop, self._feed, self._number = loop, feed, number

    def sample(self, seconds: float) -> tuple[Sample, float]:
        if self._feed:
            self._feed.moved(self._number)
        watch = Watch([self._loop.pid])
        frames, busy = self._loop.moved("0" if self._feed else round(seconds * 1000))
        return {"rate": frames / busy}, watch.disturbance()


@contextlib.contextmanager
def driver(run: Run, path: str, size: int, to_guest: bool) -> Iterator[Forwarder | Driver]:
    """The guest's driver: DPDK's, and for frames that it does not make, ours. Running."""
    if size == LONG:
        common = {"frame_bytes": LONG, "busy_poll": True, "full": False, "stall_ms": 0}
        way = {"receive": common} if to_guest else {"transmit": {**common, "header": LONG_HEADER,
                                                                 "prefix": long_prefix()}}
        with Driver(run, path, LONG_RING, 192, **way) as load:
            yield load
        return
    mode = ["rxonly"] if to_guest else ["txonly"]
    # Without a cache a pool gives its buffers out in turn: the 128 MiB that the ceiling has.
    options = ["--mbcache=0", *([] if to_guest else [f"--txpkts={size}"])]
    with front_end(run, [path], mode[0], Rings(size=RING_SIZE), options) as load:
        load.start()
        yield load


@contextlib.contextmanager
def vdev_side(run: Run, lan: Namespace, tap: str, size: int, to_guest: bool) -> Iterator[Side]:
    """vdev on that TAP."""
    path = run.socket()
    add_tap(lan, tap)
    with contextlib.ExitStack() as stack:
        backend = stack.enter_context(Vdev(run, ["--socket-path", path, "--port", f"tap:{tap}"], lan))
        load = stack.enter_context(driver(run, path, size, to_guest))
        if not to_guest:
            yield FromGuest(backend, load)
            return
        yield ToGuest(backend, load, stack.enter_context(TapLoop(run, lan, "feed", tap, size)), FED[size])


@contextlib.contextmanager
def ceiling_side(run: Run, lan: Namespace, tap: str, size: int, to_guest: bool) -> Iterator[Side]:
    """The loop on a TAP of the same kind."""
    add_tap(lan, tap)
    with contextlib.ExitStack() as stack:
        loop = stack.enter_context(TapLoop(run, lan, "read" if to_guest else "write", tap, size))
        feed = stack.enter_context(TapLoop(run, lan, "feed", tap, size)) if to_guest else None
        yield Ceiling(loop, stack.enter_context(spinning(processors()[1])), feed, FED[size])


@contextlib.contextmanager
def net_tap_side(run: Run, lan: Namespace, tap: str, size: int, to_guest: bool) -> Iterator[Side]:
    """DPDK's testpmd between a vhost port and a TAP that it makes itself."""
    path = run.socket()
    with contextlib.ExitStack() as stack:
        backend = stack.enter_context(NetVhost(run, [path], "io", [f"net_tap0,iface={tap}"], lan))
        lan.run(["ip", "link", "set", tap, "txqueuelen", str(QUEUE), "up"])
        load = stack.enter_context(driver(run, path, size, to_guest))
        if not to_guest:
            yield FromGuest(backend, load)
            return
        yield ToGuest(backend, load, stack.enter_context(TapLoop(run, lan, "feed", tap, size)), FED[size])


def compared(run: Run, peer_side: Callable, sizes: tuple[int, ...], targets: dict[int, float],
             rounds: int) -> Iterator[Figure]:
    """A figure for each size and direction."""
    with namespace() as lan:
        for number, (size, to_guest) in enumerate((size, way) for size in sizes for way in (False, True)):
            with contextlib.ExitStack() as stack:
                sides = [stack.enter_context(make(run, lan, f"{name}{number}", size, to_guest))
                         for make, name in ((vdev_side, "vdev"), (peer_side, "peer"))]
                samples = interleave(sides, rounds, SECONDS)
                yield samples.figure(subject(size, "to the guest" if to_guest else "from the guest"), "rate",
                                     "Mframes/busy s", sides[1].name, 1e-6, more_is_better=True,
                                     target=targets.get(size))


def tap_ceiling(run: Run) -> Outcome:
    """A TAP, both ways, 64 B to 64 KB, against a loop of writev or readv."""
    sizes = (64, 1514) if run.quick else (64, 1514, LONG)
    return Outcome("tap-ceiling", "a writev or readv loop on such a TAP",
                   tuple(compared(run, ceiling_side, sizes, TARGETS, run.count(11, 5))))


def net_tap(run: Run) -> Outcome:
    """A TAP, both ways, against testpmd between net_vhost and net_tap."""
    sizes = (64,) if run.quick else (64, 1514)
    return Outcome("net_tap", "testpmd io between net_vhost and net_tap",
                   tuple(compared(run, net_tap_side, sizes, dict.fromkeys(sizes, 1.0), run.count(9, 5))))
