"""What the core's status codes mean, in one table: the exception class, the rule and its section.

The class says what follows: ``ChainError``: the chain goes back used with length 0 and the ring goes on;
``RingBroken``: the ring stops until the front-end sets it up again; ``MemoryGone``: the whole device has
lost its memory; ``SetupError``: the control plane asked for something that cannot be.
"""

from ring.build import lib


class RingError(Exception):
    """A rule of the virtqueue was broken. ``code`` is the ``RING_E_*`` name, ``at`` the index it is about
    (a descriptor, a head or an available index; None where there is none). ``head`` and ``slots`` are those of
    the chain, if it is about one."""

    def __init__(self, code: str, text: str, at: int | None = None, head: int | None = None, slots: int = 1):
        super().__init__(text)
        self.code = code
        self.at = at
        self.head = head
        self.slots = slots


class ChainError(RingError):
    """The guest's chain cannot be followed; ``head`` must be pushed back with length 0."""


class RingBroken(RingError):
    """The ring has lost its meaning and is not looked at any more."""


class MemoryGone(RingBroken):
    """Guest memory, or the dirty log, vanished under us: its file was truncated, or its file system ran out of
    room."""


class TranslationMissing(RingError):
    """A translation for the chain is not known yet: it is given back, and popped again when the front-end has sent
    it."""


class SetupError(RingError):
    """The ring or memory cannot be set up as asked."""


class QueueBusy(RingError):
    """The queue is lent to a pump, which alone may touch it."""


# status -> (exception, rule in words; {at} is the index in question)
_TABLE = {
    "RING_E_NEXT_RANGE": (ChainError, "descriptor {at}: next is outside the table (virtio 2.7.5)"),
    "RING_E_LOOP": (ChainError, "descriptor {at}: more descriptors than the table has, so the chain is a cycle "
                                "(virtio 2.7.5.2)"),
    "RING_E_PIECES": (ChainError, "descriptor {at}: more than 1023 separate pieces of memory in one chain"),
    "RING_E_ORDER": (ChainError, "descriptor {at}: device-readable after a device-writable one (virtio 2.7.4.2, "
                                 "2.8.17)"),
    "RING_E_INDIRECT_OFF": (ChainError, "descriptor {at}: INDIRECT was not negotiated (virtio 2.7.5.3.1, 2.8.19)"),
    "RING_E_INDIRECT_NEXT": (ChainError, "descriptor {at}: INDIRECT and NEXT together, or, on a packed ring, "
                                         "INDIRECT inside a chain (virtio 2.7.5.3.1, 2.8.19)"),
    "RING_E_INDIRECT_NESTED": (ChainError, "descriptor {at}: INDIRECT inside an indirect table (virtio 2.7.5.3.1)"),
    "RING_E_INDIRECT_LENGTH": (ChainError, "descriptor {at}: the indirect table's length is zero, no multiple of 16, "
                                           "or too large (virtio 2.7.5.3, 2.8.7)"),
    "RING_E_UNMAPPED": (ChainError, "descriptor {at}: its address range is not in guest memory"),
    "RING_E_LENGTH": (ChainError, "descriptor {at}: the chain is longer than 4 GiB (virtio 2.7.5.2)"),
    "RING_E_DENIED": (ChainError, "descriptor {at}: the guest's IOMMU does not let the device use its buffer in this "
                                  "way (vhost-user, \"IOMMU support\")"),
    "RING_E_MISS": (TranslationMissing, "descriptor {at}: where its buffer lies is not known yet (vhost-user, \"IOMMU "
                                        "support\")"),
    "RING_E_AVAIL_AHEAD": (RingBroken, "available index {at} is ahead by more than the queue size (virtio 2.7.6)"),
    "RING_E_HEAD_RANGE": (RingBroken, "the available ring names descriptor {at}, which is outside the table "
                                      "(virtio 2.7.6)"),
    "RING_E_MEMORY_GONE": (MemoryGone, "guest memory vanished: its file was truncated or its file system is full"),
    "RING_E_LOG_GONE": (MemoryGone, "the dirty log vanished: its file was truncated or its file system is full"),
    "RING_E_ENDLESS": (RingBroken, "the chain at slot {at} goes once around the ring without an end (virtio 2.8.17)"),
    "RING_E_POSITION": (RingBroken, "it is not known where the predecessor of this back-end stood: the descriptors "
                                    "contradict the front-end's base (slot {at}), and there is no journal that fits "
                                    "them (virtio 2.8.1)"),
    "RING_E_QUEUE_SIZE": (SetupError, "the queue size must be between 1 and 32768, and for a split ring a power of two "
                                      "(virtio 2.7, 2.8.10.1)"),
    "RING_E_RING_ALIGNMENT": (SetupError, "descriptor table, available and used ring must be aligned to 16, 2 and 4 "
                                          "bytes, a packed ring's parts to 16, 4 and 4 (virtio 2.7, 2.8.10.1)"),
    "RING_E_BASE": (SetupError, "the base names a slot outside the packed ring"),
    "RING_E_RING_UNMAPPED": (SetupError, "a part of the ring is not inside one shared memory region; is all of the "
                                         "guest's memory shared (share=on)?"),
    "RING_E_REGION": (SetupError, "memory regions are empty, overflow or overlap"),
    "RING_E_NOMEM": (SetupError, "out of memory, address space or descriptors"),
    "RING_E_BUSY": (QueueBusy, "the queue is lent to a pump"),
    "RING_E_GUARD": (SetupError, "the SIGBUS guard does not work here; another handler replaced it"),
}

_NAMES = {getattr(lib, name): name for name in _TABLE}


def named(name: str, at: int | None = None, head: int | None = None, slots: int = 1) -> RingError:
    """The exception for the code ``name`` (a RING_E_* name); raise what this returns."""
    kind, text = _TABLE[name]
    return kind(name, text.format(at="?" if at is None else at), at, head, slots)


def error(status: int, at: int | None = None, head: int | None = None, slots: int = 1) -> RingError:
    """The exception for a negative status of the core; raise what this returns."""
    return named(_NAMES[status], at, head, slots)
