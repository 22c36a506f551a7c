"""Every rule of the rings that a driver, or whoever sets them up, can break; and why a driver is notified.

Sections are those of virtio 1.2. A rule is the driver's to keep; the device's part is that no breach of it
makes the device loop, crash or touch memory that is not the guest's.
"""

from enum import Enum, StrEnum


class Rule(StrEnum):
    """A rule, by the name its breach has everywhere in this project."""

    # The chain cannot be followed: it is given back used with length 0, and the ring goes on.
    NEXT_RANGE = "RING_E_NEXT_RANGE"  # split: next is below the table's size (2.7.5)
    LOOP = "RING_E_LOOP"  # split: no more descriptors than the table has, hence no cycle (2.7.5.2)
    ORDER = "RING_E_ORDER"  # device-readable buffers come before device-writable ones (2.7.4.2, 2.8.17)
    LENGTH = "RING_E_LENGTH"  # no chain is longer than 4 GiB (2.7.5.2); this device takes one byte less
    INDIRECT_OFF = "RING_E_INDIRECT_OFF"  # only if the feature was negotiated (2.7.5.3.1, 2.8.19)
    INDIRECT_NEXT = "RING_E_INDIRECT_NEXT"  # never with NEXT; packed: nor in a list (2.7.5.3.1, 2.8.19)
    INDIRECT_NESTED = "RING_E_INDIRECT_NESTED"  # split: no INDIRECT inside an indirect table (2.7.5.3.1)
    INDIRECT_LENGTH = "RING_E_INDIRECT_LENGTH"  # whole entries of 16 bytes, and not too many (2.7.5.3, 2.8.7)
    UNMAPPED = "RING_E_UNMAPPED"  # a buffer, or an indirect table, lies in guest memory
    PIECES = "RING_E_PIECES"  # a limit of this device: so many separate runs of memory (2.7.4.1, 2.8.18)

    # The ring itself has lost its meaning: the device stops looking at it.
    AVAIL_AHEAD = "RING_E_AVAIL_AHEAD"  # split: no more chains available than fit into the ring (2.7.6, 2.7.13)
    HEAD_RANGE = "RING_E_HEAD_RANGE"  # split: an available entry names a descriptor of the table (2.7.6)
    ENDLESS = "RING_E_ENDLESS"  # packed: a list is no longer than the ring (2.8.17)

    # The ring cannot be set up.
    QUEUE_SIZE = "RING_E_QUEUE_SIZE"  # 1 to 32768; split: a power of two (2.7, 2.8, 2.8.10.1)
    RING_ALIGNMENT = "RING_E_RING_ALIGNMENT"  # 16, 2 and 4 bytes; packed: 16, 4 and 4 (2.7.1, 2.8.11)
    RING_UNMAPPED = "RING_E_RING_UNMAPPED"  # each part lies in one region of guest memory (2.7, 2.8.10.1)
    BASE = "RING_E_BASE"  # packed: the position to go on from lies in the ring


class RuleBroken(Exception):
    """``code``: the rule. ``at``: what it is about, an index into a ring or table; None: no index."""

    def __init__(self, code: Rule, at: int | None = None) -> None:
        super().__init__(code.value if at is None else f"{code.value} at {at}")
        self.code = code
        self.at = at


class ChainError(RuleBroken):
    """A chain that cannot be followed; ``head`` and ``slots`` are known, so push it with length 0."""

    def __init__(self, code: Rule, at: int, head: int, slots: int) -> None:
        super().__init__(code, at)
        self.head = head
        self.slots = slots


class RingBroken(RuleBroken):
    """A ring that means nothing any more. Whatever is asked of it, it answers with the rule that broke it."""


class SetupError(RuleBroken):
    """A ring that cannot be."""


class CallReason(Enum):
    """Why the driver is notified, or not (2.7.7.2, 2.8.10)."""

    NOTHING_NEW = "nothing was published since the last decision"
    FLAG_WANTS = "the driver wants to hear of everything"
    FLAG_SUPPRESSED = "the driver wants to hear of nothing"
    EVENT_REACHED = "what was just published passes the place the driver waits for"
    EVENT_AHEAD = "that place has not been reached"
    FIRST = "the first decision: what was published before the device started is not known"

    @property
    def due(self) -> bool:
        """Is the driver to be notified?"""
        return self in (CallReason.FLAG_WANTS, CallReason.EVENT_REACHED, CallReason.FIRST)
