"""The guest's half of a virtqueue, in plain Python: for tests, tools and lessons.

    memory = GuestMemory(1 << 20)
    queue = DriverQueue(memory, size=8)
    queue.post(readable=[b"hello"], writable=[64])   # a chain of two descriptors
    queue.submit()                                   # the device can see it; kick if it wants one
    ...                                              # the device works
    done = queue.collect()                           # head, bytes written, and those bytes

DriverQueue is what a driver does with any ring: buffers, what is outstanding, the kick and call eventfds.
What depends on the ring's format is its ``ring`` (ring/driver_split.py, ring/driver_packed.py), chosen by the
feature RING_PACKED. Both trust the device as far as a checker should: what it may not do raises DeviceError.

Every field of shared memory can be read and written by name, valid or not, so that a test can be the
guest from hell: ``queue.ring.desc[3].flags = 0xFFFF``, ``queue.ring.avail.idx += 9``,
``queue.ring.avail.ring[0] = 77``, ``queue.ring.avail.used_event = 5``, on a packed ring
``queue.ring.desc[3].id = 9``, ``queue.ring.driver_event.off_wrap = 0x8005``. Addresses are gpas.
"""

import contextlib
import os
import select
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ring.driver_memory import Extent, GuestMemory, OutOfGuestMemory, Region
from ring.driver_packed import PackedRing
from ring.driver_parts import DESCRIPTOR_BYTES, RING_PACKED, Buffer, DeviceError, RingFull
from ring.driver_split import SplitRing

__all__ = ["Buffer", "Completion", "DeviceError", "DriverQueue", "Extent", "GuestMemory", "OutOfGuestMemory",
           "PackedRing", "Region", "RingFull", "SplitRing"]


@dataclass(frozen=True)
class Completion:
    """A chain the device has used.

    head: the chain's first descriptor (split) or buffer id (packed). written: how many bytes the device says
    it wrote; all there is room for if the chain went by in a batch (VIRTIO_F_IN_ORDER). data: the first
    ``written`` bytes of its writable buffers.
    """

    head: int
    written: int
    buffers: tuple[Buffer, ...]
    data: bytes


@dataclass
class _Outstanding:
    buffers: tuple[Buffer, ...]
    slots: list[int]  # descriptors (packed: the buffer id) to give back
    owned: list[int]  # allocations to free: indirect table, posted buffers


