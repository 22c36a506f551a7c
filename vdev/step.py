"""The step engine: a lane served in Python, one visible phase at a time.

There are two engines. The pump (ring/plane/) is C, and what a daemon runs. This one does the same to ring, port and
counters - the same frames lost for the same reasons, the same used entries, the same wishes for kicks and calls -
but stops after each phase and says what it has just done. Both are made of the same micro-steps of the virtqueue
(ring/core/split.inl, ring/core/packed.inl) and the same checks of the net header (ring/plane/header.c), and
tests/test_vdev_step_agreement.py runs both beside each other. So what is shown here is what the product does.

    lane = StepLane()
    lane.configure(config)          # a ring.pump.LaneConfig, as for a pump
    lane.attach()
    for step in iter(lane.step, None):
        print(step)                 # kick seen, available index read, head taken, ...
    lane.detach()

The heart is a chain of generators: StepLane looks for work and lets each direction (vdev/step_from_guest.py,
vdev/step_to_guest.py) have a turn; a direction does one thing and yields what it was (vdev/step_flow.py). Between two
phases nobody waits and no lock is held, so a request of the front-end can come at any point: ``abandon`` brings the
frame in hand to its end, or gives its chains back if the port was not read yet, and publishes what is owed. A chain is
walked in one call then, as the pump does, so a long one does not keep the request waiting.

Waiting is the pump's: kicks are edge triggered and their eventfds never read, ports are level triggered and watched
only while that leads to anything. Nothing here blocks.
"""

import contextlib
import dataclasses
import select
from collections.abc import Iterator

from ring.build import lib
from ring.errors import QueueBusy
from ring.pump import FlowStats, LaneConfig, LaneEvent
from vdev.step_flow import NET_HEADER, Direction, Phase, Shared, Step, drain
from vdev.step_from_guest import FromGuest
from vdev.step_to_guest import ToGuest

PHASES_MAX = 1 << 20  # one run(); a guest that never stops must not hold its caller


