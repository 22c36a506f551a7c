"""A guest's driver in a process of its own, so that it can be stopped and placed: ring/core/driver.c on a socket.

    python -m benchmarks.driver_load '{"path": ..., "size": ..., "megabytes": ..., "transmit": {...}, "receive": {...},
                                       "partner": {"path": ..., ...}}'

transmit, receive: what to tell ring.loadgen.LoadGenerator of that role; left out: none of it. ``header`` and ``prefix``
in hexadecimal. partner: of a second guest, which receives what the first one sends with an ``interval_ns``. It prints
``ready`` when the devices run; each line it then reads is answered with the counters as JSON, those of the partner as
``receive``. At the end of its input it hangs up.
"""

import contextlib
import dataclasses
import json
import sys

from ring.driver import GuestMemory
from ring.loadgen import LoadGenerator, Role
from vdev.net.features import Feature, mask
from vdev.testing.scripted import ScriptedGuest

FEATURES = mask(Feature.VERSION_1, Feature.MRG_RXBUF, Feature.EVENT_IDX, Feature.INDIRECT_DESC, Feature.CSUM,
                Feature.GUEST_CSUM, Feature.HOST_TSO4, Feature.HOST_TSO6, Feature.GUEST_TSO4, Feature.GUEST_TSO6)


def decoded(options: dict) -> dict:
    """The options of a LoadGenerator out of JSON."""
    return {name: bytes.fromhex(value) if name in ("header", "prefix") else value for name, value in options.items()}


def connected(wanted: dict, path: str) -> ScriptedGuest:
    """A guest on the socket ``path`` that has posted nothing yet."""
    features = FEATURES | (mask(Feature.RING_PACKED) if wanted.get("packed") else 0)
    return ScriptedGuest.connect(path, features=features, size=wanted["size"], buffers=0,
                                 memory=GuestMemory(wanted["megabytes"] << 20))


def told(load: LoadGenerator) -> dict:
    """Its counters, for JSON."""
    return {**dataclasses.asdict(load.stats()), "latencies": load.latencies()}


def main() -> None:
    """Serve until the input ends."""
    wanted = json.loads(sys.argv[1])
    with contextlib.ExitStack() as stack:
        guest = stack.enter_context(connected(wanted, wanted["path"]))
        loads, started = {}, []
        options = decoded(wanted.get("transmit") or {})
        if wanted.get("partner"):
            of_partner = dict(wanted["partner"])
            neighbour = stack.enter_context(connected(wanted, of_partner.pop("path")))
            # So that a switch knows where it is; the first guest takes nothing, and the frame is lost.
            prefix = options["prefix"]
            neighbour.driver.transmit(prefix[6:12] + prefix[:6] + prefix[12:14] + bytes(46))
            options["partner"] = loads["receive"] = stack.enter_context(
                LoadGenerator(neighbour.driver.receiveq, Role.RECEIVE, **decoded(of_partner)))
        elif wanted.get("receive"):
            started.append(stack.enter_context(
                LoadGenerator(guest.driver.receiveq, Role.RECEIVE, **decoded(wanted["receive"]))))
            loads["receive"] = started[-1]
        if options:
            started.append(stack.enter_context(LoadGenerator(guest.driver.transmitq, Role.TRANSMIT, **options)))
            loads["transmit"] = started[-1]
        for load in started:
            load.start()
        print("ready", flush=True)
        for _ in sys.stdin:
            print(json.dumps({way: told(load) for way, load in loads.items()}), flush=True)


if __name__ == "__main__":
    main()
