"""``vdev demo``: a guest answers pings, with one command, no root, no image and no preparation.

The guest is the network boot ROM that comes with QEMU (iPXE), the network is the responder inside vdev.
The same device, the same socket and the same command line serve any guest; only the size of this one is
out of the ordinary. Everything is made in a temporary directory and gone at the end.
"""

import contextlib
import socket
import sys
import tempfile
from collections.abc import Sequence

from vdev import traffic
from vdev.errors import Failure, Misuse
from vdev.qemu import QemuError, format_shell, qemu_args
from vdev.run_options import Parser
from vdev.testing import pinger
from vdev.testing.console import ConsoleClosed, ConsoleTimeout
from vdev.testing.daemon import Daemon
from vdev.testing.ipxe import IpxeError, IpxeGuest
from vdev.testing.process import ProcessDied
from vdev.testing.qemu import QmpError, find_program

PINGS = 10
TROUBLE = (IpxeError, ConsoleClosed, ConsoleTimeout, ProcessDied, QmpError)

EPILOG = """\
example:
  vdev demo --qemu /usr/bin/qemu-system-x86_64

Needs QEMU and its boot ROMs (Debian: qemu-system-x86 and ipxe-qemu). Exit status: 0 if every ping was answered.
"""


def run_demo(arguments: Sequence[str], prog: str) -> None:
    """Run the verb with its command line ``arguments``. Raises Misuse, and Failure when a ping is lost."""
    parser = Parser(prog, "Watch a guest get an address from vdev and answer its pings: no root, no image.", EPILOG)
    parser.add_argument("--qemu", metavar="BINARY", help="the QEMU to use (default: qemu-system-x86_64 on PATH)")
    parser.add_argument("--pings", default=str(PINGS), metavar="N", help=f"how many (default {PINGS})")
    options = parser.parse_args(list(arguments))
    if not options.pings.isdecimal() or not 1 <= int(options.pings[:6]) <= 10_000:
        raise Misuse(f"--pings {options.pings}: must be a number from 1 to 10000")
    try:
        _play(options.qemu, int(options.pings))
    except QemuError as reason:
        raise Failure(str(reason)) from None
    except TROUBLE as reason:
        raise Failure(f"the demo failed: {reason}") from None


def say(text: str) -> None:
    """A line for the audience, at once also when it goes into a pipe."""
    print(text, flush=True)


def _play(binary: str | None, pings: int) -> None:
    program = find_program(binary or "qemu-system-x86_64")
    with contextlib.ExitStack() as stage:
        folder = stage.enter_context(tempfile.TemporaryDirectory(prefix="vdev-demo-"))
        orders, pinger_orders = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stage.enter_context(orders)
        path = f"{folder}/vm.sock"

        say(f"vdev: a virtio-net device listens on {path}. Its port is the responder, a network of one host\n"
            "      inside vdev that speaks ARP, DHCP and ping. Nobody needs root for it.")
        with pinger_orders:
            daemon = stage.enter_context(Daemon(
                ["--socket-path", path, "--port", "responder"], privileged=False,
                program=["-m", pinger.MODULE, str(pinger_orders.fileno())], pass_fds=[pinger_orders.fileno()]))

        network = qemu_args(path, memory="128M", qemu=program.binary)
        say(f"\nQEMU: {program.binary} {'.'.join(map(str, program.version))} starts with what `vdev qemu-args` prints:\n")
        say("      " + format_shell(network).replace("\n", "\n      "))
        guest = stage.enter_context(IpxeGuest(program, network))
        say("\nGuest: iPXE, the network boot ROM of QEMU's virtio card. It has no disk and no image, but a virtio-net\n"
            "       driver of its own. It is at its prompt, and we type: dhcp net0")
        address = guest.dhcp()
        say(f"       vdev gave it the address {address}.\n")

        times = []
        for sequence in range(pings):
            seconds = pinger.ping(orders, address, sequence)
            say(f"ping {address}: " + (f"answered in {seconds * 1000:.1f} ms" if seconds is not None else "NO ANSWER"))
            if seconds is not None:
                times.append(seconds * 1000)
        guest.stop()
        daemon.stop()
        (driver,), (end,) = daemon.events("driver")[-1:], daemon.events("session-end")
    say(f"\nfeatures negotiated: {' '.join(driver['features'])}")
    say(traffic.sentence({way: end[way] for way in ("from_guest", "to_guest")}))
    if times:
        say(f"round trip: {min(times):.1f} / {sum(times) / len(times):.1f} / {max(times):.1f} ms (least / average / most);"
            "\n            iPXE at its prompt looks at the network between two looks at the keyboard")
    if len(times) < pings:
        raise Failure(f"{pings - len(times)} of {pings} pings were not answered")
    say(f"{pings} pings, {pings} answers.")


if __name__ == "__main__":
    run_demo(sys.argv[1:], "vdev demo")
