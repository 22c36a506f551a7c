"""The C programs that test the C core, fuzzers too: built with the core's own sources, under sanitizers, and run.

A Flavour is a compiler with its sanitizers. A Fault is a mistake put into a copy of the sources: a program that is
there to find such a mistake is shown to find it.

A program says what it holds in lines that begin with TEST(name), EACH_FORMAT(name) or EACH_RING(name), and runs one
test of them: ``program NAME [NUMBER]`` (tests/c/check.h).
"""

import fcntl
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from ring import sources

_WARNINGS = ("-Wall", "-Wextra", "-Wconversion", "-Werror")
_COMMON = ("-std=gnu11", "-g", "-pthread", "-fno-strict-aliasing", *_WARNINGS)
_SANITIZED = ("-O1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all")
_FAULT_FOUND = 66
# What a sanitizer reports, it also fails for: leave no report unread.
_ENVIRONMENT = {
    "ASAN_OPTIONS": f"exitcode={_FAULT_FOUND}:detect_leaks=1:strict_string_checks=1:detect_stack_use_after_return=1",
    "UBSAN_OPTIONS": f"exitcode={_FAULT_FOUND}:print_stacktrace=1",
    "TSAN_OPTIONS": f"exitcode={_FAULT_FOUND}:halt_on_error=1:second_deadlock_stack=1",
}

# The macros of tests/c that make tests, and what each appends to the name.
_FORMATS = ("_split", "_packed")
_MAKES = {"TEST": ("",), "EACH_FORMAT": _FORMATS, "EACH_RING": (*_FORMATS, "_split_in_order", "_packed_in_order")}


@dataclass(frozen=True)
class Flavour:
    """A compiler and what it sanitizes ('': nothing, but the optimizations of the product)."""

    name: str
    compiler: str
    sanitizers: str

    @property
    def options(self) -> list[str]:
        """For compiling and linking."""
        sanitized = [*_SANITIZED, f"-fsanitize={self.sanitizers}"]
        return [self.compiler, *_COMMON, *(sanitized if self.sanitizers else ["-O2"])]


GCC = Flavour("gcc", "gcc", "address,undefined")
CLANG = Flavour("clang", "clang", "address,undefined")
THREADS = Flavour("gcc_threads", "gcc", "thread")
FAST = Flavour("gcc_fast", "gcc", "")
FUZZER = Flavour("clang_fuzzer", "clang", "fuzzer,address,undefined")
# The least that each of them makes a program of, and what ends it at once.
_TRIAL = "int main(void) { return 0; }"
_TRIAL_FUZZER = "int LLVMFuzzerTestOneInput(const void *data, unsigned long size) { return (void)data, (void)size, 0; }"


@dataclass(frozen=True)
class Fault:
    """In ``file`` below ring/, inside ``function``: the text that stands there once, and what takes its place."""

    file: str
    function: str
    healthy: str
    faulty: str

    def applied_to(self, text: str) -> str:
        """The text of the file with the mistake in it. Raises ValueError if the healthy text is not there once."""
        body = re.search(rf"^\w[^\n]*\b{self.function}\([^;{{]*\)\n\{{.*?^\}}", text, re.M | re.S)
        if not body or body[0].count(self.healthy) != 1:
            raise ValueError(f"{self.healthy!r} is not once in {self.function} of {self.file}: this fault is outdated")
        return text[:body.start()] + body[0].replace(self.healthy, self.faulty) + text[body.end():]


def names_in(program: Path) -> list[str]:
    """The tests that the source file ``program`` holds."""
    made = re.findall(rf"^({'|'.join(_MAKES)})\((\w+)\)", program.read_text(), re.M)
    return [name + suffix for macro, name in made for suffix in _MAKES[macro]]


def found_fault(done: subprocess.CompletedProcess[str]) -> bool:
    """Did a sanitizer end this program, rather than a check of its own?"""
    return done.returncode == _FAULT_FOUND


