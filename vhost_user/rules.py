"""What is required of each request beyond its length: the checks that need no device.

Every function is ``rule(offer, state, payload, fds)``, where ``fds`` is how many descriptors came along; it
returns nothing or raises :class:`Refused <vhost_user.errors.Refused>`. The peer's numbers have their full
width here, and Python's integers do not wrap, so sums are compared as they are.
"""

from collections.abc import Callable, Iterable
from typing import Any

from .errors import Refused
from .spec import (
    MTU_MAX,
    MTU_MIN,
    STOPPED_PHASE,
    VRING_LOG_FLAG,
    ConfigWrite,
    Direction,
    IotlbType,
    ProtocolFeature,
    VirtioBit,
    bit_names,
    mask,
)
from .state import Offer, Postcopy, State
from .wire import U64, Config, Iotlb, Log, MemTable, Region, StateTransfer, VringAddr, VringFd, VringState

Rule = Callable[[Offer, State, Any, int], None]

_LOG_ALL = mask(VirtioBit.LOG_ALL)
_IN_BAND_NEEDS = mask(ProtocolFeature.REPLY_ACK, ProtocolFeature.BACKEND_REQ)
# No sum may reach these: 64 bits of address, and a file offset that can still be rounded up to the largest
# huge page there is (1 GiB).
_ADDRESS_END = 1 << 64
_OFFSET_END = (1 << 63) - (1 << 30)


def anything(_offer: Offer, _state: State, _payload: Any, _fds: int) -> None:
    """No rule of its own."""


# ------------------------------------------------------------------------------------ negotiation

def set_features(offer: Offer, state: State, payload: U64, _fds: int) -> None:
    unknown = payload.value & ~offer.features
    if unknown:
        raise Refused(f"{bit_names(unknown, VirtioBit)} was not offered",
                      "the front-end may set only bits that GET_FEATURES showed")
    if not payload.value >> VirtioBit.VERSION_1 & 1:
        raise Refused("VERSION_1 (bit 32) is not set, and legacy drivers are not served",
                      "give the guest a modern device (QEMU: disable-legacy=on)")
    changed = (payload.value ^ state.features) & ~_LOG_ALL
    if payload.value >> VirtioBit.ACCESS_PLATFORM & 1 and not state.has(ProtocolFeature.BACKEND_REQ):
        raise Refused("ACCESS_PLATFORM (bit 33) is set and BACKEND_REQ is not: there is no way to ask for translations",
                      "the front-end must set the protocol feature BACKEND_REQ first", "IOMMU support")
    if state.running and changed:
        raise Refused(f"{bit_names(changed, VirtioBit)} would change while a ring is started",
                      "the front-end must stop all rings with GET_VRING_BASE first", "Ring states")


def set_protocol_features(offer: Offer, state: State, payload: U64, _fds: int) -> None:
    unknown = payload.value & ~offer.protocol_features
    if unknown:
        raise Refused(f"{bit_names(unknown, ProtocolFeature)} was not offered",
                      "the front-end may set only bits that GET_PROTOCOL_FEATURES showed")
    lacking = _IN_BAND_NEEDS & ~payload.value
    if payload.value >> ProtocolFeature.INBAND_NOTIFICATIONS & 1 and lacking:
        raise Refused(f"INBAND_NOTIFICATIONS is set without {bit_names(lacking, ProtocolFeature)}",
                      "the front-end must set it too, or leave INBAND_NOTIFICATIONS out", "In-band notifications")
    changed = payload.value ^ state.protocol_features
    if state.running and changed:
        raise Refused(f"{bit_names(changed, ProtocolFeature)} would change while a ring is started",
                      "the front-end must negotiate before it starts rings", "Ring states")
    if state.regions and changed & mask(ProtocolFeature.GPA_ADDRESSES):
        raise Refused("GPA_ADDRESSES would change what the addresses of guest memory mean that is shared already",
                      "the front-end must negotiate before it shares memory", "Memory region description")


