"""DPDK's virtio-user driver as a second, independent front-end: no virtual machine, no hugepages, no root.

``dpdk-testpmd`` is driven over its prompt. It polls: a run keeps one processor busy.
"""

import itertools
import os
import re
import shutil
import socket
from dataclasses import dataclass

from vdev.testing.console import Console, ConsoleClosed
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


@dataclass(frozen=True)
class StreamReport:
    """What testpmd counted for one queue pair: frames, from its point of view."""

    received: int
    sent: int
    dropped: int


class Testpmd:
    """A running testpmd on the vhost-user socket ``path``; a context manager.

    rings: what it asks for. buffer_size: bytes of each of its buffers, 128 of them kept free; None: as long as a
    frame, and only with ``rings.mergeable`` may it be less. vectorized: use its SIMD code where it has some for
    these rings (:attr:`refusals`). mode: its forwarding mode, e.g. ``io`` (what comes in goes out) or
    ``icmpecho`` (answers ARP and pings for any address). Raises ProcessDied when it does not come to its prompt.
    """

    __test__ = False  # no test class, whatever pytest thinks of the name

    def __init__(self, path: str, rings: Rings = Rings(), *, buffer_size: int | None = None,
                 vectorized: bool = False, mode: str = "io") -> None:
        polling, prompt = sorted(os.sched_getaffinity(0))[-2:]
        device = (f"net_virtio_user0,path={path},queues={rings.queue_pairs},queue_size={rings.size},"
                  f"mrg_rxbuf={int(rings.mergeable)},packed_vq={int(rings.packed)},"
                  f"in_order={int(rings.in_order)},vectorized={int(vectorized)}")
        environment = ["-l", f"{polling},{prompt}", "--main-lcore", str(prompt), "--no-pci", "--no-huge",
                       "-m", "256", "--no-telemetry", "--no-shconf", f"--vdev={device}",
                       f"--file-prefix=vdev-{os.getpid()}-{next(_runs)}", f"--log-level={_DRIVER}:info"]
        buffers = 2 * rings.queue_pairs * rings.size + _SPARE_BUFFERS
        options = ["-i", f"--total-num-mbufs={buffers}", f"--rxd={rings.size}", f"--txd={rings.size}",
                   # Its own choice is a quarter of a small ring, which has to be a multiple of four.
                   "--rxfreet=32",
                   f"--rxq={rings.queue_pairs}", f"--txq={rings.queue_pairs}", "--nb-cores=1",
                   f"--forward-mode={mode}"]
        if vectorized:
            environment.append("--force-max-simd-bitwidth=512")
        if buffer_size is not None:
            options += [f"--mbuf-size={buffer_size}", "--enable-scatter", f"--tx-offloads={_TX_MULTI_SEGS:#x}"]
        command = [PROGRAM, *environment, "--", *options]
        ours, theirs = socket.socketpair()
        with theirs:
            # Its answers are buffered apart from its prompt, and would come after it.
            self.child = Child(["stdbuf", "-oL", *command], terminal=theirs.fileno())
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

    @property
    def refusals(self) -> list[str]:
        """In DPDK's words, why SIMD code was not used though it was asked for."""
        return re.findall(r"\(\): (disabled .*)", self.said)

    def start(self, bursts: int = 0) -> None:
        """Begin to forward; with ``bursts``, first send so many bursts of 32 frames on each queue."""
        self.command(f"start tx_first {bursts}" if bursts else "start")

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

    def __enter__(self) -> "Testpmd":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
