"""What a driver is told of a frame it receives: checksums to be made or valid, frames too large for any wire.

The network says it in the header in front of what it sends. Where it is another guest of the same back-end, or the
guest itself, that is what this guest sent; what the receiver did not negotiate has to be done for it, or not
delivered.
"""

from vdev.conformance import frames
from vdev.conformance.bench import Bench, Session
from vdev.conformance.checks.transmit import GUEST, large
from vdev.conformance.frames import TCP, UDP
from vdev.conformance.verdict import Checks, NotReachable, expect
from vdev.net.features import Feature as F
from vdev.testing.netdriver import (
    DATA_VALID,
    GSO_ECN,
    GSO_NONE,
    GSO_TCPV4,
    GSO_TCPV6,
    GSO_UDP,
    GSO_UDP_L4,
    NEEDS_CSUM,
    NetHeader,
    Received,
)

CHECKS = Checks()
CWR, ACK_PUSH = 0x80, 0x18


def sender(bench: Bench) -> tuple[F, ...]:
    """What the guest needs so that offloads can come from the network at all: where it is its own, to send them."""
    needs = (F.CSUM, F.HOST_TSO4, F.HOST_TSO6)
    if bench.needs_wire().reflects:
        bench.needs(*needs)
        return needs
    return ()


def partial(protocol: int, ipv6: bool) -> tuple[NetHeader, bytes, bytes]:
    """A frame whose checksum is to be made: header, frame, mark."""
    mark = frames.tag()
    offset = frames.TCP_CHECKSUM if protocol == TCP else frames.UDP_CHECKSUM
    header = NetHeader(NEEDS_CSUM, csum_start=frames.transport_at(ipv6), csum_offset=offset)
    return header, frames.packet(mark + bytes(range(100)), protocol=protocol, ipv6=ipv6, partial=True), mark


def all_that_comes(session: Session, header: NetHeader, frame: bytes, mark: bytes) -> list[Received]:
    """What reaches the guest of ``frame``, in one piece or in several; nothing, if it is not delivered."""
    session.inject(frame, header)
    first = session.arrives(mark, 0.3)
    found = [] if first is None else [first]
    while found:
        more = session.arrives(mark, session.bench.quiet)
        if more is None:
            break
        found.append(more)
    session.note(f"{len(found)} frame(s) came of it, {[(len(one.frame), one.header.gso_type) for one in found]}")
    return found


@CHECKS.row("NET-RX-D-08")
def checksums_are_made(bench: Bench) -> None:
    """Without GUEST_CSUM, frames come whose checksum the network left to be made: those delivered have it."""
    with bench.session(needs=sender(bench), without=GUEST) as session:
        came = 0
        for protocol in TCP, UDP:
            for ipv6 in False, True:
                header, frame, mark = partial(protocol, ipv6)
                for received in all_that_comes(session, header, frame, mark):
                    came += 1
                    expect(frames.is_checked(received.frame), "a frame was delivered without its checksum")
                    expect(received.header.flags == 0, f"flags is {received.header.flags:#x} without GUEST_CSUM")
        if not came:
            raise NotReachable("frames whose checksum is to be made are not delivered to such a guest")


def never(bench: Bench, without: int, kinds: dict[int, str], ipv6: bool, protocol: int) -> None:
    """A large frame of a kind comes to a guest ``without`` features: no header has one of ``kinds``. Raises Broken."""
    others = [feature for feature in (F.GUEST_CSUM, F.GUEST_TSO4, F.GUEST_TSO6)
              if bench.offers(feature) and not without >> feature & 1]
    with bench.session(needs=[*sender(bench), *others], without=without) as session:
        header, frame, _ = large(ipv6, protocol)
        mark = frame[header.hdr_len:header.hdr_len + frames.TAG_BYTES]
        for received in all_that_comes(session, header, frame, mark):
            kind = received.header.gso_type & 0x7F
            expect(kind not in kinds, f"gso_type is {kinds.get(kind)}, which was not negotiated")


@CHECKS.row("NET-RX-D-09")
def no_tcpv4(bench: Bench) -> None:
    """Without GUEST_TSO4, a large TCP frame over IPv4 comes: gso_type is never TCPV4."""
    never(bench, 1 << F.GUEST_TSO4, {GSO_TCPV4: "TCPV4"}, False, TCP)


