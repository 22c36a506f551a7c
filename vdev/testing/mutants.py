"""Devices that break one requirement each: descriptions of them (tests/*mutants*.toml), and trees of the sources with
one built in."""

import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mutant:
    """A change of ``file`` that breaks ``rows``; engine: only in that one. also: changes of further places, each with
    file, healthy and faulty. port, options: of the device that has it, where it shows on such a one only."""

    name: str
    rows: list[str]
    file: str
    healthy: str
    faulty: str
    engine: str | None = None
    also: tuple[dict[str, str], ...] = ()
    port: str | None = None
    options: tuple[str, ...] = ()

    @property
    def changes(self) -> list[tuple[str, str, str]]:
        """(file, healthy, faulty) of every place."""
        return [(self.file, self.healthy, self.faulty),
                *((more["file"], more["healthy"], more["faulty"]) for more in self.also)]

    @property
    def compiled(self) -> bool:
        """Is C changed, so that the extension has to be built anew?"""
        return not all(file.endswith(".py") for file, _, _ in self.changes)

    def __str__(self) -> str:
        # Not as the name of a test that is about the row (vdev/testing/rows.py): it is about the row's tests.
        return f"{self.name} ({self.rows[0]})"


def read(files: Sequence[Path]) -> list[Mutant]:
    """Those described in ``files``, in their order. Raises TypeError for fields that a Mutant does not have."""
    return [Mutant(**fields) for file in files for fields in tomllib.loads(file.read_text())["mutant"]]


class Tree:
    """A copy of the project ``root`` in ``folder``, for an extension of its own."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.folder = folder
        for package in ("ring", "vdev", "vhost_user"):
            shutil.copytree(root / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(root / name, folder)
        self.replace("ring/sources.py", '"-O2"', '"-O0"')  # builds fastest

    def replace(self, file: str, healthy: str, faulty: str) -> None:
        """Put one text in place of another. Raises ValueError unless that is there exactly once."""
        text = (self.folder / file).read_text()
        if text.count(healthy) != 1:
            raise ValueError(f"{file} has {text.count(healthy)} times: {healthy}")
        (self.folder / file).write_text(text.replace(healthy, faulty))

    def change(self, mutant: Mutant) -> None:
        """Build ``mutant`` in; C has still to be built, with :meth:`build`."""
        for file, healthy, faulty in mutant.changes:
            self.replace(file, healthy, faulty)

    def environment(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """That of a Python that imports from here."""
        return {**os.environ, **(more or {}), "PYTHONPATH": str(self.folder)}

    def run(self, *arguments: str, more: Mapping[str, str] | None = None) -> str:
        """Run Python with what is imported taken from here -> its output. Raises RuntimeError when it breaks."""
        done = subprocess.run([sys.executable, *arguments], cwd=self.folder, env=self.environment(more), timeout=600,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode not in (0, 1):
            raise RuntimeError(done.stdout)
        return done.stdout

    def build(self) -> None:
        """Build the extension anew. Raises RuntimeError."""
        said = self.run("setup.py", "-q", "build_ext", "--inplace", "--force")
        if "rror" in said:
            raise RuntimeError(said)
