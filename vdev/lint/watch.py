"""One direction of a queue pair under watch: each step of the step engine is held against the driver's rules.

Theory of operation. The step engine (vdev/step.py) stops after each phase and says what it was. What follows the links
of a chain and refuses it is the device's own walk, so a refusal names the rule. What the device does not care about is
read from the ring (vdev/lint/raw.py): each chain once, when it is first seen, and once more when it is used, to see
that nobody changed it in between. On a split ring it is first seen when the available index covers it, on a packed one
when it is taken.

All memory belongs to a guest that may be hostile: whatever is read twice may differ, and what is remembered is bounded
by the size of the queue.
"""

from collections import deque

from ring.virtqueue import VirtQueue
from vdev.engine import ring_name
from vdev.lint import frames
from vdev.lint.findings import Findings
from vdev.lint.raw import AVAIL, NEXT, USED, WRITE, RawChain, RawQueue
from vdev.net.features import GUEST_GSO, Feature, mask
from vdev.step_flow import Phase, Step

KICK_PATIENCE = 1.0  # seconds that a chain waits for its kick; a driver that was interrupted is slow, not wrong
_INDEX_MODULO = 1 << 16

# What the device's walk refuses -> the rule, on a split and on a packed ring.
REFUSED = {
    "RING_E_NEXT_RANGE": ("LINT-NEXT", "LINT-NEXT"),
    "RING_E_LOOP": ("VQ-SPLIT-DR-05", "VQ-PACKED-DR-05"),
    "RING_E_ENDLESS": ("VQ-SPLIT-DR-05", "VQ-PACKED-DR-05"),
    "RING_E_LENGTH": ("VQ-SPLIT-DR-05", "VQ-PACKED-DR-05"),
    "RING_E_ORDER": ("VQ-SPLIT-DR-03", "VQ-PACKED-DR-06"),
    "RING_E_INDIRECT_OFF": ("VQ-SPLIT-DR-07", "VQ-PACKED-DR-09"),
    "RING_E_INDIRECT_NESTED": ("VQ-SPLIT-DR-08", "VQ-PACKED-DR-09"),
    "RING_E_INDIRECT_NEXT": ("VQ-SPLIT-DR-10", "VQ-PACKED-DR-10"),
    "RING_E_INDIRECT_LENGTH": ("LINT-TABLE", "LINT-TABLE"),
    "RING_E_UNMAPPED": ("LINT-ADDRESS", "LINT-ADDRESS"),
    "RING_E_PIECES": ("LINT-PIECES", "LINT-PIECES"),
    "RING_E_AVAIL_AHEAD": ("VQ-SPLIT-DR-11", "VQ-SPLIT-DR-11"),
    "RING_E_HEAD_RANGE": ("LINT-HEAD", "LINT-HEAD"),
}

_HEADER = frames.HEADER.size
_LEAST_BUFFER = 1526  # bytes (5.1.6.3.1)
_LEAST_GSO_BUFFER = 65562


