"""The TAP port: a network interface of the host whose other end is the guest.

Theory of operation
-------------------
A TAP is *made* (this process creates it; it vanishes with the last descriptor), *joined* (it exists, made
persistent by `ip tuntap add`; it stays) or *inherited* (``tap:fd=N``: somebody opened it for us and set it
up). The three differ in who gives the interface its address, and in nothing the pump sees.

Queues. A TAP we open is multi-queue wherever it may be, one queue a queue pair. The kernel spreads flows
over all *attached* queues, so a queue nobody reads swallows its flows: only pair 0 is attached at start,
and :meth:`Tap.enable` attaches and detaches the others (TUNSETQUEUE) as the guest does its queue pairs.
Detaching also drops what waits in the queue. A single-queue TAP, which we can only find, never make, is
read by one queue pair; it cannot be detached and keeps up to its queue length of frames for the guest.

Offloads belong to the interface, not to a queue. They are off until the guest has negotiated what it can
take: a frame with a partial checksum, or longer than the MTU, would otherwise reach a driver that cannot
handle it. IFF_NAPI is never used, it makes writing several times slower.

Deletion. When somebody deletes the interface, reads and writes fail with EBADFD for ever. The descriptors
themselves stay good: TUNSETIFF attaches the same ones to a new interface of the same name, so that the pump
keeps its numbers (:meth:`Tap.lost`).
"""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_interface
from typing import Any

from vdev import capabilities
from vdev.handover import Put, Take
from vdev.net.features import Feature, mask
from vdev.plain import from_plain
from vdev.ports import link, tun
from vdev.ports.base import VNET_HEADER, Carries, Ends, Needs, Port, PortError, PortPart
from vdev.ports.rarp import rarp_frame
from vdev.ports.spec import TapSpec

_ALWAYS = mask(Feature.CSUM, Feature.GUEST_CSUM,
               Feature.HOST_TSO4, Feature.HOST_TSO6, Feature.HOST_ECN, Feature.HOST_UFO,
               Feature.GUEST_TSO4, Feature.GUEST_TSO6, Feature.GUEST_ECN, Feature.GUEST_UFO)
_USO = mask(Feature.HOST_USO, Feature.GUEST_USO4, Feature.GUEST_USO6)  # Linux 6.2 and later

_FLAGS = tun.Flag.TAP | tun.Flag.NO_PI | tun.Flag.VNET_HDR


def offload_flags(features: int) -> tun.Offload:
    """What TUNSETOFFLOAD is to be told when the guest has negotiated ``features`` (virtio bits).

    The kernel knows segmentation only on top of checksums, ECN only on top of TSO, and USO only for both
    IP versions at once; a lone bit gives nothing.
    """
    def has(*bits: Feature) -> bool:
        return features & mask(*bits) == mask(*bits)

    flags = tun.Offload(0)
    if not has(Feature.GUEST_CSUM):
        return flags
    flags |= tun.Offload.CSUM
    if has(Feature.GUEST_TSO4):
        flags |= tun.Offload.TSO4
    if has(Feature.GUEST_TSO6):
        flags |= tun.Offload.TSO6
    if has(Feature.GUEST_ECN) and flags & (tun.Offload.TSO4 | tun.Offload.TSO6):
        flags |= tun.Offload.TSO_ECN
    if has(Feature.GUEST_UFO):
        flags |= tun.Offload.UFO
    if has(Feature.GUEST_USO4, Feature.GUEST_USO6):
        flags |= tun.Offload.USO4 | tun.Offload.USO6
    return flags


@dataclass(frozen=True)
class TapPart:
    """A TAP as it is handed on: its queues, and what to do with the interface when it is deleted or closed."""

    name: str
    queues: tuple[int, ...]
    multi_queue: bool
    enabled: tuple[bool, ...]
    offload: tun.Offload
    carries: Carries
    given_addresses: tuple[str, ...]
    joined_bridge: bool
    link_due: bool
    made: bool


