"""A lane under watch, and who serves such lanes: the control thread, a few phases at a time.

Why the control thread: the step engine is Python, so a thread of its own would share one processor with the control
thread anyway, and here no request of the front-end can come between two phases unless it is meant to. A device that is
linted is slow, and nobody else is: other devices have workers of their own. They wait while it has its turn, at most
PHASES_A_TURN phases.
"""

import contextlib
import os
import select
import time

from ring.pump import LaneConfig
from vdev.lint.findings import Findings
from vdev.lint.watch import QueueWatch
from vdev.step import StepLane
from vdev.step_flow import Step

PHASES_A_TURN = 2000


class LintedLane(StepLane):
    """A StepLane whose steps are watched. report: an eventfd of the engine, see ring.pump.Lane."""

    def __init__(self, report: int, findings: Findings, pair: int) -> None:
        super().__init__()
        self.report = report
        self._findings = findings
        self._pair = pair
        self._watches: dict[str, QueueWatch] = {}
        self._kick_fds: dict[str, int] = {}

    def configure(self, config: LaneConfig) -> None:
        super().configure(config)
        for direction, flow in (("from_guest", config.from_guest), ("to_guest", config.to_guest)):
            watch = self._watches.get(direction)
            if flow.queue is None:
                self._watches.pop(direction, None)
            elif watch is None or watch.queue is not flow.queue:
                self._watches[direction] = QueueWatch(flow.queue, self._findings, direction, self._pair)
            self._kick_fds[direction] = flow.kick
            if direction in self._watches:
                self._watches[direction].mtu = config.mtu

    def step(self) -> Step | None:
        step = super().step()
        if step is not None and step.direction in self._watches:
            self._watches[step.direction].on(step)
        return step

    def on_time(self, now: float) -> None:
        """A while has passed, and all that could be done was done."""
        for direction, watch in self._watches.items():
            if self._kick_fds[direction] >= 0:
                watch.on_time(now)


class Turns:
    """Serves the lanes of one device, in place of its workers; see vdev.workers.Workers and Worker for the contract."""

    shared = splits = False

    def __init__(self, findings: Findings) -> None:
        self._findings = findings
        self._epoll = select.epoll()
        self._more = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)  # a lane has more to do than fits into a turn
        self._epoll.register(self._more, select.EPOLLIN)
        self._lanes: dict[LintedLane, int] = {}  # attached ones -> what is watched of each
        self._made = 0

    # ----------------------------------------------------------------------------- as the engine has it

    def of_device(self, lanes: int) -> list["Turns"]:
        """Who serves so many lanes."""
        return [self] * lanes

    def lane(self, report: int) -> LintedLane:
        """The lane of the next queue pair."""
        self._made += 1
        return LintedLane(report, self._findings, self._made - 1)

    def join(self, on_lost: object) -> None:
        """Nothing is ever lost here."""

    leave = join

    def start(self) -> None:
        """There is no thread."""

    def attach(self, lane: LintedLane, patience: float = 0) -> "Turns":
        """Serve ``lane`` from the next turn on."""
        lane.attach()
        self._lanes[lane] = lane.fileno()
        self._epoll.register(self._lanes[lane], select.EPOLLIN)
        self.owe()
        return self

    def detach(self, lane: LintedLane, pump: "Turns", patience: float = 0) -> None:
        """Give it back, at the end of the frame in hand."""
        self._epoll.unregister(self._lanes.pop(lane))
        lane.detach()
        self._report(lane)

    # -------------------------------------------------------------------------------- in the control loop

    def fileno(self) -> int:
        """Readable when :meth:`turn` has something to do."""
        return self._epoll.fileno()

    def owe(self) -> None:
        """Have another turn."""
        os.eventfd_write(self._more, 1)

    def turn(self) -> None:
        """Serve every lane for a while."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._more)
        for lane in list(self._lanes):
            if lane.run(PHASES_A_TURN) == PHASES_A_TURN:
                self.owe()
            self._report(lane)

    @staticmethod
    def _report(lane: LintedLane) -> None:
        if lane.has_events:
            os.eventfd_write(lane.report, 1)

    def on_time(self) -> None:
        """A while has passed; queues without a kick descriptor are looked at, too."""
        self.turn()
        now = time.monotonic()
        for lane in self._lanes:
            lane.on_time(now)

    def close(self) -> None:
        """No lane may be attached."""
        self._epoll.close()
        os.close(self._more)
