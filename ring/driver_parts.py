"""What the driver's two ring formats share: fields of guest memory by name, buffers, barriers, whose turn it is.

ring/driver_split.py and ring/driver_packed.py build on it; ring/driver.py joins it all.

Specification: virtio 1.2, section 2.6 "Virtqueues". Addresses are gpas.
"""

import threading
from collections import deque
from collections.abc import Sequence
from itertools import repeat
from typing import NamedTuple

from ring.driver_memory import GuestMemory

INDIRECT_DESC = 28  # feature bits, section 6
EVENT_IDX = 29
RING_PACKED = 34
IN_ORDER = 35

DESC_F_NEXT = 1
DESC_F_WRITE = 2
DESC_F_INDIRECT = 4

DESCRIPTOR_BYTES = 16  # in either format


class RingFull(Exception):
    """Not enough free descriptors for the chain."""


class DeviceError(Exception):
    """The device did what no device may: the text says what."""


class Buffer(NamedTuple):
    """A run of guest memory for one descriptor. gpa, len in bytes; writable by the device or readable."""

    gpa: int
    len: int
    writable: bool = False


class Area(NamedTuple):
    """One of the three parts of a virtqueue. gpa, len in bytes."""

    gpa: int
    len: int


class Areas(NamedTuple):
    """Where a virtqueue lies, by the names of section 2.6: what SET_VRING_ADDR carries, as uvas."""

    descriptor: Area
    driver: Area
    device: Area


def field(offset: int, width: int) -> property:
    """A number of ``width`` bytes, ``offset`` bytes into the structure a :class:`View` stands for."""
    return property(lambda view: view.memory.load(view.gpa + offset, width),
                    lambda view, value: view.memory.store(view.gpa + offset, width, value))


class View:
    """A structure in guest memory."""

    __slots__ = ("memory", "gpa")

    def __init__(self, memory: GuestMemory, gpa: int) -> None:
        self.memory = memory
        self.gpa = gpa


_barrier_lock = threading.Lock()


def full_barrier() -> None:
    """Order our earlier stores before our later loads.

    Taking a free lock is a locked instruction, which on x86-64 is a full barrier. Elsewhere Python has
    none to offer: check ordering there with the driver in C (ring/loadgen.py).
    """
    with _barrier_lock:
        pass


class Ring:
    """A virtqueue as its driver keeps it, whatever the format; what is here is whose turn it is.

    A chain goes by its name: the index of its first descriptor (split), its buffer id (packed). ``free``
    holds what new chains are made of: descriptors (split), buffer ids (packed).

    In order (VIRTIO_F_IN_ORDER, 2.7.9 and 2.8.8): the device may complete a batch of chains with one used
    entry that names the last of them; those before it count as completely used.
    """

    def __init__(self, memory: GuestMemory, size: int, features: int) -> None:
        self.memory = memory
        self.size = size
        self.event_idx = bool(features >> EVENT_IDX & 1)
        self.in_order = bool(features >> IN_ORDER & 1)
        self.free = deque(range(size) if self.in_order else reversed(range(size)))
        self._entries: dict[int, int] = {}  # name -> entries of the ring, in the order offered
        self._batch: tuple[int, int] | None = None  # a used entry of which only some chains were taken yet
        self._allocated: list[int] = []

    def _place(self, gpa: int | None, size: int, align: int) -> int:
        """Zeroed memory for a part of the ring: at ``gpa``, or allocated."""
        if gpa is not None:
            self.memory.write(gpa, bytes(size))
            return gpa
        self._allocated.append(self.memory.alloc(size, align))
        return self._allocated[-1]

    def _take_free(self, count: int) -> list[int]:
        """``count`` of what is free. In order it goes round the ring, else what was freed last comes first."""
        take = self.free.popleft if self.in_order else self.free.pop
        return [take() for _ in repeat(None, count)]

    def _next_in_turn(self, entry: tuple[int, int]) -> tuple[int, int | None]:
        """Which chain the used ``entry`` (name, bytes written) completes first -> (name, written).

        written is None for one that goes by in a batch. Raises DeviceError for a name that is not
        outstanding.
        """
        name, written = entry
        if not self.in_order:
            return name, written
        if name not in self._entries:
            raise DeviceError(f"the used entry names {name}, which is not outstanding")
        first = next(iter(self._entries))
        self._batch = None if first == name else entry
        return (name, written) if first == name else (first, None)

    def close(self) -> None:
        """Free what was allocated for the ring. Idempotent."""
        for gpa in self._allocated:
            self.memory.free(gpa)
        self._allocated.clear()


def link(buffers: Sequence[Buffer]) -> list[int]:
    """The flags of descriptors that make ``buffers`` one chain."""
    last = len(buffers) - 1
    return [DESC_F_WRITE * buffer.writable | DESC_F_NEXT * (i < last) for i, buffer in enumerate(buffers)]
