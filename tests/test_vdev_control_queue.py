"""vdev/control_queue.py: a driver's commands, from its ring to their effect on configuration space and frames."""

import struct
import time

import pytest

from ring.driver import Buffer
from vdev.net.features import Feature, mask
from vdev.testing.full_guest import BROADCAST, GROUP, OTHER, OWN, PLAIN, FullGuest, frame, gets, served
from vdev.testing.netdriver import NetHeader
from vdev.testing.served import ServedDevice
from vdev.testing.waiting import wait_until
from vhost_user.spec import BackendRequest

row = pytest.mark.row

F = Feature
OK, ERR = 0, 1
RX, MAC, VLAN, ANNOUNCE, MQ, OFFLOADS, STATS = 0, 1, 2, 3, 4, 5, 8
FILTERS = PLAIN | mask(F.CTRL_RX, F.CTRL_RX_EXTRA, F.CTRL_MAC_ADDR, F.CTRL_VLAN, F.MAC)


# --------------------------------------------------------------------------------------------- the queue itself


@row("NET-CVQ-D-01", "NET-CVQ-D-03", "NET-VQ-D-01")
@pytest.mark.parametrize("features", [0, mask(F.RING_PACKED), mask(F.EVENT_IDX, F.INDIRECT_DESC),
                                      mask(F.RING_PACKED, F.IN_ORDER)], ids=["split", "packed", "event", "in-order"])
@pytest.mark.parametrize("pairs", [1, 3])
@pytest.mark.parametrize("mq", [0, mask(F.MQ)], ids=["one", "mq"])
def test_commands_are_acknowledged_whatever_the_ring(features, pairs, mq) -> None:
    with served(pairs, PLAIN | features | mq | mask(F.CTRL_RX)) as (device, guest):
        for n in range(100):
            assert guest.command(RX, 0, bytes([n % 2])) == (OK, b"")
        assert guest.command(RX, 0, b"\2") == (ERR, b"")
        assert gets(device, guest, frame(OTHER)) == [frame(OTHER)]


@row("NET-CVQ-D-01")
@pytest.mark.parametrize("cuts", [(1,), (2,), (1, 2), (1, 2, 3, 4, 5, 6, 7), (7,)])
def test_a_command_may_be_cut_anywhere(cuts) -> None:
    with served(features=FILTERS) as (_, guest):
        assert guest.command(MAC, 1, OWN, cuts=cuts) == (OK, b"")
        assert guest.config[:6] == OWN


@pytest.mark.parametrize(("kind", "number", "data"), [
    (255, 0, b""), (MAC, 9, b""), (MAC, 1, b""), (MAC, 1, bytes(5)), (MAC, 1, OWN + b"\0"), (MAC, 1, GROUP),
    (MAC, 0, b"\xff\xff\xff\xff"), (MAC, 0, struct.pack("<I", 2) + OWN), (MQ, 0, b"\1\0"), (STATS, 0, b"")])
def test_command_that_makes_no_sense_changes_nothing_and_is_spoken_of_once(kind, number, data) -> None:
    with served(features=FILTERS) as (device, guest):
        before = guest.config
        for _ in range(3):
            assert guest.command(kind, number, data) == (ERR, b"")
        assert guest.config == before
        assert len(device.lines("command-refused")) == 1
        assert guest.command(MAC, 1, OWN) == (OK, b"")


def test_command_that_is_too_long_or_has_no_class() -> None:
    with served(features=FILTERS) as (_, guest):
        assert guest.command(MAC, 0, bytes(100_000)) == (ERR, b"")
        guest.control.post(readable=[b"\0"], writable=[1])
        guest.control.submit()
        assert guest.control.wait(5)
        assert guest.control.collect().data == bytes([ERR])


def test_command_without_room_for_its_acknowledgement_is_not_executed() -> None:
    with served(features=FILTERS) as (device, guest):
        before = guest.config
        guest.control.post(readable=[bytes([MAC, 1]) + OWN])
        guest.control.submit()
        assert guest.control.wait(5)
        assert guest.control.collect().written == 0
        assert guest.config == before
        assert "no room" in device.wait_for("command-refused")


