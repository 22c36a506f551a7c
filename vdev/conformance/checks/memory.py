"""Guest memory: regions, addresses of either kind, memory that comes and goes."""

import os
import select
from dataclasses import replace

from ring.driver import Buffer, Extent, GuestMemory
from vdev.conformance import frames
from vdev.conformance.bench import NO_OFFLOAD, Bench, Session, Stage, refused
from vdev.conformance.verdict import Checks, expect
from vdev.testing.scripted import shared_regions
from vhost_user.frontend import SharedRegion
from vhost_user.spec import ProtocolFeature, Request
from vhost_user.wire import SINGLE_REGION

CHECKS = Checks()
LOW, HIGH, SIZE = 0x4000_0000, 0x9000_0000, 4 << 20
PAGE = 4096
SLOTS = ProtocolFeature.CONFIGURE_MEM_SLOTS


def spread(session: Session, places: list[int], length: int = 300) -> bytes:
    """Transmit a frame with its header and payload in buffers at ``places`` (gpas), parts of equal length -> its mark.
    Raises Broken when it is not used."""
    mark = frames.tag()
    data = NO_OFFLOAD.pack() + frames.plain(mark, length - len(NO_OFFLOAD.pack()))
    part = len(data) // len(places)
    buffers = []
    for number, gpa in enumerate(places):
        piece = data[number * part:(number + 1) * part if number + 1 < len(places) else None]
        session.memory.write(gpa, piece)
        buffers.append(Buffer(gpa, len(piece)))
    session.note(f"a frame lies in buffers at {', '.join(f'{gpa:#x}' for gpa in places)}")
    session.driver.transmitq.add(buffers)
    session.driver.transmitq.submit()
    expect(session.reclaimed(), "a chain in this memory was not used")
    return mark


def seen(session: Session, mark: bytes, length: int = 300) -> None:
    """The frame of :func:`spread` leaves the back-end as it was. Raises Broken; without a wire nothing is known."""
    if session.bench.wire is None:
        return
    left = session.leaves(mark)
    expect(left is not None, "the frame did not leave the back-end")
    expect(left[1] == frames.plain(mark, length - 12), "the frame left with other bytes than the driver wrote")


@CHECKS.row("VU-MEM-B-01", both=True)
def several_regions(bench: Bench) -> None:
    """Shares three regions, each at another offset of a file of its own; a frame lies in all of them."""
    extents = [Extent(LOW, SIZE), Extent(HIGH, SIZE, offset=3 * PAGE), Extent(0x2_0000_0000, SIZE, offset=PAGE)]
    with bench.session(memory=GuestMemory(extents=extents)) as session:
        linked(session)
        seen(session, spread(session, [session.memory.alloc(200, region=number) for number in (1, 0, 2)]))


def linked(session: Session) -> None:
    """Frames get through, where there is a wire."""
    if session.bench.wire is not None:
        mark = frames.tag()
        session.receives(frames.plain(mark), mark=mark)


@CHECKS.row("VU-MEM-B-02", both=True)
def user_addresses(bench: Bench) -> None:
    """Shares two regions, the user addresses of one being the guest addresses of the other: rings are found by user
    address, frames by guest address."""
    extents = [Extent(LOW, SIZE, uva=HIGH), Extent(HIGH, SIZE, uva=LOW)]
    with bench.session(memory=GuestMemory(extents=extents)) as session:
        linked(session)
        seen(session, spread(session, [session.memory.alloc(200, region=0), session.memory.alloc(200, region=1)]))


@CHECKS.row("VU-MEM-B-03", both=True)
def guest_addresses(bench: Bench) -> None:
    """Shares two regions that touch in guest memory and not elsewhere; a frame lies across their border. Then one lies
    outside of all regions, after which the device still works."""
    extents = [Extent(LOW, SIZE), Extent(LOW + SIZE, SIZE, uva=0x7000_0000_0000)]
    with bench.session(memory=GuestMemory(extents=extents)) as session:
        linked(session)
        seen(session, spread(session, [LOW + SIZE - 100]))
    with bench.session() as session:
        session.driver.transmitq.add([Buffer(1 << 45, 100)])
        session.driver.transmitq.submit()
        session.settle()
    with bench.session() as session:
        session.transmit(frames.plain(frames.tag()))


