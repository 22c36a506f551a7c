"""A hostile front-end for any vhost-user net back-end: how a case is made, and what a back-end did with it.

Theory of operation. A case (vdev/testing/hostile_*.py) opens attacks and yields what the back-end did with each message
that is not as it should be. An :class:`Attack` is a connection brought to some stage by a front-end that behaves: so
what the back-end says no to is the one thing that is wrong. Behind each such message goes GET_FEATURES, a question that
every back-end answers: its answer tells that the message was dealt with, without waiting for time to pass. After each
case a front-end that behaves has to be served, from its handshake to a frame that is taken, and the process must hold
no descriptor more than before.

Case ids are the P rows of docs/conformance.
"""

import contextlib
import os
import select
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum

from ring.driver import GuestMemory
from vdev.listen import peer_pid
from vdev.net.features import Feature, mask
from vdev.testing.netdriver import NetDriver
from vdev.testing.scripted import ScriptedGuest, ring_setup, shared_regions
from vhost_user.codec import Message, encode
from vhost_user.errors import Close, PeerError
from vhost_user.frontend import FrontEnd, NoAnswer, RequestRefused
from vhost_user.spec import ProtocolFeature, Request, Status
from vhost_user.wire import VRING_STATE, VringState

FRAME = bytes.fromhex("ffffffffffff52540012345688b5") + bytes(46)
FEATURES = mask(Feature.VERSION_1, Feature.MRG_RXBUF)


class Outcome(Enum):
    """What a back-end did with a message."""

    TAKEN = "taken"  # acknowledged, or passed over without a word
    ANSWERED = "answered"
    REFUSED = "refused"  # acknowledged with something other than zero
    CLOSED = "closed"
    SILENT = "no answer"  # and the connection is open: whoever waits for it is stuck


ANY = frozenset(Outcome) - {Outcome.SILENT}
REFUSED = frozenset({Outcome.REFUSED, Outcome.CLOSED})
CLOSED = frozenset({Outcome.CLOSED})
SERVED = frozenset({Outcome.TAKEN, Outcome.ANSWERED})


class Stage(IntEnum):
    """How far an attack's front-end has come before it turns bad."""

    CONNECTED = 0
    NEGOTIATED = 1
    SHARED = 2  # guest memory
    STARTED = 3  # ring 0 and 1, enabled


class NotOffered(Exception):
    """The case is about something that this back-end does not offer; the text names it."""


class NotServed(Exception):
    """A front-end that behaves is not served; the text says how far it came."""


@dataclass(frozen=True)
class Case:
    """One thing a hostile front-end does.

    id: row of docs/conformance. sends: what is sent, for people. careful: what a careful back-end may do with it. act:
    does it, and yields what came of each variant.
    """

    id: str
    sends: str
    careful: frozenset[Outcome]
    act: Callable[["Target"], Iterator[Outcome]]


class Cases(list[Case]):
    """The cases of one file; :meth:`case` adds one."""

    def case(self, id: str, sends: str, careful: Iterable[Outcome]) -> Callable:
        """The decorated function is ``act`` of a new case."""
        def add(act: Callable[["Target"], Iterator[Outcome]]) -> Callable[["Target"], Iterator[Outcome]]:
            self.append(Case(id, sends, frozenset(careful), act))
            return act
        return add


