"""What a session's hands (vdev/backend.py) hand on when another process goes on with the session, the engine apart."""

from dataclasses import dataclass

from ring.errors import named
from ring.virtqueue import VirtQueue
from vdev.agreed import settings_of
from vdev.backend import Backend
from vdev.engine import EnginePart, ring_name
from vdev.handover import HandoverError, Put, Take
from vdev.memory import SharedRegion
from vdev.session_rings import SessionRingsPart
from vdev.session_state import SessionStatePart
from vhost_user.state import State


@dataclass(frozen=True)
class BackendPart:
    """A session's hands as they are handed on, the engine apart. reverse: the back-end channel's descriptor."""

    memory: tuple[SharedRegion, ...]
    rings: SessionRingsPart
    state: SessionStatePart
    reverse: int


def export(backend: Backend, put: Put) -> BackendPart:
    """What another process needs to go on with this session, beside the engine's part. Raises HandoverError, also
    while the guest is being migrated."""
    if backend.dirty.on or backend.state.deadline is not None or backend.postcopy.arriving:
        raise HandoverError("a guest is being migrated; try again when that is over")
    if backend.iommu.on(backend.session.state):
        raise HandoverError("a guest's driver is behind an IOMMU, whose translations are not handed over; restart "
                            "vdev instead")
    if backend.inband.on(backend.session.state):
        raise HandoverError("a front-end is notified by messages (INBAND_NOTIFICATIONS), and which of them it has read "
                            "is not handed over; restart vdev instead")
    return BackendPart(backend.memory.export(put), backend.rings.export(), backend.state.export(),
                       put(backend.reverse.fileno()))


def adopt(backend: Backend, part: BackendPart, engine: EnginePart, take: Take) -> None:
    """Be what another process exported, with the engine's rings ready to run when that is started.

    Raises SetupError, HandoverError, ValueError.
    """
    backend.rings.adopt(part.rings)
    if part.reverse >= 0:
        backend.reverse.adopt(take(part.reverse))
    backend.memory.adopt(part.memory, take)
    backend.state.adopt(part.state)
    state = backend.session.state
    for index, (ring, given) in enumerate(zip(backend.engine.rings, engine.rings, strict=True)):
        ring.enabled = state.rings[index].enabled
        if given.base is not None:
            ring.queue = _queue(backend, state, index, given.base)
            if given.broken is not None:
                ring.queue.fail(named(given.broken))
    backend.engine.features, backend.engine.mtu, backend.engine.watch_kicks = settings_of(state)


def _queue(backend: Backend, state: State, index: int, base: int) -> VirtQueue:
    if backend.memory.table is None or state.rings[index].addr is None:
        raise HandoverError(f"{ring_name(index)} has lost its memory; reset the guest's driver first")
    return backend.rings.queue(state, index, base)
