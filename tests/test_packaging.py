"""What a user installs: an sdist from this tree, a wheel from the sdist, both installed where no source is.

These take minutes; tools/test runs them as a stage of its own.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# What is only there where somebody worked in the tree.
LEFTOVERS = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", "*.so", "*.o",
                                   "_core.c", "_driver.c", ".*_cache", ".hypothesis")
# These ask about the source tree, or are a stage of their own; an installed vdev is tested by all the others.
ABOUT_THE_TREE = ("test_packaging.py", "test_house.py", "test_docs.py", "test_c.py", "test_c_faults.py",
                  "test_fuzz.py", "test_proofs.py", "test_ring_memory_order.py", "test_tools_*.py", "system", "interop")
# A normal run takes those that use what only an installation can lack: the extension, the data files, the commands.
QUICK = ("test_ring_build.py", "test_ring_guestmem.py", "test_ring_reference.py", "test_vhost_user_session.py",
         "test_vdev_cli.py", "test_vdev_config.py", "test_vdev_daemon.py", "test_vdev_net_*.py",
         "test_vdev_ports_tap.py", "test_vdev_systemd.py")
# The packages of the Python that runs these tests.
OURS = sysconfig.get_path("purelib")

pytestmark = pytest.mark.timeout(600)


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run to success; what was printed becomes the failure's text."""
    done = subprocess.run([str(word) for word in command], cwd=cwd, stdin=subprocess.DEVNULL, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=580,
                          env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment})
    assert done.returncode == 0, f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout}"
    return done


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for everything that is built here."""
    return tmp_path_factory.mktemp("packaging")


@pytest.fixture(scope="module")
def tree(room: Path) -> Path:
    """The source tree as a fresh clone has it."""
    return Path(shutil.copytree(ROOT, room / "tree", ignore=LEFTOVERS))


@pytest.fixture(scope="module")
def sdist(room: Path, tree: Path) -> Path:
    """The sdist, built and unpacked; -> its directory."""
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", room / "dist", tree, cwd=room)
    shutil.unpack_archive(next((room / "dist").glob("*.tar.gz")), room / "unpacked")
    return next((room / "unpacked").iterdir())


@pytest.fixture(scope="module")
def wheel(room: Path, sdist: Path) -> Path:
    """The wheel that the sdist builds."""
    run(sys.executable, "-m", "build", "--wheel", "--outdir", room / "dist", sdist, cwd=room)
    return next((room / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def installed(room: Path, wheel: Path) -> Path:
    """A virtual environment with the wheel and what it needs; -> its bin directory."""
    venv.create(room / "venv")
    run(sys.executable, "-m", "pip", "--python", room / "venv/bin/python", "install", "-q", wheel, cwd=room)
    return room / "venv" / "bin"


@pytest.fixture
def equipped(installed: Path, wheel: Path, room: Path, request: pytest.FixtureRequest) -> Path:
    """The same with what the tests need. A normal run lends it that, behind its own packages; --long installs it."""
    if request.config.getoption("--long"):
        run(sys.executable, "-m", "pip", "--python", installed / "python", "install", "-q", f"{wheel}[test]", cwd=room)
    else:
        own = run(installed / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=room)
        Path(own.stdout.strip(), "lent.pth").write_text(f"{OURS}\n")
    return installed


@pytest.mark.xdist_group("wheel")
def test_sdist_holds_what_it_takes_to_build_and_test(sdist: Path, tree: Path) -> None:
    there = {path.relative_to(sdist) for path in sdist.rglob("*") if path.is_file()}
    wanted = {path.relative_to(tree) for path in tree.rglob("*")
              if path.is_file() and path.name not in (".gitignore", ".venv.lock") and "egg-info" not in str(path)}
    assert not wanted - there


@pytest.mark.xdist_group("wheel")
def test_wheel_holds_what_runs_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if name.startswith("ring/_core.") and name.endswith(".so")]
    assert {"vdev/cli.py", "vhost_user/session.py", "ring/virtqueue.py"} <= set(names)
    assert {"vdev/units/vdev@.service", "vdev/units/vdev@.socket"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"ring", "vdev", "vhost_user"}
    assert not [name for name in names if name.endswith((".c", ".h", ".inl"))]


@pytest.mark.xdist_group("wheel")
def test_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    metadata = archive.read(next(name for name in archive.namelist() if name.endswith("METADATA"))).decode()
    assert "License-Expression: GPL-2.0-or-later" in metadata
    assert f"Version: {PROJECT['version']}" in metadata


@pytest.mark.xdist_group("wheel")
def test_installed_command_works_without_the_source(installed: Path, tmp_path: Path) -> None:
    done = run(installed / "vdev", "--print-capabilities", cwd=tmp_path)
    assert json.loads(done.stdout) == {"type": "net"}
    assert run(installed / "vdev", "--version", cwd=tmp_path).stdout.split() == ["vdev", PROJECT["version"]]


@pytest.mark.xdist_group("wheel")
@pytest.mark.parametrize("chosen", [QUICK, pytest.param(("test_*.py",), marks=pytest.mark.long)], ids=["some", "all"])
def test_wheel_passes_the_unit_tests_from_an_empty_directory(equipped: Path, sdist: Path, tmp_path: Path,
                                                             chosen: tuple[str, ...]) -> None:
    """The tests of the sdist, away from its sources, against the installed wheel."""
    shutil.copytree(sdist / "tests", tmp_path / "tests")
    shutil.copytree(sdist / "docs", tmp_path / "docs")  # some tests compare a table there with the code
    shutil.copy(sdist / "pyproject.toml", tmp_path)  # pytest's options
    record = tmp_path / "results.json"
    run(equipped / "python", "-m", "pytest", "-q", "--numprocesses=auto", "--results", record,
        *(f"--ignore-glob=tests/{name}" for name in ABOUT_THE_TREE),
        *sorted({path for name in chosen for path in (tmp_path / "tests").glob(name)}), cwd=tmp_path)
    results = json.loads(record.read_text())
    assert results["passed"] > 50
    assert not results["failed"]


@pytest.mark.xdist_group("editable")
def test_editable_install(room: Path, tree: Path) -> None:
    """The second way in, and the extension built into the tree follows its sources."""
    venv.create(room / "editable", with_pip=True)
    python = room / "editable/bin/python"
    run(python, "-m", "pip", "install", "-q", "-e", tree, cwd=room)
    where = run(python, "-c", "import ring.build, ring._core; print(ring._core.__file__)", cwd=room).stdout.strip()
    assert Path(where).parent == tree / "ring"
    with (tree / "ring/core/verbs.c").open("a") as file:
        file.write("/* changed after the build */\n")
    stale = subprocess.run([python, "-c", "import ring.build"], cwd=room, capture_output=True, text=True, timeout=60)
    assert "ring._core is stale" in stale.stderr
    run(python, "-m", "pip", "install", "-q", "--no-build-isolation", "-e", tree, cwd=room, PYTHONPATH=OURS)
    run(python, "-c", "import ring.build", cwd=room)
