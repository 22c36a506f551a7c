"""What a driver sends: the header in front of a frame, and what becomes of both."""

from vdev.conformance import frames
from vdev.conformance.bench import Bench, Session
from vdev.conformance.frames import TCP, UDP
from vdev.conformance.verdict import Checks, NotReachable, expect
from vdev.net.features import Feature as F
from vdev.testing.netdriver import (
    DATA_VALID,
    GSO_TCPV4,
    GSO_TCPV6,
    GSO_UDP_L4,
    NEEDS_CSUM,
    NetHeader,
)

CHECKS = Checks()
SEGMENT = 1400  # bytes of payload


def completed(header: NetHeader, frame: bytes) -> bytes:
    """``frame`` with the checksum in it that ``header`` says is still to be made."""
    if not header.flags & NEEDS_CSUM:
        return frame
    at = header.csum_start + header.csum_offset
    value = frames.checksum(frame[header.csum_start:]) or 0xFFFF
    return frame[:at] + value.to_bytes(2, "big") + frame[at + 2:]


def unchanged(session: Session, header: NetHeader, why: str) -> None:
    """A frame sent with ``header`` leaves as it is, with nothing left to do. Raises Broken."""
    mark = frames.tag()
    sent = frames.packet(mark + bytes(40), good=False)
    said, left = session.sends(sent, header, mark=mark)
    expect(left == sent, f"{why}: the frame left with other bytes")
    expect(not said.flags & NEEDS_CSUM, f"{why}: the frame left with NEEDS_CSUM")


@CHECKS.row("NET-HDR-D-01", both=True)
def twelve_bytes(bench: Bench) -> None:
    """Sends and receives frames with and without MRG_RXBUF; each lies behind a header of 12 bytes."""
    bench.needs_wire()
    for without in 0, 1 << F.MRG_RXBUF:
        with bench.session(without=without) as session:
            for length in 60, 333, 1514:
                mark = frames.tag()
                sent = frames.plain(mark, length)
                _, left = session.sends(sent, mark=mark)
                expect(left == sent, f"of a frame of {length} bytes, {len(left)} bytes left, or others")
                mark = frames.tag()
                sent = frames.plain(mark, length)
                received = session.receives(sent, mark=mark)
                expect(received.frame == sent, f"a frame of {length} bytes does not lie behind a header of 12 bytes")


@CHECKS.row("NET-TX-D-01", both=True)
def unknown_flags(bench: Bench) -> None:
    """Sends frames with all flags set that mean nothing, and fields that then mean nothing: they leave as they are."""
    bench.needs_wire()
    with bench.session() as session:
        for flags in 0xFC & ~0x8, 0xF0, 0x10:
            unchanged(session, NetHeader(flags), f"flags {flags:#x}")


@CHECKS.row("NET-TX-D-02", both=True)
def checksum_fields_without_the_flag(bench: Bench) -> None:
    """Sends frames without NEEDS_CSUM, and with csum_start and csum_offset of all kinds: they leave as they are."""
    bench.needs_wire()
    with bench.session(needs=[F.CSUM]) as session:
        for start, offset in (34, 6), (0, 0), (14, 10), (0xFFFF, 0xFFFF):
            unchanged(session, NetHeader(0, csum_start=start, csum_offset=offset), f"csum_start {start}")


@CHECKS.row("NET-TX-D-03", both=True)
def partial_checksums(bench: Bench) -> None:
    """Sends TCP and UDP over IPv4 and IPv6 with NEEDS_CSUM and the sum of the pseudo header: the checksum is made, or
    passed on as one that is to be made."""
    bench.needs_wire()
    # One who is its own network gets back what it sent, if it takes that.
    with bench.session(needs=[F.CSUM, F.GUEST_CSUM] if bench.wire.reflects else [F.CSUM]) as session:
        for protocol, offset in (TCP, frames.TCP_CHECKSUM), (UDP, frames.UDP_CHECKSUM):
            for ipv6 in False, True:
                mark = frames.tag()
                payload = mark + bytes(range(101))
                header = NetHeader(NEEDS_CSUM, csum_start=frames.transport_at(ipv6), csum_offset=offset)
                said, left = session.sends(frames.packet(payload, protocol=protocol, ipv6=ipv6, partial=True), header,
                                           mark=mark)
                due = frames.packet(payload, protocol=protocol, ipv6=ipv6)
                expect(completed(said, left) == due, f"{'TCP' if protocol == TCP else 'UDP'} over "
                       f"IPv{6 if ipv6 else 4}: the checksum is not right")


