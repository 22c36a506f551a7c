"""Packed virtqueues: descriptors, wrap counters, order. Section 2.8."""

import time

from ring.driver import Buffer
from ring.driver_packed import DESC_F_AVAIL, DESC_F_USED, PackedDescriptors
from ring.driver_parts import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, DESCRIPTOR_BYTES
from vdev.conformance import frames
from vdev.conformance.bench import NO_OFFLOAD, Bench, Session
from vdev.conformance.checks.bases import traffic_from
from vdev.conformance.checks.split import (
    HEADER,
    any_framing,
    batches_in_order,
    chunks,
    left_whole,
    lengths_in_order,
    linked,
    longest_chain,
    readable_stays,
    received_lengths,
)
from vdev.conformance.verdict import Checks, expect
from vdev.net.features import Feature as F

CHECKS = Checks()
BOTH = DESC_F_AVAIL | DESC_F_USED


def slots(session: Session) -> list[int]:
    """The flags of all descriptors of the transmitq."""
    ring = session.driver.transmitq.ring
    return [ring.desc[slot].flags for slot in range(ring.size)]


def used_at(session: Session, slot: int, wrap: int) -> None:
    """Wait until the descriptor in ``slot`` is used in the lap of ``wrap``. Raises Broken."""
    ring, deadline = session.driver.transmitq.ring, time.monotonic() + session.bench.seconds
    due = BOTH if wrap else 0
    while ring.desc[slot].flags & BOTH != due:
        expect(time.monotonic() < deadline, f"slot {slot} has flags {ring.desc[slot].flags:#06x}, it was not used with "
               f"wrap counter {wrap}")
        time.sleep(0.0005)


@CHECKS.row("VQ-PACKED-D-01")
def descriptors_in_ring_order(bench: Bench) -> None:
    """Sends bursts of 20 frames: they leave in the order of the ring."""
    bench.needs_wire()
    with bench.session(packed=True) as session:
        linked(session)
        for _ in range(3):
            marks = [frames.tag() for _ in range(20)]
            for mark in marks:
                session.driver.offer(frames.plain(mark))
            session.driver.transmitq.submit()
            for mark in marks:
                expect(session.leaves(mark) is not None, "frames did not leave in the order in which they were offered")
            expect(session.reclaimed(), "frames were not used")


@CHECKS.row("VQ-PACKED-D-02")
def used_descriptors_in_order(bench: Bench) -> None:
    """Lets bursts of 20 frames come: the driver finds them in the order in which they were sent, one used descriptor
    after the other."""
    bench.needs_wire()
    with bench.session(packed=True) as session:
        linked(session)
        for _ in range(3):
            marks = [frames.tag() for _ in range(20)]
            session.inject_burst([frames.plain(mark) for mark in marks])
            for mark in marks:
                received = session.driver.receive_within(bench.seconds)
                expect(received is not None and mark in received.frame,
                       "used descriptors are not in the order in which frames came")


@CHECKS.row("VQ-PACKED-D-04")
def readable_memory_stays(bench: Bench) -> None:
    """Compares the bytes of transmitted buffers before and after."""
    bench.needs(F.RING_PACKED)
    readable_stays(bench, packed=True)


@CHECKS.row("VQ-PACKED-D-06")
def zeroed_ring(bench: Bench) -> None:
    """Kicks with a fresh ring, which is all zero: nothing is used. Then the rest of a chain is written in front of its
    first descriptor, and nothing is used before that is available."""
    with bench.session(packed=True) as session:
        session.driver.transmitq.kick()
        session.settle()
        expect(not any(slots(session)), "a descriptor of a fresh ring was used")
        ring = session.driver.transmitq.ring
        mark = frames.tag()
        session.driver.offer(frames.plain(mark), cuts=[12, 30])
        held = slots(session)
        session.driver.transmitq.kick()
        session.settle()
        expect(slots(session) == held, "a chain was used before its first descriptor was made available")
        expect(ring.desc[0].flags == 0, "the first descriptor was changed before it was made available")
        session.driver.transmitq.submit()
        expect(session.reclaimed(), "the chain was not used")


@CHECKS.row("VQ-PACKED-D-07")
def used_descriptors_stay(bench: Bench) -> None:
    """Sends ten frames, and copies the ring once they are used: it does not change any more, by further frames neither,
    which go to other slots."""
    with bench.session(packed=True) as session:
        traffic_from(session, 10)
        ring = session.driver.transmitq.ring
        before = session.memory.read(ring.areas.descriptor.gpa, 10 * DESCRIPTOR_BYTES)
        session.driver.transmitq.kick()
        session.settle()
        expect(session.memory.read(ring.areas.descriptor.gpa, 10 * DESCRIPTOR_BYTES) == before,
               "a used descriptor was changed")
        traffic_from(session, 10)
        session.settle()
        expect(session.memory.read(ring.areas.descriptor.gpa, 10 * DESCRIPTOR_BYTES) == before,
               "a used descriptor was changed when others were used")


