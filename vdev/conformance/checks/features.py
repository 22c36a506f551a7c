"""What is offered, what may be chosen of it, and what follows from the choice."""

import random

from vdev.conformance import frames
from vdev.conformance.bench import BASIC, Bench, Stage, refused
from vdev.conformance.checks.replies import follows_nothing, setting
from vdev.conformance.verdict import Checks, NotOffered, NotReachable, expect
from vdev.net.features import Feature as F
from vdev.net.features import mask, names
from vhost_user.errors import PeerError
from vhost_user.frontend import NoAnswer, RequestRefused
from vhost_user.spec import ProtocolFeature, Status, bit_names
from vhost_user.spec import mask as protocol_mask

CHECKS = Checks()

# feature -> it needs at least one of these: virtio 1.2, 5.1.3.1, and 6.1 for RING_PACKED
OFFLOAD_NEEDS = {
    F.GUEST_TSO4: (F.GUEST_CSUM,), F.GUEST_TSO6: (F.GUEST_CSUM,), F.GUEST_UFO: (F.GUEST_CSUM,),
    F.GUEST_USO4: (F.GUEST_CSUM,), F.GUEST_USO6: (F.GUEST_CSUM,), F.GUEST_ECN: (F.GUEST_TSO4, F.GUEST_TSO6),
}
HOST_NEEDS = {
    F.HOST_TSO4: (F.CSUM,), F.HOST_TSO6: (F.CSUM,), F.HOST_UFO: (F.CSUM,), F.HOST_USO: (F.CSUM,),
    F.HOST_ECN: (F.HOST_TSO4, F.HOST_TSO6),
}
CONTROL_NEEDS = {feature: (F.CTRL_VQ,) for feature in (
    F.CTRL_RX, F.CTRL_VLAN, F.GUEST_ANNOUNCE, F.MQ, F.CTRL_MAC_ADDR, F.NOTF_COAL, F.VQ_NOTF_COAL, F.RSS)}
SR_IOV, ADMIN_VQ, LEGACY_GSO, GUEST_RSC6, NOTIFY_ON_EMPTY = 37, 41, 6, 42, 24
# Bits that no specification gives a meaning for a network device over vhost-user.
UNDEFINED = (4, 25, 31, SR_IOV, 39, ADMIN_VQ, 44, 45, 46, 47, 48, 49, 58)
NOT_THE_DRIVERS = mask(F.LOG_ALL, F.PROTOCOL_FEATURES, F.ACCESS_PLATFORM)


def closed(bench: Bench, needs: dict[F, tuple[F, ...]]) -> None:
    """No feature of ``needs`` is offered without one it needs. Raises Broken."""
    for feature, any_of in needs.items():
        if bench.offers(feature):
            missing = " or ".join(needed.name for needed in any_of)
            expect(bench.offered & mask(*any_of), f"{feature.name} is offered without {missing}")


def whole_device(bench: Bench) -> None:
    """Raises NotReachable where the control queue is the front-end's, which then adds CTRL_VQ to the offer."""
    if not bench.protocol >> ProtocolFeature.CONFIG & 1 and not bench.offers(F.CTRL_VQ):
        raise NotReachable("the control queue belongs to the front-end, which offers CTRL_VQ to the driver")


@CHECKS.row("FEAT-D-01")
def offer_is_closed(bench: Bench) -> None:
    """Looks for offered features that need another, which is not offered."""
    closed(bench, {**OFFLOAD_NEEDS, **HOST_NEEDS, F.RING_PACKED: (F.VERSION_1,)})


@CHECKS.row("NET-FEAT-D-01")
def guest_offloads_are_closed(bench: Bench) -> None:
    """Looks for GUEST_TSO4, TSO6, UFO, USO4, USO6 without GUEST_CSUM, and GUEST_ECN without TSO4 or TSO6."""
    closed(bench, OFFLOAD_NEEDS)


@CHECKS.row("NET-FEAT-D-02")
def host_offloads_are_closed(bench: Bench) -> None:
    """Looks for HOST_TSO4, TSO6, UFO, USO without CSUM, and HOST_ECN without TSO4 or TSO6."""
    closed(bench, HOST_NEEDS)


