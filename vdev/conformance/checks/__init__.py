"""The checks, a file for each section of the report. Each is a function given a Bench; its docstring says for people
what it does, and its mark which row it is about."""

from functools import cache
from importlib import import_module

from vdev.conformance.verdict import Check

FILES = ("status", "features", "messages", "replies", "rings", "bases", "stopped", "memory", "log",
         "split", "split_notify", "packed", "packed_notify", "transmit",
         "receive", "offloads", "steering", "network", "config", "inband", "iommu",
         "migration")


@cache
def by_row() -> dict[str, Check]:
    """All checks by the id of their row. Raises ValueError for a row with two."""
    found: dict[str, Check] = {}
    for name in FILES:
        for check in import_module(f"{__name__}.{name}").CHECKS.all:
            if check.row in found:
                raise ValueError(f"two checks of {check.row}")
            found[check.row] = check
    return found
