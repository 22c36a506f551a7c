"""vdev/net/control/: each command as a function of bytes, and what no bytes can bring about."""

import json
import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring.receive_settings import MACS_MAX, Coalescing, HashType, ReceiveSettings, as_struct
from vdev.net.control import travel
from vdev.net.control.command import Context, Outcome, Rejected, control_queue_index
from vdev.net.control.commands import COMMANDS, execute
from vdev.net.control.statistics import TYPES
from vdev.net.features import Feature, mask

row = pytest.mark.row
F = Feature

OWN, OTHER = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")
GROUP = bytes.fromhex("01005e000001")
PAIRS = 4
NAMED = {row.name: number for number, row in COMMANDS.items()}
SETTINGS = ReceiveSettings(mac=OWN)


def context(features: int = mask(*F), settings: ReceiveSettings = SETTINGS) -> Context:
    return Context(features, PAIRS, settings, hash_types=0x1FF, tunnel_types=0x1FF, enabled=frozenset(range(2 * PAIRS)),
                   counters=lambda index: dict.fromkeys((name for kind in TYPES.values() for name in kind.counters),
                                                        index - 1))


def do(name: str, data: bytes = b"", **options) -> Outcome:
    return execute(bytes(NAMED[name]) + data, context(**options))


def rejected(name: str, data: bytes = b"", **options) -> str:
    with pytest.raises(Rejected) as why:
        do(name, data, **options)
    return str(why.value)


# ------------------------------------------------------------------------------------------------- every command


@row("NET-RXF-DR-01", "NET-RXF-DR-02", "NET-MAC-DR-01", "NET-RSS-DR-01", "NET-HASH-DR-01", "NET-COAL-DR-01")
@pytest.mark.parametrize("name", NAMED)
def test_command_without_its_feature_is_refused(name) -> None:
    needed = COMMANDS[NAMED[name]].needs
    assert rejected(name, features=mask(*F) & ~mask(needed)) == f"{name}: {needed.name} was not negotiated"


def test_the_numbers_of_commands_are_those_of_the_specification() -> None:
    assert NAMED == {
        "RX_PROMISC": (0, 0), "RX_ALLMULTI": (0, 1), "RX_ALLUNI": (0, 2), "RX_NOMULTI": (0, 3), "RX_NOUNI": (0, 4),
        "RX_NOBCAST": (0, 5), "MAC_TABLE_SET": (1, 0), "MAC_ADDR_SET": (1, 1), "VLAN_ADD": (2, 0), "VLAN_DEL": (2, 1),
        "ANNOUNCE_ACK": (3, 0), "MQ_VQ_PAIRS_SET": (4, 0), "MQ_RSS_CONFIG": (4, 1), "MQ_HASH_CONFIG": (4, 2),
        "GUEST_OFFLOADS_SET": (5, 0), "NOTF_COAL_TX_SET": (6, 0), "NOTF_COAL_RX_SET": (6, 1),
        "NOTF_COAL_VQ_SET": (6, 2), "NOTF_COAL_VQ_GET": (6, 3), "HASH_TUNNEL_SET": (7, 0),
        "STATS_QUERY": (8, 0), "STATS_GET": (8, 1)}


@pytest.mark.parametrize("command", [b"", b"\0", b"\x09\0", b"\0\x06", b"\xff\xff", b"\1\2"])
def test_what_is_no_command_is_refused(command) -> None:
    with pytest.raises(Rejected):
        execute(command, context())


@given(st.sampled_from(list(NAMED.values())), st.binary(max_size=400), st.integers(0, (1 << 64) - 1))
def test_no_bytes_do_more_than_be_refused_or_make_sound_settings(number, data, features) -> None:
    try:
        outcome = execute(bytes(number) + data, context(features))
    except Rejected as why:
        assert "\n" not in str(why)
        return
    as_struct(outcome.settings, range(PAIRS))
    assert travel.from_json(json.loads(json.dumps(travel.to_json(outcome.settings)))) == outcome.settings
    assert travel.queue_pairs_needed(outcome.settings) <= PAIRS


# ----------------------------------------------------------------------------------------------------- filters


@row("NET-RXF-D-01", "NET-RXF-D-04")
@pytest.mark.parametrize(("name", "field"), [
    ("RX_PROMISC", "promiscuous"), ("RX_ALLMULTI", "all_multicast"), ("RX_ALLUNI", "all_unicast"),
    ("RX_NOMULTI", "no_multicast"), ("RX_NOUNI", "no_unicast"), ("RX_NOBCAST", "no_broadcast")])
def test_mode_is_one_byte_0_or_1(name, field) -> None:
    on = do(name, b"\1").settings
    assert on == replace(SETTINGS, **{field: True})
    assert do(name, b"\0", settings=on).settings == SETTINGS
    for wrong in (b"", b"\2", b"\xff", b"\1\0"):
        rejected(name, wrong)


def table(count: int, *macs: bytes) -> bytes:
    return struct.pack("<I", count) + b"".join(macs)


