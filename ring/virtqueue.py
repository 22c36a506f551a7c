"""The device's half of a virtqueue, one visible phase at a time: what the step engine, the tests and the
lessons use. The pumps run the very same C micro-steps (core/split.inl, core/packed.inl) without Python.

A life of a chain::

    q.see()                  the available index (packed: the next flags) is read: do chains wait?
    chain = q.pop()          the next one is taken, its descriptors are read and translated
    chain.read() / .write()  bytes are copied
    q.push(chain, written)   a used entry is written, not visible yet
    q.publish()              the used index (packed: the first flags) is stored: the driver sees it
    q.decide()               must the driver be notified, and why

virtio 1.2, sections 2.7.13 "Supplying Buffers to The Device", 2.7.14 "Receiving Used Buffers From The
Device", 2.8.21 and 2.8.22, seen from the device.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from ring.build import ffi, lib
from ring.dirty import DirtyLog
from ring.errors import ChainError, QueueBusy, RingError, error
from ring.guestmem import GuestMemory
from ring.iotlb import Fault, Iotlb, fault_from

_RING_PACKED = 34  # virtio 1.2, 6


class CallReason(IntEnum):
    """Why the driver is notified, or not."""

    NOTHING_NEW = lib.CALL_NOTHING_NEW
    FLAG_WANTS = lib.CALL_FLAG_WANTS
    FLAG_SUPPRESSED = lib.CALL_FLAG_SUPPRESSED
    EVENT_REACHED = lib.CALL_EVENT_REACHED
    EVENT_AHEAD = lib.CALL_EVENT_AHEAD
    FIRST = lib.CALL_FIRST

    @property
    def due(self) -> bool:
        """Is the driver to be notified?"""
        return bool(lib.call_is_due(self))


@dataclass(frozen=True)
class QueueState:
    """The ring from our side. Split: indices are free-running modulo 65536. Packed: slots, each with its wrap
    counter. See struct vq_state in core/ring.h."""

    packed: bool
    size: int
    next_avail: int
    avail_wrap: bool
    known: int
    known_wrap: bool
    next_used: int
    used_wrap: bool
    published: int
    kicks_wanted: bool
    broken: RingError | None


@dataclass(frozen=True)
class Takeover:
    """How a queue began. by_journal: where its predecessor died, not at the front-end's base. completed: chains that
    were completed by the front-end in between."""

    by_journal: bool
    completed: int


class Chain:
    """One popped chain. ``head`` names it in the used ring (packed: the buffer id), ``slots`` is how many of
    the ring's entries it takes; lengths are in bytes."""

    def __init__(self, queue: "VirtQueue"):
        self._queue = queue
        self._c = ffi.new("struct chain *")
        self._pieces = ffi.new("struct piece[]", lib.RING_PIECES_MAX)

    head = property(lambda self: self._c.head)
    slots = property(lambda self: self._c.slots)
    descriptors = property(lambda self: self._c.descriptors)
    readable_len = property(lambda self: self._c.readable_len)
    writable_len = property(lambda self: self._c.writable_len)
    pieces = property(lambda self: self._c.readable + self._c.writable, doc="Separate runs of memory it lies in.")

    def read(self, offset: int = 0, length: int | None = None) -> bytes:
        """Up to ``length`` bytes of the device-readable part, from ``offset``. Raises MemoryGone."""
        available = max(0, self.readable_len - offset)
        length = available if length is None else min(length, available)
        data = ffi.new("uint8_t[]", max(length, 1))
        n = lib.pieces_read(self._pieces, self._c.readable, offset, data, length)
        if n < 0:
            raise error(n)
        return bytes(ffi.buffer(data, n))

    def write(self, data: bytes, offset: int = 0) -> int:
        """Write into the device-writable part from ``offset`` -> bytes that fitted. Raises MemoryGone."""
        pieces = self._pieces + self._c.readable
        n = lib.pieces_write(pieces, self._c.writable, offset, bytes(data), len(data))
        self._queue._mark(pieces, self._c.writable, offset, len(data))  # if it failed, some may be written
        if n < 0:
            raise error(n)
        return n


