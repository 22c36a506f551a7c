"""What is the split virtqueue's own in normal life: its indices, its sizes, its notification fields.

Driver in Python, device in C through the step API. What it shares with the packed ring is in
tests/test_ring_virtqueue.py, what a lying driver gets in tests/test_ring_hostile.py.
"""

from hypothesis import given, settings
from hypothesis import strategies as st

from ring.driver import Buffer
from ring.driver_parts import EVENT_IDX, IN_ORDER
from ring.driver_split import USED_F_NO_NOTIFY
from ring.virtqueue import CallReason, VirtQueue
from vdev.testing.rig import joined

EVENT = 1 << EVENT_IDX
ORDER = 1 << IN_ORDER


def serve(device: VirtQueue) -> None:
    """Use every chain that waits."""
    while (chain := device.pop()) is not None:
        device.push(chain)
    device.publish()


def test_phases_one_by_one():
    with joined() as (driver, device):
        driver.post([b"ab"], [3])
        driver.post([b"c"])
        driver.publish()
        assert device.see() == 2
        driver.post([b"later"])
        driver.publish()
        chain = device.take()
        assert (chain.head, chain.descriptors, chain.slots) == (0, 0, 1)
        assert device.walk() and (chain.readable_len, chain.writable_len) == (2, 0)
        assert not device.walk() and (chain.readable_len, chain.writable_len) == (2, 3)
        second = device.take()
        assert second.head == 2 and not device.walk() and second.read() == b"c"
        assert device.take() is None  # the third was not there when we looked
        assert device.see() == 1
        assert device.take().head == 3


def test_base_and_state():
    with joined(size=4, base=0xFFFE) as (driver, device):
        for _ in range(3):
            driver.post([b"x"])
        driver.publish()
        device.push(device.pop())
        device.push(device.pop())
        device.publish()
        device.pop()
        state = device.state
        assert (state.packed, state.size, state.next_avail, state.known) == (False, 4, 1, 1)
        assert (state.next_used, state.published, state.broken) == (0, 0, None)
        assert device.base == 1


def test_batch_in_order_is_one_element_and_a_leap_of_the_index():
    """2.7.9: it stands where the first of the batch would, and names the last."""
    with joined(features=ORDER, base=0xFFFE) as (driver, device):
        heads = [driver.post([b"x"]) for _ in range(3)]
        driver.publish()
        driver.ring.used.ring[0].id = 77
        device.push_batch(list(iter(device.pop, None)))
        device.publish()
        assert (driver.ring.used.idx, driver.ring.used.ring[0xFFFE].id) == (1, heads[2])
        assert driver.ring.used.ring[0].id == 77


# ------------------------------------------------------------------------------------- notifications


def test_call_follows_the_flag():
    with joined() as (driver, device):
        for _ in range(4):
            driver.post([b"x"])
        driver.publish()
        reasons = []
        for suppressed in (1, 0, 1):
            driver.ring.avail.flags = suppressed
            device.push(device.pop())
            device.publish()
            reasons.append(device.decide())
        assert reasons == [CallReason.FLAG_SUPPRESSED, CallReason.FLAG_WANTS, CallReason.FLAG_SUPPRESSED]
        assert [reason.due for reason in reasons] == [False, True, False]
        assert device.decide() == CallReason.NOTHING_NEW and not CallReason.NOTHING_NEW.due


def test_call_follows_the_event():
    with joined(features=EVENT, base=0xFFFD) as (driver, device):
        driver.post([b"x"])
        driver.publish()
        serve(device)
        driver.ring.avail.used_event = 0x8000
        assert device.decide() == CallReason.FIRST  # a predecessor may have owed one: R37
        driver.ring.avail.flags = 1  # means nothing with EVENT_IDX
        driver.ring.avail.used_event = 0
        reasons = []
        for _ in range(4):
            driver.post([b"x"])
            driver.publish()
            serve(device)
            reasons.append(device.decide())
        ahead, reached = CallReason.EVENT_AHEAD, CallReason.EVENT_REACHED
        assert reasons == [ahead, ahead, reached, ahead]  # used indices 0xFFFE, 0xFFFF, 0, 1


@given(before=st.integers(0, 0xFFFF), batch=st.integers(1, 64), distance=st.integers(-70, 70))
@settings(max_examples=100, deadline=None)
def test_one_call_a_batch_wherever_the_event_lies(before, batch, distance):
    event = (before + distance) & 0xFFFF
    with joined(size=64, features=EVENT, base=(before - 1) & 0xFFFF) as (driver, device):
        driver.post([b"x"])
        driver.publish()
        serve(device)
        device.decide()
        driver.collect()
        for _ in range(batch):
            driver.add([Buffer(driver.ring.desc.gpa, 1)])
        driver.publish()
        driver.ring.avail.used_event = event
        serve(device)
        reason = device.decide()
        # 2.7.7 in words: the batch made an entry visible at the index the driver named
        due = any((before + i) & 0xFFFF == event for i in range(batch))
        assert reason == (CallReason.EVENT_REACHED if due else CallReason.EVENT_AHEAD)
        assert device.decide() == CallReason.NOTHING_NEW


def test_kicks_wanted_and_not_by_flag():
    with joined() as (driver, device):
        device.disarm()
        assert driver.ring.used.flags == USED_F_NO_NOTIFY
        device.arm()
        assert driver.ring.used.flags == 0


def test_kicks_wanted_and_not_by_event():
    with joined(features=EVENT, base=0xFFFE) as (driver, device):
        assert device.arm() == 0
        assert driver.ring.used.avail_event == 0xFFFE
        kicks = []
        for i in range(4):
            driver.post([b"x"])
            kicks.append(driver.submit())
            if i == 1:
                serve(device)
                device.disarm()
                assert device.arm() == 0 and driver.ring.used.avail_event == 0
        assert kicks == [True, False, True, False]
        device.disarm()
        assert driver.ring.used.flags == 0  # 2.7.10.2: must not be used with EVENT_IDX


def test_arm_asks_for_what_comes_after_the_chains_known():
    """A chain popped and given back was announced before: a kick from there on would never come."""
    with joined(features=EVENT) as (driver, device):
        driver.post([b"x"])
        driver.publish()
        device.pop()
        device.unpop()
        assert device.arm() == 0 and driver.ring.used.avail_event == 1
        driver.post([b"y"])
        assert driver.submit()
