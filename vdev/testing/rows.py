"""Requirements as rows of a table, and which tests are about which row.

The rows are docs/conformance/*.tsv; docs/conformance.md tells what the columns mean. A test says what it is
about with ``@pytest.mark.row("VQ-SPLIT-D-09")`` or with its name: ``test_R08_R10_...`` and
``test_VQ_PACKED_D_08_D_09_...`` are about two rows each, and so is ``test_c[gcc-mutate-R26_R28_...]``.
"""

import csv
import re
from dataclasses import dataclass
from pathlib import Path

# After `test_`, or at the start of a part of the parameters: a letter and a number, one or more.
_HOSTILE = re.compile(r"(?:test_|[\[-])((?:[A-Z]\d{2,3}(?:_|\b))+)")
_SPECIFIED = re.compile(r"test_(VQ_SPLIT|VQ_PACKED|RSVF)((?:_DR?_\d\d)+)")


@dataclass(frozen=True)
class Row:
    """One requirement.

    level: as in the specification (MUST, ...), or for the rows of hostile.tsv what follows (DROP, ...).
    section: of virtio 1.2. left_out: "not offered: REASON", "not tested: REASON" or "".
    """

    id: str
    level: str
    subject: str
    section: str
    requirement: str
    applies_when: str
    left_out: str

    @property
    def offered(self) -> bool:
        """Does the device offer what the row is about?"""
        return not self.left_out.startswith("not offered")

    @property
    def tested(self) -> bool:
        """Must there be a test? For what is not offered: that it is not."""
        return not self.left_out.startswith("not tested")


def read(table: Path) -> list[Row]:
    """The rows of one .tsv file, in its order. Raises TypeError for other columns than Row has."""
    with table.open(newline="") as file:
        return [Row(**fields) for fields in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]


def named(test: str) -> list[str]:
    """The ids of rows in the name of a test (its node id, or the last part of that)."""
    ids = [id for group in _HOSTILE.findall(test) for id in group.strip("_").split("_")]
    for family, numbers in _SPECIFIED.findall(test):
        ids += [f"{family}{number}".replace("_", "-") for number in re.findall(r"_DR?_\d\d", numbers)]
    return ids
