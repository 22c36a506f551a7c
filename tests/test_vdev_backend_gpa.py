"""A running device whose front-end names rings by guest-physical addresses (GPA_ADDRESSES)."""

import pytest

from ring.driver import Extent, GuestMemory
from vdev.net.features import Feature, mask
from vdev.testing.scripted import ScriptedGuest, ring_setup, shared_regions
from vdev.testing.served import ServedDevice, both_ways
from vhost_user.frontend import FrontEnd, RequestRefused, SharedRegion
from vhost_user.handshake import QEMU_11_1
from vhost_user.spec import ProtocolFeature
from vhost_user.spec import mask as protocol_mask

RING = mask(Feature.VERSION_1, Feature.MRG_RXBUF, Feature.EVENT_IDX, Feature.INDIRECT_DESC)
GPA = protocol_mask(ProtocolFeature.GPA_ADDRESSES)
ACK = protocol_mask(ProtocolFeature.REPLY_ACK, ProtocolFeature.CONFIGURE_MEM_SLOTS)


@pytest.fixture
def served():
    with ServedDevice() as device:
        yield device


@pytest.mark.parametrize("ring", [0, mask(Feature.RING_PACKED)], ids=["split", "packed"])
def test_frames_pass_when_rings_are_named_by_gpa(served, ring) -> None:
    with ScriptedGuest(served.connect(), features=RING | ring, version=QEMU_11_1) as guest:
        assert guest.front_end.has(ProtocolFeature.GPA_ADDRESSES)
        region = guest.memory.regions[0]
        assert guest.qemu.rings[0].desc - region.gpa < region.size
        both_ways(served, guest)
        guest.front_end.set_mem_table(shared_regions(guest.memory, True), need_reply=True)
        both_ways(served, guest)


def test_the_front_ends_own_address_of_a_region_means_nothing(served) -> None:
    """Regions that overlap there are fine, and a region goes by the name it came by."""
    with FrontEnd(served.connect()) as front, GuestMemory(extents=[Extent(0, 4096), Extent(1 << 30, 4096)]) as memory:
        front.negotiate(RING, GPA | ACK)
        regions = [SharedRegion(region.fd, region.gpa, 0x7000, region.size, region.offset) for region in memory.regions]
        for shared in regions:
            front.add_mem_reg(shared)
        front.set_mem_table(regions)
        for shared in regions:
            front.rem_mem_reg(shared)


def test_ring_at_a_uva_is_outside_guest_memory(served) -> None:
    with ScriptedGuest(served.connect(), features=RING, version=QEMU_11_1) as guest:
        front, ring = guest.front_end, ring_setup(guest.driver.transmitq)
        front.get_vring_base(1)
        front.set_vring_addr(1, ring.desc, ring.avail, ring.used, need_reply=True)
        with pytest.raises(RequestRefused):
            front.set_vring_kick(1, ring.kick, need_reply=True)
        assert "transmitq 0 cannot start" in served.wait_for("refused-request")
