"""The rules of the house that a program can check: who may import whom, what a file may hold, which words
are used, and that docs/architecture.md tells of the files that are there."""

import ast
import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from cffi import FFI

from ring import reference, sources
from ring.reference.packed import Place

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "pyproject.toml").exists():
    pytest.skip("these rules hold for a source tree, and there is none here", allow_module_level=True)

PACKAGES = ("ring", "vhost_user", "vdev")
NOT_TEXT = {"LICENSE", "_core.c", "_driver.c", ".venv.lock", ".git"}  # or not ours; in a work tree .git is a file
LINES_MAX = 500

# What may be imported from where. "*" stands for any module below; a module not named here may be imported
# by everyone. The daemon's parts keep free of what is slow to import.
ONLY_FROM = {
    "cffi": {"ring.*"},
    "construct": {"vhost_user.wire"},
    "pyroute2": {"vdev.ports.link"},
    "scapy": {"vdev.testing.*"},
    "vdev.testing": {"vdev.testing.*", "vdev.demo", "vdev.conformance.*"},
    "vdev.demo": {"vdev.verbs"},
    "vdev.conformance": {"vdev.conformance.*", "vdev.verbs"},
    "ring._core": {"ring.build"},
    "ring._driver": {"ring.loadgen"},
    "asyncio": set(),
    "tools": set(),
    "tests": set(),
}
# Lazily: the daemon starts without it, and most daemons never need it.
ONLY_INSIDE_FUNCTIONS = {"pyroute2", "vdev.demo", "vdev.conformance"}
# Arrows that must not be: package -> packages it does not know.
UNKNOWN_TO = {"ring": {"vhost_user", "vdev"}, "vhost_user": {"ring", "vdev"}}


# What the conformance suite takes of vdev: nothing of the device that it may be aimed at.
CONFORMANCE_TAKES = {"vdev.conformance", "vdev.errors", "vdev.net.features", "vdev.run_options",
                     "vdev.testing.netdriver", "vdev.testing.rows", "vdev.testing.scripted"}


# ------------------------------------------------------------------------------------------------ modules


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file, of all modules of the three packages."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def parsed(name: str) -> ast.Module:
    """The syntax tree of module ``name``."""
    return ast.parse(modules()[name].read_text(), str(modules()[name]))


