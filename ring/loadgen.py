"""The load generator from Python: a driver's thread in C on a queue made here (contract: core/driver.h).

    queue = DriverQueue(memory, size=256, features=features)
    with LoadGenerator(queue, Role.TRANSMIT, frames=1_000_000, frame_bytes=1514) as load:
        load.start()
        load.wait(60)
        print(load.stats())

It takes over a fresh DriverQueue, its addresses and eventfds included, so that whoever hands queues to a
device need not know whether Python or C drives them. It trusts its memory: truncating that under it ends
the process.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from ring import sources
from ring.build import ExtensionError, check_digest
from ring.driver import DriverQueue

try:
    from ring._driver import ffi, lib
except ImportError as error:
    raise ExtensionError(f"the C extension ring._driver cannot be loaded ({error}); "
                         "build it with: pip install -e .") from error

check_digest(ffi.string(lib.driver_sources_digest()).decode(), Path(__file__).resolve().parent,
             "ring._driver", sources.driver_digest)

# enum driver_error, as the names are printed
ERRORS = ("used_ahead", "unknown_head", "bad_length", "bad_merge", "stall", "lost_call", "bad_stamp",
          "bad_body", "bad_order", "bad_event")

# Broadcast, from a locally administered address, EtherType 0x88B5: IEEE 802 local experiments.
ETHERNET_PREFIX = bytes.fromhex("ffffffffffff 020000000001 88b5")


class Role(IntEnum):
    """What the thread does with its queue (enum driver_role)."""

    TRANSMIT = lib.DRIVER_TRANSMIT
    RECEIVE = lib.DRIVER_RECEIVE


@dataclass(frozen=True)
class LoadStats:
    """Counters since the start; see struct driver_stats. errors: name (ERRORS) -> times, zeros left out."""

    frames: int
    bytes: int
    lost: int
    foreign: int
    buffers: int
    publications: int
    kicks: int
    calls: int
    sleeps: int
    errors: Mapping[str, int]


class LoadGenerator:
    """A driver's thread on ``queue``, which nothing else may use meanwhile.

    frames: how many to send or receive; 0: until stopped. frame_bytes: length of a frame sent, or room of
    one receive buffer, without the net header. batch: frames made visible at once. pieces: descriptors of
    a frame (2 or more: the header has its own). indirect: in an indirect table. busy_poll: never sleep.
    full: write or check whole bodies. stall_ms: give up after so long without progress (0: never).
    interval_ns: send a batch each so many nanoseconds, 0: as fast as the device takes them. partner: with an
    interval, a receiver that is never started itself and outlives this one: the sender's thread takes its
    frames between two of its own, and ``partner.latencies()`` tells how long they took.
    header: the 12-byte virtio_net_hdr sent. prefix: 14 to 64 bytes every frame begins with.

    Raises ValueError for numbers that make no sense together, OutOfGuestMemory when buffers do not fit.
    """

    def __init__(self, queue: DriverQueue, role: Role, *, frames: int = 0, frame_bytes: int = 1514,
                 batch: int = 32, pieces: int = 1, indirect: bool = False, busy_poll: bool = False,
                 full: bool = True, stall_ms: int = 10_000, interval_ns: int = 0,
                 partner: "LoadGenerator | None" = None, header: bytes = bytes(12),
                 prefix: bytes = ETHERNET_PREFIX) -> None:
        if len(header) != 12 or not 14 <= len(prefix) <= 64:
            raise ValueError(f"the header has {len(header)} bytes (12 wanted), "
                             f"the prefix {len(prefix)} (14 to 64)")
        self._handle = ffi.NULL
        self._memory = queue.memory
        self._area: int | None = None
        self._lent = []
        config = ffi.new("struct driver_config *", {
            "role": role, "size": queue.ring.size, "base": queue.base, "features": queue.features,
            "kick": queue.kick_fd, "call": queue.call_fd, "frames": frames, "frame_bytes": frame_bytes,
            "batch": batch, "pieces": pieces, "indirect": indirect, "busy_poll": busy_poll, "full": full,
            "stall_ms": stall_ms, "interval_ns": interval_ns,
            "partner": partner._handle if partner else ffi.NULL,
            "header": header, "prefix": prefix, "prefix_bytes": len(prefix)})
        area_bytes = lib.driver_area_bytes(config)
        if not area_bytes:
            raise ValueError(f"{frames} frames of {frame_bytes} bytes, {pieces} descriptors each, in batches "
                             f"of {batch} on a ring of {queue.ring.size} make no sense")
        try:
            self._area = self._memory.alloc(area_bytes, align=64)
            config.area_gpa = self._area
            config.area = self._lend(self._area, area_bytes)
            config.desc, config.avail, config.used = (self._lend(*area) for area in queue.ring.areas)
            self._handle = lib.driver_new(config)
            if self._handle == ffi.NULL:
                raise OSError(ffi.errno, os.strerror(ffi.errno))
        except BaseException:
            self.close()
            raise

    def _lend(self, gpa: int, length: int):
        self._lent.append(ffi.from_buffer("uint8_t[]", self._memory.view(gpa, length), require_writable=True))
        return self._lent[-1]

    def __enter__(self) -> "LoadGenerator":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def start(self) -> None:
        """Start the thread. Raises OSError."""
        error = lib.driver_start(self._handle)
        if error:
            raise OSError(error, f"cannot start the load generator: {os.strerror(error)}")

    def wait(self, seconds: float) -> bool:
        """Wait until it has ended: all frames done, or an error that leaves nothing to go on with."""
        return bool(lib.driver_wait(self._handle, int(seconds * 1000)))

    def stop(self) -> None:
        """End the thread now. Chains that are outstanding stay with the device."""
        lib.driver_stop(self._handle)

    def stats(self) -> LoadStats:
        """The counters, at any time."""
        c = ffi.new("struct driver_stats *")
        lib.driver_stats_get(self._handle, c)
        return LoadStats(c.frames, c.bytes, c.lost, c.foreign, c.buffers, c.publications, c.kicks, c.calls,
                         c.sleeps, {name: c.errors[i] for i, name in enumerate(ERRORS) if c.errors[i]})

    def latencies(self) -> dict[int, int]:
        """As a partner: nanoseconds (a little less than they were: the beginning of a class, each a sixteenth wide) ->
        how many frames took so long; ever growing."""
        counts = ffi.new("uint64_t[]", lib.DRIVER_LATENCIES)
        lib.driver_latencies_get(self._handle, counts)
        return {lib.driver_latency_ns(index): n for index, n in enumerate(counts) if n}

    def close(self) -> None:
        """Stop, and give the memory back. Idempotent. The device must have let go of the queue."""
        if self._handle != ffi.NULL:
            lib.driver_free(self._handle)
            self._handle = ffi.NULL
        for lent in self._lent:
            ffi.release(lent)
        self._lent.clear()
        if self._area is not None:
            self._memory.free(self._area)
            self._area = None
