"""The switch: its table, who gets what, and what becomes of the rest."""

import itertools
import os
import random
import socket

import pytest

from ring.driver import Buffer, Extent, GuestMemory
from ring.fabric import ADDRESSES, LIFETIME, MEMBERS, Fabric, FabricFull
from ring.pump import Lane, LaneConfig, LaneEvent, Pump
from vdev.net.features import Feature, mask
from vdev.testing.learning_switch import LearningSwitch
from vdev.testing.netdriver import NEEDS_CSUM, NetHeader
from vdev.testing.rig import USUAL
from vdev.testing.switched import BROADCAST, Station, frame, mac, switched
from vdev.testing.waiting import wait_until

PLAIN = USUAL & ~mask(Feature.MRG_RXBUF)
PACKED = mask(Feature.RING_PACKED)
IN_ORDER = mask(Feature.IN_ORDER)
SPLIT_AND_PACKED = pytest.mark.parametrize("ring", [0, PACKED], ids=["split", "packed"])


# ------------------------------------------------------------------------------------------------- table


@pytest.fixture
def fabric():
    made = Fabric(seed=7)
    yield made
    made.close()


def test_an_address_is_behind_who_sent_from_it_last(fabric):
    one, other = fabric.join(), fabric.join()
    assert fabric.find(mac(1)) is None
    one.learn(mac(1))
    assert fabric.find(mac(1)) == one.number
    other.learn(mac(1))
    assert (fabric.find(mac(1)), fabric.known) == (other.number, 1)


def test_a_group_address_is_never_learned(fabric):
    fabric.join().learn(BROADCAST)
    assert fabric.known == 0


def test_an_address_not_heard_of_is_forgotten_and_one_that_is_stays(fabric):
    member = fabric.join()
    member.learn(mac(1))
    member.learn(mac(2))
    for _ in range(LIFETIME - 1):
        fabric.tick()
    assert fabric.known == 2
    member.learn(mac(2))
    fabric.tick()
    assert (fabric.find(mac(1)), fabric.find(mac(2))) == (None, member.number)
    for _ in range(1000):  # far past the wrap of an epoch
        fabric.tick()
        member.learn(mac(2))
    assert fabric.known == 1


def test_what_is_behind_a_member_goes_with_it(fabric):
    one, other = fabric.join(), fabric.join()
    for n in range(100):
        (one if n % 2 else other).learn(mac(n))
    one.spread(0)
    assert {fabric.find(mac(n)) for n in range(100)} == {None, other.number}
    other.leave()
    assert fabric.known == 0


def test_the_table_is_bounded_and_the_latest_are_in_it(fabric):
    member = fabric.join()
    for n in range(3 * ADDRESSES):
        member.learn(mac(n))
        assert fabric.find(mac(n)) == member.number
    assert ADDRESSES // 2 < fabric.known <= ADDRESSES


def test_of_a_full_set_the_oldest_goes(fabric):
    """Stations heard since the last tick survive any number of made-up addresses; those that were not do not."""
    member, flooder = fabric.join(), fabric.join()
    stations = [mac(n) for n in range(64)]
    silent = [mac(n) for n in range(100, 164)]
    for address in [*silent, *stations]:
        member.learn(address)
    for number in range(3):
        fabric.tick()
        for station in stations:
            member.learn(station)
        for n in range(4 * ADDRESSES):
            flooder.learn(mac(1000 + number * 4 * ADDRESSES + n))
    assert all(fabric.find(station) == member.number for station in stations)
    assert not any(fabric.find(station) == member.number for station in silent)


def test_there_are_so_many_members_and_a_place_that_was_left_is_free(fabric):
    members = [fabric.join() for _ in range(MEMBERS)]
    with pytest.raises(FabricFull):
        fabric.join()
    members[5].leave()
    assert fabric.join().number == members[5].number