@CHECKS.row("VQ-PACKED-D-08")
def wrap_counter(bench: Bench) -> None:
    """Sends frames in chains of three on rings of 7 and 8, so that some go over the end: used descriptors have the wrap
    counter of their lap."""
    for size in 7, 8:
        with bench.session(packed=True, size=size) as session:
            for number in range(20):
                position = 3 * number
                session.driver.transmit(frames.plain(frames.tag()), cuts=[12, 30])
                used_at(session, position % size, 1 - position // size % 2)
                expect(session.driver.reclaim() == 1, "a used descriptor is not that of the chain sent")


@CHECKS.row("VQ-PACKED-D-09")
def both_flags(bench: Bench) -> None:
    """Sends 40 frames on a ring of 16 one by one: of each used descriptor AVAIL and USED are equal, and equal to the
    wrap counter."""
    with bench.session(packed=True, size=16) as session:
        for number in range(40):
            session.driver.transmit(frames.plain(frames.tag()))
            used_at(session, number % 16, 1 - number // 16 % 2)
            session.driver.reclaim()


@CHECKS.row("VQ-PACKED-D-10")
def one_used_descriptor_a_chain(bench: Bench) -> None:
    """Sends chains of 3, 1 and 4 descriptors at once: their used descriptors are in slots 0, 3 and 4, and slots between
    them stay as they were."""
    with bench.session(packed=True) as session:
        ring = session.driver.transmitq.ring
        for cuts in [12, 30], [], [12, 20, 30]:
            session.driver.offer(frames.plain(frames.tag()), cuts=cuts)
        session.driver.transmitq.publish()
        before = slots(session)
        session.driver.transmitq.kick()
        for slot in 0, 3, 4:
            used_at(session, slot, 1)
        session.settle()
        for slot in 1, 2, 5, 6, 7:
            expect(ring.desc[slot].flags == before[slot], f"slot {slot}, inside a chain, was written")


@CHECKS.row("VQ-PACKED-D-11")
def id_of_the_last_descriptor(bench: Bench) -> None:
    """Sends a chain whose descriptors have ids 40, 41 and 7: the used descriptor has 7."""
    with bench.session(packed=True) as session:
        ring = session.driver.transmitq.ring
        pieces = chunks(session, HEADER + frames.plain(frames.tag()), [12, 30])
        ring.offer([(piece.gpa, piece.len, DESC_F_NEXT * (i < 2)) for i, piece in enumerate(pieces)], 7)
        ring.desc[0].id, ring.desc[1].id = 40, 41
        session.driver.transmitq.submit()
        used_at(session, 0, 1)
        expect(ring.desc[0].id == 7, f"the used descriptor has id {ring.desc[0].id}")


@CHECKS.row("VQ-PACKED-D-12")
def used_descriptors_go_to_the_next_slot(bench: Bench) -> None:
    """Sends chains of 1 to 4 descriptors on a ring of 16, in bursts: each used descriptor is where the one before
    ended."""
    for needs in ([], [F.IN_ORDER]) if bench.offers(F.IN_ORDER) else ([],):
        with bench.session(packed=True, size=16, needs=needs) as session:
            for number in range(30):
                for count in 1, 1 + number % 3:
                    session.driver.offer(frames.plain(frames.tag()), cuts=[12, 24, 36][:count])
                session.driver.transmitq.submit()
                expect(session.reclaimed(), "used descriptors are not where the driver has to look for them")


@CHECKS.row("VQ-PACKED-D-13")
def write_flag(bench: Bench) -> None:
    """Looks at WRITE of used descriptors: clear for a transmitted frame, set for a received one."""
    with bench.session(packed=True) as session:
        ring = session.driver.transmitq.ring
        for number in range(5):
            session.driver.transmit(frames.plain(frames.tag()))
            used_at(session, number, 1)
            expect(not ring.desc[number].flags & DESC_F_WRITE, "WRITE is set for a chain that has no room to write")
            session.driver.reclaim()
        if bench.wire is not None:
            linked(session)
            ring = session.driver.receiveq.ring
            slot = ring.next_used % ring.size
            bench.wire.inject(session, frames.plain(frames.tag()), NO_OFFLOAD)
            session.driver.receiveq.wait(bench.seconds)
            expect(ring.desc[slot].flags & DESC_F_WRITE, "WRITE is clear for a buffer that a frame was written to")


@CHECKS.row("VQ-PACKED-D-14")
def used_length(bench: Bench) -> None:
    """Lets frames of several lengths come: the used length is that of header and frame."""
    bench.needs_wire()
    with bench.session(packed=True) as session:
        received_lengths(session)


@CHECKS.row("VQ-PACKED-D-15")
def chains_in_order(bench: Bench) -> None:
    """Sends frames cut into many descriptors, and receives into such buffers: bytes stay in their order."""
    bench.needs(F.RING_PACKED)
    any_framing(bench, packed=True)


@CHECKS.row("VQ-PACKED-D-16")
def chain_as_long_as_the_queue(bench: Bench) -> None:
    """Sends a frame in as many descriptors as the queue has: it is used, or refused in an orderly way, and the next
    session works."""
    bench.needs(F.RING_PACKED)
    longest_chain(bench, packed=True)


def offer_table(session: Session, pieces: list[Buffer], entry_flags: int, flags: int) -> None:
    """Offer one chain: an indirect table of ``pieces`` with these flags and ids that mean nothing."""
    gpa = session.memory.alloc(DESCRIPTOR_BYTES * len(pieces))
    for number, piece in enumerate(pieces):
        PackedDescriptors(session.memory, gpa)[number].set(piece.gpa, piece.len, entry_flags, 0xBEEF)
    session.driver.transmitq.ring.offer([(gpa, DESCRIPTOR_BYTES * len(pieces), DESC_F_INDIRECT | flags)], 5)
    session.driver.transmitq.submit()


def table_is_sent(bench: Bench, entry_flags: int, flags: int) -> None:
    """A frame in an indirect table leaves whole. Raises Broken."""
    with bench.session(packed=True, needs=[F.INDIRECT_DESC]) as session:
        linked(session)
        slot = session.driver.transmitq.ring.next_avail
        mark = frames.tag()
        frame = frames.plain(mark, 100)
        offer_table(session, chunks(session, HEADER + frame, [12, 40]), entry_flags, flags)
        used_at(session, slot % 64, 1)
        left_whole(session, mark, frame)


@CHECKS.row("VQ-PACKED-D-17")
def flags_in_a_table(bench: Bench) -> None:
    """Sends a frame by an indirect table of three entries with ids that mean nothing: once with no flags, once with
    NEXT, AVAIL and USED in all of them."""
    table_is_sent(bench, 0, 0)
    table_is_sent(bench, DESC_F_NEXT | BOTH, 0)


@CHECKS.row("VQ-PACKED-D-18")
def write_beside_indirect(bench: Bench) -> None:
    """Sets WRITE on the descriptor that names an indirect table; the frame in the table is sent."""
    table_is_sent(bench, 0, DESC_F_WRITE)


@CHECKS.row("VQ-PACKED-D-19")
def any_size(bench: Bench) -> None:
    """Frames go through rings of 1, 3, 5, 100 and 1000 descriptors, several times round the shorter ones."""
    for size in 1, 3, 5, 100, 1000:
        with bench.session(packed=True, size=size) as session:
            traffic_from(session, 30)


@CHECKS.row("VQ-PACKED-D-20")
def batches(bench: Bench) -> None:
    """With IN_ORDER sends 30 frames at once, eight times; whether they are used one by one or in batches, all are, in
    order, and the next used descriptor lies behind all slots of a batch."""
    bench.needs(F.RING_PACKED)
    batches_in_order(bench, packed=True)


@CHECKS.row("VQ-PACKED-D-21")
def received_lengths_in_order(bench: Bench) -> None:
    """With IN_ORDER lets 20 short frames come in a burst: the length of each is known."""
    bench.needs(F.RING_PACKED)
    lengths_in_order(bench, packed=True)


@CHECKS.row("VQ-PACKED-D-22")
def first_buffer_last(bench: Bench) -> None:
    """Lets frames of 4000 bytes come to buffers of 1536 bytes, and watches the first of them without a pause: the
    moment it is used, the two behind it are."""
    bench.needs_wire()
    with bench.session(packed=True, needs=[F.MRG_RXBUF]) as session:
        linked(session)
        ring = session.driver.receiveq.ring
        for _ in range(15):
            mark = frames.tag()
            places = [(ring.next_used + i) % (2 * ring.size) for i in range(3)]
            due = [BOTH if ring.wrap(place) else 0 for place in places]
            bench.wire.inject(session, frames.plain(mark, 4000), NO_OFFLOAD)
            deadline = time.monotonic() + bench.seconds
            while ring.desc[places[0] % ring.size].flags & BOTH != due[0]:
                expect(time.monotonic() < deadline, "the frame did not reach the guest")
            for place, flags in zip(places[1:], due[1:], strict=True):
                expect(ring.desc[place % ring.size].flags & BOTH == flags,
                       "the first buffer of a frame was used before a later one")
            received = session.driver.receive()
            expect(received is not None and received.frame == frames.plain(mark, 4000), "the frame came broken")


