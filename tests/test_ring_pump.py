"""The fd pump in normal life: a driver in Python or C on one side, a wire on the other.

What a lying guest and an unkind network get is in tests/test_ring_pump_hostile.py.
"""

import contextlib
import dataclasses
import os
import resource
import select
import socket
import struct
import threading
import time

import pytest

from ring.driver import GuestMemory, RingFull
from ring.errors import QueueBusy
from ring.loadgen import LoadGenerator, Role
from ring.pump import LaneEvent
from vdev.net.features import Feature, mask
from vdev.testing.netdriver import NEEDS_CSUM, NetDriver, NetHeader, Received
from vdev.testing.rig import DeviceSide, pumped

BASE = mask(Feature.VERSION_1, Feature.INDIRECT_DESC, Feature.EVENT_IDX)
MERGEABLE = BASE | mask(Feature.MRG_RXBUF)
PLAIN = mask(Feature.VERSION_1)
PACKED = mask(Feature.RING_PACKED)
IN_ORDER = mask(Feature.IN_ORDER)
MAX_FRAME = 65550

either_format = pytest.mark.parametrize("ring", [0, PACKED], ids=["split", "packed"])
every_ring = pytest.mark.parametrize("ring", [0, PACKED, IN_ORDER, PACKED | IN_ORDER],
                                     ids=["split", "packed", "split_in_order", "packed_in_order"])


# No two places in a frame look alike, and neither do two frames in a row.
_PATTERN = b"".join(struct.pack("<H", i * 40503 & 0xFFFF) for i in range(1 << 16))


def pattern(length: int, seed: int = 0) -> bytes:
    """A frame in which every byte out of place shows."""
    start = seed * 14 % 60000
    return _PATTERN[start:start + length]


def receive(driver: NetDriver) -> Received:
    """The next frame; a test fails here when none comes."""
    received = driver.receive_within(10)
    assert received is not None, "no frame, or no notification of it"
    return received


# ----------------------------------------------------------------------------------------------- from_guest


@pytest.mark.parametrize("features", [PLAIN, MERGEABLE])
@pytest.mark.parametrize("length", [14, 60, 1514, 9000, MAX_FRAME])
@pytest.mark.parametrize("cuts, direct", [((), None), ((12,), None), ((5, 11, 13), None), ((12, 20), 0), ((1, 12), 1)])
@either_format
def test_frame_from_guest(ring, features, length, cuts, direct):
    if features == PLAIN or (ring and direct):  # a packed ring's chain is not of both kinds
        direct = None
    with pumped(features | ring) as (driver, device):
        frame = pattern(length)
        driver.transmit(frame, cuts=cuts, direct=direct)
        assert device.receive() == (NetHeader(), frame)
        assert driver.reclaim_all(10)
        stats = device.from_guest
        assert (stats.frames, stats.bytes, stats.dropped) == (1, length, {})


@every_ring
@pytest.mark.parametrize("cuts", [(), (12,), (20,), (3, 12, 19, 21)])
def test_address_that_the_guest_sends_from(ring, cuts):
    """It is looked at once for each configuration, and told once, when the lane is back."""
    with pumped(MERGEABLE | ring) as (driver, device):
        for first in (0, 2):
            for seed in (first, first + 1):
                driver.transmit(pattern(100, seed), cuts=cuts)
                assert device.receive() == (NetHeader(), pattern(100, seed))
            with pytest.raises(QueueBusy):
                device.lane.guest_mac()
            device.detach()
            assert device.lane.guest_mac() == pattern(100, first)[6:12]
            assert device.lane.guest_mac() is None
            device.attach()
            assert driver.reclaim_all(10)


@every_ring
def test_frames_keep_their_order_and_their_headers(ring):
    with pumped(MERGEABLE | mask(Feature.CSUM) | ring) as (driver, device):
        headers = [NetHeader(flags=NEEDS_CSUM, csum_start=14 + i, csum_offset=i % 7) for i in range(200)]
        for i, header in enumerate(headers):
            driver.offer(pattern(100 + i, i), header)
        driver.transmitq.submit()
        for i, header in enumerate(headers):
            assert device.receive() == (header, pattern(100 + i, i))


