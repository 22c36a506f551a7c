"""Commands about which receiveq a frame goes to, and which hash is made of it.

virtio 1.2, 5.1.6.5.6 "Automatic receive steering in multiqueue mode", with the hash, and 5.1.6.5.7 "Receive-side
scaling (RSS)"; virtio 1.3, "Inner Header Hash".
"""

import struct
from dataclasses import replace

from ring.receive_settings import KEY_SIZE, TABLE_MAX, HashType, TunnelType
from vdev.net.control.command import Context, Outcome, Rejected, unpack

_RSS_HEAD = struct.Struct("<IHH")  # hash_types, indirection_table_mask, unclassified_queue
_HASH_HEAD = struct.Struct("<I4H")  # hash_types, reserved


def vq_pairs_set(data: bytes, context: Context) -> Outcome:
    """So many queue pairs are used, and each flow stays on one of them."""
    (pairs,) = unpack("H", data)
    if not 1 <= pairs <= context.queue_pairs:
        raise Rejected(f"{pairs} queue pairs are not between 1 and {context.queue_pairs}")
    return Outcome(replace(context.settings, pairs=pairs, rss=False))


def rss_config(data: bytes, context: Context) -> Outcome:
    """The hash selects the receiveq, by a table."""
    if len(data) < _RSS_HEAD.size:
        raise Rejected(f"it comes with {len(data)} bytes, and its first fields alone have {_RSS_HEAD.size}")
    types, mask, unclassified = _RSS_HEAD.unpack_from(data)
    entries = mask + 1
    if entries > TABLE_MAX or entries & mask:
        raise Rejected(f"an indirection table of {entries} entries is no power of two up to {TABLE_MAX}")
    end = _RSS_HEAD.size + 2 * entries
    if len(data) < end + 2:
        raise Rejected(f"its indirection table has not the {entries} entries that its mask says")
    *table, transmitqs = struct.unpack_from(f"<{entries + 1}H", data, _RSS_HEAD.size)
    for queue in (*table, unclassified):
        if queue >= context.queue_pairs:
            raise Rejected(f"there is no receiveq {queue}: they go up to {context.queue_pairs - 1}")
    if not 1 <= transmitqs <= context.queue_pairs:
        raise Rejected(f"{transmitqs} transmitqs are not between 1 and {context.queue_pairs}")
    return Outcome(replace(context.settings, rss=True, indirection=tuple(table), unclassified=unclassified,
                           hash_types=_types(types, context), hash_key=_key(data[end + 2:])))


def hash_config(data: bytes, context: Context) -> Outcome:
    """A hash is made and reported; it selects nothing."""
    if len(data) < _HASH_HEAD.size:
        raise Rejected(f"it comes with {len(data)} bytes, and its first fields alone have {_HASH_HEAD.size}")
    types = _HASH_HEAD.unpack_from(data)[0]
    return Outcome(replace(context.settings, rss=False, hash_types=_types(types, context),
                           hash_key=_key(data[_HASH_HEAD.size:])))


def _types(types: int, context: Context) -> HashType:
    unknown = types & ~context.hash_types
    if unknown:
        raise Rejected(f"hash types {unknown:#x} are not supported")
    return HashType(types)


def _key(data: bytes) -> bytes:
    """A length, and a key that is so long."""
    if not data:
        raise Rejected("it has no hash_key_length")
    length, key = data[0], data[1:]
    if length > KEY_SIZE or len(key) != length:
        raise Rejected(f"a hash key of {length} bytes came with {len(key)}; there may be up to {KEY_SIZE}")
    return key


def hash_tunnel_set(data: bytes, context: Context) -> Outcome:
    """Of frames in these tunnels the inner header is hashed."""
    (types,) = unpack("I", data)
    unknown = types & ~context.tunnel_types
    if unknown:
        raise Rejected(f"tunnel types {unknown:#x} are not supported")
    return Outcome(replace(context.settings, tunnel_types=TunnelType(types)))
