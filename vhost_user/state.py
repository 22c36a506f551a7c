"""What a session has agreed on, and the tables that say how each message may change it.

Theory of operation ("Ring states"). A ring has two independent facts. Whether it *runs* is moved by
SET_VRING_KICK (or VRING_KICK) and GET_VRING_BASE; whether it is *enabled* is moved by SET_VRING_ENABLE. The
two tables RUN and FLOW are all there is to know: ``RUN[now][event]`` is what comes next, and an event without
an entry is illegal now. Everything here is immutable: an effect (:mod:`vhost_user.effects`) takes a state and gives
the next one, so a request that is refused half way cannot leave half a change behind, and what a request
*would* do can be asked.
"""

from dataclasses import dataclass, replace
from enum import Enum, auto

from .spec import QUEUE_SIZE_MAX, VRING_LOG_FLAG, ProtocolFeature, Status, VirtioBit
from .wire import Log, Region, VringAddr


class Run(Enum):
    """Is the ring processed at all?"""

    STOPPED = auto()
    STARTED = auto()
    # Stopped by GET_VRING_BASE and nothing else since: QEMU's monitor (`info virtio-queue-status`) does that
    # to one ring of a running device and never starts it again.
    PARKED = auto()


class Flow(Enum):
    """Does a started ring carry data, or is it only drained?"""

    DISABLED = auto()
    ENABLED = auto()


class Event(Enum):
    """What can happen to a ring."""

    NUM = auto()
    ADDR = auto()
    BASE = auto()
    KICK = auto()
    CALL = auto()
    ERR = auto()
    ENABLE = auto()
    DISABLE = auto()
    GET_BASE = auto()
    PLAIN_FEATURES = auto()  # SET_FEATURES without bit 30
    STATUS_ZERO = auto()
    RESET = auto()
    RESUME = auto()  # our own decision, see Session.resume


_ALWAYS = {Event.STATUS_ZERO: Run.STOPPED, Event.RESET: Run.STOPPED}
_CONFIGURE = dict.fromkeys((Event.NUM, Event.ADDR, Event.BASE), Run.STOPPED)


def _keep(run: Run) -> dict[Event, Run]:
    """The events that never start or stop a ring."""
    return dict.fromkeys((Event.CALL, Event.ERR, Event.ENABLE, Event.DISABLE, Event.PLAIN_FEATURES), run)


# What a ring's configuration is made of is frozen while it runs: NUM and BASE have no entry in STARTED.
# ADDR has one because the dirty log is switched that way; it must then name the same addresses.
RUN: dict[Run, dict[Event, Run]] = {
    Run.STOPPED: _ALWAYS | _keep(Run.STOPPED) | _CONFIGURE | {
        Event.KICK: Run.STARTED, Event.GET_BASE: Run.STOPPED},
    Run.STARTED: _ALWAYS | _keep(Run.STARTED) | {
        Event.KICK: Run.STARTED, Event.GET_BASE: Run.PARKED, Event.ADDR: Run.STARTED},
    Run.PARKED: _ALWAYS | _keep(Run.PARKED) | _CONFIGURE | {
        Event.KICK: Run.STARTED, Event.GET_BASE: Run.PARKED, Event.RESUME: Run.STARTED},
}

# Enabling is legal at any time, and remembered. An event without an entry leaves the fact as it is.
FLOW: dict[Event, Flow] = {
    Event.ENABLE: Flow.ENABLED,
    Event.DISABLE: Flow.DISABLED,
    Event.PLAIN_FEATURES: Flow.ENABLED,
    Event.RESET: Flow.DISABLED,
}


class Postcopy(Enum):
    """How far a guest has come that arrives by postcopy ("VHOST_USER_POSTCOPY_ADVISE" and what follows)."""

    OFF = auto()
    ADVISED = auto()  # it may come
    LISTENING = auto()  # it runs, and some of its memory is still elsewhere
    TELLING = auto()  # the same, and the front-end has not said yet that it knows where we have its memory


class Notifier(Enum):
    """What is known about one of a ring's eventfds."""

    UNSET = auto()  # no message yet; with INBAND_NOTIFICATIONS there are messages in its place
    FD = auto()
    POLL = auto()  # the front-end said that there is none


@dataclass(frozen=True)
class RingState:
    """One ring. ``num`` 0 and ``addr`` None mean: not told yet. ``base`` is the index to start from: the
    last one of SET_VRING_BASE or answered to GET_VRING_BASE."""

    run: Run = Run.STOPPED
    flow: Flow = Flow.DISABLED
    num: int = 0
    addr: VringAddr | None = None
    base: int = 0
    kick: Notifier = Notifier.UNSET
    call: Notifier = Notifier.UNSET
    err: Notifier = Notifier.UNSET

    @property
    def started(self) -> bool:
        """The ring is to be processed."""
        return self.run is Run.STARTED

    @property
    def enabled(self) -> bool:
        """The ring carries data; a started ring that does not is drained."""
        return self.flow is Flow.ENABLED

    def permits(self, event: Event) -> bool:
        """``event`` is legal in the present state."""
        return event in RUN[self.run]

    def after(self, event: Event) -> "RingState":
        """The ring after ``event``, its configuration unchanged. Raises KeyError where it is illegal."""
        return replace(self, run=RUN[self.run][event], flow=FLOW.get(event, self.flow))


