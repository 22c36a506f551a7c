"""A daemon that is kept over many tests, and proof that each of them left nothing in it.

Two devices: a test has the first to itself, the second is the bystander, which must not notice anything. What the
daemon holds is read from /proc, so that it holds for C and Python alike.
"""

import dataclasses
import os
import re
import select
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from vdev.net.features import Feature, mask
from vdev.testing.daemon import VISIBLE, Daemon
from vdev.testing.netdriver import NetDriver
from vdev.testing.scripted import ScriptedGuest
from vhost_user.codec import encode
from vhost_user.errors import PeerError
from vhost_user.frontend import FrontEnd, NoAnswer, RequestRefused
from vhost_user.spec import ProtocolFeature
from vhost_user.spec import mask as protocol_mask

SETTLE_SECONDS = 2.0  # what a session leaves is gone by then
WAIT = 30.0  # seconds until a test gives up
# Bytes of its own memory a process may have more than at first: logs, caches, what malloc keeps of frames of 4 MiB.
GROWTH = 16 << 20
# Named one by one: what is offered grows, and some of it changes what a request means.
FEATURES = mask(Feature.VERSION_1, Feature.MRG_RXBUF, Feature.EVENT_IDX, Feature.INDIRECT_DESC, Feature.MTU)
PROTOCOL = protocol_mask(ProtocolFeature.MQ, ProtocolFeature.RARP, ProtocolFeature.REPLY_ACK, ProtocolFeature.MTU,
                         ProtocolFeature.BACKEND_REQ, ProtocolFeature.RESET_DEVICE,
                         ProtocolFeature.CONFIGURE_MEM_SLOTS, ProtocolFeature.STATUS)
FRAME = bytes.fromhex("ffffffffffff 525400123456 88b5") + bytes(range(50))


@dataclasses.dataclass(frozen=True)
class Holding:
    """What a process has: open descriptors, mappings of memfds, threads, and bytes of memory of its own (RssAnon)."""

    fds: int
    mappings: int
    threads: int
    memory: int

    @property
    def counts(self) -> tuple[int, int, int]:
        """What has to be the same again, to the last one."""
        return self.fds, self.mappings, self.threads


def holding(pid: int) -> Holding:
    """What process ``pid`` has now. Raises OSError when there is none."""
    process = Path(f"/proc/{pid}")
    memory = re.search(r"^RssAnon:\s*(\d+) kB$", (process / "status").read_text(), re.MULTILINE)
    return Holding(len(os.listdir(process / "fd")), (process / "maps").read_text().count("memfd:"),
                   len(os.listdir(process / "task")), int(memory[1]) << 10)