@CHECKS.row("NET-FEAT-D-03")
def control_queue_is_offered_with_what_needs_it(bench: Bench) -> None:
    """Looks for features of the control queue that are offered without CTRL_VQ."""
    whole_device(bench)
    closed(bench, CONTROL_NEEDS)


@CHECKS.row("NET-FEAT-D-04")
def rsc_is_closed(bench: Bench) -> None:
    """Looks for RSC_EXT without HOST_TSO4 or HOST_TSO6."""
    bench.needs(F.RSC_EXT)
    closed(bench, {F.RSC_EXT: (F.HOST_TSO4, F.HOST_TSO6)})


@CHECKS.row("NET-FEAT-D-05")
def hash_tunnel_is_closed(bench: Bench) -> None:
    """Looks for HASH_TUNNEL without CTRL_VQ, or without RSS and HASH_REPORT."""
    bench.needs(F.HASH_TUNNEL)
    closed(bench, {F.HASH_TUNNEL: (F.CTRL_VQ,)})
    closed(bench, {F.HASH_TUNNEL: (F.RSS, F.HASH_REPORT)})


@CHECKS.row("NET-CFG-D-13")
def hash_report_is_closed(bench: Bench) -> None:
    """Looks for HASH_REPORT without CTRL_VQ."""
    bench.needs(F.HASH_REPORT)
    closed(bench, {F.HASH_REPORT: (F.CTRL_VQ,)})


@CHECKS.row("NET-CFG-D-14")
def extra_modes_are_closed(bench: Bench) -> None:
    """Looks for CTRL_RX_EXTRA without CTRL_VQ."""
    bench.needs(F.CTRL_RX_EXTRA)
    closed(bench, {F.CTRL_RX_EXTRA: (F.CTRL_VQ,)})


@CHECKS.row("NET-FEAT-D-08")
def no_legacy_bits(bench: Bench) -> None:
    """Looks for the legacy bits GSO (6), GUEST_RSC4 (41) and GUEST_RSC6 (42) of a device that serves no legacy
    drivers."""
    found = [bit for bit in (LEGACY_GSO, ADMIN_VQ, GUEST_RSC6) if bench.offered >> bit & 1]
    if found and takes_legacy(bench):
        raise NotReachable("it serves legacy drivers too, which are meant by these bits")
    expect(not found, f"bits {found} are offered")


@CHECKS.row("FEAT-D-04")
def nothing_undefined_is_offered(bench: Bench) -> None:
    """Looks for bits that mean nothing, or nothing over vhost-user."""
    found = [bit for bit in UNDEFINED if bench.offered >> bit & 1]
    expect(not found, f"bits {found} are offered")


@CHECKS.row("RSVF-D-07")
def no_sr_iov(bench: Bench) -> None:
    """Looks for SR_IOV, bit 37."""
    expect(not bench.offered >> SR_IOV & 1, "SR_IOV is offered, and there is no PCI device")


@CHECKS.row("RSVF-D-08")
def no_admin_queue(bench: Bench) -> None:
    """Looks for ADMIN_VQ, bit 41."""
    expect(not bench.offered >> ADMIN_VQ & 1, "ADMIN_VQ is offered, which exists on PCI only")


@CHECKS.row("RSVF-D-01")
def version_1(bench: Bench) -> None:
    """Looks for VERSION_1."""
    expect(bench.offers(F.VERSION_1), "VERSION_1 is not offered")


@CHECKS.row("RSVF-D-03")
def access_platform(bench: Bench) -> None:
    """If ACCESS_PLATFORM is offered: negotiates it, and tells a translation, which has to be taken."""
    with bench.session(Stage.SHARED, needs=[F.ACCESS_PLATFORM, ProtocolFeature.BACKEND_REQ]) as session:
        region = session.memory.regions[0]
        session.front_end.iotlb_update(region.gpa, region.size, region.uva)


