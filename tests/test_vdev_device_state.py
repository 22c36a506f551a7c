"""vdev/device_state.py: the text of a device's state, and what is believed of it."""

import json
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vdev.device_state import BYTES_MAX, DeviceState, StateError, check, decode, encode, of_session
from vdev.net.features import Feature, mask
from vhost_user.state import Flow, Offer, RingState, State

COUNTS = {way: {"frames": 12, "bytes": 980, "gso_frames": 1, "kicks": 2, "calls": 3, "dropped": {"no_port": 4}}
          for way in ("from_guest", "to_guest")}
MAC = bytes.fromhex("525400123456")
FEATURES = mask(Feature.VERSION_1, Feature.MRG_RXBUF, Feature.CSUM)
STATE = DeviceState(FEATURES, 1500, ((256, True), (128, False)), (MAC,), COUNTS, {"responder": {"leases": {}}})
OFFER = Offer(FEATURES | mask(Feature.LOG_ALL), 0, rings=2, queue_num=1)


def test_a_state_comes_back_as_it_was() -> None:
    assert decode(encode(STATE)) == STATE
    assert decode(encode(replace(STATE, mtu=None, queues=(), port={}))) == replace(STATE, mtu=None, queues=(), port={})


def test_it_can_be_read_by_a_person() -> None:
    text = json.loads(encode(STATE))
    assert text["vdev-state"] == 1 and text["features"] == ["CSUM", "MRG_RXBUF", "VERSION_1"]
    assert text["queues"] == [{"size": 256, "enabled": True}, {"size": 128, "enabled": False}]


def test_state_of_a_session_has_what_the_guest_negotiated() -> None:
    bits = FEATURES | mask(Feature.PROTOCOL_FEATURES, Feature.LOG_ALL)
    state = State((RingState(num=256, flow=Flow.ENABLED), RingState(num=128), RingState()), bits, mtu=1500)
    assert of_session(state, [MAC], COUNTS, {"responder": {"leases": {}}}) == STATE


def test_addresses_that_are_too_many_stay_behind() -> None:
    state = of_session(State((RingState(),)), [bytes([2, 0, 0, 0, 0, n]) for n in range(20)], COUNTS, {})
    assert len(decode(encode(state)).macs) == 16


def test_keys_it_does_not_know_are_passed_over() -> None:
    assert decode(json.dumps(json.loads(encode(STATE)) | {"later": [1]}).encode()) == STATE


@pytest.mark.parametrize("version", [0, 2, 10**9, "1", None, True, [1], 1.5])
def test_other_versions_are_refused_with_both_numbers(version) -> None:
    data = json.dumps(json.loads(encode(STATE)) | {"vdev-state": version}).encode()
    with pytest.raises(StateError, match="this vdev knows 1; use the same release"):
        decode(data)


@pytest.mark.parametrize("data", [
    b"", b"\0" * 100, b"{", b"\xff\xfe", b"[" * 30000, b"1" * 5000, b'{"a":' * 3000, b"null", b"[]", b"{}",
    b'"vdev-state"'])
def test_bytes_that_are_no_state(data) -> None:
    with pytest.raises(StateError, match="was it saved by another back-end"):
        decode(data)


def test_a_state_that_is_too_long() -> None:
    with pytest.raises(StateError, match=f"longer than {BYTES_MAX} bytes"):
        decode(encode(STATE) + b" " * BYTES_MAX)


@pytest.mark.parametrize("key", ["features", "mtu", "queues", "macs", "counters", "port"])
@pytest.mark.parametrize("value", [None, True, -1, 1 << 70, "x", [None], [[]], {"a": 1}, [{"size": 1}],
                                   [{"size": -1, "enabled": True}], [{"size": 1, "enabled": 1}]])
def test_parts_that_make_no_sense_are_named(key, value) -> None:
    if (key, value) in (("mtu", None), ("port", {"a": 1})):
        return
    with pytest.raises(StateError, match="^it lacks '|^.* makes no sense in it$"):
        decode(json.dumps(json.loads(encode(STATE)) | {key: value}).encode())


@pytest.mark.parametrize("key", ["features", "mtu", "queues", "macs", "counters", "port"])
def test_missing_parts_are_named(key) -> None:
    rest = {name: value for name, value in json.loads(encode(STATE)).items() if name != key}
    with pytest.raises(StateError, match=f"it lacks '{key}'"):
        decode(json.dumps(rest).encode())


@pytest.mark.parametrize("macs", ["x", [1], ["52:54"], ["52:54:00:12:34:5g"], ["52:54:00:12:34:56"] * 17, [None]])
def test_addresses_that_make_no_sense(macs) -> None:
    with pytest.raises(StateError, match="macs makes no sense"):
        decode(json.dumps(json.loads(encode(STATE)) | {"macs": macs}).encode())


@pytest.mark.parametrize("value", [-1, 1.0, "1", True, 1 << 64, None])
def test_counters_that_make_no_sense(value) -> None:
    found = json.loads(encode(STATE))
    found["counters"]["to_guest"]["frames"] = value
    with pytest.raises(StateError, match="frames makes no sense"):
        decode(json.dumps(found).encode())


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "CSUM", "x\n"]),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(
                        ["features", "mtu", "queues", "counters", "port", "size", "enabled", "from_guest", "to_guest",
                         "frames", "dropped", "x"]), inner, max_size=6), max_leaves=20)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.dictionaries(st.sampled_from(["features", "mtu", "queues", "counters", "port"]), JSON))
def test_whatever_json_comes_it_is_a_state_or_refused(parts) -> None:
    try:
        decode(json.dumps(json.loads(encode(STATE)) | parts).encode())
    except StateError as reason:
        assert "\n" not in str(reason)


@given(st.binary(max_size=200))
def test_whatever_bytes_come_they_are_refused(data) -> None:
    with pytest.raises(StateError):
        decode(data)


def test_what_the_device_cannot_be_is_refused() -> None:
    check(STATE, OFFER)
    with pytest.raises(StateError, match="the guest uses GUEST_TSO4, which is not offered here"):
        check(replace(STATE, features=FEATURES | mask(Feature.GUEST_TSO4)), OFFER)
    with pytest.raises(StateError, match="the guest has 3 queues, here are 2"):
        check(replace(STATE, queues=((8, True),) * 3), OFFER)
    with pytest.raises(StateError, match="has 512 entries, more than 256"):
        check(replace(STATE, queues=((512, True),)), replace(OFFER, max_queue_size=256))
