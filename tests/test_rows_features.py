"""Rows of docs/conformance/features.tsv, and those of split.tsv and packed.tsv about how a ring is set up: what a
front-end is offered, and what is refused. Engines make no difference here."""

from collections.abc import Iterator

import pytest

from ring.driver import DriverQueue, GuestMemory
from vdev.net.features import OFFLOADS, Feature, mask
from vdev.testing.scripted import ScriptedGuest
from vdev.testing.served import ServedDevice, WirePort
from vdev.testing.watch import noise
from vhost_user.frontend import FrontEnd, RequestRefused, SharedRegion
from vhost_user.spec import ProtocolFeature, Request
from vhost_user.wire import VRING_STATE, VringState

row = pytest.mark.row

PACKED = mask(Feature.RING_PACKED)
BIT_30 = mask(Feature.PROTOCOL_FEATURES)
NOT_OFFERED = {"NOTIFY_ON_EMPTY": 24, "ANY_LAYOUT": 27, "ORDER_PLATFORM": 36, "SR_IOV": 37, "ADMIN_VQ": 41}


@pytest.fixture
def served() -> Iterator[ServedDevice]:
    with ServedDevice() as device:
        yield device


def works(served: ServedDevice, features: int) -> None:
    """A guest whose driver accepts ``features`` is served both ways."""
    with ScriptedGuest(served.connect(), features=features) as guest:
        guest.driver.transmit(noise())
        served.port.wire[0].settimeout(5)
        assert served.port.wire[0].recv(1 << 17)[12:] == noise()
        served.port.wire[0].send(bytes(12) + noise())
        assert guest.driver.receive_within(5).frame == noise()


# -------------------------------------------------------------------------------------------- what is offered


@row("RSVF-D-01")
def test_version_1_is_offered_whatever_the_operator_takes_out() -> None:
    for removed in (0, mask(Feature.VERSION_1), (1 << 64) - 1):
        for offloads in (0, OFFLOADS):
            with ServedDevice(WirePort(offloads=offloads), removed) as served, FrontEnd(served.connect()) as front:
                assert front.get_features() & mask(Feature.VERSION_1)


@row("RSVF-D-02")
def test_driver_without_version_1_is_refused(served) -> None:
    with FrontEnd(served.connect()) as front:
        front.negotiate()
        with pytest.raises(RequestRefused):
            front.set_features(BIT_30 | mask(Feature.MRG_RXBUF))
        assert "disable-legacy=on" in served.wait_for("refused-request")
        front.set_features(BIT_30 | mask(Feature.VERSION_1))


@pytest.mark.parametrize("name", [
    pytest.param("ORDER_PLATFORM", marks=row("RSVF-D-06")), pytest.param("SR_IOV", marks=row("RSVF-D-07")),
    pytest.param("ADMIN_VQ", marks=row("RSVF-D-08")), pytest.param("NOTIFY_ON_EMPTY", marks=row("RSVF-D-09")),
    pytest.param("ANY_LAYOUT", marks=row("RSVF-D-10"))])
def test_feature_is_not_offered_and_cannot_be_set(served, name) -> None:
    bit = 1 << NOT_OFFERED[name]
    with FrontEnd(served.connect()) as front:
        offered = front.get_features()
        assert not offered & bit
        front.negotiate()
        with pytest.raises(RequestRefused):
            front.set_features(offered | bit)
        front.set_features(offered)
    served.wait_for("session-end")
    works(served, mask(Feature.VERSION_1))


@row("RSVF-D-03")
def test_access_platform_is_offered(served) -> None:
    with FrontEnd(served.connect()) as front:
        assert front.get_features() & mask(Feature.ACCESS_PLATFORM)


@row("RSVF-D-04")
def test_driver_that_is_behind_no_iommu_is_served(served) -> None:
    works(served, mask(Feature.VERSION_1))


@row("RSVF-D-11")
def test_bit_30_is_between_front_end_and_back_end_only(served) -> None:
    """It opens the protocol features; among those of the guest's driver it is not counted."""
    with ScriptedGuest(served.connect(), features=mask(Feature.VERSION_1)) as guest:
        assert guest.qemu.offered & guest.front_end.features & BIT_30 and guest.front_end.protocol_features
        line = served.wait_for("driver")
    assert line.endswith("features VERSION_1")


@row("VQ-SPLIT-D-29")
def test_byte_order_of_legacy_drivers_is_not_offered(served) -> None:
    with FrontEnd(served.connect()) as front:
        front.negotiate()
        assert not front.protocol_features >> ProtocolFeature.CROSS_ENDIAN & 1
        with pytest.raises(RequestRefused):
            front.request(Request.SET_VRING_ENDIAN, VRING_STATE.encode(VringState(0, 1)))
    served.wait_for("session-end")
    works(served, mask(Feature.VERSION_1))


# ---------------------------------------------------------------------------------------- how a ring is set up


def set_up(served: ServedDevice, features: int, size: int, **moved: int) -> None:
    """Go through the setting up of a transmitq, with the parts named in ``moved`` so many bytes from where they
    should be, and hang up. Raises RequestRefused."""
    with GuestMemory() as memory, DriverQueue(memory, 1024) as queue, FrontEnd(served.connect()) as front:
        front.negotiate(mask(Feature.VERSION_1) | features)
        front.set_status(0xF)
        front.share([SharedRegion(r.fd, r.gpa, r.uva, r.size, r.offset) for r in memory.regions])
        parts = zip(("desc", "avail", "used"), queue.ring.areas, strict=True)
        places = {part: memory.uva(area.gpa) + moved.get(part, 0) for part, area in parts}
        front.set_vring_num(1, size)
        front.set_vring_addr(1, **places)
        front.set_vring_kick(1, queue.kick_fd)


@pytest.mark.parametrize("part, moved, features", [
    *[pytest.param(part, by, 0, marks=row("VQ-SPLIT-DR-01"), id=f"split-{part}-{by}")
      for part, by in (("desc", 8), ("desc", 1), ("avail", 1), ("used", 2), ("used", 1))],
    *[pytest.param(part, by, PACKED, marks=row("VQ-PACKED-DR-01"), id=f"packed-{part}-{by}")
      for part, by in (("desc", 8), ("desc", 1), ("avail", 2), ("used", 2), ("used", 1))]])
def test_ring_that_is_not_aligned_is_refused(served, part, moved, features) -> None:
    with pytest.raises(RequestRefused, match="SET_VRING_KICK" if features and part == "avail" else "SET_VRING_ADDR"):
        set_up(served, features, 16, **{part: moved})
    served.wait_for("session-end")
    set_up(served, features, 16, **{part: 16})


@row("VQ-SPLIT-DR-02")
@pytest.mark.parametrize("size", [0, 3, 100, 32769, 65536])
def test_queue_size_that_no_split_ring_has_is_refused(served, size) -> None:
    # whether it must be a power of two depends on features, which may come later
    with pytest.raises(RequestRefused, match="SET_VRING_KICK" if size in (3, 100) else "SET_VRING_NUM"):
        set_up(served, 0, size)
    served.wait_for("session-end")
    set_up(served, 0, 64)
