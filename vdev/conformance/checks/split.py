"""Split virtqueues: descriptors, used elements, order. Section 2.7."""

import time

from ring.driver import Buffer
from ring.driver_parts import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, DESCRIPTOR_BYTES
from ring.driver_split import DescriptorTable
from vdev.conformance import frames
from vdev.conformance.bench import NO_OFFLOAD, Bench, Session, Stage
from vdev.conformance.verdict import Checks, expect
from vdev.net.features import Feature as F

CHECKS = Checks()
HEADER = NO_OFFLOAD.pack()
POISON = 0xA5


def left_whole(session: Session, mark: bytes, frame: bytes) -> None:
    """``frame``, transmitted before, leaves the back-end as it was; without a wire nothing is known. Raises Broken."""
    if session.bench.wire is None:
        return
    left = session.leaves(mark)
    expect(left is not None, "the frame was used, and did not leave the back-end")
    expect(left[1] == frame, f"{len(frame)} bytes were sent, and {len(left[1])} left, or others")


def linked(session: Session) -> None:
    """Frames get through, where there is a wire. Raises Broken."""
    if session.bench.wire is not None:
        mark = frames.tag()
        session.receives(frames.plain(mark), mark=mark)


def chunks(session: Session, data: bytes, sizes: list[int]) -> list[Buffer]:
    """``data`` in guest memory in pieces of these ``sizes``, what is left in one more."""
    buffers, at = [], 0
    for size in [*sizes, len(data) - sum(sizes)]:
        if size > 0:
            gpa = session.memory.alloc(size)
            session.memory.write(gpa, data[at:at + size])
            buffers.append(Buffer(gpa, size))
            at += size
    return buffers


def sends_chain(session: Session, mark: bytes, frame: bytes, sizes: list[int], direct: int | None = None) -> None:
    """``frame`` behind its header in pieces of ``sizes``, see DriverQueue.add for ``direct``, is sent whole."""
    session.note(f"a frame in pieces of {sizes} bytes and the rest, {'all' if direct is None else direct} direct")
    session.driver.transmitq.add(chunks(session, HEADER + frame, sizes), direct=direct)
    session.driver.transmitq.submit()
    expect(session.reclaimed(), f"a chain in pieces of {sizes} bytes was not used")
    left_whole(session, mark, frame)


def any_framing(bench: Bench, packed: bool) -> None:
    """The same for both formats."""
    with bench.session(packed=packed) as session:
        linked(session)
        for sizes in ([1] * 12, [12], [5, 3, 20], [1] * 40, [11, 2], [30]):
            mark = frames.tag()
            sends_chain(session, mark, frames.plain(mark, 90), sizes)
    if bench.wire is not None:
        for sizes in [1] * 12 + [100], [5, 3, 200], [30, 1, 1, 400]:
            received_into(bench, packed, sizes)


def received_into(bench: Bench, packed: bool, sizes: list[int]) -> None:
    """A frame comes whole in buffers made of pieces of ``sizes`` bytes. Raises Broken."""
    with bench.session(Stage.STARTED, packed=packed) as session:
        for index in range(len(session.queues)):
            session.enable(index)
        for _ in range(4):
            session.driver.receiveq.post(writable=sizes)
        session.driver.receiveq.submit()
        for _ in range(50):  # the first may come before all is ready
            mark = frames.tag()
            bench.wire.inject(session, frames.plain(mark, 90), NO_OFFLOAD)
            received = session.driver.receive_within(0.1, refill=False)
            if received is not None:
                break
        expect(received is not None, f"no frame came in a buffer of pieces of {sizes} bytes")
        expect(received.frame == frames.plain(received.frame[14:14 + frames.TAG_BYTES], 90),
               f"a frame came with other bytes in a buffer of pieces of {sizes} bytes")


@CHECKS.row("VQ-SPLIT-D-01")
def framing(bench: Bench) -> None:
    """Sends frames whose header is cut into single bytes, or goes on into the frame; receives into such buffers."""
    any_framing(bench, packed=False)