@CHECKS.row("NET-RX-D-10")
def no_tcpv6(bench: Bench) -> None:
    """Without GUEST_TSO6, a large TCP frame over IPv6 comes: gso_type is never TCPV6."""
    never(bench, 1 << F.GUEST_TSO6, {GSO_TCPV6: "TCPV6"}, True, TCP)


@CHECKS.row("NET-RX-D-11")
def no_udp(bench: Bench) -> None:
    """Without GUEST_UFO, large frames come: gso_type is never UDP."""
    never(bench, 1 << F.GUEST_UFO, {GSO_UDP: "UDP"}, False, TCP)


@CHECKS.row("NET-RX-D-12")
def no_udp_l4(bench: Bench) -> None:
    """Without GUEST_USO4 and GUEST_USO6, a large UDP frame comes: gso_type is never UDP_L4."""
    without = 1 << F.GUEST_USO4 | 1 << F.GUEST_USO6
    others = [F.GUEST_CSUM] if bench.offers(F.GUEST_CSUM) else []
    needs = [*sender(bench), *others]
    if bench.wire.reflects:
        needs.append(F.HOST_USO)
    with bench.session(needs=needs, without=without) as session:
        header, frame, _ = large(False, UDP)
        for received in all_that_comes(session, header, frame, frame[42:42 + frames.TAG_BYTES]):
            expect(received.header.gso_type != GSO_UDP_L4, "gso_type is UDP_L4, which was not negotiated")


@CHECKS.row("NET-RX-D-13")
def no_gso_at_all(bench: Bench) -> None:
    """Without any GUEST feature for them, large frames come: gso_type is NONE."""
    with bench.session(needs=sender(bench), without=GUEST) as session:
        for ipv6 in False, True:
            header, frame, _ = large(ipv6, TCP)
            mark = frame[header.hdr_len:header.hdr_len + frames.TAG_BYTES]
            for received in all_that_comes(session, header, frame, mark):
                expect(received.header.gso_type == GSO_NONE, f"gso_type is {received.header.gso_type:#x}")


def ecn() -> tuple[NetHeader, bytes, bytes]:
    """A large TCP frame with CWR set: header, frame, mark."""
    header, _, _ = large(False, TCP)
    mark = frames.tag()
    payload = b"".join(mark + number.to_bytes(4, "big") + bytes(16) for number in range(150))
    frame = frames.packet(payload, protocol=TCP, partial=True, flags=ACK_PUSH | CWR)
    return NetHeader(header.flags, GSO_TCPV4 | GSO_ECN, header.hdr_len, header.gso_size, header.csum_start,
                     header.csum_offset), frame, mark


def ecn_sender(bench: Bench) -> tuple[F, ...]:
    """As :func:`sender`, for frames with GSO_ECN."""
    needs = sender(bench)
    if not needs:
        raise NotReachable("needs a wire that reflects, so that the guest can send frames with GSO_ECN to itself")
    bench.needs(F.HOST_ECN)
    return (*needs, F.HOST_ECN)


@CHECKS.row("NET-RX-D-14")
def no_ecn(bench: Bench) -> None:
    """Without GUEST_ECN, a large TCP frame with CWR comes: it is cut into segments, or not delivered."""
    with bench.session(needs=[*ecn_sender(bench), F.GUEST_CSUM, F.GUEST_TSO4], without=1 << F.GUEST_ECN) as session:
        for received in all_that_comes(session, *ecn()):
            expect(received.header.gso_type == GSO_NONE, f"gso_type is {received.header.gso_type:#x} for a frame with "
                   "CWR")


@CHECKS.row("NET-RX-D-15")
def ecn_is_told(bench: Bench) -> None:
    """With GUEST_ECN, a large TCP frame with CWR comes: gso_type has ECN."""
    with bench.session(needs=[*ecn_sender(bench), F.GUEST_CSUM, F.GUEST_TSO4, F.GUEST_ECN]) as session:
        for received in all_that_comes(session, *ecn()):
            expect(received.header.gso_type in (GSO_NONE, GSO_TCPV4 | GSO_ECN),
                   f"gso_type is {received.header.gso_type:#x}, without ECN")


