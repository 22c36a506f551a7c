"""Every request this back-end knows, one row each: what comes with it, when it may come, what it answers.

A request is judged by its row and by nothing else. Those without a row go through the same path: they are
refused with the reason given in NOT_HANDLED.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from . import effects, rules, wire
from .effects import Effect
from .errors import Refused
from .rules import Rule
from .spec import FDS_MAX, STATE_NOFD, ProtocolFeature, Request, VirtioBit
from .state import Event, Offer, State
from .wire import U64, Config, MemTable, Region, VringState

Gate = Callable[[Offer, State], None]


def _always(_offer: Offer, _state: State) -> None:
    """May come at any time."""


def _bit_30(offer: Offer, _state: State) -> None:
    # Offered, not acknowledged: these come before SET_FEATURES.
    if not offer.features >> VirtioBit.PROTOCOL_FEATURES & 1:
        raise Refused("protocol features (bit 30) were not offered",
                      "the front-end must look at GET_FEATURES before it sends this")


def _negotiated(feature: ProtocolFeature) -> Gate:
    def gate(_offer: Offer, state: State) -> None:
        if not state.has(feature):
            raise Refused(f"the protocol feature {feature.name} was not negotiated",
                          "the front-end must ask for it with SET_PROTOCOL_FEATURES first",
                          "Protocol features")
    return gate


def _offered(feature: ProtocolFeature) -> Gate:
    def gate(offer: Offer, _state: State) -> None:
        if not offer.protocol_features >> feature & 1:
            raise Refused(f"the protocol feature {feature.name} was not offered",
                          "the front-end must look at GET_PROTOCOL_FEATURES before it sends this")
    return gate


def _access_platform(_offer: Offer, state: State) -> None:
    if not state.has_virtio(VirtioBit.ACCESS_PLATFORM):
        raise Refused("the virtio feature ACCESS_PLATFORM (bit 33) was not negotiated",
                      "the front-end may send translations only for a driver behind an IOMMU", "IOMMU support")


# Where the body of a reply comes from, for rows that have one: the session itself, or the device.
Source = Callable[[Offer, State], Any]


@dataclass(frozen=True)
class Row:
    """One request.

    payload  layout of what it carries
    fds      fewest and most descriptors that may come along
    gate     raises Refused unless the request may be used in this session
    ring     the payload names a ring: its index is checked, and the ring's state must permit this event
    rule     everything else that is required
    effect   what changes when it was accepted and done
    reply    layout of its answer; None: it is answered only where need_reply asks for an acknowledgement
    source   gives the body of the answer, where the session knows it
    body     makes it of the payload and what the device answered, where only the device knows
    refusal  the body of the answer that says no; None: the answer has no room for it
    acked    is acknowledged whether need_reply asks for it or not
    """

    payload: wire.Layout | wire.MemTableLayout | wire.ConfigLayout = wire.NOTHING
    fds: tuple[int, int] = (0, 0)
    gate: Gate = _always
    ring: Event | None = None
    rule: Rule = rules.anything
    effect: Effect = effects.nothing
    reply: wire.Layout | wire.MemTableLayout | wire.ConfigLayout | None = None
    source: Source | None = None
    body: Callable[[Any, Any], Any] | None = None
    refusal: Any = None
    acked: bool = False

    @property
    def from_device(self) -> bool:
        """Only the device knows what to answer."""
        return self.body is not None


def _base(payload: VringState, value: int) -> VringState:
    return replace(payload, num=value)


def _device_u64(_payload: Any, value: int) -> U64:
    return U64(value)


def _own_u64(value: Callable[[Offer, State], int]) -> Source:
    return lambda offer, state: U64(value(offer, state))


def _config(payload: Config, data: bytes) -> Config:
    return replace(payload, data=data)


def _region_base(payload: Region, address: int) -> Region:
    return replace(payload, uva=address)


def _table_bases(payload: MemTable, addresses: Sequence[int]) -> MemTable:
    return MemTable(tuple(map(_region_base, payload.regions, addresses)))


_SLOTS = _negotiated(ProtocolFeature.CONFIGURE_MEM_SLOTS)
_STATUS = _negotiated(ProtocolFeature.STATUS)
_CONFIG = _negotiated(ProtocolFeature.CONFIG)
_DEVICE_STATE = _negotiated(ProtocolFeature.DEVICE_STATE)
_PAGEFAULT = _negotiated(ProtocolFeature.PAGEFAULT)

REQUESTS: dict[Request, Row] = {
    # Negotiation
    Request.GET_FEATURES: Row(
        reply=wire.U64_LAYOUT, source=_own_u64(lambda offer, _: offer.features)),
    Request.SET_FEATURES: Row(wire.U64_LAYOUT, rule=rules.set_features, effect=effects.set_features),
    Request.GET_PROTOCOL_FEATURES: Row(
        gate=_bit_30, reply=wire.U64_LAYOUT, source=_own_u64(lambda offer, _: offer.protocol_features)),
    Request.SET_PROTOCOL_FEATURES: Row(
        wire.U64_LAYOUT, gate=_bit_30, rule=rules.set_protocol_features,
        effect=effects.set_protocol_features),
    Request.SET_OWNER: Row(),
    Request.RESET_OWNER: Row(),  # deprecated, and to be ignored: it must not drop what the session agreed on
    Request.RESET_DEVICE: Row(gate=_negotiated(ProtocolFeature.RESET_DEVICE), effect=effects.reset_device),
    Request.SET_STATUS: Row(wire.U64_LAYOUT, gate=_STATUS, rule=rules.set_status, effect=effects.set_status),
    Request.GET_STATUS: Row(
        gate=_STATUS, reply=wire.U64_LAYOUT, source=_own_u64(lambda _, state: state.status)),
    # A question that a front-end may ask while it still makes up its mind: offered is enough.
    Request.GET_QUEUE_NUM: Row(
        gate=_offered(ProtocolFeature.MQ), reply=wire.U64_LAYOUT,
        source=_own_u64(lambda offer, _: offer.queue_num)),
    Request.SET_BACKEND_REQ_FD: Row(fds=(1, 1), gate=_negotiated(ProtocolFeature.BACKEND_REQ)),
    # Guest memory
    Request.SET_MEM_TABLE: Row(
        wire.MEM_TABLE, fds=(0, FDS_MAX), rule=rules.set_mem_table, effect=effects.set_mem_table),
    Request.GET_MAX_MEM_SLOTS: Row(
        gate=_SLOTS, reply=wire.U64_LAYOUT, source=_own_u64(lambda offer, _: offer.max_mem_slots)),
    Request.ADD_MEM_REG: Row(
        wire.SINGLE_REGION, fds=(1, 1), gate=_SLOTS, rule=rules.add_mem_reg, effect=effects.add_mem_reg),
    # A descriptor should not come with REM_MEM_REG; old front-ends send one, and it is closed.
    Request.REM_MEM_REG: Row(
        wire.SINGLE_REGION, fds=(0, 1), gate=_SLOTS, rule=rules.rem_mem_reg, effect=effects.rem_mem_reg),
    Request.IOTLB_MSG: Row(
        wire.IOTLB, gate=_access_platform, rule=rules.iotlb_msg, reply=wire.U64_LAYOUT,
        source=_own_u64(lambda _offer, _state: 0), refusal=U64(1)),
    # Rings
    Request.SET_VRING_NUM: Row(
        wire.VRING_STATE, ring=Event.NUM, rule=rules.set_vring_num, effect=effects.set_vring_num),
    Request.SET_VRING_ADDR: Row(
        wire.VRING_ADDR, ring=Event.ADDR, rule=rules.set_vring_addr, effect=effects.set_vring_addr),
    Request.SET_VRING_BASE: Row(
        wire.VRING_STATE, ring=Event.BASE, rule=rules.set_vring_base, effect=effects.set_vring_base),
    Request.GET_VRING_BASE: Row(
        wire.VRING_STATE, ring=Event.GET_BASE, effect=effects.get_vring_base, reply=wire.VRING_STATE,
        body=_base),
    Request.SET_VRING_KICK: Row(
        wire.VRING_FD, fds=(0, 1), ring=Event.KICK, rule=rules.set_vring_kick, effect=effects.set_vring_kick),
    Request.VRING_KICK: Row(
        wire.VRING_STATE, gate=_negotiated(ProtocolFeature.INBAND_NOTIFICATIONS), ring=Event.KICK,
        rule=rules.vring_kick, effect=effects.vring_kick),
    Request.SET_VRING_CALL: Row(
        wire.VRING_FD, fds=(0, 1), ring=Event.CALL, rule=rules.vring_fd, effect=effects.set_vring_call),
    Request.SET_VRING_ERR: Row(
        wire.VRING_FD, fds=(0, 1), ring=Event.ERR, rule=rules.vring_fd, effect=effects.set_vring_err),
    Request.SET_VRING_ENABLE: Row(
        wire.VRING_STATE, gate=_bit_30, ring=Event.ENABLE, rule=rules.set_vring_enable,
        effect=effects.set_vring_enable),
    # Migration. A front-end does not look at what is answered to SET_LOG_BASE, only that something is
    # ("Communication"): an answer that says no would be taken for a yes, unless it is the acknowledgement asked for.
    Request.SET_LOG_BASE: Row(
        wire.LOG, fds=(1, 1), gate=_negotiated(ProtocolFeature.LOG_SHMFD), rule=rules.set_log_base,
        effect=effects.set_log_base, acked=True),
    Request.SET_LOG_FD: Row(fds=(1, 1), gate=_negotiated(ProtocolFeature.LOG_SHMFD)),
    Request.SET_DEVICE_STATE_FD: Row(
        wire.STATE_TRANSFER, fds=(1, 1), gate=_DEVICE_STATE, rule=rules.set_device_state_fd,
        reply=wire.U64_LAYOUT, body=_device_u64, refusal=U64(STATE_NOFD | 1)),
    Request.CHECK_DEVICE_STATE: Row(
        gate=_DEVICE_STATE, reply=wire.U64_LAYOUT, body=_device_u64, refusal=U64(1)),
    Request.POSTCOPY_ADVISE: Row(
        gate=_PAGEFAULT, rule=rules.postcopy_advise, effect=effects.postcopy_advise, reply=wire.NOTHING,
        source=lambda _offer, _state: wire.Nothing()),
    Request.POSTCOPY_LISTEN: Row(gate=_PAGEFAULT, rule=rules.postcopy_listen, effect=effects.postcopy_listen),
    Request.POSTCOPY_END: Row(
        gate=_PAGEFAULT, rule=rules.postcopy_end, effect=effects.postcopy_end, reply=wire.U64_LAYOUT,
        source=_own_u64(lambda _offer, _state: 0), refusal=U64(1)),
    # Configuration space
    Request.GET_CONFIG: Row(wire.CONFIG, gate=_CONFIG, reply=wire.CONFIG_ANSWER, body=_config, refusal=wire.NO_CONFIG),
    Request.SET_CONFIG: Row(wire.CONFIG, gate=_CONFIG, rule=rules.set_config),
    # Network
    Request.SEND_RARP: Row(wire.U64_LAYOUT, gate=_negotiated(ProtocolFeature.RARP)),
    Request.NET_SET_MTU: Row(
        wire.U64_LAYOUT, gate=_negotiated(ProtocolFeature.MTU), rule=rules.net_set_mtu,
        effect=effects.net_set_mtu),
}

# What takes the place of those rows while a guest arrives by postcopy: the answer tells where we have the memory.
IN_POSTCOPY: dict[Request, Row] = {
    Request.SET_MEM_TABLE: replace(
        REQUESTS[Request.SET_MEM_TABLE], effect=effects.told(effects.set_mem_table), reply=wire.MEM_TABLE,
        body=_table_bases),
    Request.ADD_MEM_REG: replace(
        REQUESTS[Request.ADD_MEM_REG], effect=effects.told(effects.add_mem_reg), reply=wire.SINGLE_REGION,
        body=_region_base),
}
# The front-end's word that it knows: a second message of the same name, whichever it was, that carries a u64.
MEMORY_KNOWN = Row(wire.U64_LAYOUT, rule=rules.memory_known, effect=effects.postcopy_listen)
_ABOUT_MEMORY = (Request.SET_MEM_TABLE, Request.ADD_MEM_REG, Request.REM_MEM_REG)

# Requests of the specification that have no row, by what a front-end would have to negotiate before it sends
# them - which it cannot, as this is not offered.
NOT_HANDLED: dict[Request, str] = {
    Request.SET_VRING_ENDIAN: "CROSS_ENDIAN",
    Request.CREATE_CRYPTO_SESSION: "CRYPTO_SESSION",
    Request.CLOSE_CRYPTO_SESSION: "CRYPTO_SESSION",
    Request.GET_INFLIGHT_FD: "INFLIGHT_SHMFD",
    Request.SET_INFLIGHT_FD: "INFLIGHT_SHMFD",
    Request.GPU_SET_SOCKET: "a GPU device",
    Request.GET_SHARED_OBJECT: "SHARED_OBJECT",
    Request.GET_SHMEM_CONFIG: "SHMEM",
    Request.GET_VRING_BASE_SKIP_DRAIN: "GET_VRING_BASE_SKIP_DRAIN",
}


def row_of(number: int, state: State, size: int) -> tuple[Request, Row]:
    """The request with this number and its row in ``state``; ``size``: bytes of its payload. Raises Refused where this
    back-end has none."""
    try:
        kind = Request(number)
    except ValueError:
        raise Refused("no such request is known", "the front-end is newer than this back-end or not a "
                      "vhost-user front-end", "Front-end message types") from None
    if kind not in REQUESTS:
        raise Refused(f"it belongs to {NOT_HANDLED[kind]}, which was not offered",
                      "the front-end may use only what was negotiated", "Front-end message types")
    if state.listening and kind in _ABOUT_MEMORY and size == wire.U64_LAYOUT.size:
        return kind, MEMORY_KNOWN
    return kind, IN_POSTCOPY.get(kind, REQUESTS[kind]) if state.listening else REQUESTS[kind]