def test_chain_that_cannot_be_followed_goes_back_and_the_queue_goes_on() -> None:
    with served(features=FILTERS) as (device, guest):
        guest.control.add([Buffer(1 << 50, 8), Buffer(1 << 50, 1, writable=True)])
        guest.control.submit()
        assert guest.control.wait(5)
        assert guest.control.ring.next_completion()[1] == 0
        assert "cannot be followed" in device.wait_for("command-refused")
        assert guest.command(MAC, 1, OWN) == (OK, b"")


def test_index_that_goes_back_stops_the_queue_and_nothing_else() -> None:
    with served(features=FILTERS) as (device, guest):
        guest.control.ring.avail.idx = 0x8000
        guest.control.kick()
        assert "the control queue stopped" in device.wait_for("ring-broken")
        assert gets(device, guest, frame(BROADCAST)) == [frame(BROADCAST)]


def test_many_commands_at_once() -> None:
    with served(features=FILTERS) as (_, guest):
        for n in range(20):
            guest.control.post(readable=[bytes([MAC, 1]) + OWN[:5] + bytes([n])], writable=[1])
        guest.control.submit()
        assert guest.control.wait(10, 20)
        assert [done.data for done in guest.control.collect_all()] == [bytes([OK])] * 20
        assert guest.config[:6] == OWN[:5] + bytes([19])


def test_control_queue_that_is_polled() -> None:
    with served(features=FILTERS) as (_, guest):
        index = max(guest.rings)
        guest.front_end.set_vring_kick(index, None)
        assert guest.command(MAC, 1, OWN) == (OK, b"")
        time.sleep(0)
        assert guest.command(MAC, 1, OTHER) == (OK, b"")


# --------------------------------------------------------------------------------------------- what is let in


@row("NET-MAC-D-02", "NET-MAC-D-03", "NET-MAC-D-04")
def test_address_is_the_drivers_when_it_is_acknowledged() -> None:
    with served(features=FILTERS) as (device, guest):
        first = guest.config[:6]
        assert gets(device, guest, frame(first), frame(OWN), frame(OTHER)) == [frame(first)]
        assert guest.command(MAC, 1, OWN) == (OK, b"")
        assert guest.config[:6] == OWN
        assert gets(device, guest, frame(first), frame(OWN), frame(OTHER)) == [frame(OWN)]


def table(unicast: list[bytes], multicast: list[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(each)) + b"".join(each) for each in (unicast, multicast))


@row("NET-MAC-D-01", "NET-MAC-D-05")
def test_tables_of_addresses_are_let_in_until_a_reset() -> None:
    with served(features=FILTERS) as (device, guest):
        assert guest.command(MAC, 0, table([OTHER], [GROUP])) == (OK, b"")
        assert gets(device, guest, frame(OTHER), frame(GROUP), frame(OWN)) == [frame(OTHER), frame(GROUP)]
        guest.reset()
        assert gets(device, guest, frame(OTHER), frame(GROUP)) == []


@row("NET-RXF-D-01", "NET-RXF-D-02", "NET-RXF-D-03", "NET-RXF-D-04", "NET-RXF-D-05", "NET-RXF-D-07")
def test_receive_modes() -> None:
    with served(features=FILTERS) as (device, guest):
        own = guest.config[:6]
        all_frames = [frame(own), frame(OTHER), frame(GROUP)]
        for number, wanted in ((0, all_frames), (1, [all_frames[0], all_frames[2]]), (2, all_frames[:2]), (4, [])):
            assert guest.command(RX, number, b"\1") == (OK, b"")
            assert gets(device, guest, *all_frames) == wanted
            assert guest.command(RX, number, b"\0") == (OK, b"")
            assert gets(device, guest, *all_frames) == all_frames[:1]


