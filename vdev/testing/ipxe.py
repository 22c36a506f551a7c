"""A guest without an image: the iPXE network boot ROM that comes with QEMU.

iPXE has a virtio-net driver written by other people than Linux's, needs no disk, no kernel and no
privilege, and is at its prompt in under a second even when emulated. At the prompt it answers pings.
"""

import re
from collections.abc import Sequence

from vdev.testing.console import Console, ConsoleClosed, ConsoleTimeout
from vdev.testing.netns import Namespace
from vdev.testing.qemu import Qemu, QemuProgram

PROMPT = b"iPXE> "
CTRL_B = b"\x02"


class IpxeError(RuntimeError):
    """iPXE did not do what was asked. The text has its own words."""


class IpxeGuest:
    """A running iPXE at its prompt; a context manager.

    program: which QEMU. network: QEMU options, -m included, whose device keeps its default boot ROM.
    namespace: where QEMU runs. Emulated always: under nested virtualisation this ROM may not start.
    """

    def __init__(self, program: QemuProgram, network: Sequence[str], *,
                 namespace: Namespace | None = None) -> None:
        self.qemu = Qemu(program, ["-boot", "n", *network], namespace=namespace, accel="tcg")
        self.console = Console(self.qemu.serial)
        try:
            # The firmware asks already while it starts, but only this second time is a key surely heard.
            self.console.wait_for(b"for the iPXE command line...", 30)
            self.console.send(CTRL_B)
            self.console.wait_for(PROMPT, 30)
        except (ConsoleClosed, ConsoleTimeout) as error:
            self.stop()
            raise IpxeError(f"iPXE did not come up: {error}") from None
        except BaseException:
            self.stop()
            raise

    def command(self, line: str, timeout: float = 30) -> str:
        """Type a command and return what it prints. Raises ConsoleTimeout when no prompt follows."""
        # The BIOS keyboard buffer holds 15 keys: the next one is typed when the last is echoed.
        for key in line:
            self.console.send(key.encode())
            self.console.wait_for(key.encode(), 10)
        self.console.send(b"\r")
        return self.console.wait_for(PROMPT, timeout).decode(errors="replace").strip()

    def dhcp(self, timeout: float = 30) -> str:
        """Ask for a lease; returns the address got. Raises IpxeError when none is given."""
        said = self.command("dhcp net0", timeout)
        found = re.search(r"= (\d+\.\d+\.\d+\.\d+)", self.command("show net0/ip"))
        if not found or not said.endswith("ok"):
            raise IpxeError(f"iPXE got no address by DHCP: {said}")
        return found.group(1)

    def statistics(self) -> dict[str, int]:
        """iPXE's own counters of net0: frames sent and received, and errors (TX, TXE, RX, RXE)."""
        counts = re.findall(r"(TXE?|RXE?):(\d+)", self.command("ifstat net0"))
        return {name: int(count) for name, count in counts}

    def stop(self) -> int:
        """Switch the machine off. Returns QEMU's exit status; may be called again."""
        status = self.qemu.stop()
        self.console.close()
        return status

    def __enter__(self) -> "IpxeGuest":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
