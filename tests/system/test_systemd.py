"""The systemd units, in a guest whose first program is systemd: socket activation, readiness, the fences, a restart.

Never on this machine: systemd takes the place it is started in for its own.
"""

import compileall
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from vdev import systemd
from vdev.qemu import QemuError
from vdev.testing.guest import Image, LinuxGuest
from vdev.testing.qemu import find_program

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]
GUEST_IMAGE = ROOT / "tools" / "guest-image"

IP = "/bin/ip"  # not the one that the console's busybox has itself

# A VMM and its guest in one program: one frame goes out through the TAP, where it is seen, and one comes back.
EXCHANGE = """
import socket, subprocess
from vdev.testing.scripted import ScriptedGuest
def systemctl(*words):
    return subprocess.run(["systemctl", *words, "vdev@vm1.service"], capture_output=True, text=True).stdout.strip()
OUT = bytes.fromhex("ffffffffffff 525400123456 88b5") + b"from the guest".ljust(50, b".")
BACK = bytes.fromhex("525400123456 020000000001 88b5") + b"to the guest".ljust(50, b".")
wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x88b5))
wire.bind(("vm1", 0x88b5))
wire.settimeout(20)
connection = socket.socket(socket.AF_UNIX)
connection.connect("/run/vdev/vm1.sock")
while systemctl("is-active") == "inactive":
    pass
systemctl("start")  # waits for READY=1; an emulated Python takes longer than a front-end waits for an answer
with ScriptedGuest(connection) as guest:
    guest.driver.transmit(OUT)
    assert wire.recv(2000) == OUT
    wire.send(BACK)
    while (received := guest.driver.receive_within(20)).frame != BACK:
        pass
print("exchanged")
"""


@pytest.fixture(scope="module")
def overlay(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This tree's packages and units where an installed vdev has them."""
    root = tmp_path_factory.mktemp("systemd") / "overlay"
    packages = root / "usr/lib/python3/dist-packages"
    for package in ("vdev", "ring", "vhost_user"):
        shutil.copytree(ROOT / package, packages / package, ignore=shutil.ignore_patterns("__pycache__", "*.c", "*.o"))
    program = root / "usr/bin/vdev"
    program.parent.mkdir(parents=True)
    program.write_text("#!/usr/bin/python3\nimport sys\nfrom vdev.cli import main\nsys.exit(main())\n")
    program.chmod(0o755)
    (root / "usr/bin/exchange").write_text(EXCHANGE)
    compileall.compile_dir(root, quiet=2, stripdir=str(root))  # bytecode of another version is passed over
    units = root / "etc/systemd/system"
    units.mkdir(parents=True)
    for name in systemd.NAMES:
        (units / name).write_text(systemd.text(name, "/usr/bin/vdev"))
    (units / "vdev@.service.d").mkdir()
    (units / "vdev@.service.d/emulated.conf").write_text("[Service]\nTimeoutStartSec=300\n")
    users = root / "usr/lib/sysusers.d"
    users.mkdir(parents=True)
    (users / "vdev.conf").write_text("u vdev -\n")
    return root


@pytest.fixture(scope="module")
def guest(overlay: Path):
    """A running system with a TAP for guest vm1 and its socket, and nothing else."""
    try:
        program = find_program()
    except QemuError as reason:
        pytest.skip(str(reason))
    made = subprocess.run([GUEST_IMAGE, "--systemd", "--overlay", overlay], capture_output=True, text=True,
                          timeout=600, check=False)
    if made.returncode:
        pytest.skip(made.stderr.strip().splitlines()[-1])
    assert json.loads(made.stdout)
    with LinuxGuest(program, Image.parse(made.stdout), ["-m", "1G"], cpus=2, boot_seconds=300) as guest:
        guest.check("systemd-sysusers", 60)
        guest.check("chmod 666 /dev/net/tun")  # as the rules of udev have it, which is not there
        guest.check(f"{IP} tuntap add dev vm1 mode tap multi_queue vnet_hdr user vdev && {IP} link set vm1 up")
        guest.check("systemctl start vdev@vm1.socket", 60)
        yield guest


def main_pid(guest: LinuxGuest) -> int:
    return int(guest.check("systemctl show -P MainPID vdev@vm1.service", 60))


def exchange(guest: LinuxGuest) -> None:
    result = guest.run("python3 /usr/bin/exchange", 300)
    assert "exchanged" in result.output, result.output + guest.run(
        "systemctl status --no-pager -l vdev@vm1.service; journalctl -b --no-pager | tail -30", 60).output


def test_unit_serves_a_guest_and_is_closed_in(guest: LinuxGuest) -> None:
    assert "inactive" in guest.run("systemctl is-active vdev@vm1.service", 60).output
    exchange(guest)
    assert guest.check("systemctl is-active vdev@vm1.service", 60).strip() == "active"
    pid = main_pid(guest)
    status = dict(line.split(":\t", 1) for line in guest.check(f"cat /proc/{pid}/status").splitlines() if ":\t" in line)
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert {int(status[name], 16) for name in ("CapEff", "CapPrm", "CapBnd", "CapAmb")} == {0}
    assert guest.check("id -u vdev").strip() in status["Uid"].split()
    log = guest.check("journalctl -b --no-pager -u vdev@vm1.service", 60)
    assert "the guest's driver is ready" in log
    assert "warning" not in log


def test_unit_that_is_killed_comes_back(guest: LinuxGuest) -> None:
    exchange(guest)
    before = main_pid(guest)
    guest.check(f"kill -9 {before}")
    exchange(guest)
    assert main_pid(guest) not in (0, before)
    assert int(guest.check("systemctl show -P NRestarts vdev@vm1.service", 60)) >= 1


def test_unit_that_is_stopped_ends_well_and_leaves_its_socket(guest: LinuxGuest) -> None:
    exchange(guest)
    guest.check("systemctl stop vdev@vm1.service", 60)
    assert guest.check("systemctl show -P Result vdev@vm1.service", 60).strip() == "success"
    assert guest.check("systemctl is-active vdev@vm1.socket", 60).strip() == "active"


def test_exposure_as_the_running_system_sees_it(guest: LinuxGuest) -> None:
    last = guest.check("systemd-analyze security --no-pager vdev@vm1.service", 60).strip().splitlines()[-1]
    assert float(last.split("vdev@vm1.service:")[1].split()[0]) < 2.0