class Builder:
    """Builds programs of ``programs``, a folder beside ring/, in ``folder``: each source once a flavour and fault.
    The folders ``included`` hold what these programs include beside ring/ and their own. Several processes may share
    a folder; what the others have built there is not built again, so they must see the same sources.

    Where a compiler or a sanitizer's library is missing, the test that asks is skipped and told which; where
    something does not compile, the test fails.
    """

    def __init__(self, programs: Path, ring: Path, folder: Path, included: tuple[Path, ...] = ()) -> None:
        self._programs = programs
        self._included = included
        self._ring = ring
        self._folder = folder
        self._made: dict[tuple[Flavour, str, Fault | None], Path] = {}
        self._objects: dict[tuple[Flavour, Fault | None], list[Path]] = {}
        self._trees: dict[Fault | None, tuple[Path, Path]] = {None: (programs, ring)}
        self._unusable: dict[Flavour, str] = {}

    def program(self, flavour: Flavour, name: str, fault: Fault | None = None) -> Path:
        """The program ``name``.c, built."""
        if flavour not in self._unusable:
            with tempfile.TemporaryDirectory(dir=self._folder) as folder:
                self._unusable[flavour] = _why_unusable(flavour, Path(folder))
        if self._unusable[flavour]:
            pytest.skip(self._unusable[flavour])
        key = (flavour, name, fault)
        if key not in self._made:
            programs, _ = self._tree(fault)
            source = programs / f"{name}.c"
            # A program may include a unit whole, to reach what is static in it.
            included = {Path(path).stem for path in re.findall(r'^#include "(.*[.]c)"', source.read_text(), re.M)}
            objects = [path for path in self._core(flavour, fault) if path.stem not in included]
            target = (programs if fault else self._folder) / f"{flavour.name}-{name}"
            self._compile(flavour, target, source, *objects)
            self._made[key] = target
        return self._made[key]

    def run(self, flavour: Flavour, program: str, name: str, *arguments: object, fault: Fault | None = None,
            seconds: float = 100) -> subprocess.CompletedProcess[str]:
        """Run the test ``name`` of a program; of a fuzzer ``name`` is its first argument. Raises TimeoutExpired."""
        built = self.program(flavour, program, fault)
        return subprocess.run([*_launcher(flavour), str(built), name, *map(str, arguments)], capture_output=True,
                              text=True, timeout=seconds, env=os.environ | _ENVIRONMENT, check=False)

    def _tree(self, fault: Fault | None) -> tuple[Path, Path]:
        """(programs, ring) as this fault leaves them."""
        if fault not in self._trees:
            faulty = fault.applied_to((self._ring / fault.file).read_text())
            root = Path(tempfile.mkdtemp(prefix="fault-", dir=self._folder))
            for copied in (self._programs, *self._included):
                shutil.copytree(copied, root / copied.relative_to(self._ring.parent))
            programs = root / self._programs.relative_to(self._ring.parent)
            ring = shutil.copytree(self._ring, root / "ring",
                                   ignore=shutil.ignore_patterns("*.py", "*.so", "__pycache__"))
            (ring / fault.file).write_text(faulty)
            self._trees[fault] = (programs, ring)
        return self._trees[fault]

    def _core(self, flavour: Flavour, fault: Fault | None) -> list[Path]:
        if (flavour, fault) not in self._objects:
            programs, ring = self._tree(fault)
            objects = (programs if fault else self._folder) / f"{flavour.name}-objects"
            objects.mkdir(exist_ok=True)
            files = [*sources.compiled(ring), *sources.driver_compiled(ring)]
            made = [objects / f"{file.stem}.o" for file in files]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(lambda file, target: self._compile(flavour, target, "-c", file), files, made))
            self._objects[flavour, fault] = made
        return self._objects[flavour, fault]

    @staticmethod
    def _compile(flavour: Flavour, target: Path, *arguments: object) -> None:
        with open(f"{target}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if target.exists():
                return
            fresh = f"{target}.fresh"
            command = [*flavour.options, *map(str, arguments), "-o", fresh]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            if done.returncode:
                pytest.fail(f"{' '.join(command)}\n{done.stderr}", pytrace=False)
            os.rename(fresh, target)


def _why_unusable(flavour: Flavour, folder: Path) -> str:
    """'' if this compiler makes programs with these sanitizers that run here, else what is missing."""
    if not shutil.which(flavour.compiler):
        return f"no {flavour.compiler} on this machine: apt install {flavour.compiler}"
    trial = folder / f"{flavour.name}-trial"
    source, arguments = (_TRIAL_FUZZER, ["-runs=1"]) if "fuzzer" in flavour.sanitizers else (_TRIAL, [])
    built = subprocess.run([*flavour.options, "-xc", "-", "-o", str(trial)], input=source,
                           capture_output=True, text=True, check=False)
    if built.returncode:
        return f"{flavour.compiler} lacks the runtime of -fsanitize={flavour.sanitizers} (Debian: libclang-rt-dev)"
    ran = subprocess.run([*_launcher(flavour), str(trial), *arguments], capture_output=True, text=True, timeout=60,
                         check=False)
    if ran.returncode:
        return f"-fsanitize={flavour.sanitizers} does not run here: {ran.stderr.strip().splitlines()[-1:]}"
    return ""


def _launcher(flavour: Flavour) -> list[str]:
    """ThreadSanitizer's fixed map of memory does not stand much randomness of addresses."""
    return ["setarch", "-R"] if flavour == THREADS and shutil.which("setarch") else []
