"""Ethernet addresses of guests, as text and as bytes."""

import os
import re

MULTICAST = 0x01  # in the first byte: an address of several stations


def parse_mac(text: str) -> bytes:
    """``52:54:00:12:34:56`` as 6 bytes. Raises ValueError unless it is the address of one station."""
    if not re.fullmatch("[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}", text) or int(text[:2], 16) & MULTICAST:
        raise ValueError("is no MAC address of one station; write e.g. 52:54:00:12:34:56")
    return bytes.fromhex(text.replace(":", ""))


def mac_of(path: str) -> bytes:
    """An address, 6 bytes, that belongs to this path alone and stays the same."""
    import hashlib  # a command line that names an address need not wait for it

    return bytes.fromhex("525400") + hashlib.sha256(os.fsencode(path)).digest()[:3]
