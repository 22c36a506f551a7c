"""The QEMU options that give a guest this device: what `vdev qemu-args` prints.

A vhost-user back-end needs three things of QEMU: guest memory that can be shared (a memfd backend with
``share=on``, attached to the machine), a socket, and a virtio-net device on it. Leaving out any one gives
a guest whose network is silently dead, so they are printed as a whole.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence

from vdev.listen import PATH_MAX
from vdev.net.mac import mac_of, parse_mac
from vdev.options import escape

_QUEUE_PAIRS_MAX = 256  # the kernel's limit for a TAP, and far beyond that of any guest

# QEMU 7.2 under TCG crashes in msix_set_vector_notifiers when a vhost-user guest starts its driver with
# MSI-X; 10.0 does not. Those between have not been seen either way, and count as crashing.
_MSIX_SOUND = (10, 0)
_RECONNECT_MS = (9, 2)  # the option that replaces reconnect=, which 10.2 no longer has

_MEMORY = "vdev-memory"
_CHARDEV = "vdev-socket"
_NETDEV = "vdev-net"


class QemuError(Exception):
    """There is no QEMU to ask, or no options for what was wanted. One line: what, and what to do."""


def find_qemu(binary: str | None = None) -> str:
    """The QEMU binary for guests of this machine's kind, or ``binary``, as an absolute path.

    Raises QemuError when there is none.
    """
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    candidates = [binary] if binary else [f"qemu-system-{machine}", "/usr/libexec/qemu-kvm"]
    for candidate in candidates:
        found = shutil.which(candidate)
        if found:
            return os.path.abspath(found)
    if binary:
        raise QemuError(f"{binary}: no such program; give --qemu the path of a qemu-system binary")
    raise QemuError(f"no {candidates[0]} on PATH; install it (Debian: `sudo apt install qemu-system`), or"
                    " name it with --qemu PATH")


def qemu_version(binary: str) -> tuple[int, int]:
    """(major, minor) as ``binary --version`` says. Raises QemuError."""
    try:
        done = subprocess.run([binary, "--version"], stdin=subprocess.DEVNULL, capture_output=True,
                              timeout=30, encoding="utf-8", errors="replace", check=False)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise QemuError(f"{binary} does not run ({e}); give --qemu the path of a qemu-system"
                        " binary") from None
    match = re.match(r"QEMU emulator version (\d+)\.(\d+)", done.stdout)
    if match is None:
        raise QemuError(f"{binary} --version does not speak like QEMU; give --qemu the path of a qemu-system"
                        " binary")
    return int(match[1]), int(match[2])


def qemu_args(socket_path: str, memory: str = "512M", queue_pairs: int = 1, qemu: str | None = None,
              mac: str | None = None, server: bool = False, kvm: bool = False, packed: bool = False,
              iommu: bool = False) -> list[str]:
    """The options for one guest with one network device behind the vhost-user socket ``socket_path``.

    memory: of the guest, as -m takes it (a plain number is MiB). queue_pairs: 1 to 256. qemu: the binary the
    options are for (:func:`find_qemu`). mac: the guest's, else one that only this socket path gives, as
    QEMU's own default is the same for all guests. server: QEMU listens and the daemon connects (--client).
    kvm: the guest will certainly run with -accel kvm; where its QEMU is not sound without, options that
    are only needed under TCG are left out. packed: QEMU offers its guest packed rings, which it keeps back by
    itself. iommu: the guest has an IOMMU, and the device is behind it. Raises QemuError.
    """
    version = qemu_version(find_qemu(qemu))
    path = os.path.abspath(socket_path)
    if len(os.fsencode(path)) > PATH_MAX:
        raise QemuError(f"{path} is longer than {PATH_MAX} bytes, the most a socket path can have")
    if not 1 <= queue_pairs <= _QUEUE_PAIRS_MAX:
        raise QemuError(f"{queue_pairs} queue pairs: not between 1 and {_QUEUE_PAIRS_MAX}")
    size = _size(memory)

    chardev = f"socket,id={_CHARDEV},path={escape(path)}"
    if server:
        chardev += ",server=on"
    else:
        # Soon: a guest is without network until then, and trying costs nothing.
        chardev += ",reconnect-ms=100" if version >= _RECONNECT_MS else ",reconnect=1"

    netdev = f"vhost-user,id={_NETDEV},chardev={_CHARDEV}"
    # QEMU answers a guest's offload commands itself and does not pass them on; without the command a guest
    # cannot believe that it switched an offload off.
    device = f"virtio-net-pci,netdev={_NETDEV},mac={_mac(mac, path)},ctrl_guest_offloads=off"
    if packed:
        device += ",packed=on"
    if iommu:
        device += ",disable-legacy=on,iommu_platform=on,ats=on"
    if queue_pairs > 1:
        netdev += f",queues={queue_pairs}"
        device += ",mq=on"
    if version < _MSIX_SOUND and not kvm:
        device += ",vectors=0"
    elif queue_pairs > 1:
        device += f",vectors={2 * queue_pairs + 2}"  # one a queue, control queue and configuration

    # an IOMMU comes before the devices behind it
    machine = ["-machine", "q35", "-device", "intel-iommu,device-iotlb=on,intremap=off"] if iommu else []
    return [
        *machine,
        "-m", size,
        "-object", f"memory-backend-memfd,id={_MEMORY},size={size},share=on",
        "-machine", f"memory-backend={_MEMORY}",
        "-chardev", chardev,
        "-netdev", netdev,
        "-device", device,
    ]


def format_shell(args: Sequence[str]) -> str:
    """``args`` for pasting into a shell: one option with its value a line, continued with backslashes."""
    lines: list[str] = []
    for arg in args:
        if arg.startswith("-") or not lines:
            lines.append(shlex.quote(arg))
        else:
            lines[-1] += " " + shlex.quote(arg)
    return " \\\n".join(lines)


def _size(memory: str) -> str:
    """Memory with a unit: -m counts in MiB by default, a memory backend in bytes."""
    if not re.fullmatch(r"[1-9][0-9]{0,8}[KMGTkmgt]?", memory):
        raise QemuError(f"{memory!r} is no amount of memory; write e.g. 512M or 2G")
    return memory.upper() if memory[-1].isalpha() else memory + "M"


def _mac(mac: str | None, path: str) -> str:
    if mac is None:
        return mac_of(path).hex(":")
    try:
        return parse_mac(mac).hex(":")
    except ValueError as error:
        raise QemuError(f"{mac!r} {error}") from None