def segments(session: Session, header: NetHeader, frame: bytes, total: int) -> None:
    """``frame`` with ``total`` bytes of payload, each 32 of which have a mark, is sent as segments that have them all.
    Raises Broken, NotReachable when it is passed on in one piece."""
    transport = TCP if header.gso_type & 0x7F in (GSO_TCPV4, GSO_TCPV6) else UDP
    ipv6 = frame[12:14] == b"\x86\xdd"
    overhead = header.csum_start + (frames.TCP_HEADER if transport == TCP else frames.UDP_HEADER)
    mark = frame[overhead:overhead + frames.TAG_BYTES]
    got, sequence = b"", 1000
    session.transmit(frame, header)
    while len(got) < total:
        left = session.leaves(mark)
        expect(left is not None, f"{len(got)} of {total} bytes of payload left the back-end")
        said, part = left
        if said.gso_type:
            raise NotReachable("large frames are passed on in one piece, to one who takes them")
        part = completed(said, part)
        payload = part[overhead:]
        expect(len(payload) <= header.gso_size, f"a segment has {len(payload)} bytes, gso_size is {header.gso_size}")
        expect(frames.is_checked(part), f"the checksum of the segment from byte {len(got)} is wrong")
        expect(part[:14] == frame[:14], "a segment has another Ethernet header")
        if transport == TCP:
            found = int.from_bytes(part[header.csum_start + 4:header.csum_start + 8], "big")
            expect(found == sequence + len(got), f"a segment from byte {len(got)} has sequence number {found}")
        if not ipv6:
            length = int.from_bytes(part[16:18], "big")
            expect(length == len(part) - frames.ETHERNET_HEADER, f"the IP length of a segment is {length}")
        got += payload
    expect(got == frame[overhead:], "the payload of the segments is not that of the frame")


def not_reflecting(bench: Bench) -> None:
    """Raises NotReachable where nobody but the guest itself sees what it sends."""
    if bench.needs_wire().reflects:
        raise NotReachable("needs a wire that does not reflect")


def large(ipv6: bool, protocol: int) -> tuple[NetHeader, bytes, int]:
    """A frame to be cut into segments: header, frame, bytes of payload."""
    mark = frames.tag()
    payload = b"".join(mark + number.to_bytes(4, "big") + bytes(16) for number in range(150))
    tcp = protocol == TCP
    kind = (GSO_TCPV6 if ipv6 else GSO_TCPV4) if tcp else GSO_UDP_L4
    start = frames.transport_at(ipv6)
    header = NetHeader(NEEDS_CSUM, kind, start + (frames.TCP_HEADER if tcp else frames.UDP_HEADER), SEGMENT, start,
                       frames.TCP_CHECKSUM if tcp else frames.UDP_CHECKSUM)
    return header, frames.packet(payload, protocol=protocol, ipv6=ipv6, partial=True), len(payload)


KINDS = [(F.HOST_TSO4, False, TCP), (F.HOST_TSO6, True, TCP), (F.HOST_USO, False, UDP)]


@CHECKS.row("NET-TX-D-04")
def segmentation(bench: Bench) -> None:
    """Sends frames of 4800 bytes of payload with gso_size 1400, of every kind that is offered: they leave in segments
    with all the bytes, in order, and right lengths, numbers and checksums."""
    not_reflecting(bench)
    offered = [kind for kind in KINDS if bench.offers(kind[0])]
    if not offered:
        bench.needs(F.HOST_TSO4)
    for feature, ipv6, protocol in offered:
        with bench.session(needs=[F.CSUM, feature], without=GUEST) as session:
            session.inject(frames.plain(frames.tag()))
            segments(session, *large(ipv6, protocol))


GUEST = 0
for _feature in F.GUEST_CSUM, F.GUEST_TSO4, F.GUEST_TSO6, F.GUEST_UFO, F.GUEST_ECN, F.GUEST_USO4, F.GUEST_USO6:
    GUEST |= 1 << _feature


@CHECKS.row("NET-TX-D-05", "NET-TX-D-06")
def length_of_headers_is_a_hint(bench: Bench) -> None:
    """Sends large TCP frames with hdr_len 0, 1, 40 and 65535: they leave in the right segments all the same."""
    not_reflecting(bench)
    with bench.session(needs=[F.CSUM, F.HOST_TSO4], without=GUEST | 1 << F.GUEST_HDRLEN) as session:
        session.inject(frames.plain(frames.tag()))
        for hdr_len in 0, 1, 40, 65535:
            header, frame, total = large(False, TCP)
            header = NetHeader(header.flags, header.gso_type, hdr_len, header.gso_size, header.csum_start,
                               header.csum_offset)
            session.note(f"hdr_len is {hdr_len}")
            segments(session, header, frame, total)


@CHECKS.row("NET-TX-D-07", both=True)
def checksum_is_not_assumed(bench: Bench) -> None:
    """Sends a frame with a wrong checksum and without NEEDS_CSUM: it leaves as it is, and nobody says it was valid."""
    bench.needs_wire()
    with bench.session(needs=[F.CSUM, F.GUEST_CSUM] if bench.wire.reflects else [F.CSUM]) as session:
        mark = frames.tag()
        sent = frames.packet(mark + bytes(50), good=False)
        said, left = session.sends(sent, mark=mark)
        expect(left == sent, "the frame left with other bytes")
        expect(not said.flags & DATA_VALID, "a frame with a wrong checksum is said to be valid")


@CHECKS.row("NET-TX-D-08", both=True)
def nothing_is_written(bench: Bench) -> None:
    """Sends frames of many kinds; their chains come back with the used length 0."""
    with bench.session() as session:
        for length in 60, 300, 1514:
            session.driver.transmit(frames.plain(frames.tag(), length), cuts=[12, 40])
            expect(session.driver.transmitq.wait(bench.seconds), "a frame was not used")
            for done in session.driver.transmitq.collect_all():
                expect(done.written == 0, f"the used length of a transmitted frame is {done.written}")
