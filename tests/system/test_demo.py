"""The two demonstrations end well and leave nothing behind."""

import functools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vdev.qemu import QemuError
from vdev.testing.guest import Image
from vdev.testing.netns import why_no_tap
from vdev.testing.qemu import find_program

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory for temporary files, short enough for sockets; whatever is left in it was left behind."""
    try:
        find_program()
    except QemuError as reason:
        pytest.skip(str(reason))
    with tempfile.TemporaryDirectory(prefix="vdev-") as name:
        yield Path(name)


def _start(command: list[str], folder: Path) -> subprocess.Popen:
    # As a terminal starts it: whoever runs the tests in the background had SIGINT ignored, which is inherited.
    attentive = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, env={**os.environ, "TMPDIR": str(folder)},
                            preexec_fn=attentive)


def _traces(folder: Path) -> list[str]:
    """Files in ``folder``, and processes that were told about it."""
    left = [str(path) for path in folder.iterdir()]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder).encode() in (process / "environ").read_bytes():
                left.append((process / "cmdline").read_bytes().decode(errors="replace"))
        except OSError:
            continue  # it ended, or is not ours
    return left


def _interfaces() -> set[str]:
    return {path.name for path in Path("/sys/class/net").iterdir()}


def test_vdev_demo(folder: Path) -> None:
    before = _interfaces()
    demo = _start([sys.executable, "-m", "vdev", "demo", "--pings", "3"], folder)
    said, _ = demo.communicate(timeout=100)
    assert demo.returncode == 0, said
    assert "vdev gave it the address 10.0.76." in said
    assert said.count("answered in") == 3 and said.endswith("3 pings, 3 answers.\n")
    assert "features negotiated: VERSION_1\n" in said
    assert _traces(folder) == [] and _interfaces() == before


def _wait_for(demo: subprocess.Popen, text: str) -> None:
    assert any(text in line for line in demo.stdout), f"it never said {text!r}"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_vdev_demo_ended_halfway_leaves_nothing(folder: Path, number: signal.Signals) -> None:
    demo = _start([sys.executable, "-m", "vdev", "demo", "--pings", "1000"], folder)
    _wait_for(demo, "answered in")
    demo.send_signal(number)
    said, _ = demo.communicate(timeout=20)
    assert demo.returncode == 1 and said.endswith("vdev: interrupted\n")
    assert _traces(folder) == []


def test_tools_demo_ended_halfway_leaves_nothing(folder: Path) -> None:
    demo = _start([str(ROOT / "tools/demo")], folder)
    _wait_for(demo, "answered in")
    demo.terminate()
    demo.communicate(timeout=20)
    assert demo.returncode == 130
    assert _traces(folder) == []


def test_vdev_demo_killed_halfway_leaves_no_process(folder: Path) -> None:
    demo = _start([sys.executable, "-m", "vdev", "demo", "--pings", "1000"], folder)
    _wait_for(demo, "answered in")
    demo.kill()
    demo.communicate(timeout=20)
    deadline = time.monotonic() + 5
    while (left := [trace for trace in _traces(folder) if not trace.startswith(str(folder))]):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)  # processes that are nobody's children cannot be waited for


def test_vdev_demo_without_qemu_says_what_to_install(folder: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "vdev", "demo"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PATH": str(folder)})
    assert done.returncode == 1
    assert done.stderr.startswith("vdev: ") and "apt install" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.early
def test_tools_demo(folder: Path, image: Image) -> None:
    # The image is asked for so that its download is not part of this.
    before = _interfaces()
    demo = _start([str(ROOT / "tools/demo")], folder)
    said, _ = demo.communicate(timeout=110)
    assert demo.returncode == 0, said
    assert "Both acts passed." in said and "pings, 10 answers." in said
    if why_no_tap():
        assert "left out: this machine lets us make no TAP device" in said
    else:
        assert said.count("50 of 50 answered") == 2
        assert said.count("Mbit/s") == 2 and said.count("round trip   ") == 2 and "HOST_TSO4" in said
    assert _traces(folder) == [] and _interfaces() == before
