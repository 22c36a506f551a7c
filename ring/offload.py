"""Checksums completed and frames cut into segments in software (plane/offload.h), from Python.

Specification: virtio 1.2, sections 5.1.6.2 "Packet Transmission" and 5.1.6.4 "Processing of Incoming Packets".
"""

from ring.build import ffi, lib

# Why nothing can be done with a frame: enum offload_status, from -1 downwards.
REASONS = ("kind", "headers", "ethertype", "ip", "fragment", "protocol", "transport", "checksum", "size", "room")


class OffloadError(ValueError):
    """What the net header says does not fit the frame. ``reason``: one of REASONS."""

    def __init__(self, status: int):
        self.reason = REASONS[-status - 1]
        super().__init__(f"what the net header asks for cannot be done with this frame: {self.reason}")


def complete_checksum(frame: bytes, csum_start: int, csum_offset: int) -> bytes:
    """The frame with the checksum that NEEDS_CSUM leaves to the device: over everything from byte ``csum_start`` on,
    written ``csum_offset`` bytes behind that. Raises OffloadError if it would lie outside the frame."""
    private = bytearray(frame)
    _check(lib.offload_checksum(ffi.from_buffer("uint8_t[]", private), len(private), ffi.NULL, csum_start, csum_offset))
    return bytes(private)


def segments(header: bytes, frame: bytes, fragment_id: int = 0) -> list[bytes]:
    """Cut ``frame`` as the 12 bytes ``header`` before it say; each segment is whole, with its checksums.
    fragment_id: the identification of fragments over IPv6. Raises OffloadError if header and frame do not fit."""
    if len(header) != lib.NET_HEADER:
        raise ValueError(f"a net header has {lib.NET_HEADER} bytes, not {len(header)}")
    segmenter = ffi.new("struct segmenter *")
    whole = ffi.from_buffer("uint8_t[]", frame)
    count = _check(lib.segmenter_start(segmenter, ffi.from_buffer("struct net_header *", header), whole, len(frame),
                                       len(frame), fragment_id))
    room = ffi.new("uint8_t[]", lib.FRAME_ROOM)
    return [bytes(ffi.buffer(room, _check(lib.segmenter_write(segmenter, whole, room, len(room)))))
            for _ in range(count)]


def _check(status: int) -> int:
    if status < 0:
        raise OffloadError(status)
    return status