@CHECKS.row("VU-MEM-B-04", both=True)
def guest_addresses_of_rings(bench: Bench) -> None:
    """With GPA_ADDRESSES gives guest addresses of rings; frames go through."""
    with bench.session(needs=[ProtocolFeature.GPA_ADDRESSES]) as session:
        session.transmit(frames.plain(frames.tag()))


def half_shared(bench: Bench) -> Session:
    """A running session that shared the first of two regions only, by ADD_MEM_REG."""
    memory = GuestMemory(extents=[Extent(LOW, SIZE), Extent(HIGH, SIZE, offset=PAGE)])
    session = bench.session(Stage.NEGOTIATED, needs=[SLOTS], memory=memory)
    session.front_end.add_mem_reg(shared_regions(memory)[0])
    session.stage = Stage.SHARED
    session.reach(Stage.RUNNING)
    return session


@CHECKS.row("VU-MEM-B-05", both=True)
def region_is_added(bench: Bench) -> None:
    """Adds a region with ADD_MEM_REG while the rings run; a frame lies in it."""
    with half_shared(bench) as session:
        linked(session)
        session.front_end.add_mem_reg(shared_regions(session.memory)[1])
        seen(session, spread(session, [session.memory.alloc(400, region=1)]))


@CHECKS.row("VU-MEM-B-06", both=True)
def region_is_removed(bench: Bench) -> None:
    """Removes a region with REM_MEM_REG, named with another mmap offset; a frame that lies in it is not sent. Then the
    region is added again, and used."""
    with half_shared(bench) as session:
        linked(session)
        shared = shared_regions(session.memory)[1]
        session.front_end.add_mem_reg(shared)
        session.front_end.rem_mem_reg(replace(shared, offset=shared.offset + PAGE))
        again = not refused(session, lambda: session.front_end.add_mem_reg(shared))
        expect(again, "a region that had been removed could not be added again")
        seen(session, spread(session, [session.memory.alloc(400, region=1)]))
    with half_shared(bench) as session:
        linked(session)
        shared = shared_regions(session.memory)[1]
        session.front_end.add_mem_reg(shared)
        session.front_end.rem_mem_reg(shared)
        mark = frames.tag()
        gpa = session.memory.alloc(400, region=1)
        session.memory.write(gpa, NO_OFFLOAD.pack() + frames.plain(mark))
        session.driver.transmitq.add([Buffer(gpa, 72)])
        session.driver.transmitq.submit()
        session.settle()
        if bench.wire is not None:
            expect(session.leaves(mark, bench.quiet) is None, "a frame in memory that had been removed was sent")


@CHECKS.row("VU-MEM-B-07", "VU-MEM-B-08")
def removal_with_a_descriptor(bench: Bench) -> None:
    """Sends REM_MEM_REG with a descriptor, the end of a pipe: it may be taken or refused, and the descriptor is
    closed."""
    with half_shared(bench) as session:
        shared = shared_regions(session.memory)[1]
        session.front_end.add_mem_reg(shared)
        read, write = os.pipe()
        try:
            payload = SINGLE_REGION.encode(shared.region)
            refused(session, lambda: session.front_end.request(Request.REM_MEM_REG, payload, [write]))
            os.close(write)
            poll = select.poll()
            poll.register(read, 0)
            hung_up = poll.poll(bench.seconds * 1000)
            expect(bool(hung_up), "the descriptor that came with REM_MEM_REG is still open")
        finally:
            os.close(read)


@CHECKS.row("VU-MEM-B-09")
def memory_slots(bench: Bench) -> None:
    """Asks GET_MAX_MEM_SLOTS, and adds as many regions of a page (no more than 512); each is taken."""
    with bench.session(Stage.NEGOTIATED, needs=[SLOTS]) as session:
        slots = session.front_end.get_max_mem_slots()
        expect(slots >= 1, f"GET_MAX_MEM_SLOTS says {slots}")
        region = session.memory.regions[0]
        for number in range(min(slots, 512)):
            start = number * PAGE
            session.front_end.add_mem_reg(
                SharedRegion(region.fd, LOW + 2 * start, region.uva + 2 * start, PAGE, start % region.size),
                need_reply=False)  # which takes less time; a refusal then ends the connection
            if number % 16 == 15:
                session.barrier()
        session.barrier()
