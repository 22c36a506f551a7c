"""What a back-end has to say to each message of a front-end: the control protocol once more, for tests.

Written from the vhost-user specification and from what vdev promises beyond it, not from vhost_user's tables: the two
are compared (tests/test_fuzz_frontend.py). It speaks of what a front-end can see - taken or refused, and with which
answer - and of which rings run. It leaves out what depends on time: rings that are resumed behind the driver's back.
"""

import copy
from dataclasses import dataclass, field

from vhost_user.spec import ProtocolFeature, Request
from vhost_user.wire import Region, VringAddr

BIT_30, VERSION_1, LOG_ALL, PACKED = 1 << 30, 1 << 32, 1 << 26, 1 << 34
DRIVER_OK = 0x04
FEATURES_OK = 8
LOG_FLAG = 0x1
END = 1 << 64


class Refuse(Exception):
    """The message has to be refused."""


@dataclass
class Ring:
    """What the front-end has said of one ring."""

    num: int = 0
    addr: VringAddr | None = None
    base: int = 0
    started: bool = False
    enabled: bool = False


@dataclass(frozen=True)
class File:
    """What a descriptor stands for. channel: back-end requests can be sent over it. bytes: how long the file is;
    usable: it is one that guest memory may lie in."""

    eventfd: bool = False
    channel: bool = False
    usable: bool = False
    bytes: int = 0


