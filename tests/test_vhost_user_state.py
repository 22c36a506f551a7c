"""The tables of ring states against the specification's text ("Ring states"), and what is offered."""

from dataclasses import replace

import pytest

from vhost_user.spec import ProtocolFeature, mask
from vhost_user.state import FLOW, RUN, Event, Flow, Offer, RingState, Run, State

VERSION_1 = 1 << 32


def test_VU_RING_B_01_every_ring_begins_stopped_and_disabled():
    ring = RingState()
    assert not ring.started
    assert not ring.enabled


@pytest.mark.parametrize("run", Run)
def test_every_state_says_what_reset_status_zero_and_enabling_do(run):
    assert RUN[run][Event.RESET] is Run.STOPPED
    assert RUN[run][Event.STATUS_ZERO] is Run.STOPPED
    for event in (Event.ENABLE, Event.DISABLE, Event.CALL, Event.ERR, Event.PLAIN_FEATURES):
        assert RUN[run][event] is run, "not a matter of started or stopped"
    assert RUN[run][Event.KICK] is Run.STARTED
    assert RUN[run][Event.GET_BASE] is not Run.STARTED


def test_a_started_ring_is_not_configured():
    assert {Event.NUM, Event.BASE} & RUN[Run.STARTED].keys() == set()
    assert {Event.NUM, Event.BASE, Event.ADDR} <= RUN[Run.STOPPED].keys()


@pytest.mark.parametrize(
    "event", [Event.NUM, Event.ADDR, Event.BASE, Event.KICK, Event.STATUS_ZERO, Event.RESET])
def test_a_parked_ring_is_not_parked_after_anything_was_said_about_it(event):
    assert RUN[Run.PARKED][event] is not Run.PARKED


def test_resuming_needs_a_parked_ring():
    assert [run for run in Run if Event.RESUME in RUN[run]] == [Run.PARKED]


@pytest.mark.parametrize("start", [RingState(), RingState(run=Run.STARTED, flow=Flow.ENABLED)])
@pytest.mark.parametrize("event", [event for event in Event if event not in FLOW])
def test_only_the_events_of_the_flow_table_enable_or_disable(start, event):
    if start.permits(event):
        assert start.after(event).enabled == start.enabled


def test_two_facts_are_independent():
    ring = RingState().after(Event.ENABLE).after(Event.KICK)
    assert ring.started and ring.enabled
    ring = ring.after(Event.DISABLE)
    assert ring.started and not ring.enabled
    ring = ring.after(Event.ENABLE).after(Event.GET_BASE)
    assert not ring.started and ring.enabled


def test_an_illegal_event_has_no_outcome():
    with pytest.raises(KeyError):
        RingState(run=Run.STARTED).after(Event.NUM)


def test_driver_ok_is_taken_for_granted_where_nobody_tells_the_status():
    state = State(rings=(RingState(),))
    assert state.driver_ok
    told = replace(state, protocol_features=mask(ProtocolFeature.STATUS))
    assert not told.driver_ok
    assert not replace(told, status=0xB).driver_ok
    assert replace(told, status=0xF).driver_ok


def test_an_offer_without_version_1_is_a_mistake():
    with pytest.raises(ValueError, match="legacy"):
        Offer(features=0, protocol_features=0, rings=2, queue_num=1)


@pytest.mark.parametrize("size", [0, 32769])
def test_an_offer_of_an_impossible_queue_size_is_a_mistake(size):
    with pytest.raises(ValueError, match="max_queue_size"):
        Offer(VERSION_1, 0, rings=2, queue_num=1, max_queue_size=size)
