"""What each part of a device hands on (vdev/handover.py): nothing is forgotten, and it is the same over there."""

import os
import socket
from dataclasses import replace
from ipaddress import IPv4Address, ip_interface

import pytest

from ring.errors import QueueBusy
from ring.guestmem import DEFAULT_POLICY, Owner
from ring.pump import Lane
from vdev.backend import Backend
from vdev.backend_handover import export
from vdev.connection import Connection
from vdev.handover import HandoverError, Parcel
from vdev.net.features import Feature, mask
from vdev.engine import Engine
from vdev.plain import from_plain, to_plain
from vdev.ports import adopt_port, link, open_port, tun
from vdev.ports.base import Carries, PortPart
from vdev.ports.spec import parse_port
from vdev.ports.tap import Tap
from vdev.session_rings import SessionRings
from vdev.session_state import SessionState
from vdev.testing.netdriver import NetHeader
from vdev.testing.rig import pumped
from vdev.testing.scripted import ScriptedGuest
from vdev.testing.served import ServedDevice
from vdev.testing.watch import until
from vhost_user.codec import Begun, Decoder, encode
from vhost_user.errors import Close
from vhost_user.session import Session
from vhost_user.state import Offer, State


def handed(export):
    """(what ``export`` gives, a parcel from which its descriptors can be taken)"""
    parcel = Parcel()
    part = export(parcel.put)
    return part, Parcel([os.dup(fd) for fd in parcel.fds])


# ------------------------------------------------------------------------------- nothing is forgotten

# Attributes that need not be handed on, or are in a part under another name. Who adds one decides here.
ELSEWHERE = {
    Backend: {"session", "engine", "port", "log",  # made anew
              "_last_rarp",  # 20 ms later it means nothing
              # nothing is handed over of a guest that is being migrated, either way, or behind an IOMMU, or
              # notified by messages, or with a configuration space of ours
              "dirty", "postcopy", "iommu", "inband", "config", "control",
              "_abandoned"},  # a device whose worker is stuck has no session
    SessionRings: {"session", "engine", "port", "log", "memory", "postcopy", "dirty", "state", "iommu",
                   "inband", "_own_mtu", "_forget"},  # lent by Backend
    SessionState: {"_engine", "_port", "_session", "_log", "_transfer", "control"},
    Connection: {"_log", "_transport", "_session",
                 "_linter"},  # nothing is handed over where a driver is linted
    Engine: {"port", "features", "mtu", "watch_kicks",  # as the session's state says
             "abandoned", "patience", "_depth", "_lanes", "report_fd",  # of this process
             "lost_worker", "_pool", "_workers", "_apart",  # as its options say
             "_carried",  # counters
             "_link_up", "settings", "queue_pairs"},  # nothing is handed over where it can be down
}


def attributes(kind, part):
    names = {name.lstrip("_") for name in part.__dataclass_fields__}
    return {name for name in vars(kind) if name not in ELSEWHERE[type(kind)] and name.lstrip("_") not in names}


def test_every_attribute_of_a_session_is_handed_on():
    with ServedDevice() as served:
        connection = served.call(lambda: served.device.open_session(socket.socketpair()[0]))
        parcel = Parcel()
        assert not attributes(connection, connection.export(parcel.put))
        assert not attributes(connection._backend, export(connection._backend, parcel.put))
        assert not attributes(connection._backend.rings, connection._backend.rings.export())
        assert not attributes(connection._backend.state, connection._backend.state.export())
        assert not attributes(served.device.engine, served.device.engine.export(parcel.put))
        served.call(connection.close)


# --------------------------------------------------------------------------------------------- ring


def test_frame_that_waits_moves_to_another_lane():
    features = mask(Feature.VERSION_1, Feature.MRG_RXBUF)
    frame = bytes(range(256)) * 12
    with pumped(features) as (driver, device):
        driver.fill(1)
        device.send(frame)
        seen = []

        def waits():
            device.detach()
            seen[:] = [device.lane.held]
            device.attach()
            return seen[0]

        assert until(device, waits)
        (held,) = seen
        assert held[NetHeader.SIZE:] == frame
        with pytest.raises(QueueBusy):
            _ = device.lane.held
        with pytest.raises(QueueBusy):
            device.lane.hold(bytes(100))
    lane = Lane()
    assert lane.held == b""
    lane.hold(held)
    assert lane.held == held
    for length in (12, 66049):
        with pytest.raises(ValueError, match=f"a frame of {length} bytes"):
            lane.hold(bytes(length))
    assert lane.held == held
    lane.close()


def test_file_of_a_mapping_is_kept_where_the_policy_says_so():
    file = os.memfd_create("memory")
    os.ftruncate(file, 4096)
    before = len(os.listdir("/proc/self/fd"))
    plain = Owner().map(file, 0, 0, 4096)
    assert plain.file == -1 and len(os.listdir("/proc/self/fd")) == before
    mapping = Owner().map(file, 0, 0, 4096, policy=replace(DEFAULT_POLICY, keep_files=True))
    assert os.path.samestat(os.fstat(mapping.file), os.fstat(file))
    mapping.close()
    plain.close()
    os.close(file)
    assert len(os.listdir("/proc/self/fd")) == before - 1


def test_memory_whose_files_were_not_kept_cannot_be_handed_on():
    refused = pytest.raises(HandoverError, match="were not kept open")
    with ServedDevice() as served, ScriptedGuest(served.connect()), refused:
        served.call(lambda: served.device._connection.export(Parcel().put))


