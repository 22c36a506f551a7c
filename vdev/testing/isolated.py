"""Tests that need a network of their own *inside* the process: the test runs in a forked child.

A namespace is entered for good and takes a single-threaded process, so the child does it and is thrown
away after. netns.py is for running other programs in a namespace.
"""

import contextlib
import ctypes
import errno
import functools
import os
import signal
import subprocess
import traceback
from collections.abc import Callable, Iterator

import pytest

from vdev import capabilities
from vdev.ports import link, tun

_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNET = 0x40000000

_PASSED, _FAILED, _SKIPPED = range(3)


def isolated(test: Callable[..., None]) -> Callable[..., None]:
    """Decorator: run ``test`` in a child process, as root of a network namespace with only ``lo``.

    Skips where this machine grants no such namespace. A failure carries what the child raised, and its traceback.
    """
    @functools.wraps(test)
    def run(*args: object, **kwargs: object) -> None:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            _child(writer, functools.partial(test, *args, **kwargs))
        os.close(writer)
        with _killed_on_error(pid), open(reader, encoding="utf-8") as report:
            text = report.read()
            verdict = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if verdict == _SKIPPED:
            pytest.skip(text)
        if verdict != _PASSED:
            pytest.fail(text or f"the isolated test ended with {verdict} and said nothing", pytrace=False)

    return run


def mute() -> None:
    """Interfaces that are made from now on say nothing that nobody asked for: the host has no IPv6 there."""
    with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
        _write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1")


def bridge(*names: str) -> None:
    """Join these interfaces by a bridge, for frames of any length. A frame is where it goes, or is dropped and counted
    there, when it is written: nothing queues it in between. Skips where there can be no bridge."""
    try:
        ip("link", "add", "between", "type", "bridge", "mcast_snooping", "0")
    except subprocess.CalledProcessError:
        pytest.skip("the kernel has no bridge")
    for name in names:
        subprocess.run(["tc", "qdisc", "replace", "dev", name, "root", "noqueue"], check=True, timeout=30)
        ip("link", "set", name, "mtu", "65521", "master", "between", "up")
    ip("link", "set", "between", "up")


def ip(*words: str) -> str:
    """What the command says. Raises CalledProcessError."""
    return subprocess.run(["ip", *words], check=True, timeout=30, stdout=subprocess.PIPE, text=True).stdout


def drop_rights() -> None:
    """Lose every capability, as a plain user would be without them; for good. The user stays who it is."""
    capabilities.keep_only(())


def _child(writer: int, body: Callable[[], None]) -> None:
    verdict, text = _PASSED, ""
    try:
        _enter_namespace()
        body()
    except pytest.skip.Exception as e:
        verdict, text = _SKIPPED, str(e)
    except BaseException as e:
        verdict, text = _FAILED, f"{''.join(traceback.format_exception_only(e))}\n{traceback.format_exc()}"
    with open(writer, "w", encoding="utf-8") as report:
        report.write(text)
    os._exit(verdict)


def _enter_namespace() -> None:
    if not os.path.exists(tun.DEVICE):
        pytest.skip(f"no {tun.DEVICE} on this machine")
    uid, gid = os.geteuid(), os.getegid()
    try:
        try:
            _unshare(_CLONE_NEWNET)
        except PermissionError:
            _unshare(_CLONE_NEWUSER | _CLONE_NEWNET)
            _write("/proc/self/setgroups", "deny")
            _write("/proc/self/uid_map", f"0 {uid} 1")
            _write("/proc/self/gid_map", f"0 {gid} 1")
        link.bring_up("lo")
    except OSError as e:
        pytest.skip(f"no network namespace of one's own on this machine: {e}")


def _unshare(flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(flags):
        code = ctypes.get_errno()
        raise OSError(code, f"unshare: {os.strerror(code)} ({errno.errorcode.get(code)})")


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as f:
        f.write(text)


@contextlib.contextmanager
def _killed_on_error(pid: int) -> Iterator[None]:
    """A test timeout in the parent must not leave the child behind."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        raise
