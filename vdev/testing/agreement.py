"""Two devices beside one driver: the C core and the reference in Python, each with its own guest memory.

Each verb is asked of both. What they answer (or the rule that was broken, and where), what they say of
themselves and all of guest memory are compared every time; the first difference raises Disagreement.
"""

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from ring.driver import Extent, GuestMemory
from ring.driver_parts import RING_PACKED
from ring.errors import ChainError, RingError, SetupError
from ring.reference import ChainError as ReferenceChainError
from ring.reference import PackedQueue, Queue, RuleBroken, SplitQueue
from ring.virtqueue import CallReason, VirtQueue
from vdev.testing.rig import DeviceSide

# Two regions that touch, one of a crooked length, one as high as addresses go.
REGIONS = (
    Extent(0x4000_0000, 0x8000, 0x7F50_0000_0000),
    Extent(0x4000_8000, 0x1000, 0x7F60_0000_0000, offset=0x1000),
    Extent(0x5000_0000, 0x0FF8, 0x7F70_0000_0000),
    Extent((1 << 64) - 0x1001, 0x1000, 0x7F80_0000_0000),
)
BORDER = REGIONS[1].gpa


class Disagreement(AssertionError):
    """The two devices differ: in what, and after which operations."""


_CHAIN = ("head", "slots", "descriptors", "readable_len", "writable_len")


class Two(NamedTuple):
    """An answer or an argument, such as a chain or the error it raised, as each device has it."""

    core: object
    reference: object


def told(result: object) -> object:
    """An answer in words that do not depend on who gave it."""
    if isinstance(result, RingError | RuleBroken):
        of_chain = (result.head, result.slots) if isinstance(result, ChainError | ReferenceChainError) else ()
        return (type(result).__name__, str(result.code), result.at, *of_chain)
    if hasattr(result, "due"):
        return result.name, result.due
    if hasattr(result, "slots"):
        return tuple(getattr(result, name) for name in _CHAIN)
    return result


def answer(ask: Callable[[], object]) -> object:
    """What a device says, be it that a rule was broken."""
    try:
        return ask()
    except (RingError, RuleBroken) as error:
        return error


def condition(device: VirtQueue | Queue) -> dict[str, object]:
    """What a device says of itself."""
    state = device.state
    return vars(state) | {"broken": told(state.broken), "base": device.base}


class BothDevices:
    """A queue of the C core, in ``memory``, and one of the reference, in a copy of it.

    memory: made of REGIONS. operations counts what was asked of both, heard holds the rules and the reasons of
    notifications that came up.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self.memory = memory
        self.copy = GuestMemory(extents=REGIONS)
        self.side = DeviceSide(memory)
        self.core: VirtQueue | None = None
        self.operations = 0
        self.heard: set[str] = set()
        self._trace: deque[object] = deque(maxlen=40)

    def start(self, *, features: int, **ring: int) -> None:
        """Set both up, in place of those there were. Raises the core's SetupError, as both must."""
        self.carry_over()
        if self.core is not None:
            self.core.close()
        self.core = self.reference = None
        kind = PackedQueue if features >> RING_PACKED & 1 else SplitQueue
        made = Two(answer(lambda: VirtQueue(self.side.memory, features=features, **ring)),
                   answer(lambda: kind(self.copy, features=features, **ring)))
        self._trace.append(("start", features, ring))
        errors = [error if isinstance(error, RingError | RuleBroken) else None for error in made]
        self.compare("start", *map(told, errors))
        if isinstance(made.core, SetupError):
            raise made.core
        self.core, self.reference = made
        self.compare_all()

    def carry_over(self) -> None:
        """What the driver has done to one memory happens to the other."""
        for region in REGIONS:
            self.copy.write(region.gpa, self.memory.read(region.gpa, region.size))

    def ask(self, verb: str, *arguments: object) -> Two:
        """One operation: the same of both. Raises Disagreement."""
        self.operations += 1
        self._trace.append((verb, *arguments))
        calls = [getattr(device, verb) for device in (self.core, self.reference)]
        of_core, of_reference = zip(*arguments, strict=True) if arguments else ((), ())
        answers = Two(answer(lambda: calls[0](*of_core)), answer(lambda: calls[1](*of_reference)))
        self.compare(verb, told(answers.core), told(answers.reference))
        self.compare_all()
        if isinstance(answers.core, RingError | CallReason):
            self.heard.add(answers.core.code if isinstance(answers.core, RingError) else answers.core.name)
        return answers

    def transfer(self, chain: Two, data: bytes, offset: int) -> None:
        """Read what there is to read, then write ``data`` to where there is room, in both."""
        for name, *arguments in (("read", offset, 4096), ("read", 0, 64), ("write", data, offset)):
            self.compare(name, *(getattr(one, name)(*arguments) for one in chain))
        self.compare_all()

    def compare_all(self) -> None:
        """What they say of themselves, and all of guest memory."""
        self.compare("state", *map(condition, (self.core, self.reference)))
        for one, other, region in zip(self.memory.snapshot(), self.copy.snapshot(), REGIONS, strict=True):
            if one != other:
                at = next(i for i, (x, y) in enumerate(zip(one, other, strict=True)) if x != y)
                self.compare(f"memory at {region.gpa + at:#x}", one[at:at + 16].hex(), other[at:at + 16].hex())

    def compare(self, what: str, of_core: object, of_reference: object) -> None:
        """Raise Disagreement unless the two are equal."""
        if of_core != of_reference:
            before = "\n".join(map(str, self._trace))
            raise Disagreement(f"{what}: core {of_core}, reference {of_reference}; after\n{before}")

    def close(self) -> None:
        """End both devices and the copy; ``memory`` stays the caller's."""
        if self.core is not None:
            self.core.close()
        self.side.close()
        self.copy.close()
