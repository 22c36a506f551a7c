"""Where a check works: the back-end under test, and sessions with it.

A :class:`Session` is a fresh connection brought to a stage by a front-end that behaves, together with the memory and
the queues of a guest. Without more ado it negotiates little, so that a check asks for what it is about and nothing else
can be to blame.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import TypeVar

from ring.driver import DriverQueue, GuestMemory
from vdev.conformance import frames
from vdev.conformance.trace import TracedFrontEnd
from vdev.conformance.verdict import Broken, NotOffered, NotReachable, expect
from vdev.conformance.wire import Wire
from vdev.net.features import Feature, mask, names
from vdev.testing.netdriver import NetDriver, NetHeader, Received
from vdev.testing.scripted import ring_setup, shared_regions
from vhost_user.errors import PeerError, Refused
from vhost_user.frontend import NoAnswer, RequestRefused
from vhost_user.spec import ProtocolFeature, Status, bit_names
from vhost_user.spec import mask as protocol_mask

Found = TypeVar("Found")

BASIC = mask(Feature.VERSION_1, Feature.MRG_RXBUF)
PROTOCOL = protocol_mask(ProtocolFeature.MQ, ProtocolFeature.REPLY_ACK)
NO_OFFLOAD = NetHeader()
STARTED_STATUS = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK


class Stage(IntEnum):
    """How far a session has come."""

    CONNECTED = 0
    NEGOTIATED = 1
    SHARED = 2  # guest memory
    PLACED = 3  # the back-end knows where the rings are, and has the call descriptors
    STARTED = 4  # and the kick descriptors; with STATUS, DRIVER_OK
    RUNNING = 5  # enabled, with receive buffers


class Bench:
    """The back-end that listens on ``path``, seen by ``wire`` from its other side (None: not at all).

    seconds: how long an answer may take. quiet: how long nothing has to happen until it counts as not happening.
    :meth:`look` has to come first.
    """

    def __init__(self, path: str, wire: Wire | None = None, *, seconds: float = 3.0, quiet: float = 0.06) -> None:
        self.path = path
        self.wire = wire
        self.seconds = seconds
        self.quiet = quiet
        self.packed = False  # what sessions have that do not say
        self.offered = 0  # virtio features
        self.protocol = 0  # protocol features
        self.queue_pairs = 1
        self.trace: list[str] = []
        self._sessions: list[Session] = []
        self._kept: dict[object, object] = {}

    # ---------------------------------------------------------------------------------------- what is there

    def look(self) -> None:
        """See what is offered. What goes wrong behind the first answer is for the checks to tell. Raises Broken."""
        with self.connect() as front_end:
            self.offered = front_end.get_features()
            with contextlib.suppress(PeerError, NoAnswer, RequestRefused, Refused, OSError):
                if self.offers(Feature.PROTOCOL_FEATURES):
                    self.protocol = front_end.get_protocol_features()
                    front_end.ack = False
                    front_end.set_protocol_features(self.protocol & PROTOCOL)
                    if front_end.has(ProtocolFeature.MQ) and self.offers(Feature.MQ):
                        self.queue_pairs = max(1, front_end.get_queue_num())

    def offers(self, *features: Feature) -> bool:
        """All of these virtio features are."""
        return self.offered & mask(*features) == mask(*features)

    def needs(self, *features: Feature | ProtocolFeature) -> None:
        """Raises NotOffered unless all of these are offered."""
        for feature in features:
            offered = self.protocol if isinstance(feature, ProtocolFeature) else self.offered
            if not offered >> feature & 1:
                raise NotOffered(feature.name)

    def lacks(self, *features: Feature, or_else: str = "") -> None:
        """Raises NotReachable if one of these virtio features is offered."""
        for feature in features:
            if self.offers(feature):
                raise NotReachable(or_else or f"{feature.name} is offered")

    def needs_wire(self) -> Wire:
        """Raises NotReachable without one."""
        if self.wire is None:
            raise NotReachable("needs a view of the back-end's other side (--wire)")
        return self.wire

    def once(self, what: Callable[..., Found], *arguments: object) -> Found:
        """``what(self, *arguments)``, for the sake of time done once for several checks on the same ring format."""
        key = (what, self.packed, *arguments)
        if key not in self._kept:
            self._kept[key] = what(self, *arguments)
        return self._kept[key]

    # -------------------------------------------------------------------------------------------- sessions

    def connect(self, owner_first: bool = False) -> TracedFrontEnd:
        """A connection that has been answered once; ``owner_first``, its first message is SET_OWNER, else it is
        GET_FEATURES. The session before it may still be on its way out."""
        deadline = time.monotonic() + 2 * self.seconds
        while True:
            try:
                front_end = TracedFrontEnd.connect(self.path, timeout=self.seconds)
                try:
                    if owner_first:
                        front_end.set_owner()
                    front_end.get_features()
                except BaseException:
                    front_end.close()
                    raise
                return front_end
            except (OSError, PeerError, NoAnswer) as why:
                if time.monotonic() > deadline:
                    raise Broken(f"a new connection is not served: {why}") from None
                time.sleep(0.02)

    def session(self, stage: Stage = Stage.RUNNING, **options) -> "Session":
        """A session at ``stage``; ``options`` as for Session. Raises NotOffered."""
        if self.wire is not None:
            self.wire.forget()
        session = Session(self, **options)
        self._sessions.append(session)
        try:
            session.reach(stage)
        except BaseException:
            session.close()
            raise
        session.front_end.trace.clear()
        session.note(f"a session, {stage.name.lower()}: {' '.join(names(session.features))}; "
                     f"{bit_names(session.front_end.protocol_features, ProtocolFeature) or 'no protocol features'}")
        return session

    def begin(self, packed: bool) -> None:
        """A check begins; its sessions are on ``packed`` or split rings."""
        self.packed = packed
        self._sessions.clear()

    def end(self) -> list[str]:
        """The check has ended: nothing of it stays open. -> what its last session did and saw."""
        for session in self._sessions:
            session.close()
        return list(self._sessions[-1].front_end.trace) if self._sessions else []


class Session:
    """One connection and a guest behind it; a context manager.

    features, protocol: what is set of what is offered. needs: features of either kind that have to be offered
    (NotOffered otherwise); they are set too. without: virtio features that are not set in any case. packed: the ring
    format; None: as the bench has it. pairs, size, base, memory: as for NetDriver. bit_30: set it, so that rings are
    enabled one by one. buffer_size: of one receive buffer.
    """

    def __init__(self, bench: Bench, *, features: int = BASIC, protocol: int = PROTOCOL,
                 needs: Sequence[Feature | ProtocolFeature] = (), without: int = 0, packed: bool | None = None,
                 pairs: int = 1, size: int = 64, base: int | None = None, memory: GuestMemory | None = None,
                 bit_30: bool = True, buffer_size: int | None = None) -> None:
        bench.needs(*needs)
        for feature in needs:
            if isinstance(feature, ProtocolFeature):
                protocol |= protocol_mask(feature)
            else:
                features |= mask(feature)
        packed = bench.packed if packed is None else packed
        if packed:
            bench.needs(Feature.RING_PACKED)
            features |= mask(Feature.RING_PACKED)
        if pairs > 1:
            if bench.queue_pairs < pairs:
                raise NotReachable(f"needs {pairs} queue pairs, and there is {bench.queue_pairs}")
            features |= mask(Feature.MQ)
        if bench.wire is not None and bench.wire.pairs_at_least > pairs:
            pairs = bench.wire.pairs_at_least
        self.bench = bench
        self.features = features & bench.offered & ~without
        self.protocol = protocol & bench.protocol
        self.bit_30 = bit_30
        self.memory = memory or GuestMemory(8 << 20)
        self._make = lambda: [NetDriver(self.memory, size=size, features=self.features, base=base,
                                        buffer_size=buffer_size, lenient=True) for _ in range(pairs)]
        self.drivers = self._make()
        self.stage = Stage.CONNECTED
        self._linked = False
        self.front_end: TracedFrontEnd = bench.connect()

    # ----------------------------------------------------------------------------------------------- stages

    def reach(self, stage: Stage) -> None:
        """Go on to ``stage``, in the usual order."""
        steps = {Stage.NEGOTIATED: self.negotiate, Stage.SHARED: self.share, Stage.PLACED: self.place_all,
                 Stage.STARTED: self.start_all, Stage.RUNNING: self.run_all}
        for step, go in steps.items():
            if self.stage < step <= stage:
                go()
                self.stage = step

    def negotiate(self) -> None:
        """Agree on features."""
        front_end = self.front_end
        if self.bench.offers(Feature.PROTOCOL_FEATURES):
            front_end.set_protocol_features(self.protocol)
        front_end.set_owner()
        if front_end.has(ProtocolFeature.BACKEND_REQ):
            front_end.set_backend_req_fd()
        bit_30 = mask(Feature.PROTOCOL_FEATURES) if self.bit_30 else 0
        front_end.set_features(self.features | bit_30 & self.bench.offered)
        self.set_status(STARTED_STATUS & ~Status.DRIVER_OK)

    def share(self) -> None:
        """Share guest memory."""
        self.front_end.share(shared_regions(self.memory))

    def place_all(self) -> None:
        """Tell where all rings are."""
        for index in range(len(self.queues)):
            self.place(index)

    def place(self, index: int, base: int | None = None) -> None:
        """Size, base, addresses and call descriptor of ring ``index``."""
        ring = ring_setup(self.queues[index], self.front_end.has(ProtocolFeature.GPA_ADDRESSES))
        self.front_end.set_vring_num(index, ring.num)
        self.front_end.set_vring_base(index, ring.base if base is None else base)
        self.front_end.set_vring_addr(index, ring.desc, ring.avail, ring.used)
        self.front_end.set_vring_call(index, ring.call)

    def start_all(self) -> None:
        """Start all rings."""
        self.set_status(STARTED_STATUS)
        for index in range(len(self.queues)):
            self.start(index)

    def start(self, index: int) -> None:
        """Start ring ``index``."""
        self.front_end.set_vring_kick(index, self.queues[index].kick_fd)

    def run_all(self) -> None:
        """Enable all rings and post receive buffers."""
        for driver in self.drivers:
            driver.fill()
        if self.bit_30:
            for index in range(len(self.queues)):
                self.enable(index)

    def enable(self, index: int, enabled: bool = True) -> None:
        """Enable ring ``index``, or disable it."""
        self.front_end.set_vring_enable(index, enabled)

    def stop(self, index: int) -> int:
        """Stop ring ``index`` -> the base answered."""
        return self.front_end.get_vring_base(index)

    def set_status(self, status: int) -> None:
        """Set the device status, where that was negotiated."""
        if self.front_end.has(ProtocolFeature.STATUS):
            self.front_end.set_status(status)

    # ----------------------------------------------------------------------------------------------- queues

    def new_queues(self) -> None:
        """The driver begins anew, with queues of which nobody knows yet."""
        for driver in self.drivers:
            driver.close()
        self.drivers = self._make()

    @property
    def queues(self) -> list[DriverQueue]:
        """All of them by ring index."""
        return [queue for driver in self.drivers for queue in (driver.receiveq, driver.transmitq)]

    @property
    def driver(self) -> NetDriver:
        """That of the first pair."""
        return self.drivers[0]

    def note(self, text: str) -> None:
        """A line of the trace: what was done to the rings, or seen there."""
        self.front_end.trace.append(text)

    def barrier(self) -> None:
        """The back-end has dealt with everything sent so far."""
        self.front_end.get_features()

    def settle(self) -> None:
        """Give the back-end time to do what it should not."""
        self.barrier()
        time.sleep(self.bench.quiet)

    def transmit(self, frame: bytes, header: NetHeader = NO_OFFLOAD, *, pair: int = 0, cuts: Sequence[int] = (),
                 direct: int | None = None) -> None:
        """Send ``frame`` and see its chain used. Raises Broken."""
        self.note(f"offered a frame of {len(frame)} bytes on ring {2 * pair + 1}, flags {header.flags:#x}, gso_type "
                  f"{header.gso_type:#x}, in {len(cuts) + 1} piece(s)")
        if self.bench.wire is not None:
            self.bench.wire.forget()
        self.drivers[pair].transmit(frame, header, cuts=cuts, direct=direct)
        expect(self.reclaimed(pair), "the chain of a transmitted frame was not used")

    def reclaimed(self, pair: int = 0, seconds: float | None = None) -> bool:
        """All transmitted chains of ``pair`` come back within ``seconds`` (None: those of the bench)."""
        return self.drivers[pair].reclaim_all(self.bench.seconds if seconds is None else seconds)

    def untouched(self, index: int) -> bool:
        """After some time no chain of ring ``index`` has been used."""
        self.settle()
        return self.queues[index].ring.pending() == 0

    # ------------------------------------------------------------------------------------------ the other side

    def inject(self, frame: bytes, header: NetHeader = NO_OFFLOAD) -> None:
        """Let ``frame`` come to the back-end from its other side. Raises NotReachable without a wire."""
        wire = self.bench.needs_wire()
        self._link()
        self.note(f"a frame of {len(frame)} bytes comes from the network")
        wire.inject(self, frame, header)

    def inject_burst(self, several: Sequence[bytes]) -> None:
        """As :meth:`inject`, ``several`` frames as close together as can be. Raises NotReachable without a wire."""
        wire = self.bench.needs_wire()
        self._link()
        self.note(f"{len(several)} frames come from the network")
        wire.burst(self, several)

    def _link(self) -> None:
        """Wait until frames get through: some back-ends need a moment after the rings have started."""
        if self._linked:
            return
        deadline = time.monotonic() + self.bench.seconds
        while True:
            mark = frames.tag()
            self.bench.needs_wire().inject(self, frames.plain(mark), NetHeader())
            if self.arrives(mark, 0.1) is not None:
                break
            expect(time.monotonic() < deadline, "no frame from the network reaches the guest at all")
        self._linked = True

    def arrives(self, mark: bytes, seconds: float | None = None, pair: int = 0) -> Received | None:
        """The frame with ``mark`` as the guest receives it on ``pair``; others before it are dropped. None after
        ``seconds`` (None: those of the bench)."""
        deadline = time.monotonic() + (self.bench.seconds if seconds is None else seconds)
        while (left := deadline - time.monotonic()) > 0:
            received = self.drivers[pair].receive_within(left)
            if received is not None and mark in received.frame:
                return received
        return None

    def leaves(self, mark: bytes, seconds: float | None = None) -> tuple[NetHeader, bytes] | None:
        """The frame with ``mark`` as it leaves the back-end on its other side, with its header where there is one.
        Raises NotReachable without a wire."""
        return self.bench.needs_wire().leaves(self, mark, self.bench.seconds if seconds is None else seconds)

    def sends(self, frame: bytes, header: NetHeader = NO_OFFLOAD, *, mark: bytes,
              **options) -> tuple[NetHeader, bytes]:
        """:meth:`transmit`, and what leaves. Raises Broken when nothing does, NotReachable without a wire."""
        self.bench.needs_wire()
        self._link()
        self.transmit(frame, header, **options)
        left = self.leaves(mark)
        expect(left is not None, "the frame was taken from the ring, and nothing left the back-end")
        return left

    def receives(self, frame: bytes, header: NetHeader = NO_OFFLOAD, *, mark: bytes) -> Received:
        """:meth:`inject`, and what arrives. Raises Broken when nothing does."""
        self.inject(frame, header)
        received = self.arrives(mark)
        expect(received is not None, "the frame did not reach the guest")
        self.note(f"it arrives in {received.buffers} buffer(s), flags {received.header.flags:#x}, gso_type "
                  f"{received.header.gso_type:#x}, num_buffers {received.header.num_buffers}")
        return received

    def close(self) -> None:
        """Hang up. Idempotent."""
        self.front_end.close()
        for driver in self.drivers:
            driver.close()
        self.memory.close()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def refused(session: Session, send) -> bool:
    """Does the back-end say no to what ``send()`` sends? By an acknowledgement other than zero, or by closing."""
    try:
        send()
        session.barrier()
    except (RequestRefused, PeerError, OSError):
        return True
    return False
