"""QEMU processes under control: found, started, asked over QMP, stopped.

The options that join a guest to a network come from the caller: ``vdev.qemu.qemu_args`` for a vhost-user
device, :func:`tap_args` for QEMU's own virtio-net on a TAP, which is the yardstick of the measurements.
"""

import json
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass

from vdev.qemu import find_qemu, qemu_version
from vdev.testing.netns import Namespace
from vdev.testing.process import Child

START_SECONDS = 20


class QmpError(RuntimeError):
    """QEMU refused a command, or gave no answer."""


@dataclass(frozen=True)
class QemuProgram:
    """A QEMU that is installed (or unpacked) here. binary: its path; version: (major, minor)."""

    binary: str
    version: tuple[int, int]

    def __str__(self) -> str:
        return "qemu-{}.{}".format(*self.version)


def find_program(binary: str | None = None) -> QemuProgram:
    """The QEMU on PATH, or ``binary``. Raises vdev.qemu.QemuError."""
    path = find_qemu(binary)
    return QemuProgram(path, qemu_version(path))


def accelerator() -> str:
    """``tcg``, or what the environment variable VDEV_ACCEL asks for.

    Emulation is the default because it works everywhere and alike. Nested virtualisation may grant /dev/kvm
    and a KVM_CREATE_VM and then run no kernel, which no probe short of booting one can tell.
    """
    return os.environ.get("VDEV_ACCEL", "tcg")


def tap_args(interface: str, memory: str = "256M", queue_pairs: int = 1, mac: str | None = None) -> list[str]:
    """QEMU's options for its own virtio-net on TAP ``interface``, which QEMU makes or joins.

    Same shape as ``vdev.qemu.qemu_args``: guest memory, netdev and device.
    """
    netdev = f"tap,id=net0,ifname={interface},script=no,downscript=no,vhost=off,queues={queue_pairs}"
    device = f"virtio-net-pci,netdev=net0,ctrl_guest_offloads=off,mq=on,vectors={2 * queue_pairs + 2}"
    return ["-m", memory, "-netdev", netdev, "-device", device + (f",mac={mac}" if mac else "")]


class Qmp:
    """QEMU's machine protocol over a connected socket: commands and their answers. Events are passed over.

    Source: QEMU, docs/interop/qmp-spec.
    """

    def __init__(self, stream: socket.socket) -> None:
        self._stream = stream
        self._buffer = b""

    def greet(self, timeout: float) -> None:
        """Take the greeting and leave capabilities negotiation. Raises QmpError."""
        self._receive(time.monotonic() + timeout)
        self.execute("qmp_capabilities", timeout=timeout)

    def execute(self, command: str, arguments: dict | None = None, timeout: float = 10) -> object:
        """Run a command and return its answer. Raises QmpError when QEMU refuses or is silent."""
        message = {"execute": command, "arguments": arguments or {}}
        try:
            self._stream.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise QmpError(f"{command}: QEMU is gone ({error})") from None
        deadline = time.monotonic() + timeout
        while True:
            answer = self._receive(deadline, command)
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise QmpError(f"{command}: {answer['error']['desc']}")

    def _receive(self, deadline: float, what: str = "greeting") -> dict:
        poll = select.poll()
        poll.register(self._stream, select.POLLIN)
        while b"\n" not in self._buffer:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise QmpError(f"{what}: QEMU gave no answer in time")
            try:
                data = self._stream.recv(65536)
            except OSError:
                data = b""
            if not data:
                raise QmpError(f"{what}: QEMU is gone")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        return json.loads(line)

    def close(self) -> None:
        """Hang up. May be called again."""
        self._stream.close()


class Qemu:
    """One QEMU process with a QMP channel and a serial line, both over inherited sockets.

    program: which QEMU. options: everything that makes the machine, -m included. namespace: where it runs.
    qmp: the control channel. serial: our end of ttyS0, a connected socket whose owner the caller becomes.
    accel: ``tcg`` or ``kvm``; ``accelerator()`` when None. Raises ProcessDied when it does not start.
    """

    def __init__(self, program: QemuProgram, options: Sequence[str], *, namespace: Namespace | None = None,
                 accel: str | None = None) -> None:
        qmp, qemu_qmp = socket.socketpair()
        self.serial, qemu_serial = socket.socketpair()
        with qemu_qmp, qemu_serial:
            command = [program.binary, "-nodefaults", "-no-user-config", "-display", "none",
                       "-machine", "graphics=off", "-accel", accel or accelerator(),
                       "-chardev", f"socket,id=qmp,fd={qemu_qmp.fileno()}",
                       "-mon", "chardev=qmp,mode=control",
                       "-chardev", f"socket,id=console,fd={qemu_serial.fileno()}",
                       "-serial", "chardev:console", *options]
            self.child = Child(command, namespace=namespace,
                               pass_fds=[qemu_qmp.fileno(), qemu_serial.fileno()])
        self.qmp = Qmp(qmp)
        try:
            # QEMU answers only when its devices are made, and a vhost-user device waits for its back-end.
            self.qmp.greet(START_SECONDS)
        except QmpError as error:
            failure = self.child.died(f"QEMU did not start ({error})")
            self.kill()
            self.serial.close()
            raise failure from None

    def monitor(self, line: str) -> str:
        """Run a line of the human monitor and return what it prints."""
        return str(self.qmp.execute("human-monitor-command", {"command-line": line}))

    def reset(self) -> None:
        """Press the reset button."""
        self.qmp.execute("system_reset")

    def pause(self) -> None:
        """Stop the guest's processors and devices."""
        self.qmp.execute("stop")

    def resume(self) -> None:
        """Let a paused guest go on."""
        self.qmp.execute("cont")

    def stop(self) -> int:
        """End QEMU in order; with force when it does not. Returns its exit status; may be called again."""
        if self.child.running():
            try:
                self.qmp.execute("quit", timeout=2)
                self.child.popen.wait(5)
            except (QmpError, subprocess.TimeoutExpired):
                self.child.signal(signal.SIGKILL)
        self.qmp.close()
        return self.child.stop()

    def kill(self) -> int:
        """SIGKILL: the front-end vanishes in the middle of whatever it did. Returns the exit status."""
        self.qmp.close()
        return self.child.kill()
