"""The interface as the host's network sees it: up, address, bridge, MTU.

What one ioctl does is done by one. Addresses and bridges go through pyroute2, which is imported only when
they are asked for: it takes half a second and is not needed again. Names are looked up in the network
namespace of this process.
"""

import contextlib
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Interface, IPv6Interface
from typing import TYPE_CHECKING, Any

from vdev.ports.base import PortError

if TYPE_CHECKING:
    from pyroute2 import IPRoute

_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_SIOCGIFMTU = 0x8921
_IFF_UP = 1

_SIOCGIFINDEX = 0x8933

# Rules of vdev/seccomp.py, with their reasons: what looking at an interface takes, and setting it up over netlink.
SYSCALLS = {
    f"socket[0] == {socket.AF_UNIX}": "what the ioctls below are asked of",
    f"ioctl[1] == {_SIOCGIFINDEX:#x}": "is there an interface of that name",
    f"ioctl[1] == {_SIOCGIFFLAGS:#x}": "is it up",
    f"ioctl[1] == {_SIOCSIFFLAGS:#x}": "bringing it up",
}
NETLINK_SYSCALLS = {
    f"socket[0] == {socket.AF_NETLINK} and socket[2] == {socket.NETLINK_ROUTE}": "addresses and bridges",
    "bind": "of that socket",
    f"setsockopt[1] == {socket.SOL_SOCKET}": "the length of its queues",
    "setsockopt[1] == 270": "SOL_NETLINK: how the kernel answers",
    "socketpair": "pyroute2 runs a loop of its own, which wakes itself",
    "sendto": "requests",
    "sendmsg": "the same, of older versions",
    "recvfrom": "answers",
    "recvmsg": "the same, of older versions",
    "shutdown": "the end of that socket",
}

_REQUEST_FLAGS = struct.Struct("16sH22x")
_REQUEST_MTU = struct.Struct("16si20x")

Address = IPv4Interface | IPv6Interface


@dataclass
class Changes:
    """What :func:`configure` changed on an interface, so that :func:`undo` can take it back."""

    addresses: list[Address] = field(default_factory=list)
    joined_bridge: bool = False


def exists(name: str) -> bool:
    """Is there an interface of that name?"""
    try:
        socket.if_nametoindex(name)
    except OSError:
        return False
    return True


def mtu(name: str) -> int | None:
    """The MTU in bytes; None when there is no such interface here."""
    try:
        answer = _ioctl(_SIOCGIFMTU, _REQUEST_MTU.pack(name.encode(), 0))
    except OSError as e:
        if e.errno == errno.ENODEV:
            return None
        raise
    return _REQUEST_MTU.unpack(answer)[1]


def bring_up(name: str) -> bool:
    """Set the interface up unless it is. -> False when that is not allowed. OSError for anything else."""
    flags = _REQUEST_FLAGS.unpack(_ioctl(_SIOCGIFFLAGS, _REQUEST_FLAGS.pack(name.encode(), 0)))[1]
    if flags & _IFF_UP:
        return True
    try:
        _ioctl(_SIOCSIFFLAGS, _REQUEST_FLAGS.pack(name.encode(), flags | _IFF_UP))
    except PermissionError:
        return False
    return True


def tun_queues(name: str) -> int:
    """How many queues, attached or detached, programs have open on the multi-queue TAP ``name``."""
    with _iproute() as ipr:
        data = _link(ipr, socket.if_nametoindex(name)).get_nested("IFLA_LINKINFO", "IFLA_INFO_DATA")
        return data.get_attr("IFLA_TUN_NUM_QUEUES") + data.get_attr("IFLA_TUN_NUM_DISABLED_QUEUES")


def configure(name: str, addresses: Sequence[Address], bridge: str | None) -> Changes:
    """Give interface ``name`` the addresses and make it a port of ``bridge``, where it is not so already.

    Raises PortError; what was changed until then has been taken back.
    """
    from pyroute2.netlink.exceptions import NetlinkError

    changes = Changes()
    with _iproute() as ipr:
        index = socket.if_nametoindex(name)
        doing = ""
        try:
            if bridge is not None:
                doing = f"be a port of bridge {bridge}"
                changes.joined_bridge = _join(ipr, name, index, bridge)
            for address in addresses:
                doing = f"have address {address}"
                if _add_address(ipr, index, address):
                    changes.addresses.append(address)
        except NetlinkError as e:
            _undo(ipr, index, changes)
            raise PortError(f"{name} cannot {doing}: {_cause(e.code)}") from None
        except PortError:
            _undo(ipr, index, changes)
            raise
    return changes


def undo(name: str, changes: Changes) -> None:
    """Take ``changes`` back; an interface that is gone, or not ours to change any more, is left alone."""
    if changes.addresses or changes.joined_bridge:
        with contextlib.suppress(OSError), _iproute() as ipr:
            _undo(ipr, socket.if_nametoindex(name), changes)


def _undo(ipr: "IPRoute", index: int, changes: Changes) -> None:
    from pyroute2.netlink.exceptions import NetlinkError

    for address in changes.addresses:
        with contextlib.suppress(NetlinkError):
            ipr.addr("del", index=index, address=str(address.ip), prefixlen=address.network.prefixlen)
    if changes.joined_bridge:
        with contextlib.suppress(NetlinkError):
            ipr.link("set", index=index, master=0)


def _add_address(ipr: "IPRoute", index: int, address: Address) -> bool:
    """-> False when the interface has it already."""
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        ipr.addr("add", index=index, address=str(address.ip), prefixlen=address.network.prefixlen)
    except NetlinkError as e:
        if e.code == errno.EEXIST:
            return False
        raise
    return True


def _join(ipr: "IPRoute", name: str, index: int, bridge: str) -> bool:
    """-> False when the interface is a port of the bridge already."""
    if not exists(bridge):
        raise PortError(f"{name}: there is no bridge {bridge}; make it with `ip link add {bridge} type bridge"
                        f" && ip link set {bridge} up`, or leave out bridge=")
    master = _link(ipr, socket.if_nametoindex(bridge))
    if master.get_nested("IFLA_LINKINFO", "IFLA_INFO_KIND") != "bridge":
        raise PortError(f"{name}: {bridge} exists but is no bridge; give bridge= the name of a Linux bridge")
    current = _link(ipr, index).get_attr("IFLA_MASTER")
    if current == master["index"]:
        return False
    if current:
        raise PortError(f"{name} already belongs to {socket.if_indextoname(current)}; take it out with"
                        f" `ip link set {name} nomaster`, or leave out bridge=")
    ipr.link("set", index=index, master=master["index"])
    return True


def _link(ipr: "IPRoute", index: int) -> Any:
    return ipr.link("get", index=index)[0]


def _cause(code: int) -> str:
    if code in (errno.EPERM, errno.EACCES):
        return (f"{os.strerror(code).lower()}; it needs CAP_NET_ADMIN (or IPv6 is switched off there);"
                " set it up beforehand, or run vdev as root")
    return f"{os.strerror(code).lower()}; compare with `ip address` and `ip link`"


def _iproute() -> "IPRoute":
    from pyroute2 import IPRoute

    return IPRoute()


def _ioctl(request: int, argument: bytes) -> bytes:
    # Any socket takes these; one for IP would be one more thing to allow.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as s:
        return fcntl.ioctl(s, request, argument)
