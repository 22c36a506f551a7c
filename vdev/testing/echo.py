"""``python -m vdev.testing.echo ADDRESS PORT``: random bytes to an echo server, compared with what comes back.

Until its standard input ends; then it waits for the rest, and prints ``{"bytes": n, "problem": null or text}``: how
many bytes came back as they were sent.
"""

import json
import random
import select
import socket
import sys

OUTSTANDING_MAX = 256 * 1024  # bytes on their way at a time
BLOCK = 16 * 1024
LAST_SECONDS = 30  # for the rest to come back


def compare(sock: socket.socket, stop: int) -> dict:
    """Send and compare on ``sock`` until descriptor ``stop`` is readable -> what to print."""
    numbers = random.Random(0)
    unsent, awaited, compared, stopping = b"", bytearray(), 0, False
    sock.setblocking(False)
    while not stopping or awaited:
        poll = select.poll()
        sending = not stopping and len(awaited) < OUTSTANDING_MAX
        poll.register(sock, select.POLLIN | (select.POLLOUT if sending else 0))
        if not stopping:
            poll.register(stop, select.POLLIN)
        ready = dict(poll.poll(LAST_SECONDS * 1000))
        if not ready:
            return {"bytes": compared, "problem": f"nothing came within {LAST_SECONDS} s, {len(awaited)} bytes are due"}
        stopping = stopping or stop in ready
        events = ready.get(sock.fileno(), 0)
        try:
            if events & select.POLLOUT and sending:
                unsent = unsent or numbers.randbytes(BLOCK)
                sent = sock.send(unsent)
                awaited += unsent[:sent]
                unsent = unsent[sent:]
            if events & ~select.POLLOUT:
                received = sock.recv(1 << 16)
                if not received:
                    return {"bytes": compared, "problem": "the connection was closed"}
                if awaited[:len(received)] != received:
                    return {"bytes": compared, "problem": "other bytes came back than were sent"}
                del awaited[:len(received)]
                compared += len(received)
        except OSError as error:
            return {"bytes": compared, "problem": f"the connection broke: {error}"}
    return {"bytes": compared, "problem": None}


def main() -> None:
    """Connect, compare, print."""
    with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=30) as sock:
        print(json.dumps(compare(sock, sys.stdin.fileno())))


if __name__ == "__main__":
    main()
