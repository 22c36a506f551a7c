"""The configuration space of a back-end that has it (CONFIG)."""

import struct

from vdev.conformance import frames
from vdev.conformance.bench import Bench, Session, Stage, refused
from vdev.conformance.verdict import Checks, expect
from vdev.net.features import Feature as F
from vhost_user.spec import ProtocolFeature, Request
from vhost_user.wire import CONFIG, Config

CHECKS = Checks()
NEEDS = [ProtocolFeature.CONFIG]
# virtio 1.2, 5.1.4: field -> offset, format
FIELDS = {"mac": (0, "6s"), "status": (6, "H"), "max_virtqueue_pairs": (8, "H"), "mtu": (10, "H"), "speed": (12, "I"),
          "duplex": (16, "B"), "rss_max_key_size": (17, "B"), "rss_max_indirection_table_length": (18, "H"),
          "supported_hash_types": (20, "I")}
SIZE = 24
FROM_DRIVER = 0  # SET_CONFIG, its flags
UNKNOWN_SPEED, UNKNOWN_DUPLEX = 0xFFFFFFFF, 0xFF


def session(bench: Bench) -> Session:
    """A session that has agreed on CONFIG and on no features yet."""
    found = bench.session(Stage.CONNECTED, needs=NEEDS)
    found.front_end.set_protocol_features(found.protocol)
    found.front_end.set_owner()
    return found


def read(front_end, field: str) -> bytes | int:
    """A field of the configuration space. Raises Broken when it cannot be read."""
    offset, format = FIELDS[field]
    data = front_end.get_config(offset, struct.calcsize(f"<{format}"))
    expect(data is not None, f"{field} cannot be read")
    return struct.unpack(f"<{format}", data)[0]


def bounded(bench: Bench, field: str, feature: F, least: int, most: int, *others: int) -> None:
    """``field`` of a back-end that offers ``feature`` is in bounds, or one of ``others``. Raises Broken."""
    bench.needs(ProtocolFeature.CONFIG, feature)
    with session(bench) as found:
        value = read(found.front_end, field)
        expect(least <= value <= most or value in others, f"{field} is {value:#x}")


@CHECKS.row("CFG-D-01")
def readable_from_the_start(bench: Bench) -> None:
    """Reads the whole configuration space before any SET_FEATURES."""
    with session(bench) as found:
        data = found.front_end.get_config(0, SIZE)
        expect(data is not None and len(data) == SIZE, "the configuration space cannot be read before SET_FEATURES")


@CHECKS.row("CFG-D-02")
def little_endian(bench: Bench) -> None:
    """Sends NET_SET_MTU with 1400 and reads mtu: it is not 1400 the wrong way round."""
    bench.needs(F.MTU, *NEEDS)
    with bench.session(Stage.NEGOTIATED, needs=[F.MTU, ProtocolFeature.MTU, *NEEDS]) as found:
        found.front_end.net_set_mtu(1400)
        value = read(found.front_end, "mtu")
        swapped = int.from_bytes((1400).to_bytes(2, "little"), "big")
        expect(value != swapped, f"mtu reads {value:#x} for 1400, which is {1400:#x}")


@CHECKS.row("NET-CFG-D-01")
def pairs(bench: Bench) -> None:
    """Reads max_virtqueue_pairs: 1 to 0x8000."""
    bounded(bench, "max_virtqueue_pairs", F.MQ, 1, 0x8000)


@CHECKS.row("NET-CFG-D-02")
def mtu(bench: Bench) -> None:
    """Reads mtu: 68 to 65535."""
    bounded(bench, "mtu", F.MTU, 68, 65535)


@CHECKS.row("NET-CFG-D-03")
def mtu_for_ipv6(bench: Bench) -> None:
    """Reads mtu: 1280 or more."""
    bounded(bench, "mtu", F.MTU, 1280, 65535)


def stays(bench: Bench, field: str) -> None:
    """``field`` of a running device does not change while frames go through. Raises Broken."""
    with bench.session(needs=NEEDS) as found:
        before = read(found.front_end, field)
        for _ in range(5):
            found.transmit(frames.plain(frames.tag()))
            expect(read(found.front_end, field) == before, f"{field} changed from {before:#x}")


@CHECKS.row("NET-CFG-D-04")
def mtu_stays(bench: Bench) -> None:
    """Reads mtu again and again while the device runs, and after a NET_SET_MTU that comes then: it does not change."""
    bench.needs(ProtocolFeature.CONFIG, F.MTU)
    stays(bench, "mtu")
    with bench.session(needs=[*NEEDS, F.MTU, *([ProtocolFeature.MTU] if bench.protocol >> 4 & 1 else [])]) as found:
        before = read(found.front_end, "mtu")
        if found.front_end.has(ProtocolFeature.MTU) and not refused(
                found, lambda: found.front_end.net_set_mtu(1300)):
            after = read(found.front_end, "mtu")
            expect(after == before, f"mtu of a running device changed from {before} to {after}")


@CHECKS.row("NET-CFG-D-07")
def key_size(bench: Bench) -> None:
    """Reads rss_max_key_size: 40 or more."""
    bounded(bench, "rss_max_key_size", F.RSS if bench.offers(F.RSS) else F.HASH_REPORT, 40, 255)