@dataclass
class Model:
    """A session, seen by its front-end. features, protocol_features: what the back-end offers; queue_num,
    max_mem_slots: what it answers."""

    features: int
    protocol_features: int
    queue_num: int
    max_mem_slots: int
    rings: list[Ring]
    driver_features: int = 0
    agreed: int = 0  # protocol features
    status: int = 0
    regions: list[Region] = field(default_factory=list)

    def after(self, kind: Request, *values: object, files: tuple[File, ...] = ()) -> tuple["Model", int | None]:
        """The session after a message that is as long as it should be -> and what is answered, if anything.

        values: what its payload says, as the method of its name takes it. Raises Refuse.
        """
        new = copy.deepcopy(self)
        return new, getattr(new, kind.name.lower())(*values, files)

    # ------------------------------------------------------------------------------------------ what holds

    def has(self, feature: ProtocolFeature) -> bool:
        """The protocol feature was agreed on."""
        return bool(self.agreed >> feature & 1)

    def running(self) -> list[int]:
        """The rings that are processed: started, by a driver that is ready, and not to be logged: no log is sent."""
        ready = not self.has(ProtocolFeature.STATUS) or self.status & DRIVER_OK
        logged = self.driver_features & LOG_ALL
        return [index for index, ring in enumerate(self.rings)
                if ring.started and ready and not (logged or ring.addr.flags & LOG_FLAG)]

    def _require(self, holds: object) -> None:
        if not holds:
            raise Refuse

    def _no_files(self, files: tuple[File, ...]) -> None:
        self._require(not files)

    def _ring(self, index: int) -> Ring:
        self._require(index < len(self.rings))
        return self.rings[index]

    def _any_started(self) -> bool:
        return any(ring.started for ring in self.rings)

    def _can_run(self, ring: Ring) -> bool:
        """Memory and place of a ring that begins to run ("Ring states"; virtio 1.2, 2.7 and 2.8.10.1)."""
        packed = self.driver_features & PACKED
        if packed:
            parts = [(ring.addr.desc, 16 * ring.num, 16), (ring.addr.avail, 4, 4), (ring.addr.used, 4, 4)]
            slots = [ring.base & 0x7FFF, ring.base >> 16 & 0x7FFF]
            if max(slots) >= ring.num:
                return False
        else:
            parts = [(ring.addr.desc, 16 * ring.num, 16), (ring.addr.avail, 6 + 2 * ring.num, 2),
                     (ring.addr.used, 6 + 8 * ring.num, 4)]
        return all(at % align == 0 and any(region.uva <= at and at + length <= region.uva + region.size
                                           for region in self.regions) for at, length, align in parts)

    def _change(self, before: list[int]) -> None:
        """Rings that run now and did not run ``before`` must be able to; those that run no more go on from where they
        were."""
        now = self.running()
        self._require(all(self._can_run(self.rings[index]) for index in set(now) - set(before)))
        for index in set(before) - set(now):
            if not self.driver_features & PACKED:
                self.rings[index].base &= 0xFFFF

    # ----------------------------------------------------------------------------------------- negotiation

    def get_features(self, files: tuple[File, ...]) -> int:
        self._no_files(files)
        return self.features

    def set_features(self, value: int, files: tuple[File, ...]) -> None:
        self._no_files(files)
        self._require(not value & ~self.features and value & VERSION_1)
        self._require(not self._any_started() or not (value ^ self.driver_features) & ~LOG_ALL)
        before = self.running()
        self.driver_features = value
        self._change(before)
        if not value & BIT_30:
            for ring in self.rings:
                ring.enabled = True

    def get_protocol_features(self, files: tuple[File, ...]) -> int:
        self._no_files(files)
        return self.protocol_features

    def set_protocol_features(self, value: int, files: tuple[File, ...]) -> None:
        self._no_files(files)
        self._require(not value & ~self.protocol_features)
        self._require(not self._any_started() or value == self.agreed)
        self.agreed = value

    def set_owner(self, files: tuple[File, ...]) -> None:
        self._no_files(files)

    reset_owner = set_owner

    def reset_device(self, files: tuple[File, ...]) -> None:
        self._no_files(files)
        self._require(self.has(ProtocolFeature.RESET_DEVICE))
        self.rings = [Ring() for _ in self.rings]
        self.driver_features = self.status = 0

    def get_queue_num(self, files: tuple[File, ...]) -> int:
        self._no_files(files)
        return self.queue_num

    def get_max_mem_slots(self, files: tuple[File, ...]) -> int:
        self._no_files(files)
        self._require(self.has(ProtocolFeature.CONFIGURE_MEM_SLOTS))
        return self.max_mem_slots

    def get_status(self, files: tuple[File, ...]) -> int:
        self._no_files(files)
        self._require(self.has(ProtocolFeature.STATUS))
        return self.status

    def set_status(self, value: int, files: tuple[File, ...]) -> None:
        self._no_files(files)
        self._require(self.has(ProtocolFeature.STATUS) and value <= 0xFF)
        before = self.running()
        self.status = value if self.driver_features else value & ~FEATURES_OK
        if value == 0:
            for ring in self.rings:
                ring.started = False
        self._change(before)

    def set_backend_req_fd(self, files: tuple[File, ...]) -> None:
        self._require(self.has(ProtocolFeature.BACKEND_REQ) and len(files) == 1 and files[0].channel)

    def net_set_mtu(self, value: int, files: tuple[File, ...]) -> None:
        self._no_files(files)
        self._require(self.has(ProtocolFeature.MTU) and 68 <= value <= 65535)

    def send_rarp(self, _value: int, files: tuple[File, ...]) -> None:
        self._no_files(files)
        self._require(self.has(ProtocolFeature.RARP))

    # ---------------------------------------------------------------------------------------------- memory

    def _sound(self, region: Region, file: File, others: list[Region]) -> None:
        self._require(region.size > 0)
        self._require(region.gpa + region.size < END and region.uva + region.size < END)
        self._require(file.usable and region.offset + region.size <= file.bytes)
        for other in others:
            self._require(region.gpa + region.size <= other.gpa or other.gpa + other.size <= region.gpa)
            self._require(region.uva + region.size <= other.uva or other.uva + other.size <= region.uva)

    def set_mem_table(self, regions: list[Region], files: tuple[File, ...]) -> None:
        self._require(1 <= len(regions) <= 8 and len(files) == len(regions))
        for position, (region, file) in enumerate(zip(regions, files, strict=True)):
            self._sound(region, file, regions[:position])
        self.regions = list(regions)

    def add_mem_reg(self, region: Region, files: tuple[File, ...]) -> None:
        self._require(self.has(ProtocolFeature.CONFIGURE_MEM_SLOTS) and len(files) == 1)
        times = self.regions.count(region)
        # QEMU before 8.0 adds all memory once for each queue pair.
        self._require(times < len(self.rings))
        if not times:
            self._require(len(set(self.regions)) < self.max_mem_slots)
            self._sound(region, files[0], self.regions)
        self.regions.append(region)

    def rem_mem_reg(self, region: Region, files: tuple[File, ...]) -> None:
        self._require(self.has(ProtocolFeature.CONFIGURE_MEM_SLOTS) and len(files) <= 1)
        named = [other for other in self.regions
                 if (other.gpa, other.uva, other.size) == (region.gpa, region.uva, region.size)]
        self._require(named)
        self.regions.remove(named[0])

    # ----------------------------------------------------------------------------------------------- rings

    def set_vring_num(self, index: int, num: int, files: tuple[File, ...]) -> None:
        ring = self._ring(index)
        self._no_files(files)
        self._require(not ring.started and 1 <= num <= 32768)
        ring.num = num

    def set_vring_addr(self, addr: VringAddr, files: tuple[File, ...]) -> None:
        ring = self._ring(addr.index)
        self._no_files(files)
        self._require(not addr.flags & ~(LOG_FLAG if self.features & LOG_ALL else 0))
        self._require(addr.desc % 16 == addr.avail % 2 == addr.used % 4 == 0)
        old = ring.addr
        self._require(not ring.started or (addr.desc, addr.avail, addr.used) == (old.desc, old.avail, old.used))
        before = self.running()
        ring.addr = addr
        self._change(before)

    def set_vring_base(self, index: int, num: int, files: tuple[File, ...]) -> None:
        ring = self._ring(index)
        self._no_files(files)
        self._require(not ring.started and (num <= 0xFFFF or self.driver_features & PACKED))
        ring.base = num

    def get_vring_base(self, index: int, _num: int, files: tuple[File, ...]) -> int:
        ring = self._ring(index)
        self._no_files(files)
        before = self.running()
        ring.started = False
        self._change(before)
        return ring.base

    def _ring_fd(self, index: int, fd: bool, files: tuple[File, ...]) -> Ring:
        ring = self._ring(index)
        self._require(len(files) == fd)
        return ring

    def set_vring_kick(self, index: int, fd: bool, files: tuple[File, ...]) -> None:
        ring = self._ring_fd(index, fd, files)
        self._require(all(file.eventfd for file in files))
        before = self.running()
        if not ring.started:
            self._require(self.driver_features and ring.num and ring.addr)
            self._require(self.driver_features & PACKED or ring.num & (ring.num - 1) == 0)
        ring.started = True
        self._change(before)

    def set_vring_call(self, index: int, fd: bool, files: tuple[File, ...]) -> None:
        self._ring_fd(index, fd, files)

    set_vring_err = set_vring_call

    def set_vring_enable(self, index: int, num: int, files: tuple[File, ...]) -> None:
        ring = self._ring(index)
        self._no_files(files)
        self._require(num in (0, 1))
        ring.enabled = bool(num)
