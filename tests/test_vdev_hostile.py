"""A served device against a hostile guest, from one end to the other: socket, control thread, worker, port.

Each test carries the id of its case. What the rings alone make of it is in tests/test_ring_*hostile*.py, what the
control protocol refuses in tests/test_vhost_user_rules.py.
"""

import os
import threading

import pytest

from vdev.net.features import Feature, mask
from vdev.testing.scripted import ScriptedGuest
from vdev.testing.served import FRAME, ServedDevice, both_ways, receive
from vhost_user.errors import Close
from vhost_user.frontend import RequestRefused

RING = mask(Feature.VERSION_1, Feature.EVENT_IDX, Feature.INDIRECT_DESC)
MERGEABLE = RING | mask(Feature.MRG_RXBUF)

every_ring = pytest.mark.parametrize(
    "ring", [0, mask(Feature.RING_PACKED), mask(Feature.IN_ORDER), mask(Feature.RING_PACKED, Feature.IN_ORDER)],
    ids=["split", "packed", "split_in_order", "packed_in_order"])


@pytest.fixture
def served():
    with ServedDevice() as device:
        yield device


@every_ring
def test_R56_kick_flood_from_all_cpus(served, ring):
    """The control socket is answered all the while, what needs the worker to pause gets its pause, frames pass, and
    the log stays silent."""
    with ScriptedGuest(served.connect(), features=MERGEABLE | ring) as guest:
        both_ways(served, guest)
        served.wait_for("driver")
        lines = len(served.log)
        stop = threading.Event()

        def flood() -> None:
            while not stop.is_set():
                for queue in (guest.driver.transmitq, guest.driver.receiveq):
                    os.eventfd_write(queue.kick_fd, 1)

        threads = [threading.Thread(target=flood) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(20):
                assert guest.front_end.get_features() == guest.qemu.offered
                guest.front_end.set_vring_call(1, guest.driver.transmitq.call_fd, need_reply=True)
                both_ways(served, guest)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert len(served.log) == lines
        both_ways(served, guest)


@pytest.mark.parametrize("features", [RING, MERGEABLE], ids=["plain", "mergeable"])
@every_ring
def test_R62_hash_report_is_not_to_be_had_and_the_header_has_12_bytes(served, ring, features):
    """HASH_REPORT would make it 20 bytes long. How long it is follows from what was negotiated, never from a frame."""
    hash_report = mask(Feature.HASH_REPORT)
    with ScriptedGuest(served.connect(), features=features | ring | hash_report) as guest:
        assert not guest.qemu.offered & hash_report
        driver = guest.driver
        with pytest.raises(RequestRefused):
            guest.front_end.set_features(guest.qemu.offered | hash_report, need_reply=True)
        driver.transmitq.post(readable=[bytes(12) + FRAME])
        driver.transmitq.submit()
        assert receive(served.port.wire[0]) == FRAME  # all of what lies behind 12 bytes
        served.port.wire[0].send(bytes(12) + FRAME)
        assert driver.receiveq.wait(5)
        done = driver.receiveq.collect()
        assert (done.written, done.data[12:]) == (12 + len(FRAME), FRAME)
        both_ways(served, guest)
        assert any(f"bit {Feature.HASH_REPORT} was not offered" in text for _, text in served.log)


def test_P48_memory_that_vanished_before_a_ring_starts_ends_the_session(served):
    """What a ring needs to know is read from guest memory when it starts, by the control thread."""
    with ScriptedGuest(served.connect(), features=RING) as guest:
        guest.qemu.stop()
        guest.memory.truncate()
        guest.front_end.set_status(0xF)
        with pytest.raises(Close):
            guest.front_end.set_vring_kick(1, guest.driver.transmitq.kick_fd, need_reply=True)
        assert "SET_VRING_KICK ring 1: guest memory vanished" in served.wait_for("session-end")
    with ScriptedGuest(served.connect(), features=RING) as guest:
        both_ways(served, guest)
    assert not served.lines("session-failed")


def test_P48_memory_that_vanished_before_a_ring_is_resumed_ends_the_session(served):
    """The same where nobody asked: a ring that was stopped behind the driver's back goes on by itself."""
    with ScriptedGuest(served.connect(), features=RING) as guest:
        guest.front_end.get_vring_base(1)
        guest.memory.truncate()
        assert "guest memory vanished" in served.wait_for("session-end")
    assert not served.lines("session-failed")
