"""Rows P87 to P94 of docs/conformance/messages.tsv: what a hostile front-end says about the dirty log.

Over a real socket, to a daemon that serves on after each test and holds no more than before (tests/conftest.py).
"""

import os

import pytest

from vdev.testing.kept import Traced
from vhost_user.spec import Request

pytestmark = pytest.mark.timeout(120)


def test_P94_log_call_descriptor_without_a_log(daemon) -> None:
    """VHOST_F_LOG_ALL was not acknowledged: there is nothing to be called for."""
    with Traced() as traced:
        daemon.refuses(Request.SET_LOG_FD, fds=[traced.fd])
        daemon.refuses(Request.SET_LOG_FD)
        assert traced.closed()


def test_P87_P88_log_that_was_not_negotiated(daemon) -> None:
    fd = os.memfd_create("log")
    os.ftruncate(fd, 4096)
    for size, offset in ((0, 0), (4096, 0), (8192, 0), (4096, 1), ((1 << 64) - 1, 1), (4096, (1 << 64) - 4096)):
        daemon.refuses(Request.SET_LOG_BASE, size.to_bytes(8, "little") + offset.to_bytes(8, "little"), [fd])
    os.close(fd)
