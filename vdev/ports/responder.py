"""The responder port: a network of one host, inside the daemon, for which nobody needs any right.

Theory of operation
-------------------
The far end of a socket pair (vdev/ports/sockets.py) is read by the control loop, a bounded number of
frames a turn; each is looked at by :meth:`Responder.answer`, which has no I/O. What is answered:

    ARP and IPv6 neighbour discovery for the responder's addresses, router solicitations (so that a guest
    makes itself an address), ICMP and ICMPv6 echo, DHCP (vdev/ports/dhcp.py).

Its addresses: IPv4 as given (default 10.0.76.1/24), fe80::76:64ff:fe65:7601, and fd76:6465:7600::1 in a
unique local /64 of its own. It is no router: its advertisements have a lifetime of zero, its leases name no
gateway. Everything else is ignored, fragments and segmented frames too: what comes from the guest is
hostile, and what is not understood as a whole is not understood.

A guest that leaves checksums to the device marks the frame (NEEDS_CSUM); the mark comes along in the net
header, and such a checksum is not verified. Answers are complete: their net header is all zero.
"""

import struct
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import Any, NamedTuple

from vdev.handover import Put, Take
from vdev.net.features import Feature, mask
from vdev.plain import from_plain
from vdev.ports import packets
from vdev.ports.base import VNET_HEADER, Carries, Ends, PortPart
from vdev.ports.dhcp import CLIENT_PORT, SERVER_PORT, DhcpServer
from vdev.ports.packets import Arp, Datagram, Frame, Packet
from vdev.ports.sockets import MESSAGE_MAX, Pairs, SocketPort, adopt_pairs
from vdev.ports.spec import ResponderSpec

MAC = bytes.fromhex("027664657601")
LINK_LOCAL = IPv6Address("fe80::76:64ff:fe65:7601")  # made of MAC as RFC 4291, appendix A, says
PREFIX = IPv6Network("fd76:6465:7600::/64")
ADDRESS_V6 = PREFIX[1]

_HOPS = 64
_MESSAGES_A_TURN = 64
_BYTES_A_TURN = 256 * 1024
_NEIGHBOURS_MAX = 64
_PINGS_MAX = 64
_PING_ID = 0x7664

_NEEDS_CSUM = 1  # virtio_net_hdr.flags
_GSO_ECN = 0x80  # virtio_net_hdr.gso_type: a modifier, no kind

_ECHO_REPLY, _ECHO_REQUEST = 0, 8  # ICMP
_ECHO_REQUEST_V6, _ECHO_REPLY_V6 = 128, 129  # ICMPv6
_ROUTER_SOLICITATION, _ROUTER_ADVERTISEMENT = 133, 134
_NEIGHBOUR_SOLICITATION, _NEIGHBOUR_ADVERTISEMENT = 135, 136

_ALL_NODES = IPv6Address("ff02::1").packed
_UNSPECIFIED = bytes(16)
_FOREVER = 0xFFFFFFFF


class EchoReply(NamedTuple):
    """The guest answered a ping: ``seconds`` after :meth:`Responder.send_echo` asked."""

    address: IPv4Address | IPv6Address
    sequence: int
    seconds: float


@dataclass(frozen=True)
class ResponderPart:
    """A responder as it is handed on: what it has learned, the one unheard for longest first."""

    pairs: Pairs
    boot_file: str
    leases: dict[bytes, IPv4Address]
    declined: tuple[IPv4Address, ...]
    neighbours: dict[bytes, bytes]
    answered: dict[str, int]
    pings: tuple[tuple[bytes, int, float], ...]


