"""What ``--port`` says, as data: text in, one frozen dataclass a kind out. Nothing is opened here.

The syntax is ``KIND[:ARGUMENT][,key=value]...``. A kind is one class with a ``KIND``, a ``USAGE``, its
``KEYS`` and a ``parse``; listing the class in ``KINDS`` is all that makes it known. Inside
``--device socket=PATH,port=SPEC,...`` the keys of the port stand beside those of the device:
:func:`take_port` picks them out.
"""

import re
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv6Interface, ip_interface
from typing import ClassVar, Protocol

from vdev.options import OptionError, Pairs, pairs, split, take

INTERFACE_NAME_MAX = 15  # bytes; the kernel's IFNAMSIZ less the final zero
TAP_NAME = "vdev%d"  # the kernel puts the first free number in place of %d


class PortSpec(Protocol):
    """What a port is to be. ``str()`` gives a text that parses to an equal spec."""

    KIND: ClassVar[str]
    USAGE: ClassVar[str]
    KEYS: ClassVar[tuple[str, ...]]

    @classmethod
    def parse(cls, argument: str, options: Pairs, where: str) -> "PortSpec":
        """The spec for ``KIND:argument`` with ``options``. Raises OptionError."""


@dataclass(frozen=True)
class TapSpec:
    """A TAP device: made or joined by ``name``, or inherited as descriptor ``fd`` (then ``name`` is "")."""

    KIND = "tap"
    USAGE = "tap:NAME[,ip=ADDRESS/PREFIX]...[,bridge=BRIDGE] or tap:fd=N"
    KEYS = ("ip", "bridge")

    name: str = TAP_NAME
    fd: int | None = None
    addresses: tuple[IPv4Interface | IPv6Interface, ...] = ()
    bridge: str | None = None

    @classmethod
    def parse(cls, argument: str, options: Pairs, where: str) -> "TapSpec":
        given = take(options, cls.KEYS, where, repeatable=("ip",))
        addresses = tuple(_address(value, where) for value in given.get("ip", []))
        bridge = given["bridge"][0] if "bridge" in given else None
        if bridge is not None:
            _interface_name(bridge, "bridge", where)
        if argument.startswith("fd="):
            if given:
                raise OptionError(f"{where}: tap:fd=N takes no other option; whoever made the TAP sets it up")
            return cls(name="", fd=_descriptor(argument[3:], where))
        if argument:
            _interface_name(argument.replace("%d", "", 1), "TAP", where)
        return cls(argument or TAP_NAME, None, addresses, bridge)

    def __str__(self) -> str:
        head = f"tap:{self.name}" if self.fd is None else f"tap:fd={self.fd}"
        tail = [f",ip={address}" for address in self.addresses]
        return head + "".join(tail) + (f",bridge={self.bridge}" if self.bridge else "")


@dataclass(frozen=True)
class ResponderSpec:
    """The embedded network. ``address`` is its own IPv4 address with the prefix it leases from."""

    KIND = "responder"
    USAGE = "responder[:ADDRESS/PREFIX]"
    KEYS = ()

    address: IPv4Interface = IPv4Interface("10.0.76.1/24")  # not 10.0.2.0/24: QEMU's own user network

    @classmethod
    def parse(cls, argument: str, options: Pairs, where: str) -> "ResponderSpec":
        take(options, cls.KEYS, where)
        if not argument:
            return cls()
        address = _address(argument, where)
        if not isinstance(address, IPv4Interface):
            raise OptionError(f"{where}: {argument} is IPv6; the responder takes the IPv4 network it leases"
                              " from, its IPv6 prefix is fixed")
        if address.network.prefixlen > 30 or address.ip in (address.network.network_address,
                                                            address.network.broadcast_address):
            raise OptionError(f"{where}: {argument} leaves no room for a guest; give the responder's own"
                              " address in a network of /30 or larger, e.g. 10.0.76.1/24")
        return cls(address)

    def __str__(self) -> str:
        return f"responder:{self.address}"


@dataclass(frozen=True)
class LoopbackSpec:
    """Each frame of the guest comes back to it."""

    KIND = "loopback"
    USAGE = "loopback:"
    KEYS = ()

    @classmethod
    def parse(cls, argument: str, options: Pairs, where: str) -> "LoopbackSpec":
        _nothing_more(cls, argument, options, where)
        return cls()

    def __str__(self) -> str:
        return "loopback:"


