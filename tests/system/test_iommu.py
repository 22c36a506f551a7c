"""A Linux guest with an IOMMU, in real QEMU, whose network device is behind it.

Under emulation each translation costs a way through QEMU's main loop that emulates the guest as well, so frames are
slow here; what is tested is that all of them arrive.
"""

from pathlib import Path

import pytest

from vdev.net.features import Feature
from vdev.qemu import qemu_args
from vdev.testing.guest import LinuxGuest
from vdev.testing.measure import ping_from_guest, ping_from_host, tcp

HOST, GUEST = "10.14.0.1", "10.14.0.2"


@pytest.mark.early
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_guest_behind_an_iommu_has_its_network(lan, start_daemon, qemu, image, socket_folder: Path, packed) -> None:
    if qemu.version < (10, 0):
        pytest.skip("QEMU 7.2 without KVM needs vectors=0, with which its IOMMU was not tried; 10.0 is tested")
    socket_path = socket_folder / "iommu"
    daemon = start_daemon(["--socket-path", str(socket_path), "--port", f"tap:vdev-iommu,ip={HOST}/24"], namespace=lan)
    network = qemu_args(str(socket_path), memory="256M", qemu=qemu.binary, packed=packed, iommu=True)
    with LinuxGuest(qemu, image, network, kernel_options="intel_iommu=on") as guest:
        assert "DMAR: IOMMU enabled" in guest.check("dmesg")
        accepted = guest.check("cat /sys/bus/virtio/devices/virtio0/features")  # one character a bit, lowest first
        assert accepted[Feature.ACCESS_PLATFORM] == "1"
        guest.set_address(f"{GUEST}/24")
        assert ping_from_guest(guest, HOST, 20, interval=0.2).lost == 0
        assert ping_from_host(lan, GUEST, 20, interval=0.2, size=8000).lost == 0
        for to_guest in (False, True):
            assert tcp(guest, lan, GUEST, to_guest=to_guest).bytes > 0
    (driver,) = daemon.events("driver")
    assert "ACCESS_PLATFORM" in driver["features"] and driver["rings"] == ("packed" if packed else "split")
    assert not daemon.events("ring-waits") and not daemon.events("access-denied")
