"""vdev gives way to another under a real guest's traffic: the guest and QEMU notice nothing."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vdev.testing.measure import ping_from_host, tcp

HOST, GUEST = "10.14.0.1", "10.14.0.2"
UPGRADES = 3
STATE = "cat /sys/class/net/eth0/carrier_changes /proc/sys/kernel/random/boot_id"


@pytest.mark.early
@pytest.mark.newest_qemu
@pytest.mark.crossed
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_upgrades_under_traffic_go_unnoticed(lan, start_daemon, start_guest, socket_folder: Path, packed: bool) -> None:
    socket_path, upgrade = socket_folder / "guest", str(socket_folder / "upgrade")
    daemons = [start_daemon(["--socket-path", str(socket_path), "--port", f"tap:vdev-upgrade,ip={HOST}/24",
                             "--upgrade-path", upgrade], namespace=lan)]
    guest = start_guest(socket_path, queue_pairs=2, cpus=2, packed=packed)
    guest.set_address(f"{GUEST}/24")
    assert ping_from_host(lan, GUEST, 20).lost == 0
    before = guest.check(STATE)
    with ThreadPoolExecutor(2) as pool:
        load = pool.submit(tcp, guest, lan, GUEST, to_guest=True, seconds=20)
        pings = pool.submit(ping_from_host, lan, GUEST, 400, 0.05)
        for _ in range(UPGRADES):
            daemons.append(start_daemon(["--upgrade-from", upgrade], namespace=lan))
            assert daemons[-2].child.wait(20) == 0, daemons[-2].child.log()
            assert not pings.done() and not load.done(), "the traffic ended before the upgrades"
        assert pings.result().lost == 0
        assert load.result().bytes > 0
    assert guest.check(STATE) == before
    assert ping_from_host(lan, GUEST, 20).lost == 0
    gaps = [daemon.events("taken-over")[0]["milliseconds"] for daemon in daemons[1:]]
    print(f"frames stood still for {', '.join(f'{gap:.1f}' for gap in gaps)} ms; "
          f"pings took up to {pings.result().maximum:.1f} ms, TCP ran at {load.result().megabits:.0f} Mbit/s")
    guest.stop()
    daemons[-1].stop()
    # One session, with a single front-end: no reconnect.
    assert [len(daemon.events("connect")) for daemon in daemons] == [1, 0, 0, 0]
    assert [len(daemon.events("session-end")) for daemon in daemons] == [0, 0, 0, 1]
