"""What the device offers: virtio features and vhost-user protocol features, by port and by front-end.

The virtio offer is what the device always has, plus the offloads the port can carry, minus what the
operator took out, minus what then lacks something it depends on (virtio 1.2, 5.1.3.1 "Feature bit
requirements"). QEMU's net device keeps the control queue and the configuration space to itself, which is why MQ and
GUEST_ANNOUNCE are offered to it without CTRL_VQ: the front-end adds that. Other front-ends leave both to the device.

Front-ends set bits they do not act on: QEMU every protocol feature it has a number for, user-mode Linux every virtio
feature its guest's driver takes. So what is offered depends on the :class:`Audience`, and a bit is offered to nobody
who would set it and then not do its part. docs/protocol.md has the table, bit by bit and with the reasons.

ORDER_PLATFORM is left out on purpose. It is for a device behind a bus, whose driver needs the platform's
barriers; without it driver and device "can be assumed to run on identical CPUs in an SMP configuration", and the
barriers between processors suffice (virtio 1.2, 6 "Reserved Feature Bits"). vdev is such software: the bit would
make guests slower and nothing safer.
"""

from dataclasses import dataclass
from functools import reduce
from operator import or_

from vdev.net.features import OFFLOADS, mask
from vdev.net.features import Feature as F
from vdev.ports.base import Carries
from vhost_user.spec import ProtocolFeature as P

# Bits the rest is built on: without VERSION_1 a guest would be a legacy one, which vdev does not serve, and
# without PROTOCOL_FEATURES QEMU silently falls back to serving the guest itself, without a network.
FIXED = mask(F.VERSION_1, F.PROTOCOL_FEATURES)

ALWAYS = FIXED | mask(F.MTU, F.MRG_RXBUF, F.LOG_ALL, F.INDIRECT_DESC, F.EVENT_IDX, F.ACCESS_PLATFORM, F.RING_PACKED,
                      F.IN_ORDER)

# What more each personality has, with one queue pair and with several.
PERSONALITIES = ("qemu-net", "full")
_CONTROLLED = (F.CTRL_RX, F.CTRL_RX_EXTRA, F.CTRL_VLAN, F.CTRL_MAC_ADDR, F.GUEST_ANNOUNCE, F.CTRL_GUEST_OFFLOADS, F.MQ,
               F.RSS, F.HASH_REPORT, F.HASH_TUNNEL, F.NOTF_COAL, F.VQ_NOTF_COAL, F.DEVICE_STATS)
_ONE_PAIR = {"qemu-net": mask(F.GUEST_ANNOUNCE),
             "full": mask(F.MAC, F.STATUS, F.SPEED_DUPLEX, F.GUEST_HDRLEN, F.CTRL_VQ, *_CONTROLLED)
             & ~mask(F.MQ, F.RSS)}
_SEVERAL_PAIRS = {"qemu-net": mask(F.MQ), "full": mask(F.MQ, F.RSS)}
# The control queue is walked by the control thread, which has no translations.
_NEVER = {"qemu-net": 0, "full": mask(F.ACCESS_PLATFORM)}

# What vdev can offer at all, if port and personality go along.
IMPLEMENTED = reduce(or_, (*_ONE_PAIR.values(), *_SEVERAL_PAIRS.values()), ALWAYS | OFFLOADS)

PROTOCOL = mask(P.MQ, P.LOG_SHMFD, P.RARP, P.REPLY_ACK, P.MTU, P.BACKEND_REQ, P.RESET_DEVICE, P.CONFIGURE_MEM_SLOTS,
                P.STATUS, P.DEVICE_STATE, P.GPA_ADDRESSES)


