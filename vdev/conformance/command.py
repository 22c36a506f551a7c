"""``vdev check``: options in, a report out."""

import sys
import time

from vdev.conformance import report, wire
from vdev.conformance.bench import Bench
from vdev.conformance.run import run
from vdev.conformance.table import SECTIONS, chosen
from vdev.conformance.verdict import Broken, NotOffered, NotReachable, Verdict
from vdev.errors import Failure, Misuse
from vdev.net.features import names
from vdev.run_options import Parser
from vhost_user.errors import PeerError
from vhost_user.frontend import NoAnswer, RequestRefused
from vhost_user.spec import ProtocolFeature, bit_names

EPILOG = """\
The back-end must serve one connection after the other on SOCKET, with nobody else on it; use one that you may bring
down. Without --wire nothing is known of its other side, and rows about frames are not reachable.

wires:
  reflect       it sends each frame back to its guest (vdev: --port loopback:; testpmd: one port, --forward-mode=io)
  tap:NAME      the network interface where its frames come out; needs CAP_NET_RAW
  socket:PATH   another vhost-user socket, to whose guest it sends them (vdev: two devices with port=switch:NAME)

Ends with 0, or with 1 when the back-end does not do what it MUST.

example:
  vdev --socket-path /tmp/vm.sock --port loopback: &
  vdev check /tmp/vm.sock --wire reflect
"""


def check(arguments: list[str], prog: str) -> None:
    """The verb. Raises Misuse, Failure."""
    parser = Parser(prog, "Hold a vhost-user net back-end against the virtio and vhost-user specifications.", EPILOG)
    parser.add_argument("socket", metavar="SOCKET", help="where it listens")
    parser.add_argument("--only", action="append", metavar="ROWS", default=[],
                        help="rows by id, with commas between; * and ? stand for anything")
    parser.add_argument("--section", action="append", metavar="NAME", default=[], help=", ".join(SECTIONS))
    parser.add_argument("--wire", metavar="KIND", help="how to see its other side: reflect, tap:NAME, socket:PATH")
    parser.add_argument("--seconds", type=float, default=3.0, help="how long an answer may take (default 3)")
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of a report")
    parser.add_argument("--junit", metavar="FILE", help="write the results to FILE as JUnit's XML")
    parser.add_argument("--list", action="store_true", help="print every row with its verdict too")
    options = parser.parse_args(arguments)
    if unknown := set(options.section) - SECTIONS.keys():
        raise Misuse(f"--section {min(unknown)}: unknown; known: {', '.join(SECTIONS)}")
    selected = chosen([word for words in options.only for word in words.split(",")], options.section)
    if not selected:
        raise Misuse("no row is chosen; ids are like VQ-SPLIT-D-11")
    began = time.monotonic()
    bench = _bench(options.socket, options.wire, options.seconds)
    results = []
    for result in run(bench, selected):
        results.append(result)
        if options.list and not options.json:
            said = f": {result.came}" if result.came and result.verdict is not Verdict.FAIL else ""
            print(f"{result.row:16} {result.verdict.value}{said}", flush=True)
    target = {"socket": options.socket, "wire": options.wire, "features": names(bench.offered),
              "protocol_features": bit_names(bench.protocol, ProtocolFeature).split(", "),
              "queue_pairs": bench.queue_pairs, "seconds": round(time.monotonic() - began, 1)}
    if options.json:
        print(report.as_json(target, results))
    else:
        _print(target, results)
    if options.junit:
        _write(options.junit, report.as_junit(results))
    if bench.wire is not None:
        bench.wire.close()
    if report.violated(results):
        sys.stdout.flush()
        raise Failure(f"{options.socket} does not do all that it MUST")


def _print(target: dict, results: list) -> None:
    print(f"{target['socket']}: {target['queue_pairs']} queue pair(s), wire {target['wire'] or 'none'}, "
          f"{target['seconds']} s\noffered: {' '.join(target['features'])}\n"
          f"         {' '.join(target['protocol_features'])}\n")
    for line in report.text(results):
        print(line)


def _bench(path: str, wire_text: str | None, seconds: float) -> Bench:
    """The bench, and a first look at what is there. Raises Misuse, Failure."""
    try:
        bench = Bench(path, None if wire_text is None else wire.parse(wire_text), seconds=seconds)
    except (OSError, PeerError, NoAnswer, RequestRefused, ValueError) as why:
        raise Failure(f"--wire {wire_text}: {why}") from None
    try:
        bench.look()
    except (OSError, PeerError, NoAnswer, RequestRefused, Broken, NotOffered, NotReachable) as why:
        raise Failure(f"{path}: no back-end answers there, so nothing can be told: {why}") from None
    finally:
        bench.end()
    return bench


def _write(path: str, text: str) -> None:
    try:
        with open(path, "w") as file:
            file.write(text + "\n")
    except OSError as error:
        raise Failure(f"--junit {path}: {error.strerror}") from None
