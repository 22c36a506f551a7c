"""vdev/net/offer.py: what is offered, whatever the port, and that docs/protocol.md says the same."""

import re
from enum import IntEnum
from pathlib import Path

import pytest

from vdev.net.features import OFFLOADS, Feature, mask
from vdev.net.offer import PERSONALITIES, Audience, protocol_features, virtio_features
from vdev.ports.base import Carries
from vhost_user.spec import ProtocolFeature

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


# ------------------------------------------------------------------------------- docs/protocol.md

DOCUMENT = Path(__file__).parent.parent / "docs" / "protocol.md"


def table(heading: str) -> dict[str, list[tuple[int, str, str]]]:
    """The table below ``heading``: the name of each column about an audience -> (bit, feature, cell) of every row."""
    section = DOCUMENT.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = re.findall(r"^\|.*", section, re.M)
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    for row in rows:
        assert "no" not in row[2:-1] or row[-1], f"{row[1]}: no reason is given"
    return {name: [(int(row[0]), row[1], row[column]) for row in rows]
            for column, name in enumerate(head[2:-1], 2)}


def expected(names: type[IntEnum], cell_of) -> list[tuple[int, str, str]]:
    return [(bit.value, bit.name, cell_of(1 << bit)) for bit in names]


def virtio_cell(bit: int, personality: str) -> str:
    if Audience(personality, owner_first=True).withheld & bit:
        assert not Audience(personality).withheld & bit
        return "GET_FEATURES"
    if virtio_features(NOTHING, 1, personality=personality) & bit:
        return "yes"
    if virtio_features(NOTHING, 2, personality=personality) & bit:
        return "pairs"
    return "port" if virtio_features(EVERYTHING, 1, personality=personality) & bit else "no"


def protocol_cell(bit: int, personality: str) -> str:
    virtio, audience = virtio_features(EVERYTHING, 1), Audience(personality)
    plain, by_owner, asked = (bool(mask & bit) for mask in (
        protocol_features(virtio, audience), protocol_features(virtio, Audience(personality, owner_first=True)),
        protocol_features(virtio, audience, postcopy=True)))
    return {(True, True, True): "yes", (False, False, False): "no", (False, True, False): "SET_OWNER",
            (False, False, True): "asked"}[plain, by_owner, asked]


def test_the_table_of_virtio_features_is_true() -> None:
    assert table("Virtio features") == {
        personality: expected(Feature, lambda bit, personality=personality: virtio_cell(bit, personality))
        for personality in PERSONALITIES}


def test_the_table_of_protocol_features_is_true() -> None:
    documented = table("Protocol features")
    assert list(documented) == list(PERSONALITIES)
    for personality, rows in documented.items():
        assert rows == expected(ProtocolFeature, lambda bit, personality=personality: protocol_cell(bit, personality))


@pytest.mark.parametrize("personality", PERSONALITIES)
def test_what_qemu_would_set_without_acting_on_it_is_not_offered(personality) -> None:
    """Bits that were seen to be set by QEMU, which then sends nothing of what they promise."""
    for bit in (ProtocolFeature.XEN_MMAP, ProtocolFeature.INFLIGHT_SHMFD, ProtocolFeature.INBAND_NOTIFICATIONS):
        assert not protocol_features(virtio_features(EVERYTHING, 8), Audience(personality)) >> bit & 1
    assert not virtio_features(EVERYTHING, 8, personality=personality) & mask(Feature.RING_RESET)


def test_what_qemus_net_device_would_set_and_keep_to_itself_is_not_offered() -> None:
    assert not protocol_features(virtio_features(EVERYTHING, 8), Audience("qemu-net")) >> ProtocolFeature.CONFIG & 1
    assert not virtio_features(EVERYTHING, 8) & mask(Feature.HASH_REPORT, Feature.MAC, Feature.STATUS, Feature.CTRL_VQ)


def test_nobody_but_qemu_is_offered_what_needs_a_control_queue_without_one() -> None:
    """NET-FEAT-D-03: QEMU adds the control queue."""
    offered = virtio_features(EVERYTHING, 8, personality="full")
    if not offered & mask(Feature.CTRL_VQ):
        assert not offered & mask(Feature.CTRL_RX, Feature.CTRL_VLAN, Feature.GUEST_ANNOUNCE, Feature.MQ,
                                  Feature.CTRL_MAC_ADDR, Feature.NOTF_COAL, Feature.VQ_NOTF_COAL, Feature.RSS)
