"""Layouts of the header and of every payload this back-end handles ("Message Specification").

A layout joins a construct description to a small frozen dataclass. Numbers are in host byte order.
construct ignores trailing bytes, so lengths are compared here, before it sees anything; a payload of the
wrong length is :class:`Refused <vhost_user.errors.Refused>`, never guessed at.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from construct import Array, Construct, Int8un, Int32un, Int64un, Padding, Struct

from .errors import Refused
from .spec import CONFIG_MAX, TABLE_REGIONS_MAX, VRING_NOFD


@dataclass(frozen=True)
class Nothing:
    """An empty payload."""


@dataclass(frozen=True)
class U64:
    """One u64: ``value``."""

    value: int


@dataclass(frozen=True)
class VringState:
    """``index`` of a ring, and ``num``: what about it (a size, a base, 0 or 1)."""

    index: int
    num: int


@dataclass(frozen=True)
class VringFd:
    """``index`` of a ring; ``fd`` tells whether a descriptor comes along. Without one the ring is polled."""

    index: int
    fd: bool


@dataclass(frozen=True)
class VringAddr:
    """Where ring ``index`` lies: front-end virtual addresses (uva) of its three parts, guest-physical ones with
    GPA_ADDRESSES.

    ``flags`` bit 0 asks that writes to the used ring are logged at guest-physical address ``log``.
    """

    index: int
    flags: int
    desc: int
    used: int
    avail: int
    log: int


@dataclass(frozen=True)
class Iotlb:
    """About ``size`` bytes of what a driver behind an IOMMU names from ``iova`` on.

    kind: of IotlbType. uva: where they are. access: what may be done with them, or for a miss or a failed access what
    was to be done; bit 0 reading, bit 1 writing.
    """

    iova: int
    size: int
    uva: int
    access: int
    kind: int


@dataclass(frozen=True)
class Region:
    """A run of guest memory: ``size`` bytes at guest-physical ``gpa``, known to the front-end as ``uva``,
    found in the file that comes along from byte ``offset``. With GPA_ADDRESSES ``uva`` means nothing."""

    gpa: int
    size: int
    uva: int
    offset: int

    def same_place(self, other: "Region") -> bool:
        """Both name the same memory. The offset is not compared (entry "VHOST_USER_REM_MEM_REG")."""
        return (self.gpa, self.uva, self.size) == (other.gpa, other.uva, other.size)

    def __str__(self) -> str:
        return f"gpa {self.gpa:#x} size {self.size:#x} uva {self.uva:#x} offset {self.offset:#x}"


@dataclass(frozen=True)
class MemTable:
    """All of guest memory: 1 to 8 ``regions``, one descriptor each, in the same order."""

    regions: tuple[Region, ...]


@dataclass(frozen=True)
class Log:
    """The dirty log: ``size`` bytes of the file that comes along, from byte ``offset`` ("Log description")."""

    size: int
    offset: int


@dataclass(frozen=True)
class StateTransfer:
    """Which way the device's state goes, and when ("Device state transfer parameters")."""

    direction: int
    phase: int


@dataclass(frozen=True)
class Config:
    """Bytes of the configuration space from ``offset`` on: those that are read or written. flags: of ConfigWrite."""

    offset: int
    flags: int
    data: bytes


class Layout:
    """One payload format: its name for people, its size in bytes, and both directions of translation."""

    def __init__(self, name: str, construct: Construct, parse: Callable[[Any], Any],
                 build: Callable[[Any], Any]) -> None:
        self.name = name
        self.size = construct.sizeof()
        self._construct = construct
        self._parse = parse
        self._build = build

    def decode(self, payload: bytes) -> Any:
        """Payload bytes -> its dataclass. Raises Refused unless there are exactly ``size`` bytes."""
        if len(payload) != self.size:
            raise wrong_size(self.name, self.size, len(payload))
        return self._parse(self._construct.parse(payload))

    def encode(self, value: Any) -> bytes:
        """The dataclass of this layout -> payload bytes."""
        return self._construct.build(self._build(value))


class MemTableLayout:
    """The one payload whose length depends on its content: a count, padding, and that many regions.

    There may be room for more, up to the 8 that the specification's description has: user-mode Linux sends a table with
    room for two, whether it has highmem or not.
    """

    name = "memory regions description"

    def decode(self, payload: bytes) -> MemTable:
        """Raises Refused for a count outside 1..8 or a length that does not fit the count."""
        if len(payload) < _TABLE_HEAD.sizeof():
            raise wrong_size(self.name, self._size(1), len(payload))
        count = _TABLE_HEAD.parse(payload).count
        if not 1 <= count <= TABLE_REGIONS_MAX:
            raise Refused(f"{count} regions are not between 1 and {TABLE_REGIONS_MAX}",
                          "the front-end must send one table of all shared memory, or negotiate "
                          "CONFIGURE_MEM_SLOTS for more regions", "Multiple memory regions description")
        if len(payload) not in map(self._size, range(count, TABLE_REGIONS_MAX + 1)):
            raise wrong_size(f"{self.name} of {count}", self._size(count), len(payload))
        records = Array(count, _REGION).parse(payload[_TABLE_HEAD.sizeof():])
        return MemTable(tuple(_region(record) for record in records))

    def encode(self, table: MemTable) -> bytes:
        """A table -> payload bytes; its regions are not checked, so that tests can send what they like."""
        head = _TABLE_HEAD.build({"count": len(table.regions), "padding": 0})
        return head + b"".join(_REGION.build(vars(region)) for region in table.regions)

    @staticmethod
    def _size(count: int) -> int:
        return _TABLE_HEAD.sizeof() + count * _REGION.sizeof()