def imports(name: str) -> Iterator[tuple[str, bool]]:
    """(dotted name imported, whether at module level) for every import in module ``name``, lazy ones too."""
    tree = parsed(name)
    top = {id(node) for node in _module_level(tree)}
    package = name if modules()[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in top
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[:len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                # `from package import module` is an import of the module
                whole = f"{base}.{alias.name}"
                yield (whole if whole in modules() else base), id(node) in top


def _module_level(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes run when the module is imported: not those inside functions, nor under TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _module_level(node)


def is_below(name: str, top: str) -> bool:
    """``name`` is the module ``top`` or a module inside it."""
    return name == top or name.startswith(top + ".")


def matches(name: str, pattern: str) -> bool:
    """``ring.*`` means the package ring and everything below it."""
    return is_below(name, pattern[:-2]) if pattern.endswith(".*") else name == pattern


def test_arrows_run_one_way() -> None:
    wrong = []
    for name in modules():
        for imported, at_module_level in imports(name):
            if imported.partition(".")[0] in UNKNOWN_TO.get(name.partition(".")[0], ()):
                wrong.append(f"{name} imports {imported}: it knows nothing of it")
            for guarded, importers in ONLY_FROM.items():
                if is_below(imported, guarded) and not any(matches(name, importer) for importer in importers):
                    wrong.append(f"{name} imports {imported}: only {sorted(importers) or 'nobody'} may")
            for lazy in ONLY_INSIDE_FUNCTIONS:
                if at_module_level and is_below(imported, lazy) and not is_below(name, lazy):
                    wrong.append(f"{name} imports {imported} at module level: every start would pay for it")
    assert not wrong


def test_imports_only_what_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {re.match(r"[\w-]+", text)[0] for text in project["dependencies"]}
    extras = {re.match(r"[\w-]+", text)[0] for text in project["optional-dependencies"]["test"]}
    everywhere = {*PACKAGES, *sys.stdlib_module_names, *needed}
    wrong = []
    for name in modules():
        known = everywhere | extras if is_below(name, "vdev.testing") else everywhere
        wrong += [f"{name} imports {imported}, which pyproject.toml does not name"
                  for imported, _ in imports(name) if imported.partition(".")[0] not in known]
    assert not wrong


def test_daemon_reaches_no_test_part() -> None:
    reached, queue = set(), ["vdev.daemon"]
    while queue:
        name = queue.pop()
        if name in modules() and name not in reached:
            reached.add(name)
            queue += [imported for imported, _ in imports(name)]
            queue.append(name.rpartition(".")[0])
    assert "ring.build" in reached and "vhost_user.session" in reached
    forbidden = ("vdev.testing", "vdev.demo", "vhost_user.frontend", "vhost_user.handshake",
                 "ring.driver", "ring.loadgen")
    assert not [name for name in reached if any(is_below(name, part) for part in forbidden)]


def test_every_package_says_that_it_is_one() -> None:
    """Without __init__.py a directory is left out of the wheel."""
    folders = {path.parent for path in modules().values()}
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]


# ------------------------------------------------------------------------------------------- what is loaded


def loaded(trace: str) -> set[str]:
    """Module names in what ``python -X importtime`` writes."""
    return {line.rsplit("|", 1)[1].strip() for line in trace.splitlines() if line.startswith("import time:")}


def test_print_capabilities_loads_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-X", "importtime", "-m", "vdev", "--print-capabilities"],
                          capture_output=True, text=True, timeout=60, check=True)
    modules_loaded = loaded(done.stderr)
    assert "vdev.cli" in modules_loaded
    assert not {"ring._core", "_cffi_backend", "cffi", "construct", "pyroute2", "scapy", "asyncio",
                "vdev.daemon"} & modules_loaded


def test_daemon_runs_without_what_it_does_not_need(tmp_path: Path) -> None:
    ready, ready_write = os.pipe()
    command = [sys.executable, "-X", "importtime", "-m", "vdev", "--socket-path", str(tmp_path / "socket"),
               "--port", "null:", "--ready-fd", str(ready_write)]
    trace = tmp_path / "trace"
    with trace.open("w") as stderr, os.fdopen(ready, "rb") as reader:
        daemon = subprocess.Popen(command, pass_fds=[ready_write], stdout=subprocess.DEVNULL, stderr=stderr)
        os.close(ready_write)
        try:
            assert reader.read() == b"READY\n", trace.read_text()[-2000:]
        finally:
            daemon.send_signal(signal.SIGTERM)
            assert daemon.wait(20) == 0
    assert "vdev.daemon" in loaded(trace.read_text())
    assert not {"pyroute2", "scapy", "asyncio", "cffi", "pycparser"} & loaded(trace.read_text())


# What a front-end that connects does not wait for; everything below a name, too. The C core and the session's half are
# most of the program, the others are the standard library's heavy ones that most daemons never need.
AFTER_LISTENING = ("ring", "vdev.backend", "vdev.connection", "vdev.device", "vdev.engine", "vdev.sandbox",
                   "vdev.upgrade", "vhost_user.codec", "vhost_user.session", "vhost_user.state", "vhost_user.wire",
                   "_cffi_backend", "cffi", "construct", "hashlib", "tomllib", "uuid", "subprocess", "asyncio",
                   "pyroute2", "scapy", "vdev.ports.loopback", "vdev.ports.responder", "vdev.ports.switch",
                   "vdev.ports.tap")
UNTIL_LISTENING = """\
import os, sys
from vdev import listen
from vdev.cli import main

published = listen.Publication.publish
def publish(self):
    published(self).close()
    os.write(1, " ".join(sys.modules).encode())
    os._exit(0)
listen.Publication.publish = publish
main(sys.argv[1:])
"""


def test_socket_waits_for_no_code_that_only_a_session_needs(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", UNTIL_LISTENING, "--socket-path", str(tmp_path / "socket"),
                           "--port", "null:"], capture_output=True, text=True, timeout=60)
    until = done.stdout.split()
    assert {"vdev.daemon", "vdev.ports.null"} <= set(until), done.stderr
    assert not [name for name in until if any(is_below(name, late) for late in AFTER_LISTENING)]


