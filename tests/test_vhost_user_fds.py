"""Every descriptor has exactly one owner."""

import gc
import os

import pytest

from vhost_user.fds import OwnedFds


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_close_closes_all_and_may_be_repeated():
    numbers = [os.eventfd(0), os.eventfd(0)]
    fds = OwnedFds(numbers)
    assert (len(fds), fds[0], fds[1]) == (2, *numbers)
    fds.close()
    fds.close()
    assert not any(is_open(fd) for fd in numbers)
    assert len(fds) == 0


def test_what_is_taken_is_no_longer_closed():
    first, second = os.eventfd(0), os.eventfd(0)
    with OwnedFds([first, second]) as fds:
        taken = fds.take()
    assert taken == first
    assert is_open(first)
    assert not is_open(second)
    os.close(first)


def test_take_all_keeps_the_order():
    numbers = [os.eventfd(0) for _ in range(3)]
    with OwnedFds(numbers) as fds:
        assert fds.take_all() == numbers
    for fd in numbers:
        os.close(fd)


def test_nothing_left_to_take():
    with pytest.raises(IndexError):
        OwnedFds().take()


def test_forgotten_descriptors_are_closed_with_a_warning():
    number = os.eventfd(0)
    fds = OwnedFds([number])
    with pytest.warns(ResourceWarning, match="never taken nor closed"):
        del fds
        gc.collect()
    assert not is_open(number)


def test_closing_what_somebody_else_closed_is_our_mistake_and_shows():
    number = os.eventfd(0)
    os.close(number)
    with pytest.raises(OSError, match="Bad file descriptor"):
        OwnedFds([number]).close()


def test_an_error_of_the_file_behind_it_does_not_come_out_of_close(monkeypatch):
    number = os.eventfd(0)
    close = os.close

    def failing(fd: int) -> None:
        close(fd)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "close", failing)
    OwnedFds([number]).close()
    assert not is_open(number)
