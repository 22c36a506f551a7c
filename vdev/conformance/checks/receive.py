"""What a driver receives: buffers, lengths, num_buffers, and the header of plain frames."""

from vdev.conformance import frames
from vdev.conformance.bench import NO_OFFLOAD, Bench
from vdev.conformance.checks.transmit import GUEST
from vdev.conformance.verdict import Checks, expect
from vdev.net.features import Feature as F
from vdev.testing.netdriver import NetHeader

CHECKS = Checks()
MRG = 1 << F.MRG_RXBUF
BUFFER = 512
HEADER = NetHeader.SIZE
RSC_INFO = 4
TUNNEL_GSO, TUNNEL_CSUM = 0x60, 8


def spread_frames(bench: Bench, look) -> None:
    """Frames of many lengths come to mergeable buffers of BUFFER bytes; ``look(frame, completions)`` for each."""
    bench.needs_wire()
    with bench.session(needs=[F.MRG_RXBUF], buffer_size=BUFFER) as session:
        session.inject(frames.plain(frames.tag()))
        while session.driver.receive_within(bench.quiet) is not None:
            pass
        for length in 60, BUFFER - HEADER - 1, BUFFER - HEADER, BUFFER - HEADER + 1, 1000, 1514, 4000:
            frame = frames.plain(frames.tag(), length)
            bench.wire.inject(session, frame, NO_OFFLOAD)
            queue, due = session.driver.receiveq, -(-(length + HEADER) // BUFFER)
            expect(queue.wait(bench.seconds), f"a frame of {length} bytes did not come")
            first = queue.collect()
            count = NetHeader.unpack(first.data).num_buffers
            expect(count >= 1, f"num_buffers is {count}")
            waiting = queue.ring.pending()
            expect(waiting >= count - 1, f"num_buffers is {count}, and {waiting + 1} buffers were used when the first "
                   "was seen")
            parts = [first, *(queue.collect() for _ in range(count - 1))]
            session.driver.fill(count)
            session.note(f"a frame of {length} bytes came in buffers with {[part.written for part in parts]} bytes")
            look(frame, parts, due)


@CHECKS.row("NET-RXB-D-01", "NET-RX-D-02", both=True)
def number_of_buffers(bench: Bench) -> None:
    """Lets frames of 60 to 4000 bytes come to mergeable buffers of 512: num_buffers is as many as were used."""
    def look(frame, parts, due) -> None:
        expect(len(parts) == due, f"num_buffers is {len(parts)} for a frame of {len(frame)} bytes, which fills {due}")
    spread_frames(bench, look)


@CHECKS.row("NET-RX-D-03", both=True)
def buffers_are_filled(bench: Bench) -> None:
    """Lets frames of 60 to 4000 bytes come to mergeable buffers of 512: all but the last are full."""
    def look(frame, parts, due) -> None:
        expect(all(part.written == BUFFER for part in parts[:-1]), "a buffer before the last one is not full")
    spread_frames(bench, look)


@CHECKS.row("NET-RX-D-04", both=True)
def buffers_come_together(bench: Bench) -> None:
    """Lets frames of 60 to 4000 bytes come to mergeable buffers of 512: as soon as the first is used, as many are as
    num_buffers says."""
    spread_frames(bench, lambda frame, parts, due: None)


@CHECKS.row("NET-RX-D-05", "NET-RX-D-06", both=True)
def one_header(bench: Bench) -> None:
    """Lets frames of 60 to 4000 bytes come to mergeable buffers of 512: behind one header, in the first, are the
    frame's bytes and no others, and used lengths say how many."""
    def look(frame, parts, due) -> None:
        total = sum(part.written for part in parts)
        expect(total == HEADER + len(frame), f"used lengths add up to {total}, not {HEADER + len(frame)}")
        expect(b"".join(part.data for part in parts)[HEADER:] == frame, "the bytes behind the header are not the frame")
    spread_frames(bench, look)


@CHECKS.row("NET-RXB-D-02", both=True)
def one_buffer(bench: Bench) -> None:
    """Without MRG_RXBUF, lets a frame come that is longer than the buffers: it takes one buffer at the most, and those
    after it come whole."""
    bench.needs_wire()
    with bench.session(without=MRG | GUEST, buffer_size=BUFFER) as session:
        session.inject(frames.plain(frames.tag()))
        while session.driver.receive_within(bench.quiet) is not None:
            pass
        long, mark = frames.plain(frames.tag(), 1400), frames.tag()
        bench.wire.inject(session, long, NO_OFFLOAD)
        bench.wire.inject(session, frames.plain(mark, 300), NO_OFFLOAD)
        parts, queue = 0, session.driver.receiveq
        while queue.wait(bench.seconds):
            done = queue.collect()
            session.driver.fill(1)
            if mark in done.data:
                break
            parts += done.data[HEADER:] in long or done.data in long
        else:
            expect(False, "a frame behind one that is too long did not come")
        expect(done.data[HEADER:] == frames.plain(mark, 300), "a frame behind one that is too long did not come whole")
        expect(parts <= 1, f"a frame was spread over {parts} buffers")


@CHECKS.row("NET-RX-D-01", both=True)
def num_buffers_is_one(bench: Bench) -> None:
    """Without MRG_RXBUF, lets frames come: num_buffers of each is 1."""
    bench.needs_wire()
    with bench.session(without=MRG) as session:
        session.inject(frames.plain(frames.tag()))
        while session.driver.receive_within(bench.quiet) is not None:
            pass
        for length in 60, 700, 1514:
            bench.wire.inject(session, frames.plain(frames.tag(), length), NO_OFFLOAD)
            expect(session.driver.receiveq.wait(bench.seconds), "a frame did not come")
            header = NetHeader.unpack(session.driver.receiveq.collect().data)
            expect(header.num_buffers == 1, f"num_buffers is {header.num_buffers}")
            session.driver.fill(1)


def headers(bench: Bench) -> list[NetHeader]:
    """Those of plain frames, of UDP and of TCP, with right and wrong checksums, without any offload negotiated."""
    bench.needs_wire()
    found = []
    with bench.session(without=GUEST | 1 << F.RSC_EXT) as session:
        for protocol in frames.TCP, frames.UDP:
            for ipv6 in False, True:
                for good in True, False:
                    mark = frames.tag()
                    sent = frames.packet(mark + bytes(200), protocol=protocol, ipv6=ipv6, good=good)
                    found.append(session.receives(sent, mark=mark).header)
    return found


@CHECKS.row("NET-RX-D-07", both=True)
def no_flags(bench: Bench) -> None:
    """Without GUEST_CSUM, lets TCP and UDP come with right and wrong checksums: flags is 0."""
    for header in bench.once(headers):
        expect(header.flags == 0, f"flags is {header.flags:#x}")


@CHECKS.row("NET-RX-D-22", both=True)
def no_rsc_info(bench: Bench) -> None:
    """Without RSC_EXT, lets frames of many kinds come: RSC_INFO (4) is not set."""
    for header in bench.once(headers):
        expect(not header.flags & RSC_INFO, f"flags is {header.flags:#x}")


@CHECKS.row("NET-RX-D-25", both=True)
def no_tunnel(bench: Bench) -> None:
    """Lets frames of many kinds come: neither the bits of tunnels in gso_type nor UDP_TUNNEL_CSUM in flags are set, for
    features that cannot be negotiated over vhost-user."""
    for header in bench.once(headers):
        expect(not header.gso_type & TUNNEL_GSO, f"gso_type is {header.gso_type:#x}")
        expect(not header.flags & TUNNEL_CSUM, f"flags is {header.flags:#x}")