def set_status(_offer: Offer, _state: State, payload: U64, _fds: int) -> None:
    if payload.value > 0xFF:
        raise Refused(f"status {payload.value:#x} is more than a byte",
                      "the front-end must send the virtio device status")


def set_log_base(_offer: Offer, _state: State, payload: Log, _fds: int) -> None:
    if not payload.size:
        raise Refused("the log has no bytes", "the front-end must send one with a bit for each page of guest memory",
                      "Log description")
    if payload.offset + payload.size >= _OFFSET_END:
        raise Refused(f"the log's offset {payload.offset:#x} + size {payload.size:#x} goes beyond {_OFFSET_END:#x}",
                      "the front-end must send the log's true place in its file", "Log description")


def set_device_state_fd(_offer: Offer, state: State, payload: StateTransfer, _fds: int) -> None:
    if payload.direction not in (Direction.SAVE, Direction.LOAD):
        raise Refused(f"direction {payload.direction} is neither 0 (save) nor 1 (load)",
                      "the front-end must send one of them", "Device state transfer parameters")
    if payload.phase != STOPPED_PHASE:
        raise Refused(f"phase {payload.phase} is not {STOPPED_PHASE} (stopped), the only one there is",
                      "the front-end must transfer the state when all rings are stopped",
                      "Device state transfer parameters")
    if state.running:
        raise Refused("a ring is started", "the front-end must stop all rings with GET_VRING_BASE first",
                      "Migrating back-end state")


def set_config(_offer: Offer, _state: State, payload: Config, _fds: int) -> None:
    if payload.flags not in (ConfigWrite.DRIVER, ConfigWrite.MIGRATION):
        raise Refused(f"flags {payload.flags:#x} say neither that the driver writes (0) nor that a guest moves (1)",
                      "the front-end must send one of them", "Virtio device config space")


def net_set_mtu(_offer: Offer, _state: State, payload: U64, _fds: int) -> None:
    if not MTU_MIN <= payload.value <= MTU_MAX:
        raise Refused(f"MTU {payload.value} is not between {MTU_MIN} and {MTU_MAX}",
                      "set another host_mtu at the front-end")


# --------------------------------------------------------------------------------------- postcopy

def postcopy_advise(_offer: Offer, state: State, _payload: Any, _fds: int) -> None:
    # QEMU says it once for each queue pair. It then waits for an answer with our addresses once for each pair too, but
    # shares memory only with the first: it would hang at the point where the guest can no longer go back.
    if state.postcopy is not Postcopy.OFF:
        raise Refused("postcopy was announced already", "the front-end must say it once; QEMU can move a device by "
                      "postcopy only if it has one queue pair")


def postcopy_listen(_offer: Offer, state: State, _payload: Any, _fds: int) -> None:
    if state.listening:
        raise Refused("postcopy is under way already", "the front-end must say it once")
    if state.postcopy is not Postcopy.ADVISED:
        raise Refused("POSTCOPY_ADVISE never came", "the front-end must send it first")
    if state.regions:
        raise Refused("guest memory was shared before", "the front-end must share it afterwards, so that it learns "
                      "where a page is missing")


def postcopy_end(_offer: Offer, state: State, _payload: Any, _fds: int) -> None:
    if not state.listening:
        raise Refused("POSTCOPY_LISTEN never came", "the front-end must send it first")


def memory_known(_offer: Offer, _state: State, payload: U64, _fds: int) -> None:
    if payload.value:
        raise Refused(f"the front-end answers {payload.value} to where its memory is, not 0",
                      "missing pages would never come; its own log tells why", "VHOST_USER_SET_MEM_TABLE")


# ------------------------------------------------------------------------------------------ rings

def set_vring_num(offer: Offer, _state: State, payload: VringState, _fds: int) -> None:
    # Whether it must be a power of two depends on features that may come later: see _can_start.
    if not 1 <= payload.num <= offer.max_queue_size:
        raise Refused(f"size {payload.num} is not between 1 and {offer.max_queue_size}",
                      "the front-end must send the queue size the driver uses")


