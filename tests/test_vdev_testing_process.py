"""Child processes under control: vdev/testing/process.py."""

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vdev.testing.process import Child, ProcessDied


def test_log_holds_both_streams_also_after_the_end() -> None:
    child = Child(["sh", "-c", "echo out; echo err >&2; exit 3"])
    assert child.wait(5) == 3
    assert child.log() == "out\nerr\n"
    assert child.stop() == 3
    assert child.log() == "out\nerr\n"


def test_stop_is_a_sigterm_and_may_be_repeated() -> None:
    child = Child(["sleep", "60"])
    assert child.running()
    assert child.stop() == -signal.SIGTERM
    assert child.stop() == -signal.SIGTERM
    assert not child.running()


def test_what_ignores_sigterm_is_killed() -> None:
    ready, childs = os.pipe()
    stubborn = f"trap '' TERM; echo >/proc/self/fd/{childs}; while :; do sleep 60; done"
    with Child(["sh", "-c", stubborn], pass_fds=[childs]) as child:
        os.read(ready, 1)
        assert child.stop(timeout=0.1) == -signal.SIGKILL
    os.close(ready)
    os.close(childs)


def test_a_failure_is_told_with_the_log() -> None:
    child = Child(["sh", "-c", "echo no such device; exit 1"])
    child.wait(5)
    assert str(child.died("start")) == "start: sh ended with status 1\nno such device"
    child.stop()


def test_waiting_is_bounded() -> None:
    complaint = "no end within 0.05 s: sleep still runs"
    with Child(["sleep", "60"]) as child, pytest.raises(ProcessDied, match=complaint):
        child.wait(0.05)


def test_a_child_does_not_outlive_a_killed_parent() -> None:
    code = ("import sys; from vdev.testing.process import Child; child = Child(['sleep', '60']);"
            "print(child.pid, flush=True); sys.stdin.read()")
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    pid = int(parent.stdout.readline())
    pidfd = os.pidfd_open(pid)
    while not Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"sleep"):
        time.sleep(0.01)  # until then it has not told the kernel yet
    parent.kill()
    parent.communicate()
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    assert poll.poll(5000), "the child still runs"
    os.close(pidfd)
