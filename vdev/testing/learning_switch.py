"""A learning Ethernet switch in plain Python, to hold the one in C against (IEEE 802.1D-2004, 7.7 to 7.9).

It knows no rings, no limits and no concurrency: who gets a frame, that is all.
"""


def _is_group(mac: bytes) -> bool:
    return bool(mac[0] & 1)


class LearningSwitch:
    """lifetime: at so many ticks after the one it was last seen in a station is forgotten. Members are any numbers."""

    def __init__(self, lifetime: int) -> None:
        self.stations: dict[bytes, tuple[int, int]] = {}  # address -> (member, tick it was last seen in)
        self.up: set[int] = set()
        self._lifetime = lifetime
        self._now = 0

    def set_up(self, member: int, up: bool) -> None:
        """What is behind a member that goes down is forgotten."""
        if up:
            self.up.add(member)
            return
        self.up.discard(member)
        self.stations = {mac: seen for mac, seen in self.stations.items() if seen[0] != member}

    def tick(self) -> None:
        """Time passes."""
        self._now += 1
        self.stations = {mac: seen for mac, seen in self.stations.items() if self._now - seen[1] < self._lifetime}

    def forward(self, member: int, frame: bytes) -> set[int]:
        """Who gets ``frame``, which came from ``member``."""
        to, source = frame[:6], frame[6:12]
        others = self.up - {member}
        if _is_group(source):
            return set()
        self.stations[source] = (member, self._now)
        if to[:5] == bytes.fromhex("0180c20000") and to[5] < 16:
            return set()
        behind = self.stations.get(to, (None, 0))[0]
        if _is_group(to) or (behind != member and behind not in self.up):
            return others
        return others & {behind}
