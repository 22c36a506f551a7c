"""vdev/systemd.py: the units as text, as systemd's own tools read them, and installed."""

import json
import shutil
import subprocess

import pytest

from vdev import systemd
from vdev.cli import main

EXPOSURE_MAX = 2.0


@pytest.fixture
def installed(tmp_path, capfd):
    assert main(["install-units", "--directory", str(tmp_path / "units"), "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == {"paths": [str(tmp_path / "units" / name) for name in systemd.NAMES]}
    return tmp_path / "units"


def test_installed_units_run_the_installed_program(installed):
    service, socket = ((installed / name).read_text() for name in systemd.NAMES)
    (start,) = [line for line in service.splitlines() if line.startswith("ExecStart=")]
    program = start.removeprefix('ExecStart="').split('"')[0]
    assert subprocess.check_output([program, "--print-capabilities"], timeout=60) == b'{"type": "net"}\n'
    assert "ListenStream=/run/vdev/%i.sock" in socket


def test_a_path_with_blanks_and_signs_of_systemd_is_quoted():
    text = systemd.text("vdev@.service", '/opt/my "100%" \\vdev')
    assert 'ExecStart="/opt/my \\"100%%\\" \\\\vdev" --port ${PORT} $OPTIONS\n' in text


def test_directory_that_cannot_be_is_one_line(tmp_path, capfd):
    (tmp_path / "file").touch()
    assert main(["install-units", "--directory", str(tmp_path / "file")]) == 1
    assert capfd.readouterr().err.startswith(f"vdev: cannot write {tmp_path}/file/vdev@.service: ")


@pytest.fixture
def analyze():
    if not shutil.which("systemd-analyze"):
        pytest.skip("no systemd-analyze on this machine: apt install systemd")

    def run(*arguments):
        done = subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, timeout=60, check=False)
        if "Unknown option" in done.stderr or "unrecognized option" in done.stderr:
            pytest.skip(f"this systemd-analyze is too old: {done.stderr.strip()}")
        return done

    return run


def test_systemd_finds_no_mistake_in_the_units(installed, analyze):
    # An instance of its own name, since a template alone is not verified.
    for name in systemd.NAMES:
        (installed / name.replace("@", "@vm1")).symlink_to(name)
    done = analyze("verify", "--man=no", str(installed / "vdev@vm1.service"))
    assert (done.returncode, done.stderr) == (0, "")


def test_exposure_is_low(installed, analyze):
    done = analyze("security", "--offline=true", "--no-pager", str(installed / "vdev@.service"))
    assert done.stderr == ""
    last = done.stdout.strip().splitlines()[-1]
    assert float(last.split(":")[-1].split()[0]) < EXPOSURE_MAX, done.stdout
