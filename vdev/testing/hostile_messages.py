"""What a hostile front-end does with messages themselves: framing, descriptors, negotiation (rows P01 to P38 and P96 to
P102).

Every function is the ``act`` of a case, see vdev/testing/initiator.py."""

import os
import socket
import threading
from collections.abc import Iterator

from vdev.testing.initiator import ANY, CLOSED, REFUSED, SERVED, Attack, Cases, Outcome, Stage, Target
from vhost_user.codec import encode
from vhost_user.spec import HEADER_SIZE, VERSION, ProtocolFeature, Request
from vhost_user.wire import HEADER, U64, U64_LAYOUT

CASES = Cases()
DEADLINE = 8.0  # seconds within which half a message has to be given up


def header(request: int, flags: int, size: int) -> bytes:
    """A message header with these very fields."""
    return HEADER.build({"request": request, "flags": flags, "size": size})


def u64(value: int) -> bytes:
    """The payload of one u64."""
    return U64_LAYOUT.encode(U64(value))


# -------------------------------------------------------------------------------------------------- framing


@CASES.case("P01", "5 of the 12 bytes of a header, then nothing", CLOSED)
def half_header(target: Target) -> Iterator[Outcome]:
    with target.attack() as attack:
        attack.front_end.send_raw(header(Request.SET_OWNER, VERSION, 0)[:5])
        yield attack.left_alone(DEADLINE)


@CASES.case("P02", "a header with a descriptor and half a payload, then the end of the connection", ANY)
def half_message(target: Target) -> Iterator[Outcome]:
    with target.attack() as attack:
        attack.front_end.send_raw(encode(Request.SET_VRING_CALL, u64(0))[:-4], [attack.queue(0).call_fd])
        attack.front_end.transport._socket.shutdown(socket.SHUT_WR)
        yield attack.left_alone(target.seconds)


@CASES.case("P03", "a message one byte at a time", SERVED)
def dribble(target: Target) -> Iterator[Outcome]:
    with target.attack() as attack:
        for byte in encode(Request.SET_FEATURES, u64(attack.front_end.features)):
            attack.front_end.send_raw(bytes([byte]))
        yield attack.alive()


@CASES.case("P04", "a header that announces 64 KiB and 4 GiB of payload", CLOSED)
def huge_size(target: Target) -> Iterator[Outcome]:
    for size in 0x10000, 0xFFFFFFFF:
        with target.attack() as attack:
            yield attack.send(header(Request.SET_FEATURES, VERSION, size), [attack.queue(0).kick_fd])


@CASES.case("P05", "SET_FEATURES with 0, 4 and 7 bytes of payload", REFUSED)
def short_payload(target: Target) -> Iterator[Outcome]:
    for size in 0, 4, 7:
        with target.attack() as attack:
            yield attack.ask(Request.SET_FEATURES, u64(attack.front_end.features)[:size])


@CASES.case("P06", "SET_FEATURES with 9 and 16 bytes of payload", REFUSED)
def long_payload(target: Target) -> Iterator[Outcome]:
    for size in 9, 16:
        with target.attack() as attack:
            yield attack.ask(Request.SET_FEATURES, u64(attack.front_end.features) + bytes(size - 8))


@CASES.case("P09", "headers of version 0, 2 and 3", CLOSED)
def wrong_version(target: Target) -> Iterator[Outcome]:
    for version in 0, 2, 3:
        with target.attack() as attack:
            yield attack.send(header(Request.SET_OWNER, version, 0))


@CASES.case("P11", "a request with the reply flag", CLOSED)
def reply_flag(target: Target) -> Iterator[Outcome]:
    with target.attack() as attack:
        yield attack.send(encode(Request.SET_OWNER, reply=True))


@CASES.case("P12", "1 and 8 descriptors with SET_OWNER, which takes none", REFUSED)
def uninvited_descriptors(target: Target) -> Iterator[Outcome]:
    for count in 1, 8:
        with target.attack() as attack:
            yield attack.ask(Request.SET_OWNER, fds=[attack.queue(0).kick_fd] * count)


@CASES.case("P13", "12 and 253 descriptors with one message", CLOSED)
def too_many_descriptors(target: Target) -> Iterator[Outcome]:
    for count in 12, 253:
        with target.attack() as attack:
            yield attack.ask(Request.SET_VRING_CALL, u64(0), [attack.queue(0).call_fd] * count)


