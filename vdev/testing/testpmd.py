"""DPDK's testpmd, driven over its prompt: as a second, independent front-end without a virtual machine, hugepages or
root (:class:`Testpmd`), and with any ports, its own vhost-user back-end among them (:class:`Forwarder`).

It polls: while it forwards, one processor is busy.
"""

import itertools
import os
import re
import shutil
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from vdev.testing.console import Console, ConsoleClosed
from vdev.testing.netns import Namespace
from vdev.testing.process import Child, ProcessDied

PROGRAM = "dpdk-testpmd"
PROMPT = b"testpmd> "
_DRIVER = "pmd.net.virtio.*"  # in its log
_TX_MULTI_SEGS = 0x8000  # a frame may be sent from several buffers
_SPARE_BUFFERS = 4096  # beside those in the rings: frames on their way, and each processor's cache
_runs = itertools.count()


def why_no_testpmd() -> str | None:
    """Why testpmd cannot run here, or None when it can."""
    if not shutil.which(PROGRAM):
        return f"no {PROGRAM} on this machine: apt install dpdk"
    if len(os.sched_getaffinity(0)) < 2:
        return f"{PROGRAM} needs two processors: one for its prompt, one that polls"
    return None


@dataclass(frozen=True)
class Rings:
    """What the driver asks for, all of it at once. size: descriptors of each ring."""

    packed: bool = False
    in_order: bool = False
    mergeable: bool = True
    size: int = 256
    queue_pairs: int = 1

    def __str__(self) -> str:
        words = ["packed" if self.packed else "split", "in_order" if self.in_order else "any_order",
                 "mergeable" if self.mergeable else "one_buffer", str(self.size), f"{self.queue_pairs}_pairs"]
        return "-".join(words)

    def front_end(self, number: int, path: str, vectorized: bool = False, mac: str | None = None) -> str:
        """DPDK's words for its virtio-user port ``number``, with these rings, on the vhost-user socket ``path``."""
        return (f"net_virtio_user{number},path={path},queues={self.queue_pairs},queue_size={self.size},"
                f"mrg_rxbuf={int(self.mergeable)},packed_vq={int(self.packed)},"
                f"in_order={int(self.in_order)},vectorized={int(vectorized)}" + (f",mac={mac}" if mac else ""))


@dataclass(frozen=True)
class StreamReport:
    """What testpmd counted for one queue pair: frames, from its point of view."""

    received: int
    sent: int
    dropped: int


@dataclass(frozen=True)
class Counters:
    """What testpmd has counted on all ports since it began to forward. dropped: frames it made and could not send.
    busy_seconds: in bursts that moved frames, by the processor's time stamp counter, which counts ``hertz`` a second;
    both 0 unless it records them."""

    received: int
    sent: int
    dropped: int
    busy_seconds: float = 0.0
    hertz: float = 0.0

    def since(self, before: "Counters") -> "Counters":
        """The difference."""
        return Counters(self.received - before.received, self.sent - before.sent, self.dropped - before.dropped,
                        self.busy_seconds - before.busy_seconds, self.hertz)


def parse_counters(text: str) -> Counters:
    """Understand the answer to ``show fwd stats all``. Raises ValueError."""
    sums = text.partition("Accumulated forward statistics")[2]
    received = re.search(r"RX-packets: (\d+)", sums)
    sent = re.search(r"TX-packets: (\d+)\s+TX-dropped: (\d+)", sums)
    if not received or not sent:
        raise ValueError(f"no sums of forward statistics in: {text.strip()!r}")
    counts = int(received[1]), int(sent[1]), int(sent[2])
    cycles = re.search(r"total cycles=(\d+) .* at (\d+) MHz", sums)
    if not cycles:
        return Counters(*counts)
    hertz = int(cycles[2]) * 1e6
    return Counters(*counts, int(cycles[1]) / hertz, hertz)


@dataclass(frozen=True)
class Placement:
    """Where a testpmd runs: the processors of its polling thread and of its prompt. huge: memory in huge pages, which
    have to be there; else ordinary memory. megabytes: how much."""

    polling: int
    prompt: int
    huge: bool = False
    megabytes: int = 256

    @classmethod
    def usual(cls) -> "Placement":
        """The last two processors of this process."""
        return cls(*sorted(os.sched_getaffinity(0))[-2:])

    def environment(self) -> list[str]:
        """As options of DPDK's environment layer."""
        memory = ["--in-memory", "--single-file-segments"] if self.huge else ["--no-huge"]
        return ["--lcores", f"0@{self.prompt},1@{self.polling}", "--main-lcore", "0", *memory,
                "-m", str(self.megabytes)]


