"""Requests about the network: announcing the guest, MTU."""

from vdev.conformance import frames
from vdev.conformance.bench import Bench, Stage, refused
from vdev.conformance.verdict import Checks, NotReachable, expect
from vdev.net.features import Feature as F
from vhost_user.spec import ProtocolFeature

CHECKS = Checks()
RARP = 0x8035
ETHERNET = frames.ETHERNET_HEADER


@CHECKS.row("VU-NET-B-01")
def announcement(bench: Bench) -> None:
    """Sends SEND_RARP with an address: a broadcast RARP from it leaves the back-end."""
    bench.needs(ProtocolFeature.RARP)
    if bench.needs_wire().reflects:
        raise NotReachable("needs a wire that does not reflect")
    with bench.session(needs=[ProtocolFeature.RARP]) as session:
        session.inject(frames.plain(frames.tag()))
        mac = bytes.fromhex("5254") + frames.tag()[:4]
        session.front_end.send_rarp(mac)
        left = session.leaves(mac)
        expect(left is not None, "no frame with that address left the back-end")
        frame = left[1]
        expect(frame[:6] == frames.BROADCAST, f"it went to {frame[:6].hex(':')}, not to everybody")
        expect(frame[6:12] == mac, f"it came from {frame[6:12].hex(':')}")
        expect(int.from_bytes(frame[12:14], "big") == RARP, f"its type is {frame[12:14].hex()}, not 8035")


@CHECKS.row("VU-NET-B-02")
def mtu(bench: Bench) -> None:
    """Sends NET_SET_MTU with need_reply: 1500 and 9000 are acknowledged with zero, 20 is not."""
    bench.needs(ProtocolFeature.MTU, ProtocolFeature.REPLY_ACK)
    for value in 1500, 9000:
        with bench.session(Stage.NEGOTIATED, needs=[ProtocolFeature.MTU, F.MTU]) as session:
            session.front_end.net_set_mtu(value, need_reply=True)
    with bench.session(Stage.NEGOTIATED, needs=[ProtocolFeature.MTU, F.MTU]) as session:
        expect(refused(session, lambda: session.front_end.net_set_mtu(20, need_reply=True)),
               "an MTU of 20 was acknowledged with zero")


@CHECKS.row("NET-CFG-D-06", both=True)
def frames_up_to_the_mtu(bench: Bench) -> None:
    """With an MTU of 1400 sends frames up to it and its Ethernet header: they leave whole."""
    bench.needs_wire()
    needs = [F.MTU] + [ProtocolFeature.MTU] * (bench.protocol >> ProtocolFeature.MTU & 1)
    with bench.session(Stage.NEGOTIATED, needs=needs) as session:
        if session.front_end.has(ProtocolFeature.MTU):
            session.front_end.net_set_mtu(1400)
        session.reach(Stage.RUNNING)
        for length in 1399 + ETHERNET, 1400 + ETHERNET:
            mark = frames.tag()
            sent = frames.plain(mark, length)
            _, left = session.sends(sent, mark=mark)
            expect(left == sent, f"a frame of {length} bytes left as {len(left)}")


@CHECKS.row("NET-CFG-D-05")
def frames_beyond_the_mtu(bench: Bench) -> None:
    """With an MTU of 1400 lets a frame come that is one byte longer than that and its Ethernet header: it is not
    delivered; one of just that length is."""
    if bench.needs_wire().reflects:
        raise NotReachable("needs a wire that does not reflect")
    bench.needs(F.MTU, ProtocolFeature.MTU)
    with bench.session(Stage.NEGOTIATED, needs=[F.MTU, ProtocolFeature.MTU]) as session:
        session.front_end.net_set_mtu(1400)
        session.reach(Stage.RUNNING)
        mark = frames.tag()
        session.receives(frames.plain(mark, 1400 + ETHERNET), mark=mark)
        mark = frames.tag()
        session.inject(frames.plain(mark, 1401 + ETHERNET))
        expect(session.arrives(mark, bench.quiet) is None, "a frame longer than the MTU was delivered")
