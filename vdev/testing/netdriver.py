"""A virtio-net driver in plain Python: one queue pair, frames in and out.

It does what a guest's driver does and no more: it knows rings (ring/driver.py) and the header before each
frame, but neither sockets nor negotiation. Whoever uses it hands ``memory.regions``, the queues' addresses
and their eventfds to a device, and tells it which features were negotiated.

Specification: virtio 1.2, sections 5.1.6 "Device Operation" and 5.1.6.4 "Processing of Incoming Packets".
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from struct import Struct

from ring.driver import DeviceError, DriverQueue, GuestMemory
from vdev.net.features import GUEST_GSO, Feature

_HEADER = Struct("<BBHHHHH")
_HASH = Struct("<IHH")  # hash_value, hash_report, padding: what HASH_REPORT adds to it

NEEDS_CSUM = 1  # flags
DATA_VALID = 2
GSO_NONE = 0  # gso_type
GSO_TCPV4 = 1
GSO_UDP = 3
GSO_TCPV6 = 4
GSO_UDP_L4 = 5
GSO_ECN = 0x80

MERGEABLE_BUFFER = 1536
PLAIN_BUFFER = _HEADER.size + 1514
GSO_BUFFER = _HEADER.size + 65550  # 5.1.6.3.1: 65562 in all


@dataclass(frozen=True)
class NetHeader:
    """struct virtio_net_hdr, 12 bytes. Lengths and offsets in bytes, csum_offset from csum_start."""

    flags: int = 0
    gso_type: int = GSO_NONE
    hdr_len: int = 0
    gso_size: int = 0
    csum_start: int = 0
    csum_offset: int = 0
    num_buffers: int = 0

    SIZE = _HEADER.size

    def pack(self) -> bytes:
        """The 12 bytes."""
        return _HEADER.pack(self.flags, self.gso_type, self.hdr_len, self.gso_size, self.csum_start,
                            self.csum_offset, self.num_buffers)

    @classmethod
    def unpack(cls, data: bytes) -> "NetHeader":
        """From the first 12 bytes of ``data``. Raises DeviceError when there are fewer."""
        if len(data) < cls.SIZE:
            raise DeviceError(f"the used length {len(data)} does not cover the {cls.SIZE}-byte header")
        return cls(*_HEADER.unpack_from(data))


@dataclass(frozen=True)
class Received:
    """One frame from the device. buffers: how many chains it was spread over. The hash is that of its header with
    HASH_REPORT; 0: none."""

    header: NetHeader
    frame: bytes
    buffers: int
    hash_report: int = 0
    hash_value: int = 0


class NetDriver:
    """One queue pair in ``memory``.

    size: descriptors of each queue. features: negotiated mask. buffer_size: bytes of one receive buffer,
    header included; None: what a driver with these features posts (5.1.6.3.1). base: where both rings
    start, as SET_VRING_BASE carries it; None: fresh. lenient: without MRG_RXBUF a frame has one buffer, whatever
    num_buffers says.
    """

    def __init__(self, memory: GuestMemory, *, size: int = 256, features: int = 0,
                 buffer_size: int | None = None, base: int | None = None, lenient: bool = False) -> None:
        self.memory = memory
        self.lenient = lenient
        self.features = features
        self.mergeable = bool(features >> Feature.MRG_RXBUF & 1)
        if buffer_size is None:
            buffer_size = GSO_BUFFER if features & GUEST_GSO else PLAIN_BUFFER
            if self.mergeable:
                buffer_size = MERGEABLE_BUFFER
        self.buffer_size = buffer_size + self._hash_size
        self.receiveq = DriverQueue(memory, size, features, base=base)
        self.transmitq = DriverQueue(memory, size, features, base=base)

    @property
    def _hash_size(self) -> int:
        """Bytes that HASH_REPORT adds to the header, if it was negotiated."""
        return _HASH.size if self.features >> Feature.HASH_REPORT & 1 else 0

    def __enter__(self) -> "NetDriver":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -------------------------------------------------------------------------------------- receiveq

    def fill(self, count: int | None = None) -> None:
        """Post ``count`` receive buffers (None: as many as the queue has descriptors), publish, kick."""
        for _ in range(self.receiveq.ring.size - self.receiveq.outstanding if count is None else count):
            self.receiveq.post(writable=[self.buffer_size])
        self.receiveq.submit()

    def receive(self, *, refill: bool = True) -> Received | None:
        """Take the next frame, or None. refill: post as many buffers again.

        Raises DeviceError when the device broke a rule: fewer used buffers than num_buffers says, a
        num_buffers other than 1 without MRG_RXBUF.
        """
        first = self.receiveq.collect()
        if first is None:
            return None
        header = NetHeader.unpack(first.data)
        count = 1 if self.lenient and not self.mergeable else header.num_buffers
        if count < 1 or (count > 1 and not self.mergeable):
            raise DeviceError(f"num_buffers is {header.num_buffers}")
        begins = NetHeader.SIZE + self._hash_size
        if len(first.data) < begins:
            raise DeviceError(f"the used length {len(first.data)} does not cover the {begins}-byte header")
        hash_value, hash_report, _ = _HASH.unpack_from(first.data, NetHeader.SIZE) if self._hash_size else (0, 0, 0)
        parts = [first.data[begins:]]
        for _ in range(count - 1):
            more = self.receiveq.collect()
            if more is None:
                raise DeviceError(f"num_buffers is {header.num_buffers}, but {len(parts)} buffers were used")
            parts.append(more.data)
        if refill:
            self.fill(len(parts))
        return Received(header, b"".join(parts), len(parts), hash_report, hash_value)

    def receive_within(self, seconds: float, *, refill: bool = True) -> Received | None:
        """As :meth:`receive`, but wait for a notification up to ``seconds``."""
        received = self.receive(refill=refill)
        if received is None and self.receiveq.wait(seconds):
            received = self.receive(refill=refill)
        return received

    # ------------------------------------------------------------------------------------- transmitq

    def offer(self, frame: bytes, header: NetHeader = NetHeader(), *, cuts: Sequence[int] = (),
              direct: int | None = None) -> int:
        """Put a frame on the transmitq without telling the device -> its head.

        cuts: positions in header + frame where one descriptor ends and the next begins; none: one
        descriptor. direct: see DriverQueue.add. Raises RingFull.
        """
        data = header.pack() + bytes(self._hash_size) + frame
        bounds = [0, *cuts, len(data)]
        parts = [data[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]
        return self.transmitq.post(readable=parts, direct=direct)

    def transmit(self, frame: bytes, header: NetHeader = NetHeader(), *, cuts: Sequence[int] = (),
                 direct: int | None = None) -> int:
        """:meth:`offer`, publish, and kick if the device wants it -> the head."""
        head = self.offer(frame, header, cuts=cuts, direct=direct)
        self.transmitq.submit()
        return head

    def reclaim(self) -> int:
        """Take back what the device has sent -> how many chains. Raises DeviceError if it "wrote" to any."""
        return len(self.transmitq.collect_all())

    def reclaim_all(self, seconds: float) -> bool:
        """Wait until every transmitted chain is back -> False if that takes longer than ``seconds``."""
        deadline = time.monotonic() + seconds
        self.reclaim()
        while self.transmitq.outstanding:
            left = deadline - time.monotonic()
            if left <= 0 or not self.transmitq.wait(left):
                return False
            self.reclaim()
        return True

    def close(self) -> None:
        """Free both queues. Idempotent."""
        self.receiveq.close()
        self.transmitq.close()
