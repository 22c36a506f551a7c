"""The extension that cannot be used is named in one line, with the fix."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import _cffi_backend
import pytest

from ring import build, sources

RING = Path(build.__file__).resolve().parent


def write_sources(root: Path, text: str) -> Path:
    """A tree that looks like the C sources, with ``text`` in its one translation unit."""
    for folder in ("core", "plane"):
        (root / folder).mkdir(exist_ok=True)
    (root / "core/ring.h").write_text("int x;\n")
    (root / "core/verbs.c").write_text(text)
    return root


def import_ring(package: Path) -> str:
    """What `import ring.build` says with ``package`` as the directory of the package ring; '' for nothing."""
    # -S: no .pth file is read, or an editable install would lend the copy its own extension.
    path = [str(package.parent), str(Path(_cffi_backend.__file__).parent)]
    program = f"import sys; sys.path[:0] = {path}; import ring.build"
    done = subprocess.run([sys.executable, "-IS", "-c", program], capture_output=True, text=True, timeout=60)
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package ring, copied with its sources and its extension."""
    if not (RING / "core").is_dir():
        pytest.skip("the C sources are not beside the installed package")
    return Path(shutil.copytree(RING, tmp_path / "ring", ignore=shutil.ignore_patterns("__pycache__")))


def test_digest_follows_names_and_contents(tmp_path: Path) -> None:
    first = sources.digest(write_sources(tmp_path, "int a;\n"))
    assert first == sources.digest(tmp_path)
    assert first != sources.digest(write_sources(tmp_path, "int b;\n"))
    (tmp_path / "core/verbs.c").rename(tmp_path / "core/packed.c")
    (tmp_path / "core/packed.c").write_text("int a;\n")
    assert first != sources.digest(tmp_path)


def test_matching_digest_is_accepted(tmp_path: Path) -> None:
    build.check_digest(sources.digest(write_sources(tmp_path, "int a;\n")), tmp_path)


def test_stale_digest_is_named_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(build.ExtensionError, match=r"stale.*pip install -e \.$") as caught:
        build.check_digest("0" * 16, write_sources(tmp_path, "int a;\n"))
    assert "\n" not in str(caught.value)


def test_without_sources_any_digest_is_accepted(tmp_path: Path) -> None:
    build.check_digest("0" * 16, tmp_path)


def test_untouched_copy_is_imported(copy: Path) -> None:
    assert import_ring(copy) == ""


def test_edited_source_makes_the_extension_stale(copy: Path) -> None:
    with (copy / "core/verbs.c").open("a") as file:
        file.write("/* one more line */\n")
    said = import_ring(copy)
    assert said.startswith("ring.build.ExtensionError: the C extension ring._core is stale")
    assert said.endswith("pip install -e .")


def test_missing_extension_is_named(copy: Path) -> None:
    for extension in copy.glob("_core*.so"):
        extension.unlink()
    assert import_ring(copy) == ("ring.build.ExtensionError: the C extension ring._core is not built here; "
                                 "build it with: pip install -e .")


def test_broken_extension_is_named(copy: Path) -> None:
    for extension in copy.glob("_core*.so"):
        extension.write_bytes(b"not an ELF file")
    said = import_ring(copy)
    assert said.startswith("ring.build.ExtensionError: the C extension ring._core cannot be loaded (")
    assert said.endswith("pip install -e .")


def test_build_without_compiler_says_so_in_one_line(tmp_path: Path) -> None:
    setup = RING.parent / "setup.py"
    if not setup.exists():
        pytest.skip("setup.py is not beside the installed package")
    work = tmp_path / "project"
    shutil.copytree(RING, work / "ring", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(setup, work)
    done = subprocess.run([sys.executable, "setup.py", "-q", "build_ext"], cwd=work, capture_output=True,
                          text=True, timeout=60, env={**os.environ, "CC": "no-such-compiler"})
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1] == (
        "vdev: no C compiler (no-such-compiler is not on PATH); "
        "on Debian and Ubuntu: sudo apt install gcc libc6-dev")


def test_pytest_refuses_to_test_a_stale_extension(copy: Path, tmp_path: Path) -> None:
    conftest = Path(__file__).with_name("conftest.py")
    (tmp_path / "tests").mkdir()
    shutil.copy(conftest, tmp_path / "tests")
    (tmp_path / "tests/test_nothing.py").write_text("def test_nothing(): pass\n")
    with (copy / "core/verbs.c").open("a") as file:
        file.write("/* one more line */\n")
    done = subprocess.run([sys.executable, "-m", "pytest", "tests"], cwd=tmp_path, capture_output=True, text=True,
                          timeout=60, env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "stale" in done.stderr and "Traceback" not in done.stderr
    assert "1 passed" not in done.stdout
