"""The linter and the control queue: for each rule a command that breaks it is named, and what is right is not."""

import struct

import pytest

from ring.receive_settings import ReceiveSettings
from vdev.lint.commands import broken
from vdev.net.control.command import Context
from vdev.net.features import Feature, mask
from vdev.testing.full_guest import FullGuest
from vdev.testing.served import ServedDevice

ALL = mask(Feature.CTRL_VQ, Feature.CTRL_RX, Feature.CTRL_RX_EXTRA, Feature.CTRL_MAC_ADDR, Feature.MQ, Feature.RSS,
           Feature.CTRL_GUEST_OFFLOADS, Feature.GUEST_CSUM, Feature.NOTF_COAL, Feature.VQ_NOTF_COAL)
SINGLE, GROUP = bytes.fromhex("020000000001"), bytes.fromhex("010000000001")


def table(*macs: bytes) -> bytes:
    return struct.pack("<I", len(macs)) + b"".join(macs)


CASES = [
    ("LINT-COMMAND", ALL, b"\x09\x00"),
    ("LINT-COMMAND", ALL, b""),
    ("LINT-COMMAND", ALL, b"\x02\x00\x01\x00"),  # VLAN_ADD, and there is no CTRL_VLAN
    ("NET-RXF-DR-01", 0, b"\x00\x01\x01"),
    ("NET-RXF-DR-02", ALL & ~mask(Feature.CTRL_RX_EXTRA), b"\x00\x02\x01"),
    ("NET-MAC-DR-01", 0, b"\x01\x00" + table() + table()),
    ("NET-MAC-DR-01", ALL & ~mask(Feature.CTRL_MAC_ADDR), b"\x01\x01" + SINGLE),
    ("NET-MAC-DR-03", ALL, b"\x01\x00" + table(GROUP) + table()),
    ("NET-MAC-DR-03", ALL, b"\x01\x00" + table(SINGLE) + table(GROUP, SINGLE)),
    ("NET-MQ-DR-02", ALL, b"\x04\x00\x00\x00"),
    ("NET-MQ-DR-02", ALL, b"\x04\x00\x03\x00"),
    ("NET-RSS-DR-01", ALL & ~mask(Feature.RSS), b"\x04\x01"),
    ("NET-OFL-DR-01", ALL, b"\x05\x00" + mask(Feature.GUEST_TSO4).to_bytes(8, "little")),
    ("NET-COAL-DR-01", 0, b"\x06\x00" + bytes(8)),
    ("NET-COAL-DR-01", ALL, b"\x06\x02" + struct.pack("<HHII", 7, 0, 1, 1)),
    ("NET-HASH-DR-01", ALL, b"\x07\x00" + bytes(4)),
]

CLEAN = [
    b"\x00\x00\x01", b"\x00\x05\x00", b"\x01\x00" + table(SINGLE) + table(GROUP), b"\x01\x00" + table() + table(),
    b"\x01\x01" + SINGLE, b"\x04\x00\x02\x00", b"\x05\x00" + mask(Feature.GUEST_CSUM).to_bytes(8, "little"),
    b"\x06\x00" + bytes(8), b"\x06\x03" + struct.pack("<HHII", 1, 0, 0, 0),
]


def found(features: int, command: bytes) -> list[str]:
    """The rules that ``command`` breaks, of a driver with two queue pairs."""
    context = Context(features, 2, ReceiveSettings(mac=SINGLE), enabled=frozenset(range(4)))
    return [id for id, _ in broken(command, context)]


@pytest.mark.parametrize(("id", "features", "command"), CASES, ids=[f"{id}-{n}" for n, (id, *_) in enumerate(CASES)])
def test_rule(id: str, features: int, command: bytes) -> None:
    assert found(features, command) == [id]


@pytest.mark.parametrize("command", CLEAN, ids=bytes.hex)
def test_what_is_right_is_not_named(command: bytes) -> None:
    assert found(ALL, command) == []


@pytest.mark.parametrize("cut", range(20))
def test_a_table_cut_anywhere_is_looked_at_all_the_same(cut: int) -> None:
    assert found(ALL, b"\x01\x00" + (table(SINGLE) + table(GROUP))[:cut]) == []
    assert found(ALL, b"\x01\x00" + struct.pack("<I", 1 << 31) + bytes(cut)) == []


def test_a_session_with_a_control_queue() -> None:
    features = mask(Feature.VERSION_1, Feature.MRG_RXBUF, Feature.CTRL_VQ, Feature.CTRL_RX)
    with (ServedDevice(personality="full", lint="on") as served,
          FullGuest(served.connect(), features=features) as guest):
        assert guest.command(0, 0, b"\x01")[0] == 0
        assert served.lines("lint") == []
        assert guest.command(1, 1, SINGLE)[0] == 1
        assert "MAC_ADDR_SET, and CTRL_MAC_ADDR was not negotiated" in served.wait_for("lint")


def test_strict_ends_the_session_behind_the_command() -> None:
    with (ServedDevice(personality="full", lint="strict") as served,
          FullGuest(served.connect()) as guest):
        assert guest.command(1, 1, SINGLE)[0] == 1
        assert "NET-MAC-DR-01" in served.wait_for("session-end")
