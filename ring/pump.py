"""The pump from Python: worker threads in C, and the lanes lent to them (contract: plane/pump.h).

A lane joins one queue pair to one queue of a port. While it is attached, its queues belong to the worker
and step calls on them raise QueueBusy.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import IntFlag

from ring.build import ffi, lib
from ring.errors import QueueBusy, error
from ring.fabric import Member
from ring.receive_settings import Coalescing
from ring.virtqueue import VirtQueue, guard

# enum drop_reason, as the names are printed
DROP_REASONS = ("bad_chain", "bad_header", "bad_length", "disabled", "port", "no_port", "too_small", "offload", "null",
                "filtered", "no_receiver", "busy", "no_buffers", "stopped", "unwanted")

DETACH_TIMEOUT_MS = 100
ATTACH_TIMEOUT_MS = 1000

# What a worker thread does (the sandbox of whoever has one collects these): rule, reason.
SYSCALLS = {
    "epoll_create1": "a worker's set of descriptors",
    "epoll_ctl": "lanes come and go",
    "epoll_wait": "waiting for kicks and frames",
    "epoll_pwait": "the same, on machines without epoll_wait",
    "eventfd2": "how it is woken up",
    "read": "kicks, and short frames from the port",
    "write": "calls, and short frames to the port",
    "readv": "frames from the port, straight into guest memory",
    "writev": "frames to the port, straight from guest memory",
    "poll": "a call descriptor that would block",
    "ppoll": "the same, on machines without poll",
    "futex": "commands and their answers",
    "sched_yield": "a receiveq of a switch that another worker is filling",
    "clock_nanosleep": "the same, for longer",
    "nanosleep": "the same, of older libcs",
    "timerfd_create": "a driver that wants few calls",
    "timerfd_settime": "how long it is left without one",
}


class LaneEvent(IntFlag):
    """What a worker reports (enum lane_event)."""

    FROM_GUEST_BROKEN = lib.LANE_FROM_GUEST_BROKEN
    TO_GUEST_BROKEN = lib.LANE_TO_GUEST_BROKEN
    MEMORY_GONE = lib.LANE_MEMORY_GONE
    PORT_GONE = lib.LANE_PORT_GONE
    KICKED = lib.LANE_KICKED
    LOG_GONE = lib.LANE_LOG_GONE
    MISS = lib.LANE_MISS
    DENIED = lib.LANE_DENIED


@dataclass
class Flow:
    """One direction of a lane: its started queue (None: not started), descriptors (-1: none), and when its driver is
    called."""

    queue: VirtQueue | None = None
    enabled: bool = False
    kick: int = -1
    call: int = -1
    err: int = -1
    coalescing: Coalescing = Coalescing()


@dataclass
class LaneConfig:
    """What a lane does; see struct lane_config in plane/pump.h for the units. member: None, or of a switch."""

    from_guest: Flow = field(default_factory=Flow)
    to_guest: Flow = field(default_factory=Flow)
    member: Member | None = None
    door: int = -1
    to_port: int = -1
    from_port: int = -1
    port_header: int = 12
    max_frame: int = 65550
    gso_size_min: int = 48
    mtu: int = 0
    watch_kicks: bool = False
    features: int = 0


def _added(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    """The sum of frames dropped, by reason."""
    return {reason: one.get(reason, 0) + other.get(reason, 0) for reason in DROP_REASONS
            if reason in one or reason in other}


@dataclass(frozen=True)
class FlowStats:
    """Counters of one direction, ever growing. dropped: reason (DROP_REASONS) -> frames, zeros left out. The rest: see
    struct flow_stats in plane/pump.h."""

    frames: int
    bytes: int
    gso_frames: int
    dropped: dict[str, int]
    bad_chains: int
    kicks: int
    calls: int
    calls_saved: int
    bursts: int
    cycles: int = 0  # the step engine counts none

    def __add__(self, other: "FlowStats") -> "FlowStats":
        dropped = _added(self.dropped, other.dropped)
        return FlowStats(self.frames + other.frames, self.bytes + other.bytes, self.gso_frames + other.gso_frames,
                         dropped, self.bad_chains + other.bad_chains, self.kicks + other.kicks,
                         self.calls + other.calls, self.calls_saved + other.calls_saved, self.bursts + other.bursts,
                         self.cycles + other.cycles)


    def and_lost(self, lost: Mapping[str, int]) -> "FlowStats":
        """The same with frames that were lost elsewhere, by reason."""
        return replace(self, dropped=_added(self.dropped, lost))


def _flow_stats(c) -> FlowStats:
    dropped = {reason: c.dropped[i] for i, reason in enumerate(DROP_REASONS) if c.dropped[i]}
    return FlowStats(c.frames, c.bytes, c.gso_frames, dropped, c.bad_chains, c.kicks, c.calls, c.calls_saved, c.bursts,
                     c.cycles)


@dataclass(frozen=True)
class HeaderStats:
    """What the headers of the frames of one direction said, ever growing; counted at a switch only. See struct
    header_stats in plane/pump.h."""

    needs_csum: int = 0
    data_valid: int = 0
    gso_bytes: int = 0


class Lane:
    """One queue pair at one queue of a port, or one direction of it. Counters live as long as it does. ``report`` is an
    eventfd of the caller, signalled when it has events; -1: none."""

    def __init__(self, report: int = -1):
        self._handle = lib.lane_new(report)
        if self._handle == ffi.NULL:
            raise MemoryError("a lane")
        self.config = LaneConfig()
        self._pump: Pump | None = None

    def _queues(self) -> list[VirtQueue]:
        flows = (self.config.from_guest, self.config.to_guest)
        return [flow.queue for flow in flows if flow.queue is not None]

    def configure(self, config: LaneConfig) -> None:
        """Set what the lane does. Raises QueueBusy while it is attached."""
        c = ffi.new("struct lane_config *")
        c.member = ffi.NULL if config.member is None else config.member.handle
        for name in ("door", "to_port", "from_port", "port_header", "max_frame", "gso_size_min", "mtu", "watch_kicks",
                     "features"):
            setattr(c, name, getattr(config, name))
        for flow, to in ((config.from_guest, c.from_guest), (config.to_guest, c.to_guest)):
            to.queue = flow.queue.handle if flow.queue else ffi.NULL
            to.enabled, to.kick, to.call, to.err = flow.enabled, flow.kick, flow.call, flow.err
            if flow.coalescing.packets and flow.coalescing.usecs:
                to.call_packets, to.call_usecs = flow.coalescing.packets, flow.coalescing.usecs
        status = lib.lane_configure(self._handle, c)
        if status < 0:
            raise error(status)
        self.config = config

    def stats(self) -> tuple[FlowStats, FlowStats]:
        """(from_guest, to_guest)."""
        s = ffi.new("struct lane_stats *")
        lib.lane_stats_get(self._handle, s)
        return _flow_stats(s.from_guest), _flow_stats(s.to_guest)

    def header_stats(self) -> tuple[HeaderStats, HeaderStats]:
        """(from_guest, to_guest)."""
        s = ffi.new("struct lane_stats *")
        lib.lane_stats_get(self._handle, s)
        return tuple(HeaderStats(c.needs_csum, c.data_valid, c.gso_bytes)
                     for c in (s.from_guest_headers, s.to_guest_headers))

    def guest_mac(self) -> bytes | None:
        """Where a frame came from that the guest sent since the last call, 6 bytes; None: not known. Raises QueueBusy
        while it is attached."""
        if self._pump is not None:
            raise error(lib.RING_E_BUSY)
        mac = ffi.new("uint8_t[6]")
        return bytes(ffi.buffer(mac)) if lib.lane_guest_mac(self._handle, mac) else None

    def events(self) -> LaneEvent:
        """What happened since the last call."""
        return LaneEvent(lib.lane_events(self._handle))

    @property
    def held(self) -> bytes:
        """The frame behind its net header that was read from the port and waits for buffers of the guest; empty: none.
        Raises QueueBusy while attached."""
        out = ffi.new("uint8_t[]", lib.FRAME_ROOM)
        length = lib.lane_held(self._handle, out)
        if length < 0:
            raise error(length)
        return bytes(ffi.buffer(out, length))

    def hold(self, frame: bytes) -> None:
        """Have such a frame wait, in place of what waits now. Raises QueueBusy while attached, ValueError for a length
        that no frame has."""
        if not lib.NET_HEADER < len(frame) <= lib.FRAME_ROOM:
            raise ValueError(f"a frame of {len(frame)} bytes with its net header")
        status = lib.lane_hold(self._handle, frame, len(frame))
        if status < 0:
            raise error(status)

    def close(self) -> None:
        """Free it; it must be detached."""
        if self._pump is not None:
            raise error(lib.RING_E_BUSY)
        if self._handle != ffi.NULL:
            lib.lane_free(self._handle)
            self._handle = ffi.NULL


class Pump:
    """One worker thread. cpu: the processor it runs on, None for any. poll_us: microseconds that it looks at the rings
    after the last work before it sleeps, at most (it adapts: plane/worker.c); None: it does not sleep while it has a
    lane.

    Raises OSError when it cannot be started, with EINVAL when it may not run on ``cpu``; RingError when memory that
    vanishes could not be survived.
    """

    def __init__(self, cpu: int | None = None, poll_us: int | None = 0):
        guard()
        config = ffi.new("struct pump_config *", {"cpu": -1 if cpu is None else cpu,
                                                  "poll_us": lib.POLL_ALWAYS if poll_us is None else poll_us})
        self._handle = lib.pump_new(config)
        if self._handle == ffi.NULL:
            raise OSError(ffi.errno, f"cannot start a worker thread: {os.strerror(ffi.errno)}")

    def attach(self, lane: Lane, timeout_ms: int = ATTACH_TIMEOUT_MS) -> None:
        """Lend the lane; its queues are looked at once without a kick. Raises QueueBusy when the worker does not take
        it within ``timeout_ms``: then only :meth:`give_up` is left."""
        status = lib.pump_attach(self._handle, lane._handle, timeout_ms)
        if status < 0:
            raise error(status)
        lane._pump = self
        for queue in lane._queues():
            queue.lent = True

    def detach(self, lane: Lane, timeout_ms: int = DETACH_TIMEOUT_MS) -> None:
        """Take the lane back once the worker has left it. Raises QueueBusy after ``timeout_ms``."""
        status = lib.pump_detach(self._handle, lane._handle, timeout_ms)
        if status < 0:
            raise QueueBusy("RING_E_BUSY", f"the worker did not let go within {timeout_ms} ms")
        lane._pump = None
        for queue in lane._queues():
            queue.lent = False

    def give_up(self) -> None:
        """The worker is stuck. It ends when it can; its lanes, and all that they lead to, must be kept for good."""
        lib.pump_give_up(self._handle)
        self._handle = ffi.NULL

    def close(self) -> None:
        """End the thread. All lanes must be detached."""
        if self._handle != ffi.NULL:
            lib.pump_free(self._handle)
            self._handle = ffi.NULL
