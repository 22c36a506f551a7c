"""The one place that loads the C extension, and says in a line what is wrong when it cannot be used.

Everything of this package takes ``ffi`` and ``lib`` from here. Where the C sources lie beside the
extension (a checkout, an editable install) their digest is compared with the one baked into the
extension: editing C does not rebuild it, and a stale extension would answer for code that is not there.
"""

from collections.abc import Callable
from pathlib import Path

from ring import sources

_FIX = "build it with: pip install -e ."


class ExtensionError(ImportError):
    """The C extension is missing, cannot be loaded, or is older than its sources. One line, with the fix."""


def check_digest(built: str, root: Path, module: str = "ring._core",
                 digest: Callable[[Path], str] = sources.digest) -> None:
    """Raise :class:`ExtensionError` if the C sources below ``root`` are not those that made ``module``.

    ``built`` is the digest baked into it, ``digest`` what computes it anew. No sources below ``root`` (an
    installed wheel): nothing to compare.
    """
    if sources.compiled(root) and built != digest(root):
        raise ExtensionError(
            f"the C extension {module} is stale: it was built from other sources than those in {root}; "
            "rebuild it with: pip install -e .")


try:
    from ring._core import ffi, lib
except ModuleNotFoundError as error:
    if error.name != "ring._core":
        raise
    raise ExtensionError(f"the C extension ring._core is not built here; {_FIX}") from error
except ImportError as error:
    raise ExtensionError(f"the C extension ring._core cannot be loaded ({error}); {_FIX}") from error

check_digest(ffi.string(lib.ring_sources_digest()).decode(), Path(__file__).resolve().parent)

__all__ = ["ExtensionError", "check_digest", "ffi", "lib"]
