"""The C core under sanitizers: programs of tests/c/, built with the core's own sources and run.

With --long each program that looks for a fault is also built from sources in which that very fault was put, and
must find it: otherwise its silence would say nothing.
"""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from vdev.net.features import Feature, mask

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = Path(__file__).with_name("c")
if not (ROOT / "ring/core").is_dir():
    pytest.skip("the C sources are not beside the tests", allow_module_level=True)
if not shutil.which("gcc"):
    pytest.skip("gcc is not installed: the programs of tests/c cannot be built", allow_module_level=True)

PLAIN = mask(Feature.VERSION_1)
FORMATS = {
    "split": PLAIN,
    "packed": PLAIN | mask(Feature.RING_PACKED),
    "split_in_order": PLAIN | mask(Feature.IN_ORDER),
    "packed_in_order": PLAIN | mask(Feature.RING_PACKED, Feature.IN_ORDER),
}
EVENTS = mask(Feature.EVENT_IDX)
INDIRECT = mask(Feature.INDIRECT_DESC)

WARNINGS = ["-Wall", "-Wextra", "-Wconversion", "-Werror"]
THREAD = ["-O1", "-g", "-fsanitize=thread"]
ADDRESS = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

Build = Callable[..., Path]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """build(program, flags, fault=None) -> the executable, made once.

    fault: (file below ring/, text in it, what stands there instead). Skips where gcc lacks the sanitizer.
    """
    made: dict[tuple, Path] = {}

    def make(program: str, flags: list[str], fault: tuple[str, str, str] | None = None) -> Path:
        key = (program, *flags, fault)
        if key in made:
            return made[key]
        root = tmp_path_factory.mktemp(program)
        shutil.copytree(ROOT / "ring", root / "ring", ignore=shutil.ignore_patterns("*.py", "*.so", "__pycache__"))
        if fault:
            file, healthy, faulty = fault
            text = (root / "ring" / file).read_text()
            assert text.count(healthy) == 1, f"{healthy!r} is not in {file} once"
            (root / "ring" / file).write_text(text.replace(healthy, faulty))
        main = PROGRAMS / f"{program}.c"
        includes_driver = '#include "core/driver.c"' in main.read_text()
        sources = [path for folder in ("core", "plane") for path in sorted((root / "ring" / folder).glob("*.c"))
                   if not (includes_driver and path.name == "driver.c")]
        command = ["gcc", "-std=gnu11", *WARNINGS, *flags, "-fno-strict-aliasing", "-pthread", f"-I{root / 'ring'}",
                   f"-I{PROGRAMS}", *map(str, sources), str(main), "-o", str(root / program)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=110)
        if "cannot find -l" in done.stderr and "san" in done.stderr:
            pytest.skip(f"gcc has no library for {flags[-1]}: {done.stderr.strip().splitlines()[0]}")
        assert done.returncode == 0, done.stderr
        made[key] = root / program
        return made[key]

    return make


def run(program: Path, *arguments: object, seconds: float = 100) -> subprocess.CompletedProcess[str]:
    """Run it; sanitizers say what they found on stderr and end with a status of their own."""
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1:exitcode=66", "ASAN_OPTIONS": "exitcode=66",
                   "UBSAN_OPTIONS": "print_stacktrace=1"}
    return subprocess.run([str(program), *map(str, arguments)], capture_output=True, text=True, timeout=seconds,
                          env=environment)


def numbers(done: subprocess.CompletedProcess[str]) -> list[int]:
    """What a program that found nothing counted."""
    assert done.returncode == 0, done.stdout + done.stderr
    return [int(word) for word in done.stdout.split() if word.isdigit()]


# ----------------------------------------------------------------------------- a driver's threads and the pump


@pytest.mark.parametrize("features, pieces, indirect, busy_poll", [
    (PLAIN, 1, 0, 0), (EVENTS | INDIRECT, 3, 1, 0), (EVENTS | mask(Feature.MRG_RXBUF), 3, 0, 1)],
    ids=["flags", "events", "polling"])
