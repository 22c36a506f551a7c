"""vdev as a child process: vdev/testing/daemon.py."""

import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vdev.testing.daemon import Daemon, as_plain_user
from vdev.testing.process import ProcessDied


def test_it_is_ready_says_what_happens_and_stops_well(tmp_path: Path) -> None:
    with Daemon(["--socket-path", f"{tmp_path}/s", "--port", "null:"]) as daemon:
        assert (tmp_path / "s").is_socket()
        log = daemon.stop()
    assert f"ready socket={tmp_path}/s" in log
    assert [event["reason"] for event in daemon.events("ending")] == ["SIGTERM"]
    assert not (tmp_path / "s").exists()


def test_a_daemon_that_gives_up_is_told_in_its_own_words(tmp_path: Path) -> None:
    with pytest.raises(ProcessDied, match=r"(?s)did not get ready: .* ended with status 1\nvdev: .*no/such"):
        Daemon(["--socket-path", f"{tmp_path}/no/such/s", "--port", "null:"])


def test_one_that_ended_on_its_own_did_not_end_well(tmp_path: Path) -> None:
    daemon = Daemon(["--socket-path", f"{tmp_path}/s", "--port", "null:"])
    daemon.child.kill()
    with pytest.raises(ProcessDied, match="had ended on its own"):
        daemon.stop()


def test_a_plain_user_has_no_capability() -> None:
    status = subprocess.check_output(as_plain_user(["cat", "/proc/self/status"]), text=True)
    assert set(re.findall(r"^Cap(?:Prm|Eff|Inh|Amb):\s*(\w+)", status, re.MULTILINE)) == {"0" * 16}


def test_a_plain_user_ends_with_its_parent() -> None:
    code = ("import sys; from vdev.testing.daemon import as_plain_user;"
            "from vdev.testing.process import Child;"
            "child = Child(as_plain_user(['sleep', '60'])); print(child.pid, flush=True); sys.stdin.read()")
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    pid = int(parent.stdout.readline())
    pidfd = os.pidfd_open(pid)
    while not Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"sleep"):
        time.sleep(0.01)  # not one of the wrappers any more, whose own wish would do
    parent.kill()
    parent.communicate()
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    assert poll.poll(5000), "the child still runs"
    os.close(pidfd)
