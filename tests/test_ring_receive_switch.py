"""What a driver has set about what it receives, at the switch that delivers to it: who gets a frame, on which receiveq,
behind which header."""

import itertools
import random
import threading

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Dot1Q, Ether
from scapy.layers.inet import UDP

from ring.pump import HeaderStats
from ring.receive_settings import ALL_HASH_TYPES, HashType, ReceiveSettings
from vdev.net.features import GUEST_GSO, Feature, mask
from vdev.testing.netdriver import GSO_TCPV4, NEEDS_CSUM, NetHeader, Received
from vdev.testing.receive_model import hash_of, queue_of, refused
from vdev.testing.rig import USUAL
from vdev.testing.switched import BROADCAST, Station, frame, mac, switched
from vdev.testing.waiting import wait_until

PACKED = mask(Feature.RING_PACKED)
HASH_REPORT = mask(Feature.HASH_REPORT)
FORMATS = pytest.mark.parametrize("ring", [0, PACKED], ids=["split", "packed"])
KEY = bytes(range(1, 41))


def settle(station: Station, settings: ReceiveSettings | None, doors: tuple[int, ...] = (0,)) -> None:
    """Have ``station`` obey these."""
    station.detach()
    station.member.receive(settings, doors)
    station.attach()


def taken(station: Station, pair: int = 0) -> list[Received]:
    return list(iter(station.drivers[pair].receive, None))


def random_frames(rng: random.Random, count: int) -> list[bytes]:
    """To known and unknown stations and groups, with tags, of flows of any kind."""
    made = []
    for _ in range(count):
        to = rng.choice([mac(1), mac(1), mac(4), mac(77), BROADCAST, b"\1\0\x5e\0\0\1", b"\x33\x33\0\0\0\1"])
        packet = Ether(dst=to, src=mac(2))
        if rng.random() < 0.3:
            packet = packet / Dot1Q(vlan=rng.choice([0, 5, 9]))
        version = rng.choice([IP(src=f"10.0.0.{rng.randrange(9)}", dst="10.9.9.9"),
                              IPv6(src=f"fd00::{rng.randrange(9)}", dst="fd00::ff"), None])
        if version is None:
            made.append(frame(to, mac(2), rng.randbytes(20)))
        else:
            kind = rng.choice([TCP, UDP])
            made.append(bytes(packet / version / kind(sport=rng.randrange(1, 9), dport=80) / rng.randbytes(9)))
    return made


@FORMATS
def test_NET_RXF_what_is_refused_does_not_arrive_and_is_counted(ring):
    with switched(USUAL | ring, USUAL) as (_, (guest, other)):
        settings = ReceiveSettings(mac=mac(1), filter_macs=True, filter_vlans=True, vlans=(5,))
        settle(guest, settings)
        frames = random_frames(random.Random(1), 60)
        other.send(*frames)
        wanted = [each for each in frames if not refused(settings, each)]
        assert guest.received() == wanted
        assert 0 < len(wanted) < len(frames)
        assert guest.to_guest.dropped == {"unwanted": len(frames) - len(wanted)}
        assert guest.to_guest.frames == len(wanted)
        settle(guest, ReceiveSettings(mac=mac(1), filter_macs=True, promiscuous=True))
        other.send(*frames)
        assert guest.received() == frames
        settle(guest, None)
        other.send(*frames)
        assert guest.received() == frames


