"""Where frames go when they leave the rings. :func:`open_port` opens what ``--port`` names.

base.py says what a port is, spec.py how one is written; every other kind is a module of its own.
"""

from collections.abc import Callable

from vdev.ports.base import Port, PortError
from vdev.ports.loopback import Loopback
from vdev.ports.null import Null
from vdev.ports.responder import Responder
from vdev.ports.spec import LoopbackSpec, NullSpec, PortSpec, ResponderSpec, TapSpec
from vdev.ports.tap import Tap

__all__ = ["Port", "PortError", "default_port", "open_port"]

_OPEN: dict[type[PortSpec], Callable[..., Port]] = {
    TapSpec: Tap.open,
    ResponderSpec: Responder.open,
    LoopbackSpec: Loopback.open,
    NullSpec: Null.open,
}


def open_port(spec: PortSpec | None, queue_pairs: int) -> Port:
    """Open the port ``spec`` describes; None means :func:`default_port`.

    queue_pairs: how many are wanted (1 or more); ``carries.queue_pairs`` tells how many there are.
    ``notes`` are lines for the log. Raises PortError.
    """
    if spec is None:
        return default_port(queue_pairs)
    try:
        return _OPEN[type(spec)](spec, queue_pairs)
    except OSError as e:
        raise PortError(f"{spec}: {e.strerror.lower()}; it needs a few file descriptors and some memory for"
                        f" {queue_pairs} queue pairs (`ulimit -n`)") from None


def default_port(queue_pairs: int) -> Port:
    """A new TAP where this process may make one, else the responder; the first note says which and why."""
    try:
        port = open_port(TapSpec(), queue_pairs)
        note = (f"no --port given: made {port}, which has no address yet;"
                f" `--port tap:NAME,ip=ADDRESS/PREFIX` gives one")
    except PortError as e:
        port = open_port(ResponderSpec(), queue_pairs)
        note = f"no --port given and no TAP to be had ({e}): using {port}, a small network inside vdev"
    port.notes = (note, *port.notes)
    return port
