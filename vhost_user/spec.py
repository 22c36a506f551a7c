"""Numbers and names of the vhost-user protocol, as QEMU's docs/interop/vhost-user.rst gives them.

Nothing here decides anything. Which of these the product offers is the device's choice (:class:`Offer
<vhost_user.state.Offer>`), and what it does with a request is one row of :mod:`vhost_user.requests`.
"""

from enum import IntEnum

HEADER_SIZE = 12  # bytes: request, flags and payload size, three u32 in host byte order ("Header")

# Header flags ("Header").
VERSION_MASK = 0x3
VERSION = 0x1
REPLY_FLAG = 0x4
NEED_REPLY_FLAG = 0x8

# No request is longer than a page: the longest one known has 12 + 256 bytes of payload ("Virtio device
# config space"). A size beyond this bound is a framing violation, not an oversized request.
PAYLOAD_MAX = 4096
FDS_MAX = 8  # file descriptors in one message ("Communication")
TABLE_REGIONS_MAX = 8  # regions in one SET_MEM_TABLE ("Multiple memory regions description")

# SET_VRING_KICK, SET_VRING_CALL and SET_VRING_ERR carry one u64 (entry "VHOST_USER_SET_VRING_KICK").
VRING_NOFD = 0x100  # no file descriptor comes along; the bits below it are the ring index

QUEUE_SIZE_MAX = 32768  # virtio 1.x, "Virtqueues": the largest size of a queue
VRING_LOG_FLAG = 0x1  # "A vring address description": writes to the used ring are logged
CONFIG_MAX = 256  # bytes of a device's configuration space ("Virtio device config space")
STATE_NOFD = 0x100  # SET_DEVICE_STATE_FD: no file descriptor comes back, the front-end's own is used
MTU_MIN, MTU_MAX = 68, 65535  # virtio 1.x, "Network Device / Device configuration layout"


class VirtioBit(IntEnum):
    """Bit numbers of the feature bits that the control protocol itself has to know."""

    LOG_ALL = 26  # VHOST_F_LOG_ALL, "Migration"
    PROTOCOL_FEATURES = 30  # VHOST_USER_F_PROTOCOL_FEATURES, entry "VHOST_USER_GET_FEATURES"
    VERSION_1 = 32
    ACCESS_PLATFORM = 33  # the driver is behind an IOMMU: "IOMMU support"
    RING_PACKED = 34
    RING_RESET = 40


class Status(IntEnum):
    """Bits of the device status byte (virtio 1.x, "Device Status Field")."""

    ACKNOWLEDGE = 0x01
    DRIVER = 0x02
    DRIVER_OK = 0x04
    FEATURES_OK = 0x08
    DEVICE_NEEDS_RESET = 0x40
    FAILED = 0x80


class Direction(IntEnum):
    """Which way a device's state goes ("Device state transfer parameters")."""

    SAVE = 0
    LOAD = 1


class ConfigWrite(IntEnum):
    """Whose SET_CONFIG it is: its ``flags`` ("Virtio device config space")."""

    DRIVER = 0
    MIGRATION = 1


STOPPED_PHASE = 0  # the same: the one phase there is, with all rings stopped


class ProtocolFeature(IntEnum):
    """Bit numbers of the protocol features ("Protocol features")."""

    MQ = 0
    LOG_SHMFD = 1
    RARP = 2
    REPLY_ACK = 3
    MTU = 4
    BACKEND_REQ = 5
    CROSS_ENDIAN = 6
    CRYPTO_SESSION = 7
    PAGEFAULT = 8
    CONFIG = 9
    BACKEND_SEND_FD = 10
    HOST_NOTIFIER = 11
    INFLIGHT_SHMFD = 12
    RESET_DEVICE = 13
    INBAND_NOTIFICATIONS = 14
    CONFIGURE_MEM_SLOTS = 15
    STATUS = 16
    XEN_MMAP = 17
    SHARED_OBJECT = 18
    DEVICE_STATE = 19
    GET_VRING_BASE_INFLIGHT = 20
    GPA_ADDRESSES = 21
    SHMEM = 22
    GET_VRING_BASE_SKIP_DRAIN = 23


class Request(IntEnum):
    """What a front-end may ask ("Front-end message types")."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43
    GET_SHMEM_CONFIG = 44
    GET_VRING_BASE_SKIP_DRAIN = 45


class IotlbType(IntEnum):
    """What an IOTLB message says ("IOTLB message")."""

    MISS = 1
    UPDATE = 2
    INVALIDATE = 3
    ACCESS_FAIL = 4


class BackendRequest(IntEnum):
    """What a back-end may ask over the socket of SET_BACKEND_REQ_FD ("Back-end message types")."""

    IOTLB_MSG = 1
    CONFIG_CHANGE_MSG = 2
    VRING_HOST_NOTIFIER_MSG = 3
    VRING_CALL = 4
    VRING_ERR = 5
    SHARED_OBJECT_ADD = 6
    SHARED_OBJECT_REMOVE = 7
    SHARED_OBJECT_LOOKUP = 8
    SHMEM_MAP = 9
    SHMEM_UNMAP = 10


def request_name(number: int) -> str:
    """The name of front-end request ``number``, or ``request N`` where it has none."""
    try:
        return Request(number).name
    except ValueError:
        return f"request {number}"


def mask(*bits: int) -> int:
    """The mask with exactly these bit numbers set."""
    value = 0
    for bit in bits:
        value |= 1 << bit
    return value


def bit_names(value: int, names: type[IntEnum]) -> str:
    """The bits set in ``value`` for a person: by name where ``names`` has one, else ``bit N``."""
    known = {int(bit): bit.name for bit in names}
    return ", ".join(known.get(n, f"bit {n}") for n in range(value.bit_length()) if value >> n & 1)
