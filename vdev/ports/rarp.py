"""The frame that tells switches where a guest now lives."""

import struct

ETHERTYPE_RARP = 0x8035
_BROADCAST = b"\xff" * 6
_LENGTH = 60  # the smallest Ethernet frame, without its checksum


def rarp_frame(mac: bytes) -> bytes | None:
    """The fake reverse-ARP request for ``mac`` (6 bytes), 60 bytes: every switch on its way learns the port.

    None when ``mac`` is no address of a station (all zero, or a group address): as a source it would only
    confuse switches. Source: vhost-user "VHOST_USER_SEND_RARP"; frame layout RFC 903.
    """
    if len(mac) != 6 or mac[0] & 1 or mac == bytes(6):
        return None
    ethernet = _BROADCAST + mac + struct.pack("!H", ETHERTYPE_RARP)
    # Ethernet, IPv4, address lengths 6 and 4, operation 3 "request reverse"; no IP address is known.
    request = struct.pack("!HHBBH6s4s6s4s", 1, 0x0800, 6, 4, 3, mac, bytes(4), mac, bytes(4))
    return (ethernet + request).ljust(_LENGTH, b"\0")
