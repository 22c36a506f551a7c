"""The scripted guest over every kind of ring, against a served device: vdev/testing/scripted.py."""

import pytest

from vdev.net.features import Feature, mask
from vdev.testing.netdriver import NetHeader
from vdev.testing.scripted import ScriptedGuest
from vdev.testing.served import WAIT, ServedDevice

USUAL = mask(Feature.VERSION_1, Feature.INDIRECT_DESC, Feature.EVENT_IDX, Feature.MRG_RXBUF)
PACKED = mask(Feature.RING_PACKED)
ORDER = mask(Feature.IN_ORDER)
FRAME = bytes(range(60))


@pytest.mark.parametrize("ring", [0, PACKED, ORDER, PACKED | ORDER],
                         ids=["split", "packed", "split_in_order", "packed_in_order"])
def test_frames_pass_both_ways_across_the_wrap(ring) -> None:
    with ServedDevice() as served, ScriptedGuest(served.connect(), features=USUAL | ring, size=8) as guest:
        wire = served.port.wire[0]
        wire.settimeout(WAIT)
        for i in range(20):
            frame = bytes([i]) + FRAME
            guest.driver.transmit(frame)
            assert wire.recv(4096)[NetHeader.SIZE:] == frame
            wire.send(bytes(NetHeader.SIZE) + frame)
            received = guest.driver.receive_within(WAIT)
            assert received is not None and received.frame == frame
            assert guest.driver.reclaim_all(WAIT)
        assert guest.driver.transmitq.base == guest.front_end.get_vring_base(1)


@pytest.mark.parametrize("missing", [Feature.RING_PACKED, Feature.IN_ORDER])
def test_ring_that_is_not_offered_is_named(missing) -> None:
    with (ServedDevice(removed=mask(missing)) as served,
          pytest.raises(ValueError, match=f"^the back-end does not offer {missing.name}$")):
        ScriptedGuest(served.connect(), features=USUAL | mask(missing))