# ----------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("seed", range(4))
def test_random_traffic_goes_where_a_learning_switch_sends_it(seed):
    """Frames, moves, silence, members that go and come, in any order: the same receivers as the model's, the same
    bytes, and for each frame that reached nobody one reason."""
    rng = random.Random(seed)
    kinds = [USUAL, USUAL | PACKED, PLAIN, PLAIN | PACKED | IN_ORDER]
    addresses = [mac(n) for n in range(12)] + [BROADCAST, bytes.fromhex("333300000001"), bytes.fromhex("0180c2000000"),
                                               bytes.fromhex("0180c2000010")]
    with switched(*kinds) as (fabric, stations):
        model = LearningSwitch(LIFETIME)
        for station in stations:
            model.set_up(station.member.number, True)
        sent = 0
        for _ in range(1500):
            what = rng.random()
            station = rng.choice(stations)
            number = station.member.number
            if what < 0.9:
                if number not in model.up:
                    continue
                source = rng.choice(addresses) if rng.random() < 0.3 else mac(number)
                data = frame(rng.choice(addresses), source, rng.randbytes(rng.randrange(1, 1400)))
                wanted = model.forward(number, data)
                before = sum(station.from_guest.dropped.values())
                station.send(data, cuts=sorted(rng.sample(range(1, len(data)), rng.randrange(3))))
                sent += 1
                got = {each.member.number: each.received() for each in stations if each.member.number in model.up}
                assert {n: frames for n, frames in got.items() if frames} == {n: [data] for n in wanted}
                assert sum(station.from_guest.dropped.values()) - before == (not wanted)
            elif what < 0.95:
                fabric.tick()
                model.tick()
            elif number not in model.up:
                station.attach()
                model.set_up(number, True)
            elif what < 0.96:
                station.detach(down=True)
                model.set_up(number, False)
            assert fabric.known == len(model.stations)
        assert sent > 1000
        for station in stations:
            assert not station.to_guest.dropped


# --------------------------------------------------------------------------------------------- forwarding


@pytest.mark.parametrize("sends, gets", list(itertools.product(
    [PLAIN, PLAIN | PACKED, PLAIN | IN_ORDER, PLAIN | PACKED | IN_ORDER],
    [PLAIN, PLAIN | PACKED, USUAL, USUAL | PACKED, USUAL | IN_ORDER, USUAL | PACKED | IN_ORDER])))
def test_frames_of_any_shape_arrive_as_they_were_sent(sends, gets):
    rng = random.Random(3)
    with switched(sends, gets) as (_, (one, other)):
        for length in (60, 61, 1513, 1514):
            frames = [frame(1, 0, rng.randbytes(length - 14)) for _ in range(20)]
            one.send(*frames[:10])
            one.send(*frames[10:], cuts=[5, 12, 30])
            assert other.received() == frames
        assert one.from_guest.frames == other.to_guest.frames == 80
        assert one.from_guest.bytes == other.to_guest.bytes
        assert other.to_guest.bursts <= 8  # a batch at a time, not a frame


@SPLIT_AND_PACKED
@pytest.mark.parametrize("length", [1515, 4000, 9000, 65535])
def test_a_long_frame_is_spread_over_mergeable_buffers(ring, length):
    data = frame(1, 0, random.Random(length).randbytes(length - 14))
    with switched(USUAL | ring, USUAL | ring) as (_, (one, other)):
        one.send(data, cuts=[12, 700])
        assert other.received() == [data]


@SPLIT_AND_PACKED
def test_a_frame_too_long_for_the_buffers_is_counted(ring):
    with switched(PLAIN | ring, PLAIN | ring) as (_, (one, other)):
        one.send(frame(1, 0, length=1515), frame(1, 0, b"fits"))
        assert other.received() == [frame(1, 0, b"fits")]
        assert other.to_guest.dropped == {"too_small": 1}


@SPLIT_AND_PACKED
def test_a_flood_reaches_everybody_once(ring):
    with switched(*[USUAL | ring] * 7) as (_, stations):
        stations[3].send(frame(BROADCAST, 3))
        assert [station.received() for station in stations] == [[frame(BROADCAST, 3)]] * 3 + [[]] + [
            [frame(BROADCAST, 3)]] * 3


def test_an_announced_address_is_known_without_a_frame():
    with switched(USUAL, USUAL, USUAL) as (_, (one, other, third)):
        other.member.learn(mac(1))
        one.send(frame(1, 0))
        assert (len(other.received()), third.received()) == (1, [])


