"""Split virtqueues: who is notified when. Sections 2.7.7, 2.7.10 and 2.7.13."""

import time
from collections.abc import Callable

from vdev.conformance import frames
from vdev.conformance.bench import Bench, Session
from vdev.conformance.checks.bases import polled
from vdev.conformance.checks.split import until_used
from vdev.conformance.verdict import Checks, expect
from vdev.net.features import Feature as F

CHECKS = Checks()


def used_quietly(session: Session, count: int, kick: bool = True) -> None:
    """``count`` frames published at once and used, without the driver asking for a call."""
    for _ in range(count):
        session.driver.offer(frames.plain(frames.tag()))
    session.driver.transmitq.publish()
    if kick:
        session.driver.transmitq.kick()
    until_used(session, session.driver.transmitq.ring.next_avail)
    session.driver.reclaim()


def called(session: Session) -> bool:
    """Was the driver called for the transmitq, within a moment?"""
    deadline = time.monotonic() + session.bench.seconds
    while time.monotonic() < deadline:
        if session.driver.transmitq.called():
            return True
        time.sleep(0.001)
    return False


def silent(session: Session) -> bool:
    """It was not."""
    session.settle()
    return not session.driver.transmitq.called()


@CHECKS.row("VQ-SPLIT-D-09")
def used_event_means_nothing(bench: Bench) -> None:
    """Without EVENT_IDX writes values of all kinds where used_event would be: the driver is called for every frame."""
    with bench.session(packed=False) as session:
        ring = session.driver.transmitq.ring
        for value in 0x7000, 0xFFFF, 0, 1, 3:
            session.driver.transmitq.called()
            ring.avail.used_event = value
            used_quietly(session, 1)
            expect(called(session), f"used_event is {value:#x}, and no call came")


@CHECKS.row("VQ-SPLIT-D-10")
def flags_refuse_calls(bench: Bench) -> None:
    """Without EVENT_IDX sets flags of the available ring to 1: no call comes."""
    with bench.session(packed=False) as session:
        session.driver.transmitq.ring.avail.flags = 1
        session.settle()
        session.driver.transmitq.called()
        used_quietly(session, 3)
        expect(silent(session), "a call came, though flags of the available ring is 1")


@CHECKS.row("VQ-SPLIT-D-11")
def flags_ask_for_calls(bench: Bench) -> None:
    """Without EVENT_IDX and with flags 0: a call comes after each frame, ten times; also after flags was 1."""
    with bench.session(packed=False) as session:
        ring = session.driver.transmitq.ring
        for number in range(10):
            if number == 5:
                ring.avail.flags = 1
                used_quietly(session, 2)
                session.settle()
                ring.avail.flags = 0
            session.driver.transmitq.called()
            used_quietly(session, 1)
            expect(called(session), f"no call came after frame {number}")


@CHECKS.row("VQ-SPLIT-D-12")
def flags_mean_nothing(bench: Bench) -> None:
    """With EVENT_IDX sets flags of the available ring to 1 and used_event to the next index: a call comes."""
    with bench.session(packed=False, needs=[F.EVENT_IDX]) as session:
        ring = session.driver.transmitq.ring
        for _ in range(3):
            ring.avail.flags = 1
            ring.avail.used_event = ring.next_used
            session.settle()
            session.driver.transmitq.called()
            used_quietly(session, 1)
            expect(called(session), "used_event was reached, and no call came")


@CHECKS.row("VQ-SPLIT-D-13")
def used_event_calls(bench: Bench) -> None:
    """With EVENT_IDX publishes ten frames at once, with used_event at the first, the fifth and the last of them, from
    index 0 and across 65536: a call comes each time."""
    for base in 0, 65525:
        with bench.session(packed=False, needs=[F.EVENT_IDX], base=base) as session:
            ring = session.driver.transmitq.ring
            for place in 0, 4, 9, 4:
                ring.avail.used_event = (ring.next_used + place) & 0xFFFF
                session.settle()
                session.driver.transmitq.called()
                session.note(f"ten frames from index {ring.next_used}, used_event {ring.avail.used_event}")
                used_quietly(session, 10)
                expect(called(session), f"ten chains were used, the call was due for the one with place {place} among "
                       "them, and none came")