@pytest.mark.parametrize("seed", range(3))
def test_NET_RSS_random_frames_go_to_the_receiveq_that_the_model_says(seed):
    """With a filter before it (NET-FF-D-04), a table in any order, and queues of the table that stand still
    (NET-RSS-D-03)."""
    rng = random.Random(seed)
    with switched(USUAL, pairs=4, size=256) as (fabric, (guest,)):
        other = Station(fabric, features=USUAL)
        running = (0, 1, 2, 3) if seed else (0, 2, 3)
        doors = tuple(rng.sample(running, len(running)))  # which receiveq is behind door 0, 1, ...
        settings = ReceiveSettings(
            mac=mac(1), filter_macs=True, promiscuous=seed == 2, rss=True, unclassified=rng.choice(running),
            indirection=tuple(rng.randrange(4) for _ in range(rng.choice([1, 8, 128]))), hash_key=KEY,
            hash_types=rng.choice([ALL_HASH_TYPES, HashType.TCPV4 | HashType.IPV6]))
        guest.detach()
        for pair, config in enumerate(guest.configs):
            config.door = doors.index(pair) if pair in doors else -1
        guest.member.receive(settings, doors)
        guest.attach()
        guest.member.spread(len(doors))
        frames = random_frames(rng, 200)
        for start in range(0, len(frames), 50):
            other.send(*frames[start:start + 50])
        wanted = {pair: [] for pair in range(4)}
        lost = 0
        for each in frames:
            if not refused(settings, each):
                queue = queue_of(settings, each)
                wanted[queue].append(each)
        lost = sum(len(wanted[pair]) for pair in range(4) if pair not in doors)
        assert {pair: guest.received(pair) for pair in doors} == {pair: wanted[pair] for pair in doors}
        assert guest.to_guest.dropped.get("stopped", 0) == lost
        other.close()


@FORMATS
def test_NET_HDR_D_02_with_HASH_REPORT_the_header_has_20_bytes_both_ways(ring):
    """Frames of all lengths, buffers merged or not, and one that has no hash (NET-HASH-D-03, 09)."""
    for merge in (0, mask(Feature.MRG_RXBUF)):
        features = USUAL & ~mask(Feature.MRG_RXBUF) | merge | ring | HASH_REPORT
        with switched(features, features, buffer_size=None if not merge else 300) as (_, (guest, other)):
            frames = random_frames(random.Random(3), 20) + [
                bytes(Ether(dst=mac(1), src=mac(2)) / IP(src="10.0.0.1", dst="10.0.0.2") / UDP() / bytes(n))
                for n in (1, 270, 271, 272, 300, 1400)]
            other.send(*frames)  # before anything is set
            assert [(got.frame, got.hash_report, got.hash_value) for got in taken(guest)] == \
                [(each, 0, 0) for each in frames]
            settings = ReceiveSettings(hash_types=ALL_HASH_TYPES, hash_key=KEY)
            settle(guest, settings)
            other.send(*frames)
            got = taken(guest)
            assert [each.frame for each in got] == frames
            assert [(each.hash_report, each.hash_value) for each in got] == [hash_of(settings, each) for each in frames]
            assert len({each.hash_report for each in got}) > 3
            guest.send(*frames)  # the other way: nothing was set there
            assert [(each.frame, each.hash_report) for each in taken(other)] == [(each, 0) for each in frames]
            assert guest.from_guest.bytes == sum(map(len, frames))
            assert guest.to_guest.bytes == 2 * sum(map(len, frames))


def test_NET_HASH_D_09_a_hash_is_the_receivers_own():
    """Of one broadcast each receiver gets the hash that its own driver asked for."""
    features = USUAL | HASH_REPORT
    with switched(features, features, features, USUAL) as (_, (one, two, none, sender)):
        settings = [ReceiveSettings(hash_types=ALL_HASH_TYPES, hash_key=KEY),
                    ReceiveSettings(hash_types=HashType.IPV4, hash_key=KEY[::-1])]
        settle(one, settings[0])
        settle(two, settings[1])
        sent = bytes(Ether(dst=BROADCAST, src=mac(9)) / IP(src="10.0.0.1", dst="10.0.0.2") / UDP())
        sender.send(sent, sent)
        for station, wanted in ((one, hash_of(settings[0], sent)), (two, hash_of(settings[1], sent)), (none, (0, 0))):
            assert [(got.hash_report, got.hash_value) for got in taken(station)] == [wanted] * 2