class Attack:
    """A connection at ``stage``; a context manager. ``driver`` has the two rings, ``memory`` is what they lie in."""

    def __init__(self, target: "Target", stage: Stage) -> None:
        self._seconds = target.seconds
        self.memory = GuestMemory(1 << 20)
        self.driver = NetDriver(self.memory, size=64, features=FEATURES)
        self.front_end = FrontEnd.connect(target.path, timeout=target.seconds, ack=False)
        try:
            if stage >= Stage.NEGOTIATED:
                self.front_end.negotiate(FEATURES)
            if stage >= Stage.SHARED:
                self.front_end.share(shared_regions(self.memory))
            if stage >= Stage.STARTED:
                for index in 0, 1:
                    self.start(index)
                self.driver.fill(8)
        except BaseException:
            self.close()
            raise

    def start(self, index: int) -> None:
        """Configure, start and enable ring ``index`` as is right."""
        self.ready()
        self.front_end.set_ring(index, ring_setup(self.queue(index)))
        self.front_end.set_vring_enable(index, True)

    def ready(self) -> None:
        """The driver is there: from now on a ring that has all it needs runs."""
        if self.front_end.has(ProtocolFeature.STATUS):
            self.front_end.set_status(Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK)

    def queue(self, index: int):
        """The driver's half of ring ``index``."""
        return (self.driver.receiveq, self.driver.transmitq)[index]

    def needs(self, feature: ProtocolFeature) -> None:
        """Raises NotOffered unless ``feature`` was negotiated."""
        if not self.front_end.has(feature):
            raise NotOffered(feature.name)

    # ---------------------------------------------------------------------------------------- what is sent

    def ask(self, request: int, payload: bytes = b"", fds: Sequence[int] = (), *, answered: bool = False) -> Outcome:
        """One message, well framed; asks for an acknowledgement where it can, unless it is ``answered``."""
        need_reply = not answered and self.front_end.has(ProtocolFeature.REPLY_ACK)
        return self.send(encode(request, payload, need_reply=need_reply), fds, None if answered else request)

    def ring(self, request: Request, index: int, number: int) -> Outcome:
        """One message that names a ring and a number."""
        return self.ask(request, VRING_STATE.encode(VringState(index, number)))

    def send(self, data: bytes, fds: Sequence[int] = (), acknowledges: int | None = None) -> Outcome:
        """Any bytes, and the question behind them. ``acknowledges``: the request of which an answer says yes or no."""
        try:
            self.front_end.send_raw(data, fds)
            self.front_end.send_raw(encode(Request.GET_FEATURES))
            answers = self._answers()
        except NoAnswer:
            return Outcome.SILENT
        except (Close, OSError):
            return Outcome.CLOSED
        if not answers:
            return Outcome.TAKEN
        if answers[0].request == acknowledges:
            return Outcome.REFUSED if any(answers[0].payload) else Outcome.TAKEN
        return Outcome.ANSWERED

    def _answers(self) -> list[Message]:
        """Those that come before that to GET_FEATURES."""
        answers = []
        while (answer := self.front_end.receive()).request != Request.GET_FEATURES:
            answers.append(answer)
        return answers

    def many(self, messages: Iterable[tuple[bytes, Sequence[int]]]) -> Outcome:
        """Messages with their descriptors that nobody answers, as fast as they are taken."""
        for count, (data, fds) in enumerate(messages):
            if count % 64 == 0 and (outcome := self.alive()) is not Outcome.TAKEN:
                return outcome
            self.front_end.send_raw(data, fds)
        return self.alive()

    def alive(self) -> Outcome:
        """Nothing but the question."""
        return self.send(b"")

    def left_alone(self, seconds: float) -> Outcome:
        """Says nothing more, and waits for the back-end to hang up."""
        poll = select.poll()
        poll.register(self.front_end.transport, select.POLLRDHUP)
        return Outcome.CLOSED if poll.poll(seconds * 1000) else Outcome.SILENT

    def transmits(self) -> Outcome:
        """A frame on ring 1: is it taken?"""
        self.driver.transmit(FRAME)
        return Outcome.TAKEN if self.driver.reclaim_all(self._seconds) else Outcome.SILENT

    def close(self) -> None:
        """Hang up. Idempotent."""
        self.front_end.close()
        self.driver.close()
        self.memory.close()

    def __enter__(self) -> "Attack":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Target:
    """The back-end that listens on ``path``. seconds: how long it may take for an answer."""

    def __init__(self, path: str, seconds: float = 3.0) -> None:
        self.path = path
        self.seconds = seconds
        self.pid: int | None = None  # of the process that served last, where it can be told

    def attack(self, stage: Stage = Stage.NEGOTIATED) -> Attack:
        """A connection at ``stage``. Raises NotServed."""
        return self._patiently(lambda: Attack(self, stage))

    def serves(self) -> None:
        """A front-end that behaves has its way, and leaves. Raises NotServed."""
        def visit() -> None:
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(self.path)
            self.pid = peer_pid(sock)
            with ScriptedGuest(sock, features=FEATURES, buffers=8) as guest:
                guest.driver.transmit(FRAME)
                if not guest.driver.reclaim_all(self.seconds):
                    raise NotServed("a frame of the guest was not taken")
        self._patiently(visit)

    def _patiently(self, visit: Callable):
        """Try for a while: the session before may still be on its way out."""
        deadline = time.monotonic() + 2 * self.seconds
        while True:
            try:
                return visit()
            except (OSError, PeerError, NoAnswer, RequestRefused, NotServed) as why:
                if time.monotonic() > deadline:
                    raise NotServed(f"{type(why).__name__}: {why}") from None
                time.sleep(0.02)

    def descriptors(self) -> int | None:
        """How many the back-end's process has open; None where that cannot be seen."""
        with contextlib.suppress(OSError):
            return len(os.listdir(f"/proc/{self.pid}/fd"))
        return None

    def alive(self) -> bool:
        """Is the process that served last still there?"""
        return self.pid is None or os.path.exists(f"/proc/{self.pid}")


