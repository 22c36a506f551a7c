"""The linter and the rings: for each rule a driver that breaks it is named, and an honest one is not."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from ring.driver import Buffer
from ring.driver_parts import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE
from vdev.lint.lane import LintedLane
from vdev.lint.watch import KICK_PATIENCE
from vdev.net.features import HOST_GSO, Feature, mask
from vdev.testing import handmade
from vdev.testing.linted import LintedDevice, linted
from vdev.testing.netdriver import (
    DATA_VALID,
    GSO_ECN,
    GSO_TCPV4,
    GSO_UDP,
    NEEDS_CSUM,
    NetDriver,
    NetHeader,
)

PLAIN = mask(Feature.VERSION_1, Feature.MRG_RXBUF)
INDIRECT = PLAIN | mask(Feature.INDIRECT_DESC)
EVENTS = PLAIN | mask(Feature.EVENT_IDX)
PACKED = PLAIN | mask(Feature.RING_PACKED)
OFFLOADS = PLAIN | mask(Feature.CSUM, Feature.HOST_TSO4, Feature.HOST_TSO6)
AVAIL, USED = 1 << 7, 1 << 15

Act = Callable[[NetDriver, LintedDevice], object]


@dataclass(frozen=True)
class Case:
    """``act`` breaks the rule ``id``, of drivers with these ``features``."""

    id: str
    features: int
    act: Act
    config: tuple[tuple[str, object], ...] = ()
    buffer_size: int | None = None
    name: str = ""


def frame(flags: int = 0x18) -> bytes:
    """TCP over IPv4, 60 bytes; the checksum's field holds the pseudo-header's sum. flags: of TCP."""
    ip = bytes.fromhex("4500002e000040004006" "0000" "0a000001" "0a000002")
    tcp = bytearray(26)
    tcp[12], tcp[13] = 0x50, flags
    total = sum(int.from_bytes(part) for part in (b"\x0a\x00", b"\x00\x01", b"\x0a\x00", b"\x00\x02")) + 6 + len(tcp)
    tcp[16:18] = total.to_bytes(2)
    return bytes.fromhex("0200000000020200000000010800") + ip + bytes(tcp)


TCP = NetHeader(NEEDS_CSUM, GSO_TCPV4, 54, 1448, 34, 16)
CSUM = NetHeader(NEEDS_CSUM, csum_start=34, csum_offset=16)


def sends(header: NetHeader, data: bytes | None = None) -> Act:
    return lambda driver, _: driver.transmit(frame() if data is None else data, header)


def by_hand(*descriptors: tuple[int | None, int, int], writes: bool = False) -> Act:
    """A chain of (addr, len, flags), on the receiveq if it ``writes``; an addr of None is that of new memory."""
    def act(driver: NetDriver, _: LintedDevice) -> None:
        queue = driver.receiveq if writes else driver.transmitq
        made = [(driver.memory.alloc(max(length, 1)) if addr is None else addr, length, flags)
                for addr, length, flags in descriptors]
        handmade.offer(queue, *made)
        queue.kick()
    return act


def in_table(*entries: tuple[int | None, int, int], flags: int = 0, length: int | None = None, more: int = 0) -> Act:
    """A chain of one descriptor, with ``flags``, that names a table of these; ``more`` plain ones before it."""
    def act(driver: NetDriver, _: LintedDevice) -> None:
        made = [(driver.memory.alloc(64) if addr is None else addr, size, flag) for addr, size, flag in entries]
        gpa, size = handmade.table(driver.transmitq, *made)
        plain = [(driver.memory.alloc(64), 64, 0)] * more
        handmade.offer(driver.transmitq, *plain, (gpa, size if length is None else length, DESC_F_INDIRECT | flags))
        driver.transmitq.kick()
    return act


def loops(driver: NetDriver, _: LintedDevice) -> None:
    gpa = driver.memory.alloc(64)
    driver.transmitq.ring.desc[1].set(gpa, 64, DESC_F_NEXT, 1)
    driver.transmitq.ring.offer(1)
    driver.transmitq.publish()
    driver.transmitq.kick()


def endless(driver: NetDriver, _: LintedDevice) -> None:
    gpa = driver.memory.alloc(64)
    size = driver.transmitq.ring.size
    for slot in range(size - 1, -1, -1):
        driver.transmitq.ring.desc[slot].set(gpa, 8, DESC_F_NEXT | AVAIL, 0)
    driver.transmitq.kick()


def links_to(next: int) -> Act:
    def act(driver: NetDriver, _: LintedDevice) -> None:
        gpa = driver.memory.alloc(64)
        driver.transmitq.ring.desc[1].set(gpa, 30, DESC_F_NEXT, next)
        driver.transmitq.ring.desc[3].set(gpa, 30, 0, 0)
        driver.transmitq.ring.offer(1)
        driver.transmitq.publish()
        driver.transmitq.kick()
    return act


def goes_back(driver: NetDriver, device: LintedDevice) -> None:
    driver.transmit(frame())
    device.receive()
    driver.transmitq.ring.avail.idx -= 1
    driver.transmitq.kick()


def goes_back_a_little(driver: NetDriver, device: LintedDevice) -> None:
    """Not below what the device has taken, so that the ring survives it."""
    driver.fill(4)
    device.send(frame())
    driver.receiveq.ring.avail.idx -= 1
    for _ in range(3):
        device.send(frame())


def flags_of_avail(value: int) -> Act:
    def act(driver: NetDriver, _: LintedDevice) -> None:
        driver.transmitq.ring.avail.flags = value
        driver.transmit(frame())
    return act


def forgets_the_kick(driver: NetDriver, device: LintedDevice) -> None:
    driver.offer(frame())
    driver.transmitq.publish()
    device.later(0, KICK_PATIENCE / 2, KICK_PATIENCE)


def one_descriptor_twice(driver: NetDriver, device: LintedDevice) -> None:
    driver.receiveq.ring.desc[0].set(driver.memory.alloc(1536), 1536, DESC_F_WRITE, 0)
    driver.receiveq.ring.offer(0)
    driver.receiveq.ring.offer(0)
    driver.receiveq.publish()
    driver.receiveq.kick()
    device.send(frame())


def changes_a_buffer(driver: NetDriver, device: LintedDevice) -> None:
    """What the device gave back is still its own."""
    driver.fill(2)
    device.send(bytes(4000))  # more than fits: the chains go back to the ring
    for i in range(2):
        driver.receiveq.ring.desc[i].len = 1000
    driver.fill(2)


def wrong_event(flags: int, off_wrap: int = 0) -> Act:
    def act(driver: NetDriver, _: LintedDevice) -> None:
        driver.transmitq.ring.driver_event.set(off_wrap, flags)
        driver.transmit(frame())
    return act


def half_available(driver: NetDriver, _: LintedDevice) -> None:
    gpa = driver.memory.alloc(64)
    driver.transmitq.ring.desc[1].set(gpa, 30, USED, 1)
    driver.transmitq.ring.desc[0].set(gpa, 30, DESC_F_NEXT | AVAIL, 1)
    driver.transmitq.kick()


def head_outside(driver: NetDriver, _: LintedDevice) -> None:
    driver.transmitq.ring.offer(77)
    driver.transmitq.publish()
    driver.transmitq.kick()


READ = (None, 64, 0)
WRITE = (None, 64, DESC_F_WRITE)
NOWHERE = (1 << 50, 64, 0)

CASES = [
    Case("VQ-SPLIT-DR-03", PLAIN, by_hand(WRITE, READ)),
    Case("VQ-SPLIT-DR-05", PLAIN, loops),
    Case("VQ-SPLIT-DR-06", PLAIN | mask(Feature.IN_ORDER), links_to(3)),
    Case("VQ-SPLIT-DR-07", PLAIN, in_table(READ)),
    Case("VQ-SPLIT-DR-08", INDIRECT, in_table((None, 64, DESC_F_INDIRECT))),
    Case("VQ-SPLIT-DR-09", INDIRECT, in_table(*[READ] * 9)),
    Case("VQ-SPLIT-DR-10", INDIRECT, in_table(READ, flags=DESC_F_NEXT)),
    Case("VQ-SPLIT-DR-11", PLAIN, goes_back),
    Case("VQ-SPLIT-DR-11", PLAIN, goes_back_a_little, name="within"),
    Case("VQ-SPLIT-DR-12", PLAIN, flags_of_avail(2)),
    Case("VQ-SPLIT-DR-12", EVENTS, flags_of_avail(1), name="EVENT_IDX"),
    Case("VQ-SPLIT-DR-17", PLAIN, forgets_the_kick),
    Case("VQ-SPLIT-DR-18", EVENTS, forgets_the_kick),
    Case("CLEAN-DR-01", PLAIN, one_descriptor_twice, name="twice"),
    Case("CLEAN-DR-01", PLAIN, changes_a_buffer, name="changed"),
    Case("VQ-PACKED-DR-02", PACKED, half_available),
    Case("VQ-PACKED-DR-03", PACKED, changes_a_buffer),
    Case("VQ-PACKED-DR-05", PACKED, endless),
    Case("VQ-PACKED-DR-06", PACKED, by_hand(WRITE, READ)),
    Case("VQ-PACKED-DR-09", PACKED, in_table(READ)),
    Case("VQ-PACKED-DR-09", PACKED | INDIRECT, in_table((None, 64, 1 << 9)), name="flag"),
    Case("VQ-PACKED-DR-10", PACKED | INDIRECT, in_table(READ, more=1)),
    Case("LINT-EVENT", PACKED, wrong_event(2), name="no_event_idx"),
    Case("LINT-EVENT", PACKED | EVENTS, wrong_event(3), name="reserved_value"),
    Case("LINT-EVENT", PACKED | EVENTS, wrong_event(4), name="reserved_bit"),
    Case("LINT-EVENT", PACKED | EVENTS, wrong_event(2, 8), name="slot"),
    Case("LINT-KICK", PACKED, forgets_the_kick),
    Case("LINT-KICK", PACKED | EVENTS, forgets_the_kick, name="EVENT_IDX"),
    Case("LINT-HEAD", PLAIN, head_outside),
    Case("LINT-NEXT", PLAIN, links_to(77)),
    Case("LINT-TABLE", INDIRECT, in_table(READ, length=17)),
    Case("LINT-TABLE", PACKED | INDIRECT, in_table(READ, length=0), name="packed"),
    Case("LINT-ADDRESS", PLAIN, by_hand(NOWHERE)),
    Case("LINT-ADDRESS", PACKED, by_hand(NOWHERE), name="packed"),
    Case("LINT-TRANSMIT", PLAIN, by_hand(READ, WRITE)),
    Case("LINT-TRANSMIT", PLAIN, by_hand((None, 11, 0)), name="short"),
    Case("LINT-RECEIVE", PLAIN, lambda driver, device: (by_hand(READ, (None, 1536, DESC_F_WRITE), writes=True)(
        driver, device), device.send(frame()))),
    Case("NET-CFG-DR-06", PLAIN, sends(NetHeader(), bytes(1515)), (("mtu", 1500),)),
    Case("NET-TX-DR-02", PLAIN, sends(NetHeader(num_buffers=1))),
    Case("NET-TX-DR-03", PLAIN, sends(CSUM)),
    Case("NET-TX-DR-05", OFFLOADS, sends(replace(TCP, gso_type=GSO_UDP))),
    Case("NET-TX-DR-05", OFFLOADS, sends(replace(TCP, gso_type=9)), name="unknown"),
    Case("NET-TX-DR-05", OFFLOADS, sends(replace(TCP, gso_type=GSO_TCPV4 | GSO_ECN)), name="ecn"),
    Case("NET-TX-DR-06", PLAIN | mask(Feature.CSUM), sends(TCP)),
    Case("NET-TX-DR-07", OFFLOADS, sends(TCP, frame(0x90))),
    Case("NET-TX-DR-08", OFFLOADS | HOST_GSO, sends(TCP, frame(0x90))),
    Case("NET-TX-DR-10", OFFLOADS, sends(CSUM, frame()[:50] + b"\0\0" + frame()[52:])),
    Case("NET-TX-DR-11", OFFLOADS, sends(replace(CSUM, csum_start=50))),
    Case("NET-TX-DR-11", OFFLOADS, sends(replace(CSUM, csum_start=0)), name="ethernet"),
    Case("NET-TX-DR-12", OFFLOADS, sends(replace(TCP, gso_size=0))),
    Case("NET-TX-DR-12", OFFLOADS, sends(replace(TCP, flags=0)), name="flag"),
    Case("NET-TX-DR-13", OFFLOADS | mask(Feature.GUEST_HDRLEN), sends(replace(TCP, hdr_len=60))),
    Case("NET-TX-DR-14", OFFLOADS, sends(replace(TCP, hdr_len=53))),
    Case("NET-TX-DR-15", OFFLOADS, sends(NetHeader(DATA_VALID))),
    Case("NET-RXB-DR-01", mask(Feature.VERSION_1, Feature.GUEST_CSUM, Feature.GUEST_TSO4),
         lambda driver, device: (driver.fill(1), device.send(frame())), buffer_size=65561),
    Case("NET-RXB-DR-02", mask(Feature.VERSION_1), lambda driver, device: (driver.fill(1), device.send(frame())),
         buffer_size=1525),
    Case("NET-RXB-DR-03", PLAIN, lambda driver, device: (driver.fill(1), device.send(frame())), buffer_size=11),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(filter(None, (case.id, case.name))))
def test_rule(case: Case) -> None:
    with linted(case.features, buffer_size=case.buffer_size, **dict(case.config)) as (driver, device):
        case.act(driver, device)
        assert case.id in device.found, device.findings.evidence


def test_pieces_LINT_PIECES() -> None:
    with linted(PLAIN, size=2048) as (driver, device):
        gpa = driver.memory.alloc(2 * 1100)
        for i in range(1100):
            driver.transmitq.ring.desc[i].set(gpa + 2 * i, 1, DESC_F_NEXT if i < 1099 else 0, i + 1)
        driver.transmitq.ring.offer(0)
        driver.transmitq.publish()
        driver.transmitq.kick()
        assert "LINT-PIECES" in device.found


def test_a_disabled_queue_NET_MQ_DR_03() -> None:
    with linted(PLAIN) as (driver, device):
        device.detach()
        device.config.from_guest.enabled = False
        device.attach()
        driver.transmit(frame())
        assert device.found == {"NET-MQ-DR-03"}


FEATURE_SETS = {
    "plain": PLAIN,
    "all": INDIRECT | EVENTS | OFFLOADS | HOST_GSO | mask(Feature.GUEST_HDRLEN),
    "in_order": PLAIN | mask(Feature.IN_ORDER),
    "packed": PACKED,
    "packed_all": PACKED | INDIRECT | EVENTS | OFFLOADS,
    "large_buffers": mask(Feature.VERSION_1, Feature.GUEST_CSUM, Feature.GUEST_TSO4),
}


@pytest.mark.parametrize("features", FEATURE_SETS.values(), ids=FEATURE_SETS)
def test_an_honest_driver_is_clean(features: int) -> None:
    """Around the ring a few times, both ways, in all framings."""
    buffer_size = None if features & mask(Feature.MRG_RXBUF, Feature.GUEST_TSO4) else 1526
    with linted(features, buffer_size=buffer_size, mtu=1500) as (driver, device):
        driver.fill(3)
        for turn in range(10):
            direct = 1 if features & mask(Feature.INDIRECT_DESC) and not features & mask(Feature.RING_PACKED) else None
            framing = {"cuts": (12, 20), "direct": direct} if turn % 2 else {}
            driver.transmit(frame(), **framing)
            assert device.receive() is not None
            if features & mask(Feature.HOST_TSO4):
                driver.reclaim()
                driver.transmit(frame() + bytes(3000), TCP)
                assert device.receive() is not None
            driver.reclaim()
            device.send(frame())
            assert driver.receive_within(5).frame == frame()
            device.later(turn, turn + 0.9)
        device.later(100, 200)
        assert device.found == set(), device.findings.evidence
        assert device.findings.looked_at["frames"] >= 10


def test_a_late_kick_is_none_that_is_missing() -> None:
    with linted(PLAIN) as (driver, device):
        driver.offer(frame())
        driver.transmitq.publish()
        device.later(0, KICK_PATIENCE / 2)
        driver.transmitq.kick()
        device.later(KICK_PATIENCE, 2 * KICK_PATIENCE)
        assert device.found == set()


def test_leaving_and_coming_back_forgets_nothing_and_invents_nothing() -> None:
    with linted(PLAIN) as (driver, device):
        driver.fill(4)
        device.send(frame())
        device.detach()
        device.attach()
        device.send(frame())
        assert device.found == set()
        assert isinstance(device.lane, LintedLane)


def test_a_buffer_that_is_changed_says_which_and_how() -> None:
    with linted(PLAIN) as (driver, device):
        changes_a_buffer(driver, device)
        assert "descriptor 0 was" in device.findings.evidence.get("CLEAN-DR-01", "") and device.found


def test_buffers_of_several_descriptors_are_added_up() -> None:
    with linted(mask(Feature.VERSION_1)) as (driver, device):
        gpa = driver.memory.alloc(2000)
        driver.receiveq.add([Buffer(gpa, 1000, True), Buffer(gpa + 1000, 526, True)])
        driver.receiveq.submit()
        device.send(frame())
        assert device.found == set()
