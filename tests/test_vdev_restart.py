"""A back-end ends without being asked and another takes its place: what the guest and the log see of it.

Whether it was killed or ended well makes no difference to its successor, as long as the front-end was not told where
the rings stood; tests/test_ring_restart.py is about the instant of death, tests/system/test_restart.py about SIGKILL.
"""

import dataclasses
import os
from pathlib import Path

import pytest

from ring.virtqueue import VirtQueue
from vdev import connection
from vdev.net.features import Feature, mask
from vdev.testing.netdriver import NetDriver
from vdev.testing.rig import DeviceSide
from vdev.testing.scripted import ScriptedGuest, ring_setup
from vdev.testing.served import FRAME, ServedDevice, both_ways, receive

USUAL = mask(Feature.VERSION_1, Feature.MRG_RXBUF, Feature.EVENT_IDX)
PACKED = mask(Feature.RING_PACKED)

every_ring = pytest.mark.parametrize("ring", [0, PACKED], ids=["split", "packed"])


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@every_ring
@pytest.mark.parametrize("rounds", [1, 5, 8, 13])
def test_F04_a_guest_goes_on_with_the_next_back_end(journal: Path, ring: int, rounds: int) -> None:
    with ServedDevice(journal=journal) as first:
        guest = ScriptedGuest(first.connect(), features=USUAL | ring, size=8)
        for _ in range(rounds):
            both_ways(first, guest)
    with guest:
        for _ in range(3):
            serve_next(journal, guest, ring)


def serve_next(journal: Path, guest: ScriptedGuest, ring: int) -> None:
    """Another back-end: what the guest sent meanwhile goes out, and then everything both ways."""
    with ServedDevice(journal=journal) as served:
        guest.driver.offer(FRAME)
        guest.driver.transmitq.publish()
        guest.reconnect(served.connect())
        served.wait_for("driver")
        assert receive(served.port.wire[0]) == FRAME
        assert guest.driver.reclaim_all(5)
        both_ways(served, guest)
        assert bool(served.lines("ring-taken-over")) == bool(ring)
        assert not served.lines("ring-broken")


@every_ring
def test_a_front_end_that_comes_back_to_the_same_process(journal: Path, ring: int) -> None:
    with (ServedDevice(journal=journal) as served,
          ScriptedGuest(served.connect(), features=USUAL | ring, size=8) as guest):
        for turn in range(1, 4):
            both_ways(served, guest)
            guest.front_end.close()
            served.wait_for("session-end", turn)
            guest.reconnect(served.connect())
            served.wait_for("driver", turn + 1)
        both_ways(served, guest)


def test_without_a_journal_packed_rings_are_refused_in_a_clear_line(journal: Path) -> None:
    with ServedDevice() as first:
        guest = ScriptedGuest(first.connect(), features=USUAL | PACKED, size=8)
        both_ways(first, guest)
    with ServedDevice(journal=journal) as served, guest:
        guest.reconnect(served.connect())
        served.wait_for("ring-broken", 2)
        for name, text in zip(("receiveq 0", "transmitq 0"), served.lines("ring-broken"), strict=True):
            assert text == (f"{name} stopped: it is not known where the predecessor of this back-end stood: the "
                            "descriptors contradict the front-end's base (slot 0), and there is no journal that fits "
                            "them (virtio 2.8.1); resetting the guest's driver (reboot, or unbind and bind it) brings "
                            "the ring back")
        # A guest whose driver starts anew is served.
        guest.qemu.stop()
        guest.driver.close()
        guest.drivers[0] = NetDriver(guest.memory, size=8, features=guest.features)
        guest.qemu.rings = [ring_setup(queue) for queue in (guest.driver.receiveq, guest.driver.transmitq)]
        guest.qemu.reset()
        guest.qemu.start([], guest.features)
        guest.driver.fill()
        both_ways(served, guest)


@every_ring
def test_a_base_that_was_answered_is_the_front_ends_from_then_on(journal: Path, ring: int) -> None:
    with (ServedDevice(journal=journal) as served,
          ScriptedGuest(served.connect(), features=USUAL | ring, size=8) as guest):
        both_ways(served, guest)
        assert journal.exists()
        guest.qemu.stop()
        guest.front_end.get_features()  # another word: the answers have been read
    assert not journal.exists(), "nothing is left to be known"


@every_ring
@pytest.mark.parametrize("more", [False, True], ids=["", "another word"])
def test_F04_a_ring_that_was_only_looked_at_before(journal: Path, ring: int, more: bool, monkeypatch) -> None:
    """QEMU's `info virtio-queue-status` asks for a base and forgets it; whatever it says next, and when."""
    monkeypatch.setattr(connection, "RESUME_DELAY_QUIET", 0.2)
    with ServedDevice(journal=journal) as first:
        guest = ScriptedGuest(first.connect(), features=USUAL | ring, size=8)
        both_ways(first, guest)
        for turn, index in enumerate((0, 1, 0, 1), 1):
            guest.front_end.get_vring_base(index)
            if more:
                guest.front_end.get_features()
            first.wait_for("ring-resumed", turn)
            guest.front_end.get_features()
            both_ways(first, guest)
        assert not first.lines("lost-while-away") and not first.lines("ring-taken-over")
    with guest:
        serve_next(journal, guest, ring)


@every_ring
def test_what_the_front_end_drops_meanwhile_is_counted(journal: Path, ring: int) -> None:
    with ServedDevice(journal=journal) as first:
        guest = ScriptedGuest(first.connect(), features=USUAL | ring, size=8)
    # QEMU with the link down: it takes what the guest sends from the base of the last start on.
    for _ in range(3):
        guest.driver.offer(FRAME)
    guest.driver.transmitq.publish()
    with DeviceSide(guest.memory) as side:
        queue: VirtQueue = side.queue(guest.driver.transmitq)
        while (chain := queue.pop()) is not None:
            queue.push(chain)
            queue.publish()
        guest.qemu.rings[1] = dataclasses.replace(guest.qemu.rings[1], base=queue.base)
    with ServedDevice(journal=journal) as served, guest:
        guest.reconnect(served.connect())
        assert served.wait_for("lost-while-away") == (
            "transmitq 0: the front-end dropped 3 chains of the guest while no back-end was connected")
        assert served.device.engine.lost_while_away == [0, 3]
        assert guest.driver.reclaim() == 3
        both_ways(served, guest)


def test_a_journal_without_room_is_given_up_in_a_clear_line(journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ServedDevice(journal=journal) as served:
        def full(fd: int, offset: int, length: int) -> None:
            raise OSError(28, os.strerror(28))
        monkeypatch.setattr(os, "posix_fallocate", full)
        with ScriptedGuest(served.connect(), features=USUAL | PACKED, size=8) as guest:
            both_ways(served, guest)
            assert served.lines("no-journal") == [
                f"no journal: {journal}: No space left on device; a guest with packed rings loses its network if vdev "
                "is killed and restarted (split rings do not need it)"]


def test_F06_a_back_end_that_offers_less_says_what_the_guest_misses(journal: Path) -> None:
    with ServedDevice(journal=journal) as first:
        guest = ScriptedGuest(first.connect(), features=USUAL | PACKED, size=8)
    with ServedDevice(journal=journal, removed=PACKED) as served, guest:
        with pytest.raises(Exception, match="closed|reset"):
            guest.reconnect(served.connect())
        assert "RING_PACKED" in served.wait_for("session-end")