@row("NET-VLAN-D-01", "NET-VLAN-D-02", "NET-VLAN-D-03", "NET-VLAN-D-04")
def test_vlans_are_let_in_one_by_one() -> None:
    tagged = [frame(BROADCAST, vlan=vlan) for vlan in (0, 1, 100, 4094)]
    with served(features=PLAIN) as (device, guest):
        assert gets(device, guest, *tagged) == tagged
    with served(features=FILTERS) as (device, guest):
        assert gets(device, guest, *tagged, frame(BROADCAST)) == [frame(BROADCAST)]
        assert guest.command(VLAN, 0, struct.pack("<H", 100)) == (OK, b"")
        assert gets(device, guest, *tagged) == [tagged[2]]
        assert guest.command(VLAN, 1, struct.pack("<H", 100)) == (OK, b"")
        assert gets(device, guest, *tagged) == []


# ------------------------------------------------------------------------------------------------ queue pairs


def flows(count: int) -> list[bytes]:
    """IPv4 UDP frames that differ in their source port."""
    ip = bytes.fromhex("4500 0020 0000 0000 4011 0000 0a000001 0a000002")
    return [(BROADCAST + OTHER + b"\x08\x00" + ip + struct.pack(">HHHH", 1000 + n, 9, 12, 0)).ljust(60, b"\0")
            for n in range(count)]


def spread(device: ServedDevice, guest: FullGuest, frames: list[bytes]) -> list[int]:
    """How many of them come to each pair."""
    for one in frames:
        device.port.wire[0].send(NetHeader().pack() + one)
    counts = [0] * len(guest.drivers)
    deadline = time.monotonic() + 10
    while sum(counts) < len(frames) and time.monotonic() < deadline:
        for number, driver in enumerate(guest.drivers):
            counts[number] += driver.receive_within(0.01) is not None
    assert sum(counts) == len(frames)
    return counts


@row("NET-MQ-D-02", "NET-MQ-D-03", "NET-MQ-D-06", "NET-MQ-D-07", "NET-MQ-DR-02")
def test_as_many_pairs_get_frames_as_the_driver_asks_for() -> None:
    with served(4, PLAIN | mask(F.MQ)) as (device, guest):
        frames = flows(60)
        assert spread(device, guest, frames) == [60, 0, 0, 0]
        assert guest.command(MQ, 0, struct.pack("<H", 4)) == (OK, b"")
        assert all(spread(device, guest, frames))
        for wrong in (0, 5, 0xFFFF):
            assert guest.command(MQ, 0, struct.pack("<H", wrong)) == (ERR, b"")
        assert guest.command(MQ, 0, struct.pack("<H", 2)) == (OK, b"")
        counts = spread(device, guest, frames)
        assert counts[0] and counts[1] and not counts[2] and not counts[3]


def rss(types: int, entries: list[int], unclassified: int = 0, key: bytes = bytes(range(40))) -> bytes:
    return struct.pack(f"<IHH{len(entries)}HHB", types, len(entries) - 1, unclassified, *entries, 1, len(key)) + key


@row("NET-RSS-D-01", "NET-RSS-D-02", "NET-RSS-D-04", "NET-MQ-D-01", "NET-MQ-D-02")
def test_rss_selects_the_receiveq() -> None:
    with served(3, PLAIN | mask(F.MQ, F.RSS)) as (device, guest):
        frames = flows(40)
        assert guest.command(MQ, 1, rss(0x3F, [2] * 128, unclassified=1)) == (OK, b"")
        assert spread(device, guest, [*frames, frame(BROADCAST)]) == [0, 1, 40]
        assert guest.command(MQ, 1, rss(0x3F, [0, 1])) == (OK, b"")
        counts = spread(device, guest, frames)
        assert counts[0] and counts[1] and not counts[2]
        assert guest.command(MQ, 0, struct.pack("<H", 1)) == (OK, b"")
        assert spread(device, guest, frames) == [40, 0, 0]


@row("NET-HASH-D-01", "NET-HASH-D-02", "NET-HASH-D-03", "NET-HASH-D-09")
def test_hash_is_reported_once_it_is_configured() -> None:
    with served(1, PLAIN | mask(F.HASH_REPORT)) as (device, guest):
        one = flows(1)[0]

        def reported() -> tuple[int, int]:
            device.port.wire[0].send(NetHeader().pack() + one)
            received = guest.drivers[0].receive_within(5)
            assert received.frame == one
            return received.hash_report, received.hash_value

        assert reported() == (0, 0)
        assert guest.command(MQ, 2, struct.pack("<I8xB", 0x4, 40) + bytes(range(40))) == (OK, b"")
        kind, value = reported()
        assert (kind, value != 0) == (3, True)  # VIRTIO_NET_HASH_REPORT_UDPv4


