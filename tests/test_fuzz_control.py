"""Fuzzing the control plane, guided by coverage: messages and descriptors of a front-end (tests/fuzz/control.py).

As in tests/test_fuzz.py: the corpus is replayed in every run; new inputs are looked for with --long. What ended the
fuzzer is printed as hex: what was wrong becomes a test of its own, and the input a file of the corpus.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CORPUS = HERE / "fuzz" / "corpus" / "control"
ROOT = HERE.parent
if not (ROOT / "setup.py").exists():
    pytest.skip("the packages are changed in their source tree, and there is none here", allow_module_level=True)

BYTES_MAX = 200
SECONDS = 60

needs_atheris = pytest.mark.skipif(importlib.util.find_spec("atheris") is None,
                                   reason="atheris is not installed: it has no wheel for this Python or processor")


def run(*arguments: object, tree: Path = ROOT, folder: Path, seconds: int = 100) -> subprocess.CompletedProcess:
    """Run the fuzzer on the packages in ``tree``."""
    return subprocess.run([sys.executable, HERE / "fuzz" / "control.py", *map(str, arguments)], cwd=folder,
                          env={**os.environ, "PYTHONPATH": str(tree)}, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds)


def fuzz(folder: Path, seconds: int, tree: Path = ROOT) -> tuple[int, str]:
    """Look for inputs from a copy of the corpus on, in ``folder``. -> (status, output), with what ended it in hex."""
    inputs = shutil.copytree(CORPUS, folder / "inputs")
    done = run(f"-max_total_time={seconds}", f"-max_len={BYTES_MAX}", "-timeout=30",
               f"-artifact_prefix={folder / 'found-'}", inputs, tree=tree, folder=folder, seconds=seconds + 200)
    hexes = "".join(f"{path.name}: {path.read_bytes().hex()}\n" for path in folder.glob("found-*"))
    return done.returncode, f"{done.stdout[-4000:]}\n{hexes}"


def broken(folder: Path, file: str, healthy: str, faulty: str) -> Path:
    """A copy of the packages in ``folder`` with one text in place of another."""
    for package in ("ring", "vdev", "vhost_user"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    text = (folder / file).read_text()
    assert text.count(healthy) == 1
    (folder / file).write_text(text.replace(healthy, faulty))
    return folder


def test_corpus_is_replayed(tmp_path: Path) -> None:
    files = sorted(CORPUS.iterdir())
    done = run("--replay", *files, folder=tmp_path)
    assert done.returncode == 0, done.stdout[-4000:]
    assert f"Executed {len(files)} inputs" in done.stdout


def test_corpus_is_small() -> None:
    files = list(CORPUS.iterdir())
    assert 10 < len(files) < 250
    assert max(path.stat().st_size for path in files) <= BYTES_MAX


# file, what is there, what is put there instead, and what the replay has to say.
MISTAKES = {
    "a replaced descriptor stays open": (
        "vdev/backend.py", "                    unused = old\n", "                    unused = -1\n",
        "descriptors were left open"),
    "descriptors of a refused message stay open": (
        "vhost_user/session.py", "        except Refused as refused:\n            message.fds.close()\n",
        "        except Refused as refused:\n            message.fds.take_all()\n", "descriptors were left open"),
    "replaced memory stays mapped": (
        "vdev/memory.py", "        _close(mapping for mapping in old_mappings if mapping not in mappings)\n", "",
        "guest memory is still mapped"),
    "a refused request leaves a trace": (
        "vhost_user/session.py", "        except Refused as refused:\n",
        "        except Refused as refused:\n            self.state = State(self.state.rings)\n",
        "a request that was refused changed the session"),
    "status 0 stops no ring": (
        "vdev/session_rings.py", "for index in running - wanted:", "for index in ():", "AssertionError"),
    "vanished memory is an internal error": (
        "vdev/connection.py", "        except MemoryGone:\n            raise Close(_VANISHED) from None\n", "",
        "ring.errors.MemoryGone"),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_corpus_notices(mistake: tuple[str, str, str, str], tmp_path: Path) -> None:
    *change, said = mistake
    done = run("--replay", *sorted(CORPUS.iterdir()), tree=broken(tmp_path, *change), folder=tmp_path)
    assert done.returncode == 1 and "Traceback" in done.stdout and said in done.stdout


@pytest.mark.long
@pytest.mark.timeout(400)
@needs_atheris
def test_fuzzing_finds_nothing(tmp_path: Path) -> None:
    status, said = fuzz(tmp_path, SECONDS)
    assert status == 0, said
    print(re.findall(r"^Done .*", said, re.M)[-1])
