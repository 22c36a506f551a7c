"""What the figures were taken on, and huge pages for as long as they are needed."""

import contextlib
import datetime
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

NR_HUGEPAGES = Path("/proc/sys/vm/nr_hugepages")
HUGE_PAGE = 2 << 20  # bytes; the default size of x86 and of most others


def first_line(command: list[str], pattern: str = "(.+)") -> str | None:
    """The first match of ``pattern`` in what a program prints; None where there is no such program."""
    if not shutil.which(command[0]):
        return None
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, timeout=60, check=False)
    match = re.search(pattern, done.stdout)
    return match[1] if match else None


def processor(cpuinfo: str) -> str:
    """The model's name in /proc/cpuinfo."""
    match = re.search(r"^model name\s*: (.*)$", cpuinfo, re.MULTILINE)
    return match[1] if match else platform.machine()


def described(project: Path) -> dict:
    """Machine and versions, for the results file."""
    commit = first_line(["git", "-C", str(project), "rev-parse", "HEAD"], "([0-9a-f]{40})")
    changed = first_line(["git", "-C", str(project), "status", "--porcelain", "--untracked-files=no"], r"(\S.*)")
    return {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "vdev": {"version": importlib.metadata.version("vdev"), "commit": commit, "changed_since": bool(changed)},
            "processor": processor(Path("/proc/cpuinfo").read_text()), "processors": len(os.sched_getaffinity(0)),
            "kernel": platform.release(), "python": sys.version.split()[0],
            "dpdk": first_line(["dpkg-query", "-W", "-f", "${Version}", "dpdk"]),
            "iperf3": first_line(["iperf3", "--version"]), "gcc": first_line(["gcc", "--version"]),
            "load_average": os.getloadavg()[0]}


@contextlib.contextmanager
def huge_pages(megabytes: int) -> Iterator[bool]:
    """At least so much in huge pages while inside -> True; what was added is given back at the end. -> False where none
    are to be had: everybody then uses ordinary memory."""
    try:
        before = int(NR_HUGEPAGES.read_text())
        wanted = _free() + megabytes * (1 << 20) // HUGE_PAGE
        NR_HUGEPAGES.write_text(str(before + megabytes * (1 << 20) // HUGE_PAGE))
    except OSError:
        yield False
        return
    try:
        # The kernel gives what it finds, and says nothing when that is less.
        yield _free() >= wanted
    finally:
        NR_HUGEPAGES.write_text(str(before))


def _free() -> int:
    return int(re.search(r"HugePages_Free:\s+(\d+)", Path("/proc/meminfo").read_text())[1])
