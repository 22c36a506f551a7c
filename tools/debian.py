"""Debian packages without root: resolved and downloaded by apt itself, unpacked by dpkg-deb into a cache.

Nothing is installed and nothing of the machine's apt state is changed. The machine's own package lists are
used where they serve; otherwise a private state (its own lists and cache directories) is filled from the
machine's own apt sources, which are read at run time and never written down in this repository.
"""

import contextlib
import fcntl
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

SOURCES = (Path("/etc/apt/sources.list"), Path("/etc/apt/sources.list.d"))
# The one-line format's options that are not simply the deb822 field in lower case: sources.list(5).
ONE_LINE_OPTIONS = {"arch": "Architectures", "lang": "Languages", "target": "Targets"}


class Unavailable(Exception):
    """Something cannot be had on this machine. The text is one line: what, why, and what to do."""


def cache_root() -> Path:
    """The project's cache directory, made when absent: ``$XDG_CACHE_HOME/vdev`` or ``~/.cache/vdev``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = Path(base) / "vdev"
    root.mkdir(parents=True, exist_ok=True)
    return root


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the cache's lock ``name``: concurrent callers build a thing once and the others find it built."""
    with open(cache_root() / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def under_construction(target: Path) -> Iterator[Path]:
    """A directory to build in; it becomes ``target`` when the block ends well and goes when it does not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    work.chmod(0o755)
    try:
        yield work
        if target.exists():
            shutil.rmtree(target)
        work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def say(text: str) -> None:
    """Progress for the person who waits; stdout belongs to the result."""
    print(text, file=sys.stderr, flush=True)


def os_release() -> dict[str, str]:
    """The fields of /etc/os-release, unquoted; empty where there is no such file."""
    try:
        lines = Path("/etc/os-release").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split("=", 1) for line in lines if "=" in line)
    return {key: value.strip("\"'") for key, value in pairs}


def architecture() -> str:
    """Debian's name of this machine's architecture, e.g. ``amd64``. Raises Unavailable without dpkg."""
    if not shutil.which("dpkg") or not shutil.which("apt-get"):
        raise Unavailable("no apt on this machine: it is not a Debian or Ubuntu")
    return _output(["dpkg", "--print-architecture"]).strip()


def _output(command: list[str], timeout: float = 300) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout,
                              stdin=subprocess.DEVNULL, check=False,
                              env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"})
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{command[0]} gave no answer within {timeout:.0f} s: is the network up?") from None
    if done.returncode:
        complaint = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]
        raise Unavailable(f"{command[0]}: {complaint.removeprefix('E: ')}")
    return done.stdout


class Apt:
    """apt with the machine's state, or with one of our own in directory ``private``, whose lists are fetched.

    sources: text of a deb822 sources file that replaces the machine's; only with a private state.
    All methods raise Unavailable.
    """

    def __init__(self, private: Path | None = None, sources: str | None = None) -> None:
        self._options = ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []
        if private is None:
            return
        for folder in ("state/lists/partial", "cache/archives/partial", "sources.d"):
            (private / folder).mkdir(parents=True, exist_ok=True)
        self._set("Dir::State", private / "state")
        self._set("Dir::State::status", "/var/lib/dpkg/status")
        self._set("Dir::Cache", private / "cache")
        self._set("Dir::Log", private / "log")
        if sources is not None:
            (private / "sources.d/vdev.sources").write_text(sources)
            self._set("Dir::Etc::SourceList", "/dev/null")
            self._set("Dir::Etc::SourceParts", private / "sources.d")
        _output(["apt-get", *self._options, "-qq", "update"])

    def _set(self, name: str, value: Path | str) -> None:
        self._options += ["-o", f"{name}={value}"]

    def candidate(self, package: str) -> str | None:
        """The version apt would install, or None for a package it does not know."""
        policy = _output(["apt-cache", *self._options, "policy", package])
        found = re.search(r"Candidate: (\S+)", policy)
        return found.group(1) if found and found.group(1) != "(none)" else None

    def depends(self, package: str) -> list[str]:
        """The packages that the candidate of ``package`` directly depends on."""
        lines = _output(["apt-cache", *self._options, "depends", package]).splitlines()
        return [line.split()[1] for line in lines if line.strip().startswith("Depends: ")]

    def would_install(self, package: str, release: str) -> list[tuple[str, str]]:
        """(name, version) of all that installing ``package`` from ``release`` would bring here."""
        text = _output(["apt-get", *self._options, "-s", "-t", release, "--no-install-recommends",
                        "install", package])
        return re.findall(r"^Inst (\S+) (?:\[\S+\] )?\((\S+) ", text, re.MULTILINE)

    def closure(self, packages: list[str]) -> list[str]:
        """All packages that a machine with none of them needs for ``packages``, these included."""
        text = _output(["apt-get", *self._options, "-o", "Dir::State::status=/dev/null", "-s",
                        "--no-install-recommends", "install", *packages])
        return re.findall(r"^Inst (\S+) ", text, re.MULTILINE)

    def unpack(self, packages: list[str], into: Path) -> None:
        """Download ``packages`` (``name`` or ``name=version``) and unpack them all into one directory."""
        with tempfile.TemporaryDirectory(prefix="vdev-deb-") as folder:
            command = ["apt-get", *self._options, "-qq", "download", *packages]
            _output(["sh", "-c", 'cd "$0" && exec "$@"', folder, *command], timeout=900)
            for archive in sorted(Path(folder).glob("*.deb")):
                _output(["dpkg-deb", "-x", str(archive), str(into)])


@functools.cache
def fresh_apt() -> Apt:
    """An apt with the machine's sources and fresh lists of its own, made once a run."""
    say("reading fresh package lists (this machine's are absent or old; nothing is installed)")
    return Apt(cache_root() / "apt/machine")


def apt_knowing(package: str) -> Apt:
    """An apt whose lists know ``package``: the machine's where they do, else a fresh private one.

    Raises Unavailable when neither does.
    """
    for apt in (Apt, fresh_apt):
        if apt().candidate(package):
            return apt()
    raise Unavailable(f"no package {package} in this machine's apt sources")


def unpack_fresh(packages: list[str], into: Path, whole: bool = False) -> None:
    """Unpack packages the machine's lists know; when those lists are out of date, with fresh private ones.

    whole: with everything they need, as for a machine that has nothing.
    """
    def unpack(apt: Apt) -> None:
        apt.unpack(apt.closure(packages) if whole else packages, into)

    apt = apt_knowing(packages[0])
    try:
        unpack(apt)
    except Unavailable:
        unpack(fresh_apt())


def _stanzas() -> Iterator[dict[str, str]]:
    """The machine's apt sources, both formats, as deb822 fields."""
    main, parts = SOURCES
    files = [main, *sorted(parts.glob("*.list")), *sorted(parts.glob("*.sources"))]
    for file in files:
        try:
            text = file.read_text()
        except OSError:
            continue
        yield from (_deb822(text) if file.suffix == ".sources" else _one_line(text))


def _deb822(text: str) -> Iterator[dict[str, str]]:
    text = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    for block in re.split(r"\n\s*\n", text):
        fields = re.findall(r"^(\S+):[ \t]*(.*(?:\n[ \t].*)*)", block, re.MULTILINE)
        if fields:
            yield {name.title(): value for name, value in fields}


def _one_line(text: str) -> Iterator[dict[str, str]]:
    for line in text.splitlines():
        found = re.match(r"deb\s+(?:\[(.*?)\]\s+)?(\S+)\s+(\S+)\s+([^#]+)", line)
        if found:
            options, uri, suite, components = found.groups()
            fields = {"Types": "deb", "Uris": uri, "Suites": suite, "Components": components.strip()}
            for option in (options or "").split():
                name, _, value = option.partition("=")
                fields[ONE_LINE_OPTIONS.get(name, name.title())] = value.replace(",", " ")
            yield fields


def sources_with(codename: str, suite: str) -> str:
    """A deb822 text with the machine's entry for ``codename`` and, from the same place, ``suite``.

    Raises Unavailable when no source of this machine serves ``codename``.
    """
    for fields in _stanzas():
        enabled = fields.get("Enabled", "yes").strip().lower() not in ("no", "false")
        components = fields.get("Components", "").split()
        if enabled and codename in fields["Suites"].split() and "main" in components:
            chosen = {**fields, "Types": "deb", "Suites": f"{codename} {suite}", "Components": "main"}
            return "".join(f"{name}: {value}\n" for name, value in chosen.items())
    raise Unavailable(f"no apt source of this machine serves {codename} main")
