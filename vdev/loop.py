"""The control loop: descriptors, timers and signals, one callback at a time on one thread.

Theory of operation
-------------------
A turn waits with epoll (descriptors above 1023 are fine) until a watched descriptor is ready, a timer is due
or a signal came, and runs each callback that is due once. Level-triggered: a callback that leaves work behind
is called again in the next turn, after everybody else had theirs, so one noisy peer starves nobody.

A callback may remove any watch, close its descriptor and open others, which reuse the number, while events of
the same turn are still to be delivered. Each watch is therefore an object of its own, and an event is
delivered only if its watch is still the one in force.

Time is monotonic: steps of the wall clock change nothing. Signals wake the loop through a socket pair, as
``signal.set_wakeup_fd`` wants; their callbacks run in the loop like any other, never in the middle of one.

An exception in a callback does not end the loop: it goes to the loop's ``on_exception``.
"""

import contextlib
import heapq
import itertools
import selectors
import signal
import socket
import time
from collections.abc import Callable

Callback = Callable[[], None]

SYSCALLS = {
    "epoll_create1": "the selector",
    "epoll_ctl": "watches come and go",
    "epoll_wait": "waiting for events",
    "epoll_pwait": "the same, on machines without epoll_wait",
    "recvfrom": "signals, which arrive over a socket pair",
}


class Timer:
    """A callback due at ``when`` (seconds of ``time.monotonic``)."""

    def __init__(self, when: float, callback: Callback):
        self.when = when
        self.callback: Callback | None = callback

    def cancel(self) -> None:
        """Never run it. Harmless when it has run."""
        self.callback = None


class Loop:
    """One thread's events. Only :meth:`stop` may be called before :meth:`run`; none from another thread."""

    def __init__(self, on_exception: Callable[[Exception], None]):
        self._on_exception = on_exception
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Timer]] = []
        self._sequence = itertools.count()
        self._stopping = False
        self._signals: dict[int, tuple[Callback, object]] = {}
        self._woken, self._wake = socket.socketpair()
        self._woken.setblocking(False)
        self._wake.setblocking(False)
        self._old_wakeup: int | None = None
        self.watch(self._woken.fileno(), self._on_wakeup)

    # ---------------------------------------------------------------------------- descriptors

    def watch(self, fd: int, callback: Callback, write: bool = False) -> None:
        """Call ``callback`` whenever ``fd`` is readable (``write``: writable), has failed or was hung up."""
        event = selectors.EVENT_WRITE if write else selectors.EVENT_READ
        self._selector.register(fd, event, callback)

    def unwatch(self, fd: int) -> None:
        """Forget ``fd``, which must not be closed yet. Harmless when it is not watched."""
        with contextlib.suppress(KeyError):
            self._selector.unregister(fd)

    # --------------------------------------------------------------------------------- timers

    def call_at(self, when: float, callback: Callback) -> Timer:
        """Call ``callback`` once, not before ``when`` (seconds of ``time.monotonic``)."""
        timer = Timer(when, callback)
        heapq.heappush(self._timers, (when, next(self._sequence), timer))
        return timer

    def call_later(self, delay: float, callback: Callback) -> Timer:
        """Call ``callback`` once, not before ``delay`` seconds from now."""
        return self.call_at(time.monotonic() + delay, callback)

    # -------------------------------------------------------------------------------- signals

    def on_signal(self, number: int, callback: Callback) -> None:
        """Run ``callback`` in the loop when the signal comes. Main thread only."""
        if self._old_wakeup is None:
            self._old_wakeup = signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        # The handler does nothing: having one makes the interpreter write the number to the wake-up socket.
        old = signal.signal(number, lambda number, frame: None)
        self._signals[number] = (callback, old)

    def _on_wakeup(self) -> None:
        for number in self._woken.recv(4096):
            if number in self._signals:
                self._call(self._signals[number][0])

    # ------------------------------------------------------------------------------------ run

    def run(self) -> None:
        """Serve until :meth:`stop`."""
        while not self._stopping:
            self._turn()

    def stop(self) -> None:
        """Make :meth:`run` return once the current callback has."""
        self._stopping = True

    def close(self) -> None:
        """Give back the signals and close the loop's own descriptors; the watched ones stay open."""
        for number, (_, old) in self._signals.items():
            signal.signal(number, old)
        if self._old_wakeup is not None:
            signal.set_wakeup_fd(self._old_wakeup)
        self._selector.close()
        self._woken.close()
        self._wake.close()

    def _turn(self) -> None:
        for key, _ in self._selector.select(self._patience()):
            if self._stopping:
                return
            # Not ==: keys are tuples, and a new watch with the same number and callback would compare equal.
            if self._selector.get_map().get(key.fd) is key:
                self._call(key.data)
        now = time.monotonic()
        # Timers that come to be due while these run wait for the next turn: descriptors come first again.
        due = []
        while self._timers and self._timers[0][0] <= now:
            due.append(heapq.heappop(self._timers)[2])
        for timer in due:
            if self._stopping:
                return
            if timer.callback is not None:
                callback, timer.callback = timer.callback, None
                self._call(callback)

    def _patience(self) -> float | None:
        """Seconds until the first timer that still counts; None when there is none."""
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        if not self._timers:
            return None
        return max(0.0, self._timers[0][0] - time.monotonic())

    def _call(self, callback: Callback) -> None:
        try:
            callback()
        except Exception as exception:
            self._on_exception(exception)
