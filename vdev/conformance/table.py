"""The rows: requirements of the virtio and the vhost-user specification for a device and its back-end.

rows.tsv has the columns of docs/conformance/*.tsv; ``left_out`` says why a row cannot be tested over a socket.
"""

from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from vdev.testing.rows import Row, read

# Sections of the report -> how the ids of their rows begin. The first that fits counts.
SECTIONS = {
    "status": ("ST-", "RST-", "VU-STAT", "VU-RST", "SUSP-", "INIT-"),
    "features": ("FEAT-", "RSVF-", "NET-FEAT", "VU-FEAT", "NET-CFG-D-13", "NET-CFG-D-14"),
    "messages": ("VU-MSG", "VU-REPLY", "VU-ERR"),
    "rings": ("VU-RING", "VU-BASE", "VU-SUSP", "VU-MQ", "VQRST-"),
    "memory": ("VU-MEM",),
    "log": ("VU-LOG",),
    "split": ("VQ-SPLIT",),
    "packed": ("VQ-PACKED",),
    "config": ("CFG-", "NET-CFG", "VU-CFG"),
    "transmit": ("NET-HDR", "NET-TX"),
    "receive": ("NET-RXB", "NET-RX-"),
    "control": ("NET-CVQ", "NET-RXF", "NET-MAC", "NET-VLAN", "NET-ANN", "NET-OFL", "NET-FF", "NET-VQ"),
    "steering": ("NET-MQ", "NET-RSS", "NET-HASH"),
    "coalescing": ("NET-COAL",),
    "statistics": ("NET-STAT",),
    "channel": ("VU-INB", "VU-BCH", "VU-IOTLB"),
    "migration": ("VU-PC", "VU-DST", "VU-INFL"),
    "network": ("VU-NET",),
    "program": ("VU-PROG", "VU-JSON"),
}


@cache
def rows() -> dict[str, Row]:
    """All rows by id, in the order of the table."""
    return {row.id: row for row in read(Path(__file__).with_name("rows.tsv"))}


def section(id: str) -> str:
    """The section of the report that row ``id`` belongs to. Raises KeyError for an id of none."""
    for name, beginnings in SECTIONS.items():
        if id.startswith(beginnings):
            return name
    raise KeyError(id)


def chosen(patterns: list[str], sections: list[str]) -> list[Row]:
    """The rows with an id like one of ``patterns`` and in one of ``sections``; an empty list means all."""
    return [row for row in rows().values()
            if (not patterns or any(fnmatchcase(row.id, pattern) for pattern in patterns))
            and (not sections or section(row.id) in sections)]
