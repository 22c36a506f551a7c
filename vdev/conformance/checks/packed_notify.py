"""Packed virtqueues: who is notified when. Section 2.8.10."""

from ring.driver_packed import EVENT_DESC, EVENT_DISABLE, EVENT_ENABLE
from vdev.conformance import frames
from vdev.conformance.bench import Bench, Session
from vdev.conformance.checks.bases import polled
from vdev.conformance.checks.split_notify import called, late_kick, obedient, sampled, silent
from vdev.conformance.verdict import Checks, expect
from vdev.net.features import Feature as F

CHECKS = Checks()


def used_quietly(session: Session, count: int, cuts: tuple[int, ...] = ()) -> None:
    """``count`` frames published at once and used, without the driver asking for a call. Raises Broken."""
    for _ in range(count):
        session.driver.offer(frames.plain(frames.tag()), cuts=cuts)
    session.driver.transmitq.publish()
    session.driver.transmitq.kick()
    expect(polled(session), "frames were not used")


@CHECKS.row("VQ-PACKED-D-23")
def driver_event_stays(bench: Bench) -> None:
    """Sends frames, with and without EVENT_IDX: the driver's event suppression structure stays as it was written."""
    for needs in ([], [F.EVENT_IDX]) if bench.offers(F.EVENT_IDX) else ([],):
        with bench.session(packed=True, needs=needs) as session:
            event = session.driver.transmitq.ring.driver_event
            for off_wrap, flags in (0x8005, EVENT_ENABLE), (3, EVENT_DISABLE):
                event.set(off_wrap, flags)
                used_quietly(session, 20)
                session.settle()
                expect((event.off_wrap, event.flags) == (off_wrap, flags), "the driver's event suppression structure "
                       f"was {off_wrap:#x} {flags:#x}, and is {event.off_wrap:#x} {event.flags:#x}")


@CHECKS.row("VQ-PACKED-D-24")
def device_event(bench: Bench) -> None:
    """Looks at flags of the device's event suppression structure while frames go through: 0 or 1, with EVENT_IDX also
    2, and no other bit."""
    for needs in ([], [F.EVENT_IDX]) if bench.offers(F.EVENT_IDX) else ([],):
        with bench.session(packed=True, needs=needs) as session:
            event = session.driver.transmitq.ring.device_event
            found = sampled(session, lambda event=event: event.flags)
            allowed = {0, 1, 2} if needs else {0, 1}
            expect(found <= allowed, f"flags was {sorted(found)}{' without EVENT_IDX' if not needs else ''}")


@CHECKS.row("VQ-PACKED-D-25")
def enabled_and_disabled(bench: Bench) -> None:
    """Says DISABLE and ENABLE in turn: a call comes with ENABLE only."""
    with bench.session(packed=True) as session:
        event = session.driver.transmitq.ring.driver_event
        for flags in EVENT_DISABLE, EVENT_ENABLE, EVENT_DISABLE, EVENT_ENABLE:
            event.flags = flags
            session.settle()
            session.driver.transmitq.called()
            used_quietly(session, 3)
            if flags == EVENT_DISABLE:
                expect(silent(session), "a call came, though the driver's flags say DISABLE")
            else:
                expect(called(session), "no call came, though the driver's flags say ENABLE")


@CHECKS.row("VQ-PACKED-D-26")
def event_offset(bench: Bench) -> None:
    """With EVENT_IDX says DESC, with the first, the third and the last of five descriptors, in the middle of the ring
    and over its end: a call comes each time. Nine slots ahead, and one lap, none does."""
    with bench.session(packed=True, needs=[F.EVENT_IDX], size=16) as session:
        ring = session.driver.transmitq.ring
        for place in (0, 2, 4, 2, 4, 0, 3) * 2:
            at = (ring.next_used + place) % (2 * ring.size)
            ring.driver_event.set(ring.off_wrap(at), EVENT_DESC)
            session.settle()
            session.driver.transmitq.called()
            session.note(f"five frames from slot {ring.next_used % ring.size}, the event is {ring.off_wrap(at):#06x}")
            used_quietly(session, 5)
            expect(called(session), f"five descriptors were used, number {place} of them was the one named, and no "
                   "call came")
        for ahead in (9, ring.size + 2) * 3:
            at = (ring.next_used + ahead) % (2 * ring.size)
            ring.driver_event.set(ring.off_wrap(at), EVENT_DESC)
            session.settle()
            session.driver.transmitq.called()
            used_quietly(session, 5)
            expect(silent(session), "a call came before the descriptor that was named")


@CHECKS.row("VQ-PACKED-D-27")
def kicks_when_asked(bench: Bench) -> None:
    """Kicks once for many chains, and then only where the device's event suppression structure asks for it: no frame is
    left lying."""
    bench.needs(F.RING_PACKED)
    late_kick(bench, packed=True)
    obedient(bench, True, [])
    if bench.offers(F.EVENT_IDX):
        obedient(bench, True, [F.EVENT_IDX])
