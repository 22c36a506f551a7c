"""DPDK's virtio-user, a front-end and driver written without QEMU and Linux, passes traffic both ways.

The normal run takes a sample of all kinds of rings in which every two properties meet; ``--long`` takes all.
"""

import itertools
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vdev.testing.daemon import Daemon
from vdev.testing.measure import ping_from_host
from vdev.testing.netns import Namespace, why_no_tap
from vdev.testing.testpmd import Rings, StreamReport, Testpmd, why_no_testpmd

BURST = 32  # frames: testpmd's default
ENOUGH = 20_000  # frames round the loop: twice round the longest of two rings

FORMATS = [(False, False), (True, False), (False, True), (True, True)]  # packed, in order
SIZES = [64, 256, 1024, 4096]
ALL = [Rings(packed, in_order, mergeable, size, pairs)
       for (packed, in_order), mergeable, size, pairs
       in itertools.product(FORMATS, (True, False), SIZES, (1, 2))]


def _sampled(rings: Rings) -> bool:
    """One of four, so that each value of a property meets each value of any other."""
    diagonal = FORMATS.index((rings.packed, rings.in_order)) + SIZES.index(rings.size)
    return (rings.mergeable, rings.queue_pairs) == (diagonal % 2 == 0, 1 + diagonal // 2 % 2)


@pytest.fixture
def socket_path() -> Iterator[str]:
    reason = why_no_testpmd()
    if reason:
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="vdev-") as folder:
        yield f"{folder}/socket"


@pytest.fixture
def lan() -> Iterator[Namespace]:
    reason = why_no_tap()
    if reason:
        pytest.skip(f"no TAP device to be had: {reason}")
    with Namespace() as namespace:
        yield namespace


def _serve(socket_path: str, port: str, rings: Rings, *more: str, **options) -> Daemon:
    arguments = ["--socket-path", socket_path, "--port", port, "--queue-pairs", str(rings.queue_pairs), *more]
    return Daemon(arguments, **options)


def _check_negotiated(daemon: Daemon, rings: Rings) -> None:
    """The daemon, as it says itself, served just these; the pairs beside the first are enabled later."""
    (driver,) = daemon.events("driver")
    features = driver["features"]
    assert driver["rings"] == ("packed" if rings.packed else "split")
    assert ("RING_PACKED" in features, "IN_ORDER" in features, "MRG_RXBUF" in features, driver["queue_size"]) == (
        rings.packed, rings.in_order, rings.mergeable, rings.size)


def _circle(testpmd: Testpmd) -> list[StreamReport]:
    """Two bursts a queue circle between testpmd, which sends back whatever comes in, and the port."""
    testpmd.start(bursts=2)
    deadline = time.monotonic() + 60
    while testpmd.received() < ENOUGH and time.monotonic() < deadline:
        time.sleep(0.1)  # its counters cannot be waited for
    streams = testpmd.stop_forwarding()
    assert testpmd.stop() == 0
    return streams


def _check_accounts(daemon: Daemon, streams: list[StreamReport]) -> None:
    """Both sides counted the same frames, and as many as there should be."""
    for stream in streams:
        assert stream.received >= ENOUGH // len(streams) // 4
        # What it sent and has not seen again is what was on its way when it stopped.
        assert 0 <= stream.sent - stream.received <= 2 * BURST
        assert stream.dropped == 0
    (end,) = daemon.events("session-end")
    assert end["from_guest"]["dropped"] == end["to_guest"]["dropped"] == {}
    assert end["from_guest"]["frames"] == sum(stream.sent for stream in streams)
    assert end["from_guest"]["frames"] - end["to_guest"]["frames"] <= 2 * BURST * len(streams)


