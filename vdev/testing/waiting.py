"""Waiting for what another thread, process or guest does, instead of for a time."""

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], object], what: str | Callable[[], str], seconds: float = 60,
               pause: float = 0.002) -> None:
    """Wait until ``condition`` holds, asked every ``pause`` seconds. Raises AssertionError with ``what``, or with what
    it says then."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {what if isinstance(what, str) else what()}")
        time.sleep(pause)
