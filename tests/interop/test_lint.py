"""DPDK's virtio-user driver under the linter: clean, but for what is written down in docs/lint.md."""

import itertools
import tempfile
from collections.abc import Iterator

import pytest

from vdev.testing.daemon import Daemon
from vdev.testing.measure import ping_from_host
from vdev.testing.netns import Namespace, why_no_tap
from vdev.testing.testpmd import Rings, Testpmd, why_no_testpmd
from vdev.testing.waiting import wait_until

ENOUGH = 1000  # frames round the loop


@pytest.fixture
def socket_path() -> Iterator[str]:
    reason = why_no_testpmd()
    if reason:
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="vdev-") as folder:
        yield f"{folder}/socket"


# A frame that is sent on keeps the num_buffers with which it was received (virtqueue_clear_net_hdr leaves it as it is);
# the answer to one GET_VRING_BASE is still in the next request, where it happens not to be 0.
LEFT_BEHIND = {"NET-TX-DR-02", "VU-BASE-F-01"}


def broken(daemon: Daemon, chains: int) -> set[str]:
    """The rules that were broken, in at least so many chains."""
    (summary,) = daemon.events("lint-summary")
    assert summary["looked_at"]["chains"] >= chains
    assert {event["row"] for event in daemon.events("lint")} == set(summary["broken"])
    return set(summary["broken"])


@pytest.mark.parametrize(("packed", "in_order"), itertools.product((False, True), repeat=2))
def test_what_comes_in_goes_out(socket_path: str, packed: bool, in_order: bool) -> None:
    rings = Rings(packed, in_order, mergeable=packed == in_order)
    with (Daemon(["--socket-path", socket_path, "--port", "loopback:", "--lint"]) as daemon,
          Testpmd(socket_path, rings) as testpmd):
        testpmd.start(bursts=2)
        wait_until(lambda: testpmd.received() >= ENOUGH, "frames go round", 60, pause=0.2)
        testpmd.stop_forwarding()
        testpmd.stop()
    assert broken(daemon, ENOUGH) | {"VU-BASE-F-01"} == LEFT_BEHIND


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_frames_of_several_buffers(socket_path: str, packed: bool) -> None:
    """In an indirect table of a packed ring DPDK marks the header as device-writable, with readable descriptors behind
    it (vring_desc_init_indirect_packed), and sets NEXT in it. The device drops such chains, and the linter says why."""
    reason = why_no_tap()
    if reason:
        pytest.skip(f"no TAP device to be had: {reason}")
    with Namespace() as lan:
        arguments = ["--socket-path", socket_path, "--port", "tap:vdev-lint,ip=10.42.0.1/24", "--lint"]
        with (Daemon(arguments, namespace=lan) as daemon,
              Testpmd(socket_path, Rings(packed), mode="icmpecho", buffer_size=512) as testpmd):
            testpmd.start()
            report = ping_from_host(lan, "10.42.0.2", 5, interval=0.2, size=1472)
            testpmd.stop_forwarding()
            testpmd.stop()
        assert report.received == (0 if packed else 5)
    of_the_driver = broken(daemon, 10) - LEFT_BEHIND
    assert of_the_driver == ({"VQ-PACKED-DR-06", "VQ-PACKED-DR-09"} if packed else set())