def assert_returned(pid: int, before: Holding) -> None:
    """Within SETTLE_SECONDS process ``pid`` has as many descriptors, mappings and threads as ``before``, and not much
    more memory. Raises AssertionError."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while (now := holding(pid)).counts != before.counts and time.monotonic() < deadline:
        time.sleep(0.01)
    assert now.counts == before.counts and now.memory - before.memory < GROWTH, f"{now}, before {before}"


class KeptDaemon:
    """A daemon with two devices on loopback ports, listening on ``path`` and ``bystander`` in ``folder``.

    A context manager. ``baseline`` is what it holds between two sessions, after it has served some.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self.bystander = str(folder / "device.sock"), str(folder / "bystander.sock")
        self.daemon = Daemon([word for path in (self.path, self.bystander)
                              for word in ("--device", f"socket={path},port=loopback:")] + [*VISIBLE])
        for _ in range(3):
            self.serves()
        for path in (self.path, self.bystander):  # answered: the session before it is over
            with FrontEnd.connect(path) as front_end:
                front_end.get_features()
                self.baseline = dataclasses.replace(self.holding, fds=self.holding.fds - 1)

    @property
    def pid(self) -> int:
        """The daemon's process."""
        return self.daemon.child.pid

    @property
    def holding(self) -> Holding:
        """What the daemon has now."""
        return holding(self.pid)

    def connect(self) -> FrontEnd:
        """A front-end of the first device that has said nothing yet."""
        return FrontEnd.connect(self.path, timeout=WAIT)

    def agreed(self, features: int = FEATURES, protocol_features: int = PROTOCOL) -> FrontEnd:
        """A front-end that has negotiated what is offered of these, for split rings."""
        front_end = self.connect()
        front_end.negotiate(features, protocol_features)
        return front_end

    def refuses(self, kind: int, payload: bytes = b"", fds: Sequence[int] = (), *,
                then: Callable[[FrontEnd], None] = lambda _: None, protocol_features: int = PROTOCOL) -> None:
        """See one request refused, by two front-ends that agreed on ``protocol_features`` and did ``then``.

        One asks for an acknowledgement: it is not zero, the session goes on, no descriptor of ``fds`` was kept. The
        other does not: the connection ends. Raises AssertionError.
        """
        with self.agreed(protocol_features=protocol_features) as front_end:
            then(front_end)
            before = self.holding.fds
            assert refused(front_end, kind, payload, fds), "accepted"
            assert self.holding.fds == before, "descriptors of a refused request are open"
        with self.agreed(protocol_features=protocol_features) as front_end:
            then(front_end)
            assert ends(front_end, encode(kind, payload), fds), "accepted where no acknowledgement was asked for"

    def serves(self) -> None:
        """See a frame go round through each device. Raises AssertionError."""
        for path in (self.path, self.bystander):
            with ScriptedGuest.connect(path, size=8) as guest:
                frame = guest.exchange(FRAME, WAIT)
                if frame != FRAME:  # one that a lane held for want of buffers is the next guest's
                    frame = arrives(guest.driver)
                assert frame == FRAME, f"no frame came back through {path}"

    def check(self) -> None:
        """After a test: the daemon lives, serves, and has no more than before. Raises AssertionError."""
        assert self.daemon.child.running(), f"the daemon has ended\n{self.daemon.child.log()}"
        self.serves()
        assert "internal error" not in self.daemon.child.log(), self.daemon.child.log()
        try:
            assert_returned(self.pid, self.baseline)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.daemon.child.log()}") from None

    def __enter__(self) -> "KeptDaemon":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.daemon.__exit__(kind)


def arrives(driver: NetDriver) -> bytes | None:
    """The next frame that the driver gets; None where none comes."""
    received = driver.receive_within(WAIT)
    return None if received is None else received.frame


def refused(front_end: FrontEnd, kind: int, payload: bytes = b"", fds: Sequence[int] = ()) -> bool:
    """Is this request refused, and does the session go on? Raises AssertionError where it does not."""
    try:
        front_end.request(kind, payload, fds, need_reply=True)
    except RequestRefused:
        no = True
    except (PeerError, NoAnswer) as error:
        raise AssertionError(f"neither accepted nor refused: {error}") from None
    else:
        no = False
    try:
        assert front_end.get_features()
    except (PeerError, NoAnswer) as error:
        raise AssertionError(f"the session did not go on: {error}") from None
    return no


def stops(front_end: FrontEnd, ring: int) -> bool:
    """Is ring ``ring`` given back within WAIT seconds?"""
    front_end.timeout = WAIT
    try:
        front_end.get_vring_base(ring)
    except (PeerError, NoAnswer):
        return False
    return True


def ends(front_end: FrontEnd, data: bytes, fds: Sequence[int] = ()) -> bool:
    """Does the back-end close the connection because of ``data``?"""
    try:
        front_end.send_raw(data, fds)
    except PeerError:
        return True
    return front_end.closed()


def readable(fd: int) -> bool:
    """Is there something to read within WAIT seconds?"""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(WAIT * 1000))


class Traced:
    """A descriptor of which one can see whether every other holder has closed it; a context manager.

    ``fd`` is sent to the daemon. It is one end of a pipe: when no copy of it is open, the other end hangs up.
    """

    def __init__(self) -> None:
        self._other, self.fd = os.pipe()

    def closed(self, seconds: float = WAIT) -> bool:
        """Close our own copy; is no other left within ``seconds``?"""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        poll = select.poll()
        poll.register(self._other, 0)
        return bool(poll.poll(seconds * 1000))

    def __enter__(self) -> "Traced":
        return self

    def __exit__(self, *_: object) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        os.close(self._other)
