#!/usr/bin/env python3
"""Sets a fresh machine up for tools/demo and tools/test: Debian packages, and the project's own .venv.

Needs nothing but a Python, and says so when that is too old; for that reason this file keeps to syntax
that Python 3.7 reads. Everything here may be called again and again, and by several programs at once.
Whoever cannot be helped is told in one line what to do.

Run by itself it makes .venv ready and prints the path of its Python.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
VENV = PROJECT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "vdev-installed.json"
OLDEST = (3, 11)
# What an install is made from: a change in any of these means that it has to be made again.
INGREDIENTS = ("pyproject.toml", "setup.py", "ring/sources.py", "ring/_build*.py", "ring/core/*",
               "ring/plane/*")
PATIENCE = 1800  # seconds for one apt or pip command


def say(text: str) -> None:
    """Progress for the person who waits; stdout belongs to the result."""
    print(text, file=sys.stderr, flush=True)


def give_up(text: str) -> None:
    """End the program with one line and status 1."""
    raise SystemExit(f"{Path(sys.argv[0]).name}: {text}")


# ------------------------------------------------------------------------------------------- Debian packages


def ensure_packages(wanted: Sequence[str]) -> None:
    """Have these Debian packages installed. ``"a | b"`` is satisfied by either, the first preferred.

    As root, what is missing is installed. Otherwise the program ends with status 1 and the command to
    paste. Where there is no apt the packages are only named: what they hold may be there under other names.
    """
    if not shutil.which("apt-get") or not shutil.which("dpkg-query"):
        say("no apt on this machine; what is needed is in packages that Debian calls: " + ", ".join(wanted))
        return
    missing = _missing(wanted)
    if not missing:
        return
    if os.geteuid() != 0:
        give_up("packages are missing; install them with: sudo apt install " + " ".join(_candidates(missing)))
    say("installing with apt, which takes a moment: " + ", ".join(missing))
    # One unreachable third-party source makes the update fail though all that is needed can be had:
    # the install is what decides.
    _apt("update", check=False)
    _apt("install", "--yes", "--no-install-recommends", *_candidates(missing))


def _missing(wanted: Sequence[str]) -> list[str]:
    names = [name.strip() for item in wanted for name in item.split("|")]
    listing = subprocess.run(["dpkg-query", "-W", "-f", "${Package} ${db:Status-Status}\n", *names],
                             stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    installed = {line.split()[0] for line in listing.stdout.splitlines() if line.endswith(" installed")}
    return [item for item in wanted if not installed.intersection(name.strip() for name in item.split("|"))]


def _candidates(items: Sequence[str]) -> list[str]:
    """For each item its first alternative that apt could install, or its first where apt knows none."""
    return [next(filter(_has_candidate, alternatives), alternatives[0]) if len(alternatives) > 1
            else alternatives[0]
            for alternatives in ([name.strip() for name in item.split("|")] for item in items)]


def _has_candidate(name: str) -> bool:
    policy = subprocess.run(["apt-cache", "policy", name], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                            text=True, env={**os.environ, "LC_ALL": "C"})
    return "Candidate:" in policy.stdout and "Candidate: (none)" not in policy.stdout


def _apt(*arguments: str, check: bool = True) -> None:
    _run(["apt-get", "-q", "-o", "DPkg::Lock::Timeout=300", "-o", "Dpkg::Use-Pty=0", *arguments], check=check,
         env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})


def _run(command: Sequence[object], check: bool = True, **options: object) -> None:
    """Run quietly; on failure show everything the command printed and end the program."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, timeout=PATIENCE, **options)
    except subprocess.TimeoutExpired:
        give_up(f"`{' '.join(words)}` did not end within {PATIENCE // 60} minutes")
    if check and done.returncode:
        sys.stderr.write(done.stdout)
        give_up(f"`{' '.join(words)}` failed with status {done.returncode}; its output is above")


# -------------------------------------------------------------------------------------------------- Python