def test_port_without_header():
    with pumped(port_header=0) as (driver, device):
        driver.fill()
        driver.transmit(pattern(80), cuts=(12,))
        driver.transmit(pattern(81), cuts=(3, 40))
        for length in (80, 81):
            select.select([device.wire], [], [], 10)
            assert device.wire.recv(4096) == pattern(length)
        device.wire.send(pattern(90))
        received = receive(driver)
        assert (received.header, received.frame) == (NetHeader(num_buffers=1), pattern(90))


@every_ring
def test_full_wire_holds_frames_back_and_loses_none(ring):
    """F23: the chain goes back into the ring, and the pump sleeps until the wire is writable."""
    with pumped(MERGEABLE | ring, size=256) as (driver, device):
        sent = received = 0
        with contextlib.suppress(RingFull):
            while True:  # more than the wire and the ring hold
                driver.offer(pattern(40_000, sent))
                sent += 1
                driver.transmitq.submit()
                driver.reclaim()
                if driver.transmitq.outstanding > 200:
                    break
        assert device.from_guest.frames < sent
        while received < sent:
            header, frame = device.receive(10)
            assert frame == pattern(40_000, received)
            received += 1
        assert driver.reclaim_all(10)
        assert (device.from_guest.frames, device.from_guest.dropped) == (sent, {})


@every_ring
def test_null_port(ring):
    with pumped(MERGEABLE | ring, to_port=-1, from_port=-1) as (driver, device):
        for i in range(50):
            driver.offer(pattern(60, i))
        driver.transmitq.submit()
        assert driver.reclaim_all(10)
        assert (device.from_guest.frames, device.from_guest.dropped) == (0, {"null": 50})


# ------------------------------------------------------------------------------------------------- to_guest


@pytest.mark.parametrize("features, buffer_size", [
    (PLAIN, 12 + MAX_FRAME), (MERGEABLE, 1536), (MERGEABLE, 12 + MAX_FRAME), (MERGEABLE, 600)])
