"""What a driver has set about what it receives, for frames that come from the host through a TAP: the kernel's, and
those of a driver in C at another TAP."""

import contextlib
import random
import socket
from collections.abc import Iterator

from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Dot1Q, Ether

from ring.loadgen import LoadGenerator, Role
from ring.receive_settings import ALL_HASH_TYPES, Coalescing, ReceiveSettings
from vdev.config import UplinkConfig
from vdev.logs import EventLog
from vdev.loop import Loop
from vdev.net.features import Feature, mask
from vdev.ports.spec import parse_port
from vdev.switches import Switches
from vdev.testing.isolated import bridge, ip, isolated, mute
from vdev.testing.receive_model import hash_of, queue_of, refused
from vdev.testing.rig import USUAL
from vdev.testing.switched import TYPE, Station, mac
from vdev.testing.waiting import wait_until
from vdev.workers import Workers

LOAD = 512  # frames: fewer than a TAP keeps for who reads it
PACKETS = 64
LONG = 3_600_000_000  # microseconds
KEY = bytes(range(40))


@contextlib.contextmanager
def station_behind(tap: str, **options: object) -> Iterator[Station]:
    """A station at a switch whose uplink is a new TAP of that name."""
    mute()
    every, loop = Switches(Workers()), Loop(print)
    with contextlib.ExitStack() as stack:
        stack.callback(loop.close)
        stack.callback(every.close)
        switch = every.named("lan")
        every.open_uplink(UplinkConfig("lan", parse_port(f"tap:{tap}")), EventLog())
        station = Station(switch, **options)
        stack.callback(station.close)
        every.start(loop)
        ip("link", "set", tap, "up")
        yield station


def settle(station: Station, settings: ReceiveSettings, running: tuple[int, ...]) -> None:
    station.detach()
    for pair, config in enumerate(station.configs):
        config.door = running.index(pair)
        config.to_guest.coalescing = settings.coalescing_of(2 * pair)
    station.member.receive(settings, running)
    station.attach()


def done_with(station: Station, frames: int) -> bool:
    """Is it known what became of so many?"""
    flow = station.to_guest
    return flow.frames + sum(flow.dropped.values()) >= frames


@isolated
def test_NET_RSS_frames_of_the_host_go_where_the_model_says_with_their_hash():
    rng = random.Random(5)
    with station_behind("v0", features=USUAL | mask(Feature.HASH_REPORT), pairs=2, size=256) as guest:
        settings = ReceiveSettings(mac=mac(1), filter_macs=True, filter_vlans=True, vlans=(7,), rss=True,
                                   indirection=(1, 0, 0, 1), unclassified=1, hash_types=ALL_HASH_TYPES, hash_key=KEY)
        settle(guest, settings, (0, 1))
        frames = []
        for n in range(120):
            packet = Ether(dst=rng.choice([mac(1), mac(1), mac(9), b"\xff" * 6]), src=mac(2))
            if n % 4 == 0:
                packet = packet / Dot1Q(vlan=rng.choice([7, 8]))
            network = rng.choice([IP(src="10.0.0.1", dst="10.0.0.2"), IPv6(src="fd00::1", dst="fd00::2")])
            transport = rng.choice([TCP, UDP])(sport=rng.randrange(1, 5000), dport=80)
            frames.append(bytes(packet / network / transport / bytes(n)))
        frames.append(mac(1) + mac(2) + TYPE + bytes(50))
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as host:
            host.bind(("v0", 0))
            for each in frames:
                host.send(each)
        wait_until(lambda: done_with(guest, len(frames)), "not all frames have come")
        wanted = {0: [], 1: []}
        for each in frames:
            if not refused(settings, each):
                wanted[queue_of(settings, each)].append((each, *hash_of(settings, each)))
        got = {pair: [(one.frame, one.hash_report, one.hash_value) for one in iter(driver.receive, None)]
               for pair, driver in enumerate(guest.drivers)}
        assert got == wanted
        assert min(map(len, got.values())) > 0
        assert guest.to_guest.dropped == {"unwanted": len(frames) - sum(map(len, got.values()))}


@isolated
def test_NET_COAL_a_driver_in_C_gets_what_another_sends_with_fewer_calls():
    """Through two TAPs that a bridge of the host joins."""
    with station_behind("v0", features=USUAL, size=256, buffers=0) as guest, \
            station_behind("v1", features=USUAL, size=256, buffers=0) as other:
        bridge("v0", "v1")
        settle(guest, ReceiveSettings(mac=mac(1), filter_macs=True, coalescing=(Coalescing(PACKETS, LONG),)), (0,))
        ours = mac(1) + mac(2) + TYPE
        before = guest.to_guest
        with LoadGenerator(guest.driver.receiveq, Role.RECEIVE, prefix=ours) as sink:
            sink.start()
            with LoadGenerator(other.driver.transmitq, Role.TRANSMIT, frames=LOAD, batch=8, prefix=ours) as source:
                source.start()
                assert source.wait(30)
                assert source.stats().errors == {}
            wait_until(lambda: done_with(guest, LOAD), "not all frames have come")
            guest.detach()  # and what was put off is told
            arrived = guest.to_guest
            wait_until(lambda: sink.stats().frames == arrived.frames, "the driver was not told of all frames")
            assert arrived.dropped.get("unwanted", 0) == 0 < arrived.frames
            assert sink.stats().errors == {}
            sink.stop()
        assert 0 < arrived.calls - before.calls <= LOAD // PACKETS + 1


@isolated
def test_NET_MAC_D_04_a_driver_in_C_gets_nothing_that_is_for_another():
    with station_behind("v0", features=USUAL, size=256, buffers=0) as guest, \
            station_behind("v1", features=USUAL, size=256, buffers=0) as other:
        bridge("v0", "v1")
        settle(guest, ReceiveSettings(mac=mac(1), filter_macs=True), (0,))
        prefix = mac(9) + mac(2) + TYPE
        with LoadGenerator(guest.driver.receiveq, Role.RECEIVE, prefix=prefix) as sink, \
                LoadGenerator(other.driver.transmitq, Role.TRANSMIT, frames=LOAD, batch=8, prefix=prefix) as source:
            sink.start()
            source.start()
            assert source.wait(30)
            wait_until(lambda: guest.to_guest.dropped.get("unwanted", 0) == LOAD, "not all frames were refused")
            assert (guest.to_guest.frames, sink.stats().frames, sink.stats().errors) == (0, 0, {})
            sink.stop()