@dataclass(frozen=True)
class Offer:
    """What a back-end offers to every front-end that connects.

    features           virtio feature bits, bit 30 (protocol features) among them where wanted; VERSION_1 is
                       a must, legacy drivers are not served
    protocol_features  mask over ProtocolFeature
    rings              how many rings there are; an index at or above is refused
    queue_num          what GET_QUEUE_NUM answers. Front-ends disagree on the unit: QEMU's net device means
                       queue pairs
    max_mem_slots      how many regions guest memory may have with CONFIGURE_MEM_SLOTS
    max_queue_size     largest queue size accepted
    """

    features: int
    protocol_features: int
    rings: int
    queue_num: int
    max_mem_slots: int = 32
    max_queue_size: int = QUEUE_SIZE_MAX

    def keeps(self, earlier: "Offer") -> bool:
        """Whoever was told ``earlier`` may go on in the belief that it holds."""
        return (not earlier.features & ~self.features and not earlier.protocol_features & ~self.protocol_features
                and (self.rings, self.queue_num) == (earlier.rings, earlier.queue_num)
                and self.max_mem_slots >= earlier.max_mem_slots and self.max_queue_size >= earlier.max_queue_size)

    def __post_init__(self) -> None:
        if not self.features >> VirtioBit.VERSION_1 & 1:
            raise ValueError("an offer without VERSION_1 would promise a legacy device")
        if not 1 <= self.max_queue_size <= QUEUE_SIZE_MAX:
            raise ValueError(f"max_queue_size {self.max_queue_size} is not between 1 and {QUEUE_SIZE_MAX}")


@dataclass(frozen=True)
class State:
    """Everything negotiated in one session.

    ``features`` is 0 until SET_FEATURES. ``regions`` holds a region as many times as it was added: QEMU
    before 8.0 adds all of guest memory once for each queue pair. It is gone when its last entry is.
    """

    rings: tuple[RingState, ...]
    features: int = 0
    protocol_features: int = 0
    status: int = 0
    mtu: int | None = None
    regions: tuple[Region, ...] = ()
    log: Log | None = None
    postcopy: Postcopy = Postcopy.OFF

    def has(self, feature: ProtocolFeature) -> bool:
        """``feature`` was negotiated with SET_PROTOCOL_FEATURES."""
        return bool(self.protocol_features >> feature & 1)

    def has_virtio(self, bit: int) -> bool:
        """Virtio feature ``bit`` (a number) was negotiated with SET_FEATURES."""
        return bool(self.features >> bit & 1)

    @property
    def running(self) -> bool:
        """At least one ring is started."""
        return any(ring.started for ring in self.rings)

    @property
    def listening(self) -> bool:
        """Pages of guest memory may be missing (POSTCOPY_LISTEN to POSTCOPY_END)."""
        return self.postcopy in (Postcopy.LISTENING, Postcopy.TELLING)

    @property
    def driver_ok(self) -> bool:
        """The driver is done with its setup; always true where STATUS was not negotiated, as nobody tells
        then. Before that no buffer may be consumed, even from a ring that is started (virtio 1.x, "Device
        Status Field")."""
        return not self.has(ProtocolFeature.STATUS) or bool(self.status & Status.DRIVER_OK)

    @property
    def logs_buffers(self) -> bool:
        """What the device writes to buffers has to be marked in the log (VHOST_F_LOG_ALL, "Migration")."""
        return self.has_virtio(VirtioBit.LOG_ALL)

    def logs_ring(self, index: int) -> bool:
        """What the device writes to ring ``index`` itself has to be marked (VHOST_VRING_F_LOG, "Migration")."""
        addr = self.rings[index].addr
        return addr is not None and bool(addr.flags & VRING_LOG_FLAG)

    def runnable(self, index: int) -> bool:
        """Ring ``index`` may be processed: it is started, the driver is ready, and if its writes have to be marked,
        there is a log. QEMU shares the log after it has started the rings when a guest reboots while it migrates;
        what was written until then would be lost. So would be what is written to a missing page before the front-end
        can tell where the fault was.
        """
        return (self.rings[index].started and self.driver_ok and self.postcopy is not Postcopy.TELLING
                and (self.log is not None or not (self.logs_buffers or self.logs_ring(index))))

    def resumable(self, index: int) -> bool:
        """Ring ``index`` was stopped behind a running driver's back.

        QEMU's monitor command `info virtio-queue-status` sends GET_VRING_BASE to one ring of a running device
        and never starts it again. What tells it from a real stop: the status byte still says DRIVER_OK,
        another ring is started, nothing else was said about this ring since, and the driver could not have
        reset it (RING_RESET).
        """
        return (self.rings[index].permits(Event.RESUME) and self.running
                and self.has(ProtocolFeature.STATUS) and self.driver_ok
                and not self.has_virtio(VirtioBit.RING_RESET))

    def with_ring(self, index: int, ring: RingState) -> "State":
        """This state with ring ``index`` replaced."""
        return replace(self, rings=(*self.rings[:index], ring, *self.rings[index + 1:]))

    def all_rings(self, event: Event) -> "State":
        """This state after ``event`` came to every ring."""
        return replace(self, rings=tuple(ring.after(event) for ring in self.rings))
