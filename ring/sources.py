"""Which C files make up the extension modules, how they are compiled, and digests of them.

Imports nothing of the package, so that the build recipe can load it before anything is built.

``ring._core`` is core/ and plane/ without the files named driver*; those are the load generator, the module
``ring._driver``, which is no part of a daemon.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

# the cffi definition, in this order
CONTRACTS = ("core/ring.h", "plane/fabric.h", "plane/settings.h", "plane/pump.h", "plane/offload.h")
INCLUDED = ("core/include.h", "plane/include.h")  # the same, as C sees them
COMPILER_FLAGS = ("-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-fno-strict-aliasing", "-ftls-model=initial-exec",
                  "-pthread")
DRIVER_CONTRACTS = ("core/driver.h",)
DRIVER_INCLUDED = ("core/driver_include.h",)


def _files(root: Path, folders: Iterable[str], patterns: Iterable[str], driver: bool) -> list[Path]:
    found = (path for folder in folders for pattern in patterns for path in (root / folder).glob(pattern))
    return sorted(path for path in found if path.name.startswith("driver") == driver)


def compiled(root: Path) -> list[Path]:
    """The translation units of the core below ``root``."""
    return _files(root, ("core", "plane"), ("*.c",), driver=False)


def included(root: Path) -> list[Path]:
    """Headers and inlined parts of the core below ``root``."""
    return _files(root, ("core", "plane"), ("*.h", "*.inl"), driver=False)


def driver_compiled(root: Path) -> list[Path]:
    """The translation units of the load generator below ``root``."""
    return _files(root, ("core",), ("*.c",), driver=True)


def driver_included(root: Path) -> list[Path]:
    """Headers and inlined parts of the load generator below ``root``, and those it shares with the core."""
    return [*_files(root, ("core",), ("*.h", "*.inl"), driver=True),
            *_files(root, ("core",), ("*.h",), driver=False)]


def _digest(paths: Iterable[Path]) -> str:
    sha = hashlib.sha256()
    for path in paths:
        sha.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        sha.update(path.read_bytes())
    return sha.hexdigest()[:16]


def digest(root: Path) -> str:
    """SHA-256 (hex, 16 digits) over names and contents of all C files of the core below ``root``."""
    return _digest([*compiled(root), *included(root)])


def driver_digest(root: Path) -> str:
    """The same over those of the load generator."""
    return _digest([*driver_compiled(root), *driver_included(root)])
