"""The host's end of a serial line: vdev/testing/console.py."""

import socket
import threading

import pytest

from vdev.testing.console import Console, ConsoleClosed, ConsoleTimeout


@pytest.fixture
def line():
    """(console, the guest's end of its line)."""
    ours, guests = socket.socketpair()
    console = Console(ours)
    with guests:
        yield console, guests
    console.close()


def test_waits_take_what_was_said_in_order(line) -> None:
    console, guest = line
    guest.sendall(b"boot\nprompt> first\nprompt> ")
    assert console.wait_for(b"prompt> ", 1) == b"boot\n"
    assert console.wait_for(b"prompt> ", 1) == b"first\n"
    assert console.transcript == "boot\nprompt> first\nprompt> "


def test_a_mark_may_come_in_pieces(line) -> None:
    console, guest = line
    pieces = [b"pro", b"mpt", b"> rest"]
    sender = threading.Thread(target=lambda: [guest.sendall(piece) for piece in pieces])
    sender.start()
    assert console.wait_for(b"prompt> ", 5) == b""
    sender.join()


def test_a_line_is_returned_with_what_came_before_it(line) -> None:
    console, guest = line
    guest.sendall(b"output\nmore\n\n>000001 42\nnext")
    assert console.wait_for_line(b">000001", 1) == (b"output\nmore\n", b" 42")
    guest.sendall(b"\n")
    assert console.wait_for(b"\n", 1) == b"next"


def test_silence_is_told_with_the_last_words(line) -> None:
    console, guest = line
    guest.sendall(b"Kernel panic\n")
    with pytest.raises(ConsoleTimeout, match=r"waited in vain for 'ready'.*\nKernel panic"):
        console.wait_for(b"ready", 0.05)


def test_a_guest_that_hangs_up_ends_the_wait_at_once(line) -> None:
    console, guest = line
    guest.sendall(b"bye")
    guest.close()
    with pytest.raises(ConsoleClosed):
        console.wait_for(b"ready", 60)


def test_what_the_guest_does_not_take_times_out(line) -> None:
    console, _ = line
    with pytest.raises(ConsoleTimeout, match="the guest to take input"):
        console.send(bytes(10_000_000), timeout=0.05)
