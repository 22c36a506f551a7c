"""Where a device's journal lies."""

import os
import socket
from pathlib import Path

import pytest

from vdev.config import DeviceConfig
from vdev.journal import journal_path, open_journal
from vdev.logs import EventLog


@pytest.fixture(autouse=True)
def no_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)


def test_beside_the_socket() -> None:
    assert journal_path("/run/vdev/vm1.sock") == "/run/vdev/vm1.sock.journal"


def test_in_the_service_managers_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/run/vdev:/run/other")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/tmp")
    path = journal_path("/srv/a/vm.sock")
    assert path.startswith("/run/vdev/vm.sock.") and path.endswith(".journal")
    assert path != journal_path("/srv/b/vm.sock")
    assert path == journal_path("/srv/b/../a/vm.sock")


def test_in_the_users_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert Path(journal_path("/tmp/vm.sock")).parent == tmp_path / "vdev"
    assert (tmp_path / "vdev").stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "gone"))
    assert journal_path("/tmp/vm.sock") == "/tmp/vm.sock.journal"


@pytest.mark.parametrize("connected", [False, True])
def test_an_inherited_socket_gives_the_path_it_was_bound_to(tmp_path: Path, connected: bool) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(str(path))
        listener.listen()
        client.connect(str(path))
        given = listener.accept()[0] if connected else listener
        journal = open_journal(DeviceConfig("net0", fd=given.fileno(), queue_pairs=1), EventLog())
        assert journal.path == f"{path}.journal"
        journal.close()
        if connected:
            given.close()


def test_a_socket_without_a_path_has_none() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert open_journal(DeviceConfig("net0", fd=ours.fileno(), queue_pairs=1), EventLog()) is None


def test_where_none_can_be_made_a_line_says_what_that_means(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "s.journal"
    os.mkdir(path)
    assert open_journal(DeviceConfig("net0", socket_path=str(tmp_path / "s"), queue_pairs=1), EventLog("net0")) is None
    (record,) = caplog.records
    assert record.getMessage().startswith(f"no journal: {path}: cannot be opened: Is a directory; a guest with packed "
                                          "rings loses its network if vdev is killed")
