"""vdev/loop.py: descriptors, timers, signals."""

import os
import resource
import signal
import socket
import threading
import time

import pytest

from vdev.loop import Loop


@pytest.fixture
def loop():
    errors = []
    loop = Loop(errors.append)
    loop.errors = errors
    yield loop
    loop.close()


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_readable_descriptor_is_served_until_stop(loop, pair):
    ours, theirs = pair
    seen = []

    def readable():
        seen.append(ours.recv(1))
        if len(seen) == 3:
            loop.stop()

    loop.watch(ours.fileno(), readable)
    theirs.send(b"abc")
    loop.run()
    assert seen == [b"a", b"b", b"c"]


def test_writable_watch(loop, pair):
    loop.watch(pair[0].fileno(), loop.stop, write=True)
    loop.run()


def test_hang_up_counts_as_readable(loop, pair):
    loop.watch(pair[0].fileno(), loop.stop)
    pair[1].close()
    loop.run()


def test_two_busy_descriptors_take_turns(loop):
    order = []
    pairs = [socket.socketpair() for _ in range(2)]
    for number, (ours, theirs) in enumerate(pairs):
        theirs.send(b"x")  # never read: ready for ever

        def readable(number=number):
            order.append(number)
            if len(order) == 10:
                loop.stop()

        loop.watch(ours.fileno(), readable)
    loop.run()
    assert sorted(order[:2]) == sorted(order[8:]) == [0, 1]
    for ours, theirs in pairs:
        ours.close()
        theirs.close()


def test_event_of_a_closed_descriptor_is_not_given_to_its_successor(loop):
    """Both are ready in one turn; whoever is served first replaces the other by a new one of the same number."""
    pairs = [socket.socketpair() for _ in range(2)]
    served, wrong = [], []

    def serve(mine: int):
        other = pairs[1 - mine][0]
        number = other.fileno()
        loop.unwatch(number)
        other.close()
        new = socket.socketpair()
        assert number in (new[0].fileno(), new[1].fileno())
        pairs.append(new)
        loop.watch(number, lambda: wrong.append(number))
        loop.unwatch(pairs[mine][0].fileno())
        served.append(mine)
        loop.call_later(0, loop.stop)

    for mine, (ours, theirs) in enumerate(pairs):
        theirs.send(b"x")
        loop.watch(ours.fileno(), lambda mine=mine: serve(mine))
    loop.run()
    assert len(served) == 1
    assert not wrong
    for one in pairs:
        for end in one:
            end.close()


def test_unwatch_of_an_unknown_descriptor_is_harmless(loop):
    loop.unwatch(12345)


def test_timers_run_in_order_once(loop):
    order = []
    loop.call_later(0.02, lambda: (order.append("late"), loop.stop()))
    loop.call_later(0.0, lambda: order.append("early"))
    loop.call_at(time.monotonic() + 0.01, lambda: order.append("middle"))
    loop.run()
    assert order == ["early", "middle", "late"]


def test_cancelled_timer_does_not_run(loop):
    ran = []
    timer = loop.call_later(0, lambda: ran.append(1))
    timer.cancel()
    loop.call_later(0.01, loop.stop)
    loop.run()
    timer.cancel()
    assert not ran


def test_timer_that_renews_itself_does_not_starve_descriptors(loop, pair):
    def again():
        loop.call_later(0, again)

    again()
    loop.watch(pair[0].fileno(), loop.stop)
    threading.Timer(0.05, pair[1].send, [b"x"]).start()
    loop.run()


def test_F37_timers_follow_the_monotonic_clock(loop, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 0.0)
    loop.call_later(0.01, loop.stop)
    loop.run()


def test_F38_exception_in_a_callback_is_reported_and_the_loop_goes_on(loop, pair):
    def broken():
        pair[0].recv(1)
        raise RuntimeError("oops")

    loop.watch(pair[0].fileno(), broken)
    pair[1].send(b"x")
    loop.call_later(0, lambda: 1 / 0)
    loop.call_later(0.02, loop.stop)
    loop.run()
    assert sorted(type(error).__name__ for error in loop.errors) == ["RuntimeError", "ZeroDivisionError"]


def test_signal_runs_its_callback_in_the_loop(loop):
    seen = []
    loop.on_signal(signal.SIGUSR1, lambda: (seen.append("usr1"), loop.stop()))
    threading.Timer(0.02, os.kill, [os.getpid(), signal.SIGUSR1]).start()
    loop.run()
    assert seen == ["usr1"]


def test_signal_before_run_is_not_lost(loop):
    loop.on_signal(signal.SIGUSR1, loop.stop)
    os.kill(os.getpid(), signal.SIGUSR1)
    loop.run()


def test_close_gives_the_signal_back():
    before = signal.getsignal(signal.SIGUSR1)
    loop = Loop(lambda exception: None)
    loop.on_signal(signal.SIGUSR1, loop.stop)
    loop.close()
    assert signal.getsignal(signal.SIGUSR1) is before
    assert signal.set_wakeup_fd(-1) == -1


def test_F33_signals_at_a_kilohertz_lose_no_byte(loop, pair):
    ours, theirs = pair
    received = bytearray()
    ticks = []
    sent = os.urandom(20_000)

    def readable():
        received.extend(ours.recv(16))
        if len(received) == len(sent):
            loop.stop()

    loop.on_signal(signal.SIGALRM, lambda: ticks.append(1))
    loop.watch(ours.fileno(), readable)
    sender = threading.Thread(target=lambda: theirs.sendall(sent))
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        sender.start()
        loop.run()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    sender.join()
    assert received == sent
    assert ticks
    assert not loop.errors


def test_P19_descriptors_above_1023(loop, pair):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2001:
        pytest.skip("the hard limit on open files is below 2001")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2001), hard))
    high = os.dup2(pair[0].fileno(), 2000)
    try:
        loop.watch(high, loop.stop)
        pair[1].send(b"x")
        loop.run()
    finally:
        os.close(high)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