def test_the_header_says_what_was_sent_and_what_was_negotiated():
    """A guest's checksum is still due at the receiver, flags nobody knows are gone."""
    offloads = mask(Feature.CSUM, Feature.GUEST_CSUM)
    with switched(USUAL | offloads, USUAL | offloads) as (_, (one, other)):
        one.send(frame(1, 0), header=NetHeader(flags=NEEDS_CSUM | 0xF0, csum_start=34, csum_offset=6, num_buffers=9))
        got = other.driver.receive()
        assert got.header == NetHeader(flags=NEEDS_CSUM, csum_start=34, csum_offset=6, num_buffers=1)


# ------------------------------------------------------------------------------------------------- losses


def test_each_lost_frame_is_counted_once_and_says_why():
    with switched(USUAL, USUAL) as (_, (one, other)):
        one.send(frame(1, 0)[:13])
        one.send(frame(1, BROADCAST))
        one.send(frame(bytes.fromhex("0180c200000e"), 0))  # LLDP stays on its link
        other.send(frame(BROADCAST, 1))
        one.send(frame(0, 0))  # to itself
        assert one.from_guest.dropped == {"bad_length": 1, "filtered": 3}
        one.send(frame(1, 0), header=NetHeader(gso_type=1, gso_size=1000))
        assert one.from_guest.dropped == {"bad_header": 1, "bad_length": 1, "filtered": 3}
        other.detach(down=True)
        one.send(frame(1, 0))
        assert one.from_guest.dropped == {"bad_header": 1, "bad_length": 1, "filtered": 3, "no_receiver": 1}
        assert one.from_guest.frames == 0


@SPLIT_AND_PACKED
def test_a_stopped_receiver_holds_nobody_up(ring):
    """One never posts a buffer: what is for it is counted there, and everybody else gets all."""
    with switched(USUAL | ring, USUAL | ring) as (fabric, (one, other)):
        stopped = Station(fabric, features=USUAL | ring, buffers=0)
        try:
            for n in range(50):
                one.send(*[frame(BROADCAST, 0, bytes([n, i])) for i in range(20)])
                assert len(other.received()) == 20
            assert stopped.to_guest.dropped == {"no_buffers": 1000}
            assert other.to_guest.dropped == {}
            stopped.driver.fill(5)
            one.send(*[frame(BROADCAST, 0, bytes([i])) for i in range(7)])
            assert len(stopped.received(refill=False)) == 5
            assert stopped.to_guest.dropped == {"no_buffers": 1002}
        finally:
            stopped.close()


@SPLIT_AND_PACKED
def test_a_receiver_that_is_paused_loses_its_own_frames_only(ring):
    with switched(USUAL | ring, USUAL | ring, USUAL | ring) as (_, (one, other, third)):
        other.detach()
        one.send(*[frame(BROADCAST, 0, bytes([i])) for i in range(9)])
        assert len(third.received()) == 9
        other.attach()
        assert other.received() == []
        assert other.to_guest.dropped == {"stopped": 9}
        one.send(frame(BROADCAST, 0))
        assert len(other.received()) == 1


@SPLIT_AND_PACKED
def test_a_bad_chain_of_a_receiver_goes_back_and_the_next_one_is_taken(ring):
    with switched(USUAL | ring, USUAL | ring, buffers=0) as (_, (one, other)):
        outside = other.memory.regions[-1].gpa + (1 << 40)
        other.driver.receiveq.add([Buffer(outside, 100, True)])
        other.driver.receiveq.publish()
        other.driver.fill(2)
        one.send(frame(1, 0))
        assert other.to_guest.bad_chains == 1
        assert other.driver.receiveq.collect().written == 0
        assert other.received() == [frame(1, 0)]


def test_a_receiver_whose_ring_broke_says_so_and_nobody_else_notices():
    with switched(USUAL, USUAL, USUAL) as (_, (one, other, third)):
        other.driver.receiveq.ring.avail.idx = (other.driver.receiveq.ring.used.idx + 1000) & 0xFFFF
        for _ in range(70):  # until what was known of before is used up
            one.send(frame(BROADCAST, 0))
            assert len(third.received()) == 1
        assert other.events() == LaneEvent.TO_GUEST_BROKEN
        assert other.to_guest.dropped.keys() == {"stopped"}