# -------------------------------------------------------------------------------------------------- the rest


@row("NET-OFL-D-01", "NET-OFL-D-02", "NET-OFL-DR-01")
def test_offloads_that_the_driver_switches_off_are_not_used() -> None:
    features = PLAIN | mask(F.CTRL_GUEST_OFFLOADS, F.GUEST_CSUM)
    one = flows(1)[0]
    header = NetHeader(flags=1, csum_start=34, csum_offset=6)  # VIRTIO_NET_HDR_F_NEEDS_CSUM
    with served(1, features) as (device, guest):
        def flags() -> int:
            device.port.wire[0].send(header.pack() + one)
            return guest.drivers[0].receive_within(5).header.flags

        assert flags() == 1
        assert guest.command(OFFLOADS, 0, struct.pack("<Q", 0)) == (OK, b"")
        assert flags() == 0
        assert guest.command(OFFLOADS, 0, struct.pack("<Q", mask(F.GUEST_TSO4))) == (ERR, b"")
        assert guest.command(OFFLOADS, 0, struct.pack("<Q", mask(F.GUEST_CSUM))) == (OK, b"")
        assert flags() == 1


@row("NET-ANN-D-01", "NET-ANN-D-02")
def test_announcement_is_asked_for_until_it_is_acknowledged() -> None:
    with served(1, PLAIN | mask(F.STATUS, F.GUEST_ANNOUNCE)) as (device, guest):
        device.call(lambda: device.device._connection._backend.control.ask_to_announce())
        assert guest.front_end.backend_channel.receive().request == BackendRequest.CONFIG_CHANGE_MSG
        assert guest.config[6] == 3
        assert guest.command(ANNOUNCE, 0, b"\0") == (ERR, b"")
        assert guest.config[6] == 3
        assert guest.command(ANNOUNCE, 0) == (OK, b"")
        assert guest.config[6] == 1


@row("NET-STAT-D-01", "NET-STAT-D-06", "NET-STAT-D-07", "NET-STAT-D-09", "NET-STAT-D-10", "NET-CVQ-D-02")
def test_statistics() -> None:
    with served(1, PLAIN | mask(F.DEVICE_STATS)) as (device, guest):
        assert gets(device, guest, frame(BROADCAST), frame(BROADCAST)) == [frame(BROADCAST)] * 2
        assert guest.command(STATS, 0, reply=20) == (OK, struct.pack("<Q", 7 | 3 << 16 | 1 << 32))

        def get(index: int, types: int, room: int = 100) -> tuple[int, bytes]:
            return guest.command(STATS, 1, struct.pack("<H6xQ", index, types), reply=room)

        ack, reply = get(0, 1)
        kind, index, size, *counters = struct.unpack("<BxHxxH6Q", reply)
        assert (ack, kind, index, size) == (OK, 0, 0, 56)
        assert counters[1:3] == [3, 180]
        assert get(0, 1, room=20) == (OK, reply[:20])
        first = struct.unpack("<BxHxxH2Q", get(2, 1 << 32)[1])
        second = struct.unpack("<BxHxxH2Q", get(2, 1 << 32)[1])
        assert [b - a for a, b in zip(first[3:], second[3:], strict=True)] == [1, 1]


# ----------------------------------------------------------------------------------------------- coalescing

COALESCING = 6
BY_DEVICE, BY_QUEUE = mask(F.NOTF_COAL), mask(F.VQ_NOTF_COAL)


def coal(packets: int, usecs: int) -> bytes:
    return struct.pack("<II", packets, usecs)


def of_queue(index: int, packets: int = 0, usecs: int = 0, reserved: int = 0) -> bytes:
    return struct.pack("<HH", index, reserved) + coal(packets, usecs)


