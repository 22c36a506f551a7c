"""The guest's IOMMU over one session: what the front-end has translated, and what it is asked for.

Theory of operation (vhost-user, "IOMMU support"). With ACCESS_PLATFORM every address of the driver is an iova, those of
the ring parts included. Translations come in two ways into use.

- Those of *buffers* are looked up by the worker (ring/core/iotlb.c). It gives a chain back whose translation is
  missing, leaves that ring alone and reports; the front-end is asked. Any change of the table is made with the engine
  paused, after which every ring is looked at again.
- Those of the *ring parts* are resolved when a ring is made. So a ring is run only while all of its parts are
  translated (:meth:`Iommu.reachable`), and one whose translations are taken back is stopped before the invalidation is
  acknowledged; it goes on where it was, like one that SET_STATUS 0 stopped.

The front-end is asked without waiting for it, once for each address and as long as nothing came of it. An update that
covers the address settles the question. An answer without such an update means that there is no translation: a chain
that needs it is dropped, a ring that needs it is spoken of and waits.
"""

import logging
import time
from dataclasses import dataclass

from ring.errors import RingError
from ring.guestmem import GuestMemory
from ring.iotlb import WRITE, Fault, Iotlb, Part, ring_parts
from ring.virtqueue import VirtQueue
from vdev.engine import Engine, ring_name
from vdev.logs import EventLog
from vdev.reverse import ReverseChannel
from vdev.workers import leave_to_worker
from vhost_user.spec import BackendRequest, IotlbType, ProtocolFeature, VirtioBit
from vhost_user.state import State
from vhost_user.wire import IOTLB
from vhost_user.wire import Iotlb as Message

PAGE = 4096  # the least that an IOMMU translates at a time
QUESTIONS_MAX = 1024  # of which a ring has a few, unless front-end and guest conspire
DENIED_INTERVAL = 0.02  # seconds between reports of failed accesses to the front-end


@dataclass
class _Question:
    """A translation the front-end was asked for, and the rings that need it."""

    rings: set[int]


