"""The control queue over one session, for front-ends that leave it to the device (virtio 1.2, 5.1.6.5).

Theory of operation. The control queue is a ring like the others, made and moved and stopped with them
(vdev/session_rings.py), but no worker has it: commands are rare, and what they change belongs to the control thread. So
it is walked here, by the step calls of ring/virtqueue.py, whenever its kick comes.

What a command means is in vdev/net/control/, as functions from bytes to new settings. Here the settings take effect,
with the engine paused, before the command's buffer is used: what a driver has been acknowledged holds for every frame
that comes from then on.

Settings last until the driver is reset. A front-end that only stops a guest for a while sets the status to 0 as well,
so what held before is kept, and holds again when the control queue goes on from where it was rather than anew. Where it
goes on and nothing is known, because another vdev was here before, everything is let in.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from ring.errors import ChainError, MemoryGone, RingBroken
from ring.receive_settings import ALL_HASH_TYPES, ALL_TUNNEL_TYPES, ReceiveSettings
from ring.virtqueue import Chain, VirtQueue
from vdev.engine import Engine, Ring
from vdev.guest_config import GuestConfig
from vdev.logs import EventLog
from vdev.net.control.command import ERR, OK, Context, Rejected
from vdev.net.control.commands import execute
from vdev.net.features import Feature, mask
from vdev.reverse import ReverseChannel
from vhost_user.fds import signal

COMMAND_MAX = 64 * 1024  # bytes; the longest that makes sense lists some thousand addresses
TURN = 16  # commands before others have their turn
POLL = 0.02  # seconds between looks at a control queue without a kick
REASONS_MAX = 64  # of which one line each is logged


def initial_settings(features: int, mac: bytes) -> ReceiveSettings | None:
    """What holds for a driver that has negotiated ``features`` and said nothing yet. None: it cannot say anything."""
    if not features & mask(Feature.CTRL_VQ):
        return None
    return ReceiveSettings(mac=mac, filter_macs=bool(features & mask(Feature.CTRL_RX)),
                           filter_vlans=bool(features & mask(Feature.CTRL_VLAN)))


class ControlQueue:
    """Serves the control queue of one session. on_broken: called when the ring has stopped for good."""

    def __init__(self, engine: Engine, config: GuestConfig, reverse: ReverseChannel, log: EventLog,
                 on_broken: Callable[[], None]) -> None:
        self._on_broken = on_broken
        self._engine = engine
        self._config = config
        self._reverse = reverse
        self._log = log
        self._features = 0  # for which there are settings
        self._before: ReceiveSettings | None = None  # what held before a reset that may have been none
        self._seen: tuple[VirtQueue | None, int] = (None, -1)  # the queue and its kick, as last looked at
        self._kick = -1  # watched
        self._commands = self._done = 0
        self._said: set[str] = set()
        self.deadline: float | None = None  # when serve() is due (time.monotonic) without a kick
        self.watch: Callable[[bytes, Context], None] | None = None  # is shown each command before it is executed

    @property
    def _ring(self) -> Ring | None:
        """The ring, while it is to be served."""
        control = self._engine.control
        if control is None:
            return None
        ring = self._engine.rings[control]
        return ring if ring.enabled and ring.queue is not None and ring.queue.state.broken is None else None

    # ----------------------------------------------------------------------------------- what has changed

    def settle(self) -> None:
        """Features or rings may have changed. Raises EngineStuck, MemoryGone."""
        features = self._engine.features
        if features != self._features:
            self._features = features
            self._engine.set_settings(initial_settings(features, self._config.space.mac))
        ring = self._ring
        queue, kick = (None, -1) if ring is None else (ring.queue, ring.kick)
        before, self._seen = self._seen, (queue, kick)
        if kick != self._kick:
            self.forget(self._kick)
            if kick >= 0:
                # Not read: its owner could take O_NONBLOCK and what is in it away before that, and we would wait.
                self._reverse.watch(kick, self.serve, edges=True)
                self._kick = kick
        if queue is not None and queue is not before[0]:
            self._resume(queue)
        if self._seen != before:
            self.serve()

    def reset(self) -> None:
        """The driver was reset, as far as that can be told. Raises EngineStuck."""
        self._before = self._engine.settings
        self._config.reset()
        self._engine.set_settings(initial_settings(self._engine.features, self._config.space.mac))

    @property
    def lasting(self) -> ReceiveSettings | None:
        """What has to hold where the guest goes on."""
        return self._before or self._engine.settings

    def recall(self, settings: ReceiveSettings) -> None:
        """The guest comes from elsewhere, where this held."""
        self._before = settings
        self._config.update(mac=settings.mac)

    def ask_to_announce(self) -> None:
        """Have the driver announce its guest to the network, if it can (virtio 1.2, 5.1.6.5.4)."""
        if self._engine.features & mask(Feature.GUEST_ANNOUNCE):
            self._config.change(announce=True)

    def _resume(self, queue: VirtQueue) -> None:
        """The control queue begins to run."""
        state, before = queue.state, self._before
        self._before = None
        if state.next_avail == 0 and (state.avail_wrap or not state.packed):
            return
        if before is None and self._commands == 0:
            settings = replace(self._engine.settings, promiscuous=True, pairs=self._engine.queue_pairs)
            self._log.warning("settings-unknown", "the guest's driver goes on, and what it told the vdev before by the "
                              "control queue is not known: every frame is let in, to any queue pair; resetting the "
                              "driver (reboot, or unbind and bind it) has it tell again")
            self._take(settings)
        elif before is not None:
            self._take(before)

    def forget(self, fd: int) -> None:
        """``fd`` is about to be closed. Harmless when it is not the kick that is watched."""
        if fd >= 0 and fd == self._kick:
            self._reverse.unwatch(fd)
            self._kick = -1

    def close(self) -> None:
        """End of the session."""
        self.forget(self._kick)
        self.deadline = None

    # ------------------------------------------------------------------------------------------ commands

    def serve(self) -> None:
        """Execute what waits, a bounded number of commands. Raises EngineStuck, MemoryGone."""
        ring = self._ring
        self.deadline = None
        if ring is None:
            return
        try:
            for _ in range(TURN):
                if not self._next(ring) and not ring.queue.arm():
                    break
            else:
                self.deadline = time.monotonic()
        except MemoryGone:
            raise
        except RingBroken:
            if ring.err >= 0:
                signal(ring.err)
            self._on_broken()
            return
        if self.deadline is None and ring.kick < 0:
            self.deadline = time.monotonic() + POLL

    def _next(self, ring: Ring) -> bool:
        """Execute one command -> was there one?"""
        queue = ring.queue
        try:
            chain = queue.pop()
        except ChainError as bad:
            self._complain(f"a chain of the control queue cannot be followed: {bad}")
            queue.push(bad, 0)
        else:
            if chain is None:
                return False
            queue.push(chain, self._execute(chain))
        queue.publish()
        if queue.decide().due and ring.call >= 0:
            signal(ring.call)
        return True

    def _execute(self, chain: Chain) -> int:
        """Execute the command in ``chain`` -> bytes written to it."""
        self._commands += 1
        self._done += 1  # a command that asks for statistics is in them
        try:
            if not chain.writable_len:
                raise Rejected("a command has no room for its acknowledgement")
            if chain.readable_len > COMMAND_MAX:
                raise Rejected(f"a command of {chain.readable_len} bytes is longer than {COMMAND_MAX}")
            command, context = chain.read(), self._context()
            if self.watch is not None:
                self.watch(command, context)
            outcome = execute(command, context)
        except Rejected as why:
            self._done -= 1
            self._complain(f"a command of the guest's driver is refused: {why} (virtio 1.2, 5.1.6.5)")
            return chain.write(bytes([ERR]))
        self._take(outcome.settings)
        if outcome.announced:
            self._config.update(announce=False)
        return chain.write(bytes([OK]) + outcome.reply)

    def _take(self, settings: ReceiveSettings) -> None:
        self._engine.set_settings(settings)
        self._config.update(mac=settings.mac)

    def _context(self) -> Context:
        engine = self._engine
        enabled = frozenset(index for index in engine.data_rings()
                            if engine.rings[index].enabled and engine.rings[index].queue is not None)
        return Context(engine.features, engine.queue_pairs, engine.settings, hash_types=ALL_HASH_TYPES,
                       tunnel_types=ALL_TUNNEL_TYPES, enabled=enabled, counters=self._counters)

    def _counters(self, index: int) -> Mapping[str, int]:
        """What vdev/net/control/statistics.py names, of queue ``index``."""
        if index == self._engine.control:
            return {"command_num": self._commands, "ok_num": self._done}
        flow, headers = self._engine.ring_stats(index)
        malformed = ("bad_chain", "bad_header", "bad_length")
        return {"notifications": flow.kicks, "packets": flow.frames, "bytes": flow.bytes, "interrupts": flow.calls,
                "drops": sum(flow.dropped.values()), "drop_overruns": flow.dropped.get("no_buffers", 0),
                "drop_malformed": sum(flow.dropped.get(reason, 0) for reason in malformed),
                "csum_valid": headers.data_valid, "needs_csum": headers.needs_csum,
                "csum_none": flow.frames - headers.needs_csum - headers.data_valid,
                "csum_bad": 0,  # nothing here looks whether a checksum is right
                "gso_packets": flow.gso_frames, "gso_bytes": headers.gso_bytes,
                "gso_packets_coalesced": 0, "gso_bytes_coalesced": 0}

    def _complain(self, text: str) -> None:
        """Once for each text."""
        if text not in self._said and len(self._said) < REASONS_MAX:
            self._said.add(text)
            self._log.peer(logging.WARNING, "command-refused", text)
