"""QEMU under control: vdev/testing/qemu.py, with the other end of its machine protocol played by the test."""

import json
import socket
from collections.abc import Iterator

import pytest

from vdev.testing.process import ProcessDied
from vdev.testing.qemu import Qemu, QemuProgram, Qmp, QmpError, accelerator, tap_args

GREETING = {"QMP": {"version": {}, "capabilities": []}}
EVENT = {"event": "RESUME", "timestamp": {}}


@pytest.fixture
def channel() -> Iterator[tuple[Qmp, socket.socket]]:
    """(our end, QEMU's end)."""
    ours, theirs = socket.socketpair()
    qmp = Qmp(ours)
    with theirs:
        yield qmp, theirs
    qmp.close()


def _say(end: socket.socket, *messages: dict) -> None:
    end.sendall(b"".join(json.dumps(message).encode() + b"\r\n" for message in messages))


def test_answers_are_found_among_events(channel) -> None:
    qmp, qemu = channel
    _say(qemu, GREETING, {"return": {}}, EVENT, EVENT, {"return": "running"})
    qmp.greet(1)
    assert qmp.execute("query-status") == "running"
    sent = [json.loads(line)["execute"] for line in qemu.recv(4096).splitlines()]
    assert sent == ["qmp_capabilities", "query-status"]


def test_a_refusal_is_told_in_qemus_words(channel) -> None:
    qmp, qemu = channel
    _say(qemu, {"error": {"class": "CommandNotFound", "desc": "The command nonsense has not been found"}})
    with pytest.raises(QmpError, match="^nonsense: The command nonsense has not been found$"):
        qmp.execute("nonsense")


def test_silence_is_bounded(channel) -> None:
    qmp, _ = channel
    with pytest.raises(QmpError, match="^stop: QEMU gave no answer in time$"):
        qmp.execute("stop", timeout=0.05)


def test_an_end_in_the_middle_of_an_answer_is_an_error(channel) -> None:
    qmp, qemu = channel
    qemu.sendall(b'{"return": ')
    qemu.close()
    with pytest.raises(QmpError, match="QEMU is gone"):
        qmp.execute("stop")


def test_a_qemu_that_does_not_start_is_told_with_its_words(tmp_path) -> None:
    program = tmp_path / "qemu"
    program.write_text("#!/bin/sh\necho 'qemu: no such machine' >&2\nexit 1\n")
    program.chmod(0o755)
    with pytest.raises(ProcessDied, match=r"QEMU did not start .*ended with status 1\nqemu: no such machine"):
        Qemu(QemuProgram(str(program), (7, 2)), ["-m", "64M"])


def test_emulation_unless_asked_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VDEV_ACCEL", raising=False)
    assert accelerator() == "tcg"
    monkeypatch.setenv("VDEV_ACCEL", "kvm")
    assert accelerator() == "kvm"


def test_options_of_the_builtin_device_have_the_shape_of_ours() -> None:
    options = dict(zip(*[iter(tap_args("tap7", memory="64M", queue_pairs=2, mac="52:54:00:00:00:01"))] * 2,
                       strict=True))
    assert options["-m"] == "64M"
    assert "ifname=tap7" in options["-netdev"] and "queues=2" in options["-netdev"]
    assert "vectors=6" in options["-device"] and options["-device"].endswith("mac=52:54:00:00:00:01")