def told(bench: Bench) -> list[tuple[Received, bytes]]:
    """Frames whose checksum is to be made and large ones, delivered to a guest that takes them all, with what they
    should be in the end. Raises NotReachable when none comes with NEEDS_CSUM."""
    needs = [*sender(bench), F.GUEST_CSUM, F.GUEST_TSO4, F.GUEST_TSO6]
    found = []
    with bench.session(needs=needs) as session:
        for protocol in TCP, UDP:
            for ipv6 in False, True:
                header, frame, mark = partial(protocol, ipv6)
                payload = frame[header.csum_start + (20 if protocol == TCP else 8):]
                due = frames.packet(payload, protocol=protocol, ipv6=ipv6)
                found += [(received, due) for received in all_that_comes(session, header, frame, mark)]
        for ipv6 in False, True:
            header, frame, _ = large(ipv6, TCP)
            mark = frame[header.hdr_len:header.hdr_len + frames.TAG_BYTES]
            found += [(received, b"") for received in all_that_comes(session, header, frame, mark)]
    if not any(received.header.flags & NEEDS_CSUM for received, _ in found):
        raise NotReachable("no frame comes with NEEDS_CSUM")
    return found


@CHECKS.row("NET-RX-D-16", "NET-RX-D-19")
def checksum_can_be_made(bench: Bench) -> None:
    """With GUEST_CSUM, frames come whose checksum is to be made: made by csum_start and csum_offset, it is right."""
    for received, due in bench.once(told):
        header, frame = received.header, received.frame
        if due and header.flags & NEEDS_CSUM:
            at = header.csum_start + header.csum_offset
            expect(at + 2 <= len(frame), f"csum_start {header.csum_start} and csum_offset {header.csum_offset} are "
                   "outside of the frame")
            value = frames.checksum(frame[header.csum_start:]) or 0xFFFF
            expect(frame[:at] + value.to_bytes(2, "big") + frame[at + 2:] == due,
                   "the checksum made by csum_start and csum_offset is not that of the packet")


@CHECKS.row("NET-RX-D-18")
def pseudo_header_is_there(bench: Bench) -> None:
    """With GUEST_CSUM, frames come whose checksum is to be made: in its place is the sum of the pseudo header."""
    for received, due in bench.once(told):
        header, frame = received.header, received.frame
        if due and header.flags & NEEDS_CSUM:
            at = header.csum_start + header.csum_offset
            value = frames.checksum(frame[header.csum_start:]) or 0xFFFF
            expect(frames.is_checked(frame[:at] + value.to_bytes(2, "big") + frame[at + 2:]),
                   f"in the place of the checksum is {frame[at:at + 2].hex()}, not the sum of the pseudo header")


@CHECKS.row("NET-RX-D-20")
def large_frames_are_described(bench: Bench) -> None:
    """With GUEST_TSO4 and GUEST_TSO6, large frames come: with a gso_type, NEEDS_CSUM is set and gso_size not 0."""
    for received, _ in bench.once(told):
        header = received.header
        if header.gso_type != GSO_NONE:
            expect(header.gso_type in (GSO_TCPV4, GSO_TCPV6), f"gso_type of TCP is {header.gso_type:#x}")
            expect(header.flags & NEEDS_CSUM, f"gso_type is {header.gso_type:#x}, and NEEDS_CSUM is not set")
            expect(header.gso_size == 1400, f"gso_size is {header.gso_size}, the sender's was 1400")


@CHECKS.row("NET-RX-D-23")
def header_length(bench: Bench) -> None:
    """With GUEST_TSO4 and GUEST_TSO6, large frames come: hdr_len is not less than all their headers."""
    for received, _ in bench.once(told):
        header = received.header
        if header.gso_type != GSO_NONE:
            due = header.csum_start + frames.TCP_HEADER
            expect(header.hdr_len >= due, f"hdr_len is {header.hdr_len}, the headers have {due} bytes")


@CHECKS.row("NET-RX-D-24", "NET-RX-D-17", both=True)
def wrong_checksums_are_not_valid(bench: Bench) -> None:
    """With GUEST_CSUM, frames come with wrong checksums, and without a word from the network about them: neither
    DATA_VALID nor NEEDS_CSUM is set."""
    bench.needs_wire()
    with bench.session(needs=[F.GUEST_CSUM]) as session:
        for protocol in TCP, UDP:
            for ipv6 in False, True:
                mark = frames.tag()
                sent = frames.packet(mark + bytes(99), protocol=protocol, ipv6=ipv6, good=False)
                received = session.receives(sent, mark=mark)
                expect(received.frame == sent, "a frame with a wrong checksum was changed")
                expect(not received.header.flags & DATA_VALID, "DATA_VALID is set for a wrong checksum")
                expect(not received.header.flags & NEEDS_CSUM, "NEEDS_CSUM is set for a wrong checksum")
