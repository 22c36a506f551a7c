"""The cffi recipes (API mode, out of line) of two extension modules.

``ring._core`` is the virtqueue core and its data plane; ``ring._driver`` is the load generator, the
guest's half in C, which no daemon loads. The contracts (core/ring.h, plane/pump.h, plane/offload.h,
core/driver.h) are the cdef, word for word. A digest of the C sources is baked into each, so that an editable
install whose ``.so`` is older than its sources can be told (ring/build.py).
"""

import importlib.util
from collections.abc import Iterable
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
_spec = importlib.util.spec_from_file_location("ring_sources", HERE / "sources.py")
sources = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sources)

# setuptools wants paths relative to the project's root
ROOT = HERE.parent


def _relative(paths: Iterable[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def _extension(name: str, contracts: Iterable[str], headers: Iterable[str], compiled: Iterable[Path],
               included: Iterable[Path], digest: str) -> FFI:
    """``contracts``: what cffi reads; ``headers``: the same as C sees it."""
    made = FFI()
    for contract in contracts:
        made.cdef((HERE / contract).read_text())
    made.set_source(
        name,
        "".join(f'#include "{header}"\n' for header in headers),
        sources=_relative(compiled),
        depends=_relative(included),
        include_dirs=["ring"],
        define_macros=[("RING_SOURCES_DIGEST", f'"{digest}"')],
        extra_compile_args=list(sources.COMPILER_FLAGS),
        extra_link_args=["-pthread"],
    )
    return made


ffi = _extension("ring._core", sources.CONTRACTS, sources.INCLUDED, sources.compiled(HERE),
                 sources.included(HERE), sources.digest(HERE))
driver_ffi = _extension("ring._driver", sources.DRIVER_CONTRACTS, sources.DRIVER_INCLUDED,
                        sources.driver_compiled(HERE), sources.driver_included(HERE),
                        sources.driver_digest(HERE))
