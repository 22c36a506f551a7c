"""The table of requests: complete, and consistent with itself."""

import pytest

from vhost_user import wire
from vhost_user.errors import Refused
from vhost_user.requests import NOT_HANDLED, REQUESTS, row_of
from vhost_user.spec import FDS_MAX, ProtocolFeature, Request, VirtioBit, bit_names, request_name
from vhost_user.state import State

SOME = State(rings=())


def test_every_request_of_the_specification_is_either_handled_or_refused_for_a_reason():
    assert REQUESTS.keys() | NOT_HANDLED.keys() == set(Request)
    assert not REQUESTS.keys() & NOT_HANDLED.keys()


@pytest.mark.parametrize("kind", REQUESTS, ids=lambda kind: kind.name)
def test_rows_are_consistent(kind):
    row = REQUESTS[kind]
    fewest, most = row.fds
    assert 0 <= fewest <= most <= FDS_MAX
    assert (row.ring is not None) == (row.payload in (wire.VRING_STATE, wire.VRING_ADDR, wire.VRING_FD))
    assert (row.reply is not None) == (row.source is not None or row.from_device)
    assert not (row.source is not None and row.from_device)
    assert not row.acked or row.reply is None
    assert row.refusal is None or row.reply.decode(row.reply.encode(row.refusal)) == row.refusal
    if kind not in (Request.SET_DEVICE_STATE_FD, Request.CHECK_DEVICE_STATE, Request.IOTLB_MSG,
                    Request.POSTCOPY_ADVISE, Request.POSTCOPY_END):
        assert (row.reply is not None) == kind.name.startswith("GET_")


@pytest.mark.parametrize("kind", NOT_HANDLED, ids=lambda kind: kind.name)
def test_P61_what_is_not_handled_is_refused_with_its_reason(kind):
    with pytest.raises(Refused) as refused:
        row_of(kind, SOME, 0)
    assert NOT_HANDLED[kind] in refused.value.reason


@pytest.mark.parametrize("number", [0, 46, 0xFFFFFFFF])
def test_unknown_numbers_are_refused(number):
    with pytest.raises(Refused, match="no such request"):
        row_of(number, SOME, 0)
    assert request_name(number) == f"request {number}"


def test_bits_have_names_where_there_are_any():
    assert bit_names(1 << 32 | 1 << 40 | 1 << 63, VirtioBit) == "VERSION_1, RING_RESET, bit 63"
    assert bit_names(1, ProtocolFeature) == "MQ"
    assert bit_names(0, ProtocolFeature) == ""
