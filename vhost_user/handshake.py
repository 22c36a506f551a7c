"""What real front-ends send, message by message, in their order.

Recorded from QEMU 7.2 and 10.0 with a multiqueue Linux guest and from DPDK 22.11's virtio-user device, and
held to those recordings by tests. A back-end that serves these sequences serves those front-ends as far as
the control protocol goes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .frontend import FrontEnd, RingSetup, SharedRegion
from .spec import VRING_LOG_FLAG, ProtocolFeature, Status, VirtioBit, mask


@dataclass(frozen=True)
class QemuVersion:
    """What differs between releases of QEMU.

    protocol_features  bits it knows: it sets all that are offered of these
    resets_device      sends RESET_DEVICE when the guest is reset
    awaits_enable      asks for an acknowledgement of SET_VRING_ENABLE
    memory_once        sends guest memory with the first queue pair only, not with each
    status_last        takes the status back to 0 after all rings have stopped, not before the last pair does
    """

    protocol_features: int
    resets_device: bool
    awaits_enable: bool
    memory_once: bool
    status_last: bool


QEMU_7_2 = QemuVersion(mask(*range(17)), resets_device=False, awaits_enable=False, memory_once=False,
                       status_last=False)
QEMU_10_0 = QemuVersion(mask(*range(20)), resets_device=True, awaits_enable=True, memory_once=True,
                        status_last=True)
# Not recorded: 10.0 as far as what is served here goes, but that it knows more bits.
QEMU_11_1 = replace(QEMU_10_0, protocol_features=mask(*range(24)))


class Qemu:
    """QEMU's virtio-net device on a vhost-user netdev.

    Life goes :meth:`connect`, :meth:`reset`, :meth:`start`, :meth:`stop`, and from reset again. ``rings`` are
    receiveq and transmitq of each queue pair in turn. ``frontend`` asks for acknowledgements only where QEMU
    does, from now on.
    """

    def __init__(self, frontend: FrontEnd, rings: Sequence[RingSetup],
                 version: QemuVersion = QEMU_10_0) -> None:
        frontend.ack = False
        self.frontend = frontend
        self.rings = rings
        self.version = version
        self.offered = 0  # virtio features of the back-end
        self._memory_sent = False

    def connect(self) -> None:
        """Everything before the guest runs. Raises ValueError if the back-end has too few queues."""
        pairs = range(len(self.rings) // 2)
        for pair in pairs:
            self._greet(first=pair == 0, pairs=len(pairs))
            for index in (2 * pair, 2 * pair + 1):
                self.frontend.set_vring_call(index, self.rings[index].call)
                self.frontend.set_vring_err(index, self.rings[index].err)

    def _greet(self, first: bool, pairs: int) -> None:
        frontend = self.frontend
        self.offered = frontend.get_features()
        if self.offered >> VirtioBit.PROTOCOL_FEATURES & 1:
            known = frontend.get_protocol_features() & self.version.protocol_features
            frontend.set_protocol_features(known)
        if first and frontend.has(ProtocolFeature.MQ) and frontend.get_queue_num() < pairs:
            raise ValueError(f"the back-end has fewer than {pairs} queue pairs")
        if frontend.has(ProtocolFeature.CONFIGURE_MEM_SLOTS):
            frontend.get_max_mem_slots()
        if first:
            if frontend.has(ProtocolFeature.BACKEND_REQ):
                frontend.set_backend_req_fd(need_reply=True)
            frontend.set_owner()
        frontend.get_features()

    def reset(self, enabled_pairs: int = 1) -> None:
        """What the reset of the guest brings, before its driver has said anything; may come several times."""
        if self.version.resets_device and self.frontend.has(ProtocolFeature.RESET_DEVICE):
            self.frontend.reset_device()
        self.enable_pairs(enabled_pairs)

    def enable_pairs(self, count: int) -> None:
        """Enable the first ``count`` queue pairs and disable the others: the driver said how many it uses."""
        for index in range(len(self.rings)):
            self._enable(index, index < 2 * count)

    def start(self, regions: Sequence[SharedRegion], features: int, *, mtu: int | None = None,
              enabled_pairs: int = 1) -> None:
        """The driver is ready: its ``features`` (of those offered), guest memory, and all rings."""
        frontend = self.frontend
        if mtu is not None and frontend.has(ProtocolFeature.MTU):
            frontend.net_set_mtu(mtu, need_reply=True)
        for pair in range(len(self.rings) // 2):
            if pair < enabled_pairs:
                self._enable(2 * pair, True)
                self._enable(2 * pair + 1, True)
            frontend.set_features(features | self.offered & mask(VirtioBit.PROTOCOL_FEATURES))
            self._add_status(Status.FEATURES_OK)
            if pair == 0 or not self.version.memory_once:
                self._share(regions, first=pair == 0)
            for index in (2 * pair, 2 * pair + 1):
                frontend.set_vring_num(index, self.rings[index].num)
                frontend.set_vring_base(index, self.rings[index].base)
                ring = self.rings[index]
                frontend.set_vring_addr(index, ring.desc, ring.avail, ring.used)
                frontend.set_vring_kick(index, ring.kick)
                frontend.set_vring_call(index, ring.call)
        self._memory_sent = True
        self._add_status(Status.ACKNOWLEDGE | Status.DRIVER | Status.DRIVER_OK)

    def stop(self) -> list[int]:
        """Stop all rings -> their bases."""
        last = len(self.rings) - 2
        bases = []
        for index in range(len(self.rings)):
            if index == last and not self.version.status_last:
                self._set_status(0)
            bases.append(self.frontend.get_vring_base(index))
        if self.version.status_last:
            self._set_status(0)
        return bases

    def log(self, fd: int, size: int) -> None:
        """A migration begins: writes are to be marked in the ``size`` bytes of ``fd``, while the rings run."""
        for pair in range(len(self.rings) // 2):
            if pair == 0 or not self.version.memory_once:
                self.frontend.set_log_base(fd, size, need_reply=False)
            self._logging(pair, True)

    def unlog(self) -> None:
        """The migration failed or was cancelled: no write is to be marked any more."""
        for pair in range(len(self.rings) // 2):
            self._logging(pair, False)

    def _logging(self, pair: int, on: bool) -> None:
        frontend, log_all = self.frontend, mask(VirtioBit.LOG_ALL)
        frontend.set_features(frontend.features & ~log_all | (log_all if on else 0), need_reply=True)
        for index in (2 * pair, 2 * pair + 1):
            ring = self.rings[index]
            frontend.set_vring_addr(index, ring.desc, ring.avail, ring.used, flags=VRING_LOG_FLAG if on else 0,
                                    log=ring.log, need_reply=True)

    def _enable(self, index: int, enabled: bool) -> None:
        frontend = self.frontend
        frontend.set_vring_enable(index, enabled, need_reply=self.version.awaits_enable)
        if self.version.awaits_enable and not frontend.has(ProtocolFeature.REPLY_ACK):
            frontend.get_features()  # a barrier

    def _share(self, regions: Sequence[SharedRegion], first: bool) -> None:
        # Memory outlives a reset of the device; QEMU keeps account and sends it only once.
        slots = self.frontend.has(ProtocolFeature.CONFIGURE_MEM_SLOTS)
        if slots and not self._memory_sent:
            for shared in regions:
                self.frontend.add_mem_reg(shared, need_reply=True)
        elif not slots and first:
            self.frontend.set_mem_table(regions, need_reply=True)

    def _add_status(self, bits: int) -> None:
        if self.frontend.has(ProtocolFeature.STATUS):
            status = self.frontend.get_status()
            if status | bits != status:
                self.frontend.set_status(status | bits)

    def _set_status(self, status: int) -> None:
        if self.frontend.has(ProtocolFeature.STATUS):
            self.frontend.set_status(status)


class VirtioUser:
    """DPDK's virtio-user device, whose driver is in the same process.

    Life goes :meth:`connect`, :meth:`start`, :meth:`stop`. ``rings`` as for :class:`Qemu`. The gpa of memory
    is its uva.
    """

    PROTOCOL_FEATURES = mask(ProtocolFeature.MQ, ProtocolFeature.REPLY_ACK, ProtocolFeature.STATUS)

    def __init__(self, frontend: FrontEnd, rings: Sequence[RingSetup]) -> None:
        frontend.ack = False
        self.frontend = frontend
        self.rings = rings

    def connect(self) -> int:
        """Everything up to the choice of features -> those offered."""
        self.frontend.set_owner()
        offered = self.frontend.get_features()
        if offered >> VirtioBit.PROTOCOL_FEATURES & 1:
            there = self.frontend.get_protocol_features()
            self.frontend.set_protocol_features(there & self.PROTOCOL_FEATURES)
        return offered

    def start(self, regions: Sequence[SharedRegion], features: int) -> None:
        """Start all queue pairs; ``features`` with bit 30 where protocol features are used."""
        frontend = self.frontend
        receive_first = [*range(0, len(self.rings), 2), *range(1, len(self.rings), 2)]
        for index in receive_first:
            frontend.set_vring_call(index, self.rings[index].call)
        frontend.set_features(features)
        self._set_status(Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK)
        if frontend.has(ProtocolFeature.STATUS):
            frontend.get_status()
            frontend.get_status()
        frontend.set_mem_table(regions, need_reply=True)
        for index in receive_first:
            ring = self.rings[index]
            frontend.set_vring_num(index, ring.num)
            frontend.set_vring_base(index, ring.base)
            frontend.set_vring_addr(index, ring.desc, ring.avail, ring.used)
            frontend.set_vring_kick(index, ring.kick)
        self._enable(range(2), True)
        self._set_status(Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK)
        self._enable(range(2, len(self.rings)), True)

    def stop(self) -> list[int]:
        """Stop all rings -> their bases."""
        self._enable(range(len(self.rings)), False)
        return [self.frontend.get_vring_base(index) for index in range(len(self.rings))]

    def _enable(self, indices: Sequence[int], enabled: bool) -> None:
        for index in indices:
            self.frontend.set_vring_enable(index, enabled)

    def _set_status(self, status: int) -> None:
        if self.frontend.has(ProtocolFeature.STATUS):
            self.frontend.set_status(status, need_reply=True)
