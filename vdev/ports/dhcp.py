"""The responder's DHCP server: one address a MAC, out of one small network.

No I/O: :meth:`DhcpServer.answer` takes the payload of a UDP datagram to port 67 and gives the answer with
the address it goes to. Source: RFC 2131 (the protocol, table 3 for what each answer holds), RFC 2132 (the
options), RFC 951 (the message).

There is nothing behind the responder, so it offers neither a router (option 3) nor a name server (6): a
guest with a second interface keeps its way to the world. Leases are forgotten with the process; a client
that comes back with an address of the network that is free gets it again.
"""

import struct
from collections import OrderedDict
from collections.abc import Mapping
from ipaddress import IPv4Address, IPv4Interface
from itertools import islice
from typing import NamedTuple

from vdev.ports.packets import BROADCAST

SERVER_PORT = 67
CLIENT_PORT = 68
LEASE_SECONDS = 3600
LEASES_MAX = 64

_MESSAGE = struct.Struct("!BBBBIHH4s4s4s4s16s64s128s4s")
_COOKIE = b"\x63\x82\x53\x63"
_SIZE_MIN = 300  # BOOTP's: 236 bytes and a 64-byte vendor area; some clients drop anything shorter
_BROADCAST_FLAG = 0x8000
_FILE_MAX = 127

_DISCOVER, _OFFER, _REQUEST, _DECLINE, _ACK, _NAK, _RELEASE, _INFORM = range(1, 9)

_OPTION_PAD, _OPTION_END = 0, 255
_OPTION_MASK, _OPTION_BROADCAST = 1, 28
_OPTION_REQUESTED, _OPTION_LEASE, _OPTION_TYPE, _OPTION_SERVER, _OPTION_CLIENT = 50, 51, 53, 54, 61

_NOWHERE = IPv4Address(0)
_EVERYONE = IPv4Address("255.255.255.255")


class Answer(NamedTuple):
    """A DHCP message for the client, and where to send it."""

    mac: bytes
    destination: IPv4Address
    payload: bytes


class _Request(NamedTuple):
    kind: int
    xid: int
    flags: int
    client: IPv4Address  # ciaddr: the address the client already uses
    hardware: bytes  # chaddr, 16 bytes
    requested: IPv4Address | None
    server: IPv4Address | None
    client_id: bytes | None


