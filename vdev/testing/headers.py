"""What a hostile driver, or a network that nobody told about offloads, writes into a virtio_net_hdr, and what follows.

Each case is a pytest.param(header, features, outcome); its id begins with that of its row in
docs/conformance/network.tsv. The frame is FRAME.
"""

import pytest

from vdev.net.features import HOST_GSO, Feature, mask
from vdev.testing.netdriver import (
    GSO_ECN,
    GSO_TCPV4,
    GSO_TCPV6,
    GSO_UDP,
    GSO_UDP_L4,
    NEEDS_CSUM,
    NetHeader,
)

BASE = mask(Feature.VERSION_1, Feature.INDIRECT_DESC, Feature.EVENT_IDX)
MERGEABLE = BASE | mask(Feature.MRG_RXBUF)
OFFLOADS = BASE | HOST_GSO | mask(Feature.CSUM)
FRAME = bytes(range(60))
MAX_FRAME = 65550  # bytes without header: Ethernet, and the longest packet IP can name

NONE = NetHeader()
REFUSED = "bad_header"  # the drop_reason, where no header goes out

# outcome: the header that goes out, or REFUSED.
FROM_GUEST = [
    pytest.param(NetHeader(NEEDS_CSUM, csum_start=60), OFFLOADS, REFUSED, id="N01_start_at_the_end"),
    pytest.param(NetHeader(NEEDS_CSUM, csum_start=65534, csum_offset=65535), OFFLOADS, REFUSED, id="N01_huge"),
    pytest.param(NetHeader(NEEDS_CSUM, csum_start=0, csum_offset=0), OFFLOADS, REFUSED, id="N01_zero"),
    pytest.param(NetHeader(NEEDS_CSUM, csum_start=13, csum_offset=0), OFFLOADS, REFUSED, id="N01_in_ethernet"),
    pytest.param(NetHeader(NEEDS_CSUM, csum_start=34, csum_offset=25), OFFLOADS, REFUSED, id="N02_one_too_far"),
    pytest.param(NetHeader(NEEDS_CSUM, csum_start=34, csum_offset=24), OFFLOADS,
                 NetHeader(NEEDS_CSUM, csum_start=34, csum_offset=24), id="N02_just_fits"),
    pytest.param(NetHeader(NEEDS_CSUM, csum_start=34), BASE, REFUSED, id="N04_checksum_not_negotiated"),
    pytest.param(NetHeader(0, csum_start=65534, csum_offset=65535), OFFLOADS, NONE, id="N01_without_the_flag"),
    *(pytest.param(NetHeader(NEEDS_CSUM, kind, 54, 1448, 34, 16), OFFLOADS, REFUSED, id=f"N03_gso_type_{kind:#x}")
      for kind in (2, 6, 0x7F, 0x80, 0x82)),
    *(pytest.param(NetHeader(NEEDS_CSUM, kind, 54, 1448, 34, 16), OFFLOADS & ~mask(feature), REFUSED,
                   id=f"N04_without_{feature.name}")
      for kind, feature in ((GSO_TCPV4, Feature.HOST_TSO4), (GSO_TCPV6, Feature.HOST_TSO6),
                            (GSO_UDP, Feature.HOST_UFO), (GSO_UDP_L4, Feature.HOST_USO),
                            (GSO_TCPV4 | GSO_ECN, Feature.HOST_ECN))),
    *(pytest.param(NetHeader(NEEDS_CSUM, kind, 54, 1448, 34, 16), OFFLOADS,
                   NetHeader(NEEDS_CSUM, kind, 54, 1448, 34, 16), id=f"good_gso_type_{kind:#x}")
      for kind in (GSO_TCPV4, GSO_TCPV6, GSO_UDP, GSO_UDP_L4, GSO_TCPV4 | GSO_ECN, GSO_TCPV6 | GSO_ECN)),
    pytest.param(NetHeader(NEEDS_CSUM, GSO_TCPV4, 54, 0, 34, 16), OFFLOADS, REFUSED, id="N05_gso_size_0"),
    pytest.param(NetHeader(NEEDS_CSUM, GSO_TCPV4, 54, 1, 34, 16), OFFLOADS, REFUSED, id="N06_gso_size_1"),
    pytest.param(NetHeader(NEEDS_CSUM, GSO_TCPV4, 54, 47, 34, 16), OFFLOADS, REFUSED, id="N06_below_the_floor"),
    pytest.param(NetHeader(NEEDS_CSUM, GSO_TCPV4, 54, 48, 34, 16), OFFLOADS,
                 NetHeader(NEEDS_CSUM, GSO_TCPV4, 54, 48, 34, 16), id="N06_at_the_floor"),
    pytest.param(NetHeader(NEEDS_CSUM, GSO_TCPV4, 2000, 1448, 34, 16), OFFLOADS,
                 NetHeader(NEEDS_CSUM, GSO_TCPV4, 60, 1448, 34, 16), id="N07_hdr_len_beyond_the_frame"),
    pytest.param(NetHeader(0xFF, csum_start=34, csum_offset=16), OFFLOADS,
                 NetHeader(NEEDS_CSUM, csum_start=34, csum_offset=16), id="N09_unknown_flags"),
    pytest.param(NetHeader(0xFE), OFFLOADS, NONE, id="N09_unknown_flags_alone"),
    pytest.param(NetHeader(num_buffers=0xFFFF), OFFLOADS, NONE, id="N11_num_buffers"),
    pytest.param(NetHeader(gso_size=7), OFFLOADS, NONE, id="N05_gso_size_without_gso"),
]

# outcome: the drop_reason, or None where the frame reaches the guest.
TO_GUEST = [
    pytest.param(NetHeader(NEEDS_CSUM, csum_start=34), MERGEABLE, "offload", id="checksum"),
    pytest.param(NetHeader(NEEDS_CSUM, GSO_TCPV4, 54, 1448, 34, 16), MERGEABLE | mask(Feature.GUEST_CSUM), "offload",
                 id="tso"),
    pytest.param(NetHeader(NEEDS_CSUM, GSO_TCPV4 | GSO_ECN, 54, 1448, 34, 16),
                 MERGEABLE | mask(Feature.GUEST_CSUM, Feature.GUEST_TSO4), "offload", id="ecn"),
    pytest.param(NetHeader(NEEDS_CSUM, GSO_UDP_L4, 54, 1448, 34, 6),
                 MERGEABLE | mask(Feature.GUEST_CSUM, Feature.GUEST_USO4), "offload", id="one_half_of_uso"),
    pytest.param(NetHeader(NEEDS_CSUM, GSO_TCPV4, 54, 1448, 34, 16),
                 MERGEABLE | mask(Feature.GUEST_CSUM, Feature.GUEST_TSO4), None, id="tso_negotiated"),
    pytest.param(NetHeader(flags=2), MERGEABLE, None, id="data_valid"),
]
