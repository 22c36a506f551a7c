"""The worker threads of a daemon: how many there are, where each runs, and which lanes it serves.

Theory of operation
-------------------
What is shared costs isolation: a worker that gets stuck - in a port, in memory that does not come - holds up all that
it serves. So by default a device has a worker of its own. Its queue pairs may have one each (``pair``), or even their
two directions (``direction``), where one processor is not enough for a guest; and where there are more guests than
processors, N workers may serve all devices of the daemon.

A worker belongs to nobody: engines join it and leave it, and its thread lives as long as any has joined. One that does
not let go of a lane in time is given up. All who joined it then find their lanes lost, as nobody can say what it will
touch when it goes on; the next lane gets a new thread in the same place.

Imports no C code by itself, so that a wrong command line is told soon.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

from vdev.config import SPREADS, DaemonConfig
from vdev.errors import Failure
from vdev.ports.base import Needs

if TYPE_CHECKING:
    from ring.pump import Lane, Pump

DESCRIPTORS = 2  # that a worker has
PATIENCE = 0.1  # seconds: a worker lets go after a burst
ATTACH_PATIENCE = 1.0  # and it takes a lane after one; where it does not, a session has to end that did nothing

# What a thread does that is given a place, beside what all do (ring/pump.py).
SYSCALLS = {"sched_setaffinity[0] == 0": "a worker goes to its processor; no thread moves another"}

_given_up: list[object] = []


def leave_to_worker(*things: object) -> None:
    """Keep what cannot be freed because a worker is stuck in it, so that it stays mapped for good."""
    _given_up.extend(things)


class WorkerLost(Exception):
    """A worker did not let go of a lane, and was given up; or somebody else who joined it had to do that."""


class Worker:
    """One thread. cpu, poll_us: as for ring.pump.Pump."""

    def __init__(self, cpu: int | None = None, poll_us: int | None = 0) -> None:
        self._cpu = cpu
        self._poll_us = poll_us
        self._pump: Pump | None = None
        self._joined: list[Callable[[], None]] = []

    def join(self, on_lost: Callable[[], None]) -> None:
        """Be served by it. ``on_lost`` is called when it was given up while a lane may have been attached."""
        self._joined.append(on_lost)

    def leave(self, on_lost: Callable[[], None]) -> None:
        """Be served no more; no lane may be attached."""
        self._joined.remove(on_lost)
        if not self._joined and self._pump is not None:
            self._pump.close()
            self._pump = None

    def start(self) -> None:
        """Start the thread now rather than with the first lane. Raises OSError, RingError: see ring.pump.Pump."""
        from ring.pump import Pump

        if self._pump is None:
            self._pump = Pump(self._cpu, self._poll_us)

    def attach(self, lane: "Lane", patience: float = ATTACH_PATIENCE) -> "Pump":
        """Lend it ``lane`` -> who has it now. Raises what :meth:`start` raises, and WorkerLost: the lane, and what it
        leads to, are the worker's for good then."""
        from ring.errors import QueueBusy

        self.start()
        try:
            self._pump.attach(lane, int(1000 * patience))
        except QueueBusy:
            leave_to_worker(lane)
            self._give_up()
            raise WorkerLost(f"it did not take a queue within {patience:g} s") from None
        return self._pump

    def detach(self, lane: "Lane", pump: "Pump", patience: float = PATIENCE) -> None:
        """Take ``lane`` back from ``pump``, which :meth:`attach` answered. Raises WorkerLost; the lane, and what it
        leads to, are the worker's for good then."""
        from ring.errors import QueueBusy

        if pump is not self._pump:
            raise WorkerLost("it serves other devices, too (--workers), and is stuck in one of them")
        try:
            pump.detach(lane, int(1000 * patience))
        except QueueBusy as busy:
            self._give_up()
            raise WorkerLost(str(busy)) from None

    def _give_up(self) -> None:
        pump, self._pump = self._pump, None
        pump.give_up()
        for on_lost in list(self._joined):
            on_lost()


class Workers:
    """The workers of a daemon. spread: one of SPREADS, or how many serve all devices together. cpus: where they run,
    one after the other; empty: anywhere. poll_us: see Worker."""

    def __init__(self, spread: str | int = SPREADS[0], cpus: Sequence[int] = (), poll_us: int | None = 0) -> None:
        self._spread = spread
        self._cpus = tuple(cpus)
        self._places = cycle(self._cpus or (None,))
        self._poll_us = poll_us
        self._shared = cycle([self.new() for _ in range(spread)]) if isinstance(spread, int) else None

    @classmethod
    def of(cls, config: DaemonConfig) -> "Workers":
        """Those that ``config`` asks for."""
        return cls(config.workers, config.cpus, config.poll_us)

    @property
    def shared(self) -> bool:
        """A worker may serve several devices."""
        return self._shared is not None

    @property
    def splits(self) -> bool:
        """The directions of a queue pair have lanes, and workers, of their own."""
        return self._spread == "direction"

    @property
    def needs(self) -> Needs:
        """What they need in the sandbox beside what every worker does."""
        return Needs(syscalls=SYSCALLS if self._cpus else {})

    def descriptors(self, queue_pairs: int) -> int:
        """How many descriptors they have, for devices with so many queue pairs together, beside one worker for each
        device."""
        each = {"device": 0, "pair": queue_pairs, "direction": 2 * queue_pairs}
        return DESCRIPTORS * (self._spread if isinstance(self._spread, int) else each[self._spread])

    def new(self) -> Worker:
        """Another worker, which serves whoever joins it."""
        return Worker(next(self._places), self._poll_us)

    @staticmethod
    def lane(report: int) -> "Lane":
        """A lane that they can serve; see ring.pump.Lane."""
        from ring.pump import Lane

        return Lane(report)

    def of_device(self, lanes: int) -> list[Worker]:
        """Who serves the lanes of one more device, in order; a queue pair is one lane, or two where :attr:`splits`."""
        if self._shared is not None:
            return [next(self._shared) for _ in range(lanes)]
        if self._spread == SPREADS[0]:
            return [self.new()] * lanes
        return [self.new() for _ in range(lanes)]


def check_cpus(cpus: Iterable[int]) -> None:
    """Raise Failure if this process may not run on one of ``cpus``. To be asked before the sandbox is closed."""
    allowed = os.sched_getaffinity(0)
    try:
        for cpu in cpus:
            try:
                os.sched_setaffinity(0, {cpu})  # more may be allowed than is set now, and nothing else tells
            except OSError:
                listed = ",".join(map(str, sorted(allowed)))
                raise Failure(f"--cpus: this process cannot run on processor {cpu}; there are or it may use {listed}"
                              ) from None
    finally:
        os.sched_setaffinity(0, allowed)
