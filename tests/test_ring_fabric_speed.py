"""Correctness under speed: as many frames as the switch takes, each stamped, none corrupted, repeated or reordered.

What is lost because the receiver's driver is slower than the sender's is counted, and the books have to agree.
"""

import pytest

from ring.loadgen import LoadGenerator, Role
from vdev.net.features import Feature, mask
from vdev.testing.rig import USUAL
from vdev.testing.switched import BROADCAST, TYPE, Station, mac, switched
from vdev.testing.waiting import wait_until

PACKED = mask(Feature.RING_PACKED)
RINGS = pytest.mark.parametrize("sends, gets", [(0, 0), (PACKED, PACKED), (0, PACKED), (PACKED, 0)],
                                ids=["split", "packed", "split_to_packed", "packed_to_split"])


def arrived(sink: LoadGenerator) -> int:
    return sink.stats().frames


def check_books(source: LoadGenerator, sink: LoadGenerator, one: Station, other: Station) -> None:
    """Everything that was sent is accounted for, and nothing that arrived was wrong."""
    went, came = one.from_guest, other.to_guest
    assert went.frames == came.frames + sum(came.dropped.values())
    assert not went.dropped
    wait_until(lambda: arrived(sink) == came.frames, lambda: f"{sink.stats()} of {came}")
    assert sink.stats().errors == source.stats().errors == {}


def run(sends: int, gets: int, frames: int, frame_bytes: int, seconds: float, to: bytes = mac(1)) -> None:
    prefix = to + mac(0) + TYPE
    with switched(USUAL | sends, USUAL | gets, buffers=0, size=1024) as (_, (one, other)), \
            LoadGenerator(other.driver.receiveq, Role.RECEIVE, frame_bytes=1514, prefix=prefix) as sink, \
            LoadGenerator(one.driver.transmitq, Role.TRANSMIT, frame_bytes=frame_bytes, prefix=prefix) as source:
        sink.start()
        source.start()
        wait_until(lambda: arrived(sink) >= frames or sink.stats().errors or source.stats().errors,
                   lambda: f"{arrived(sink)} of {frames} frames have arrived", seconds, pause=0.05)
        source.stop()
        one.detach()
        other.detach()
        check_books(source, sink, one, other)
        sink.stop()
        assert sink.stats().frames >= frames


@RINGS
def test_a_quarter_of_a_million_frames_arrive_as_they_were_sent(sends, gets):
    run(sends, gets, 250_000, 64, 60)


def test_long_frames_arrive_as_they_were_sent():
    run(0, PACKED, 5_000, 9000, 60, BROADCAST)


@pytest.mark.long
@pytest.mark.timeout(3600)
@RINGS
def test_ten_to_the_eight_frames_arrive_as_they_were_sent(sends, gets):
    """Over all kinds of rings."""
    run(sends, gets, 25_000_000, 64, 3000)
