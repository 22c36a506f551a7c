"""vdev/net/offer.py: what is offered, whatever the port."""

import pytest

from vdev.net.features import OFFLOADS, Feature, mask
from vdev.net.offer import virtio_features
from vdev.ports.base import Carries

EVERYTHING = Carries(12, OFFLOADS, 8)
NOTHING = Carries(12, 0, 1)
RINGS = mask(Feature.RING_PACKED, Feature.IN_ORDER, Feature.INDIRECT_DESC, Feature.EVENT_IDX)


@pytest.mark.parametrize("carries", [EVERYTHING, NOTHING], ids=["any-offload", "no-offload"])
def test_every_ring_is_offered_with_any_port(carries: Carries) -> None:
    assert virtio_features(carries, carries.queue_pairs) & RINGS == RINGS


@pytest.mark.parametrize("bit", [Feature.RING_PACKED, Feature.IN_ORDER])
def test_each_kind_of_ring_can_be_taken_out_alone(bit: Feature) -> None:
    assert RINGS & ~virtio_features(EVERYTHING, 8, removed=mask(bit)) == mask(bit)


def test_RSVF_D_06_software_on_the_guests_own_processors_asks_for_no_platform_barriers() -> None:
    assert not virtio_features(EVERYTHING, 8) & mask(Feature.ORDER_PLATFORM)