# ----------------------------------------------------------------------------------------- several queues


def udp(n: int, sequence: int, tag: bytes = b"") -> bytes:
    """Packet ``sequence`` of flow ``n``: IPv4 UDP from a port of its own."""
    data = sequence.to_bytes(4, "big")
    ports = (1000 + n).to_bytes(2, "big") + (53).to_bytes(2, "big")
    packet = (bytes.fromhex("45000030000000004011 0000 0a000001 0a000002") + ports + b"\0\x1c\0\0" + data)
    return mac(1) + mac(0) + tag + b"\x08\0" + packet.ljust(60, b"\0")


@SPLIT_AND_PACKED
@pytest.mark.parametrize("tag", [b"", bytes.fromhex("81000005"), bytes.fromhex("88a8000281000005")],
                         ids=["untagged", "vlan", "qinq"])
def test_flows_are_spread_over_queues_and_each_stays_in_order(ring, tag):
    with switched(USUAL | ring, USUAL | ring, pairs=4, size=128) as (_, (one, other)):
        flows = 40
        at = 12 + len(tag) + 2 + 20
        seen: dict[int, set[int]] = {}
        order: dict[int, list[int]] = {}
        for start in range(0, 30, 3):
            one.send(*[udp(n, start + i, tag) for i in range(3) for n in range(flows)])
            arrived = [(pair, data) for pair in range(4) for data in other.received(pair)]
            for pair, data in arrived:
                port = int.from_bytes(data[at:at + 2], "big")
                seen.setdefault(port, set()).add(pair)
                order.setdefault(port, []).append(int.from_bytes(data[at + 8:at + 12], "big"))
        assert len(seen) == flows and all(len(pairs) == 1 for pairs in seen.values())
        assert len(set.union(*seen.values())) == 4
        assert all(numbers == list(range(30)) for numbers in order.values())


def test_fragments_of_a_datagram_stay_together():
    first, later = bytearray(udp(1, 0)), bytearray(udp(2, 1))  # what stands at the ports is payload in the second
    first[20] |= 0x20
    later[21] = 5
    with switched(USUAL, USUAL, pairs=8) as (_, (one, other)):
        one.send(bytes(first), bytes(later))
        assert sorted(len(other.received(pair)) for pair in range(8)) == [0] * 7 + [2]


# ------------------------------------------------------------------------------------ memory that vanishes


TWO = [Extent(0, 8 << 20, uva=1 << 40), Extent(1 << 30, 1 << 20, uva=1 << 41)]


@SPLIT_AND_PACKED
@pytest.mark.parametrize("what", ["rings", "buffer", "header"])
def test_memory_of_a_receiver_vanishes_and_the_others_get_their_frames(ring, what):
    with switched(USUAL | ring, USUAL | ring) as (fabric, (one, third)), GuestMemory(extents=TWO) as memory:
        other = Station(fabric, features=USUAL | ring, memory=memory, buffers=0)
        try:
            kept, apart = memory.alloc(4096), memory.alloc(4096, region=1)
            parts = {"buffer": (kept, apart), "header": (apart, kept), "rings": (kept, apart)}[what]
            other.driver.receiveq.add([Buffer(parts[0], 12, True), Buffer(parts[1], 4000, True)])
            other.driver.receiveq.publish()
            memory.truncate(region=0 if what == "rings" else 1)
            one.send(*[frame(BROADCAST, 0, bytes([i])) for i in range(5)])
            assert len(third.received()) == 5
            assert other.events() == LaneEvent.MEMORY_GONE
            assert other.side.owner.gone and not one.side.owner.gone and not third.side.owner.gone
            assert other.to_guest.dropped == {"stopped": 5}
            one.send(frame(BROADCAST, 0))
            assert len(third.received()) == 1
        finally:
            other.close()