def ensure_python() -> None:
    """Be run by a Python that is new enough: this one, else another of this machine, else end."""
    if sys.version_info >= OLDEST:
        return
    for minor in range(OLDEST[1], OLDEST[1] + 8):
        newer = shutil.which(f"python3.{minor}")
        if newer:
            os.execv(newer, [newer, *sys.argv])
    name = "python{}.{}".format(*OLDEST)
    give_up(f"this is Python {sys.version.split()[0]}, vdev needs {OLDEST[0]}.{OLDEST[1]} or later; "
            f"on Debian and Ubuntu: sudo apt install {name} {name}-venv {name}-dev")


def ensure_venv(extras: Sequence[str] = ()) -> Path:
    """Have vdev installed, editable and with ``extras``, in the project's .venv; return its Python.

    When nothing changed since the last time this takes milliseconds. Otherwise .venv is made, or vdev is
    installed into it again, which builds the C extension.
    """
    with _alone():
        wanted = {"ingredients": _ingredients(), "extras": sorted({*extras, *_stamp().get("extras", [])})}
        if _stamp() == wanted and PYTHON.exists() and any(PROJECT.glob("ring/_core.*.so")):
            return PYTHON
        _ensure_build_tools()
        if not _works(PYTHON):
            say(f"making a virtual environment in {VENV}")
            _run([sys.executable, "-m", "venv", "--clear", VENV])
        say("building and installing vdev into it (pip install -e)")
        # setuptools goes by time stamps, which a switch of branches can turn back; a process that has the
        # old extension open keeps it.
        for old in PROJECT.glob("ring/_*.so"):
            old.unlink()
        what = f"{PROJECT}[{','.join(wanted['extras'])}]" if wanted["extras"] else str(PROJECT)
        _run([PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-e", what],
             cwd=str(PROJECT))
        STAMP.write_text(json.dumps(wanted))
    return PYTHON


def _ingredients() -> str:
    sha = hashlib.sha256()
    for pattern in INGREDIENTS:
        for path in sorted(PROJECT.glob(pattern)):
            if path.is_file():
                sha.update(f"{path.relative_to(PROJECT)}\0{path.stat().st_size}\0".encode())
                sha.update(path.read_bytes())
    return sha.hexdigest()


def _stamp() -> dict:
    try:
        return json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}


def _works(python: Path) -> bool:
    """True for a Python that starts, is new enough and has pip: not so after an upgrade of the system's."""
    question = f"import sys, pip; sys.exit(sys.version_info < {OLDEST})"
    try:
        return subprocess.run([str(python), "-c", question], stdin=subprocess.DEVNULL, timeout=60,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _ensure_build_tools() -> None:
    """Have a C compiler, the headers of libc and Python, and the venv module. By what is there, not by
    package: the Python in use may not be the distribution's."""
    needed = []
    if not shutil.which("cc") and not shutil.which("gcc"):
        needed.append("gcc")
    if not Path("/usr/include/stdio.h").exists():
        needed.append("libc6-dev")
    builder = PYTHON if _works(PYTHON) else Path(sys.executable)
    question = "import sys, sysconfig; print(sysconfig.get_path('include'), sys.version_info[1])"
    answer = subprocess.check_output([str(builder), "-c", question], text=True, timeout=60)
    include, minor = answer.rsplit(None, 1)
    if not Path(include, "Python.h").exists():
        needed.append(f"python3.{minor}-dev")
    if builder != PYTHON and importlib.util.find_spec("ensurepip") is None:
        needed.append(f"python3.{minor}-venv")
    if needed:
        ensure_packages(needed)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One at a time: a second caller waits and then finds everything done."""
    path = PROJECT / ".venv.lock"
    try:
        lock = path.open("w")
    except OSError as error:
        give_up(f"cannot write {path}: {error.strerror}; work in a checkout of your own")
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main() -> None:
    """Parse the arguments, set up, print the path of .venv's Python."""
    parser = argparse.ArgumentParser(
        prog="tools/bootstrap.py", description="Make the project's .venv ready and print its Python's path.",
        epilog="example: $(tools/bootstrap.py --extras test) -m pytest tests/test_vdev_cli.py")
    parser.add_argument("--extras", default="", metavar="A,B",
                        help="extras of pyproject.toml to install as well")
    arguments = parser.parse_args()
    ensure_python()
    print(ensure_venv([name for name in arguments.extras.split(",") if name]))


if __name__ == "__main__":
    main()
