"""The switch from Python: a fabric and its members (contract: plane/fabric.h; how it works: plane/fabric.c).

Frames move in the workers of the lanes that name a member (LaneConfig.member). What is here belongs to the control
thread: who is there, time, counters.
"""

import os
from collections.abc import Sequence

from ring.build import ffi, lib
from ring.errors import QueueBusy, error
from ring.receive_settings import ReceiveSettings, as_struct

MEMBERS = lib.FABRIC_MEMBERS
DOORS = lib.FABRIC_DOORS
ADDRESSES = lib.FABRIC_ADDRESSES
LIFETIME = lib.FABRIC_LIFETIME  # ticks


class FabricFull(Exception):
    """A switch has as many members as it can have."""


class Member:
    """One port of a switch, down at first; made by :meth:`Fabric.join`."""

    def __init__(self, fabric: "Fabric", handle: object) -> None:
        self.fabric = fabric
        self.handle = handle
        self.number: int = lib.member_number(handle)
        self._settings: tuple[ReceiveSettings, tuple[int, ...]] | None = None

    def spread(self, doors: int) -> None:
        """Flows to it are spread over the doors 0 to ``doors`` - 1; 0: it is down, and what was behind it forgotten.
        To be called while its lanes are detached."""
        lib.member_spread(self.handle, doors)

    def receive(self, settings: ReceiveSettings | None, doors: Sequence[int], timeout_ms: int = 1000) -> None:
        """What its driver has set from now on; None: nothing. doors: which receiveq, by number, is behind door 0, 1,
        ... To be called while its lanes are detached; no frame comes any more by what held before.

        Raises QueueBusy when a sender does not let go of frames for it in time; ValueError as ``as_struct``."""
        wanted = settings and (settings, tuple(doors))
        if wanted == self._settings:
            return
        made = ffi.NULL if settings is None else as_struct(settings, doors)
        status = lib.member_receive(self.handle, made, timeout_ms)
        if status == lib.RING_E_BUSY:
            raise QueueBusy("RING_E_BUSY", f"a sender did not let go of its frames within {timeout_ms} ms")
        if status < 0:
            raise error(status)
        self._settings = wanted

    def learn(self, mac: bytes) -> None:
        """The station with this address (6 bytes) is behind the member."""
        lib.member_learn(self.handle, mac)

    def missed(self) -> dict[str, int]:
        """Frames it did not get, by reasons (ring.pump.DROP_REASONS) that show before a lane of it is looked at."""
        missed = ffi.new("struct member_missed *")
        lib.member_missed(self.handle, missed)
        counts = {"busy": missed.busy, "stopped": missed.stopped, "unwanted": missed.unwanted}
        return {reason: frames for reason, frames in counts.items() if frames}

    def leave(self) -> None:
        """Leave the switch. Its lanes must be detached, and not name it any more before they are attached."""
        lib.fabric_leave(self.handle)
        self.fabric.left()

    def abandon(self) -> None:
        """A worker is stuck with a lane of it: it is down for good, and its place is not given to another."""
        lib.member_abandon(self.handle)


class Fabric:
    """One learning Ethernet switch. seed: what decides where addresses are kept; nobody outside should know it.
    wire: it is none, and passes on whatever comes."""

    def __init__(self, seed: int | None = None, *, wire: bool = False) -> None:
        self._handle = lib.fabric_new(int.from_bytes(os.urandom(8), "little") if seed is None else seed)
        if self._handle == ffi.NULL:
            raise OSError(ffi.errno, os.strerror(ffi.errno))
        if wire:
            lib.fabric_make_wire(self._handle)
        self._members = 0

    def join(self, *, uplink: bool = False) -> Member:
        """A new member. uplink: its one lane has a descriptor in the place of queues. Raises FabricFull."""
        handle = lib.fabric_join(self._handle, uplink)
        if handle == ffi.NULL:
            raise FabricFull(f"a switch has {MEMBERS} members at the most")
        self._members += 1
        return Member(self, handle)

    def left(self) -> None:
        """A member has left."""
        self._members -= 1

    def tick(self) -> None:
        """Time passes: addresses not seen for LIFETIME ticks are forgotten."""
        lib.fabric_tick(self._handle)

    @property
    def known(self) -> int:
        """How many addresses are known."""
        return lib.fabric_known(self._handle)

    def find(self, mac: bytes) -> int | None:
        """The number of the member behind which ``mac`` (6 bytes) is; None: not known."""
        number = lib.fabric_find(self._handle, mac)
        return None if number < 0 else number

    def close(self) -> None:
        """Free it. With members that were abandoned it stays, for the workers that are stuck in them."""
        if self._handle != ffi.NULL and not self._members:
            lib.fabric_free(self._handle)
        self._handle = ffi.NULL