@CHECKS.row("RSVF-D-04")
def without_access_platform(bench: Bench) -> None:
    """Does not set ACCESS_PLATFORM, which is offered: it may refuse to work, or works."""
    bench.needs(F.ACCESS_PLATFORM)
    try:
        with bench.session(without=mask(F.ACCESS_PLATFORM)) as session:
            session.transmit(frames.plain(frames.tag()))
    except RequestRefused:
        pass


@CHECKS.row("RSVF-D-06")
def without_order_platform(bench: Bench) -> None:
    """Does not set ORDER_PLATFORM, which is offered: it may refuse to work, or works."""
    bench.needs(F.ORDER_PLATFORM)
    try:
        with bench.session(without=mask(F.ORDER_PLATFORM)) as session:
            session.transmit(frames.plain(frames.tag()))
    except RequestRefused:
        pass


def takes_legacy(bench: Bench) -> bool:
    """Is a driver served that does not set VERSION_1?"""
    with bench.session(Stage.CONNECTED, features=0, without=mask(F.VERSION_1, F.MRG_RXBUF)) as session:
        return not refused(session, session.negotiate)


@CHECKS.row("RSVF-D-02")
def without_version_1(bench: Bench) -> None:
    """Does not set VERSION_1: it may refuse to work, or takes what follows for a legacy driver's."""
    try:
        takes_legacy(bench)
    except NoAnswer:
        expect(False, "it neither refused nor answered")


@CHECKS.row("FEAT-D-07", "FEAT-D-08", "NET-HDR-D-04", "INIT-D-01")
def legacy_header(bench: Bench) -> None:
    """If drivers are served that do not set VERSION_1: sends a frame behind a header of 10 bytes, as they do."""
    if not takes_legacy(bench):
        raise NotOffered("the legacy interface")
    bench.needs_wire()
    with bench.session(features=0, without=mask(F.VERSION_1, F.MRG_RXBUF), packed=False) as session:
        mark = frames.tag()
        frame = frames.plain(mark, 80)
        for _ in range(50):  # the first may come before all is ready
            session.driver.transmitq.post(readable=[bytes(10) + frame])
            session.driver.transmitq.submit()
            expect(session.reclaimed(), "the frame was not taken")
            if bench.wire.reflects:
                done = session.driver.receiveq.collect() if session.driver.receiveq.wait(0.1) else None
                left = done.data[10:] if done else None
            else:
                found = session.leaves(mark, 0.1)
                left = found[1] if found else None
            if left is not None:
                expect(left == frame, f"80 bytes behind a header of 10 left as {len(left)} bytes that differ")
                return
        expect(False, "the frame did not leave")


@CHECKS.row("RSVF-D-10")
def any_layout(bench: Bench) -> None:
    """If drivers are served that do not set VERSION_1: looks for ANY_LAYOUT."""
    if not takes_legacy(bench):
        raise NotOffered("the legacy interface")
    expect(bench.offers(F.ANY_LAYOUT), "legacy drivers are served, and ANY_LAYOUT is not offered")


@CHECKS.row("RSVF-D-05")
def in_order(bench: Bench) -> None:
    """With IN_ORDER publishes 60 frames of all lengths, in one piece and in several, six times, on split and packed
    rings: they are used in the order in which they were offered."""
    for packed in (False, True) if bench.offers(F.RING_PACKED) else (False,):
        with bench.session(needs=[F.IN_ORDER, F.INDIRECT_DESC], packed=packed, size=128) as session:
            for _ in range(6):
                heads = [session.driver.offer(frames.plain(frames.tag(), 60 + i * 20), cuts=[12] * (i % 2))
                         for i in range(60)]
                session.driver.transmitq.submit()
                used = []
                while len(used) < len(heads):
                    expect(session.driver.transmitq.wait(bench.seconds), f"{len(used)} of 60 chains were used")
                    used += [done.head for done in session.driver.transmitq.collect_all()]
                expect(used == heads, "chains were not used in the order in which they were offered")