def longest_chain(bench: Bench, packed: bool) -> None:
    """The same for both formats."""
    with bench.session(packed=packed, size=32) as session:
        session.driver.transmitq.add(chunks(session, HEADER + frames.plain(frames.tag(), 200), [5] * 31))
        session.driver.transmitq.submit()
        session.note(f"a chain of 32 descriptors was {'' if session.reclaimed(seconds=0.5) else 'not '}used")
        session.barrier()
    with bench.session(packed=packed, size=32) as session:
        session.transmit(frames.plain(frames.tag()))


@CHECKS.row("VQ-SPLIT-D-02")
def chain_as_long_as_the_queue(bench: Bench) -> None:
    """Sends a frame in as many descriptors as the queue has: it is used, or refused in an orderly way, and the next
    session works."""
    longest_chain(bench, packed=False)


def readable_stays(bench: Bench, packed: bool) -> None:
    """The same for both formats."""
    with bench.session(packed=packed) as session:
        for length in 60, 1000, 1514:
            data = HEADER + frames.plain(frames.tag(), length)
            buffers = chunks(session, data, [12, 30])
            session.driver.transmitq.add(buffers)
            session.driver.transmitq.submit()
            expect(session.reclaimed(), "the chain was not used")
            session.settle()
            now = b"".join(session.memory.read(buffer.gpa, buffer.len) for buffer in buffers)
            expect(now == data, "bytes of a buffer that the device may only read have changed")


@CHECKS.row("VQ-SPLIT-D-03")
def readable_memory_stays(bench: Bench) -> None:
    """Compares the bytes of transmitted buffers before and after."""
    readable_stays(bench, packed=False)


@CHECKS.row("VQ-SPLIT-D-05")
def descriptors_stay(bench: Bench) -> None:
    """Compares descriptor table and an indirect table before and after use."""
    needs = [F.INDIRECT_DESC] if bench.offers(F.INDIRECT_DESC) else []
    with bench.session(packed=False, needs=needs) as session:
        desc, _, _ = session.driver.transmitq.ring.areas
        for direct in (None, 0) if needs else (None,):
            session.driver.transmitq.add(chunks(session, HEADER + frames.plain(frames.tag()), [12, 20]), direct=direct)
            before = session.memory.read(desc.gpa, desc.len)
            head = session.driver.transmitq.ring.desc[session.driver.transmitq.ring.avail.ring[
                session.driver.transmitq.ring.next_avail - 1]]
            place = (head.addr, head.len) if direct == 0 else (desc.gpa, 0)
            table = session.memory.read(*place)
            session.driver.transmitq.submit()
            expect(session.reclaimed(), "the chain was not used")
            session.settle()
            expect(session.memory.read(desc.gpa, desc.len) == before, "the descriptor table has changed")
            expect(session.memory.read(*place) == table, "an indirect table has changed")


def offer_table(session: Session, entries: list[tuple[int, int, int, int]], *, length: int | None = None,
                flags: int = 0) -> None:
    """Offer one chain: an indirect table of ``entries`` (addr, len, flags, next); ``length``: what the descriptor says
    of it in bytes."""
    gpa = session.memory.alloc(DESCRIPTOR_BYTES * len(entries))
    for number, entry in enumerate(entries):
        DescriptorTable(session.memory, gpa)[number].set(*entry)
    ring, queue = session.driver.transmitq.ring, session.driver.transmitq
    queue.add([Buffer(gpa, DESCRIPTOR_BYTES * len(entries) if length is None else length)])
    head = ring.avail.ring[ring.next_avail - 1]
    ring.desc[head].flags = DESC_F_INDIRECT | flags
    queue.submit()


@CHECKS.row("VQ-SPLIT-D-06")
def write_beside_indirect(bench: Bench) -> None:
    """Sets WRITE on the descriptor that names an indirect table; the frame in the table is sent."""
    with bench.session(packed=False, needs=[F.INDIRECT_DESC]) as session:
        linked(session)
        mark = frames.tag()
        frame = frames.plain(mark, 100)
        (buffer,) = chunks(session, HEADER + frame, [])
        offer_table(session, [(buffer.gpa, buffer.len, 0, 0)], flags=DESC_F_WRITE)
        expect(session.reclaimed(), "the chain was not used")
        left_whole(session, mark, frame)


