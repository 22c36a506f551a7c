"""vdev/daemon.py: the whole program as a child process, with front-ends that are Python or nobody."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ring.driver_parts import RingFull
from vdev.config import DeviceConfig
from vdev.daemon import fitted
from vdev.errors import Failure
from vdev.listen import peer_pid
from vdev.ports.base import VNET_HEADER, Carries, Port
from vdev.testing.daemon import VISIBLE, as_plain_user
from vdev.testing.netns import Namespace, why_no_tap
from vdev.testing.scripted import ScriptedGuest
from vhost_user.frontend import FrontEnd

PROGRAM = [sys.executable, "-m", "vdev"]
FRAME = bytes.fromhex("ffffffffffff 525400123456 88b5") + bytes(range(50))

END_SECONDS = 1.0  # VU-PROG-B-06 with the figure of the project
START_SECONDS = 20.0  # on a busy machine


class Started:
    """A daemon with stdout and stderr apart."""

    def __init__(self, *arguments, prefix=(), tmp_path, pass_fds=(), env=None, stderr=None, ready=True):
        self.out = tmp_path / "stdout"
        self.err = tmp_path / "stderr"
        reading, writing = os.pipe()
        words = [*prefix, *PROGRAM, *arguments, *(["--ready-fd", str(writing)] if ready else [])]
        with self.out.open("w") as out, self.err.open("a") as err:
            self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=stderr or err,
                                            pass_fds=[*pass_fds, writing], env=env)
        os.close(writing)
        self.ready = b""
        with open(reading, "rb") as pipe:
            if ready:
                self.ready = pipe.read()  # to its end: READY, and closed

    def log(self):
        return self.err.read_text()

    def events(self, name=None):
        lines = [json.loads(line) for line in self.log().splitlines()]
        return [line for line in lines if name in (None, line["event"])]

    def wait(self, seconds=START_SECONDS):
        return self.process.wait(seconds)

    def until(self, condition):
        deadline = time.monotonic() + START_SECONDS
        while not condition():
            assert time.monotonic() < deadline, self.log()
            assert self.process.poll() is None, self.log()
            time.sleep(0.005)

    def end(self, number=signal.SIGTERM, seconds=START_SECONDS):
        self.process.send_signal(number)
        return self.process.wait(seconds)

    def open_fds(self):
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


@pytest.fixture
def start(tmp_path):
    started = []

    def start(*arguments, **options):
        daemon = Started(*arguments, tmp_path=tmp_path, **options)
        started.append(daemon)
        return daemon

    yield start
    for daemon in started:
        if daemon.process.poll() is None:
            daemon.process.kill()
            daemon.process.wait()
        assert "Traceback" not in daemon.log()


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "vm.sock")


# ------------------------------------------------------------------------------------- readiness


def test_ready_is_told_once_everything_can_be_used(start, path):
    daemon = start("--socket-path", path, "--port", "null:")
    assert daemon.ready == b"READY\n"
    assert daemon.out.read_text() == f"ready socket={path}\n"
    with FrontEnd.connect(path) as front_end:
        assert front_end.get_features()
    assert daemon.end() == 0
    assert daemon.out.read_text() == f"ready socket={path}\n"
    assert not os.path.exists(path)


def test_front_end_that_connects_while_code_is_loaded_is_served(start, path):
    """The socket is there before all that serves it, and whoever finds it there can go ahead."""
    daemon = start("--socket-path", path, "--port", "null:", ready=False)
    daemon.until(lambda: os.path.exists(path))
    with FrontEnd.connect(path, timeout=START_SECONDS) as front_end:
        assert front_end.get_features()
    assert daemon.end() == 0


def test_code_that_is_missing_ends_the_start_and_leaves_nothing(path):
    # None in sys.modules is how an import fails; whether the socket was to be seen by then makes no difference.
    script = "import sys; sys.modules['ring._core'] = None; from vdev.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", script, "--socket-path", path, "--port", "null:"], text=True,
                          capture_output=True, timeout=START_SECONDS)
    assert (done.returncode, done.stdout) == (1, "")
    (said,) = done.stderr.splitlines()
    assert said.startswith("vdev: vdev is not complete here: the C extension ring._core is not built here"), said
    assert not os.path.exists(path)


def test_service_manager_is_told(start, path, tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(START_SECONDS)
        daemon = start("--socket-path", path, "--port", "null:",
                       env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")})
        assert manager.recv(100) == b"READY=1"
        assert daemon.end() == 0
        assert manager.recv(100) == b"STOPPING=1"


def test_service_manager_that_is_gone_is_survived(start, path, tmp_path):
    daemon = start("--socket-path", path, "--port", "null:",
                   env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "nobody")})
    assert daemon.ready == b"READY\n"
    daemon.until(lambda: "cannot tell the service manager READY=1: No such file" in daemon.log())
    assert daemon.end() == 0


def test_socket_of_the_service_manager(start, path):
    # What systemd does between fork and exec: the socket becomes 3, LISTEN_PID the process's own.
    manager = [sys.executable, "-c", "import os, sys; os.dup2(int(sys.argv[1]), 3); "
               "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1'); "
               "os.execv(sys.argv[2], sys.argv[2:])"]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        fd = listener.fileno()
        daemon = start("--port", "null:", prefix=[*manager, str(fd)], pass_fds=[fd])
    assert daemon.out.read_text() == "ready fd=3\n"
    with FrontEnd.connect(path) as front_end:
        assert front_end.get_features()
    assert daemon.end() == 0
    assert os.path.exists(path)  # not ours


# ------------------------------------------------------------------- traffic, and front-ends that come and go


def test_frames_go_round_and_are_counted(start, path):
    daemon = start("--socket-path", path, "--port", "loopback:", "--log-format", "json")
    with ScriptedGuest.connect(path) as guest:
        for _ in range(3):
            assert guest.exchange(FRAME) == FRAME
    daemon.until(lambda: daemon.events("session-end"))
    (connect,), (driver,), (end,) = map(daemon.events, ("connect", "driver", "session-end"))
    assert connect["peer_pid"] == end["peer_pid"] == os.getpid()
    assert "MRG_RXBUF" in driver["features"]
    for flow in ("from_guest", "to_guest"):
        assert (end[flow]["frames"], end[flow]["bytes"], end[flow]["dropped"]) == (3, 3 * len(FRAME), {})
    assert end["level"] == "info"


def test_front_end_leaves_and_comes_back(start, path):
    daemon = start("--socket-path", path, "--port", "loopback:", "--log-format", "json")
    for _ in range(3):
        with ScriptedGuest.connect(path) as guest:
            assert guest.exchange(FRAME) == FRAME
    daemon.until(lambda: len(daemon.events("session-end")) == 3)
    assert [end["from_guest"]["frames"] for end in daemon.events("session-end")] == [1, 1, 1]


def test_several_devices_serve_apart(start, tmp_path):
    paths = [str(tmp_path / name) for name in ("a.sock", "b.sock")]
    daemon = start("--log-format", "json", *(word for path in paths
                                             for word in ("--device", f"socket={path},port=loopback:")))
    assert daemon.out.read_text() == f"ready socket={paths[0]} socket={paths[1]}\n"
    with ScriptedGuest.connect(paths[0]) as first, ScriptedGuest.connect(paths[1]) as second:
        assert first.exchange(FRAME + b"a") == FRAME + b"a"
        second.front_end.send_raw(b"\xff" * 12)
        assert second.front_end.closed()
        assert first.exchange(FRAME + b"b") == FRAME + b"b"
    daemon.until(lambda: len(daemon.events("session-end")) == 2)
    assert {end["device"]: end["level"] for end in daemon.events("session-end")} == {
        "net0": "info", "net1": "warning"}
    assert daemon.end() == 0
    assert not any(map(os.path.exists, paths))


def test_one_off(start, path):
    daemon = start("--socket-path", path, "--port", "loopback:", "--one-off")
    with ScriptedGuest.connect(path) as guest:
        assert guest.exchange(FRAME) == FRAME
    assert daemon.wait() == 0
    assert not os.path.exists(path)


def test_inherited_connection(start):
    ours, theirs = socket.socketpair()
    with theirs:
        daemon = start("--fd", str(theirs.fileno()), "--port", "loopback:", pass_fds=[theirs.fileno()])
        assert daemon.out.read_text() == f"ready fd={theirs.fileno()}\n"
    with ScriptedGuest(ours) as guest:
        assert guest.exchange(FRAME) == FRAME
    assert daemon.wait() == 0


def test_inherited_listener(start, path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        daemon = start("--fd", str(listener.fileno()), "--port", "loopback:", pass_fds=[listener.fileno()])
    for _ in range(2):
        with ScriptedGuest.connect(path) as guest:
            assert guest.exchange(FRAME) == FRAME
    assert daemon.end() == 0
    assert os.path.exists(path)


def test_client_connects_when_the_front_end_comes(start, path):
    daemon = start("--socket-path", path, "--client", "--port", "loopback:", "--log-format", "json")
    for _ in range(2):
        with socket.socket(socket.AF_UNIX) as front_end:
            front_end.settimeout(START_SECONDS)
            front_end.bind(path)
            front_end.listen()
            connection, _ = front_end.accept()
            os.unlink(path)
        with ScriptedGuest(connection) as guest:
            assert guest.exchange(FRAME) == FRAME
    assert daemon.events("connect-waiting")
    assert daemon.end() == 0


def test_nothing_but_an_inherited_socket_serves_with_the_responder_where_no_tap_may_be_made(start):
    ours, theirs = socket.socketpair()
    with theirs:
        daemon = start("--fd", str(theirs.fileno()), pass_fds=[theirs.fileno()], prefix=as_plain_user([]))
    with ScriptedGuest(ours) as guest:
        arp = (bytes.fromhex("ffffffffffff 525400123456 0806 0001 0800 06 04 0001 525400123456 0a004c02 "
                             "000000000000 0a004c01"))
        assert guest.front_end.get_queue_num() == 1
        reply = guest.exchange(arp)
        assert reply[:6] == arp[6:12]
        assert reply[20:22] == b"\0\2"
    assert daemon.wait() == 0
    assert "no --port given and no TAP to be had" in daemon.log()


def test_nothing_but_an_inherited_socket_serves_with_a_new_tap_where_one_may_be_made(start):
    if reason := why_no_tap():
        pytest.skip(reason)
    ours, theirs = socket.socketpair()
    with theirs, Namespace() as namespace:
        daemon = start("--fd", str(theirs.fileno()), pass_fds=[theirs.fileno()], prefix=namespace.command([]))
        with ScriptedGuest(ours, queue_pairs=8) as guest:
            assert guest.front_end.get_queue_num() == 8
            guest.driver.transmit(FRAME)
            assert guest.driver.reclaim_all(5)
        assert daemon.wait() == 0
    assert "no --port given: made tap:vdev0" in daemon.log()


def test_F41_many_sessions_leave_nothing(start, path):
    daemon = start("--socket-path", path, "--port", "loopback:", "-q", *VISIBLE)

    def cycle():
        with ScriptedGuest.connect(path) as guest:
            assert guest.exchange(FRAME) == FRAME

    def settled():
        FrontEnd.connect(path).close()
        with FrontEnd.connect(path) as front_end:
            front_end.get_features()
            maps = Path(f"/proc/{daemon.process.pid}/maps").read_text().count("memfd")
            threads = len(os.listdir(f"/proc/{daemon.process.pid}/task"))
            return daemon.open_fds(), maps, threads

    cycle()
    before = settled()
    for _ in range(50):
        cycle()
    assert settled() == before


def test_P25_flood_of_bad_connections_writes_few_lines(start, path):
    daemon = start("--socket-path", path, "--port", "null:", "--log-format", "json")
    for _ in range(500):
        with FrontEnd.connect(path) as front_end:
            front_end.send_raw(b"\xff" * 12)
            assert front_end.closed()
    with FrontEnd.connect(path) as front_end:
        assert front_end.get_features()
    assert len(daemon.events("session-end")) < 100


# ------------------------------------------------------------------------------------- start


def test_F11_second_instance_is_refused_naming_the_first(start, path):
    first = start("--socket-path", path, "--port", "null:")
    second = start("--socket-path", path, "--port", "null:", ready=False)
    assert second.wait() == 1
    assert second.log() == (f"vdev: {path} is in use: process {first.process.pid} listens there; stop it or "
                            "choose another --socket-path\n")
    with FrontEnd.connect(path) as front_end:
        assert front_end.get_features()


def test_F11_socket_of_a_killed_instance_is_replaced_and_told(start, path):
    first = start("--socket-path", path, "--port", "null:")
    first.process.kill()
    first.process.wait()
    assert os.path.exists(path)
    second = start("--socket-path", path, "--port", "null:")
    assert f"net0: {path}: replaced a socket whose owner is gone" in second.log()
    with FrontEnd.connect(path) as front_end:
        assert front_end.get_features()


def test_failed_start_leaves_nothing(start, path, tmp_path):
    """The second device cannot be: the first is given up, too, and nobody ever saw its socket."""
    daemon = start("--device", f"socket={path},port=null:", "--device", f"socket={tmp_path}/none/b,port=null:",
                   ready=False)
    assert daemon.wait() == 1
    assert daemon.log() == (f"vdev: {tmp_path}/none/b: the directory {tmp_path}/none does not exist; create it: "
                            f"mkdir -p {tmp_path}/none\n")
    assert not os.path.exists(path)
    assert sorted(os.listdir(tmp_path)) == ["stderr", "stdout"]


@pytest.mark.parametrize("options, line", [
    (["--port", "tap:fd=999"], "999"),
    (["--port", "null:", "--features", "+mq"], "--features: mq cannot be offered: null: with 1 queue pairs"),
    (["--port", "null:", "--features", "+host_tso4,-csum"], "--features: host_tso4 cannot be offered"),
    (["--port", "null:", "--ready-fd", "999"], "--ready-fd 999: descriptor 999 is not open"),
    (["--port", "null:", "--socket-group", "nosuchgroup"], "--socket-group nosuchgroup: there is no such group"),
])
def test_start_that_fails_is_one_line_and_status_1(start, path, options, line):
    daemon = start("--socket-path", path, *options, ready=False)
    assert daemon.wait() == 1
    (said,) = daemon.log().splitlines()
    assert said.startswith("vdev: ")
    assert line in said
    assert not os.path.exists(path)


def test_port_that_carries_fewer_queue_pairs_than_asked_for():
    class SingleQueue(Port):
        carries = Carries(header=VNET_HEADER, offloads=0, queue_pairs=1)

        def __str__(self):
            return "tap:old0"

    config = DeviceConfig("net0", fd=3, queue_pairs=4)
    with pytest.raises(Failure, match="tap:old0 carries 1 queue pairs, not 4; give --queue-pairs 1"):
        fitted(config, SingleQueue())
    assert fitted(replace(config, queue_pairs=None), SingleQueue()).queue_pairs == 1


def test_tap_without_the_right_to_make_one_names_the_ways_out(start, path):
    daemon = start("--socket-path", path, "--port", "tap:vdevtest0", prefix=as_plain_user([]), ready=False)
    assert daemon.wait() == 1
    (said,) = daemon.log().splitlines()
    assert said.startswith("vdev: ")
    assert "responder" in said


# ------------------------------------------------------------------------------------------ end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_F31_signal_under_traffic_ends_it_clean(start, path, number):
    daemon = start("--socket-path", path, "--port", "loopback:", "--log-format", "json")
    with ScriptedGuest.connect(path) as guest:
        ended = threading.Event()

        def flood():
            while not ended.is_set():
                with contextlib.suppress(RingFull):
                    guest.driver.transmit(FRAME)
                guest.driver.reclaim()
                guest.driver.receive()

        assert guest.exchange(FRAME) == FRAME
        thread = threading.Thread(target=flood)
        thread.start()
        try:
            time.sleep(0.05)
            assert daemon.end(number, END_SECONDS) == 0
        finally:
            ended.set()
            thread.join()
        assert guest.front_end.closed()
    assert not os.path.exists(path)
    (end,) = daemon.events("session-end")
    assert end["reason"] == "vdev is ending"
    assert end["from_guest"]["frames"] > 1
    assert daemon.events("ending")[0]["reason"] == number.name


@pytest.mark.parametrize("gap", [0.0, 0.002, 0.01, 0.03])
def test_F31_double_signal(start, path, gap):
    daemon = start("--socket-path", path, "--port", "null:")
    for _ in range(20):
        daemon.process.send_signal(signal.SIGTERM)
        if daemon.process.poll() is not None:
            break
        time.sleep(gap)
    assert daemon.wait() == 0


def test_F31_path_taken_over_is_not_removed(start, path):
    daemon = start("--socket-path", path, "--port", "null:")
    os.unlink(path)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(path)
        assert daemon.end() == 0
        assert os.path.exists(path)


BROKEN_DEVICES = """
import os, signal, sys
from vdev import logs
from vdev.config import DaemonConfig, DeviceConfig
from vdev.daemon import Daemon
from vdev.device import Device
from vdev.ports.spec import NullSpec