class DriverQueue:
    """A driver's virtqueue: chains out, completions in.

    features: negotiated mask; RING_PACKED chooses the format. size, desc, avail, used, base: see
    :class:`SplitRing` and :class:`PackedRing` (avail and used stand for its event suppression structures).
    kick_fd and call_fd are eventfds of this queue, for a device to wait on and to write.
    """

    def __init__(self, memory: GuestMemory, size: int = 256, features: int = 0, *, desc: int | None = None,
                 avail: int | None = None, used: int | None = None, base: int | None = None) -> None:
        self.memory = memory
        self.features = features
        self.packed = bool(features >> RING_PACKED & 1)
        format = PackedRing if self.packed else SplitRing
        self.ring: SplitRing | PackedRing = format(memory, size, features, desc, avail, used, base)
        self.kick_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.call_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.kicks = 0
        # A device without a thread of its own has its turn after each kick and before each wait.
        self.device_turn: Callable[[], None] = lambda: None
        self._outstanding: dict[int, _Outstanding] = {}

    def __enter__(self) -> "DriverQueue":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def outstanding(self) -> int:
        """Chains given to the device and not collected yet."""
        return len(self._outstanding)

    @property
    def base(self) -> int:
        """What SET_VRING_BASE has to tell a device that comes now: it begins behind all that was collected."""
        return self.ring.base

    # ------------------------------------------------------------------------------ driver -> device

    def add(self, buffers: Iterable[Buffer], *, direct: int | None = None) -> int:
        """Offer a chain of ``buffers``, which stay the caller's.

        direct: so many in descriptors of the ring, the rest in an indirect table; None: all. -> the chain's
        name, as :class:`Completion` has it. Visible to the device after :meth:`publish`. Raises RingFull,
        ValueError for an empty chain or, on a packed ring, one of both kinds.
        """
        return self._offer(tuple(buffers), direct, [])

    def post(self, readable: Iterable[bytes] = (), writable: Iterable[int] = (), *,
             direct: int | None = None) -> int:
        """As :meth:`add`, with buffers made here: bytes for the device, then room of so many bytes each.

        They are freed when the chain is collected. Raises OutOfGuestMemory as well.
        """
        buffers: list[Buffer] = []
        owned: list[int] = []
        try:
            for data in readable:
                owned.append(self.memory.alloc(len(data)))
                self.memory.write(owned[-1], data)
                buffers.append(Buffer(owned[-1], len(data)))
            for size in writable:
                owned.append(self.memory.alloc(size))
                buffers.append(Buffer(owned[-1], size, writable=True))
            return self._offer(tuple(buffers), direct, owned)
        except Exception:
            for gpa in owned:
                self.memory.free(gpa)
            raise

    def _offer(self, buffers: tuple[Buffer, ...], direct: int | None, owned: list[int]) -> int:
        if not buffers:
            raise ValueError("a chain needs at least one buffer")
        indirect = len(buffers) - direct if direct is not None else 0
        if not 0 <= indirect <= len(buffers):
            raise ValueError(f"{direct} direct descriptors for {len(buffers)} buffers")
        table = self.memory.alloc(DESCRIPTOR_BYTES * indirect) if indirect else None
        try:
            slots = self.ring.write_chain(buffers, table, len(buffers) - indirect)
        except (RingFull, ValueError):
            if table is not None:
                self.memory.free(table)
            raise
        self._outstanding[slots[0]] = _Outstanding(
            buffers, slots, owned if table is None else [*owned, table])
        return slots[0]

    def publish(self) -> None:
        """Make all chains offered visible to the device."""
        self.ring.publish()

    def kick(self) -> None:
        """Notify the device, wanted or not."""
        self.kicks += 1
        os.eventfd_write(self.kick_fd, 1)
        self.device_turn()

    def submit(self) -> bool:
        """Publish, and kick if the device wants it -> whether it did."""
        self.publish()
        due = self.ring.kick_due()
        if due:
            self.kick()
        return due

    # ------------------------------------------------------------------------------ device -> driver

    def collect(self) -> Completion | None:
        """Take the next used chain, or None. Its descriptors, and what :meth:`post` made, are free again.

        Raises DeviceError for a head that is not outstanding or more bytes than the chain has room for.
        """
        entry = self.ring.next_completion()
        if entry is None:
            return None
        head, written = entry
        chain = self._outstanding.pop(head, None)
        if chain is None:
            raise DeviceError(f"used element names head {head}, which is not outstanding")
        room = sum(buffer.len for buffer in chain.buffers if buffer.writable)
        if written is None:
            written = room
        done = Completion(head, written, chain.buffers, self._gather(chain.buffers, min(written, room)))
        self.ring.free.extend(chain.slots)  # whatever the device says of it, the chain is back
        for gpa in chain.owned:
            self.memory.free(gpa)
        if written > room:
            raise DeviceError(f"used element of head {head} says {written} bytes, "
                              f"the chain has room for {room}")
        return done

    def _gather(self, buffers: Iterable[Buffer], length: int) -> bytes:
        parts = []
        for buffer in buffers:
            if buffer.writable and length:
                parts.append(self.memory.read(buffer.gpa, min(length, buffer.len)))
                length -= len(parts[-1])
        return b"".join(parts)

    def collect_all(self) -> list[Completion]:
        """Every used chain there is."""
        done = []
        while (completion := self.collect()) is not None:
            done.append(completion)
        return done

    def called(self) -> bool:
        """Has the device notified since the last question?"""
        with contextlib.suppress(BlockingIOError):
            return os.eventfd_read(self.call_fd) > 0
        return False

    def wait(self, timeout: float, count: int = 1) -> bool:
        """Ask for a notification and sleep until ``count`` used chains can be collected.

        -> False after ``timeout`` seconds. Once asleep only a notification wakes it: used chains for which
        the device owes one and sends none do not count.
        """
        self.device_turn()
        waiter = select.poll()
        waiter.register(self.call_fd, select.POLLIN)
        deadline = time.monotonic() + timeout
        while not self.ring.want_calls(count):
            if not waiter.poll(max(0, deadline - time.monotonic()) * 1000):
                return False
            self.called()
        return True

    def close(self) -> None:
        """Free the ring and what is still outstanding, close the eventfds. Idempotent."""
        for chain in self._outstanding.values():
            for gpa in chain.owned:
                self.memory.free(gpa)
        self._outstanding.clear()
        self.ring.close()
        for name in ("kick_fd", "call_fd"):
            if getattr(self, name) >= 0:
                os.close(getattr(self, name))
                setattr(self, name, -1)