def test_every_two_properties_meet_in_the_sample() -> None:
    def meetings(several: list[Rings]) -> set[tuple]:
        rows = [((r.packed, r.in_order), r.mergeable, r.size, r.queue_pairs) for r in several]
        return {(first, row[first], second, row[second])
                for row in rows for first, second in itertools.combinations(range(4), 2)}

    sample = [rings for rings in ALL if _sampled(rings)]
    assert len(sample) == 16 and meetings(sample) == meetings(ALL)


@pytest.mark.parametrize("rings", [
    pytest.param(rings, id=str(rings), marks=() if _sampled(rings) else pytest.mark.long) for rings in ALL])
def test_frames_go_round_without_a_loss(socket_path: str, rings: Rings) -> None:
    with _serve(socket_path, "loopback:", rings) as daemon, Testpmd(socket_path, rings) as testpmd:
        streams = _circle(testpmd)
    assert len(streams) == rings.queue_pairs
    _check_negotiated(daemon, rings)
    _check_accounts(daemon, streams)


@pytest.mark.parametrize("size", [100, 1000])
@pytest.mark.parametrize("in_order", [False, True], ids=["any_order", "in_order"])
def test_packed_ring_of_any_size(socket_path: str, in_order: bool, size: int) -> None:
    rings = Rings(packed=True, in_order=in_order, size=size)
    with _serve(socket_path, "loopback:", rings) as daemon, Testpmd(socket_path, rings) as testpmd:
        streams = _circle(testpmd)
    _check_negotiated(daemon, rings)
    _check_accounts(daemon, streams)


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("queue_pairs", [1, 2])
def test_vectorized_driver(socket_path: str, packed: bool, queue_pairs: int) -> None:
    """DPDK's SIMD code reads and writes several descriptors at once; packed rings it serves with AVX-512 only."""
    if packed and "avx512f" not in re.split(r"\s", Path("/proc/cpuinfo").read_text()):
        pytest.skip("this processor has no AVX-512, which DPDK's vectorised code for packed rings needs")
    rings = Rings(packed, in_order=packed, mergeable=False, queue_pairs=queue_pairs)
    with (_serve(socket_path, "loopback:", rings) as daemon,
          Testpmd(socket_path, rings, vectorized=True) as testpmd):
        if testpmd.refusals:
            pytest.skip(f"DPDK: {'; '.join(testpmd.refusals)}")
        streams = _circle(testpmd)
    assert f"using {'packed ring ' * packed}vectorized Rx path" in testpmd.said
    _check_negotiated(daemon, rings)
    _check_accounts(daemon, streams)


@pytest.mark.parametrize("rings", [
    Rings(packed, in_order, mergeable, queue_pairs=1 + number % 2)
    for number, ((packed, in_order), mergeable) in enumerate(itertools.product(FORMATS, (True, False)))], ids=str)
def test_the_host_pings_testpmd_through_a_tap(socket_path: str, lan: Namespace, rings: Rings) -> None:
    """Where buffers merge, they are so short that a long ping takes several in, and a chain of them out."""
    # In an indirect table of a packed ring DPDK marks the header as device-writable, with device-readable
    # descriptors behind it (net/virtio's vring_desc_init_indirect_packed); by 2.8.17 such a chain is dropped.
    more = ["--features=-indirect_desc"] if rings.packed else []
    with (_serve(socket_path, "tap:vdev-dpdk,ip=10.13.0.1/24", rings, *more, namespace=lan) as daemon,
          Testpmd(socket_path, rings, mode="icmpecho", buffer_size=512 if rings.mergeable else None) as testpmd):
        testpmd.start()
        for size in (56, 1472):
            report = ping_from_host(lan, "10.13.0.2", 100, interval=0.005, size=size)
            assert (report.sent, report.received) == (100, 100)
        streams = testpmd.stop_forwarding()
        assert sum(stream.received for stream in streams) >= 200
        assert testpmd.stop() == 0
    _check_negotiated(daemon, rings)
    (end,) = daemon.events("session-end")
    assert end["from_guest"]["dropped"] == end["to_guest"]["dropped"] == {}