# -------------------------------------------------------------------------------------------------- C


def c_files(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / "ring" / folder).iterdir() if path.suffix in (".c", ".h", ".inl"))


@pytest.mark.parametrize("folder", ["core", "plane"])
def test_includes(folder: str) -> None:
    """The core includes only the core; nothing in C knows Python."""
    for path in c_files(folder):
        for bracket, name in re.findall(r'^\s*#\s*include\s+([<"])([^>"]+)', path.read_text(), re.MULTILINE):
            assert name != "Python.h", f"{path} includes Python.h"
            if bracket == '"':
                room = (path.parent / name).resolve().parent.name
                assert room in ("core", folder), f"{path} includes {name}"


def test_core_knows_no_network() -> None:
    headers = re.compile(r"#\s*include\s+<(net|netinet|linux/if|linux/virtio_net|arpa)")
    assert not [path for path in c_files("core") if headers.search(path.read_text())]


def test_contracts_are_what_cffi_takes() -> None:
    ffi = FFI()
    for contract in sources.CONTRACTS:
        ffi.cdef((ROOT / "ring" / contract).read_text())


def test_load_generator_is_no_part_of_the_daemon() -> None:
    assert "driver.c" not in [path.name for path in sources.compiled(ROOT / "ring")]


# --------------------------------------------------------------------------------------------- every file


@cache
def text_files() -> list[Path]:
    """Every text file of the project but the licence."""
    found = []
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if name == ".ci" or not name.startswith(".")
                      and name not in ("build", "dist", "__pycache__") and not name.endswith(".egg-info")]
        for name in files:
            if name not in NOT_TEXT and not name.endswith((".so", ".o")):
                found.append(Path(folder, name))
    return found


def test_no_file_is_too_long() -> None:
    """Two concepts live in a file of more lines."""
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in text_files()
               if path.relative_to(ROOT).parts[0] in PACKAGES}
    assert lengths
    assert not {str(path): lines for path, lines in lengths.items() if lines > LINES_MAX}


def offenders(pattern: str, flags: int = 0) -> list[str]:
    """``file:line: text`` of every line of the project that matches."""
    expression = re.compile(pattern, flags)
    return [f"{path.relative_to(ROOT)}:{number}: {line.strip()}" for path in text_files()
            for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
            if expression.search(line)]


def test_words() -> None:
    """Front-end and back-end, allowed and refused: as the specifications call them today."""
    found = offenders(r"ma[s]ter|sl[a]ve|white[-_ ]?li[s]t|black[-_ ]?li[s]t", re.IGNORECASE)
    # The kernel's and iproute2's only word for what an interface is joined to.
    assert not [line for line in found if not re.search(r"link|bridge|IFLA_", line)]


def test_no_path_or_host_of_a_developer() -> None:
    assert not offenders(r"/(?:work|root)/\w|[.]pyenv|(?:deb|security)[.]debian[.]org|archive[.]ubuntu")


def test_directions_are_named_from_guest_and_to_guest() -> None:
    """No bare rx or tx in a name: whose receiving would it be?"""
    bare = re.compile(r"(?:^|_)(?:rx|tx)(?:_|\d|$)")
    wrong = []
    for name in modules():
        for node in ast.walk(parsed(name)):
            words = [getattr(node, field, None) for field in ("id", "arg", "name")]
            wrong += [f"{name}: {word}" for word in words if isinstance(word, str) and bare.search(word)]
    assert not wrong


def test_public_things_are_documented() -> None:
    """A module of many like functions may describe them all at once: "Every function is ..."."""
    silent = []
    for name in modules():
        tree = parsed(name)
        about = ast.get_docstring(tree) or ""
        if not about:
            silent.append(name)
        kinds = ast.ClassDef if "Every function is " in about else ast.FunctionDef | ast.ClassDef
        silent += [f"{name}.{node.name}" for node in tree.body if isinstance(node, kinds)
                   and not node.name.startswith("_") and not ast.get_docstring(node)]
    assert not silent


