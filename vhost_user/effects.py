"""What each request does to the state of a session, once the device has done its part.

Every function is ``effect(state, payload, body) -> state``; ``body`` is the reply body of rows that have
one. They only say what follows: whether the request is legal was settled by :mod:`vhost_user.rules`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .spec import Status, VirtioBit
from .state import Event, Notifier, Postcopy, State
from .wire import U64, Log, MemTable, Region, VringAddr, VringFd, VringState

Effect = Callable[[State, Any, Any], State]


def nothing(state: State, _payload: Any, _body: Any) -> State:
    """The request changes nothing that the session keeps."""
    return state


def set_features(state: State, payload: U64, _body: Any) -> State:
    # Independent of SET_PROTOCOL_FEATURES: those stay valid when bit 30 is never acknowledged.
    agreed = replace(state, features=payload.value)
    if agreed.has_virtio(VirtioBit.PROTOCOL_FEATURES):
        return agreed
    return agreed.all_rings(Event.PLAIN_FEATURES)


def set_protocol_features(state: State, payload: U64, _body: Any) -> State:
    return replace(state, protocol_features=payload.value)


def set_mem_table(state: State, payload: MemTable, _body: Any) -> State:
    return replace(state, regions=payload.regions)


def add_mem_reg(state: State, payload: Region, _body: Any) -> State:
    return replace(state, regions=(*state.regions, payload))


def rem_mem_reg(state: State, payload: Region, _body: Any) -> State:
    regions = list(state.regions)
    regions.remove(next(region for region in regions if region.same_place(payload)))
    return replace(state, regions=tuple(regions))


def postcopy_advise(state: State, _payload: Any, _body: Any) -> State:
    return replace(state, postcopy=Postcopy.ADVISED)


def postcopy_listen(state: State, _payload: Any, _body: Any) -> State:
    return replace(state, postcopy=Postcopy.LISTENING)


def postcopy_end(state: State, _payload: Any, _body: Any) -> State:
    return replace(state, postcopy=Postcopy.OFF)


def told(effect: Effect) -> Effect:
    """``effect`` on guest memory, after which the front-end has to say that it knows where we have that memory."""
    return lambda state, payload, body: replace(effect(state, payload, body), postcopy=Postcopy.TELLING)


def set_log_base(state: State, payload: Log, _body: Any) -> State:
    return replace(state, log=payload)


def set_status(state: State, payload: U64, _body: Any) -> State:
    # Zero stops the rings but forgets nothing: some front-ends ask for the base after it. FEATURES_OK does not stay
    # where no features were accepted: that tells the driver (virtio 1.2, 2.2.2).
    accepted = payload.value if state.features else payload.value & ~Status.FEATURES_OK
    stored = replace(state, status=accepted)
    return stored if payload.value else stored.all_rings(Event.STATUS_ZERO)


def net_set_mtu(state: State, payload: U64, _body: Any) -> State:
    return replace(state, mtu=payload.value)


def reset_device(state: State, _payload: Any, _body: Any) -> State:
    # Guest memory, the log, call and err eventfds, protocol features and how the guest came here belong to the session,
    # not to the device: a front-end does not send them again.
    rings = tuple(replace(ring, num=0, addr=None, base=0, kick=Notifier.UNSET)
                  for ring in state.all_rings(Event.RESET).rings)
    return State(rings, protocol_features=state.protocol_features, regions=state.regions, log=state.log,
                 postcopy=state.postcopy)


def set_vring_num(state: State, payload: VringState, _body: Any) -> State:
    return _ring(state, payload.index, Event.NUM, num=payload.num)


def set_vring_addr(state: State, payload: VringAddr, _body: Any) -> State:
    return _ring(state, payload.index, Event.ADDR, addr=payload)


def set_vring_base(state: State, payload: VringState, _body: Any) -> State:
    return _ring(state, payload.index, Event.BASE, base=payload.num)


def get_vring_base(state: State, payload: VringState, body: VringState) -> State:
    return _ring(state, payload.index, Event.GET_BASE, base=body.num)


def set_vring_kick(state: State, payload: VringFd, _body: Any) -> State:
    return _ring(state, payload.index, Event.KICK, kick=_notifier(payload))


def vring_kick(state: State, payload: VringState, _body: Any) -> State:
    return _ring(state, payload.index, Event.KICK)


def set_vring_call(state: State, payload: VringFd, _body: Any) -> State:
    return _ring(state, payload.index, Event.CALL, call=_notifier(payload))


def set_vring_err(state: State, payload: VringFd, _body: Any) -> State:
    return _ring(state, payload.index, Event.ERR, err=_notifier(payload))


def set_vring_enable(state: State, payload: VringState, _body: Any) -> State:
    return _ring(state, payload.index, Event.ENABLE if payload.num else Event.DISABLE)


def _ring(state: State, index: int, event: Event, **configuration: Any) -> State:
    """``state`` after ``event`` came to ring ``index`` and told these parts of its configuration."""
    return state.with_ring(index, replace(state.rings[index].after(event), **configuration))


def _notifier(payload: VringFd) -> Notifier:
    return Notifier.FD if payload.fd else Notifier.POLL
