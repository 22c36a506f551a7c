"""Correctness under speed at a TAP: from one guest into its TAP, through a bridge of the kernel, out of another TAP to
another guest. Each frame is stamped; none arrives corrupted, repeated or reordered.

What the kernel drops because the second TAP is full is counted there, and the books have to agree to the frame.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from ring.loadgen import LoadGenerator, Role
from vdev.net.features import Feature, mask
from vdev.ports import open_port
from vdev.ports.base import Port
from vdev.ports.spec import TapSpec
from vdev.testing.isolated import bridge, ip, isolated, mute
from vdev.testing.netdriver import NetDriver
from vdev.testing.rig import USUAL, PumpedDevice, pumped
from vdev.testing.switched import TYPE, mac
from vdev.testing.waiting import wait_until

PACKED = mask(Feature.RING_PACKED)
RINGS = pytest.mark.parametrize("sends, gets", [(0, 0), (PACKED, PACKED), (0, PACKED), (PACKED, 0)],
                                ids=["split", "packed", "split_to_packed", "packed_to_split"])
PREFIX = mac(1) + mac(0) + TYPE


@dataclass(frozen=True)
class Guest:
    """A driver, its device, and the name of the TAP that the device is at."""

    driver: NetDriver
    device: PumpedDevice
    tap: str

    def counted(self, way: str, what: str) -> int:
        """A counter of the interface: the kernel receives (``rx``) what a guest sends."""
        (found,) = json.loads(ip("-json", "-statistics", "link", "show", self.tap))
        return found["stats64"][way][what]


@contextlib.contextmanager
def guests(*features: int) -> Iterator[list[Guest]]:
    """One for each of ``features``, at TAPs that a bridge joins."""
    mute()
    names = [f"guest{number}" for number in range(len(features))]
    with contextlib.ExitStack() as stack:
        ports: list[Port] = []
        for name in names:
            ports.append(open_port(TapSpec(name), 1))
            stack.callback(ports[-1].close)
        bridge(*names)
        found = []
        for name, port, each in zip(names, ports, features, strict=True):
            ends = port.ends(0)
            served = pumped(USUAL | each, size=1024, to_port=ends.to_port, from_port=ends.from_port)
            found.append(Guest(*stack.enter_context(served), name))
        yield found


def check_books(source: LoadGenerator, sink: LoadGenerator, one: Guest, other: Guest) -> None:
    """Everything that was sent is accounted for, and nothing that arrived was wrong."""
    went = one.device.from_guest
    assert not went.dropped and one.counted("rx", "packets") == went.frames

    wait_until(lambda: other.counted("tx", "packets") + other.counted("tx", "dropped") == went.frames,
               lambda: ip("-statistics", "link"), pause=0.05)
    other.device.detach()
    came = other.device.to_guest
    assert not came.dropped and came.frames == other.counted("tx", "packets")
    wait_until(lambda: sink.stats().frames == came.frames, lambda: f"{sink.stats()} of {came}")
    assert sink.stats().lost <= other.counted("tx", "dropped") and not sink.stats().foreign
    assert sink.stats().errors == source.stats().errors == {}


def run(sends: int, gets: int, frames: int, frame_bytes: int, seconds: float) -> None:
    with guests(sends, gets) as (one, other), \
            LoadGenerator(other.driver.receiveq, Role.RECEIVE, frame_bytes=1514, prefix=PREFIX) as sink, \
            LoadGenerator(one.driver.transmitq, Role.TRANSMIT, frame_bytes=frame_bytes, prefix=PREFIX) as source:
        sink.start()
        source.start()
        wait_until(lambda: sink.stats().frames >= frames or sink.stats().errors or source.stats().errors,
                   lambda: f"{sink.stats()} of {frames} frames have arrived", seconds, pause=0.05)
        source.stop()
        one.device.detach()
        check_books(source, sink, one, other)
        sink.stop()
        assert sink.stats().frames >= frames


@RINGS
@isolated
def test_a_quarter_of_a_million_frames_go_through_both_taps_as_they_were_sent(sends, gets):
    run(sends, gets, 250_000, 64, 60)


@isolated
def test_long_frames_go_through_both_taps_as_they_were_sent():
    run(0, PACKED, 5_000, 9000, 60)


@pytest.mark.long
@pytest.mark.timeout(3600)
@RINGS
@isolated
def test_ten_to_the_seven_frames_go_through_both_taps_as_they_were_sent(sends, gets):
    """Over all kinds of rings."""
    run(sends, gets, 2_500_000, 64, 3000)