def test_the_conformance_suite_knows_nothing_of_the_device() -> None:
    wrong = [f"{name} imports {imported}" for name in modules() if is_below(name, "vdev.conformance")
             for imported, _ in imports(name) if is_below(imported, "vdev")
             and not any(is_below(imported, allowed) for allowed in CONFORMANCE_TAKES)]
    assert not wrong


# ------------------------------------------------------------------------------------------- architecture


def named_files(text: str) -> set[str]:
    """Paths of this project that a document names, in running text and in code blocks."""
    return {path.rstrip(".") for path in
            re.findall(r"(?<![\w/.])(?:ring|vhost_user|vdev|tools|tests|docs)/[\w./*@-]+", text)}


def test_documents_name_files_that_exist() -> None:
    documents = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
    assert len(documents) > 1
    assert not [f"{document.name}: {name}" for document in documents
                for name in named_files(document.read_text()) if not list(ROOT.glob(name.rstrip("/")))]


def test_architecture_names_every_file() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    files = [path.relative_to(ROOT) for path in text_files()]
    assert not [str(path) for path in files
                if path.parts[0] in PACKAGES and path.name != "__init__.py" and str(path) not in text]


# -------------------------------------------------------------------------------------------------- sections

# How many subsections there are below the sections of virtio 1.2 about rings. Those for legacy devices are of no
# use here: who cites one has miscounted.
SUBSECTIONS = {"2.7": 14, "2.7.4": 3, "2.7.5": 3, "2.7.5.3": 2, "2.7.6": 1, "2.7.7": 2, "2.7.8": 3, "2.7.10": 2,
               "2.7.13": 4, "2.7.13.3": 1, "2.7.13.4": 1,
               "2.8": 22, "2.8.10": 1, "2.8.21": 3, "2.8.21.1": 1, "2.8.21.3": 1}
LEGACY = {"2.7.2", "2.7.3", "2.7.4.3", "2.7.8.1"}


def test_cited_sections_about_rings_exist() -> None:
    known = {"2.7", "2.8"} | {f"{section}.{number}" for section, count in SUBSECTIONS.items()
                              for number in range(1, count + 1)} - LEGACY
    cited = re.compile(r"(?<![\w.-])2\.[78](?:\.\d+)+(?![\w-])")
    wrong = [f"{path.relative_to(ROOT)}:{number}: {section}" for path in text_files()
             if path.suffix in (".py", ".c", ".h", ".inl", ".md") and path.name != "test_house.py"
             for number, line in enumerate(path.read_text().splitlines(), 1)
             for section in cited.findall(line) if section not in known]
    assert not wrong


# ----------------------------------------------------------------------------------- the table in docs/rings.md


def steps() -> list[tuple[str, list[str], list[str]]]:
    """(verb or nothing, functions of the reference, functions in C) of each row in the table of docs/rings.md."""
    table = (ROOT / "docs/rings.md").read_text().partition("| step | what happens |")[2]
    rows = re.findall(r"^\|([^|]*)\|[^|]*\|[^|]*\|([^|]*)\|([^|]*)\|$", table, re.MULTILINE)
    return [(verb.strip(" `"), re.findall(r"`([\w.]+)`", python), re.findall(r"`(\w+)`", c))
            for verb, python, c in rows[1:]]


def test_table_of_steps_names_functions_that_exist() -> None:
    defined = set()
    for path in c_files("core"):
        defined.update(re.findall(r"^(?:static inline|INLINED) [\w ]+?\**(\w+)\(", path.read_text(), re.MULTILINE))
    classes = vars(reference) | {"Place": Place}
    for verb, python, c in steps():
        assert python and c
        for name in python:
            owner, method = name.split(".")
            assert callable(getattr(classes[owner], method)), name
            assert method in vars(classes[owner]), f"{name} is inherited"
        assert set(c) <= defined, set(c) - defined
        if verb:
            assert {f"split_{verb}", f"packed_{verb}"} == set(c)


def test_table_of_steps_has_every_verb() -> None:
    verbs = {name for name, value in vars(reference.Queue).items()
             if not name.startswith("_") and callable(value)} - {"descriptor_at", "descriptor_bytes", "conclude"}
    assert {verb for verb, _, _ in steps()} == verbs | {""}