@CHECKS.row("FEAT-D-02")
def subsets(bench: Bench) -> None:
    """Negotiates twelve subsets of the offer, each closed under what needs what: they are accepted, and a frame is
    taken with four of them."""
    choice = random.Random(bench.offered)
    needs = {**OFFLOAD_NEEDS, **HOST_NEEDS}
    for number in range(12):
        features = choice.getrandbits(64) & bench.offered & ~NOT_THE_DRIVERS & ~mask(F.CTRL_VQ) | mask(F.VERSION_1)
        for feature in reversed([*HOST_NEEDS, *OFFLOAD_NEEDS]):
            if not features & mask(*needs[feature]):
                features &= ~mask(feature)
        for feature in needs:
            if not features & mask(*needs[feature]):
                features &= ~mask(feature)
        with bench.session(Stage.RUNNING if number < 4 else Stage.NEGOTIATED, features=features,
                           packed=bool(features & mask(F.RING_PACKED))) as session:
            session.note(f"features: {' '.join(names(session.features))}")
            if number < 4:
                session.transmit(frames.plain(frames.tag()))
            session.barrier()


@CHECKS.row("FEAT-D-03")
def rejected_features(bench: Bench) -> None:
    """Sets a feature that is not offered; if that is refused, FEATURES_OK must not stay set when it is written."""
    bench.needs(ProtocolFeature.STATUS, ProtocolFeature.REPLY_ACK)
    with bench.session(Stage.CONNECTED, needs=[ProtocolFeature.STATUS]) as session:
        front_end = session.front_end
        front_end.set_protocol_features(session.protocol)
        front_end.set_owner()
        front_end.set_status(Status.ACKNOWLEDGE | Status.DRIVER)
        foreign = next(bit for bit in UNDEFINED if not bench.offered >> bit & 1)
        try:
            front_end.set_features(bench.offered & BASIC | mask(F.PROTOCOL_FEATURES) | 1 << foreign)
        except RequestRefused:
            pass
        except PeerError:
            raise NotReachable("it closes the connection instead") from None
        else:
            raise NotReachable(f"it takes bit {foreign}, which it does not offer")
        try:
            front_end.set_status(Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK)
        except RequestRefused:
            session.note("FEATURES_OK was refused")
        status = front_end.get_status()
        expect(not status & Status.FEATURES_OK, f"FEATURES_OK is set in the status {status:#x} all the same")


@CHECKS.row("FEAT-D-05")
def same_features_again(bench: Bench) -> None:
    """Negotiates the same features in three sessions, and again after RESET_DEVICE where that is offered."""
    resets = bench.protocol >> ProtocolFeature.RESET_DEVICE & 1
    for _ in range(3):
        with bench.session(Stage.NEGOTIATED, needs=[ProtocolFeature.RESET_DEVICE] if resets else []) as session:
            if resets:
                session.front_end.reset_device()
                session.front_end.set_features(session.features | mask(F.PROTOCOL_FEATURES))
            session.barrier()


@CHECKS.row("FEAT-D-06", both=True)
def features_stay(bench: Bench) -> None:
    """While rings run, sets features without MRG_RXBUF: that is refused, or changes nothing; frames go on."""
    try:
        with bench.session() as session:
            session.transmit(frames.plain(frames.tag()))
            if refused(session, lambda: session.front_end.set_features(
                    session.features & ~mask(F.MRG_RXBUF) | mask(F.PROTOCOL_FEATURES))):
                return
            session.transmit(frames.plain(frames.tag()))
            if bench.wire is not None:
                mark = frames.tag()
                received = session.receives(frames.plain(mark, 3000), mark=mark)
                expect(received.buffers == 2, f"a frame of 3000 bytes came in {received.buffers} buffers of 1536 bytes")
    except PeerError:
        pass


# ------------------------------------------------------------------------------------ protocol features


@CHECKS.row("VU-FEAT-B-01", "VU-FEAT-B-02")
def protocol_features_exist(bench: Bench) -> None:
    """Bit 30 is offered; GET_PROTOCOL_FEATURES is answered, as the second message of a connection and before any
    SET_FEATURES, and SET_PROTOCOL_FEATURES is taken."""
    bench.needs(F.PROTOCOL_FEATURES)
    with bench.connect() as front_end:
        offered = front_end.get_protocol_features()
        front_end.set_protocol_features(offered & protocol_mask(ProtocolFeature.MQ))
        front_end.get_features()


