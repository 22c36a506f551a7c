"""struct virtio_net_hdr before every frame: the checks of the pump (plane/header.c) for whoever moves frames in
Python.

Specification: virtio 1.2, sections 5.1.6 "Device Operation", 5.1.6.2 "Packet Transmission" and 5.1.6.4 "Processing
of Incoming Packets".
"""

from ring.build import ffi, lib
from ring.pump import DROP_REASONS


class Header:
    """A private copy of the 12 bytes ``data``. Raises ValueError for another number of them."""

    def __init__(self, data: bytes = bytes(lib.NET_HEADER)):
        if len(data) != lib.NET_HEADER:
            raise ValueError(f"a net header has {lib.NET_HEADER} bytes, not {len(data)}")
        self._c = ffi.new("struct net_header *")
        ffi.buffer(self._c)[:] = data

    def __bytes__(self) -> bytes:
        """The 12 bytes, as they lie before a frame."""
        return bytes(ffi.buffer(self._c))

    @property
    def segmented(self) -> bool:
        """Is the frame one that has to be segmented (gso_type)?"""
        return self._c.gso_type != 0

    def set_num_buffers(self, count: int) -> None:
        """How many receive buffers the frame is spread over (5.1.6.4)."""
        self._c.num_buffers = count

    def from_guest(self, length: int, features: int, gso_size_min: int) -> str | None:
        """Check what the driver said about a frame of ``length`` bytes, and clean it for the port -> None, or the
        reason (DROP_REASONS) why the frame is lost. features: negotiated. gso_size_min: bytes a segment has at
        least."""
        return _reason(lib.header_from_guest(self._c, length, features, gso_size_min))

    def to_guest(self, features: int) -> str | None:
        """Clean what the port said for a driver that negotiated ``features`` -> None, or the reason (DROP_REASONS)
        why it cannot have the frame. num_buffers becomes 1."""
        return _reason(lib.header_to_guest(self._c, features))


def _reason(code: int) -> str | None:
    return DROP_REASONS[code] if code else None