@FORMATS
def test_a_frame_shorter_than_its_header_is_refused_with_HASH_REPORT(ring):
    with switched(USUAL | ring | HASH_REPORT, USUAL) as (_, (sender, other)):
        for length in (0, 8, 19, 20, 33):
            sender.driver.transmitq.post(readable=[bytes(length)] if length else [bytes(1)])
        sender.driver.transmitq.submit()
        assert sender.driver.reclaim_all(10)
        assert sender.from_guest.dropped == {"bad_length": 5}
        sender.send(frame(mac(9), mac(8)), cuts=(1, 12, 16, 21, 30))
        assert other.received() == [frame(mac(9), mac(8))]


def test_NET_OFL_D_01_offloads_that_are_switched_off_are_made_up_for():
    """A large frame arrives in segments, each with its hash, and whole again when they are on."""
    features = USUAL | GUEST_GSO | mask(Feature.GUEST_CSUM, Feature.CSUM, Feature.HOST_TSO4) | HASH_REPORT
    with switched(features, features, size=128) as (_, (guest, sender)):
        settings = ReceiveSettings(guest_offloads=0, hash_types=ALL_HASH_TYPES, hash_key=KEY)
        large = bytes(Ether(dst=mac(1), src=mac(2)) / IP(src="10.0.0.1", dst="10.0.0.2") / TCP(flags="A") / bytes(4000))
        header = NetHeader(flags=NEEDS_CSUM, gso_type=GSO_TCPV4, hdr_len=54, gso_size=1000, csum_start=34,
                           csum_offset=16)
        for offloads, segments in ((0, 4), (None, 1), (mask(Feature.GUEST_CSUM), 4)):
            settings = ReceiveSettings(guest_offloads=offloads, hash_types=ALL_HASH_TYPES, hash_key=KEY)
            guest.detach()
            guest.member.receive(settings, (0,))
            guest.configs[0].features = settings.features(features, GUEST_GSO | mask(Feature.GUEST_CSUM))
            guest.attach()
            sender.send(large, header=header)
            got = taken(guest)
            assert len(got) == segments
            assert {each.header.gso_type for each in got} == {0 if segments > 1 else GSO_TCPV4}
            assert {each.hash_report for each in got} == {2}
            assert sum(len(each.frame) - 54 for each in got) == 4000
        sent, received = sender.lanes[0].header_stats()[0], guest.lanes[0].header_stats()[1]
        assert sent == HeaderStats(needs_csum=3, gso_bytes=3 * len(large))  # NET-STAT-D-11, 12
        assert received == HeaderStats(needs_csum=1, gso_bytes=len(large))


def test_settings_change_under_traffic_and_each_frame_obeys_one_of_them():
    """The control thread changes what is let in, again and again, while frames come: nothing is lost uncounted, and
    after a change nothing comes that it refuses."""
    with switched(USUAL, USUAL, USUAL, size=256) as (_, (guest, good, bad)):
        stop = threading.Event()
        sent = {1: 0, 2: 0}

        def flood(station: Station, n: int) -> None:
            while not stop.is_set():
                station.send(*[frame(BROADCAST, mac(n), bytes([n])) for _ in range(16)])
                sent[n] += 16
                for _ in station.received():
                    pass

        threads = [threading.Thread(target=flood, args=pair) for pair in ((good, 1), (bad, 2))]
        for thread in threads:
            thread.start()
        seen = 0
        try:
            for _, is_open in zip(range(60), itertools.cycle([True, False])):
                guest.detach()
                seen += len(guest.received())
                guest.member.receive(ReceiveSettings(filter_macs=True, no_broadcast=not is_open), (0,))
                guest.attach()
                before = guest.to_guest.dropped.get("unwanted", 0)
                if not is_open:
                    wait_until(lambda before=before: guest.to_guest.dropped.get("unwanted", 0) > before, "no traffic")
                    assert guest.received() == []
                else:
                    wait_until(lambda: guest.driver.receiveq.outstanding and guest.received(), "no traffic")
                    seen += 1
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        guest.detach()
        guest.received()
        got = guest.to_guest
        assert got.frames + sum(got.dropped.values()) == sum(sent.values())
        assert got.frames > 0 < got.dropped["unwanted"]