def close(self, close=Device.close):
    close(self)
    raise RuntimeError("cannot let go")

Device.close = close
logs.setup("info", "text")
devices = tuple(DeviceConfig(os.path.basename(path), socket_path=path, port=NullSpec()) for path in sys.argv[1:])
daemon = Daemon(DaemonConfig(devices, sandbox=False))
signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
signal.setitimer(signal.ITIMER_REAL, 0.2)
daemon.run()
"""


def test_F38_device_that_cannot_be_closed_does_not_keep_the_others_from_it(tmp_path):
    paths = [str(tmp_path / name) for name in ("a", "b")]
    done = subprocess.run([sys.executable, "-c", BROKEN_DEVICES, *paths], capture_output=True, text=True, timeout=60,
                          check=False)
    assert done.returncode == 0
    assert done.stdout == f"ready socket={paths[0]} socket={paths[1]}\n"
    assert done.stderr.count("internal error while closing a device: RuntimeError: cannot let go") == 2
    assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == []


def test_F32_other_signals_are_ignored(start, path):
    daemon = start("--socket-path", path, "--port", "loopback:")
    with ScriptedGuest.connect(path) as guest:
        for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE, signal.SIGCHLD):
            daemon.process.send_signal(number)
            assert guest.exchange(FRAME) == FRAME
    assert daemon.end() == 0


def test_never_daemonises(start, path):
    """VU-PROG-B-04: the process that was started is the one that serves."""
    daemon = start("--socket-path", path, "--port", "null:")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        assert peer_pid(sock) == daemon.process.pid


# ------------------------------------------------------------------------------------------ log


def test_F34_log_that_nobody_reads_does_not_stop_the_guest(start, path):
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    try:
        while True:
            os.write(writing, b"x" * 4096)
    except BlockingIOError:
        pass
    os.set_blocking(writing, True)
    daemon = start("--socket-path", path, "--port", "loopback:", "-v", stderr=writing)
    for _ in range(3):
        with ScriptedGuest.connect(path) as guest:
            assert guest.exchange(FRAME) == FRAME
    assert daemon.end() == 0
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_F34_closed_standard_streams(start, path, closed):
    daemon = start("--socket-path", path, "--port", "loopback:", "-v",
                   prefix=["sh", "-c", f'exec "$@" {closed}', "sh"])
    assert daemon.ready == b"READY\n"
    with ScriptedGuest.connect(path) as guest:
        assert guest.exchange(FRAME) == FRAME
    assert daemon.end() == 0


def test_standard_streams_on_dev_null(start, path):
    """VU-PROG-B-05."""
    daemon = start("--socket-path", path, "--port", "null:", stderr=subprocess.DEVNULL,
                   prefix=["sh", "-c", 'exec "$@" >/dev/null', "sh"])
    assert daemon.ready == b"READY\n"
    assert daemon.end() == 0
