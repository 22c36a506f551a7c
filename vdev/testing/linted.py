"""A driver with its device under the linter, in this process; the driver's features are what was negotiated."""

import contextlib
from collections.abc import Iterator

from ring.driver import GuestMemory
from vdev.lint.findings import Findings
from vdev.lint.lane import LintedLane
from vdev.logs import EventLog
from vdev.testing.netdriver import NetDriver
from vdev.testing.rig import SteppedDevice


class LintedDevice(SteppedDevice):
    """A SteppedDevice of which each step is watched. ``findings`` has what was found."""

    def _new_lane(self) -> LintedLane:
        self.findings = Findings(EventLog("test"))
        return LintedLane(-1, self.findings, 0)

    def later(self, *seconds: float) -> None:
        """Look for missing kicks at each of these times (``time.monotonic``'s unit)."""
        self._turn()
        for now in seconds:
            self.lane.on_time(now)

    @property
    def found(self) -> set[str]:
        """The rules that were broken, after the device has done all there is to do."""
        self._turn()
        return set(self.findings.counts)


@contextlib.contextmanager
def linted(features: int, *, size: int = 8, buffer_size: int | None = None,
           **config: object) -> Iterator[tuple[NetDriver, LintedDevice]]:
    """size, buffer_size: as for NetDriver; ``config``: fields of LaneConfig."""
    with (GuestMemory(4 << 20) as memory,
          NetDriver(memory, features=features, size=size, buffer_size=buffer_size) as driver,
          LintedDevice(driver, **config) as device):
        yield driver, device
