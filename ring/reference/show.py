"""A ring as lines of text: what its bytes in guest memory say, and what the device knows besides.

Nothing is checked and nothing is written: sense or nonsense, it is shown as it is. docs/rings.md uses it.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby

from ring.reference import packed, split
from ring.reference.chain import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE
from ring.reference.packed import PackedQueue, Place
from ring.reference.queue import QueueState
from ring.reference.split import SplitQueue

_SPLIT_FLAGS = {DESC_F_NEXT: "NEXT", DESC_F_WRITE: "WRITE", DESC_F_INDIRECT: "INDIRECT"}
_PACKED_FLAGS = _SPLIT_FLAGS | {packed.DESC_F_AVAIL: "AVAIL", packed.DESC_F_USED: "USED"}
_WISHES = {packed.RING_EVENT_FLAGS_ENABLE: "ENABLE", packed.RING_EVENT_FLAGS_DISABLE: "DISABLE",
           packed.RING_EVENT_FLAGS_DESC: "DESC"}


def show(queue: SplitQueue | PackedQueue) -> None:
    """Print the ring."""
    print(*lines(queue, queue.state), sep="\n")


def lines(queue: SplitQueue | PackedQueue, state: QueueState) -> Iterator[str]:
    """The ring that ``queue`` tells the place of; ``state``: what its device knows, be it another than ``queue``."""
    return _packed_lines(queue, state) if state.packed else _split_lines(queue, state)


def _split_lines(queue: SplitQueue, state: QueueState) -> Iterator[str]:
    load = queue.memory.load
    slots = range(state.size)
    table = [split.Descriptor.unpack(queue.descriptor_bytes(slot)) for slot in slots]
    used = [queue.used_entry_at(slot) for slot in slots]
    yield "descriptor table (written by the driver)"
    yield from _rows(f"addr {d.addr:#010x}  len {d.len:<5}  next {d.next:<5}  flags {_names(d.flags, _SPLIT_FLAGS)}"
                     for d in table)
    yield (f"available ring (written by the driver)  flags {load(queue.avail + split.FLAGS, 2)}  "
           f"idx {load(queue.avail + split.IDX, 2)}  used_event {load(queue.used_event_at(), 2)}")
    yield from _rows(f"head {load(queue.avail_entry_at(slot), 2)}" for slot in slots)
    yield (f"used ring (written by the device)  flags {load(queue.used + split.FLAGS, 2)}  "
           f"idx {load(queue.used + split.IDX, 2)}  avail_event {load(queue.avail_event_at(), 2)}")
    yield from _rows(f"id {load(entry, 4)}  len {load(entry + 4, 4)}" for entry in used)
    yield (f"the device knows  next_avail {state.next_avail}  known {state.known}  "
           f"next_used {state.next_used}  published {state.published}")


def _packed_lines(queue: PackedQueue, state: QueueState) -> Iterator[str]:
    ring = [packed.Descriptor.unpack(queue.descriptor_bytes(slot)) for slot in range(state.size)]
    yield "descriptor ring (written by both)"
    yield from _rows(f"addr {d.addr:#010x}  len {d.len:<5}  id {d.id:<5}  {_turn(d.flags)}  "
                     f"flags {_names(d.flags, _PACKED_FLAGS)}" for d in ring)
    for writer, gpa in (("driver", queue.driver_event), ("device", queue.device_event)):
        place = Place.unpack(queue.memory.load(gpa + packed.EVENT_DESC, 2))
        flags = queue.memory.load(gpa + packed.EVENT_FLAGS, 2)
        yield (f"{writer} event suppression (written by the {writer})  flags {_WISHES.get(flags, hex(flags))}  "
               f"slot {place.slot}  counter {place.wrap:d}")
    yield (f"the device knows  next_avail {state.next_avail}  counter {state.avail_wrap:d}  "
           f"next_used {state.next_used}  counter {state.used_wrap:d}  published {state.published}")


def _rows(texts: Iterable[str]) -> Iterator[str]:
    """A line a slot; neighbours that say the same share one."""
    for text, group in groupby(enumerate(texts), key=lambda row: row[1]):
        slots = [slot for slot, _ in group]
        named = f"{slots[0]}" if len(slots) == 1 else f"{slots[0]}-{slots[-1]}"
        yield f"{named:>6}: {text}"


def _turn(flags: int) -> str:
    """AVAIL and USED together: what was done to the descriptor, in a round with which wrap counter (2.8.1)."""
    avail, used = bool(flags & packed.DESC_F_AVAIL), bool(flags & packed.DESC_F_USED)
    return f"{'used     ' if avail == used else 'available'} in {avail:d}"


def _names(flags: int, known: Mapping[int, str]) -> str:
    """Flags by name, those without one as a number; 0 if none is set."""
    names = [name for bit, name in known.items() if flags & bit]
    rest = flags & ~sum(known)
    if rest or not names:
        names.append(f"{rest:#x}" if rest else "0")
    return " ".join(names)
