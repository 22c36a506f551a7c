"""vdev/plain.py: what is handed on comes out as it went in, and what is no such thing is refused with its place."""

import json
from ipaddress import IPv4Address

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vdev.backend_handover import BackendPart
from vdev.engine import EnginePart, RingPart
from vdev.listen import ListenerPart
from vdev.plain import from_plain, to_plain
from vdev.ports.responder import ResponderPart
from vdev.ports.tap import TapPart
from vdev.service import SessionPart
from vdev.upgrade import ConfigPart
from vhost_user.codec import Begun
from vhost_user.state import RingState, State
from vhost_user.wire import Region

# from_type follows the hints of a part, so that a field which is added is tried, too.
st.register_type_strategy(float, st.floats(allow_nan=False))


def through_json(kind, value):
    return from_plain(kind, json.loads(json.dumps(to_plain(value))))


@pytest.mark.parametrize("kind", [State, Begun, RingPart, EnginePart, BackendPart, TapPart, ResponderPart, SessionPart,
                                  ListenerPart, ConfigPart])
def test_every_part_comes_out_as_it_went_in(kind):
    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.from_type(kind))
    def check(value):
        assert through_json(kind, value) == value

    check()


@given(st.dictionaries(st.binary(max_size=6), st.ip_addresses(v=4), max_size=5))
def test_dicts_keep_their_order(leases):
    assert list(through_json(dict[bytes, IPv4Address], leases).items()) == list(leases.items())


@pytest.mark.parametrize("kind, data, said", [
    (Region, {"gpa": 0, "size": 0, "uva": 0}, "state: not an object with exactly the fields gpa, size, uva, offset"),
    (Region, {"gpa": 0, "size": 0, "uva": 0, "offset": "1"}, "state.offset: str where int is due"),
    (Region, {"gpa": 0, "size": 0, "uva": 0, "offset": True}, "state.offset: bool where int is due"),
    (Region, [], "state: not an object"),
    (tuple[Region, ...], {}, "state: not an array"),
    (tuple[int, int], [1], "state: 1 items, not 2"),
    (RingState, to_plain(RingState()) | {"run": "FLYING"}, "state.run: str where Run is due"),
    (bytes, "zz", "state: 'zz' is no bytes"),
    (IPv4Address, "1.2.3", "state: '1.2.3' is no IPv4Address"),
    (dict[str, int], [["a"]], "state: not an array of pairs"),
    (dict[str, int], [["a", "b"]], "state[a]: str where int is due"),
    (int | None, "x", "state: str where int is due"),
])
def test_what_does_not_fit_is_refused_with_its_place(kind, data, said):
    with pytest.raises(ValueError) as refused:
        from_plain(kind, data)
    assert str(refused.value).startswith(said)


def test_what_cannot_be_handed_on():
    with pytest.raises(TypeError, match="object cannot be handed on"):
        to_plain(object())