@CHECKS.row("VQ-SPLIT-D-14")
def used_event_puts_off(bench: Bench) -> None:
    """With EVENT_IDX puts used_event 20 ahead: twice five frames bring no call."""
    with bench.session(packed=False, needs=[F.EVENT_IDX]) as session:
        ring = session.driver.transmitq.ring
        used_quietly(session, 1)
        ring.avail.used_event = (ring.next_used + 20) & 0xFFFF
        session.settle()
        session.driver.transmitq.called()
        for _ in range(2):
            used_quietly(session, 5)
            expect(silent(session), "a call came before used_event was reached")


def sampled(session: Session, look: Callable[[], int], rounds: int = 60) -> set[int]:
    """What ``look()`` answers while bursts of 30 frames go through, asked without a pause. Raises Broken."""
    found, queue = set(), session.driver.transmitq
    for _ in range(rounds):
        for _ in range(30):
            session.driver.offer(frames.plain(frames.tag()))
        found.add(look())
        queue.publish()
        queue.kick()
        deadline = time.monotonic() + session.bench.seconds
        while queue.outstanding:
            expect(time.monotonic() < deadline, "frames were not used")
            found |= {look() for _ in range(50)}
            session.driver.reclaim()
        found.add(look())
    return found


@CHECKS.row("VQ-SPLIT-D-22")
def used_flags(bench: Bench) -> None:
    """Without EVENT_IDX looks at flags of the used ring while bursts of frames go through: 0 or 1."""
    with bench.session(packed=False) as session:
        ring = session.driver.transmitq.ring
        found = sampled(session, lambda: ring.used.flags)
        expect(found <= {0, 1}, f"flags of the used ring was {sorted(found)}")


@CHECKS.row("VQ-SPLIT-D-24")
def used_flags_with_event_idx(bench: Bench) -> None:
    """With EVENT_IDX looks at flags of the used ring while bursts of frames go through: always 0."""
    with bench.session(packed=False, needs=[F.EVENT_IDX]) as session:
        ring = session.driver.transmitq.ring
        found = sampled(session, lambda: ring.used.flags)
        expect(found == {0}, f"flags of the used ring was {sorted(found)}")


def obedient(bench: Bench, packed: bool, needs: list[F]) -> None:
    """A driver that kicks only where the device asks for it is served: single frames, bursts, and pauses."""
    with bench.session(packed=packed, needs=needs) as session:
        for number in range(40):
            for _ in range(1 + number % 4):
                session.driver.offer(frames.plain(frames.tag()))
            kicked = session.driver.transmitq.submit()
            expect(polled(session), f"frames were not used; a kick was {'' if kicked else 'not '}asked for")
            if number % 10 == 0:
                time.sleep(0.005)


@CHECKS.row("VQ-SPLIT-D-23")
def kicks_by_flags(bench: Bench) -> None:
    """Without EVENT_IDX kicks only while flags of the used ring is 0: no frame is left lying."""
    obedient(bench, False, [])


@CHECKS.row("VQ-SPLIT-D-25")
def kicks_by_avail_event(bench: Bench) -> None:
    """With EVENT_IDX kicks only when available.idx passes avail_event: no frame is left lying."""
    obedient(bench, False, [F.EVENT_IDX])


def spurious(bench: Bench, packed: bool) -> None:
    """The same for both formats."""
    with bench.session(packed=packed) as session:
        for _ in range(50):
            session.driver.transmitq.kick()
            session.driver.receiveq.kick()
        session.settle()
        expect(session.driver.transmitq.ring.pending() == 0, "something was used on an empty ring")
        session.transmit(frames.plain(frames.tag()))
        for _ in range(20):
            session.driver.transmitq.kick()
        session.transmit(frames.plain(frames.tag()))


@CHECKS.row("VQ-SPLIT-D-26")
def spurious_kicks(bench: Bench) -> None:
    """Kicks both rings 50 times with nothing new in them; frames go through before and after."""
    spurious(bench, packed=False)


def late_kick(bench: Bench, packed: bool) -> None:
    """The same for both formats."""
    with bench.session(packed=packed) as session:
        for count in 1, 5, 30:
            for _ in range(count):
                session.driver.offer(frames.plain(frames.tag()))
                session.driver.transmitq.publish()
            time.sleep(0.002)
            session.driver.transmitq.kick()
            expect(polled(session), f"{count} chains and one kick: not all were used")


@CHECKS.row("VQ-SPLIT-D-27")
def one_kick_for_all(bench: Bench) -> None:
    """Publishes 1, 5 and 30 frames one by one and kicks once: all are used."""
    late_kick(bench, packed=False)