@CASES.case("P14", "descriptors on the payload instead of the header", ANY)
def late_descriptors(target: Target) -> Iterator[Outcome]:
    with target.attack() as attack:
        data = encode(Request.SET_VRING_CALL, u64(0))
        attack.front_end.send_raw(data[:HEADER_SIZE])
        yield attack.send(data[HEADER_SIZE:], [attack.queue(0).call_fd])


@CASES.case("P15", "SET_VRING_KICK without the descriptor it promises", REFUSED)
def missing_descriptor(target: Target) -> Iterator[Outcome]:
    with target.attack(Stage.SHARED) as attack:
        yield attack.ask(Request.SET_VRING_KICK, u64(0))


@CASES.case("P16", "SET_VRING_CALL that says there is no descriptor, with one", REFUSED)
def denied_descriptor(target: Target) -> Iterator[Outcome]:
    with target.attack(Stage.SHARED) as attack:
        yield attack.ask(Request.SET_VRING_CALL, u64(0x100), [attack.queue(0).call_fd])


@CASES.case("P16", "SET_VRING_CALL that says there is no descriptor, without one", SERVED)
def no_descriptor(target: Target) -> Iterator[Outcome]:
    with target.attack(Stage.SHARED) as attack:
        yield attack.ask(Request.SET_VRING_CALL, u64(0x100))


@CASES.case("P17", "2000 SET_VRING_CALL with a descriptor each", SERVED)
def many_descriptors(target: Target) -> Iterator[Outcome]:
    with target.attack(Stage.SHARED) as attack:
        yield attack.many([(encode(Request.SET_VRING_CALL, u64(0)), [attack.queue(0).call_fd])] * 2000)


@CASES.case("P21", "2000 questions in one go", SERVED)
def many_messages(target: Target) -> Iterator[Outcome]:
    with target.attack() as attack:
        sender = threading.Thread(
            target=lambda: attack.front_end.transport._socket.sendall(encode(Request.GET_FEATURES) * 2000))
        attack.front_end.transport._socket.settimeout(target.seconds)
        sender.start()
        for _ in range(2000):
            attack.front_end.receive()
        sender.join()
        yield attack.alive()


@CASES.case("P22", "a second connection beside the first, which speaks too", SERVED)
def second_connection(target: Target) -> Iterator[Outcome]:
    with target.attack(Stage.STARTED) as first, socket.socket(socket.AF_UNIX) as second:
        second.connect(target.path)
        second.sendall(encode(Request.SET_OWNER))
        yield first.alive()
        yield first.transmits()


@CASES.case("P24", "50 connections, each ended and followed at once", ANY)
def instant_reconnect(target: Target) -> Iterator[Outcome]:
    for _ in range(50):
        target.attack(Stage.STARTED).close()
    yield Outcome.CLOSED


@CASES.case("P25", "200 connections that send nonsense", ANY)
def nonsense(target: Target) -> Iterator[Outcome]:
    for _ in range(200):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(target.path)
            sock.sendall(os.urandom(HEADER_SIZE))
    yield Outcome.CLOSED


# ---------------------------------------------------------------------------------------------- negotiation


@CASES.case("P26", "SET_FEATURES with every bit", REFUSED)
def all_features(target: Target) -> Iterator[Outcome]:
    with target.attack() as attack:
        yield attack.ask(Request.SET_FEATURES, u64((1 << 64) - 1))


@CASES.case("P27", "SET_FEATURES without VERSION_1, which a legacy driver may do", ANY)
def legacy(target: Target) -> Iterator[Outcome]:
    with target.attack() as attack:
        yield attack.ask(Request.SET_FEATURES, u64(attack.front_end.features & ~(1 << 32)))


@CASES.case("P28", "other features while rings run", REFUSED)
def features_of_a_running_device(target: Target) -> Iterator[Outcome]:
    with target.attack(Stage.STARTED) as attack:
        yield attack.ask(Request.SET_FEATURES, u64(attack.front_end.features ^ 1 << 15))


@CASES.case("P29", "SET_PROTOCOL_FEATURES with every bit", REFUSED)
def all_protocol_features(target: Target) -> Iterator[Outcome]:
    with target.attack() as attack:
        yield attack.ask(Request.SET_PROTOCOL_FEATURES, u64((1 << 64) - 1))


@CASES.case("P30", "NET_SET_MTU where no protocol feature was negotiated", REFUSED)
def not_negotiated(target: Target) -> Iterator[Outcome]:
    with target.attack(Stage.CONNECTED) as attack:
        yield attack.ask(Request.NET_SET_MTU, u64(1500))