@dataclass(frozen=True)
class Report:
    """What came of a case: ``verdict`` is pass, LAX (it did what a careful back-end would not, and lived on), FAIL (it
    died, hung, leaked or serves nobody any more) or n/a (not offered); ``why`` says more unless it passed."""

    case: Case
    outcomes: tuple[Outcome, ...]
    verdict: str
    why: str = ""


def judge(target: Target, case: Case) -> Report:
    """Run ``case``. Raises NotServed when the back-end serves nobody to begin with."""
    target.serves()
    pid, before = target.pid, target.descriptors()
    outcomes: list[Outcome] = []
    trouble = ""
    try:
        outcomes.extend(case.act(target))
    except NotOffered as what:
        return Report(case, (), "n/a", f"{what} is not offered")
    except NotServed as why:
        trouble = f"in the middle of the case a good front-end was not served: {why}"
    except (Close, OSError):  # by a message that was right
        outcomes.append(Outcome.CLOSED)
    except RequestRefused:
        outcomes.append(Outcome.REFUSED)
    except NoAnswer:
        outcomes.append(Outcome.SILENT)
    trouble = _aftermath(target, pid, before) or trouble
    if not trouble and Outcome.SILENT in set(outcomes) - case.careful:
        trouble = "it neither answered nor closed the connection"
    if trouble:
        return Report(case, tuple(outcomes), "FAIL", trouble)
    other = sorted({outcome.value for outcome in outcomes if outcome not in case.careful})
    if other:
        careful = " or ".join(sorted(outcome.value for outcome in case.careful))
        return Report(case, tuple(outcomes), "LAX", f"{' and '.join(other)} where {careful} is due")
    return Report(case, tuple(outcomes), "pass")


def _aftermath(target: Target, pid: int | None, before: int | None) -> str:
    """What is wrong with the back-end after a case; nothing: ""."""
    try:
        target.serves()
    except NotServed as why:
        return f"a good front-end is not served any more: {why}" if target.alive() else f"process {pid} died"
    if target.pid != pid:
        return f"process {pid} was replaced by process {target.pid}"
    if more := _leaked(target, before):
        return f"{more} descriptors were left open"
    return ""


def _leaked(target: Target, before: int | None) -> int:
    """How many descriptors are open that were not; a session may take a moment to go."""
    deadline = time.monotonic() + target.seconds
    while True:
        now = target.descriptors()
        if before is None or now is None or now <= before:
            return 0
        if time.monotonic() > deadline:
            return now - before
        time.sleep(0.02)