@row("NET-COAL-D-01", "NET-COAL-D-04")
def test_the_last_command_about_a_queue_holds() -> None:
    with served(2, PLAIN | mask(F.MQ) | BY_DEVICE | BY_QUEUE) as (_, guest):
        def every() -> list[bytes]:
            answers = [guest.command(COALESCING, 3, of_queue(index)[:4], reply=8) for index in range(4)]
            assert {ack for ack, _ in answers} == {OK}
            return [reply for _, reply in answers]

        assert every() == [bytes(8)] * 4
        assert guest.command(COALESCING, 0, coal(10, 20)) == (OK, b"")
        assert every() == [bytes(8), coal(10, 20)] * 2
        assert guest.command(COALESCING, 2, of_queue(1, 5, 6, reserved=7)) == (OK, b"")
        assert guest.command(COALESCING, 1, coal(30, 40)) == (OK, b"")
        assert every() == [coal(30, 40), coal(5, 6), coal(30, 40), coal(10, 20)]
        assert guest.command(COALESCING, 0, coal(1, 2)) == (OK, b"")
        assert every() == [coal(30, 40), coal(1, 2)] * 2


@row("NET-COAL-D-07", "NET-COAL-DR-01")
def test_queue_that_is_not_there_is_refused() -> None:
    with served(2, PLAIN | mask(F.MQ) | BY_QUEUE) as (_, guest):
        for index in (4, 5, 0xFFFF):
            assert guest.command(COALESCING, 2, of_queue(index, 1, 1)) == (ERR, b"")
            assert guest.command(COALESCING, 3, of_queue(index), reply=8) == (ERR, b"")
        assert guest.command(COALESCING, 0, coal(1, 1)) == (ERR, b"")
        guest.front_end.set_vring_enable(2, False)
        assert guest.command(COALESCING, 2, of_queue(2, 1, 1)) == (ERR, b"")


@row("NET-COAL-D-02", "NET-COAL-D-03", "NET-COAL-D-12")
def test_driver_is_called_when_enough_frames_have_come_together() -> None:
    with served(1, PLAIN | BY_DEVICE) as (device, guest):
        queue = guest.drivers[0].receiveq
        assert guest.command(COALESCING, 1, coal(8, 60_000_000)) == (OK, b"")
        queue.called()
        for _ in range(7):
            device.port.wire[0].send(NetHeader().pack() + frame(BROADCAST))
        until(lambda: queue.ring.used.idx == 7)
        assert not queue.called()
        device.port.wire[0].send(NetHeader().pack() + frame(BROADCAST))
        until(queue.called)
        device.port.wire[0].send(NetHeader().pack() + frame(BROADCAST))
        until(lambda: queue.ring.used.idx == 9)
        assert not queue.called()
        assert guest.command(COALESCING, 1, coal(0, 0)) == (OK, b"")
        until(queue.called)


@row("NET-STAT-D-03", "NET-STAT-D-04", "NET-STAT-D-11", "NET-STAT-D-12")
def test_statistics_of_checksums_need_checksums() -> None:
    one = flows(1)[0]
    with served(1, PLAIN | mask(F.DEVICE_STATS, F.GUEST_CSUM)) as (device, guest):
        for flags in (0, 1, 1, 2):
            device.port.wire[0].send(NetHeader(flags=flags, csum_start=34, csum_offset=6).pack() + one)
            assert guest.drivers[0].receive_within(5).frame[:14] == one[:14]
        ack, reply = guest.command(STATS, 1, struct.pack("<H6xQ", 0, 2), reply=100)
        assert (ack, struct.unpack("<BxHxxH4Q", reply)) == (OK, (1, 0, 40, 1, 2, 1, 0))
        for index, types in ((0, 4), (0, 1 << 16), (1, 1), (0, 1 << 63), (1, 1 << 17), (9, 1)):
            assert guest.command(STATS, 1, struct.pack("<H6xQ", index, types), reply=100) == (ERR, b"")
        both = struct.pack("<H6xQH6xQ", 0, 1, 0, 1 << 40)
        assert guest.command(STATS, 1, both, reply=100) == (ERR, b"")


def until(condition) -> None:
    wait_until(condition, "what a frame or a command brings about")
