"""A real Linux guest, driven from the host over its serial line.

The image is made by tools/guest-image; its only program, tools/guest-init, answers one command after the
other. Several guests may run at once.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vdev.testing.console import Console, ConsoleClosed, ConsoleTimeout
from vdev.testing.netns import Namespace
from vdev.testing.process import Child, ProcessDied
from vdev.testing.qemu import Qemu, QemuProgram, accelerator

BOOT_SECONDS = 60
# The guest's terminal takes 4096 bytes at a time (n_tty); an overlong command would be cut silently.
COMMAND_MAX = 2000

KERNEL_OPTIONS = ("console=ttyS0 quiet loglevel=1 panic=-1 reboot=t tsc=reliable no_timer_check nokaslr "
                  "mitigations=off net.ifnames=0 random.trust_cpu=on cryptomgr.notests")


@dataclass(frozen=True)
class Image:
    """What tools/guest-image printed: paths of the kernel and the initramfs, and the kernel's version."""

    kernel: Path
    initrd: Path
    version: str

    @classmethod
    def parse(cls, printed: str) -> "Image":
        """From that program's output."""
        fields = json.loads(printed)
        return cls(Path(fields["kernel"]), Path(fields["initrd"]), fields["version"])


@dataclass(frozen=True)
class Result:
    """What a command in the guest came to. output: stdout and stderr together, as printed."""

    status: int
    output: str


class GuestError(RuntimeError):
    """A command in the guest failed, or the guest is not there to run it."""


class ObedientGuest:
    """What runs tools/guest-init: told over ``console`` what to do. Its program is ``child``, and a boot may take
    ``boot_seconds``."""

    console: Console
    boot_seconds: float = BOOT_SECONDS

    def __init__(self) -> None:
        self._tokens = itertools.count(1)

    @property
    def child(self) -> Child:
        """The process that the guest is, or that runs its machine."""
        raise NotImplementedError

    def _come_up(self, hangs: bool) -> None:
        """Wait for the end of the first boot. hangs: QEMU 7.2 emulating several processors stands still now
        and then, right after the firmware; then its reset button is pressed, once."""
        try:
            self.wait_until_up()
        except ConsoleTimeout:
            if not hangs:
                raise
            self.qemu.reset()
            self.wait_until_up()

    def wait_until_up(self) -> None:
        """Wait for the end of a boot: of the next one, or of one that ended unobserved."""
        try:
            self.console.wait_for_line(b"guest-ready", self.boot_seconds)
        except ConsoleClosed:
            raise self._gone("the guest did not come up") from None

    def _gone(self, what: str) -> ProcessDied:
        return self.child.died(what)

    def run(self, command: str, timeout: float = 20) -> Result:
        """Run one line of shell in the guest.

        The guest itself ends it after ``timeout`` seconds (status 143). Raises ProcessDied when its
        process has ended, ConsoleTimeout when the guest no longer answers, ValueError for a line the console cannot
        carry.
        """
        if "\n" in command or len(command) > COMMAND_MAX:
            raise ValueError(f"a guest command is one line of at most {COMMAND_MAX} characters")
        token = f"{next(self._tokens):06}".encode()
        try:
            self.console.send(b"%s %d %s\n" % (token, max(1, round(timeout)), command.encode()))
            self.console.wait_for_line(b"<" + token, 10)
            output, status = self.console.wait_for_line(b">" + token, timeout + 10)
        except ConsoleClosed:
            raise self._gone(f"guest command {command!r}") from None
        return Result(int(status), output.decode(errors="replace"))

    def check(self, command: str, timeout: float = 20) -> str:
        """Like :meth:`run`, but returns the output and raises GuestError when the command fails."""
        result = self.run(command, timeout)
        if result.status:
            raise GuestError(f"guest command {command!r} failed with status {result.status}:\n"
                             f"{result.output}")
        return result.output

    def set_address(self, *addresses: str, interface: str = "eth0") -> None:
        """Bring the interface up with addresses such as ``10.0.0.2/24`` or ``fd00::2/64``."""
        self.check(f"ip link set {interface} up")
        for address in addresses:
            self.check(f"ip addr add {address} dev {interface}")


class LinuxGuest(ObedientGuest):
    """A running guest; a context manager. The constructor returns when the guest obeys commands.

    program: which QEMU. image: what it boots. network: QEMU options, -m included (``vdev.qemu.qemu_args`` or
    ``vdev.testing.qemu.tap_args``). cpus: virtual processors. namespace: where QEMU itself runs. kernel_options:
    more words for the kernel's command line. boot_seconds: how long a boot may take.
    """

    def __init__(self, program: QemuProgram, image: Image, network: Sequence[str], *, cpus: int = 1,
                 namespace: Namespace | None = None, kernel_options: str = "",
                 boot_seconds: float = BOOT_SECONDS) -> None:
        super().__init__()
        self.boot_seconds = boot_seconds
        self._program = program
        self._machine = ["-kernel", str(image.kernel), "-initrd", str(image.initrd),
                         "-append", f"{KERNEL_OPTIONS} {kernel_options}", "-smp", str(cpus),
                         # No option ROM: this guest does not boot from the network.
                         "-global", "virtio-net-pci.romfile="]
        self.qemu = Qemu(program, [*self._machine, *network], namespace=namespace)
        self.console = Console(self.qemu.serial)
        try:
            self._come_up(hangs=cpus > 1 and program.version < (10, 0) and accelerator() == "tcg")
        except BaseException:
            self.kill()
            raise

    @property
    def child(self) -> Child:
        return self.qemu.child

    def twin(self, network: Sequence[str], namespace: Namespace | None = None) -> Qemu:
        """Another QEMU with the same machine on ``network``, which waits for this guest to migrate to it."""
        return Qemu(self._program, [*self._machine, *network, "-incoming", "defer"], namespace=namespace)

    def follow(self, qemu: Qemu) -> None:
        """The guest has migrated to ``qemu``: obey there from now on. The QEMU it left is ended."""
        self.qemu.stop()
        self.console.close()
        self.qemu, self.console = qemu, Console(qemu.serial)

    def reboot(self) -> None:
        """Reboot from inside; returns when the guest obeys again, with no address on its interface."""
        self.console.send(b"reboot 5 reboot -f\n")
        self.wait_until_up()

    def stop(self) -> int:
        """Switch the machine off. Returns QEMU's exit status; may be called again."""
        status = self.qemu.stop()
        self.console.close()
        return status

    def kill(self) -> int:
        """SIGKILL to QEMU, as a crash of the front-end. May be called again."""
        status = self.qemu.kill()
        self.console.close()
        return status

    def __enter__(self) -> "LinuxGuest":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