class DhcpServer:
    """Leases the hosts of ``address.network``, except ``address`` itself, lowest first.

    boot_file: BOOTP file name given to every client (at most 127 bytes), with this server as the next one.
    ``leases``: address by MAC, the one unheard for longest first. At most LEASES_MAX: that one gives way. ``declined``:
    addresses that a client found in use, the first one first, as many at the most.
    """

    def __init__(self, address: IPv4Interface, boot_file: str = "") -> None:
        if len(boot_file.encode()) > _FILE_MAX:
            raise ValueError(f"boot file name {boot_file!r} is longer than {_FILE_MAX} bytes")
        self._address = address.ip
        self._network = address.network
        self._boot_file = boot_file.encode()
        self.leases: OrderedDict[bytes, IPv4Address] = OrderedDict()
        self.declined: OrderedDict[IPv4Address, None] = OrderedDict()

    def answer(self, message: bytes) -> Answer | None:
        """The answer to one message of a client; None where there is none to give. Never raises."""
        request = _parse(message)
        if request is None or request.server not in (None, self._address):
            return None
        mac = request.hardware[:6]
        if request.kind == _DISCOVER:
            return self._grant(request, _OFFER, self._lease(mac, request.requested))
        if request.kind == _REQUEST:
            return self._confirm(request, mac)
        if request.kind == _DECLINE and request.requested == self.leases.get(mac, _NOWHERE):
            self._decline(mac)
        if request.kind == _RELEASE and request.client == self.leases.get(mac):
            del self.leases[mac]
        if request.kind == _INFORM:
            return self._reply(request, _ACK, _NOWHERE)
        return None

    def recall(self, leases: Mapping[bytes, IPv4Address]) -> None:
        """Go on with leases that were granted elsewhere; what lies in another network is left out. Raises ValueError
        for what no server of this kind has granted."""
        if len(leases) > LEASES_MAX or any(len(mac) != 6 for mac in leases):
            raise ValueError("leases")
        fitting = {mac: address for mac, address in leases.items()
                   if self._is_host(address) and address != self._address}
        if len(set(fitting.values())) < len(fitting):
            raise ValueError("two leases for one address")
        self.leases = OrderedDict(fitting)

    def _confirm(self, request: _Request, mac: bytes) -> Answer:
        """SELECTING and INIT-REBOOT name the address in option 50, RENEWING and REBINDING in ciaddr."""
        wanted = request.requested or request.client
        if self._lease(mac, wanted) != wanted:
            return self._refuse(request)
        return self._grant(request, _ACK, wanted)

    def _lease(self, mac: bytes, wanted: IPv4Address | None) -> IPv4Address | None:
        """The address of ``mac``: the one it has, the one it asks for if that is free, or any free one.

        When none is free the lease unheard for longest gives way, then the address declined longest ago.
        """
        address = self.leases.pop(mac, None)
        if address is None:
            taken = {self._address, *self.leases.values(), *self.declined}
            hosts = islice(self._network.hosts(), len(taken) + 1)
            if wanted is not None and wanted not in taken and self._is_host(wanted):
                address = wanted
            else:
                address = next((host for host in hosts if host not in taken), None)
            if len(self.leases) >= LEASES_MAX or address is None and self.leases:
                _, freed = self.leases.popitem(last=False)
                address = address or freed
            elif address is None and self.declined:
                address, _ = self.declined.popitem(last=False)
        if address is not None:
            self.leases[mac] = address
        return address

    def _is_host(self, address: IPv4Address) -> bool:
        network = self._network
        return address in network and address not in (network.network_address, network.broadcast_address)

    def _decline(self, mac: bytes) -> None:
        """Somebody else uses the address: keep it out of the pool, as many as there are leases."""
        self.declined[self.leases.pop(mac)] = None
        if len(self.declined) > LEASES_MAX:
            self.declined.popitem(last=False)

    def _grant(self, request: _Request, kind: int, address: IPv4Address | None) -> Answer | None:
        if address is None:
            return None
        return self._reply(request, kind, address, _option(_OPTION_LEASE, struct.pack("!I", LEASE_SECONDS)))

    def _refuse(self, request: _Request) -> Answer:
        return Answer(BROADCAST, _EVERYONE, self._message(request, _NAK, _NOWHERE, b""))

    def _reply(self, request: _Request, kind: int, address: IPv4Address, options: bytes = b"") -> Answer:
        options += _option(_OPTION_MASK, self._network.netmask.packed)
        options += _option(_OPTION_BROADCAST, self._network.broadcast_address.packed)
        payload = self._message(request, kind, address, options)
        if request.client != _NOWHERE:
            return Answer(request.hardware[:6], request.client, payload)
        if request.flags & _BROADCAST_FLAG or address == _NOWHERE:
            return Answer(BROADCAST, _EVERYONE, payload)
        return Answer(request.hardware[:6], address, payload)

    def _message(self, request: _Request, kind: int, address: IPv4Address, options: bytes) -> bytes:
        used = request.client if kind == _ACK else _NOWHERE
        booting = self._boot_file and kind in (_OFFER, _ACK)
        head = _MESSAGE.pack(2, 1, 6, 0, request.xid, 0, request.flags, used.packed, address.packed,
                             self._address.packed if booting else _NOWHERE.packed, _NOWHERE.packed,
                             request.hardware, b"", self._boot_file if booting else b"", _COOKIE)
        head += _option(_OPTION_TYPE, bytes([kind])) + _option(_OPTION_SERVER, self._address.packed)
        if request.client_id is not None:
            options += _option(_OPTION_CLIENT, request.client_id)  # RFC 6842: it comes back in every answer
        return (head + options + bytes([_OPTION_END])).ljust(_SIZE_MIN, b"\0")


def _parse(message: bytes) -> _Request | None:
    """A request of a client on this Ethernet; relayed ones and plain BOOTP are refused."""
    if len(message) < _MESSAGE.size:
        return None
    (operation, kind, size, _, xid, _, flags, client, _, _, relay, hardware, _, _,
     cookie) = _MESSAGE.unpack_from(message)
    if (operation, kind, size, relay, cookie) != (1, 1, 6, _NOWHERE.packed, _COOKIE):
        return None
    options = _options(message[_MESSAGE.size:])
    if options is None or len(options.get(_OPTION_TYPE, b"")) != 1:
        return None
    return _Request(options[_OPTION_TYPE][0], xid, flags, IPv4Address(client), hardware,
                    _address(options.get(_OPTION_REQUESTED)), _address(options.get(_OPTION_SERVER)),
                    options.get(_OPTION_CLIENT))


def _options(data: bytes) -> dict[int, bytes] | None:
    """Values by number, the first of each; None when one runs past the end of the message."""
    found: dict[int, bytes] = {}
    at = 0
    while at < len(data) and data[at] != _OPTION_END:
        if data[at] == _OPTION_PAD:
            at += 1
            continue
        if at + 2 > len(data) or at + 2 + data[at + 1] > len(data):
            return None
        found.setdefault(data[at], data[at + 2:at + 2 + data[at + 1]])
        at += 2 + data[at + 1]
    return found


def _address(value: bytes | None) -> IPv4Address | None:
    """An address option; one of the wrong length counts as absent."""
    return IPv4Address(value) if value is not None and len(value) == 4 else None


def _option(number: int, value: bytes) -> bytes:
    return bytes([number, len(value)]) + value
