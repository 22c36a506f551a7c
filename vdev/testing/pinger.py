"""vdev with a responder that pings its guest when told to: the device of the demonstration.

A program of its own, so that the device has its process to itself as a daemon has, and the one who tells
the story can wait for the guest meanwhile. Requests and answers are JSON messages over a ``SOCK_SEQPACKET``
pair, of which this process inherits one end:

    {"address": "10.0.76.2", "sequence": 3}      ping this guest
    {"sequence": 3, "sent": false}               at once: its MAC address is being asked for, try again
    {"sequence": 3, "seconds": 0.012}            it answered; no message when it does not
"""

import json
import socket
import sys
import time
from collections.abc import Callable
from ipaddress import ip_address

from vdev import logs, run_options
from vdev.daemon import Daemon
from vdev.ports.responder import EchoReply, Responder
from vdev.ports.spec import ResponderSpec

MODULE = "vdev.testing.pinger"
MESSAGE_MAX = 256
ASK_AGAIN = 0.1  # seconds; time enough for the guest to tell its MAC address


class Pinger(Responder):
    """A responder with one more descriptor to watch: the one its orders come from."""

    def __init__(self, spec: ResponderSpec, orders: socket.socket) -> None:
        super().__init__(spec, 1)
        self._orders = orders
        self.on_echo_reply = self._report

    def watches(self) -> list[tuple[int, Callable[[], None]]]:
        return [*super().watches(), (self._orders.fileno(), self._obey)]

    def _obey(self) -> None:
        message = self._orders.recv(MESSAGE_MAX)
        if not message:
            # Nobody is left to give orders: an end that is always readable must not be watched for ever.
            raise SystemExit("pinger: whoever gave the orders is gone")
        order = json.loads(message)
        if not self.send_echo(ip_address(order["address"]), order["sequence"]):
            self._tell(sequence=order["sequence"], sent=False)

    def _report(self, reply: EchoReply) -> None:
        self._tell(sequence=reply.sequence, seconds=reply.seconds)

    def _tell(self, **fields: object) -> None:
        self._orders.send(json.dumps(fields).encode())


def ping(orders: socket.socket, address: str, sequence: int, seconds: float = 2) -> float | None:
    """Have the guest pinged through the other end of ``orders``; the round-trip time in seconds.

    None when no answer came within ``seconds``. Each ping needs a sequence number of its own.
    """
    deadline = time.monotonic() + seconds
    order = json.dumps({"address": address, "sequence": sequence}).encode()
    orders.send(order)
    while (left := deadline - time.monotonic()) > 0:
        orders.settimeout(left)
        try:
            answer = json.loads(orders.recv(MESSAGE_MAX))
        except TimeoutError:
            break
        if answer["sequence"] != sequence:
            continue  # a late answer to an earlier one
        if "seconds" in answer:
            return answer["seconds"]
        time.sleep(ASK_AGAIN)
        orders.send(order)
    return None


def main() -> None:
    """``pinger FD OPTION...``: FD gives the orders, the options are those of ``vdev run``."""
    orders = socket.socket(fileno=int(sys.argv[1]))
    config = run_options.configure(run_options.parser("pinger").parse_args(sys.argv[2:]), [])
    logs.setup(config.log_level, config.log_format)
    Daemon(config, lambda spec, queue_pairs, switch: Pinger(spec, orders)).run()


if __name__ == "__main__":
    main()