@SPLIT_AND_PACKED
def test_memory_of_a_sender_vanishes_in_the_middle_and_the_receiver_goes_on(ring):
    """The frames before the one that cannot be read arrive; of that one nothing is left in the receiver's ring."""
    with switched(USUAL | ring, USUAL | ring) as (fabric, (third, other)), GuestMemory(extents=TWO) as memory:
        one = Station(fabric, features=USUAL | ring, memory=memory)
        try:
            head, apart = memory.alloc(100), memory.alloc(4096, region=1)
            memory.write(head, bytes(12) + frame(BROADCAST, 2))
            one.driver.offer(frame(BROADCAST, 2, b"before"))
            one.driver.transmitq.add([Buffer(head, 26), Buffer(apart, 3000)])
            one.driver.offer(frame(BROADCAST, 2, b"after"))
            memory.truncate(region=1)
            one.driver.transmitq.submit()
            assert one.events() == LaneEvent.MEMORY_GONE
            assert one.side.owner.gone and not other.side.owner.gone
            assert third.received() == [frame(BROADCAST, 2, b"before")]
            later = [frame(1, 0, bytes([i])) for i in range(60)]
            third.send(*later)
            assert other.received() == later
            other.send(*[data[6:12] + data[:6] + data[12:] for data in later])
            assert len(third.received()) == len(later)
            assert not other.lanes[0].events() and not third.lanes[0].events()
        finally:
            one.close()


# -------------------------------------------------------------------------------------------------- uplink


class Wire:
    """An uplink whose descriptor is one end of a socket pair; ``far`` is the other."""

    def __init__(self, fabric: Fabric, header: int = 12) -> None:
        self.near, self.far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        self.report = os.eventfd(0, os.EFD_NONBLOCK)
        self.member, self.lane, self.pump = fabric.join(uplink=True), Lane(self.report), Pump()
        self.config = LaneConfig(member=self.member, door=0, to_port=self.near.fileno(), from_port=self.near.fileno(),
                                 port_header=header)
        self.lane.configure(self.config)
        self.member.spread(1)
        self.pump.attach(self.lane)

    def close(self) -> None:
        self.pump.detach(self.lane, 5000)
        self.lane.close()
        self.pump.close()
        self.member.leave()
        self.near.close()
        self.far.close()
        os.close(self.report)


@pytest.fixture
def uplinked():
    with switched(USUAL, USUAL | PACKED) as (fabric, stations):
        wire = Wire(fabric)
        yield wire, *stations
        wire.close()


def test_an_uplink_gets_what_is_for_it_and_its_frames_are_forwarded(uplinked):
    wire, one, other = uplinked
    header = NetHeader(flags=0)
    wire.far.send(header.pack() + frame(BROADCAST, 9, b"from afar"))
    for station in (one, other):
        wait_until(lambda: station.to_guest.frames, "the frame did not come")  # noqa: B023
        assert station.received() == [frame(BROADCAST, 9, b"from afar")]
    one.send(frame(9, 0, b"back", 5000), cuts=[30, 1000])
    assert wire.far.recv(1 << 17) == header.pack() + frame(9, 0, b"back", 5000)
    assert other.received() == []
    assert [flow.frames for flow in wire.lane.stats()] == [1, 1]


def test_an_uplink_that_takes_no_more_loses_frames_and_holds_nobody_up(uplinked):
    wire, one, other = uplinked
    for _ in range(30):
        one.send(*[frame(BROADCAST, 0, length=1400) for _ in range(20)])
        assert len(other.received()) == 20
    came, went = wire.lane.stats()
    assert went.dropped.keys() == {"no_buffers"}
    assert went.frames + went.dropped["no_buffers"] == 600


def test_an_uplink_that_is_gone_is_reported(uplinked):
    wire, one, other = uplinked
    wire.far.close()
    wait_until(lambda: wire.lane.events() & LaneEvent.PORT_GONE, "nobody said that it is gone")
    one.send(frame(BROADCAST, 0))
    assert len(other.received()) == 1
    assert wire.lane.stats()[1].dropped == {"no_port": 1}


def test_many_frames_at_once_from_an_uplink_arrive_in_order(uplinked):
    wire, one, other = uplinked
    other.send(frame(BROADCAST, 1))
    got = []
    for start in range(0, 2000, 10):
        for n in range(start, start + 10):
            wire.far.send(bytes(12) + frame(1, 9, n.to_bytes(2, "big"), 60 + n % 1400))
        wait_until(lambda: other.to_guest.frames == start + 10, "frames are missing")  # noqa: B023
        got += other.received()
    assert [int.from_bytes(data[14:16], "big") for data in got] == list(range(2000))
