"""Fixtures for tests with real guests: QEMU in the versions at hand, a guest image, daemons, networks."""

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vdev.qemu import QemuError, qemu_args
from vdev.testing.daemon import Daemon
from vdev.testing.guest import Image, LinuxGuest
from vdev.testing.netns import Namespace, why_no_tap
from vdev.testing.qemu import QemuProgram, find_program

TOOLS = Path(__file__).resolve().parents[2] / "tools"
TOOL_SECONDS = 600  # the first time, a download of some 30 MB
# For one test with its fixtures: the first one waits for both tools.
TEST_SECONDS = 2 * TOOL_SECONDS + 120


# Of the marked tests, which a normal run leaves to --long: each QEMU takes one ring format.
LONG_PAIRS = {("distribution", "packed"), ("backport", "split")}
NEWEST = "backport"


@pytest.hookimpl(tryfirst=True)  # before tests/conftest.py looks for the mark
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Guests are slow, and what they are made of may have to be fetched: the usual limit is not for them. With an
    older QEMU a normal run takes at least one test of each module, and --long all (the mark newest_qemu).

    Tests that share one guest (a fixture of their module) stay together and in order when pytest-xdist deals
    the tests out (--dist=loadgroup)."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.timeout(TEST_SECONDS))
            if item.get_closest_marker("crossed"):
                parameters = item.callspec.params
                rings = parameters.get("rings") or ("packed" if parameters["packed"] else "split")
                if (parameters["qemu"], rings) in LONG_PAIRS:
                    item.add_marker(pytest.mark.long)
            if item.get_closest_marker("newest_qemu") and item.callspec.params["qemu"] != NEWEST:
                item.add_marker(pytest.mark.long)
            if "bench" in item.fixturenames:
                program = item.callspec.params["qemu"] if "qemu" in item.fixturenames else "uml"
                item.add_marker(pytest.mark.xdist_group(f"{item.path.stem}-{program}"))


def _made_by(tool: str, *options: str) -> str:
    """What a program of tools/ prints; skips with its reason when it cannot do its work."""
    done = subprocess.run([TOOLS / tool, *options], capture_output=True, text=True, timeout=TOOL_SECONDS, check=False)
    if done.returncode:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    return done.stdout


@pytest.fixture(scope="session")
def image() -> Image:
    """The Linux guest's kernel and initramfs."""
    return Image.parse(_made_by("guest-image"))


@pytest.fixture(scope="session")
def uml_image() -> Image:
    """A guest of user-mode Linux."""
    return Image.parse(_made_by("guest-image", "--uml"))


@pytest.fixture(scope="session", params=["distribution", "backport"])
def qemu(request: pytest.FixtureRequest) -> QemuProgram:
    """Each QEMU in turn: the distribution's own (7.2 on Debian 12), and 10.0 from its backports."""
    try:
        if request.param == "distribution":
            return find_program()
        return find_program(json.loads(_made_by("qemu-backport"))["binary"])
    except QemuError as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def tap_possible() -> None:
    """Skips where no network namespace with a TAP device can be had."""
    reason = why_no_tap()
    if reason:
        pytest.skip(f"no TAP device to be had: {reason}")


@pytest.fixture
def lan(tap_possible: None) -> Iterator[Namespace]:
    """A network namespace in which TAP devices can be made."""
    with Namespace() as namespace:
        yield namespace


@pytest.fixture
def socket_folder() -> Iterator[Path]:
    """A directory for sockets, with a path short enough for their addresses."""
    with tempfile.TemporaryDirectory(prefix="vdev-") as folder:
        yield Path(folder)


@pytest.fixture
def start_daemon() -> Iterator[Callable[..., Daemon]]:
    """Start ``vdev.testing.daemon.Daemon(...)``; at the end each must stop well, with a clean log."""
    with contextlib.ExitStack() as daemons:
        yield lambda *arguments, **options: daemons.enter_context(Daemon(*arguments, **options))


@pytest.fixture
def start_guest(qemu: QemuProgram, image: Image) -> Iterator[Callable[..., LinuxGuest]]:
    """Start a Linux guest on a vhost-user socket: ``start_guest(path, queue_pairs=1, cpus=1, packed=False,
    server=False)``."""
    with contextlib.ExitStack() as guests:

        def start(path: Path, queue_pairs: int = 1, cpus: int = 1, packed: bool = False,
                  server: bool = False) -> LinuxGuest:
            network = qemu_args(str(path), memory="256M", queue_pairs=queue_pairs, qemu=qemu.binary, packed=packed,
                                server=server)
            return guests.enter_context(LinuxGuest(qemu, image, network, cpus=cpus))

        yield start
