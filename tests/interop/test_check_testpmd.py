"""vdev check, aimed at DPDK's own vhost-user back-end: it is accused of what docs/conformance.md tells, and of nothing
else."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from vdev.testing.testpmd import Forwarder, why_no_testpmd

KNOWN = {"VQ-SPLIT-D-01", "VQ-SPLIT-D-07", "VQ-PACKED-D-15", "NET-RX-D-01", "VU-RING-B-09", "VU-RING-B-11",
         "VU-BASE-B-02", "VU-BASE-B-05", "VU-LOG-B-05", "VU-FEAT-B-09"}


@pytest.mark.long
@pytest.mark.timeout(400)
def test_nothing_is_held_against_dpdk_that_is_right() -> None:
    reason = why_no_testpmd()
    if reason:
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="vdev-") as folder, \
            Forwarder([f"net_vhost0,iface={folder}/socket,queues=1,tso=1"]) as testpmd:
        testpmd.start()
        with open(f"{folder}/report.json", "w+") as report:
            command = [sys.executable, "-m", "vdev", "check", f"{folder}/socket", "--wire", "reflect", "--json"]
            check = subprocess.Popen(command, stdout=report, stderr=subprocess.DEVNULL)
            while check.poll() is None:
                testpmd.received()  # it stands still when nobody reads what it prints
                time.sleep(0.3)
            rows = json.loads(Path(report.name).read_text())["rows"]
    assert sum(row["verdict"] == "pass" for row in rows) > 150
    assert {row["row"] for row in rows if row["verdict"] == "fail"} <= KNOWN
