"""DPDK's virtio-user, a front-end and driver written without QEMU and Linux, passes traffic both ways."""

import tempfile
import time
from collections.abc import Iterator

import pytest

from vdev.testing.daemon import Daemon
from vdev.testing.measure import ping_from_host
from vdev.testing.netns import Namespace, why_no_tap
from vdev.testing.testpmd import Testpmd, why_no_testpmd

BURST = 32  # frames: testpmd's default
ENOUGH = 50_000  # frames round the loop

mergeable = pytest.mark.parametrize("mergeable", [True, False], ids=["mergeable", "one-buffer"])
queue_pairs = pytest.mark.parametrize("queue_pairs", [1, 2])


@pytest.fixture
def socket_path() -> Iterator[str]:
    reason = why_no_testpmd()
    if reason:
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="vdev-") as folder:
        yield f"{folder}/socket"


def _wait_for(testpmd: Testpmd, frames: int) -> None:
    """Let it run until ``frames`` came in, a minute at the most."""
    deadline = time.monotonic() + 60
    while testpmd.received() < frames and time.monotonic() < deadline:
        time.sleep(0.1)  # its counters cannot be waited for


@mergeable
@queue_pairs
def test_frames_go_round_without_a_loss(socket_path: str, mergeable: bool, queue_pairs: int) -> None:
    """Two bursts a queue circle between testpmd, which sends back whatever comes in, and ``loopback:``."""
    daemon = Daemon(["--socket-path", socket_path, "--port", "loopback:", "--queue-pairs", str(queue_pairs)])
    with daemon, Testpmd(socket_path, mergeable=mergeable, queue_pairs=queue_pairs) as testpmd:
        testpmd.start(bursts=2)
        _wait_for(testpmd, ENOUGH)
        streams = testpmd.stop_forwarding()
        assert testpmd.stop() == 0
    (driver,) = daemon.events("driver")
    assert ("MRG_RXBUF" in driver["features"]) == mergeable
    assert len(streams) == queue_pairs
    for stream in streams:
        assert stream.received >= ENOUGH // queue_pairs // 4
        # What it sent and has not seen again is what was on its way when it stopped.
        assert 0 <= stream.sent - stream.received <= 2 * BURST
        assert stream.dropped == 0
    (end,) = daemon.events("session-end")
    assert end["from_guest"]["dropped"] == end["to_guest"]["dropped"] == {}
    assert end["from_guest"]["frames"] == sum(stream.sent for stream in streams)
    assert end["from_guest"]["frames"] - end["to_guest"]["frames"] <= 2 * BURST * queue_pairs


@mergeable
@queue_pairs
def test_the_host_pings_testpmd_through_a_tap(socket_path: str, mergeable: bool, queue_pairs: int) -> None:
    reason = why_no_tap()
    if reason:
        pytest.skip(f"no TAP device to be had: {reason}")
    with Namespace() as lan:
        daemon = Daemon(["--socket-path", socket_path, "--port", "tap:vdev-dpdk,ip=10.13.0.1/24",
                         "--queue-pairs", str(queue_pairs)], namespace=lan)
        with daemon, Testpmd(socket_path, mergeable=mergeable, queue_pairs=queue_pairs,
                             mode="icmpecho") as testpmd:
            testpmd.start()
            # The second is as long as one buffer of testpmd's can hold.
            for size in (56, 1472):
                report = ping_from_host(lan, "10.13.0.2", 200, interval=0.005, size=size)
                assert (report.sent, report.received) == (200, 200)
            streams = testpmd.stop_forwarding()
            assert sum(stream.received for stream in streams) >= 400
            assert testpmd.stop() == 0
        (end,) = daemon.events("session-end")
        assert end["from_guest"]["dropped"] == end["to_guest"]["dropped"] == {}