@dataclass(frozen=True)
class SwitchSpec:
    """A port of the switch ``name``, which all devices of the daemon have that name it."""

    KIND = "switch"
    USAGE = "switch:NAME"
    KEYS = ()

    name: str

    @classmethod
    def parse(cls, argument: str, options: Pairs, where: str) -> "SwitchSpec":
        take(options, cls.KEYS, where)
        switch_name(argument, where)
        return cls(argument)

    def __str__(self) -> str:
        return f"switch:{self.name}"


def switch_name(text: str, where: str) -> str:
    """``text`` if it can name a switch. Raises OptionError."""
    if not re.fullmatch(r"[\w.-]{1,32}", text, re.ASCII):
        raise OptionError(f"{where}: {text!r} cannot name a switch; use up to 32 letters, digits, dots, - and _")
    return text


@dataclass(frozen=True)
class NullSpec:
    """Frames of the guest are counted and dropped; none come."""

    KIND = "null"
    USAGE = "null:"
    KEYS = ()

    @classmethod
    def parse(cls, argument: str, options: Pairs, where: str) -> "NullSpec":
        _nothing_more(cls, argument, options, where)
        return cls()

    def __str__(self) -> str:
        return "null:"


KINDS: dict[str, type[PortSpec]] = {kind.KIND: kind for kind in (
    TapSpec,
    SwitchSpec,
    ResponderSpec,
    LoopbackSpec,
    NullSpec,
)}

KEYS = tuple(key for kind in KINDS.values() for key in kind.KEYS)


def parse_port(text: str, where: str | None = None) -> PortSpec:
    """The spec that ``text`` (what follows ``--port``) describes. where: the option that has it, if it is another.

    Raises OptionError: unknown kind or key (the error lists the known ones), or a value that cannot be.
    """
    where = where or f"--port {text}"
    first, *rest = split(text)
    return _parse(first, pairs(rest, where), where)


def take_port(options: Pairs, where: str) -> tuple[PortSpec | None, Pairs]:
    """Split the options of a ``--device`` into its port and what is left for the device.

    ``port=tap:v0`` and every key in :data:`KEYS` belong to the port, wherever they stand. -> (None, rest)
    when there is no ``port=``. Raises OptionError, also when keys of a port come without ``port=``.
    """
    heads = [value for key, value in options if key == "port"]
    mine = [(key, value) for key, value in options if key in KEYS]
    rest = [(key, value) for key, value in options if key != "port" and key not in KEYS]
    if len(heads) > 1:
        raise OptionError(f"{where}: port= is given twice; a device has one port")
    if heads:
        return _parse(heads[0], mine, where), rest
    if mine:
        raise OptionError(f"{where}: {mine[0][0]}= belongs to a port; add port=KIND:...")
    return None, rest


def _parse(head: str, options: Pairs, where: str) -> PortSpec:
    kind, _, argument = head.partition(":")
    if kind not in KINDS:
        hint = f" (for a TAP device of that name: tap:{head})" if ":" not in head and head else ""
        known = " | ".join(spec.USAGE for spec in KINDS.values())
        raise OptionError(f"{where}: unknown kind of port {kind!r}{hint}; known: {known}")
    return KINDS[kind].parse(argument, options, where)


def _nothing_more(spec: type[PortSpec], argument: str, options: Pairs, where: str) -> None:
    if argument:
        raise OptionError(f"{where}: {spec.KIND}: takes nothing after the colon, not {argument!r}")
    take(options, spec.KEYS, where)


def _interface_name(name: str, what: str, where: str) -> None:
    """Hold ``name`` to the kernel's rules for interface names (net/core/dev.c, dev_valid_name)."""
    if len(name.encode()) > INTERFACE_NAME_MAX:
        raise OptionError(f"{where}: {what} name {name!r} is longer than {INTERFACE_NAME_MAX} bytes, the most"
                          " Linux takes for an interface")
    if name in (".", "..") or re.search(r"[/:%\s\0]", name):
        raise OptionError(f"{where}: {name!r} cannot name a network interface; use letters, digits, - and _")


def _address(text: str, where: str) -> IPv4Interface | IPv6Interface:
    """``A/P``. A missing prefix is refused: a host address alone is hardly ever what was meant."""
    try:
        if "/" in text and "%" not in text:
            return ip_interface(text)
    except ValueError:
        pass
    raise OptionError(f"{where}: {text!r} is not ADDRESS/PREFIX, e.g. 10.0.0.1/24 or fd00::1/64")


def _descriptor(text: str, where: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise OptionError(f"{where}: fd={text} is not the number of an open file descriptor")
    return int(text)
