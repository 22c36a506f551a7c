"""Debian packages without root: tools/debian.py."""

import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools"
sys.path.insert(0, str(TOOLS))
try:
    import debian
finally:
    sys.path.remove(str(TOOLS))

DEB822 = """\
# the mirror
Types: deb
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/example.gpg

Types: deb
URIs: http://mirror.example/security
Suites: bookworm-security
Components: main
"""
ONE_LINE = """\
# deb http://old.example/debian bookworm main
deb-src http://mirror.example/debian bookworm main
deb [arch=amd64 signed-by=/usr/share/keyrings/example.gpg] http://mirror.example/debian bookworm main # note
"""


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty /etc/apt: sources.list and sources.list.d below the path returned."""
    (tmp_path / "sources.list.d").mkdir()
    monkeypatch.setattr(debian, "SOURCES", (tmp_path / "sources.list", tmp_path / "sources.list.d"))
    return tmp_path


def test_deb822_source_of_the_release_is_taken_over(sources: Path) -> None:
    (sources / "sources.list.d/debian.sources").write_text(DEB822)
    assert debian.sources_with("bookworm", "bookworm-backports") == (
        "Types: deb\n"
        "Uris: http://mirror.example/debian\n"
        "Suites: bookworm bookworm-backports\n"
        "Components: main\n"
        "Signed-By: /usr/share/keyrings/example.gpg\n")


@pytest.mark.parametrize("file", ["sources.list", "sources.list.d/debian.list"])
def test_one_line_source_of_the_release_is_taken_over(sources: Path, file: str) -> None:
    (sources / file).write_text(ONE_LINE)
    made = debian.sources_with("bookworm", "bookworm-backports")
    assert "Uris: http://mirror.example/debian\n" in made
    assert "Architectures: amd64\n" in made
    assert "Signed-By: /usr/share/keyrings/example.gpg\n" in made


def test_a_key_inside_the_source_comes_along(sources: Path) -> None:
    key = "Signed-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc\n"
    text = DEB822.replace("Signed-By: /usr/share/keyrings/example.gpg\n", key)
    (sources / "sources.list.d/debian.sources").write_text(text)
    made = debian.sources_with("bookworm", "bookworm-backports")
    assert key.replace("Signed-By:\n", "Signed-By: \n") in made


def test_disabled_sources_and_other_releases_do_not_count(sources: Path) -> None:
    disabled = DEB822.replace("Suites: bookworm bookworm-updates", "Enabled: no\nSuites: bookworm")
    (sources / "sources.list.d/debian.sources").write_text(disabled)
    with pytest.raises(debian.Unavailable, match="no apt source of this machine serves bookworm main"):
        debian.sources_with("bookworm", "bookworm-backports")


def test_what_fails_in_the_making_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), debian.under_construction(tmp_path / "thing") as work:
        (work / "part").write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_what_is_made_replaces_what_was(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with debian.under_construction(tmp_path / "thing") as work:
            (work / "part").write_text(text)
    assert [path.name for path in tmp_path.iterdir()] == ["thing"]
    assert (tmp_path / "thing/part").read_text() == "new"


def test_two_builders_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code = "import debian\nprint('ready', flush=True)\nwith debian.locked('x'): print('in')"
    with debian.locked("x"):
        other = subprocess.Popen([sys.executable, "-c", code], cwd=TOOLS, stdout=subprocess.PIPE, text=True)
        assert other.stdout.readline() == "ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(0.3)
    assert other.communicate(timeout=10)[0] == "in\n"


@pytest.mark.parametrize("tool", ["guest-image", "qemu-backport", "demo"])
def test_help_has_an_example(tool: str) -> None:
    said = subprocess.check_output([sys.executable, TOOLS / tool, "--help"], text=True)
    assert f"example: tools/{tool}" in said


def test_a_machine_without_apt_is_told_in_one_line(tmp_path: Path) -> None:
    for tool in ("guest-image", "qemu-backport"):
        done = subprocess.run([sys.executable, TOOLS / tool], capture_output=True, text=True,
                              env={"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / tool)})
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr.count("\n") == 1 and done.stderr.startswith(f"{tool}: ")
