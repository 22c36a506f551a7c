"""vdev/cli.py and vdev/descriptor.py: the command as people and programs call it."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from vdev import cli, descriptor, verbs
from vdev.errors import Failure
from vdev.run_options import join_features

PROGRAM = [sys.executable, "-m", "vdev"]


def vdev(*arguments, **options) -> subprocess.CompletedProcess:
    return subprocess.run([*PROGRAM, *arguments], capture_output=True, text=True, timeout=60, check=False,
                          stdin=subprocess.DEVNULL, **options)


def call(capfd, *arguments) -> tuple[int, str, str]:
    """Run the command in this process: (status, stdout, stderr)."""
    status = cli.main(list(arguments))
    captured = capfd.readouterr()
    return status, captured.out, captured.err


# --------------------------------------------------------------------------- --print-capabilities


@pytest.mark.parametrize("others", [
    [], ["--socket-path"], ["--socket-path", "x.sock", "--fd", "nonsense"], ["--frobnicate", "--port", "tap:"],
    ["run"], ["nosuchverb"]])
def test_print_capabilities_ignores_everything_else(others, tmp_path):
    """VU-PROG-B-10, -11, -12; VU-JSON-B-01."""
    for arguments in ([*others, "--print-capabilities"], ["--print-capabilities", *others]):
        done = vdev(*arguments, cwd=tmp_path)
        assert done.returncode == 0
        assert json.loads(done.stdout) == {"type": "net"}
        assert done.stderr == ""
    assert os.listdir(tmp_path) == []


def test_print_capabilities_brings_in_next_to_nothing():
    """What is imported is what it costs; and nothing may be needed that a host could lack."""
    program = ("import sys; before = set(sys.modules); from vdev.cli import main; main(['--print-capabilities']); "
               "print(' '.join(sorted(set(sys.modules) - before)), file=sys.stderr)")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.split() == ["vdev", "vdev.cli"]
    assert json.loads(done.stdout) == {"type": "net"}


def test_print_capabilities_opens_no_device(tmp_path):
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    trace = tmp_path / "trace"
    done = subprocess.run(["strace", "-f", "-e", "trace=open,openat", "-o", trace, *PROGRAM,
                           "--print-capabilities"], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        pytest.skip(f"strace cannot trace here: {done.stderr.strip()}")
    assert "/dev/net/tun" not in trace.read_text()


# ------------------------------------------------------------------------------ help and version


@pytest.mark.parametrize("verb", ["", *verbs.VERBS])
def test_every_verb_has_help_with_an_example(verb, capfd):
    with pytest.raises(SystemExit) as ended:
        cli.main([*verb.split(), "--help"])
    text = capfd.readouterr().out
    assert ended.value.code == 0
    assert text.startswith(f"usage: vdev {verb}".strip())
    assert re.search(r"examples?:\n  .*vdev", text)


def test_help_lists_the_verbs(capfd):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capfd.readouterr().out
    assert all(f"  vdev {verb} " in text for verb in verbs.VERBS)


def test_version(capfd):
    assert call(capfd, "--version") == (0, f"vdev {metadata.version('vdev')}\n", "")


# --------------------------------------------------------------------------------------- misuse


@pytest.mark.parametrize("arguments, line", [
    ([], "vdev: no socket: give --socket-path PATH or --fd N"),
    (["run"], "vdev: no socket: give --socket-path PATH or --fd N"),
    (["--socket-path", "/x", "--fd", "3"],
     "vdev: two sockets, of which only one can be: give --socket-path PATH or --fd N"),
    (["serve"], "vdev: unknown verb 'serve'; known: " + ", ".join(verbs.VERBS) + "; "
                "`vdev --help` tells more"),
    (["--frobnicate"], "vdev: unrecognized arguments: --frobnicate; `vdev --help` lists what there is"),
    (["run", "--frobnicate"], "vdev: unrecognized arguments: --frobnicate; `vdev run --help` lists what there is"),
    (["qemu-args"], "vdev: the following arguments are required: SOCKET; `vdev qemu-args --help` lists what "
                    "there is"),
    (["qemu-args", "/x", "--queue-pairs", "0"], "vdev: --queue-pairs 0: must be a number from 1 to 128"),
    (["--fd", "3", "--config", "/no/such.toml"], "vdev: --config /no/such.toml: No such file or directory"),
])
def test_misuse_is_one_line_and_status_2(capfd, arguments, line):
    assert call(capfd, *arguments) == (2, "", line + "\n")


def test_every_mistake_gets_its_line(capfd):
    status, out, err = call(capfd, "--fd", "x", "--queue-pairs", "0", "--port", "tpa:", "--features", "csum")
    assert (status, out) == (2, "")
    lines = err.splitlines()
    assert [line.split(":")[1].split()[0] for line in lines] == ["--fd", "--port", "--queue-pairs", "--features"]
    assert all(line.startswith("vdev: ") for line in lines)


def test_check_config(capfd, tmp_path):
    good, bad = tmp_path / "good.toml", tmp_path / "bad.toml"
    good.write_text('[[device]]\nsocket = "/a"\n[[device]]\nsocket = "/b"\n')
    bad.write_text('[[device]]\nsocket = "/a"\nqueue-pairs = 0\n[[device]]\nport = "null:"\n')
    assert call(capfd, "--check-config", "--config", str(good)) == (0, "no mistakes found; 2 devices\n", "")
    status, out, err = call(capfd, "--check-config", "--config", str(bad))
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 2
    assert not os.path.exists("/a")


def test_join_features():
    assert join_features(["--features", "-mq", "-v"]) == ["--features=-mq", "-v"]
    assert join_features(["--features"]) == ["--features"]
    assert join_features(["--features=+mq", "--fd", "3"]) == ["--features=+mq", "--fd", "3"]


def test_path_that_is_no_text_is_printed_as_it_is(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff.sock"
    done = subprocess.run([*PROGRAM, "qemu-args", path, "--qemu", fake_qemu(tmp_path)], capture_output=True,
                          timeout=60, check=True)
    assert b"path=" + path in done.stdout


def test_reader_that_leaves_early_is_no_traceback():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*PROGRAM, "capabilities"], stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60,
                          check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_message_with_stderr_closed_goes_nowhere():
    done = subprocess.run(["sh", "-c", 'exec "$@" 2>&-', "sh", *PROGRAM, "--fd", "x"], stdout=subprocess.PIPE,
                          text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")


# -------------------------------------------------------------------------------- verbs that print


def test_capabilities_as_json_and_text(capfd):
    status, out, _ = call(capfd, "capabilities", "--json")
    found = json.loads(out)
    assert status == 0
    assert found["type"] == "net"
    assert {"MRG_RXBUF", "EVENT_IDX", "VERSION_1", "MQ", "HOST_USO"} <= set(found["features"])
    assert {"REPLY_ACK", "STATUS", "CONFIGURE_MEM_SLOTS"} <= set(found["protocol_features"])
    assert set(found["ports"]) == {"tap", "switch", "responder", "loopback", "null"}
    assert "RING_PACKED" in found["features"] and found["rings"] == ["split", "packed"]
    _, text, _ = call(capfd, "capabilities")
    assert "max queue pairs: 128\n" in text


def fake_qemu(tmp_path) -> str:
    program = tmp_path / "qemu-system-fake"
    program.write_text("#!/bin/sh\necho 'QEMU emulator version 10.0.2'\n")
    program.chmod(0o755)
    return str(program)


def test_qemu_args(capfd, tmp_path):
    qemu = fake_qemu(tmp_path)
    status, out, _ = call(capfd, "qemu-args", "/run/x.sock", "--qemu", qemu, "--memory", "1G", "--queue-pairs", "2",
                          "--mac", "52:54:00:00:00:07", "--json")
    words = json.loads(out)
    assert status == 0
    assert words[:2] == ["-m", "1G"]
    assert "memory-backend-memfd,id=vdev-memory,size=1G,share=on" in words
    assert any(word.startswith("socket,") and "path=/run/x.sock" in word for word in words)
    assert any("queues=2" in word for word in words)
    assert any("mac=52:54:00:00:00:07" in word for word in words)
    _, text, _ = call(capfd, "qemu-args", "/run/x.sock", "--qemu", qemu, "--memory", "1G", "--queue-pairs", "2",
                      "--mac", "52:54:00:00:00:07")
    # As the help's example uses it.
    echoed = subprocess.run(["sh", "-c", 'eval "printf \'%s\\n\' $1"', "sh", text], capture_output=True, text=True,
                            timeout=20, check=True)
    assert echoed.stdout.splitlines() == words


def test_qemu_args_packed(capfd, tmp_path):
    _, out, _ = call(capfd, "qemu-args", "/run/x.sock", "--qemu", fake_qemu(tmp_path), "--packed", "--json")
    assert json.loads(out)[-1].endswith(",packed=on")


def test_qemu_args_without_qemu(capfd, tmp_path):
    status, out, err = call(capfd, "qemu-args", "/run/x.sock", "--qemu", f"{tmp_path}/none")
    assert (status, out) == (1, "")
    assert err.startswith(f"vdev: {tmp_path}/none: no such program")


# ------------------------------------------------------------------------------ install-descriptor


@pytest.fixture
def program(tmp_path, monkeypatch):
    """An installed ``vdev`` command beside the interpreter."""
    folder = tmp_path / "bin"
    folder.mkdir()
    command = folder / "vdev"
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    monkeypatch.setattr(descriptor.sys, "executable", str(folder / "python"))
    return str(command)


def test_descriptor_obeys_the_schema(program, tmp_path, capfd):
    """VU-PROG-B-01, VU-JSON-B-02, -03, -04."""
    status, out, _ = call(capfd, "install-descriptor", "--directory", str(tmp_path / "new" / "vhost-user"))
    path = Path(out.strip())
    assert status == 0
    assert re.match(r"^[0-9]{2}-.*\.json$", path.name)
    content = json.loads(path.read_text())
    assert content == {"description": "vdev virtio-net device", "type": "net", "binary": program}
    assert os.path.isabs(content["binary"])
    assert os.access(content["binary"], os.X_OK)
    assert os.listdir(path.parent) == [path.name]
    assert stat.S_IMODE(path.stat().st_mode) & 0o444 == 0o444 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_descriptor_of_a_user(program, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for arguments in (["--user"], []):
        _, out, _ = call(capfd, "install-descriptor", *arguments)
        assert out == f"{tmp_path}/config/qemu/vhost-user/50-vdev.json\n"
    _, out, _ = call(capfd, "install-descriptor", "--json")
    assert json.loads(out) == {"path": f"{tmp_path}/config/qemu/vhost-user/50-vdev.json"}
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert descriptor.user_directory() == "/home/somebody/.config/qemu/vhost-user"


def test_descriptor_into_a_directory_that_cannot_be(program, tmp_path, capfd):
    (tmp_path / "file").touch()
    status, _, err = call(capfd, "install-descriptor", "--directory", str(tmp_path / "file"))
    assert status == 1
    assert err.startswith(f"vdev: cannot write {tmp_path}/file/50-vdev.json: ")


def test_descriptor_without_an_installed_command(tmp_path, monkeypatch):
    monkeypatch.setattr(descriptor.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Failure, match="there is no installed vdev command to point to"):
        descriptor.program()
