"""The programs in tests/c, built from the C sources under sanitizers and shown test by test.

AddressSanitizer and UndefinedBehaviorSanitizer with both compilers, all warnings being errors; and the pump against
the load generator under ThreadSanitizer, which knows the order that two threads may rely on.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from ring import sources

HERE = Path(__file__).resolve().parent / "c"
RING = HERE.parent.parent / "ring"
if not sources.compiled(RING):
    pytest.skip("no C sources here: the package is installed, not checked out", allow_module_level=True)

WARNINGS = ["-Wall", "-Wextra", "-Wconversion", "-Werror"]
COMMON = ["-std=gnu11", "-O1", "-g", "-pthread", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
# What a sanitizer reports, it also fails for: abort and leave no report unread.
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=1:strict_string_checks=1:detect_stack_use_after_return=1:abort_on_error=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1",
}


@dataclass(frozen=True)
class Flavour:
    """One compiler with one set of sanitizers, for the programs that make sense under it."""

    name: str
    compiler: str
    sanitizers: str
    programs: tuple[str, ...]


FLAVOURS = (
    Flavour("gcc", "gcc", "address,undefined", ("guestmem", "mutate", "pump", "split")),
    Flavour("clang", "clang", "address,undefined", ("guestmem", "mutate", "pump", "split")),
    Flavour("gcc_threads", "gcc", "thread", ("pump",)),
)


def names_in(program: str) -> list[str]:
    """The names in the TEST lines of a program."""
    return re.findall(r"^TEST\((\w+)\)", (HERE / f"{program}.c").read_text(), re.MULTILINE)


def items() -> Iterator[object]:
    """One a flavour, program and TEST."""
    for flavour in FLAVOURS:
        for program in flavour.programs:
            for name in names_in(program):
                yield pytest.param(flavour, program, name, id=f"{flavour.name}-{program}-{name}")


class Builder:
    """Compiles each source once a flavour, each program when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._programs: dict[tuple[str, str], Path] = {}
        self._objects: dict[str, list[Path]] = {}

    def _compile(self, flavour: Flavour, source: Path) -> Path:
        target = self._folder / f"{flavour.name}-{source.stem}.o"
        self._run([flavour.compiler, *COMMON, *WARNINGS, f"-fsanitize={flavour.sanitizers}", "-c", source,
                   "-o", target])
        return target

    @staticmethod
    def _run(command: list[object]) -> None:
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=120, check=False)
        if done.returncode:
            pytest.fail(f"{' '.join(str(word) for word in command)}\n{done.stderr}", pytrace=False)

    def _core(self, flavour: Flavour) -> list[Path]:
        if flavour.name not in self._objects:
            unusable = why_unusable(flavour, self._folder)
            if unusable:
                pytest.skip(unusable)
            files = [*sources.compiled(RING), *sources.driver_compiled(RING)]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                self._objects[flavour.name] = list(pool.map(lambda file: self._compile(flavour, file), files))
        return self._objects[flavour.name]

    def program(self, flavour: Flavour, program: str) -> Path:
        """The built program. Fails the test where it does not compile, skips it where the tools are absent."""
        if (flavour.name, program) not in self._programs:
            objects = self._core(flavour)
            target = self._folder / f"{flavour.name}-{program}"
            self._run([flavour.compiler, *COMMON, *WARNINGS, f"-fsanitize={flavour.sanitizers}",
                       HERE / f"{program}.c", *objects, "-o", target])
            self._programs[flavour.name, program] = target
        return self._programs[flavour.name, program]


def why_unusable(flavour: Flavour, folder: Path) -> str:
    """'' if this compiler makes programs with these sanitizers that run here, else what is missing."""
    if not shutil.which(flavour.compiler):
        return f"no {flavour.compiler} on this machine: apt install {flavour.compiler}"
    trial = folder / f"trial-{flavour.name}"
    built = subprocess.run([flavour.compiler, f"-fsanitize={flavour.sanitizers}", "-xc", "-", "-o", str(trial)],
                           input="int main(void) { return 0; }", capture_output=True, text=True, check=False)
    if built.returncode:
        return f"{flavour.compiler} lacks the runtime of -fsanitize={flavour.sanitizers} (Debian: libclang-rt-dev)"
    ran = subprocess.run(command(flavour, trial), capture_output=True, text=True, timeout=60, check=False)
    if ran.returncode:
        return f"-fsanitize={flavour.sanitizers} does not run here: {ran.stderr.strip().splitlines()[-1:]}"
    return ""


def command(flavour: Flavour, program: Path, *arguments: str) -> list[str]:
    """How to run it. ThreadSanitizer's fixed map of memory does not stand much randomness of addresses."""
    randomness_off = ["setarch", "-R"] if flavour.sanitizers == "thread" and shutil.which("setarch") else []
    return [*randomness_off, str(program), *arguments]


@pytest.fixture(scope="session")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    return Builder(tmp_path_factory.mktemp("c"))


@pytest.mark.parametrize("flavour, program, name", list(items()))
def test_c(builder: Builder, flavour: Flavour, program: str, name: str) -> None:
    built = builder.program(flavour, program)
    done = subprocess.run(command(flavour, built, name), capture_output=True, text=True, timeout=100,
                          env=os.environ | ENVIRONMENT, check=False)
    if done.returncode:
        pytest.fail(f"{program} {name} ended with {done.returncode}\n{done.stdout}{done.stderr}", pytrace=False)


def test_every_program_is_run() -> None:
    programs = {path.stem for path in HERE.glob("*.c")}
    assert programs == {program for flavour in FLAVOURS for program in flavour.programs}
    assert all(names_in(program) for program in programs)
