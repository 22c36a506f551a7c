"""``vdev demo``: a guest answers pings, with one command, no root, no image and no preparation.

The guest is the network boot ROM that comes with QEMU (iPXE), the network is the responder inside vdev.
The same device, the same socket and the same command line serve any guest; only the size of this one is
out of the ordinary. Everything is made in a temporary directory and gone at the end.
"""

import contextlib
import signal
import socket
import tempfile
import textwrap
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

Needs QEMU and its boot ROMs (Debian: qemu-system-x86 and ipxe-qemu).
Exit status: 0 if every ping was answered.
"""


def run_demo(arguments: Sequence[str], prog: str) -> None:
    """Run the verb with its command line ``arguments``. Raises Misuse, and Failure when a ping is lost."""
    about = "Watch a guest get an address from vdev and answer its pings: no root, no image."
    parser = Parser(prog, about, EPILOG)
    parser.add_argument("--qemu", metavar="BINARY", help="the QEMU to use (default: the one on PATH)")
    parser.add_argument("--pings", default=str(PINGS), metavar="N", help=f"how many (default {PINGS})")
    options = parser.parse_args(list(arguments))
    if not options.pings.isdecimal() or not 1 <= int(options.pings[:6]) <= 10_000:
        raise Misuse(f"--pings {options.pings}: must be a number from 1 to 10000")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever ends it, everything is taken down
    try:
        _play(options.qemu, int(options.pings))
    except QemuError as reason:
        raise Failure(str(reason)) from None
    except TROUBLE as reason:
        if "failed to find romfile" in str(reason):
            raise Failure("QEMU has no network boot ROM; install it (Debian: `sudo apt install"
                          " ipxe-qemu`)") from None
        raise Failure(f"the demo failed: {reason}") from None


def say(text: str) -> None:
    """A line for the audience, at once also when it goes into a pipe."""
    print(text, flush=True)


def _play(binary: str | None, pings: int) -> None:
    program = find_program(binary)
    with contextlib.ExitStack() as stage:
        folder = stage.enter_context(tempfile.TemporaryDirectory(prefix="vdev-demo-"))
        orders, pinger_orders = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stage.enter_context(orders)
        path = f"{folder}/vm.sock"

        say(f"vdev:  a virtio-net device listens on {path}.\n"
            "       Its port is the responder, a network of one host inside vdev: ARP, DHCP and ping.\n"
            "       None of this needs root.")
        with pinger_orders:
            inherited = pinger_orders.fileno()
            daemon = stage.enter_context(Daemon(
                ["--socket-path", path, "--port", "responder"], privileged=False,
                program=["-m", pinger.MODULE, str(inherited)], pass_fds=[inherited]))

        network = qemu_args(path, memory="128M", qemu=program.binary)
        say(f"\nQEMU:  {program.binary} ({program}) gets the options that `vdev qemu-args` prints:\n")
        say(textwrap.indent(format_shell(network), "       "))
        guest = stage.enter_context(IpxeGuest(program, network))
        say("\nGuest: iPXE, the network boot ROM of QEMU's virtio card. It has no disk and no image, but a\n"
            "       virtio-net driver of its own. It is at its prompt, and we type: dhcp net0")
        address = guest.dhcp()
        say(f"       vdev gave it the address {address}.\n")

        times = []
        for sequence in range(pings):
            seconds = pinger.ping(orders, address, sequence)
            if seconds is None:
                say(f"ping {address}: NO ANSWER")
                continue
            times.append(seconds * 1000)
            say(f"ping {address}: answered in {times[-1]:.1f} ms")
        guest.stop()
        daemon.stop()
        (driver,), (end,) = daemon.events("driver")[-1:], daemon.events("session-end")
    say(f"\nfeatures negotiated: {' '.join(driver['features'])}")
    say(traffic.sentence({way: end[way] for way in ("from_guest", "to_guest")}))
    if times:
        average = sum(times) / len(times)
        say(f"round trip: {min(times):.1f} / {average:.1f} / {max(times):.1f} ms (least / average / most); "
            "iPXE looks at\n            its network only between two looks at its keyboard")
    if len(times) < pings:
        raise Failure(f"{pings - len(times)} of {pings} pings were not answered")
    say(f"{pings} pings, {pings} answers.")