class Iommu:
    """The translations of one session. ``table`` is empty until the front-end sends some."""

    def __init__(self, engine: Engine, reverse: ReverseChannel, log: EventLog) -> None:
        self._engine = engine
        self._reverse = reverse
        self._log = log
        self.table = Iotlb()
        self._lost: set[int] = set()  # rings that run on translations that were taken back
        self._needed: dict[int, Fault] = {}  # what the parts of a ring lack
        self._questions: dict[int, _Question] = {}  # by iova
        self._said: dict[int, str] = {}  # why a ring waits, as last logged
        self._last_denied = 0.0

    @staticmethod
    def on(state: State) -> bool:
        """Is the driver behind an IOMMU?"""
        return state.has_virtio(VirtioBit.ACCESS_PLATFORM)

    # ------------------------------------------------------------------------- what the front-end says

    def forget(self, state: State, iova: int = 0, size: int = 0) -> None:
        """[iova, iova + size), size 0 meaning 2^64, is no longer translated. Call it paused. Rings that ran on that
        are no longer reachable."""
        size = size or 1 << 64
        self.table.invalidate(iova, size)
        self._lost |= {index for index in self._engine.running()
                       if any(part.overlaps(iova, size) for part in self._parts(state, index))}

    def knows(self, memory: GuestMemory, message: Message) -> bool:
        """Was this said before? Front-ends repeat themselves: the parts of a ring are asked for one by one, and often
        lie in one page."""
        known = self.table.has(memory, message.iova, message.size, message.uva, message.access)
        if known:
            self._settle_questions(message)
        return known

    def _settle_questions(self, message: Message) -> None:
        for iova in [iova for iova in self._questions if message.iova <= iova < message.iova + message.size]:
            del self._questions[iova]

    def update(self, memory: GuestMemory, message: Message) -> None:
        """Take a translation over; what it overlaps was forgotten. Call it paused. Raises SetupError."""
        self.table.update(memory, message.iova, message.size, message.uva, message.access)
        self._settle_questions(message)

    # ------------------------------------------------------------------------------- what is asked for

    @staticmethod
    def _parts(state: State, index: int) -> list[Part]:
        ring = state.rings[index]
        return ring_parts(size=ring.num, desc=ring.addr.desc, avail=ring.addr.avail, used=ring.addr.used,
                          features=state.features)

    def reachable(self, state: State, index: int, memory: GuestMemory) -> bool:
        """Can ring ``index`` run, as far as its parts are translated? What is missing is noted for :meth:`ask`."""
        if index in self._engine.running() and index not in self._lost:
            return True
        self._lost.discard(index)
        self._needed.pop(index, None)
        lacking = self.table.lacks(memory, self._parts(state, index))
        if lacking is None:
            self._said.pop(index, None)
            return True
        code, fault = lacking
        if code == "RING_E_MISS":
            self._needed[index] = fault
        elif code == "RING_E_DENIED":
            self._say(index, f"the guest's IOMMU does not let the device {_verb(fault)} its ring at iova "
                      f"{fault.iova:#x}")
            self._tell_denied(fault)
        else:
            self._say(index, f"behind the guest's IOMMU its part at iova {fault.iova:#x} is not one run of memory; "
                      "give the device shorter queues (QEMU: rx_queue_size=256)")
        return False

    def ask(self, state: State) -> None:
        """Ask for what rings need before they can run."""
        for index, fault in self._needed.items():
            self._ask(state, index, fault)
        self._needed.clear()

    def missing(self, state: State, memory: GuestMemory) -> None:
        """Workers met addresses that are not translated. Asked for is all that the chain lacks: a question takes a
        front-end long, and a long frame lies in many pages."""
        waiting = []
        for index in self._engine.running():
            queue = self._engine.rings[index].queue
            fault = queue.missing()
            # the translation may have come since
            if fault is not None and self.table.lacks(memory, [Part(fault.iova, 1, fault.access)]):
                self._ask(state, index, fault)
                waiting.append((index, queue))
        # While a guest arrives by postcopy, a page of the chain may be missing, and this is the control thread.
        if not waiting or state.listening:
            return
        with self._engine.paused():
            for index, queue in waiting:
                for fault in self._scout(queue):
                    self._ask(state, index, fault)

    @staticmethod
    def _scout(queue: VirtQueue) -> list[Fault]:
        try:
            pages = {}
            for fault in queue.scout():
                pages.setdefault(fault.iova // PAGE, fault)
            return list(pages.values())
        except RingError:
            return []  # its worker finds out as well, and reports it

    def _ask(self, state: State, index: int, fault: Fault) -> None:
        if fault.iova in self._questions:
            self._questions[fault.iova].rings.add(index)
            return
        question = _Question({index})
        answered = None
        if state.has(ProtocolFeature.REPLY_ACK):
            def answered(_done: bool) -> None:
                self._answered(fault, question)
        message = Message(fault.iova, 1, 0, fault.access, IotlbType.MISS)
        if self._reverse.send(BackendRequest.IOTLB_MSG, IOTLB.encode(message), answered):
            if len(self._questions) >= QUESTIONS_MAX:
                del self._questions[next(iter(self._questions))]
            self._questions[fault.iova] = question
        else:
            self._say(index, f"the translation of iova {fault.iova:#x} is missing, and there is no channel to ask the "
                      "front-end for it; it must send SET_BACKEND_REQ_FD")

    def _answered(self, fault: Fault, question: _Question) -> None:
        if self._questions.get(fault.iova) is not question:
            return  # the translation has come
        del self._questions[fault.iova]
        with self._engine.paused():
            running = self._engine.running()
            for index in question.rings & set(running):
                self._engine.rings[index].queue.refuse(fault.iova)
        for index in question.rings - set(running):
            self._say(index, f"the guest's IOMMU has no translation for its ring at iova {fault.iova:#x}")

    def channel_changed(self) -> None:
        """What was asked over an earlier channel is not answered any more. Call it paused."""
        self._questions.clear()

    # ------------------------------------------------------------------------------- what went wrong

    def denied(self) -> None:
        """Workers dropped chains for what the IOMMU does not allow."""
        for index in self._engine.running():
            fault = self._engine.rings[index].queue.denied()
            if fault is not None:
                self._log.peer(logging.WARNING, "access-denied", f"{ring_name(index)}: a chain was dropped, as the "
                               f"guest's IOMMU does not let the device {_verb(fault)} its buffer at iova "
                               f"{fault.iova:#x}", ring=index, iova=fault.iova)
                self._tell_denied(fault)

    def _tell_denied(self, fault: Fault) -> None:
        now = time.monotonic()
        if now - self._last_denied >= DENIED_INTERVAL:
            self._last_denied = now
            message = Message(fault.iova, 1, 0, fault.access, IotlbType.ACCESS_FAIL)
            self._reverse.send(BackendRequest.IOTLB_MSG, IOTLB.encode(message))

    def _say(self, index: int, reason: str) -> None:
        if self._said.get(index) != reason:
            self._said[index] = reason
            self._log.peer(logging.WARNING, "ring-waits", f"{ring_name(index)} waits: {reason}", ring=index)

    def abandon(self) -> None:
        """Leave the table for good: a worker is stuck in it."""
        leave_to_worker(self.table)
        self.table = Iotlb()

    def close(self) -> None:
        """Free the table. No ring may be left."""
        self.table.close()


def _verb(fault: Fault) -> str:
    return "write to" if fault.access & WRITE else "read"
