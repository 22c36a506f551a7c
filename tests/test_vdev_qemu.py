"""The options for QEMU; what a version takes is tried with the QEMU of this machine."""

import os
import re
import shlex
import shutil
import socket
import stat
import struct
import subprocess

import pytest

from vdev.options import split
from vdev.qemu import QemuError, find_qemu, format_shell, qemu_args, qemu_version


@pytest.fixture
def fake(tmp_path):
    """fake(version) -> the path of a program that answers --version as that QEMU does."""
    def make(version, text="QEMU emulator version {} (Debian 1:{}+dfsg-7)"):
        path = tmp_path / f"qemu-{version}"
        path.write_text(f"#!/bin/sh\necho '{text.format(version, version)}'\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return str(path)
    return make


def options(args):
    """{option: value}, and nothing may stand alone."""
    assert len(args) % 2 == 0
    return dict(zip(args[::2], args[1::2], strict=True))


def device(args):
    return split(options(args)["-device"])


def test_the_whole_line(fake):
    args = qemu_args("/run/a.sock", "512M", 1, fake("10.0.2"), mac="52:54:00:12:34:56")
    assert args == [
        "-m", "512M",
        "-object", "memory-backend-memfd,id=vdev-memory,size=512M,share=on",
        "-machine", "memory-backend=vdev-memory",
        "-chardev", "socket,id=vdev-socket,path=/run/a.sock,reconnect-ms=100",
        "-netdev", "vhost-user,id=vdev-net,chardev=vdev-socket",
        "-device", "virtio-net-pci,netdev=vdev-net,mac=52:54:00:12:34:56,ctrl_guest_offloads=off",
    ]


def test_queue_pairs(fake):
    args = qemu_args("/run/a.sock", queue_pairs=4, qemu=fake("10.0.2"))
    assert "queues=4" in split(options(args)["-netdev"])
    assert {"mq=on", "vectors=10"} <= set(device(args))


@pytest.mark.parametrize("packed", [False, True])
def test_packed_rings_are_offered_when_asked_for(fake, packed):
    args = qemu_args("/run/a.sock", queue_pairs=2, qemu=fake("10.0.2"), packed=packed)
    assert [field for field in device(args) if field.startswith("packed=")] == ["packed=on"] * packed


@pytest.mark.parametrize("version, kvm, vectors", [
    ("7.2.22", False, "vectors=0"), ("7.2.22", True, "vectors=6"), ("9.2.1", False, "vectors=0"),
    ("10.0.2", False, "vectors=6"), ("10.0.2", True, "vectors=6"), ("11.1.0", False, "vectors=6"),
])
def test_vectors_are_zero_where_msix_crashes_qemu(fake, version, kvm, vectors):
    args = qemu_args("/run/a.sock", queue_pairs=2, qemu=fake(version), kvm=kvm)
    assert [field for field in device(args) if field.startswith("vectors=")] == [vectors]


@pytest.mark.parametrize("version, field", [
    ("7.2.22", "reconnect=1"), ("9.1.0", "reconnect=1"), ("9.2.0", "reconnect-ms=100"),
    ("10.2.0", "reconnect-ms=100"),
])
def test_reconnect_by_version(fake, version, field):
    assert split(options(qemu_args("/run/a.sock", qemu=fake(version)))["-chardev"])[-1] == field


def test_server(fake):
    chardev = split(options(qemu_args("/run/a.sock", qemu=fake("10.0.2"), server=True))["-chardev"])
    assert chardev == ["socket", "id=vdev-socket", "path=/run/a.sock", "server=on"]


def test_a_comma_in_the_path_is_doubled_and_the_path_made_absolute(fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chardev = options(qemu_args("a,b.sock", qemu=fake("10.0.2")))["-chardev"]
    assert f"path={tmp_path}/a,,b.sock," in chardev


@pytest.mark.parametrize("memory, size", [("512M", "512M"), ("512", "512M"), ("2G", "2G"), ("2g", "2G")])
def test_both_sizes_are_the_same_and_have_a_unit(fake, memory, size):
    found = options(qemu_args("/run/a.sock", memory, qemu=fake("10.0.2")))
    assert found["-m"] == size and f"size={size}" in split(found["-object"])


def test_each_socket_gives_its_own_steady_mac(fake):
    qemu = fake("10.0.2")
    macs = [device(qemu_args(path, qemu=qemu))[2] for path in ("/run/a", "/run/b", "/run/a")]
    assert macs[0] == macs[2] != macs[1]
    assert all(re.fullmatch("mac=52:54:00(:[0-9a-f]{2}){3}", mac) for mac in macs)


@pytest.mark.parametrize("change, text", [
    ({"memory": "lots"}, "'lots' is no amount of memory; write e.g. 512M"),
    ({"memory": "0"}, "'0' is no amount of memory"),
    ({"memory": "512MB"}, "'512MB' is no amount of memory"),
    ({"queue_pairs": 0}, "0 queue pairs: not between 1 and 256"),
    ({"mac": "52:54:00"}, "'52:54:00' is no MAC address"),
    ({"mac": "01:00:5e:00:00:01"}, "'01:00:5e:00:00:01' is no MAC address of one station"),
    ({"socket_path": "/" + "x" * 107}, "longer than 107 bytes"),
    ({"qemu": "/nowhere/qemu"}, "/nowhere/qemu: no such program; give --qemu"),
])
def test_what_cannot_be_is_one_line(fake, change, text):
    with pytest.raises(QemuError) as e:
        qemu_args(**{"socket_path": "/run/a.sock", "qemu": fake("10.0.2")} | change)
    assert text in str(e.value) and "\n" not in str(e.value)


def test_a_program_that_is_no_qemu(fake, tmp_path):
    with pytest.raises(QemuError, match="--version does not speak like QEMU"):
        qemu_version(fake("1", text="busybox"))
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x7fELF nonsense")
    broken.chmod(0o700)
    with pytest.raises(QemuError, match="does not run"):
        qemu_version(str(broken))


def test_no_qemu_on_path(monkeypatch, tmp_path):
    if os.path.exists("/usr/libexec/qemu-kvm"):
        pytest.skip("this machine has QEMU outside PATH, in /usr/libexec")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(QemuError, match=r"no qemu-system-\w+ on PATH; install it"):
        find_qemu()


def test_format_shell(fake):
    args = qemu_args("/run/it's, here.sock", queue_pairs=2, qemu=fake("10.0.2"))
    text = format_shell(args)
    assert shlex.split(text.replace("\\\n", "")) == args
    lines = text.split("\n")
    assert len(lines) == 6 and all(line.endswith(" \\") for line in lines[:-1])


@pytest.mark.parametrize("server", [False, True])
def test_this_machine_s_qemu_takes_the_line_and_speaks_vhost_user(tmp_path, server):
    """QEMU parses memory, machine and chardev, and sends its first message through the socket."""
    qemu = shutil.which("qemu-system-x86_64")
    if not qemu:
        pytest.skip("no qemu-system-x86_64 on this machine")
    path = tmp_path / "q,emu.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        if not server:
            sock.bind(str(path))
            sock.listen()
        args = qemu_args(str(path), "64M", 2, qemu, server=server)
        with subprocess.Popen(
                [qemu, *args, "-nodefaults", "-display", "none", "-S"],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            try:
                header = _first_message(sock, process, path, server)
            finally:
                process.kill()
    request, flags, size = struct.unpack("=III", header)
    assert (request, flags & 3, size) == (1, 1, 0)  # GET_FEATURES


def _first_message(sock, process, path, server):
    if not server:
        with sock.accept()[0] as connection:
            connection.settimeout(20)
            return connection.recv(12)
    line = process.stderr.readline()  # "waiting for connection on: ...", once it listens
    assert b"waiting for connection" in line, line
    sock.connect(str(path))
    return sock.recv(12)


def test_device_behind_an_iommu(fake):
    args = qemu_args("/run/a.sock", qemu=fake("10.0.2"), iommu=True)
    assert {"disable-legacy=on", "iommu_platform=on", "ats=on"} <= set(device(args))
    assert args[:3] == ["-machine", "q35", "-device"] and args[3].startswith("intel-iommu,device-iotlb=on")
    assert not any("iommu" in word for word in qemu_args("/run/a.sock", qemu=fake("10.0.2")))