@CASES.case("P33", "SET_OWNER twice", ANY)
def owner_twice(target: Target) -> Iterator[Outcome]:
    with target.attack() as attack:
        yield attack.ask(Request.SET_OWNER)
        yield attack.ask(Request.SET_OWNER)


@CASES.case("P34", "RESET_OWNER while rings run", ANY)
def reset_owner(target: Target) -> Iterator[Outcome]:
    with target.attack(Stage.STARTED) as attack:
        attack.driver.transmit(bytes(60))
        yield attack.ask(Request.RESET_OWNER)


@CASES.case("P36", "SET_VRING_ENABLE, SET_VRING_CALL and SET_VRING_ERR before all else", SERVED)
def early(target: Target) -> Iterator[Outcome]:
    with target.attack() as attack:
        yield attack.ring(Request.SET_VRING_ENABLE, 0, 1)
        yield attack.ask(Request.SET_VRING_CALL, u64(0), [attack.queue(0).call_fd])
        yield attack.ask(Request.SET_VRING_ERR, u64(0), [attack.queue(0).call_fd])


@CASES.case("P61", "POSTCOPY_LISTEN, POSTCOPY_END, IOTLB_MSG, SET_VRING_ENDIAN and one that nobody knows", REFUSED)
def other_peoples_requests(target: Target) -> Iterator[Outcome]:
    for request, payload in ((Request.POSTCOPY_LISTEN, b""), (Request.POSTCOPY_END, b""),
                             (Request.IOTLB_MSG, bytes(32)), (Request.SET_VRING_ENDIAN, bytes(8)), (200, b"")):
        with target.attack(Stage.CONNECTED) as attack:
            yield attack.ask(request, payload)


@CASES.case("P96", "SET_INFLIGHT_FD of 65535 queues in no memory", REFUSED)
def inflight(target: Target) -> Iterator[Outcome]:
    with target.attack() as attack:
        payload = u64(1 << 40) + u64(0) + (65535).to_bytes(2, "little") + (64).to_bytes(2, "little") + bytes(4)
        yield attack.ask(Request.SET_INFLIGHT_FD, payload, [attack.memory.regions[0].fd])


@CASES.case("P98", "SET_BACKEND_REQ_FD again and again, and no answer on any of them", SERVED)
def channel_after_channel(target: Target) -> Iterator[Outcome]:
    with target.attack() as attack:
        attack.needs(ProtocolFeature.BACKEND_REQ)
        for _ in range(50):
            ours, theirs = socket.socketpair()
            with ours, theirs:
                yield attack.ask(Request.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])


@CASES.case("P99", "GET_CONFIG and SET_CONFIG beyond the 256 bytes there are", ANY)
def config_beyond_its_end(target: Target) -> Iterator[Outcome]:
    for request in Request.GET_CONFIG, Request.SET_CONFIG:
        with target.attack() as attack:
            where = b"".join(number.to_bytes(4, "little") for number in (200, 100, 0))
            yield attack.ask(request, where + bytes(100), answered=request == Request.GET_CONFIG)


@CASES.case("P100", "an MTU of 0, 67, 65536 and 2^63", REFUSED)
def impossible_mtu(target: Target) -> Iterator[Outcome]:
    for mtu in 0, 67, 65536, 1 << 63:
        with target.attack() as attack:
            attack.needs(ProtocolFeature.MTU)
            yield attack.ask(Request.NET_SET_MTU, u64(mtu))


@CASES.case("P101", "200 SEND_RARP before and after the rings run", ANY)
def rarp_storm(target: Target) -> Iterator[Outcome]:
    for stage in Stage.NEGOTIATED, Stage.STARTED:
        with target.attack(stage) as attack:
            attack.needs(ProtocolFeature.RARP)
            yield attack.many([(encode(Request.SEND_RARP, u64(0x563412005452)), [])] * 200)


@CASES.case("P102", "SET_STATUS 0, and only then the question how far the ring came", SERVED)
def base_after_status_zero(target: Target) -> Iterator[Outcome]:
    with target.attack(Stage.STARTED) as attack:
        attack.needs(ProtocolFeature.STATUS)
        yield attack.transmits()
        yield attack.ask(Request.SET_STATUS, u64(0))
        yield base_is(attack, 1)


def base_is(attack: Attack, expected: int) -> Outcome:
    """ANSWERED when ring 1 says it stands at ``expected``, REFUSED for anything else."""
    return Outcome.ANSWERED if attack.front_end.get_vring_base(1) == expected else Outcome.REFUSED


