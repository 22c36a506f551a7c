"""Checksums and segmentation in software, compared with what Linux does: two TAPs on a bridge, each test in a network
namespace of its own.

Into one TAP goes a frame with its net header, as a guest's would. The other offers no offload, so the kernel
completes the checksum and cuts the frame before it comes out there. Fragments are also given back to the kernel, whose
sockets know what they have to become.
"""

import os
import random
import select
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from scapy.layers.inet import UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrFragment
from scapy.layers.l2 import Ether
from scapy.packet import Raw

from ring.offload import complete_checksum, segments
from vdev.ports import tun
from vdev.testing.isolated import bridge, ip, isolated, mute
from vdev.testing.netdriver import GSO_UDP, NEEDS_CSUM, NetHeader
from vdev.testing.oversized import (
    ADDRESSES,
    KINDS,
    MACS,
    Oversized,
    oversized,
    partial,
    random_ipv4,
    random_ipv6,
    random_oversized,
    random_whole,
)

ROUNDS = 30
SILENCE = 5.0  # seconds after which nothing more comes


@contextmanager
def open_tap(name: str) -> Iterator[int]:
    """A TAP of frames behind a net header, whose reader can take no offload."""
    fd = tun.open_device()
    try:
        tun.attach(fd, name, tun.Flag.TAP | tun.Flag.NO_PI | tun.Flag.VNET_HDR)
        tun.set_header(fd, NetHeader.SIZE)
        tun.set_offload(fd, tun.Offload(0))
        yield fd
    finally:
        os.close(fd)


@contextmanager
def bridged() -> Iterator[tuple[int, int]]:
    """Two TAPs on a bridge, without a word from the host's own IP."""
    mute()
    with open_tap("into") as into, open_tap("out") as out:
        bridge("into", "out")
        yield into, out


def read_frame(fd: int) -> bytes:
    """The next frame, which has to need nothing more."""
    if not select.select([fd], [], [], SILENCE)[0]:
        pytest.fail(f"nothing came out of the kernel for {SILENCE:g} s", pytrace=False)
    message = os.read(fd, 70_000)
    header = NetHeader.unpack(message)
    assert not header.flags & NEEDS_CSUM and not header.gso_type
    return message[NetHeader.SIZE:]


def through_kernel(ends: tuple[int, int], header: NetHeader, frame: bytes, count: int) -> list[bytes]:
    into, out = ends
    os.write(into, header.pack() + frame)
    return [read_frame(out) for _ in range(count)]


def without_fragment_id(frame: bytes) -> bytes:
    """Linux chooses the identification of IPv6 fragments itself."""
    packet = Ether(frame)
    if IPv6ExtHdrFragment in packet:
        packet[IPv6ExtHdrFragment].id = 0
    return bytes(packet)


def skip_without_uso(tap: int) -> None:
    try:
        tun.set_offload(tap, tun.Offload.CSUM | tun.Offload.USO4 | tun.Offload.USO6)
    except OSError:
        pytest.skip("the kernel has no USO on a TAP (Linux 6.2)")
    tun.set_offload(tap, tun.Offload(0))


def is_cut_by_the_kernel(sent: Oversized) -> bool:
    """Of fragments only what Linux does right: others than whole eights it places wrongly (RFC 791, 3.2), and over
    IPv6 it counts extension headers as part of what is fragmented."""
    if sent.header.gso_type == GSO_UDP:
        extended = IPv6 in sent.packet and sent.packet[IPv6].nh != socket.IPPROTO_UDP
        return sent.header.gso_size % 8 == 0 and not extended
    return True


@pytest.mark.parametrize("kind", KINDS)
@isolated
def test_segments_are_the_kernels(kind: str) -> None:
    rng, compared = random.Random(kind), 0
    with bridged() as ends:
        if "uso" in kind:
            skip_without_uso(ends[1])
        while compared < ROUNDS:
            sent = random_oversized(rng, kind)
            made = segments(sent.header.pack(), sent.frame)
            if len(made) == 1 or not is_cut_by_the_kernel(sent):
                continue
            theirs = through_kernel(ends, sent.header, sent.frame, len(made))
            assert [frame.hex() for frame in made] == [without_fragment_id(frame).hex() for frame in theirs]
            compared += 1


@isolated
def test_checksums_are_the_kernels() -> None:
    rng = random.Random(2)
    with bridged() as ends:
        for _ in range(100):
            start, offset, frame = partial(random_whole(rng))
            header = NetHeader(NEEDS_CSUM, csum_start=start, csum_offset=offset)
            assert [complete_checksum(frame, start, offset)] == through_kernel(ends, header, frame, 1)


@pytest.mark.parametrize("kind", ["ufo4", "ufo6"])
@isolated
def test_fragments_become_a_datagram_again(kind: str) -> None:
    """With any headers and sizes: the kernel's socket has what was sent."""
    rng = random.Random(kind)
    _, version = KINDS[kind]
    destination = ADDRESSES[version][1]
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    with open_tap("into") as into, socket.socket(family, socket.SOCK_DGRAM) as receiver:
        ip("link", "set", "into", "address", MACS[1], "up")
        ip("address", "add", f"{destination}/{24 if version == 4 else 64}", "dev", "into",
           *(["nodad"] if version == 6 else []))
        receiver.bind((destination, 0))
        receiver.settimeout(SILENCE)
        for number in range(ROUNDS):
            payload = rng.randbytes(rng.randrange(2000, 60_000))
            network = random_ipv4(rng) if version == 4 else random_ipv6(rng, routed=False)
            packet = Ether(src=MACS[0], dst=MACS[1]) / network / UDP(dport=receiver.getsockname()[1]) / Raw(payload)
            sent = oversized(packet, kind, rng.randrange(300, 1500))
            made = segments(sent.header.pack(), sent.frame, number)
            rng.shuffle(made)
            for frame in made:
                os.write(into, bytes(NetHeader.SIZE) + frame)
            assert receiver.recv(65536) == payload