def test_guest_that_is_being_migrated_is_not_handed_over():
    with ServedDevice() as served, ScriptedGuest(served.connect()) as guest:
        def attempt():
            return served.call(lambda: served.device._connection.export(Parcel().put))

        features = guest.features | mask(Feature.PROTOCOL_FEATURES)
        guest.front_end.set_features(features | mask(Feature.LOG_ALL))
        guest.front_end.get_features()  # what was sent before has been dealt with
        with pytest.raises(HandoverError, match="is being migrated; try again when that is over"):
            attempt()
        guest.front_end.set_features(features)
        guest.front_end.get_features()
        with pytest.raises(HandoverError, match="were not kept open"):  # the next reason
            attempt()


# --------------------------------------------------------------------------------------- vhost_user


@pytest.mark.parametrize("cut", range(1, 20))
def test_decoder_goes_on_at_any_byte(cut):
    message = encode(13, bytes(8))
    first, second = Decoder(), Decoder()
    data = message
    while len(message) - len(data) < cut:
        piece = data[:min(first.needed, cut - (len(message) - len(data)))]
        assert first.feed(piece) is None
        data = data[len(piece):]
    second.go_on(first.begun)
    while (done := second.feed(data[:second.needed])) is None:
        data = data[12 - cut if cut < 12 else len(data):]
    assert (done.request, done.payload) == (13, bytes(8))


@pytest.mark.parametrize("begun", [Begun((13, 2, 8), b""), Begun((13, 1, 1 << 20), b"")])
def test_decoder_refuses_a_header_that_is_none(begun):
    with pytest.raises(Close):
        Decoder().go_on(begun)


def test_decoder_refuses_what_is_complete():
    with pytest.raises(ValueError, match="is complete"):
        Decoder().go_on(Begun((13, 1, 8), bytes(8)))


VERSION_1 = 1 << 32


def test_offer_keeps_what_another_promised():
    old = Offer(VERSION_1 | 1, 0b11, rings=2, queue_num=1)
    assert old.keeps(old) and replace(old, features=VERSION_1 | 3, protocol_features=0b111).keeps(old)
    for less in ({"features": VERSION_1}, {"protocol_features": 1}, {"rings": 4}, {"queue_num": 2},
                 {"max_mem_slots": 31}, {"max_queue_size": 1024}):
        assert not replace(old, **less).keeps(old), less


def test_session_does_not_begin_with_what_is_not_offered():
    offer = Offer(VERSION_1, 0, rings=2, queue_num=1)
    fitting = Session(offer).state
    assert Session(offer, replace(fitting, features=VERSION_1)).features == VERSION_1
    for state in (replace(fitting, features=1), State(fitting.rings[:1])):
        with pytest.raises(ValueError, match="not what is offered"):
            Session(offer, state)


# -------------------------------------------------------------------------------------------- ports


@pytest.mark.parametrize("spec", ["loopback:", "null:", "responder:10.1.0.1/24"])
def test_port_and_what_waits_in_it(spec):
    port = open_port(parse_port(spec), 3)
    ends = port.ends(2)
    if ends.to_port >= 0:
        os.write(ends.to_port, bytes(60))
    part, parcel = handed(port.export)
    port.let_go()
    other = adopt_port(part_of(part), parcel.take)
    assert (str(other), other.carries) == (str(port), port.carries)
    parcel.close()
    if spec == "loopback:":
        assert os.read(other.ends(2).from_port, 100) == bytes(60)
    elif spec != "null:":
        assert other.near[2].recv(100) == bytes(60)
    other.close()


def test_responder_keeps_what_it_has_learned():
    port = open_port(parse_port("responder:10.1.0.1/24"), 1)
    port.dhcp.leases[b"\2\0\0\0\0\1"] = IPv4Address("10.1.0.7")
    port.dhcp.declined[IPv4Address("10.1.0.9")] = None
    port._neighbours[bytes([10, 1, 0, 7])] = b"\2\0\0\0\0\1"
    port.answered["echo"] += 3
    port._pings[bytes([10, 1, 0, 7]), 5] = 1.5
    part, parcel = handed(port.export)
    other = adopt_port(part_of(part), parcel.take)
    for name in ("_neighbours", "answered", "_pings", "_spec", "_boot_file"):
        assert getattr(other, name) == getattr(port, name)
    assert (other.dhcp.leases, other.dhcp.declined) == (port.dhcp.leases, port.dhcp.declined)
    port.close()
    other.close()


def part_of(part):
    return from_plain(PortPart, to_plain(part))


def test_tap_knows_what_to_undo():
    """Without an interface: what it is about is what the object remembers."""
    port = Tap(parse_port("tap:vm%d,ip=10.0.0.1/24"))
    port.name, port._fds, port._enabled = "vm0", [os.eventfd(0), os.eventfd(0)], [True, False]
    port._offload, port.carries, port._link_due = tun.Offload.CSUM | tun.Offload.TSO4, Carries(12, 3, 2, 1500), True
    port._changes = link.Changes([ip_interface("10.0.0.1/24"), ip_interface("fd00::1/64")], True)
    part, parcel = handed(port.export)
    other = adopt_port(part_of(part), parcel.take)
    assert vars(other) == vars(port) | {"_fds": other._fds}
    assert len(other._fds) == 2
    before = len(os.listdir("/proc/self/fd"))
    other.let_go()
    port.let_go()
    assert len(os.listdir("/proc/self/fd")) == before - 4


def test_unknown_port_is_named():
    with pytest.raises(HandoverError, match="this vdev does not know the port"):
        adopt_port(PortPart("wormhole:", None), Parcel([]).take)