class ConfigLayout:
    """The other one: a range of the configuration space, and its bytes ("Virtio device config space").

    answer: it is the one to GET_CONFIG, in which no bytes at all, NO_CONFIG, say that there is no such range.
    """

    name = "virtio device config space"

    def __init__(self, answer: bool = False) -> None:
        self._answer = answer

    def decode(self, payload: bytes) -> Config:
        """Raises Refused for a length that does not fit the size in it, or a range that no device has."""
        if self._answer and not payload:
            return NO_CONFIG
        if len(payload) < _CONFIG_HEAD.sizeof():
            raise wrong_size(self.name, _CONFIG_HEAD.sizeof(), len(payload))
        head, data = _CONFIG_HEAD.parse(payload), payload[_CONFIG_HEAD.sizeof():]
        if len(data) != head.size:
            raise wrong_size(f"{self.name} of {head.size}", _CONFIG_HEAD.sizeof() + head.size, len(payload))
        if not head.size or head.offset + head.size > CONFIG_MAX:
            raise Refused(f"{head.size} bytes from {head.offset} are not within the {CONFIG_MAX} bytes that a "
                          "configuration space may have", "the front-end must name a part of it",
                          self.name.capitalize())
        return Config(head.offset, head.flags, data)

    def encode(self, config: Config) -> bytes:
        """The range and its bytes -> payload bytes."""
        if self._answer and config == NO_CONFIG:
            return b""
        return _CONFIG_HEAD.build({"offset": config.offset, "size": len(config.data), "flags": config.flags}
                                  ) + config.data


def wrong_size(name: str, expected: int, found: int) -> Refused:
    """The refusal of a payload that is not as long as its layout."""
    return Refused(f"the payload has {found} bytes, but a {name} has {expected}",
                   "the front-end must send the payload exactly as specified", "Payload")


_U64 = Struct("value" / Int64un)
_STATE = Struct("index" / Int32un, "num" / Int32un)
_ADDR = Struct("index" / Int32un, "flags" / Int32un, "desc" / Int64un, "used" / Int64un, "avail" / Int64un,
               "log" / Int64un)
_IOTLB = Struct("iova" / Int64un, "size" / Int64un, "uva" / Int64un, "access" / Int8un, "kind" / Int8un, Padding(6))
_REGION = Struct("gpa" / Int64un, "size" / Int64un, "uva" / Int64un, "offset" / Int64un)
_SINGLE = Struct("padding" / Int64un, "region" / _REGION)
_LOG = Struct("size" / Int64un, "offset" / Int64un)
_TRANSFER = Struct("direction" / Int32un, "phase" / Int32un)
_CONFIG_HEAD = Struct("offset" / Int32un, "size" / Int32un, "flags" / Int32un)
_TABLE_HEAD = Struct("count" / Int32un, "padding" / Int32un)


def _region(record: Any) -> Region:
    return Region(record.gpa, record.size, record.uva, record.offset)


def _vring_fd(record: Any) -> VringFd:
    # Every bit but the flag counts as index: an index cut to 8 bits would hit a ring that exists.
    return VringFd(record.value & ~VRING_NOFD, not record.value & VRING_NOFD)


HEADER = Struct("request" / Int32un, "flags" / Int32un, "size" / Int32un)

NOTHING = Layout("message without payload", Struct(), lambda _: Nothing(), lambda _: {})
U64_LAYOUT = Layout("u64", _U64, lambda r: U64(r.value), vars)
VRING_STATE = Layout("vring state description", _STATE, lambda r: VringState(r.index, r.num), vars)
VRING_FD = Layout("u64", _U64, _vring_fd,
                  lambda ring: {"value": ring.index | (0 if ring.fd else VRING_NOFD)})
VRING_ADDR = Layout("vring address description", _ADDR,
                    lambda r: VringAddr(r.index, r.flags, r.desc, r.used, r.avail, r.log), vars)
LOG = Layout("log description", _LOG, lambda r: Log(r.size, r.offset), vars)
STATE_TRANSFER = Layout("device state transfer parameters", _TRANSFER,
                        lambda r: StateTransfer(r.direction, r.phase), vars)
IOTLB = Layout("IOTLB message", _IOTLB, lambda r: Iotlb(r.iova, r.size, r.uva, r.access, r.kind), vars)
MEM_TABLE = MemTableLayout()
CONFIG = ConfigLayout()
CONFIG_ANSWER = ConfigLayout(answer=True)
NO_CONFIG = Config(0, 0, b"")
SINGLE_REGION = Layout("single memory region description", _SINGLE, lambda r: _region(r.region),
                       lambda region: {"padding": 0, "region": vars(region)})