@CHECKS.row("VQ-SPLIT-D-07")
def direct_and_indirect(bench: Bench) -> None:
    """Sends frames with 0, 1 and 3 direct descriptors in front of an indirect table."""
    with bench.session(packed=False, needs=[F.INDIRECT_DESC]) as session:
        linked(session)
        for direct in 0, 1, 3:
            mark = frames.tag()
            sends_chain(session, mark, frames.plain(mark, 100), [12, 20, 20, 20], direct=direct)


@CHECKS.row("VQ-SPLIT-D-08")
def tables_follow_next(bench: Bench) -> None:
    """Sends a frame by an indirect table whose entries are linked 0, 3, 1; entry 2, which nothing names, would spoil
    it."""
    with bench.session(packed=False, needs=[F.INDIRECT_DESC]) as session:
        linked(session)
        mark = frames.tag()
        frame = frames.plain(mark, 100)
        first, second, third = chunks(session, HEADER + frame, [12, 40])
        offer_table(session, [(first.gpa, first.len, DESC_F_NEXT, 3), (third.gpa, third.len, 0, 0),
                              (third.gpa, third.len, DESC_F_NEXT, 2), (second.gpa, second.len, DESC_F_NEXT, 1)])
        expect(session.reclaimed(), "the chain was not used")
        left_whole(session, mark, frame)
        # The third entry names one beyond the table; whatever becomes of it, it is no frame.
        mark = frames.tag()
        first, second = chunks(session, HEADER + frames.plain(mark, 100), [12])
        offer_table(session, [(first.gpa, first.len, DESC_F_NEXT, 1), (second.gpa, second.len, DESC_F_NEXT, 7)])
        session.settle()
        if bench.wire is not None:
            expect(session.leaves(mark, bench.quiet) is None, "a chain that leaves its indirect table was sent")


@CHECKS.row("VQ-SPLIT-D-15")
def used_elements(bench: Bench) -> None:
    """Sends frames in chains of several descriptors: the used element names the head, with length 0. Of frames
    received the length is that of header and frame."""
    with bench.session(packed=False) as session:
        ring = session.driver.transmitq.ring
        for number in range(10):
            head = session.driver.offer(frames.plain(frames.tag()), cuts=[12, 20])
            session.driver.transmitq.publish()
            session.driver.transmitq.kick()
            until_used(session, number + 1)
            element = ring.used.ring[number]
            expect(element.id == head, f"the used element names {element.id}, the chain's head was {head}")
            session.driver.reclaim()
        if bench.wire is not None:
            received_lengths(session)


def received_lengths(session: Session) -> None:
    """Used lengths of frames from the network are those of header and frame. Raises Broken."""
    linked(session)
    for length in 60, 61, 200, 1000, 1514:
        mark = frames.tag()
        done = one_used(session, frames.plain(mark, length))
        expect(done.written == 12 + length, f"a frame of {length} bytes has the used length {done.written}, not "
               f"{12 + length}")


def one_used(session: Session, frame: bytes):
    """Let ``frame`` come to a session that is linked -> its Completion. Raises Broken."""
    mark = frame[14:14 + frames.TAG_BYTES]
    session.bench.wire.inject(session, frame, NO_OFFLOAD)
    deadline = time.monotonic() + session.bench.seconds
    while time.monotonic() < deadline:
        if session.driver.receiveq.wait(session.bench.seconds):
            done = session.driver.receiveq.collect()
            session.driver.fill(1)
            if done is not None and mark in done.data:
                return done
    expect(False, "the frame did not reach the guest")


def until_used(session: Session, index: int) -> None:
    """Wait until used.idx of the transmitq is ``index``. Raises Broken."""
    ring, deadline = session.driver.transmitq.ring, time.monotonic() + session.bench.seconds
    while ring.used.idx != index & 0xFFFF:
        expect(time.monotonic() < deadline, f"used.idx is {ring.used.idx}, not {index & 0xFFFF}")
        time.sleep(0.0005)


@CHECKS.row("VQ-SPLIT-D-16")
def used_index(bench: Bench) -> None:
    """Counts used.idx from 0, and from 65500 over its end, on queues of 16: it counts on modulo 65536, and its slots
    modulo 16."""
    for base in 0, 65500:
        with bench.session(packed=False, size=16, base=base) as session:
            for number in range(1, 61):
                session.driver.transmit(frames.plain(frames.tag()))
                until_used(session, base + number)
                expect(session.driver.reclaim() == 1, f"used element {base + number - 1} is not that of the frame sent")