@pytest.mark.parametrize("ring", FORMATS)
def test_R39_no_data_race_between_driver_and_pump(build, ring, features, pieces, indirect, busy_poll):
    frames = 3000
    done = run(build("two_threads", THREAD), FORMATS[ring] | features, 64, frames, pieces, indirect, busy_poll)
    assert numbers(done) == [frames, frames, 0]


@pytest.mark.long
@pytest.mark.parametrize("ring", ["split", "packed"])
def test_a_publication_without_release_is_found(build, ring):
    """On x86-64 the fault does no harm, but ThreadSanitizer knows the memory model and not the machine."""
    fault = ("core/internal.h", "__atomic_store_n(p, v, __ATOMIC_RELEASE)", "__atomic_store_n(p, v, __ATOMIC_RELAXED)")
    done = run(build("two_threads", THREAD, fault), FORMATS[ring] | EVENTS, 64, 3000, 1, 0, 1)
    assert done.returncode == 66 and "ThreadSanitizer: data race" in done.stderr


# ------------------------------------------------------------------------------------- store, then load


NO_BARRIER = ("core/internal.h", "__atomic_thread_fence(__ATOMIC_SEQ_CST)", '__asm__ volatile("" ::: "memory")')
LITMUS = [pytest.param(FORMATS[ring] | features, id=f"{ring}-{name}")
          for ring in ("split", "packed") for name, features in (("flags", 0), ("events", EVENTS))]


def litmus(program: Path, features: int, rounds: int, seconds: float) -> None:
    counted, kicks, calls = numbers(run(program, features, 8, rounds, seconds=seconds))
    assert counted == rounds
    # both outcomes of either race were seen: the two threads did meet
    assert 0 < kicks < rounds and 0 < calls < rounds


@pytest.mark.parametrize("features", LITMUS)
def test_driver_and_device_never_both_miss_a_notification(build, features):
    """A million rounds in all."""
    litmus(build("litmus", ["-O2"]), features, 250_000, 100)


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("features", LITMUS)
def test_driver_and_device_never_both_miss_a_notification_long(build, features):
    """A hundred million rounds in all."""
    litmus(build("litmus", ["-O2"]), features, 25_000_000, 7000)


@pytest.mark.long
@pytest.mark.parametrize("features", LITMUS)
def test_a_missing_full_barrier_is_found(build, features):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("only one processor: two threads never run at once")
    done = run(build("litmus", ["-O2"], NO_BARRIER), features, 8, 20_000_000)
    assert done.returncode == 1 and (" no kick, " in done.stdout or " no call, " in done.stdout)


# ------------------------------------------------------------------------------------ everything rewritten


@pytest.mark.parametrize("features, size", [
    (EVENTS | INDIRECT, 8), (EVENTS | INDIRECT | mask(Feature.MRG_RXBUF), 64)])
@pytest.mark.parametrize("ring", FORMATS)
def test_R26_R28_R29_R31_R35_every_field_rewritten_while_frames_flow(build, ring, features, size):
    done = run(build("mutator", ADDRESS), FORMATS[ring] | features, size, 150)
    from_guest, to_guest, bad_chains, broken = numbers(done)
    assert from_guest > 0 and to_guest > 0 and bad_chains > 0
    assert broken > 0 or "packed" in ring  # a packed ring has no index that could be nonsense


@pytest.mark.long
def test_a_descriptor_that_is_not_checked_is_found(build):
    check = "if (unlikely(!r))\n            {};\n        if (unlikely(n == max))"
    fault = ("core/internal.h", check.format("return RING_E_UNMAPPED"), check.format("r = mem->regions"))
    done = run(build("mutator", ADDRESS, fault), FORMATS["packed"] | EVENTS | INDIRECT, 64, 400)
    assert done.returncode not in (0, 1), done.stdout + done.stderr