class Forwarder:
    """A running testpmd with the ports ``devices`` (as --vdev takes them); a context manager.

    mode: its forwarding mode, e.g. ``io`` (what comes in at one port of a pair goes out at the other), ``rxonly``,
    ``txonly``. ring_size: descriptors. options, environment: more options of testpmd and of DPDK's environment layer.
    namespace: where it makes network interfaces. Raises ProcessDied when it does not come to its prompt.
    """

    def __init__(self, devices: Sequence[str], *, mode: str = "io", ring_size: int = 256, queue_pairs: int = 1,
                 buffers: int | None = None, placement: Placement | None = None, options: Sequence[str] = (),
                 environment: Sequence[str] = (), namespace: Namespace | None = None) -> None:
        self.devices = tuple(devices)
        placement = placement or Placement.usual()
        if buffers is None:
            buffers = 2 * len(devices) * queue_pairs * ring_size + _SPARE_BUFFERS
        command = [PROGRAM, *placement.environment(), "--no-pci", "--no-telemetry", "--no-shconf",
                   *(f"--vdev={device}" for device in devices),
                   f"--file-prefix=vdev-{os.getpid()}-{next(_runs)}", f"--log-level={_DRIVER}:info", *environment,
                   "--", "-i", f"--total-num-mbufs={buffers}", f"--rxd={ring_size}", f"--txd={ring_size}",
                   # Its own choice is a quarter of a small ring, which has to be a multiple of four.
                   "--rxfreet=32",
                   f"--rxq={queue_pairs}", f"--txq={queue_pairs}", "--nb-cores=1", f"--forward-mode={mode}", *options]
        ours, theirs = socket.socketpair()
        with theirs:
            # Its answers are buffered apart from its prompt, and would come after it.
            self.child = Child(["stdbuf", "-oL", *command], terminal=theirs.fileno(), namespace=namespace)
        self._console = Console(ours)
        try:
            self._console.wait_for(PROMPT, 30)
        except ConsoleClosed:
            self.stop()
            raise ProcessDied(f"{PROGRAM} gave up:\n{self.said}") from None
        except BaseException:
            self.stop()
            raise

    def command(self, line: str, timeout: float = 20) -> str:
        """Give a command and return what it prints. Raises ConsoleTimeout when no prompt follows."""
        self._console.send(line.encode() + b"\n")
        return self._console.wait_for(PROMPT, timeout).decode(errors="replace")

    @property
    def said(self) -> str:
        """All it has printed so far, its driver's log included."""
        return self._console.transcript + self.child.log()

    def start(self, bursts: int = 0) -> None:
        """Begin to forward; with ``bursts``, first send so many bursts of 32 frames on each queue."""
        self.command(f"start tx_first {bursts}" if bursts else "start")

    def counters(self) -> Counters:
        """What was counted since :meth:`start`; while it forwards."""
        return parse_counters(self.command("show fwd stats all"))

    def received(self) -> int:
        """Frames that came in since the port was opened."""
        return int(re.search(r"RX-packets: (\d+)", self.command("show port stats 0"))[1])

    def stop_forwarding(self) -> list[StreamReport]:
        """End forwarding; the account of each queue pair since :meth:`start`."""
        said = self.command("stop")
        counts = r"\s+RX-packets: (\d+)\s+TX-packets: (\d+)\s+TX-dropped: (\d+)"
        streams = re.findall(r"Queue= ?\d+ -------" + counts, said)
        if not streams:  # one stream is reported as its port
            counts = r"\s+RX-packets: (\d+) .*\s+TX-packets: (\d+)\s+TX-dropped: (\d+)"
            streams = re.findall(r"statistics for port 0  -+" + counts, said)
        return [StreamReport(*map(int, numbers)) for numbers in streams]

    def stop(self) -> int:
        """End the program in order. Returns its exit status; may be called again."""
        if self.child.running():
            try:
                self._console.send(b"quit\n")
                self.child.wait(10)
            except (ConsoleClosed, ProcessDied):
                self.child.kill()
        self._console.close()
        return self.child.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class Testpmd(Forwarder):
    """A running testpmd on the vhost-user socket ``path``; a context manager.

    rings: what it asks for. buffer_size: bytes of each of its buffers, 128 of them kept free; None: as long as a
    frame, and only with ``rings.mergeable`` may it be less. vectorized: use its SIMD code where it has some for
    these rings (:attr:`refusals`). mode: its forwarding mode, e.g. ``io`` (what comes in goes out) or
    ``icmpecho`` (answers ARP and pings for any address). Raises ProcessDied when it does not come to its prompt.
    """

    __test__ = False  # no test class, whatever pytest thinks of the name

    def __init__(self, path: str, rings: Rings = Rings(), *, buffer_size: int | None = None,
                 vectorized: bool = False, mode: str = "io") -> None:
        options = []
        if buffer_size is not None:
            options = [f"--mbuf-size={buffer_size}", "--enable-scatter", f"--tx-offloads={_TX_MULTI_SEGS:#x}"]
        super().__init__([rings.front_end(0, path, vectorized)], mode=mode, ring_size=rings.size,
                         queue_pairs=rings.queue_pairs, options=options,
                         environment=["--force-max-simd-bitwidth=512"] if vectorized else [])

    @property
    def refusals(self) -> list[str]:
        """In DPDK's words, why SIMD code was not used though it was asked for."""
        return re.findall(r"\(\): (disabled .*)", self.said)