@CHECKS.row("VU-FEAT-B-03")
def protocol_features_count_at_once(bench: Bench) -> None:
    """Sets REPLY_ACK before any SET_FEATURES; the next request with need_reply is acknowledged."""
    bench.needs(ProtocolFeature.REPLY_ACK)
    with bench.connect() as front_end:
        front_end.set_protocol_features(protocol_mask(ProtocolFeature.REPLY_ACK))
        front_end.set_owner(need_reply=True)


@CHECKS.row("VU-FEAT-B-04")
def protocol_features_without_bit_30(bench: Bench) -> None:
    """Sets features without bit 30; need_reply still has its effect, before and after."""
    bench.needs(ProtocolFeature.REPLY_ACK)
    with bench.session(bit_30=False) as session:
        session.front_end.set_vring_call(1, session.driver.transmitq.call_fd, need_reply=True)
        session.transmit(frames.plain(frames.tag()))


@CHECKS.row("VU-FEAT-B-05")
def nothing_without_negotiation(bench: Bench) -> None:
    """Negotiates no protocol feature and sets a device up; no message comes but the replies that are always due."""
    with bench.session(Stage.NEGOTIATED, protocol=0) as session:
        for name, send in setting(session):
            send(False)
            follows_nothing(session.front_end, name)
        expect(session.front_end.silent(bench.quiet), "a message came that nobody asked for")


@CHECKS.row("VU-FEAT-B-06")
def listed_protocol_features(bench: Bench) -> None:
    """Looks for protocol features that the specification does not list."""
    bench.needs(F.PROTOCOL_FEATURES)
    listed = protocol_mask(*ProtocolFeature)
    expect(not bench.protocol & ~listed, f"{bit_names(bench.protocol & ~listed, ProtocolFeature)} is offered")


@CHECKS.row("VU-FEAT-B-07")
def mq_is_there(bench: Bench) -> None:
    """Looks for protocol feature MQ, and asks GET_QUEUE_NUM."""
    expect(bench.protocol >> ProtocolFeature.MQ & 1, "MQ is not offered")
    with bench.connect() as front_end:
        front_end.set_protocol_features(protocol_mask(ProtocolFeature.MQ))
        number = front_end.get_queue_num()
        expect(number >= 1, f"GET_QUEUE_NUM says {number}")


@CHECKS.row("VU-FEAT-B-08")
def owner_first(bench: Bench) -> None:
    """Begins a connection with SET_OWNER; features are told after it."""
    with bench.connect(owner_first=True) as front_end:
        offered = front_end.get_features()
        expect(offered & mask(F.VERSION_1) == bench.offered & mask(F.VERSION_1),
               f"behind SET_OWNER the features offered are {offered:#x}")


@CHECKS.row("VU-FEAT-B-09")
def reset_owner(bench: Bench) -> None:
    """Sends RESET_OWNER to a running device, then enables the rings once more: memory, rings and features are still
    there, and a frame is taken."""
    with bench.session() as session:
        session.transmit(frames.plain(frames.tag()))
        session.front_end.reset_owner(need_reply=False)
        session.barrier()
        for index in range(len(session.queues)):
            session.enable(index)
        session.transmit(frames.plain(frames.tag()))


@CHECKS.row("VU-FEAT-B-10")
def in_band_needs_its_means(bench: Bench) -> None:
    """Sets INBAND_NOTIFICATIONS without BACKEND_REQ: the connection is closed."""
    with bench.connect(owner_first=True) as front_end:
        offered = front_end.get_protocol_features() if bench.protocol else 0
        if not offered >> ProtocolFeature.INBAND_NOTIFICATIONS & 1:
            raise NotOffered("INBAND_NOTIFICATIONS")
        front_end.set_protocol_features(protocol_mask(ProtocolFeature.INBAND_NOTIFICATIONS))
        expect(front_end.closed(), "the connection was not closed")
