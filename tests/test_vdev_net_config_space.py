"""vdev/net/config_space.py: the layout, what of it is there for whom, and what may be written."""

import pytest

from vdev.net.config_space import SIZE, ConfigSpace, mac_after
from vdev.net.features import Feature, mask

MAC = bytes.fromhex("525400123456")
SPACE = ConfigSpace(MAC, queue_pairs=3, mtu=1500, speed=25_000, announce=True, key_size=40, table_length=128,
                    hash_types=0x1FF, tunnel_types=0x10)
# name: (offset, bytes, features any of which brings it)
FIELDS = {
    "mac": (0, MAC, (Feature.MAC,)),
    "status": (6, b"\x03\x00", (Feature.STATUS,)),
    "max_virtqueue_pairs": (8, b"\x03\x00", (Feature.MQ, Feature.RSS)),
    "mtu": (10, b"\xdc\x05", (Feature.MTU,)),
    "speed": (12, b"\xa8\x61\x00\x00", (Feature.SPEED_DUPLEX,)),
    "duplex": (16, b"\x01", (Feature.SPEED_DUPLEX,)),
    "rss_max_key_size": (17, b"\x28", (Feature.RSS, Feature.HASH_REPORT)),
    "rss_max_indirection_table_length": (18, b"\x80\x00", (Feature.RSS,)),
    "supported_hash_types": (20, b"\xff\x01\x00\x00", (Feature.RSS, Feature.HASH_REPORT)),
    "supported_tunnel_types": (24, b"\x10\x00\x00\x00", (Feature.HASH_TUNNEL,)),
}


@pytest.mark.row("NET-CFG-D-16")
@pytest.mark.parametrize("name", FIELDS)
def test_field_lies_where_the_specification_has_it(name) -> None:
    offset, value, features = FIELDS[name]
    for feature in features:
        assert SPACE.encode(mask(feature))[offset:offset + len(value)] == value
    rest = SPACE.encode(~mask(*features))
    assert rest[offset:offset + len(value)] == bytes(len(value))
    assert len(rest) == SIZE == 28


@pytest.mark.row("NET-CFG-D-17")
@pytest.mark.parametrize(("link_up", "announce", "status"), [(False, False, 0), (True, False, 1), (False, True, 2)])
def test_status_has_a_bit_for_the_link_and_one_for_the_announcement(link_up, announce, status) -> None:
    space = ConfigSpace(MAC, 1, 1500, 0, link_up=link_up, announce=announce)
    assert space.encode(mask(Feature.STATUS))[6:8] == bytes([status, 0])


def test_address_that_is_written_in_parts() -> None:
    space = SPACE.encode(mask(*Feature))
    assert mac_after(space, 0, b"\x02\x04") == b"\x02\x04" + MAC[2:]
    assert mac_after(space, 5, b"\x07") == MAC[:5] + b"\x07"
    assert mac_after(space, 0, b"\x0a" + space[1:]) == b"\x0a" + MAC[1:]


@pytest.mark.parametrize(("offset", "data"), [(6, b"\x00"), (5, b"\x00\x00"), (27, b"\x00\x00"), (28, b"\x00"),
                                              (0, bytes(28)), (200, b"x")])
def test_nothing_but_the_address_is_written(offset, data) -> None:
    with pytest.raises(ValueError, match="more than the MAC address"):
        mac_after(SPACE.encode(mask(*Feature)), offset, data)