def set_vring_addr(offer: Offer, state: State, payload: VringAddr, _fds: int) -> None:
    log = VRING_LOG_FLAG if offer.features & _LOG_ALL else 0
    if payload.flags & ~log:
        raise Refused(f"flags {payload.flags:#x} ask for something that was not offered",
                      "the front-end may set bit 0 (log) only where LOG_ALL (bit 26) was offered",
                      "A vring address description")
    parts = (("descriptor table", payload.desc, 16), ("available ring", payload.avail, 2),
             ("used ring", payload.used, 4))
    for part, address, alignment in parts:
        if address % alignment:
            raise Refused(f"the {part} at {address:#x} is not aligned to {alignment} bytes",
                          "the driver must place it as virtio 1.x, \"Virtqueues\", demands",
                          "A vring address description")
    ring = state.rings[payload.index]
    if ring.started and _places(ring.addr) != _places(payload):
        raise Refused("the ring is started and these are other addresses",
                      "the front-end must stop the ring with GET_VRING_BASE before it moves it",
                      "Ring states")


def _places(addr: VringAddr) -> tuple[int, int, int]:
    return addr.desc, addr.avail, addr.used


def set_vring_base(_offer: Offer, state: State, payload: VringState, _fds: int) -> None:
    # A packed ring's base has two positions in 32 bits ("... for packed virtqueues").
    if payload.num > 0xFFFF and not state.has_virtio(VirtioBit.RING_PACKED):
        raise Refused(f"base {payload.num:#x} does not fit in 16 bits",
                      "the front-end must send the next available index",
                      "A vring descriptor index for split virtqueues")


def set_vring_enable(_offer: Offer, _state: State, payload: VringState, _fds: int) -> None:
    if payload.num not in (0, 1):
        raise Refused(f"{payload.num} is neither 1 (enable) nor 0 (disable)",
                      "the front-end must send one of them")


def vring_fd(_offer: Offer, _state: State, payload: VringFd, fds: int) -> None:
    """The rule shared by SET_VRING_KICK, SET_VRING_CALL and SET_VRING_ERR."""
    if payload.fd and not fds:
        raise Refused("no file descriptor came along",
                      "the front-end must attach an eventfd, or set bit 8 to say that there is none",
                      "VHOST_USER_SET_VRING_KICK")
    if fds and not payload.fd:
        raise Refused("a file descriptor came along although bit 8 says that there is none",
                      "the front-end must send one or the other", "VHOST_USER_SET_VRING_KICK")


def set_vring_kick(offer: Offer, state: State, payload: VringFd, fds: int) -> None:
    vring_fd(offer, state, payload, fds)
    _can_start(state, payload.index)


def vring_kick(_offer: Offer, state: State, payload: VringState, _fds: int) -> None:
    if payload.num:
        raise Refused(f"num is {payload.num}, which means nothing yet", "the front-end must set it to 0")
    _can_start(state, payload.index)


def _can_start(state: State, index: int) -> None:
    """Everything a ring must have been told before it starts, except that its memory is there."""
    ring = state.rings[index]
    if ring.started:
        return
    missing = [name for name, known in (("SET_FEATURES", state.features), ("SET_VRING_NUM", ring.num),
                                        ("SET_VRING_ADDR", ring.addr)) if not known]
    if missing:
        raise Refused(f"the ring cannot start: {', '.join(missing)} never came",
                      "the front-end must kick the ring, or send its kick eventfd, last", "Ring states")
    if not state.has_virtio(VirtioBit.RING_PACKED) and ring.num & (ring.num - 1):
        raise Refused(f"the ring cannot start: size {ring.num} is not a power of two",
                      "the driver must choose one for a split ring (virtio 1.x, \"Split Virtqueues\")",
                      "VHOST_USER_SET_VRING_NUM")


