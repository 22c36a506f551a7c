"""A guest arrives by postcopy: it runs here while most of its memory is still elsewhere.

Theory of operation (vhost-user, "VHOST_USER_POSTCOPY_ADVISE" and what follows). The front-end is given a userfaultfd
of ours, and told at which of our addresses it finds each region. From then on a thread of ours that touches a page that
has not come waits in the kernel until the front-end has put it there: in a load or store, or in readv and writev.
Workers need not know; while it lasts they serve no other device (Engine.keep_apart), so others run on. What follows for
the rest:

- A ring runs only once the front-end has said that it knows the addresses (State.runnable): a page that is touched
  before would be filled with zeros, and the guest's own would find its place taken.
- Taking lanes back may wait for a page, for GET_VRING_BASE as for all else. So the engine is patient (PATIENCE): a page
  takes milliseconds, and seconds where the network is slow.
- The control thread itself touches guest memory only where a ring is built, and has that done by a thread (bounded): a
  front-end that puts no page there costs a session and not the daemon. (It also looks ahead in a chain whose
  translations are missing, and does without: vdev/iommu.py.)
- A session that ends meanwhile first takes the memory away from under our threads. To let them go on with a page of
  zeros would be to write to a guest that goes on living, and to lose what was to come there.

- QEMU comes back to a device whose session has ended, and shares its memory as if all of it were there. That memory is
  refused from then on.

Whoever holds the userfaultfd can register any memory of this process with it, not just the guest's. Hence --postcopy,
and it has to be asked for.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from vdev import workers
from vdev.engine import Engine, EngineStuck
from vdev.errors import Failure
from vdev.handover import Put, Take
from vdev.logs import EventLog
from vdev.memory import SessionMemory
from vdev.userfault import PATH, Userfault, UserfaultSource
from vhost_user.fds import OwnedFds
from vhost_user.wire import Region

PATIENCE = 10.0  # seconds that a page of a guest may take to come

_Done = TypeVar("_Done")


class CutOff(Exception):
    """This memory may have pages missing, and nobody would put them there."""


@dataclass(frozen=True)
class ArrivalsPart:
    """Arrivals as they are handed on. file: a descriptor (see vdev/handover.py)."""

    file: int
    cut_off: tuple[tuple[int, int], ...]


class Arrivals:
    """What the sessions of one device share. source: where userfaultfds come from, ours from now on. cut_off: device
    and inode of memory whose pages never came."""

    def __init__(self, source: UserfaultSource, cut_off: Iterable[tuple[int, int]] = ()) -> None:
        self.source = source
        self.cut_off = set(cut_off)

    def export(self, put: Put) -> ArrivalsPart:
        """What another process needs to go on."""
        return ArrivalsPart(put(self.source.fd), tuple(self.cut_off))

    @classmethod
    def adopt(cls, part: ArrivalsPart, take: Take) -> "Arrivals":
        """Those that another process exported. Raises OSError."""
        return cls(UserfaultSource(take(part.file)), part.cut_off)

    def close(self) -> None:
        """No guest arrives any more."""
        self.source.close()


def open_arrivals() -> Arrivals:
    """For a device of the daemon, before it gives up privileges. Raises Failure."""
    try:
        return Arrivals(UserfaultSource())
    except OSError as error:
        raise Failure(f"--postcopy: no userfaultfd can be had from {PATH} ({os.strerror(error.errno).lower()}); it "
                      "takes Linux 6.1, and root or permissions for that file") from None


class SessionPostcopy:
    """The postcopy of one session, if it comes to that. arrivals: None where none is offered."""

    def __init__(self, arrivals: Arrivals | None, served_by: Engine, memory: SessionMemory, log: EventLog) -> None:
        self._arrivals = arrivals
        self._engine = served_by
        self._memory = memory
        self._log = log
        self._userfault: Userfault | None = None
        self._listening = False
        self._empty = -1  # a file without a byte: at the end it may be too late to get one
        self._late: Callable[[], None] | None = None  # waits for what took too long, and discards it

    @property
    def arriving(self) -> bool:
        """A guest may come, or is coming."""
        return self._listening or (self._userfault is not None and not self._memory.size)

    def advise(self) -> int:
        """POSTCOPY_ADVISE -> the descriptor to send, which stays ours. Raises OSError."""
        self._empty = os.memfd_create("vdev-severed")
        self._userfault = self._arrivals.source.new()
        return self._userfault.fd

    def listen(self) -> None:
        """POSTCOPY_LISTEN."""
        self._engine.keep_apart(True)
        self._listening = True
        self._engine.patience = PATIENCE
        self._log.info("postcopy-begins", "the guest goes on here before its memory has come (postcopy)")

    def check(self, fds: OwnedFds) -> None:
        """Raises CutOff if one of ``fds`` is memory of a guest that did not come here as a whole."""
        files = [os.fstat(fds[position]) for position in range(len(fds))]
        if self._arrivals is not None and self._arrivals.cut_off & {(file.st_dev, file.st_ino) for file in files}:
            raise CutOff("this guest was arriving by postcopy when its session ended, and pages may be missing; move "
                         "it to another QEMU or start it anew")

    def addresses(self, regions: Iterable[Region]) -> tuple[int, ...] | None:
        """Where we have these regions, for the answer to the message that shared them; None: not in postcopy."""
        return tuple(map(self._memory.address, regions)) if self._listening else None

    def known(self) -> None:
        """The front-end knows where we have its memory. Raises OSError."""
        for start, length in self._memory.extents():
            self._userfault.register(start, length)

    def end(self) -> None:
        """POSTCOPY_END: all memory has come. Raises OSError."""
        for start, length in self._memory.extents():
            self._userfault.unregister(start, length)
        self._engine.keep_apart(False)
        self._stop()
        self._log.info("postcopy-ends", "all of the guest's memory has come (postcopy is over)")

    def bounded(self, action: Callable[[], _Done], discard: Callable[[_Done], None]) -> _Done:
        """``action``, which may touch guest memory -> what it returns. Raises what it raises, and EngineStuck when a
        page does not come; then only close() is left, and ``discard`` gets what was returned too late."""
        if not self._listening:
            return action()
        done: Future[_Done] = Future()

        def run() -> None:
            try:
                done.set_result(action())
            except Exception as error:
                done.set_exception(error)

        helper = threading.Thread(target=run, name="postcopy", daemon=True)
        helper.start()
        try:
            return done.result(PATIENCE)
        except TimeoutError:
            self._late = lambda: discard(done.result())
            raise EngineStuck(f"a page of a guest that arrives by postcopy did not come within {PATIENCE:g} s; is the "
                              "host it comes from still there?") from None

    def close(self) -> None:
        """End of the session, before its rings and memory are given up: nobody waits for a page any more, and nobody
        touches one."""
        if self._listening:
            self._memory.sever(self._empty)
            self._arrivals.cut_off |= self._memory.identities()
            self._log.warning("postcopy-cut-off", "the session ended before all of the guest's memory had come "
                              "(postcopy): its memory is not taken again")
            for start, length in self._memory.extents():
                self._userfault.wake(start, length)
            if self._late is not None:
                with contextlib.suppress(Exception):
                    self._late()
        self._stop()

    def _stop(self) -> None:
        self._listening = False
        self._engine.patience = workers.PATIENCE
        if self._userfault is not None:
            self._userfault.close()
            self._userfault = None
        if self._empty >= 0:
            os.close(self._empty)
            self._empty = -1