class StepLane:
    """One queue pair at one queue of a port, served by whoever calls. Counters live as long as it does."""

    def __init__(self) -> None:
        self._shared = Shared()
        self._from_guest, self._to_guest = FromGuest(self._shared), ToGuest(self._shared)
        self._directions: tuple[Direction, Direction] = (self._from_guest, self._to_guest)
        self._epoll: select.epoll | None = None
        self._kicks: dict[int, Direction] = {}
        self._watched: dict[int, int] = {}  # port descriptor -> epoll events
        self._steps: Iterator[Step] | None = None

    # ------------------------------------------------------------------------------------- ownership

    def configure(self, config: LaneConfig) -> None:
        """Set what the lane does. Raises QueueBusy while it is attached."""
        if self._epoll is not None:
            raise QueueBusy("RING_E_BUSY", "the lane is attached; detach it first")
        before, shared = self._shared.config, self._shared
        for direction in self._directions:
            old, new = getattr(before, direction.name), getattr(config, direction.name)
            # A signal may have gone to the old descriptor in the meantime: the driver is called once more.
            direction.call_owed |= old.queue is not None and old.queue is new.queue and old.call != new.call
        shared.config = dataclasses.replace(
            config, from_guest=dataclasses.replace(config.from_guest), to_guest=dataclasses.replace(config.to_guest),
            max_frame=min(config.max_frame, lib.FRAME_ROOM - NET_HEADER))
        shared.port_gone = shared.memory_gone = False  # may be mended; if not, the first frame tells

    def attach(self) -> None:
        """Begin to serve; each queue is looked at once without a kick. Raises QueueBusy when already attached."""
        if self._epoll is not None:
            raise QueueBusy("RING_E_BUSY", "the lane is attached already")
        self._epoll = select.epoll()
        self._from_guest.blocked = self._to_guest.starved = False
        for direction in self._directions:
            direction.due = True
            self._watch_kick(direction)
            if direction.call_owed and direction.flow.queue is not None and direction.flow.call >= 0:
                direction.call()
            direction.call_owed = False
        self._watch_ports()

    def detach(self) -> None:
        """Let go of the queues, between any two phases; see abandon. Idempotent, and all there is to free."""
        self.abandon()
        if self._epoll is not None:
            self._epoll.close()
            self._epoll = None
        self._kicks.clear()
        self._watched.clear()

    close = detach

    def fileno(self) -> int:
        """Readable when there may be something to do, for whoever waits for several lanes; attached ones only."""
        return self._epoll.fileno()

    # -------------------------------------------------------------------------------------- stepping

    def step(self) -> Step | None:
        """Do the next phase -> what it was; None: there is nothing to do until a kick comes, or a frame."""
        if self._steps is None:
            self._steps = self._serve()
        step = next(self._steps, None)
        if step is None:
            self._steps = None
        return step

    def run(self, limit: int = PHASES_MAX) -> int:
        """Step until there is nothing to do, at most ``limit`` times -> how many phases that were."""
        done = 0
        while done < limit and self.step() is not None:
            done += 1
        return done

    def abandon(self) -> None:
        """Leave the ring as a pump leaves it between two frames: no chain popped, all that was used published. A frame
        that was read from the port and does not fit into the guest's buffers stays with this lane."""
        if self._steps is None:
            return
        self._shared.leaving = True
        try:
            self.run()
        finally:
            self._shared.leaving = False

    def _serve(self) -> Iterator[Step]:
        if self._epoll is None:
            return
        self._look_at_polled()
        while not self._shared.leaving:
            yield from self._look()
            if not any(direction.due for direction in self._directions):
                return
            for direction in self._directions:
                if direction.due and not self._shared.leaving:
                    yield from direction.serve()
            self._watch_ports()

    # --------------------------------------------------------------------------------------- waiting

    def _look(self) -> Iterator[Step]:
        """See which descriptors have something to say."""
        for fd, events in self._epoll.poll(0):
            if fd in self._kicks:
                yield self._kicked(self._kicks[fd])
            else:
                yield from self._port_ready(events)

    def _look_at_polled(self) -> None:
        """A started queue without a kick descriptor is looked at each time there was nothing else to do."""
        for direction, matters in ((self._from_guest, True), (self._to_guest, self._to_guest.starved)):
            if direction.flow.queue is not None and direction.flow.kick < 0:
                direction.due |= matters

    def _kicked(self, direction: Direction) -> Step:
        if self._shared.config.watch_kicks:
            self._shared.events |= LaneEvent.KICKED
        direction.counts.kicks += 1
        # buffers for the guest matter only when frames wait for them
        direction.due |= direction is self._from_guest or self._to_guest.starved
        return direction.step(Phase.KICK_SEEN)

    def _port_ready(self, events: int) -> Iterator[Step]:
        wrong = events & (select.EPOLLERR | select.EPOLLHUP)
        if wrong or events & select.EPOLLOUT:
            self._from_guest.blocked = False
            self._from_guest.due = True
        if wrong or events & select.EPOLLIN:
            self._to_guest.due = True
        # Unless reading or writing finds out what it is, because the guest lets us do neither.
        if wrong and not events & select.EPOLLIN and not self._shared.port_gone:
            yield self._to_guest.port_lost()

    def _watch_kick(self, direction: Direction) -> None:
        kick = direction.flow.kick
        if kick >= 0:
            drain(kick)
            with contextlib.suppress(OSError):  # one descriptor for both queues: the first one gets it
                self._epoll.register(kick, select.EPOLLIN | select.EPOLLET)
                self._kicks[kick] = direction

    def _watch_ports(self) -> None:
        """What the port is waited on for, derived from the lane's state."""
        config, alive = self._shared.config, not self._shared.port_gone
        wants_in = alive and not self._to_guest.starved and self._to_guest.serves()
        wants_out = alive and self._from_guest.blocked
        wanted = dict.fromkeys((config.from_port, config.to_port), 0)
        wanted[config.from_port] |= select.EPOLLIN if wants_in else 0
        wanted[config.to_port] |= select.EPOLLOUT if wants_out else 0
        for fd, events in wanted.items():
            before = self._watched.get(fd, 0)
            if fd < 0 or events == before:
                continue
            with contextlib.suppress(OSError):
                if not events:
                    self._epoll.unregister(fd)
                elif before:
                    self._epoll.modify(fd, events)
                else:
                    self._epoll.register(fd, events)
                before = events
            self._watched[fd] = before

    # ----------------------------------------------------------------------------------- what it says

    def stats(self) -> tuple[FlowStats, FlowStats]:
        """(from_guest, to_guest)."""
        return self._from_guest.counts.stats(), self._to_guest.counts.stats()

    @property
    def has_events(self) -> bool:
        """Has :meth:`events` something to tell?"""
        return bool(self._shared.events)

    @property
    def held(self) -> bytes:
        """As ring.pump.Lane.held: the frame that waits for buffers of the guest, behind its net header."""
        return self._to_guest.held

    def guest_mac(self) -> bytes | None:
        """As ring.pump.Lane.guest_mac; addresses are not learnt here."""
        return None

    def events(self) -> LaneEvent:
        """What happened since the last call."""
        events, self._shared.events = self._shared.events, LaneEvent(0)
        return events