class Tap(Port):
    """A TAP port; make it with :meth:`open`. ``name`` is the interface's real name."""

    def __init__(self, spec: TapSpec) -> None:
        self.name = spec.name
        self._spec = spec
        self._fds: list[int] = []
        self._multi_queue = True
        self._enabled: list[bool] = []
        self._offload = tun.Offload(0)
        self._changes = link.Changes()
        self._link_due = False  # the interface came back and has not got its addresses yet
        self._made = False

    @classmethod
    def open(cls, spec: TapSpec, queue_pairs: int) -> "Tap":
        """Make, join or inherit the TAP, up and with its addresses. Raises PortError, OSError for EMFILE.

        ``carries.queue_pairs`` is ``queue_pairs``, or 1 for a single-queue or inherited TAP.
        """
        port = cls(spec)
        try:
            if spec.fd is None:
                port._acquire(queue_pairs)
            else:
                port._inherit(spec.fd)
            port._take_stock()
        except OSError as e:
            port.close()
            if e.errno == errno.EMFILE:
                raise  # nothing to do with TAPs: the caller knows the words
            raise PortError(f"{port}: {os.strerror(e.errno).lower()} while setting it up; `ip -d link show"
                            f" {port.name}` tells how it stands") from None
        except PortError:
            port.close()
            raise
        return port

    def __str__(self) -> str:
        return f"tap:{self.name}" if self.name else str(self._spec)

    @property
    def usual_queue_pairs(self) -> int:
        """All that it has."""
        return self.carries.queue_pairs

    @property
    def needs(self) -> Needs:
        """No right at all, but for a TAP that vdev made or set up, and has to make again or to take down."""
        syscalls = {**tun.SYSCALLS, **link.SYSCALLS}
        if self._spec.addresses or self._spec.bridge is not None:
            syscalls |= link.NETLINK_SYSCALLS
            return Needs(frozenset({capabilities.NET_ADMIN}), syscalls)
        return Needs(frozenset({capabilities.NET_ADMIN} if self._made else ()), syscalls)

    def ends(self, pair: int) -> Ends:
        return Ends(self._fds[pair], self._fds[pair])

    def set_offloads(self, features: int) -> None:
        self._offload = offload_flags(features & self.carries.offloads)
        with self._unless_deleted("change its offloads"):
            self._tell_offload()

    def enable(self, pair: int, enabled: bool) -> None:
        if enabled == self._enabled[pair]:
            return
        self._enabled[pair] = enabled
        if self._multi_queue:
            with self._unless_deleted(f"{'attach' if enabled else 'detach'} queue {pair}"):
                tun.set_queue(self._fds[pair], enabled)

    def announce(self, mac: bytes) -> None:
        """Best effort, as on any Ethernet: an interface that is down or gone announces nothing."""
        frame = rarp_frame(mac)
        if frame is not None:
            with contextlib.suppress(OSError):
                os.write(self._fds[0], bytes(self.carries.header) + frame)

    def lost(self) -> bool:
        """Make or join the interface again, as it was: queues, offloads, addresses. May be tried any time.

        False for an inherited TAP: only who made it can make it again.
        """
        if self._spec.fd is not None:
            return not self._deleted(self._fds[0])
        try:
            self._attach_again()
        except (PortError, OSError):
            return False
        return True

    def export(self, put: Put) -> PortPart:
        return PortPart(str(self._spec), TapPart(
            self.name, tuple(map(put, self._fds)), self._multi_queue, tuple(self._enabled), self._offload, self.carries,
            tuple(map(str, self._changes.addresses)), self._changes.joined_bridge, self._link_due,
            self._made))

    @classmethod
    def adopt(cls, spec: TapSpec, state: Any, take: Take) -> "Tap":
        part = from_plain(TapPart, state)
        if len(part.queues) != len(part.enabled) or not part.queues:
            raise ValueError("a TAP whose queues do not match")
        port = cls(spec)
        port.name, port._multi_queue, port._enabled = part.name, part.multi_queue, list(part.enabled)
        port._fds = [take(queue) for queue in part.queues]
        port._offload, port.carries, port._link_due = part.offload, part.carries, part.link_due
        port._made = part.made
        port._changes = link.Changes([ip_interface(address) for address in part.given_addresses], part.joined_bridge)
        return port

    def let_go(self) -> None:
        while self._fds:
            os.close(self._fds.pop())

    def close(self) -> None:
        """Close the descriptors, an inherited one too. A joined TAP loses what we gave it."""
        if self._fds:
            link.undo(self.name, self._changes)
        self._changes = link.Changes()
        self.let_go()

    # ---- making and joining

    def _acquire(self, queue_pairs: int) -> None:
        found = link.exists(self.name)
        self._made = not found
        self._fds.append(_open_device(self))
        try:
            self.name = tun.attach(self._fds[0], self.name, _FLAGS | tun.Flag.MULTI_QUEUE)
        except OSError as e:
            if e.errno != errno.EINVAL:
                raise self._refusal(e, found) from None
            self._attach_single()
        if self._multi_queue:
            if found:
                self._refuse_company()
            for _ in range(1, queue_pairs):
                self._fds.append(_open_device(self))
                tun.attach(self._fds[-1], self.name, _FLAGS | tun.Flag.MULTI_QUEUE)
                tun.set_queue(self._fds[-1], False)
        elif queue_pairs > 1:
            self._note(f"{self.name} has a single queue: one queue pair is served; for more make it with"
                       f" `ip tuntap add dev {self.name} mode tap multi_queue vnet_hdr`")
        self._enabled = [pair == 0 for pair in range(len(self._fds))]
        self._set_up_link(found)

    def _attach_single(self) -> None:
        self._multi_queue = False
        try:
            tun.attach(self._fds[0], self.name, _FLAGS)
        except OSError as e:
            raise self._refusal(e, True) from None

    def _refuse_company(self) -> None:
        """Another program on the same multi-queue TAP would get part of our guest's flows."""
        if link.tun_queues(self.name) > 1:
            raise self._refusal(OSError(errno.EBUSY, ""), True)

    def _set_up_link(self, found: bool) -> None:
        if self._spec.addresses or self._spec.bridge is not None:
            changes = link.configure(self.name, self._spec.addresses, self._spec.bridge)
            if found:
                self._changes = changes
        if not link.bring_up(self.name):
            self._note(f"{self.name} is down and may not be set up by this user; frames are dropped until"
                       f" `sudo ip link set {self.name} up`")
        if self._spec.addresses and self._spec.bridge is not None:
            self._note(f"{self.name} is a port of {self._spec.bridge}: the host uses the address of the"
                       f" bridge; give {self._spec.bridge} the address instead")

    def _attach_again(self) -> None:
        """Bring back what of the interface is gone; what is there already is told again and stays."""
        flags = _FLAGS | (tun.Flag.MULTI_QUEUE if self._multi_queue else tun.Flag(0))
        found = link.exists(self.name)
        for pair, fd in enumerate(self._fds):
            if self._deleted(fd):
                self._link_due = True
                tun.attach(fd, self.name, flags)
                if not self._enabled[pair] and self._multi_queue:
                    tun.set_queue(fd, False)
        if self._header_of(self._fds[0]) != self.carries.header:
            raise PortError(f"{self} came back without the net header it had")
        self._tell_offload()
        if self._link_due:
            self._set_up_link(found)
            self._link_due = False

    # ---- inheriting

    def _inherit(self, fd: int) -> None:
        fix = "open /dev/net/tun, TUNSETIFF with IFF_TAP|IFF_NO_PI|IFF_VNET_HDR, and pass that descriptor"
        try:
            self.name, flags = tun.interface(fd)
        except OSError as e:
            what = {errno.EBADF: "is not open in this process (was it passed on?)",
                    errno.EBADFD: "is not attached to an interface"}.get(e.errno, "is no TAP")
            raise PortError(f"{self}: descriptor {fd} {what}; {fix}") from None
        if not flags & tun.Flag.TAP:
            raise PortError(f"{self}: descriptor {fd} is a TUN, which has no Ethernet; {fix}")
        # Whether IFF_NO_PI was set the kernel does not tell: TUNGETIFF uses the same bit as IFF_NOFILTER.
        os.set_inheritable(fd, False)
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_NONBLOCK)
        self._fds.append(fd)
        self._multi_queue = bool(flags & tun.Flag.MULTI_QUEUE)
        self._enabled = [not flags & tun.Flag.DETACH_QUEUE]
        self.enable(0, True)

    # ---- what the interface can do

    def _take_stock(self) -> None:
        header = self._header_of(self._fds[0])
        offloads = 0
        if header:
            offloads = _ALWAYS | (_USO if self._kernel_has_uso() else 0)
            self._tell_offload()
        self.carries = Carries(header, offloads, len(self._fds), link.mtu(self.name))

    def _header_of(self, fd: int) -> int:
        """Bytes of net header: 12, set here where the interface has one, or 0."""
        if not tun.interface(fd)[1] & tun.Flag.VNET_HDR:
            return 0
        tun.set_header(fd, VNET_HEADER)
        return VNET_HEADER

    def _kernel_has_uso(self) -> bool:
        try:
            tun.set_offload(self._fds[0], tun.Offload.CSUM | tun.Offload.USO4 | tun.Offload.USO6)
        except OSError as e:
            if e.errno != errno.EINVAL:
                raise
            return False
        return True

    def _tell_offload(self) -> None:
        if tun.interface(self._fds[0])[1] & tun.Flag.VNET_HDR:
            tun.set_offload(self._fds[0], self._offload)

    # ---- trouble

    @staticmethod
    def _deleted(fd: int) -> bool:
        try:
            tun.interface(fd)
        except OSError as e:
            return e.errno == errno.EBADFD
        return False

    @contextlib.contextmanager
    def _unless_deleted(self, doing: str) -> Iterator[None]:
        """Errors of a deleted interface pass silently: :meth:`lost` repeats what was to be told."""
        try:
            yield
        except OSError as e:
            if not self._deleted(self._fds[0]):
                cause = os.strerror(e.errno).lower()
                raise PortError(f"{self}: the kernel refused to {doing}: {cause}") from None

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes = (*self.notes, text)

    def _refusal(self, e: OSError, found: bool) -> PortError:
        """The line for a TUNSETIFF that failed; ``found``: the interface existed before."""
        name = self.name.replace("%d", "0")
        make = f"`sudo ip tuntap add dev {name} mode tap user $USER multi_queue vnet_hdr`"
        if e.errno == errno.EPERM and found:
            text = f"this user may not use {name}; make it again with {make}, or run vdev as root"
        elif e.errno == errno.EPERM:
            text = (f"making a TAP needs CAP_NET_ADMIN; make it once with {make}, run vdev as root, or use"
                    " --port responder, which needs no privilege")
        elif e.errno == errno.EBUSY:
            text = f"{name} is in use by another program; stop that program or choose another name"
        elif e.errno == errno.EINVAL:
            text = f"{name} exists but is no TAP; choose another name (`ip tuntap` lists the TAPs)"
        else:
            text = f"the kernel refused to attach: {os.strerror(e.errno).lower()}"
        return PortError(f"{self}: {text}")


def _open_device(port: Tap) -> int:
    try:
        return tun.open_device()
    except (FileNotFoundError, PermissionError) as e:
        why = "does not exist" if isinstance(e, FileNotFoundError) else "may not be opened by this user"
    except OSError as e:
        if e.errno not in (errno.ENODEV, errno.ENXIO):
            raise
        why = "is there, but the kernel has no driver for it"
    raise PortError(f"{port}: {tun.DEVICE} {why}; `sudo modprobe tun` loads the driver, a container needs"
                    f" --device {tun.DEVICE}; or use --port responder, which needs no TAP")