def hammered(bench: Bench, look) -> None:
    """30 frames come; the moment used.idx shows each, ``look(session, element, frame)`` is called."""
    bench.needs_wire()
    with bench.session(packed=False) as session:
        linked(session)
        queue = session.driver.receiveq
        ring = queue.ring
        for number in range(30):
            while queue.collect() is not None:
                session.driver.fill(1)
            for slot in range(ring.size):
                ring.used.ring[slot].len = 0xFFFF_FFFF
            for chain in queue._outstanding.values():
                session.memory.write(chain.buffers[0].gpa, bytes([POISON]) * chain.buffers[0].len)
            before = ring.used.idx
            frame = frames.plain(frames.tag(), 100 + 40 * number)
            session.bench.wire.inject(session, frame, NO_OFFLOAD)
            deadline = time.monotonic() + bench.seconds
            while ring.used.idx == before:
                expect(time.monotonic() < deadline, "the frame did not reach the guest")
            look(session, ring.used.ring[before], frame)


@CHECKS.row("VQ-SPLIT-D-17")
def length_before_index(bench: Bench) -> None:
    """Watches used.idx without a pause while 30 frames come: the moment it moves, id and length of the element are
    there."""
    def look(session, element, frame) -> None:
        length = element.len
        expect(length != 0xFFFF_FFFF, "used.idx showed an element whose length was not stored yet")
    hammered(bench, look)


@CHECKS.row("VQ-SPLIT-D-18", "VQ-SPLIT-D-19")
def bytes_before_index(bench: Bench) -> None:
    """Poisons receive buffers and watches used.idx without a pause while 30 frames come: the moment it moves, as many
    bytes as the length says are there, header and frame."""
    def look(session, element, frame) -> None:
        chain = session.driver.receiveq._outstanding[element.id]
        length = element.len
        data = session.memory.read(chain.buffers[0].gpa, min(length, chain.buffers[0].len))
        if frame[14:14 + frames.TAG_BYTES] in data:
            expect(data[12:] == frame, f"the used length is {length}, and the buffer has not that many bytes of "
                   "header and frame")
        else:
            expect(bytes([POISON]) * 8 not in data, f"of {length} bytes some had not been written")
    hammered(bench, look)


def batches_in_order(bench: Bench, packed: bool) -> None:
    """The same for both formats."""
    with bench.session(needs=[F.IN_ORDER], packed=packed, size=64) as session:
        for _ in range(8):
            heads = [session.driver.offer(frames.plain(frames.tag()), cuts=[12] * (i % 3 == 0)) for i in range(30)]
            session.driver.transmitq.submit()
            used: list[int] = []
            while len(used) < len(heads):
                expect(session.driver.transmitq.wait(bench.seconds), f"{len(used)} of 30 chains were used")
                used += [done.head for done in session.driver.transmitq.collect_all()]
            expect(used == heads, "chains were not used in the order in which they were offered")


@CHECKS.row("VQ-SPLIT-D-20")
def batches(bench: Bench) -> None:
    """With IN_ORDER sends 30 frames at once, eight times; whether they are used one by one or in batches, all are, in
    order, and used.idx covers them."""
    batches_in_order(bench, packed=False)


def lengths_in_order(bench: Bench, packed: bool) -> None:
    """The same for both formats."""
    bench.needs_wire()
    with bench.session(needs=[F.IN_ORDER], packed=packed, size=64) as session:
        linked(session)
        sent = {frames.tag(): 60 + 13 * number for number in range(20)}
        session.inject_burst([frames.plain(mark, length) for mark, length in sent.items()])
        for mark, length in sent.items():
            received = session.arrives(mark)
            expect(received is not None, "a frame was lost")
            expect(len(received.frame) == length, f"a frame of {length} bytes is told to have {len(received.frame)}, "
                   "as if its buffer was skipped in a batch")


@CHECKS.row("VQ-SPLIT-D-21")
def received_lengths_in_order(bench: Bench) -> None:
    """With IN_ORDER lets 20 short frames come in a burst: the length of each is known."""
    lengths_in_order(bench, packed=False)
