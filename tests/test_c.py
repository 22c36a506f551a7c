"""The programs in tests/c, built from the C sources under sanitizers and shown test by test.

AddressSanitizer and UndefinedBehaviorSanitizer with both compilers, all warnings being errors; the pump against the
load generator under ThreadSanitizer, which knows the order that two threads may rely on; the races of notification
(litmus) compiled as the product is; every small ring (enumerate), with --long larger ones. That these programs find
what they are there to find: test_c_faults.py.
"""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ring import sources
from vdev.testing.cprograms import CLANG, FAST, GCC, THREADS, Builder, Flavour, names_in

HERE = Path(__file__).resolve().parent / "c"
RING = HERE.parent.parent / "ring"
if not sources.compiled(RING):
    pytest.skip("no C sources here: the package is installed, not checked out", allow_module_level=True)

PROGRAMS = {
    GCC: ("arithmetic", "budget", "dirty", "enumerate", "guestmem", "mutate", "offload", "pump", "receive", "rings",
          "switch", "takeover", "workers"),
    CLANG: ("dirty", "guestmem", "mutate", "offload", "pump", "receive", "rings", "workers"),
    THREADS: ("dirty", "pump", "receive", "switch", "workers"),
    FAST: ("arithmetic", "dirty", "litmus"),
}


def items() -> Iterator[object]:
    """One a flavour, program and test."""
    for flavour, programs in PROGRAMS.items():
        for program in programs:
            for name in names_in(HERE / f"{program}.c"):
                yield pytest.param(flavour, program, name, id=f"{flavour.name}-{program}-{name}")


@pytest.fixture(scope="module")
def builder(shared_folder: Path) -> Builder:
    (shared_folder / "c").mkdir(exist_ok=True)
    return Builder(HERE, RING, shared_folder / "c")


def skip_on_one_processor() -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("only one processor: two threads never run at once")


@pytest.mark.parametrize("flavour, program, name", list(items()))
def test_c(builder: Builder, flavour: Flavour, program: str, name: str) -> None:
    if program == "litmus":
        skip_on_one_processor()
    done = builder.run(flavour, program, name)
    if done.returncode:
        pytest.fail(f"{program} {name} ended with {done.returncode}\n{done.stdout}{done.stderr}", pytrace=False)


def test_every_program_is_run() -> None:
    assert {path.stem for path in HERE.glob("*.c")} == {name for names in PROGRAMS.values() for name in names}


@pytest.mark.parametrize("program", sorted({program for programs in PROGRAMS.values() for program in programs}))
def test_every_test_of_a_program_is_run(builder: Builder, program: str) -> None:
    """What is found in the source is what the program has."""
    flavour = next(flavour for flavour, programs in PROGRAMS.items() if program in programs)
    listed = subprocess.run([builder.program(flavour, program)], capture_output=True, text=True, timeout=60)
    assert sorted(listed.stdout.split()) == sorted(names_in(HERE / f"{program}.c")) != []


@pytest.mark.long
@pytest.mark.timeout(5400)
@pytest.mark.parametrize("name", names_in(HERE / "litmus.c"))
def test_litmus_long(builder: Builder, name: str) -> None:
    """A hundred million rounds, in all."""
    skip_on_one_processor()
    done = builder.run(FAST, "litmus", name, 25_000_000, seconds=5300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("name", names_in(HERE / "enumerate.c"))
def test_enumerate_long(builder: Builder, name: str) -> None:
    """Rings of 4 descriptors, all of which may be one chain."""
    done = builder.run(FAST, "enumerate", name, 4, seconds=1400)
    print(done.stdout, end="")
    assert done.returncode == 0, done.stdout + done.stderr