class Responder(SocketPort):
    """See the module. Each queue pair gets its answers on the pair it asked on.

    spec: the IPv4 address and network. boot_file: a BOOTP file name for the guest's firmware. Raises OSError
    when there are no sockets, ValueError for a boot_file over 127 bytes.

    ``dhcp.leases``: address by MAC. ``answered``: how many frames were answered, by kind; "unsent" counts
    answers for which the guest left no room. ``on_echo_reply`` is called with each :class:`EchoReply`.
    """

    def __init__(self, spec: ResponderSpec, queue_pairs: int, boot_file: str = "", pairs: list | None = None) -> None:
        self.dhcp = DhcpServer(spec.address, boot_file)
        super().__init__(queue_pairs, pairs)
        self.carries = Carries(VNET_HEADER, mask(Feature.CSUM, Feature.GUEST_CSUM), queue_pairs)
        self.answered: Counter[str] = Counter()
        self.on_echo_reply: Callable[[EchoReply], None] | None = None
        self._spec = spec
        self._boot_file = boot_file
        self._address = spec.address.ip.packed
        self._own_v6 = (LINK_LOCAL.packed, ADDRESS_V6.packed)
        self._neighbours: OrderedDict[bytes, bytes] = OrderedDict()  # MAC by address, packed
        self._pings: OrderedDict[tuple[bytes, int], float] = OrderedDict()

    @classmethod
    def open(cls, spec: ResponderSpec, queue_pairs: int) -> "Responder":
        return cls(spec, queue_pairs)

    def __str__(self) -> str:
        return str(self._spec)

    def ends(self, pair: int) -> Ends:
        return Ends(self.far[pair].fileno(), self.far[pair].fileno())

    def watches(self) -> list[tuple[int, Callable[[], None]]]:
        return [(near.fileno(), partial(self._serve, pair)) for pair, near in enumerate(self.near)]

    def learned(self) -> dict[str, Any]:
        return {"leases": {mac.hex(":"): str(address) for mac, address in self.dhcp.leases.items()}}

    def recall(self, learned: dict[str, Any]) -> None:
        self.dhcp.recall({bytes.fromhex(mac.replace(":", "")): IPv4Address(address)
                          for mac, address in learned["leases"].items()})

    def send_echo(self, address: IPv4Address | IPv6Address, sequence: int) -> bool:
        """Ping the guest; the answer comes to ``on_echo_reply``. Out of queue pair 0.

        sequence: 0 to 65535. -> False when nothing was sent because the guest's MAC is not known: it has
        been asked for (ARP, neighbour solicitation), so try again. The last 64 pings are remembered.
        """
        there = address.packed
        mac = self._neighbours.get(there)
        if mac is None:
            self._send(0, self._ask_for(there))
            return False
        body = struct.pack("!HH", _PING_ID, sequence) + b"vdev".ljust(48, b".")
        self._pings[there, sequence] = time.monotonic()
        if len(self._pings) > _PINGS_MAX:
            self._pings.popitem(last=False)
        if len(there) == 4:
            return self._send(0, self._ipv4(mac, there, packets.PROTOCOL_ICMP,
                                            packets.build_icmp(_ECHO_REQUEST, body)))
        return self._send(0, self._icmpv6(mac, self._own_for(there), there, _ECHO_REQUEST_V6, body))

    def answer(self, message: bytes) -> bytes | None:
        """The message (net header and frame) that answers one of the guest, if any does. Never raises."""
        if len(message) < VNET_HEADER or message[1] & ~_GSO_ECN:
            return None
        partial_checksum = bool(message[0] & _NEEDS_CSUM)
        frame = packets.parse_frame(message[VNET_HEADER:])
        if frame is None or not (frame.destination in (MAC, packets.BROADCAST)
                                 or frame.destination.startswith(b"\x33\x33")):
            return None
        if frame.ethertype == packets.ETHERTYPE_ARP:
            return self._arp(frame)
        if frame.ethertype == packets.ETHERTYPE_IPV4:
            return self._from_ipv4(frame, partial_checksum)
        if frame.ethertype == packets.ETHERTYPE_IPV6:
            return self._from_ipv6(frame, partial_checksum)
        return None

    # ---- another process goes on with it

    def export(self, put: Put) -> PortPart:
        return PortPart(str(self), ResponderPart(
            self.export_pairs(put), self._boot_file, dict(self.dhcp.leases), tuple(self.dhcp.declined),
            dict(self._neighbours), dict(self.answered),
            tuple((address, sequence, asked) for (address, sequence), asked in self._pings.items())))

    @classmethod
    def adopt(cls, spec: ResponderSpec, state: Any, take: Take) -> "Responder":
        part = from_plain(ResponderPart, state)
        pairs = adopt_pairs(part.pairs, take)
        port = cls(spec, len(pairs), part.boot_file, pairs)
        port.dhcp.leases.update(part.leases)
        port.dhcp.declined.update(dict.fromkeys(part.declined))
        port._neighbours.update(part.neighbours)
        port.answered.update(part.answered)
        port._pings.update({(address, sequence): asked for address, sequence, asked in part.pings})
        return port

    # ---- the socket

    def _serve(self, pair: int) -> None:
        """Answer what waits on ``pair``; what is left after a turn's share makes the loop call again."""
        taken = 0
        for _ in range(_MESSAGES_A_TURN):
            try:
                message = self.near[pair].recv(MESSAGE_MAX)
            except BlockingIOError:
                return
            reply = self.answer(message)
            if reply is not None:
                self._send(pair, reply)
            taken += len(message)
            if taken > _BYTES_A_TURN:
                return

    def _send(self, pair: int, message: bytes) -> bool:
        try:
            self.near[pair].send(message)
        except OSError:  # full: EAGAIN, ENOBUFS. Frames get lost on any network.
            self.answered["unsent"] += 1
            return False
        return True

    # ---- ARP

    def _arp(self, frame: Frame) -> bytes | None:
        arp = packets.parse_arp(frame.payload)
        if arp is None:
            return None
        self._learn(arp.sender, frame.source)
        if arp.operation != 1 or arp.target != self._address:
            return None
        self.answered["arp"] += 1
        reply = Arp(2, MAC, self._address, arp.sender_mac, arp.sender)
        return _message(frame.source, packets.ETHERTYPE_ARP, packets.build_arp(reply))

    def _learn(self, address: bytes, mac: bytes) -> None:
        """Remember where a neighbour lives; the one unheard for longest makes room."""
        known = ip_address(address)
        network = self._spec.address.network if known.version == 4 else PREFIX
        if (known in network or known.is_link_local) and address not in (self._address, *self._own_v6):
            self._neighbours[address] = mac
            self._neighbours.move_to_end(address)
            if len(self._neighbours) > _NEIGHBOURS_MAX:
                self._neighbours.popitem(last=False)

    def _ask_for(self, address: bytes) -> bytes:
        if len(address) == 4:
            request = Arp(1, MAC, self._address, bytes(6), address)
            return _message(packets.BROADCAST, packets.ETHERTYPE_ARP, packets.build_arp(request))
        solicited = IPv6Address("ff02::1:ff00:0").packed[:13] + address[13:]
        body = bytes(4) + address + _link_layer_option(1)
        return self._icmpv6(_group_mac(solicited), self._own_for(address), solicited, _NEIGHBOUR_SOLICITATION,
                            body, hops=255)

    # ---- IPv4

    def _from_ipv4(self, frame: Frame, partial_checksum: bool) -> bytes | None:
        packet = packets.parse_ipv4(frame.payload)
        if packet is None:
            return None
        if packet.protocol == packets.PROTOCOL_UDP:
            return self._udp(packet, partial_checksum)
        if packet.protocol != packets.PROTOCOL_ICMP or packet.destination != self._address:
            return None
        self._learn(packet.source, frame.source)
        message = packet.payload
        if len(message) < 8 or not partial_checksum and packets.checksum(message):
            return None
        if message[:2] == bytes((_ECHO_REPLY, 0)):
            self._pong(packet)
        if message[:2] != bytes((_ECHO_REQUEST, 0)):
            return None
        self.answered["echo"] += 1
        return self._ipv4(frame.source, packet.source, packets.PROTOCOL_ICMP,
                          packets.build_icmp(_ECHO_REPLY, message[4:]))

    def _udp(self, packet: Packet, partial_checksum: bool) -> bytes | None:
        datagram = packets.parse_udp(packet, partial_checksum)
        if datagram is None or datagram.destination != SERVER_PORT:
            return None
        answer = self.dhcp.answer(datagram.payload)
        if answer is None:
            return None
        self.answered["dhcp"] += 1
        there = answer.destination.packed
        reply = packets.build_udp(self._address, there, Datagram(SERVER_PORT, CLIENT_PORT, answer.payload))
        return self._ipv4(answer.mac, there, packets.PROTOCOL_UDP, reply)

    def _ipv4(self, mac: bytes, destination: bytes, protocol: int, payload: bytes) -> bytes:
        packet = Packet(self._address, destination, protocol, _HOPS, payload)
        return _message(mac, packets.ETHERTYPE_IPV4, packets.build_ipv4(packet))

    # ---- IPv6

    def _from_ipv6(self, frame: Frame, partial_checksum: bool) -> bytes | None:
        packet = packets.parse_ipv6(frame.payload)
        if packet is None or packet.protocol != packets.PROTOCOL_ICMPV6:
            return None
        message = packet.payload
        start = packets.pseudo_header(packet.source, packet.destination, packet.protocol, len(message))
        if len(message) < 8 or message[1] or not partial_checksum and packets.checksum(message, start):
            return None
        self._learn(packet.source, frame.source)
        if message[0] == _NEIGHBOUR_SOLICITATION:
            return self._neighbour_solicited(frame, packet)
        if message[0] == _ROUTER_SOLICITATION:
            return self._router_solicited(frame, packet)
        if message[0] == _ECHO_REPLY_V6 and packet.destination in self._own_v6:
            self._pong(packet)
        if message[0] == _ECHO_REQUEST_V6 and packet.source != _UNSPECIFIED \
                and packet.destination in (*self._own_v6, _ALL_NODES):
            self.answered["echo"] += 1
            own = packet.destination if packet.destination in self._own_v6 else self._own_for(packet.source)
            return self._icmpv6(frame.source, own, packet.source, _ECHO_REPLY_V6, message[4:])
        return None

    def _neighbour_solicited(self, frame: Frame, packet: Packet) -> bytes | None:
        """RFC 4861, 7.1.1 and 7.2.4. An unspecified source checks whether an address is taken: it is."""
        target = packet.payload[8:24]
        if packet.hops != 255 or target not in self._own_v6 or not _options_sound(packet.payload[24:]):
            return None
        self.answered["neighbour"] += 1
        checking = packet.source == _UNSPECIFIED
        flags = 0x20 if checking else 0x60  # override; solicited
        there, mac = (_ALL_NODES, _group_mac(_ALL_NODES)) if checking else (packet.source, frame.source)
        body = bytes((flags, 0, 0, 0)) + target + _link_layer_option(2)
        return self._icmpv6(mac, target, there, _NEIGHBOUR_ADVERTISEMENT, body, hops=255)

    def _router_solicited(self, frame: Frame, packet: Packet) -> bytes | None:
        """RFC 4861, 6.1.1 and 6.2.6. The prefix stays valid for ever, as no advertisement is repeated."""
        if packet.hops != 255 or not _options_sound(packet.payload[8:]):
            return None
        self.answered["router"] += 1
        unknown = packet.source == _UNSPECIFIED
        there, mac = (_ALL_NODES, _group_mac(_ALL_NODES)) if unknown else (packet.source, frame.source)
        head = struct.pack("!BBHII", _HOPS, 0, 0, 0, 0)  # router lifetime 0: no default router
        prefix = struct.pack("!BBBBIII16s", 3, 4, PREFIX.prefixlen, 0xC0, _FOREVER, _FOREVER, 0,
                             PREFIX.network_address.packed)
        return self._icmpv6(mac, LINK_LOCAL.packed, there, _ROUTER_ADVERTISEMENT,
                            head + _link_layer_option(1) + prefix, hops=255)

    def _own_for(self, there: bytes) -> bytes:
        """Our address of the same scope."""
        return (LINK_LOCAL if IPv6Address(there).is_link_local else ADDRESS_V6).packed

    def _icmpv6(self, mac: bytes, source: bytes, destination: bytes, kind: int, body: bytes,
                hops: int = _HOPS) -> bytes:
        payload = packets.build_icmpv6(source, destination, kind, body)
        packet = Packet(source, destination, packets.PROTOCOL_ICMPV6, hops, payload)
        return _message(mac, packets.ETHERTYPE_IPV6, packets.build_ipv6(packet))

    # ---- our own pings

    def _pong(self, packet: Packet) -> None:
        identifier, sequence = struct.unpack_from("!HH", packet.payload, 4)
        asked = self._pings.pop((packet.source, sequence), None) if identifier == _PING_ID else None
        if asked is not None and self.on_echo_reply is not None:
            self.on_echo_reply(EchoReply(ip_address(packet.source), sequence, time.monotonic() - asked))


def _message(mac: bytes, ethertype: int, payload: bytes) -> bytes:
    return bytes(VNET_HEADER) + packets.build_frame(mac, MAC, ethertype, payload)


def _group_mac(group: bytes) -> bytes:
    """RFC 2464, 7."""
    return b"\x33\x33" + group[12:]


def _link_layer_option(kind: int) -> bytes:
    """1: of the source, 2: of the target."""
    return bytes((kind, 1)) + MAC


def _options_sound(data: bytes) -> bool:
    """RFC 4861, 4.6: each option says its length in units of 8 bytes, never zero."""
    at = 0
    while at < len(data):
        if at + 2 > len(data) or data[at + 1] == 0:
            return False
        at += 8 * data[at + 1]
    return at == len(data)