@dataclass(frozen=True)
class Audience:
    """A kind of front-end, by all that is known of it before it is offered anything.

    personality: what the operator says it is. ``qemu-net``: QEMU's virtio-net device, or another front-end that keeps
    control queue and configuration space; ``full``: one that leaves the whole device to the back-end.
    owner_first: its first message was SET_OWNER, as that of user-mode Linux, DPDK and front-ends in Rust is, and not
    GET_FEATURES, as QEMU's is.
    """

    personality: str = PERSONALITIES[0]
    owner_first: bool = False

    @property
    def withheld(self) -> int:
        """The virtio features it is not offered. User-mode Linux lets its guest's driver set ACCESS_PLATFORM and has no
        IOMMU to ask; of a front-end that has one and begins with SET_OWNER nothing is known. It also has packed rings
        begin at base 0, which says that their wrap counters are 0, and they are 1 (virtio 1.2, 2.8.1)."""
        if not self.owner_first:
            return 0
        return mask(F.RING_PACKED) if self.personality == "full" else mask(F.ACCESS_PLATFORM)

    @property
    def extra(self) -> int:
        """The protocol features that it is offered and others are not. The configuration space is asked for where it
        is ours, and QEMU's net device warns of a back-end that has one. QEMU sets INBAND_NOTIFICATIONS, in any of its
        devices, and has no code for it. User-mode Linux does its part and sets it whenever it can, simulation or not;
        messages are slower than eventfds, so they are for the operator to ask for."""
        if self.personality != "full":
            return 0
        return mask(P.CONFIG, P.INBAND_NOTIFICATIONS) if self.owner_first else mask(P.CONFIG)

    def queue_num(self, queue_pairs: int) -> int:
        """What GET_QUEUE_NUM answers. QEMU's net device means queue pairs, generic front-ends mean rings."""
        return queue_pairs if self.personality == "qemu-net" else 2 * queue_pairs + 1


# feature -> it needs at least one of these; what others need comes before what needs it
_NEEDS = {
    F.HOST_TSO4: mask(F.CSUM),
    F.HOST_TSO6: mask(F.CSUM),
    F.HOST_UFO: mask(F.CSUM),
    F.HOST_USO: mask(F.CSUM),
    F.HOST_ECN: mask(F.HOST_TSO4, F.HOST_TSO6),
    F.GUEST_TSO4: mask(F.GUEST_CSUM),
    F.GUEST_TSO6: mask(F.GUEST_CSUM),
    F.GUEST_UFO: mask(F.GUEST_CSUM),
    F.GUEST_USO4: mask(F.GUEST_CSUM),
    F.GUEST_USO6: mask(F.GUEST_CSUM),
    F.GUEST_ECN: mask(F.GUEST_TSO4, F.GUEST_TSO6),
}


# The same for whoever has to bring the control queue along: not QEMU.
_NEEDS_CONTROL = dict.fromkeys(_CONTROLLED, mask(F.CTRL_VQ)) | {
    F.HASH_TUNNEL: mask(F.RSS, F.HASH_REPORT)}


def without_orphans(features: int, personality: str = PERSONALITIES[0]) -> int:
    """``features`` less every one whose requirement is missing."""
    requirements = _NEEDS | _NEEDS_CONTROL if personality == "full" else _NEEDS
    for feature, needs in requirements.items():
        if not features & needs:
            features &= ~mask(feature)
    return features


def possible(carries: Carries, queue_pairs: int, personality: str) -> int:
    """All the virtio features a device with this port and so many queue pairs can honour."""
    own = _ONE_PAIR[personality] | (_SEVERAL_PAIRS[personality] if queue_pairs > 1 else 0)
    return (ALWAYS | carries.offloads | own) & ~_NEVER[personality]


def protocol_features(virtio: int, audience: Audience, postcopy: bool = False) -> int:
    """The mask GET_PROTOCOL_FEATURES answers to ``audience`` beside the ``virtio`` features offered: there is no way to
    share a log where there is no log. postcopy: there are userfaultfds to be had, and the front-end may have them."""
    offered = PROTOCOL | audience.extra | (mask(P.PAGEFAULT) if postcopy else 0)
    return offered if virtio & mask(F.LOG_ALL) else offered & ~mask(P.LOG_SHMFD)


def virtio_features(carries: Carries, queue_pairs: int, removed: int = 0, personality: str = PERSONALITIES[0]) -> int:
    """The mask GET_FEATURES answers; ``removed`` is what the operator took out."""
    return without_orphans(possible(carries, queue_pairs, personality) & ~(removed & ~FIXED), personality)