class QueueWatch:
    """The queue ``queue`` of pair ``pair``, from when it runs until it is stopped."""

    def __init__(self, queue: VirtQueue, findings: Findings, direction: str, pair: int) -> None:
        self.queue = queue
        self._raw = RawQueue(queue)
        self._findings = findings
        self._sends = direction == "from_guest"
        self._name = ring_name(2 * pair + self._sends)
        self.mtu = 0
        # By position: split, the available index; packed, the slot and its wrap counter.
        self._seen: dict[tuple[int, bool], RawChain] = {}
        self._owners: dict[int, tuple[int, bool]] = {}  # split: descriptor -> the chain it is in
        self._taken: deque[tuple[int, bool]] = deque()  # and not used yet
        state = queue.state
        self._last_idx = state.next_avail  # split: the highest available index seen
        self._slot = state.next_avail, state.avail_wrap  # packed: the position looked at last
        self._armed = False  # kicks were asked for, and none has come
        self._waits_since: float | None = None

    def _found(self, id: str, evidence: str) -> None:
        self._findings.add(id, f"{self._name}: {evidence}")

    # -------------------------------------------------------------------------------------- phases

    def on(self, step: Step) -> None:
        """The engine has just done ``step`` in this direction."""
        match step.phase:
            case Phase.AVAILABLE_READ:
                self._look_at_index()
                self._look_at_flags()
            case Phase.FLAGS_READ:
                state = self.queue.state
                self._slot = state.next_avail, state.avail_wrap
            case Phase.KICKS_ASKED:
                self._armed, self._waits_since = not step.count, None
                if not self.queue.packed:
                    self._look_at_index()
            case Phase.KICKS_REFUSED | Phase.KICK_SEEN:
                self._armed = False
            case Phase.HEAD_TAKEN:
                self._take()
            case Phase.GIVEN_BACK:
                for _ in range(min(step.count, len(self._taken))):
                    self._taken.pop()
            case Phase.CHAIN_REFUSED:
                self._refused(step)
            case Phase.USED_WRITTEN:
                for _ in range(min(step.count, len(self._taken))):
                    self._use(self._taken.popleft())
            case Phase.DECIDED:
                self._look_at_wishes()
            case Phase.FRAME_DROPPED if step.reason == "disabled" and self._sends:
                self._found("NET-MQ-DR-03", "a frame, and the queue is not enabled")
            case Phase.RING_BROKEN:
                self._broken(step)

    def _refused(self, step: Step) -> None:
        where = f"chain {step.head}"
        rules = REFUSED.get(step.reason)
        if rules is not None:
            reason = step.reason.removeprefix("RING_E_").replace("_", " ").lower()
            self._found(rules[self.queue.packed], f"{where}, descriptor {step.descriptor}: {reason}")
        elif self._sends:
            self._found("LINT-TRANSMIT", f"{where}: some of it is device-writable")
        elif self._taken:
            # The step engine has one word for what the receiveq does not take, the ring tells which of the two it is.
            chain = self._seen.get(self._taken[-1])
            if chain is not None and chain.total(writable=False):
                self._found("LINT-RECEIVE", f"{where}: {chain.total(writable=False)} bytes are device-readable")

    def _broken(self, step: Step) -> None:
        rules = REFUSED.get(step.reason)
        broken = self.queue.state.broken
        if rules is not None and broken is not None:
            self._found(rules[self.queue.packed], str(broken))

    # --------------------------------------------------------------------------- the driver's own parts

    def _look_at_index(self) -> None:
        index = self._raw.avail_idx()
        if index is None:
            return
        moved = (index - self._last_idx) % _INDEX_MODULO
        if moved >= _INDEX_MODULO // 2:
            self._found("VQ-SPLIT-DR-11", f"the available index went from {self._last_idx} back to {index}")
            return
        if moved > self.queue.size:
            return  # the device stops the ring for it, and says so
        for position in range(self._last_idx, self._last_idx + moved):
            self._first_sight((position % _INDEX_MODULO, False))
        self._last_idx = index

    def _look_at_flags(self) -> None:
        flags = self._raw.avail_flags()
        event_idx = bool(self.queue.features >> Feature.EVENT_IDX & 1)
        if flags is not None and flags > (0 if event_idx else 1):
            self._found("VQ-SPLIT-DR-12", f"flags of the available ring is {flags:#x}, "
                        f"EVENT_IDX was {'' if event_idx else 'not '}negotiated")

    def _look_at_wishes(self) -> None:
        """Packed: when the driver wants to be called."""
        if not self.queue.packed:
            self._look_at_flags()
            return
        wish = self._raw.driver_event()
        if wish is None:
            return
        off_wrap, flags = wish
        allowed = (0, 1, 2) if self.queue.features >> Feature.EVENT_IDX & 1 else (0, 1)
        if flags not in allowed:
            self._found("LINT-EVENT", f"flags of the driver's event suppression is {flags:#x}")
        elif flags == 2 and off_wrap & 0x7FFF >= self.queue.size:
            self._found("LINT-EVENT", f"the driver's event suppression names slot {off_wrap & 0x7FFF} of "
                        f"{self.queue.size}")

    # -------------------------------------------------------------------------------------- chains

    def _take(self) -> None:
        at = self._slot if self.queue.packed else ((self.queue.state.next_avail - 1) % _INDEX_MODULO, False)
        if at not in self._seen:
            self._first_sight(at)
        else:
            self._compare(at)
        self._taken.append(at)

    def _read(self, at: tuple[int, bool]) -> RawChain:
        if self.queue.packed:
            return self._raw.chain(at[0])
        head = self._raw.avail_entry(at[0])
        return RawChain(False, ()) if head is None else self._raw.chain(head)

    def _first_sight(self, at: tuple[int, bool]) -> None:
        chain = self._read(at)
        if len(self._seen) >= 2 * self.queue.size:  # the ring was moved on behind our back: begin anew
            self._seen.clear()
            self._owners.clear()
        self._seen[at] = chain
        self._findings.looked_at["chains"] += 1
        if not self.queue.packed:
            self._own(at, chain)
        self._judge(at, chain)

    def _own(self, at: tuple[int, bool], chain: RawChain) -> None:
        for descriptor in chain.ring:
            other = self._owners.setdefault(descriptor.at, at)
            if other != at:
                self._found("CLEAN-DR-01", f"descriptor {descriptor.at} is in two chains, available entries "
                            f"{other[0]} and {at[0]}")

    def _compare(self, at: tuple[int, bool]) -> None:
        before, now = self._seen[at], self._read(at)
        if now == before:
            return
        which = next((f"descriptor {new.at} was {tuple(old)[1:]}, is {tuple(new)[1:]}" for old, new in
                      zip((*before.ring, *before.table), (*now.ring, *now.table), strict=False) if old != new),
                     f"a chain of {len(before.buffers)} descriptors has {len(now.buffers)}")
        id = "VQ-PACKED-DR-03" if self.queue.packed else "CLEAN-DR-01"
        self._found(id, f"{which}, before the device used it")
        self._seen[at] = now

    def _use(self, at: tuple[int, bool]) -> None:
        if at not in self._seen:
            return
        if not self.queue.packed:  # of a packed one the device has just written over the first
            self._compare(at)
        chain = self._seen.pop(at)
        for descriptor in chain.ring:
            if self._owners.get(descriptor.at) == at:
                del self._owners[descriptor.at]

    def _judge(self, at: tuple[int, bool], chain: RawChain) -> None:
        """What can be said of a chain by itself."""
        name = f"the chain at {'slot' if chain.packed else 'available entry'} {at[0]}"
        size = self.queue.size
        if len(chain.buffers) > size:
            id = "VQ-PACKED-DR-05" if chain.packed else "VQ-SPLIT-DR-09"
            self._found(id, f"{name} has more than {size} descriptors, the size of the queue")
        if chain.packed:
            self._judge_packed(at, name, chain)
        elif self.queue.features >> Feature.IN_ORDER & 1:
            for part, count in ((chain.ring, size), (chain.table, len(chain.table))):
                for d in part:
                    if d.third & NEXT and d.fourth != (d.at + 1) % count:
                        self._found("VQ-SPLIT-DR-06", f"{name}: descriptor {d.at} links to {d.fourth}")
        if self._sends:
            self._judge_frame(chain)
        else:
            self._judge_buffer(name, chain)

    def _judge_packed(self, at: tuple[int, bool], name: str, chain: RawChain) -> None:
        wrap = at[1]
        for i, d in enumerate(chain.ring):
            due = wrap ^ (at[0] + i >= self.queue.size)
            if bool(d.fourth & AVAIL) != due or bool(d.fourth & USED) == due:
                self._found("VQ-PACKED-DR-02", f"{name}: flags of slot {d.at} are {d.fourth:#06x}, "
                            f"and its wrap counter is {due:d}")
        for d in chain.table:
            if d.fourth & ~WRITE:
                self._found("VQ-PACKED-DR-09", f"{name}: entry {d.at} of its table has flags {d.fourth:#06x}")

    def _judge_frame(self, chain: RawChain) -> None:
        if chain.total(writable=True):
            return  # no frame: the device refuses it
        length = chain.total(writable=False) - _HEADER
        data = self._raw.bytes_of(chain, _HEADER + frames.PREFIX)
        if length < 0:
            self._found("LINT-TRANSMIT", f"a chain of {length + _HEADER} readable bytes, less than the header has")
        if len(data) < _HEADER:
            return
        self._findings.looked_at["frames"] += 1
        for id, evidence in frames.broken(data[:_HEADER], data[_HEADER:], length, self.queue.features, self.mtu):
            self._found(id, evidence)

    def _judge_buffer(self, name: str, chain: RawChain) -> None:
        room = chain.total(writable=True)
        features = self.queue.features
        evidence = f"{name} has room for {room} bytes"
        if features & mask(Feature.MRG_RXBUF):
            if room < _HEADER:
                self._found("NET-RXB-DR-03", evidence)
        elif features & (GUEST_GSO & ~mask(Feature.GUEST_ECN)):
            if room < _LEAST_GSO_BUFFER:
                self._found("NET-RXB-DR-01", evidence)
        elif room < _LEAST_BUFFER:
            self._found("NET-RXB-DR-02", evidence)

    # --------------------------------------------------------------------------------------- kicks

    def on_time(self, now: float) -> None:
        """Look whether a chain waits without its kick, at ``now`` (seconds); all kicks so far were seen."""
        if not self._armed or not self._waits():
            self._waits_since = None
        elif self._waits_since is None:
            self._waits_since = now
        elif now - self._waits_since >= KICK_PATIENCE:
            event_idx = bool(self.queue.features >> Feature.EVENT_IDX & 1)
            id = "LINT-KICK" if self.queue.packed else "VQ-SPLIT-DR-18" if event_idx else "VQ-SPLIT-DR-17"
            self._found(id, f"a chain waits since {now - self._waits_since:.1f} s, and there was no kick")
            self._armed = False  # once is enough

    def _waits(self) -> bool:
        state = self.queue.state
        if state.broken is not None:
            return False
        if state.packed:
            return self._raw.available(state.known, state.known_wrap)
        return self._raw.avail_idx() not in (None, state.known)