@CHECKS.row("NET-CFG-D-08")
def table_length(bench: Bench) -> None:
    """Reads rss_max_indirection_table_length: 128 or more."""
    bounded(bench, "rss_max_indirection_table_length", F.RSS, 128, 0xFFFF)


@CHECKS.row("NET-CFG-D-10")
def speed(bench: Bench) -> None:
    """Reads speed: 0 to 2^31 - 1, or unknown."""
    bounded(bench, "speed", F.SPEED_DUPLEX, 0, (1 << 31) - 1, UNKNOWN_SPEED)


@CHECKS.row("NET-CFG-D-11")
def duplex(bench: Bench) -> None:
    """Reads duplex: 0, 1, or unknown."""
    bounded(bench, "duplex", F.SPEED_DUPLEX, 0, 1, UNKNOWN_DUPLEX)


@CHECKS.row("NET-CFG-D-12")
def speed_stays(bench: Bench) -> None:
    """Reads speed and duplex again and again while frames go through: they do not change."""
    bench.needs(ProtocolFeature.CONFIG, F.SPEED_DUPLEX)
    stays(bench, "speed")
    stays(bench, "duplex")


def written(found: Session, offset: int, flags: int, data: bytes) -> bytes:
    """SET_CONFIG, refused or not -> what is read there then."""
    if refused(found, lambda: found.front_end.set_config(offset, data, flags)):
        found.note("SET_CONFIG was refused")
    after = found.front_end.get_config(offset, len(data))
    expect(after is not None, f"{len(data)} bytes at {offset} cannot be read any more")
    return after


@CHECKS.row("NET-CFG-D-15", "VU-CFG-B-04")
def read_only(bench: Bench) -> None:
    """Has the driver write status, max_virtqueue_pairs and mtu (SET_CONFIG with flags 0): they read as before."""
    bench.needs(ProtocolFeature.REPLY_ACK)
    with bench.session(needs=NEEDS) as found:
        for field in "status", "max_virtqueue_pairs", "mtu":
            before = read(found.front_end, field)
            offset, _ = FIELDS[field]
            after = written(found, offset, FROM_DRIVER, (before ^ 0x1FF).to_bytes(2, "little"))
            expect(int.from_bytes(after, "little") == before, f"{field} was {before:#x}, and a driver made it "
                   f"{int.from_bytes(after, 'little'):#x}")


@CHECKS.row("NET-CFG-D-16")
def layout(bench: Bench) -> None:
    """Reads each field by its offset and the whole at once: they agree; with MAC, the address is one of a station."""
    with session(bench) as found:
        whole = found.front_end.get_config(0, SIZE)
        expect(whole is not None and len(whole) == SIZE, f"{SIZE} bytes cannot be read")
        for field, (offset, format) in FIELDS.items():
            value = read(found.front_end, field)
            expect(struct.unpack_from(f"<{format}", whole, offset)[0] == value, f"{field} reads differently alone")
        if bench.offers(F.MAC):
            expect(not whole[0] & 1 and any(whole[:6]), f"mac is {whole[:6].hex(':')}, which is no station's")


@CHECKS.row("NET-CFG-D-17")
def link_is_up(bench: Bench) -> None:
    """With STATUS, reads status while frames go through: the link is up, and no bit is set that means nothing."""
    with bench.session(needs=[*NEEDS, F.STATUS]) as found:
        found.transmit(frames.plain(frames.tag()))
        status = read(found.front_end, "status")
        expect(status & 1, "frames go through, and the status says that the link is down")
        expect(not status & ~3, f"the status is {status:#x}: bits 0 and 1 are all there are")


@CHECKS.row("VU-CFG-B-01")
def reply_is_as_long(bench: Bench) -> None:
    """Reads 1, 6, 12 and 24 bytes at several offsets: the reply has as many bytes of payload as the request."""
    with session(bench) as found:
        for offset, size in (0, 1), (0, 6), (6, 2), (0, 12), (12, 4), (0, SIZE):
            payload = CONFIG.encode(Config(offset, 0, bytes(size)))
            reply = found.front_end.request(Request.GET_CONFIG, payload, answered=True)
            expect(len(reply.payload) == len(payload), f"{size} bytes at {offset}: the reply has {len(reply.payload)} "
                   f"bytes of payload, the request {len(payload)}")


@CHECKS.row("VU-CFG-B-02")
def failure_has_no_payload(bench: Bench) -> None:
    """Reads 8 bytes at 250, which goes beyond the 256 that there can be: the reply has no payload."""
    with session(bench) as found:
        payload = CONFIG.encode(Config(250, 0, bytes(8)))
        reply = found.front_end.request(Request.GET_CONFIG, payload, answered=True)
        expect(not reply.payload, f"the reply has {len(reply.payload)} bytes of payload")


@CHECKS.row("VU-CFG-B-03")
def flags_are_checked(bench: Bench) -> None:
    """Writes mtu with flags 7, which mean nothing: that is refused, or changes nothing."""
    bench.needs(ProtocolFeature.REPLY_ACK)
    with bench.session(needs=NEEDS) as found:
        before = read(found.front_end, "mtu")
        after = written(found, FIELDS["mtu"][0], 7, (before ^ 0x1FF).to_bytes(2, "little"))
        expect(int.from_bytes(after, "little") == before, "SET_CONFIG with flags 7 changed mtu")