class VirtQueue:
    """The device's half of a virtqueue in ``memory``, split or packed (RING_PACKED in ``features``).

    size: descriptors, up to 32768, for a split ring a power of two. desc, avail, used: uva of the three parts
    (packed: descriptor ring, driver and device event suppression structure). features: negotiated virtio
    features. base: where to go on, as SET_VRING_BASE carries it. iotlb: the driver is behind an IOMMU, and all its
    addresses, desc, avail and used among them, are iovas of this table.

    Every verb but conclude raises RingBroken (MemoryGone among them) on a ring that has lost its meaning and QueueBusy
    while a pump has it. The constructor raises SetupError.
    """

    def __init__(self, memory: GuestMemory, *, size: int, desc: int, avail: int, used: int, features: int = 0,
                 base: int = 0, iotlb: Iotlb | None = None):
        guard()
        self.memory = memory
        self.size, self.desc, self.avail, self.used = size, desc, avail, used
        self.features = features
        self._iotlb = iotlb
        self.lent = False
        config = ffi.new("struct vq_config *", {"size": size, "base": base, "desc": desc, "avail": avail,
                                                "used": used, "features": features,
                                                "iotlb": iotlb.handle if iotlb else ffi.NULL})
        status = ffi.new("int *")
        self.handle = lib.vq_new(memory.handle, config, status)
        if self.handle == ffi.NULL:
            raise error(status[0])
        self._log: DirtyLog | None = None
        self._walking: Chain | None = None
        self._popped: deque = deque(maxlen=size)  # the C side of chains, for unpop

    def close(self) -> None:
        """Free our side; guest memory is not touched."""
        if self.lent:
            raise error(lib.RING_E_BUSY)
        if self.handle != ffi.NULL:
            lib.vq_free(self.handle)
            self.handle = ffi.NULL
            self._log = None

    def move(self, memory: GuestMemory) -> None:
        """Go on in another memory table. Raises SetupError, and the ring stays on the old one."""
        status = lib.vq_move(self._ours(), memory.handle)
        if status < 0:
            raise error(status)
        self.memory = memory

    def fail(self, reason: RingError) -> None:
        """Declare the ring broken for ``reason``, found outside it; its memory is not touched again."""
        lib.vq_fail(self._ours(), getattr(lib, reason.code))

    def log(self, log: DirtyLog | None, *, used: int | None = None, buffers: bool = True) -> None:
        """Mark in ``log`` from now on, or no more (None).

        buffers: what is written to the guest's buffers (VHOST_F_LOG_ALL). used: what is written to the ring itself
        (VHOST_VRING_F_LOG), the used ring as lying at this gpa (log_guest_addr); None: nothing of it. vhost-user,
        section "Migration". Of a ring that was taken over, all that the device writes is marked once, as its
        predecessor may have died before it marked what it wrote.
        """
        lib.vq_log(self._ours(), log.handle if log else ffi.NULL, buffers, used is not None, used or 0)
        self._log = log

    def missing(self) -> Fault | None:
        """The translation that was missing last, once; may be asked while a pump has the queue."""
        fault = ffi.new("struct iotlb_fault *")
        lib.vq_missing(self.handle, fault)
        return fault_from(fault)

    def denied(self) -> Fault | None:
        """The use of memory that the IOMMU did not allow last, once; may be asked while a pump has the queue."""
        fault = ffi.new("struct iotlb_fault *")
        lib.vq_denied(self.handle, fault)
        return fault_from(fault)

    def scout(self, room: int = 64) -> list[Fault]:
        """Look ahead: all the translations that the next chain lacks, at the most ``room``."""
        out, pieces = ffi.new("struct iotlb_fault[]", room), ffi.new("struct piece[]", lib.RING_PIECES_MAX)
        found = self._checked(lib.vq_scout(self._ours(), pieces, out, room))
        return [Fault(out[i].iova, out[i].access) for i in range(found)]

    def refuse(self, iova: int) -> None:
        """There is no translation for ``iova``: the next chain that misses it cannot be followed."""
        lib.vq_refuse(self._ours(), iova)

    def _mark(self, pieces, count: int, offset: int, length: int) -> None:
        """Some of these ``length`` bytes were written."""
        if self._log is not None:
            status = lib.vq_mark(self.handle, pieces, count, offset, length)
            if status < 0:
                raise error(status)

    def take_over(self, line=ffi.NULL, binding: int = 0) -> Takeover:
        """Begin where a predecessor that died on this ring stood. line: what it wrote (``struct journal_line *``;
        NULL: nothing), believed when it is about ``binding``. Before anything else is done with the queue.

        It may come before or after ``log``. Raises RingBroken when neither that nor the base fits the descriptors,
        MemoryGone when the ring vanished.
        """
        completed = ffi.new("uint32_t *")
        answer = self._checked(lib.vq_take_over(self._ours(), line, binding, completed))
        return Takeover(answer == lib.TAKEOVER_JOURNAL, completed[0])

    def record(self, line, binding: int, base: int) -> None:
        """Write down in ``line``, which must outlive the queue, what is done from now on; see ring/journal.py."""
        lib.vq_record(self._ours(), line, binding, base)

    def write_on(self, line, binding: int) -> None:
        """The same as a process did whose queue stood where this one stands, and which handed the ring over."""
        lib.vq_write_on(self._ours(), line, binding)

    def _ours(self):
        if self.lent:
            raise error(lib.RING_E_BUSY)
        return self.handle

    def _checked(self, status: int, chain: Chain | None = None) -> int:
        """Pass a status of zero or more on; raise what a negative one means."""
        if status >= 0:
            return status
        broken = self.state.broken
        if broken is not None:
            raise broken
        if chain is None:
            raise error(status)
        raise error(status, at=chain._c.bad, head=chain.head, slots=chain.slots)

    # ---- the phases

    def see(self) -> int:
        """Look once whether chains wait -> how many, as far as one look tells (packed: 1); 0: none."""
        return self._checked(lib.vq_see(self._ours()))

    def take(self) -> Chain | None:
        """Take the next chain of those seen, without its descriptors (see walk), or None."""
        chain = Chain(self)
        if self._checked(lib.vq_take(self._ours(), chain._c)) == lib.RING_EMPTY:
            return None
        self._walking = chain
        self._popped.append(chain._c)
        return chain

    def walk(self, pieces: int = lib.RING_PIECES_MAX) -> bool:
        """Read the next descriptor of the chain just taken, which may lie in so many pieces of memory
        -> does the chain go on? Raises ChainError."""
        chain = self._walking
        status = lib.vq_walk(self._ours(), chain._c, chain._pieces, pieces)
        return self._checked(status, chain) == lib.RING_MORE

    def pop(self, pieces: int = lib.RING_PIECES_MAX) -> Chain | None:
        """See if needed, take, and walk to the end -> the chain, or None. pieces: as for walk. Raises
        ChainError, which is to be pushed back."""
        chain = Chain(self)
        status = lib.vq_pop(self._ours(), chain._c, chain._pieces, pieces)
        if status == lib.RING_EMPTY:
            return None
        self._popped.append(chain._c)
        self._checked(status, chain)
        return chain

    def unpop(self, count: int = 1) -> None:
        """Give the ``count`` most recently popped chains back, unused. Raises ValueError for more than were
        popped; the last ``size`` are remembered."""
        if count > len(self._popped):
            raise ValueError(f"{count} chains to give back, {len(self._popped)} were popped")
        slots = sum(self._popped.pop().slots for _ in range(count))
        self._checked(lib.vq_unpop(self._ours(), slots))

    def push(self, chain: Chain | ChainError, written: int = 0) -> None:
        """Write a used entry for ``chain`` (or for the error it raised): ``written`` bytes."""
        self._checked(lib.vq_push(self._ours(), chain.head, chain.slots, written))

    def push_batch(self, chains: Sequence[Chain | ChainError]) -> None:
        """VIRTIO_F_IN_ORDER: one used entry for ``chains``, in the order they were popped; nothing was
        written to them."""
        self._checked(lib.vq_push_batch(self._ours(), *_batch(chains)))

    def publish(self) -> None:
        """Everything pushed becomes visible to the driver."""
        self._checked(lib.vq_publish(self._ours()))

    def decide(self) -> CallReason:
        """Must the driver be notified of what was published? A full barrier comes first."""
        return CallReason(self._checked(lib.vq_decide(self._ours())))

    def arm(self) -> int:
        """Ask for a kick when more comes than is known, then look once more -> how many chains came beyond
        those known, as far as one look tells; 0: none."""
        return self._checked(lib.vq_arm(self._ours()))

    def disarm(self) -> None:
        """Tell the driver that kicks are not needed."""
        self._checked(lib.vq_disarm(self._ours()))

    def conclude(self, chains: Sequence[Chain | ChainError] = ()) -> CallReason:
        """The ring broke: push a used entry for ``chains`` (as push_batch; none: no entry), publish what was
        pushed before it broke, and decide. Raises what broke it if that was not the driver's indices."""
        return CallReason(self._checked(lib.vq_conclude(self._ours(), *(_batch(chains) if chains else (0, 0, 0)))))

    # ---- what can be asked at any time, also while lent (then it is a snapshot)

    @property
    def packed(self) -> bool:
        """The ring's format."""
        return bool(self.features >> _RING_PACKED & 1)

    @property
    def file(self) -> tuple[int, int, int]:
        """Where its descriptors lie, as GuestMemory.file_at has it."""
        return self.memory.file_at(self._iotlb.uva(self.memory, self.desc) if self._iotlb else self.desc)

    @property
    def base(self) -> int:
        """What GET_VRING_BASE answers (vq_base in core/ring.h has the encodings)."""
        return lib.vq_base(self.handle)

    @property
    def walk_at(self) -> tuple[int, bool]:
        """The descriptor that walk reads next (an index in its table; packed, in the ring: a slot), and whether
        that table is an indirect one. Means nothing when no chain is being walked."""
        s = ffi.new("struct vq_state *")
        lib.vq_state(self.handle, s)
        return s.walk_at, bool(s.walk_in_table)

    @property
    def state(self) -> QueueState:
        """The indices and, when the ring is broken, the rule."""
        s = ffi.new("struct vq_state *")
        lib.vq_state(self.handle, s)
        broken = error(s.broken, s.broken_at) if s.broken else None
        return QueueState(bool(s.packed), s.size, s.next_avail, bool(s.avail_wrap), s.known, bool(s.known_wrap),
                          s.next_used, bool(s.used_wrap), s.published, bool(s.kicks_wanted), broken)


def _batch(chains: Sequence[Chain | ChainError]) -> tuple[int, int, int]:
    """What one used entry for several chains is made of: the last one's head, their number, their slots."""
    return chains[-1].head, len(chains), sum(chain.slots for chain in chains)


def guard() -> None:
    """Make sure that the SIGBUS guard is in place (something may have replaced it). Raises SetupError."""
    status = lib.guard_install()
    if status < 0:
        raise error(status)


__all__ = ["CallReason", "Chain", "ChainError", "QueueBusy", "QueueState", "Takeover", "VirtQueue", "guard"]
