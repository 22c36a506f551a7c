"""The guest's file system is put together rightly: tools/guest-image."""

import importlib.util
import lzma
import os
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools"


@pytest.fixture(scope="module")
def guest_image() -> ModuleType:
    """The program as a module."""
    loader = SourceFileLoader("guest_image", str(TOOLS / "guest-image"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("guest_image", loader))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TOOLS)
        patch.setattr(sys, "dont_write_bytecode", True)
        loader.exec_module(module)
    return module


def _read_newc(archive: bytes) -> dict[str, tuple[int, bytes]]:
    """(mode, content) by name, read as cpio(5) describes the "new ASCII format"."""
    found, at = {}, 0
    while True:
        assert at % 4 == 0
        assert archive[at:at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * i:at + 14 + 8 * i], 16) for i in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = archive[at + 110:at + 110 + name_size - 1].decode()
        assert archive[at + 110 + name_size - 1] == 0
        data = at + (110 + name_size + 3) // 4 * 4
        if name == "TRAILER!!!":
            return found
        assert name not in found, "twice in the archive"
        found[name] = (mode, archive[data:data + size])
        at = data + (size + 3) // 4 * 4


def test_cpio_holds_files_and_the_directories_above_them(guest_image: ModuleType) -> None:
    archive = guest_image.Cpio()
    archive.file("init", b"#!/bin/sh\n")
    archive.file("usr/lib/x/libc.so", b"12345", 0o644)
    archive.file("usr/lib/x/libm.so", b"", 0o644)
    assert _read_newc(archive.finish()) == {
        "init": (0o100755, b"#!/bin/sh\n"),
        "usr": (0o040755, b""), "usr/lib": (0o040755, b""), "usr/lib/x": (0o040755, b""),
        "usr/lib/x/libc.so": (0o100644, b"12345"), "usr/lib/x/libm.so": (0o100644, b"")}


def _module(depends: str) -> bytes:
    return b"\x7fELF...\0license=GPL\0depends=" + depends.encode() + b"\0name=x\0"


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    """A kernel's modules directory: virtio_net depends on net_failover, which depends on failover."""
    drivers = tmp_path / "kernel/drivers/net"
    drivers.mkdir(parents=True)
    (drivers / "virtio_net.ko").write_bytes(_module("net_failover,virtio,crc"))
    (drivers / "net_failover.ko.xz").write_bytes(lzma.compress(_module("failover")))
    (drivers / "failover.ko").write_bytes(_module(""))
    (drivers / "virtio.ko").write_bytes(_module(""))
    (tmp_path / "modules.builtin").write_text("kernel/lib/crc.ko\nkernel/drivers/virtio/virtio-pci.ko\n")
    return tmp_path


def test_modules_come_after_what_they_depend_on(guest_image: ModuleType, modules: Path) -> None:
    loaded = guest_image.modules_in_order(modules, ("virtio_pci", "virtio_net"))
    assert [name for name, _ in loaded] == ["failover.ko", "net_failover.ko", "virtio.ko", "virtio_net.ko"]
    assert dict(loaded)["net_failover.ko"] == _module("failover"), "the guest gets it uncompressed"


def test_a_kernel_without_the_driver_is_refused(guest_image: ModuleType, modules: Path) -> None:
    with pytest.raises(Exception, match="has no module virtio_scsi"):
        guest_image.modules_in_order(modules, ("virtio_scsi",))


def test_initramfs_has_what_init_needs(guest_image: ModuleType, modules: Path, tmp_path: Path) -> None:
    busybox = tmp_path / "busybox"
    busybox.write_bytes(b"static")
    loaded = guest_image.modules_in_order(modules, ("virtio_net",))
    files = _read_newc(guest_image.build_initramfs(busybox, [], loaded))
    assert files["init"][1] == (TOOLS / "guest-init").read_bytes()
    assert files["bin/busybox"] == (0o100755, b"static")
    order = files["modules/order"][1].decode().split()
    assert order[-1] == "virtio_net.ko" and all(f"modules/{name}" in files for name in order)
    assert files["dev"][0] == 0o040755


def test_modules_on_demand_lie_there_and_are_not_loaded(guest_image: ModuleType, tmp_path: Path) -> None:
    busybox = tmp_path / "busybox"
    busybox.write_bytes(b"static")
    image = guest_image.build_initramfs(busybox, [], [("one.ko", b"1")], on_demand=[("pktgen.ko", b"2")])
    files = _read_newc(image)
    assert files["modules/pktgen.ko"] == (0o100644, b"2")
    assert files["modules/order"][1] == b"one.ko\n"


def test_initramfs_holds_a_whole_system_as_it_is(guest_image: ModuleType, tmp_path: Path) -> None:
    busybox, system = tmp_path / "busybox", tmp_path / "system"
    busybox.write_bytes(b"static")
    (system / "usr/bin").mkdir(parents=True)
    (system / "bin").symlink_to("usr/bin")
    (system / "usr/bin/tool").write_bytes(b"tool")
    (system / "usr/bin/tool").chmod(0o755)
    files = _read_newc(guest_image.build_initramfs(busybox, [], [], system))
    assert files["system/bin"] == (0o120777, b"usr/bin")
    assert files["system/usr/bin/tool"] == (0o100755, b"tool")
    assert files["system/usr/bin/guest-init"][1] == files["init"][1]


def test_libraries_are_those_the_loader_would_take(guest_image: ModuleType) -> None:
    found = dict(guest_image.libraries(Path(sys.executable).resolve()))
    assert any("ld-linux" in name or "ld64" in name for name in found)
    assert all(file.is_file() and not name.startswith("/") for name, file in found.items())


def test_only_the_newest_images_are_kept(guest_image: ModuleType, tmp_path: Path) -> None:
    for age, name in enumerate(["newest", "newer", "new", "old", "older", "oldest"]):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (0, 1_000_000 - age))
    (tmp_path / ".under-construction").mkdir()
    guest_image.forget_old(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"newest", "newer", "new", "old", ".under-construction"}


def test_key_changes_with_what_is_copied(guest_image: ModuleType, tmp_path: Path) -> None:
    program = tmp_path / "iperf3"
    program.write_bytes(b"one")
    first = guest_image.content_key([program])
    assert first != guest_image.content_key([program], "systemd")
    assert first == guest_image.content_key([program])
    program.write_bytes(b"another")
    assert guest_image.content_key([program]) != first