# ------------------------------------------------------------------------------------------ IOMMU

def iotlb_msg(_offer: Offer, _state: State, payload: Iotlb, _fds: int) -> None:
    # Whether the memory is shared is the device's to say.
    section = "IOTLB message"
    if payload.kind == IotlbType.INVALIDATE:
        return  # too much of it only costs: size 0 is what 2^64 looks like in 64 bits
    if payload.kind != IotlbType.UPDATE:
        raise Refused(f"type {payload.kind} is neither an update (2) nor an invalidation (3)",
                      "the front-end may send only these", section)
    if not payload.size or payload.iova + payload.size > _ADDRESS_END or payload.uva + payload.size > _ADDRESS_END:
        raise Refused(f"the translation of {payload.size:#x} bytes at iova {payload.iova:#x}, uva {payload.uva:#x} is "
                      "empty or goes beyond the end of the address space",
                      "the front-end must send what the guest's IOMMU has", section)
    if not 1 <= payload.access <= 3:
        raise Refused(f"access {payload.access} is neither reading (1), writing (2) nor both (3)",
                      "the front-end must say what the IOMMU allows", section)


# ----------------------------------------------------------------------------------- guest memory

_REGIONS = "Memory region description"


def set_mem_table(_offer: Offer, state: State, payload: MemTable, fds: int) -> None:
    if fds != len(payload.regions):
        raise Refused(f"{len(payload.regions)} regions came with {fds} file descriptors",
                      "the front-end must attach one for each region, in order")
    for position, region in enumerate(payload.regions):
        _sound(state, region)
        _apart(state, region, payload.regions[:position])


def add_mem_reg(offer: Offer, state: State, payload: Region, _fds: int) -> None:
    # QEMU before 8.0 sends guest memory once for each queue pair, and takes it back as often.
    times = state.regions.count(payload)
    if times:
        if times >= offer.rings:
            raise Refused(f"region {payload} was added {times} times already",
                          "the front-end must add a region once, or once for each queue pair")
        return
    if len(set(state.regions)) >= offer.max_mem_slots:
        raise Refused(f"all {offer.max_mem_slots} memory slots are taken",
                      "the front-end must stay within GET_MAX_MEM_SLOTS")
    _sound(state, payload)
    _apart(state, payload, state.regions)


def rem_mem_reg(_offer: Offer, state: State, payload: Region, _fds: int) -> None:
    if not any(region.same_place(payload) for region in state.regions):
        raise Refused(f"there is no region {payload}",
                      "the front-end must name a region as it added it")


def _address_spaces(state: State, region: Region) -> list[tuple[str, int]]:
    """Where ``region`` lies, in each address space by which something in it may be named."""
    spaces = [("gpa", region.gpa)]
    if not state.has(ProtocolFeature.GPA_ADDRESSES):
        spaces.append(("uva", region.uva))
    return spaces


def _sound(state: State, region: Region) -> None:
    """The region makes sense taken alone."""
    if not region.size:
        raise Refused(f"region {region}: the size is zero", "the front-end must leave out empty regions",
                      _REGIONS)
    ends = [(name, start, _ADDRESS_END) for name, start in _address_spaces(state, region)]
    for name, start, end in [*ends, ("offset", region.offset, _OFFSET_END)]:
        if start + region.size >= end:
            raise Refused(f"region {region}: {name} + size goes beyond {end:#x}",
                          "the front-end must send the region's true place", _REGIONS)


def _apart(state: State, region: Region, others: Iterable[Region]) -> None:
    """The region shares no address with ``others``, neither the guest's nor the front-end's."""
    here = _address_spaces(state, region)
    for other in others:
        for (name, start), (_, other_start) in zip(here, _address_spaces(state, other), strict=True):
            if start < other_start + other.size and other_start < start + region.size:
                raise Refused(f"region {region} overlaps region {other} in its {name}",
                              "the front-end must remove the other one first", _REGIONS)