@row("NET-MAC-D-05", "NET-MAC-DR-03")
def test_tables_of_addresses() -> None:
    assert do("MAC_TABLE_SET", table(2, OWN, OTHER) + table(1, GROUP)).settings == replace(
        SETTINGS, unicast=(OWN, OTHER), multicast=(GROUP,))
    assert do("MAC_TABLE_SET", table(0) + table(0)).settings == SETTINGS
    for wrong in (b"", bytes(3), table(0), table(1) + table(0), table(0xFFFFFFFF, OWN) + table(0),
                  table(0) + table(2, GROUP),
                  table(1, OWN) + table(0) + b"\0", table(1, GROUP) + table(0), table(0) + table(1, OWN)):
        rejected("MAC_TABLE_SET", wrong)


@pytest.mark.parametrize("mac", [b"", OWN[:5], OWN + b"\0", GROUP, b"\xff" * 6, bytes(6)])
def test_address_that_no_station_has(mac) -> None:
    rejected("MAC_ADDR_SET", mac)


@row("NET-VLAN-D-04")
def test_vlans_come_and_go() -> None:
    with_two = do("VLAN_ADD", b"\x64\0", settings=do("VLAN_ADD", b"\xff\x0f").settings).settings
    assert with_two.vlans == (100, 4095)
    assert do("VLAN_ADD", b"\x64\0", settings=with_two).settings == with_two
    assert do("VLAN_DEL", b"\x64\0", settings=with_two).settings.vlans == (4095,)
    assert do("VLAN_DEL", b"\0\0", settings=with_two).settings == with_two
    for wrong in (b"", b"\1", b"\0\x10", b"\xff\xff", b"\1\0\0"):
        rejected("VLAN_ADD", wrong)


# ---------------------------------------------------------------------------------------------------- steering


@row("NET-MQ-DR-02", "NET-MQ-D-02")
def test_number_of_pairs_is_between_one_and_all() -> None:
    assert do("MQ_VQ_PAIRS_SET", b"\4\0", settings=replace(SETTINGS, rss=True)).settings == replace(SETTINGS, pairs=4)
    for wrong in (b"", b"\1", b"\0\0", b"\5\0", b"\0\1", b"\1\0\0\0"):
        rejected("MQ_VQ_PAIRS_SET", wrong)


def rss(types: int = 0x3F, mask: int | None = None, unclassified: int = 1, table: tuple[int, ...] = (0, 3, 2, 1),
        transmitqs: int = 4, length: int | None = None, key: bytes = bytes(range(40))) -> bytes:
    mask = len(table) - 1 if mask is None else mask
    return struct.pack(f"<IHH{len(table)}HHB", types, mask, unclassified, *table, transmitqs,
                       len(key) if length is None else length) + key


@row("NET-RSS-D-05", "NET-RSS-DR-02", "NET-RSS-DR-03")
def test_rss_takes_a_table_and_a_key() -> None:
    assert do("MQ_RSS_CONFIG", rss()).settings == replace(
        SETTINGS, rss=True, indirection=(0, 3, 2, 1), unclassified=1, hash_types=HashType(0x3F),
        hash_key=bytes(range(40)))
    assert do("MQ_RSS_CONFIG", rss(0, table=(0,), key=b"")).settings.indirection == (0,)
    assert len(do("MQ_RSS_CONFIG", rss(table=(1,) * 128)).settings.indirection) == 128
    for wrong in (rss(types=0x200), rss(types=1 << 31), rss(mask=2), rss(mask=4), rss(mask=7), rss(mask=0xFFFF),
                  rss(table=(0,) * 256), rss(table=(0, 0, 0)), rss(table=(0, 4)), rss(unclassified=4),
                  rss(transmitqs=0), rss(transmitqs=5), rss(length=39), rss(length=41),
                  rss(key=bytes(41)), rss()[:-1], rss() + b"\0"):
        rejected("MQ_RSS_CONFIG", wrong)


@pytest.mark.parametrize("length", range(len(rss())))
def test_rss_that_ends_too_early(length) -> None:
    rejected("MQ_RSS_CONFIG", rss()[:length])


@row("NET-HASH-DR-03", "NET-HASH-DR-02")
def test_hash_selects_nothing() -> None:
    command = struct.pack("<I4HB", 0x4, 1, 2, 3, 4, 2) + b"ab"
    assert do("MQ_HASH_CONFIG", command, settings=replace(SETTINGS, rss=True)).settings == replace(
        SETTINGS, hash_types=HashType.UDPV4, hash_key=b"ab")
    for wrong in (command[:-1], command + b"c", command[:12], struct.pack("<I4HB", 0x200, 0, 0, 0, 0, 0)):
        rejected("MQ_HASH_CONFIG", wrong)


