"""Where frames go when they leave the rings. :func:`open_port` opens what ``--port`` names.

base.py says what a port is, spec.py how one is written; every other kind is a module of its own.
"""

from typing import TYPE_CHECKING

from vdev.handover import HandoverError, Take
from vdev.options import OptionError
from vdev.ports.base import Port, PortError, PortPart
from vdev.ports.spec import LoopbackSpec, NullSpec, PortSpec, ResponderSpec, SwitchSpec, TapSpec, parse_port

if TYPE_CHECKING:
    from vdev.ports.loopback import Loopback
    from vdev.ports.null import Null
    from vdev.ports.responder import Responder
    from vdev.ports.switch import Switch
    from vdev.ports.tap import Tap

__all__ = ["Port", "PortError", "adopt_port", "default_port", "open_port"]


def _kind(spec: PortSpec) -> "type[Tap | Responder | Loopback | Null]":
    """The class that ``spec`` is about. A daemon loads the code of those ports only that it has."""
    match spec:
        case TapSpec():
            from vdev.ports.tap import Tap as kind
        case ResponderSpec():
            from vdev.ports.responder import Responder as kind
        case LoopbackSpec():
            from vdev.ports.loopback import Loopback as kind
        case NullSpec():
            from vdev.ports.null import Null as kind
    return kind


def open_port(spec: PortSpec | None, queue_pairs: int, switch: "Switch | None" = None) -> Port:
    """Open the port ``spec`` describes; None means :func:`default_port`.

    queue_pairs: how many are wanted (1 or more); ``carries.queue_pairs`` tells how many there are. switch: the one
    that a SwitchSpec names.
    ``notes`` are lines for the log. Raises PortError.
    """
    if spec is None:
        return default_port(queue_pairs)
    if isinstance(spec, SwitchSpec):
        if switch is None:
            raise PortError(f"{spec}: a switch joins the devices of one daemon, and there is none here")
        from vdev.ports.switch import SwitchPort  # with the C core, which a wrong command line need not wait for

        return SwitchPort(switch, queue_pairs)
    try:
        return _kind(spec).open(spec, queue_pairs)
    except OSError as e:
        raise PortError(f"{spec}: {e.strerror.lower()}; it needs a few file descriptors and some memory for"
                        f" {queue_pairs} queue pairs (`ulimit -n`)") from None


def adopt_port(part: PortPart, take: Take) -> Port:
    """The port that another process exported. Raises HandoverError for one that this vdev does not know, ValueError for
    a state that is none."""
    try:
        spec = parse_port(part.spec)
    except OptionError as error:
        raise HandoverError(f"this vdev does not know the port: {error}") from None
    if isinstance(spec, SwitchSpec):
        raise HandoverError(f"{spec}: a switch cannot be handed over")
    return _kind(spec).adopt(spec, part.state, take)


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