@every_ring
def test_R53_frames_to_guest_of_every_length(ring, features, buffer_size):
    """Short after long and long after short: the pump guesses the next frame's length from the last."""
    lengths = [14, 60, 1514, 1524, 1525, MAX_FRAME, 60, 9000, 65, MAX_FRAME, MAX_FRAME - 1, 3060, 3061, 14]
    with pumped(features | ring, buffer_size=buffer_size) as (driver, device):
        driver.fill()
        for i, length in enumerate(lengths):
            device.send(pattern(length, i))
        for i, length in enumerate(lengths):
            received = receive(driver)
            assert received.frame == pattern(length, i)
            assert received.buffers == -(-(length + 12) // buffer_size)
            assert received.header == NetHeader(num_buffers=received.buffers)
        stats = device.to_guest
        assert (stats.frames, stats.bytes, stats.dropped) == (len(lengths), sum(lengths), {})


@pytest.mark.parametrize("pieces", [[12, 1514], [1, 11, 3, 2000], [5, 5, 5, 1600], [13, 1600], [12, 1, 1, 2000]])
@either_format
def test_receive_buffer_in_pieces(ring, pieces):
    with pumped(PLAIN | ring) as (driver, device):
        for _ in range(3):
            driver.receiveq.post(writable=pieces)
        driver.receiveq.submit()
        for i, length in enumerate((14, 700, 1500)):
            device.send(pattern(length, i))
            received = driver.receive_within(10, refill=False)
            assert received.frame == pattern(length, i)


def test_header_for_the_guest_is_made_by_us():
    """N19, N22: num_buffers is ours, bits that the guest did not negotiate are taken out."""
    with pumped(MERGEABLE | mask(Feature.GUEST_CSUM)) as (driver, device):
        driver.fill()
        device.send(pattern(60), NetHeader(flags=0xFF, hdr_len=54, csum_start=34, csum_offset=16, num_buffers=77))
        assert receive(driver).header == NetHeader(flags=3, csum_start=34, csum_offset=16, num_buffers=1)


@either_format
def test_R52_N24_no_buffers_hold_frames_back_and_lose_none(ring):
    with pumped(MERGEABLE | ring, size=16) as (driver, device):
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                device.send(pattern(1000, sent), NetHeader())
                sent += 1
        time.sleep(0.05)
        before, busy = device.to_guest, resource.getrusage(resource.RUSAGE_SELF).ru_utime
        time.sleep(0.3)
        assert device.to_guest == before  # it does not even look
        assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - busy < 0.15
        driver.fill()
        for i in range(sent):
            assert receive(driver).frame == pattern(1000, i)
        assert (device.to_guest.frames, device.to_guest.dropped) == (sent, {})


@pytest.mark.parametrize("features", [MERGEABLE, MERGEABLE & ~mask(Feature.EVENT_IDX)])
@every_ring
def test_R48_frame_waits_for_the_buffers_it_lacks(ring, features):
    """Nothing is published before all of it fits, and each buffer posted meanwhile wakes the pump."""
    with pumped(features | ring, buffer_size=1000, size=16) as (driver, device):
        device.send(pattern(4500))
        for _ in range(4):
            driver.fill(1)
            assert not driver.receiveq.wait(0.05)
            assert driver.receiveq.ring.pending() == 0
        driver.fill(1)
        received = receive(driver)
        assert (received.frame, received.buffers) == (pattern(4500), 5)


def test_mtu_that_was_negotiated_is_kept():
    with pumped(mtu=1500) as (driver, device):
        driver.fill()
        tag = bytes(12) + b"\x81\x00"
        device.send(pattern(1514))
        device.send(pattern(1515))
        device.send(tag + pattern(1504))
        device.send(tag + pattern(1505))
        assert [len(receive(driver).frame) for _ in range(2)] == [1514, 1518]
        device.send(pattern(60))
        assert len(receive(driver).frame) == 60
        assert device.to_guest.dropped == {"bad_length": 2}


# ---------------------------------------------------------------------------------- disabled, lent, stopped


@every_ring
def test_disabled_queues(ring):
    """A disabled transmitq is drained and dropped, a disabled receiveq gets nothing and loses nothing."""
    with pumped(MERGEABLE | ring, attach=False) as (driver, device):
        device.config.from_guest.enabled = device.config.to_guest.enabled = False
        device.attach()
        driver.fill()
        for i in range(40):
            driver.offer(pattern(60, i))
        driver.transmitq.submit()
        device.send(pattern(70))
        assert driver.reclaim_all(10)
        assert (device.from_guest.frames, device.from_guest.dropped) == (0, {"disabled": 40})
        assert device.receive(0.05) is None
        assert driver.receive() is None
        device.detach()
        device.config.from_guest.enabled = device.config.to_guest.enabled = True
        device.attach()
        assert receive(driver).frame == pattern(70)
        driver.transmit(pattern(80))
        assert device.receive() == (NetHeader(), pattern(80))


def test_lent_queue_refuses_step_calls():
    with pumped() as (driver, device):
        queue = device.config.from_guest.queue
        for verb in (queue.see, queue.pop, queue.arm, queue.publish, queue.close):
            with pytest.raises(QueueBusy):
                verb()
        with pytest.raises(QueueBusy):
            device.lane.configure(device.config)
        with pytest.raises(QueueBusy):
            device.lane.close()
        assert queue.base == 0 and queue.state.size == 256  # may be asked at any time
        device.detach()
        driver.transmit(pattern(60))
        chain = queue.pop()
        assert chain.read(12) == pattern(60)
        queue.push(chain)
        queue.publish()
        assert driver.reclaim() == 1


@either_format
def test_queue_is_looked_at_once_without_a_kick(ring):
    """P86: what was made available before the kick descriptor came would wait for ever otherwise."""
    with pumped(MERGEABLE | ring, attach=False) as (driver, device):
        driver.offer(pattern(60))
        driver.transmitq.publish()
        device.send(pattern(61))
        driver.receiveq.post(writable=[2000])
        driver.receiveq.publish()
        device.attach()
        assert device.receive() == (NetHeader(), pattern(60))
        assert driver.receive_within(10, refill=False).frame == pattern(61)


@either_format
def test_queue_without_kick_descriptor_is_polled(ring):
    with pumped(MERGEABLE | ring, attach=False) as (driver, device):
        device.config.from_guest.kick = device.config.to_guest.kick = -1
        device.attach()
        time.sleep(0.02)
        driver.offer(pattern(60))
        driver.transmitq.publish()
        assert device.receive() == (NetHeader(), pattern(60))
        device.send(pattern(61))
        driver.receiveq.post(writable=[2000])
        driver.receiveq.publish()
        assert driver.receive_within(10, refill=False).frame == pattern(61)


def test_new_call_descriptor_is_signalled_once():
    """A notification may have gone to the old one in the meantime."""
    with pumped() as (driver, device):
        device.detach()
        fresh = os.eventfd(0, os.EFD_NONBLOCK)
        device.config = dataclasses.replace(
            device.config, from_guest=dataclasses.replace(device.config.from_guest, call=fresh))
        device.attach()
        try:
            assert select.select([fresh], [], [], 10)[0]
            assert os.eventfd_read(fresh) == 1
            assert not driver.receiveq.called()
        finally:
            device.detach()
            os.close(fresh)


def test_kicks_are_reported_when_asked_for():
    with pumped(attach=False, watch_kicks=True) as (driver, device):
        queue, device.config.from_guest.queue = device.config.from_guest.queue, None
        device.attach()
        driver.transmitq.kick()
        assert device.events() == LaneEvent.KICKED
        device.detach()
        device.config.from_guest.queue = queue


def test_port_that_goes_away():
    with pumped() as (driver, device):
        driver.fill()
        driver.transmit(pattern(60))
        assert device.receive() is not None
        device.wire.close()
        assert device.events() == LaneEvent.PORT_GONE
        for _ in range(5):
            driver.offer(pattern(60))
        driver.transmitq.submit()
        assert driver.reclaim_all(10)  # the guest is not held up
        assert device.from_guest.dropped == {"no_port": 5}
        busy = resource.getrusage(resource.RUSAGE_SELF).ru_utime
        time.sleep(0.3)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - busy < 0.15
        assert device.events(0) == LaneEvent(0)


def test_new_port_after_one_that_went_away():
    with pumped() as (driver, device):
        driver.fill()
        device.wire.close()
        assert device.events() == LaneEvent.PORT_GONE
        device.detach()
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with near, far:
            far.setblocking(False)
            device.config.to_port = device.config.from_port = far.fileno()
            device.attach()
            driver.transmit(pattern(60))
            near.settimeout(10)
            assert near.recv(4096) == bytes(12) + pattern(60)
            device.detach()


# ------------------------------------------------------------------------------------------------ under load


LOADS = {
    "one_by_one": {"batch": 1},
    "batches": {"batch": 64},
    "header_apart": {"pieces": 2},
    "pieces": {"pieces": 5, "batch": 7},
    "indirect": {"pieces": 3, "indirect": True},
    "busy_poll": {"busy_poll": True},
    "short": {"frame_bytes": 60},
    "jumbo": {"frame_bytes": 9000, "batch": 5},
}


@pytest.mark.parametrize("features", [PLAIN, BASE, MERGEABLE], ids=["plain", "event_idx", "mergeable"])
@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
@every_ring
def test_every_frame_comes_round_whole_and_in_order(ring, features, load):
    """The driver in C sends and receives on its own threads and checks every byte, index and notification."""
    features |= ring
    if load.get("indirect"):
        features |= mask(Feature.INDIRECT_DESC)
    frame_bytes = load.get("frame_bytes", 1514)
    room = {"frame_bytes": 1524 if features & mask(Feature.MRG_RXBUF) else frame_bytes}
    frames = 5_000
    with (pumped(features, loop=True) as (driver, device),
          LoadGenerator(driver.receiveq, Role.RECEIVE, frames=frames, busy_poll=load.get("busy_poll", False),
                        **room) as sink,
          LoadGenerator(driver.transmitq, Role.TRANSMIT, frames=frames, **load) as source):
        sink.start()
        source.start()
        assert source.wait(60) and sink.wait(60)
        sent, arrived = source.stats(), sink.stats()
        device.detach()
        assert not sent.errors and not arrived.errors
        assert (sent.frames, arrived.frames, arrived.lost, arrived.foreign) == (frames, frames, 0, 0)
        assert (device.from_guest.frames, device.from_guest.dropped) == (frames, {})
        assert (device.to_guest.frames, device.to_guest.dropped) == (frames, {})
        assert device.to_guest.bytes == frames * frame_bytes == device.from_guest.bytes
        # no more than one call a publication, and none that was not counted
        assert device.from_guest.calls + device.from_guest.calls_saved <= device.from_guest.bursts * 4 + 1
        assert sent.kicks <= sent.publications


@pytest.mark.parametrize("size", [3, 100, 32768])
def test_packed_ring_of_any_size_under_load(size):
    frames = 5_000
    with (GuestMemory(128 << 20) as memory,
          pumped(MERGEABLE | PACKED, memory, loop=True, size=size) as (driver, device),
          LoadGenerator(driver.receiveq, Role.RECEIVE, frames=frames, frame_bytes=1524) as sink,
          LoadGenerator(driver.transmitq, Role.TRANSMIT, frames=frames, frame_bytes=700, pieces=2) as source):
        sink.start()
        source.start()
        assert source.wait(60) and sink.wait(60)
        sent, arrived = source.stats(), sink.stats()
        device.detach()
        assert not sent.errors and not arrived.errors
        assert (sent.frames, arrived.frames, arrived.lost) == (frames, frames, 0)


@every_ring
def test_F20_stopping_in_the_middle_loses_and_repeats_nothing(ring):
    with (pumped(MERGEABLE | ring, loop=True) as (driver, device),
          LoadGenerator(driver.receiveq, Role.RECEIVE) as sink,
          LoadGenerator(driver.transmitq, Role.TRANSMIT, batch=3) as source):
        sink.start()
        source.start()
        device_writes = [queue.ring.areas.device for queue in (driver.receiveq, driver.transmitq)]
        for i in range(300):
            if i % 3:
                time.sleep(0.001)
            device.detach()
            before = [driver.memory.read(*part) for part in device_writes]
            bases = [flow.queue.base for flow in (device.config.from_guest, device.config.to_guest)]
            if i % 10 == 0:
                time.sleep(0.002)
            assert [driver.memory.read(*part) for part in device_writes] == before
            assert [flow.queue.base for flow in (device.config.from_guest, device.config.to_guest)] == bases
            device.attach()
        source.stop()
        sent = source.stats()
        deadline = time.monotonic() + 20
        # what the source had offered when it stopped still arrives
        while device.to_guest.frames < device.from_guest.frames and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        arrived = sink.stats()
        device.detach()
        assert not sent.errors and not arrived.errors and arrived.lost == 0
        assert device.from_guest.frames > 1000
        assert device.from_guest.dropped == device.to_guest.dropped == {}
        assert arrived.frames == device.to_guest.frames == device.from_guest.frames


@every_ring
def test_R59_memory_table_replaced_under_traffic(ring):
    """The old mapping is gone when the pump goes on: one pointer kept from before would crash here."""
    with (pumped(MERGEABLE | ring, loop=True) as (driver, device),
          LoadGenerator(driver.receiveq, Role.RECEIVE) as sink,
          LoadGenerator(driver.transmitq, Role.TRANSMIT, batch=3) as source):
        sink.start()
        source.start()
        sides = [device.side]
        for _ in range(100):
            sides.append(DeviceSide(driver.memory))
            device.detach()
            for flow in (device.config.from_guest, device.config.to_guest):
                flow.queue.move(sides[-1].memory)
            device.attach()
            old = sides[-2]
            old.memory.close()
            for mapping in old.mappings:
                mapping.close()
        source.stop()
        device.detach()
        errors = [generator.stats().errors for generator in (source, sink)]
        assert errors == [{}, {}] and sink.stats().lost == 0
        assert device.to_guest.frames > 100
        for flow in (device.config.from_guest, device.config.to_guest):
            flow.queue.close()
        sides[-1].close()


def test_lanes_of_one_pump_do_not_starve_each_other():
    """One guest floods, the other, in the same worker, still gets its frames."""
    with (pumped(to_port=-1, from_port=-1) as (flood, flooded), pumped(attach=False) as (driver, device),
          LoadGenerator(flood.transmitq, Role.TRANSMIT, busy_poll=True) as source):
        device.lane.configure(device.config)
        flooded.pump.attach(device.lane)
        source.start()
        try:
            driver.fill()
            for i in range(200):
                driver.transmit(pattern(60, i))
                assert device.receive(10) == (NetHeader(), pattern(60, i))
                device.send(pattern(60, i))
                assert receive(driver).frame == pattern(60, i)
            assert flooded.from_guest.frames + flooded.from_guest.dropped["null"] > 200
        finally:
            flooded.pump.detach(device.lane, 5000)
            source.stop()


def test_counters_may_be_read_while_it_runs():
    with (pumped(to_port=-1, from_port=-1) as (driver, device),
          LoadGenerator(driver.transmitq, Role.TRANSMIT, frames=50_000) as source):
        seen, stop = [], threading.Event()

        def watch():
            while not stop.is_set():
                seen.append(device.from_guest.dropped.get("null", 0))

        watcher = threading.Thread(target=watch)
        watcher.start()
        source.start()
        done = source.wait(60)
        stop.set()
        watcher.join()
        assert done and seen == sorted(seen)
        device.detach()
        assert device.from_guest.dropped == {"null": 50_000}