@row("NET-HASH-D-12", "NET-HASH-D-13")
def test_tunnels_that_are_not_supported() -> None:
    on = do("HASH_TUNNEL_SET", struct.pack("<I", 0x11)).settings
    assert on.tunnel_types == 0x11
    assert do("HASH_TUNNEL_SET", bytes(4), settings=on).settings == SETTINGS
    for wrong in (b"", bytes(3), bytes(5), struct.pack("<I", 0x200), struct.pack("<I", 1 << 31)):
        rejected("HASH_TUNNEL_SET", wrong)


@row("NET-OFL-D-01", "NET-OFL-DR-01")
def test_offloads_that_were_negotiated_are_switched() -> None:
    features = mask(F.CTRL_GUEST_OFFLOADS, F.GUEST_CSUM, F.GUEST_TSO4, F.HOST_TSO4)
    for on in (0, mask(F.GUEST_CSUM), mask(F.GUEST_CSUM, F.GUEST_TSO4)):
        assert do("GUEST_OFFLOADS_SET", struct.pack("<Q", on), features=features).settings.guest_offloads == on
    for wrong in (mask(F.GUEST_TSO6), mask(F.HOST_TSO4), mask(F.CTRL_GUEST_OFFLOADS), 1 << 46):
        rejected("GUEST_OFFLOADS_SET", struct.pack("<Q", wrong), features=features)
    rejected("GUEST_OFFLOADS_SET", bytes(4))


# -------------------------------------------------------------------------------------- notifications, statistics


@row("NET-COAL-D-05", "NET-COAL-D-06")
def test_any_numbers_may_be_set_and_are_read_back() -> None:
    most = struct.pack("<II", 0xFFFFFFFF, 0xFFFFFFFF)
    settings = do("NOTF_COAL_RX_SET", most).settings
    assert settings.coalescing == (Coalescing(0xFFFFFFFF, 0xFFFFFFFF), Coalescing()) * PAIRS
    assert do("NOTF_COAL_VQ_GET", bytes(4), settings=settings).reply == most
    assert do("NOTF_COAL_VQ_GET", bytes(12), settings=settings).reply == most
    for name in ("NOTF_COAL_TX_SET", "NOTF_COAL_RX_SET", "NOTF_COAL_VQ_SET"):
        for wrong in (b"", bytes(7), bytes(9), bytes(13)):
            rejected(name, wrong)


@row("NET-STAT-D-02", "NET-STAT-D-05", "NET-STAT-D-08", "NET-STAT-DR-01")
def test_statistics_of_several_queues() -> None:
    def asked(*entries: tuple[int, int]) -> bytes:
        return b"".join(struct.pack("<H6xQ", *entry) for entry in entries)

    assert len(do("STATS_GET", asked((0, 7), (1, 3 << 16), (8, 1 << 32))).reply) == 56 + 40 + 40 + 56 + 24 + 24
    # index 0: a counter that has gone beyond 64 bits begins again, as does one below zero
    assert do("STATS_GET", asked((0, 1))).reply[8:16] == b"\xff" * 8
    for wrong in (b"", bytes(15), bytes(17), asked((9, 1)), asked((0, 1), (8, 1)), asked((0, 8)), asked((0, 1 << 63))):
        rejected("STATS_GET", wrong)
    rejected("STATS_QUERY", b"\0")


@pytest.mark.parametrize(("features", "index"), [
    (0, None), (mask(F.MQ), None), (mask(F.CTRL_VQ), 2), (mask(F.CTRL_VQ, F.MQ), 8), (mask(F.CTRL_VQ, F.RSS), 8)])
@row("NET-VQ-D-01")
def test_where_the_control_queue_is(features, index) -> None:
    assert control_queue_index(features, PAIRS) == index


# -------------------------------------------------------------------------------------------------------- travel


@pytest.mark.parametrize("change", [
    {"mac": "0200"}, {"unicast": ["02"]}, {"unicast": ["020000000001"] * (MACS_MAX + 1)}, {"vlans": [4096]},
    {"vlans": [-1]}, {"pairs": 0}, {"indirection": []}, {"indirection": [0, 0, 0]}, {"indirection": [-1]},
    {"hash_types": 0x200}, {"hash_key": "00" * 41}, {"tunnel_types": 1 << 40},
    {"guest_offloads": -1}, {"guest_offloads": 1 << 64}, {"unclassified": -1}, {"pairs": True}, {"mac": None},
    {"coalescing": [{"packets": -1, "usecs": 0}]}, {"coalescing": [{"packets": 1 << 32, "usecs": 0}]}, {"more": 1}])
def test_settings_that_no_command_can_have_made(change) -> None:
    with pytest.raises(ValueError, match="^settings"):
        travel.from_json(travel.to_json(SETTINGS) | change)


def test_tables_that_are_too_long_to_be_told_apart_travel_as_such() -> None:
    many = tuple(bytes([2, 0, 0, 0, n // 256, n % 256]) for n in range(1000))
    there = travel.from_json(travel.to_json(replace(SETTINGS, unicast=many)))
    assert as_struct(there, (0,)).modes == as_struct(replace(SETTINGS, unicast=many), (0,)).modes
