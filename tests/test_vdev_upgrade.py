"""vdev/upgrade.py and vdev/takeover.py: a daemon under traffic gives way to another, or goes on when that one fails."""

import contextlib
import fcntl
import itertools
import json
import os
import socket
import struct
import termios
import threading
from pathlib import Path

import pytest

from ring.driver_parts import RingFull
from vdev.net.features import Feature, mask
from vdev.testing.daemon import Daemon
from vdev.testing.netns import Namespace, why_no_tap
from vdev.testing.process import ProcessDied
from vdev.testing.scripted import ScriptedGuest
from vdev.testing.waiting import wait_until
from vdev.upgrade import ANSWER_SECONDS
from vdev.handover import FORMAT, Channel, HandoverError
from vhost_user.frontend import FrontEnd

SECONDS = 20.0  # on a busy machine
FRAME = bytes.fromhex("ffffffffffff 525400123456 88b5") + bytes(range(50))
PLAIN = mask(Feature.VERSION_1, Feature.MRG_RXBUF)
RINGS = {"split": PLAIN,
         "packed-in-order": PLAIN | mask(Feature.RING_PACKED, Feature.IN_ORDER, Feature.EVENT_IDX)}


class Line:
    """A daemon with --upgrade-path, and those that follow it. ``now`` is the one that serves."""

    def __init__(self, folder, options):
        self.path, self.upgrade = str(folder / "vm.sock"), str(folder / "upgrade.sock")
        self.options = ["--socket-path", self.path, *options]
        self.now = Daemon([*self.options, "--upgrade-path", self.upgrade])
        self.all = [self.now]

    def succeed(self, *options, **how):
        """The next one takes over -> it."""
        before, self.now = self.now, Daemon(["--upgrade-from", self.upgrade, *options], **how)
        self.all.append(self.now)
        assert before.child.wait(SECONDS) == 0, before.child.log()
        return self.now

    def stop(self):
        self.now.stop()
        for daemon in self.all:
            assert "Traceback" not in daemon.child.log() and '"internal error' not in daemon.child.log()

    def kill(self):
        for daemon in self.all:
            daemon.child.kill()


@pytest.fixture
def line(tmp_path):
    """Start a daemon with these options."""
    lines = []

    def start(*options):
        lines.append(Line(tmp_path, options))
        return lines[-1]

    yield start
    for started in lines:
        started.kill()


class Stream:
    """Numbered frames through a loopback for as long as the context lasts; then every one must have come, in order."""

    WINDOW = 100

    def __init__(self, guest, now):
        self._guest = guest
        self._now = now  # the daemon that serves
        self.sent = 0
        self.received = []
        self._failure = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self):
        driver = self._guest.driver
        try:
            while not self._stop.is_set() or len(self.received) < self.sent:
                before = len(self.received)
                if not self._stop.is_set() and self.sent - before < self.WINDOW:
                    with contextlib.suppress(RingFull):
                        driver.transmit(FRAME[:14] + self.sent.to_bytes(8, "big") + bytes(40))
                        self.sent += 1
                driver.reclaim()
                while (received := driver.receive()) is not None:
                    self.received.append(int.from_bytes(received.frame[14:22], "big"))
                if len(self.received) == before and not driver.receiveq.wait(0.002) and self._stop.is_set():
                    self._left -= 0.002
                    if self._left <= 0:
                        return
        except Exception as failure:
            self._failure = failure

    def advance(self, count=200):
        """Wait until so many more frames have gone round."""
        goal = len(self.received) + count
        wait_until(lambda: len(self.received) >= goal or self._failure,
                   lambda: f"stuck at {len(self.received)}; {self._now().child.log()}")

    def __enter__(self):
        self._left = SECONDS
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        assert self.received == list(range(self.sent))


@pytest.mark.parametrize("features", RINGS.values(), ids=RINGS.keys())
def test_upgrade_under_traffic_loses_and_doubles_nothing(line, features):
    running = line("--port", "loopback:")
    with ScriptedGuest.connect(running.path, features=features) as guest, Stream(guest, lambda: running.now) as stream:
        stream.advance()
        taken = running.succeed()
        stream.advance()
    (event,) = taken.events("taken-over")
    assert (event["devices"], event["sessions"]) == (1, 1)
    wait_until(lambda: taken.events("session-end"), taken.child.log)
    (end,) = taken.events("session-end")
    assert end["from_guest"]["frames"] == end["to_guest"]["frames"] == stream.sent
    assert end["from_guest"]["dropped"] == end["to_guest"]["dropped"] == {}
    assert [len(daemon.events("connect")) for daemon in running.all] == [1, 0]
    running.stop()


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("features", [PLAIN | mask(Feature.EVENT_IDX), PLAIN | mask(Feature.RING_PACKED)],
                         ids=["split", "packed"])
def test_fifty_upgrades_in_a_row_under_traffic_leave_nothing_behind(line, features):
    running = line("--port", "loopback:")
    with ScriptedGuest.connect(running.path, features=features) as guest, Stream(guest, lambda: running.now) as stream:
        seen = []
        for _ in range(50):
            running.succeed()
            stream.advance(50)
            seen.append(_held_by(running.now))
    assert seen[1:] == seen[:1] * 49
    gaps = sorted(daemon.events("taken-over")[0]["milliseconds"] for daemon in running.all[1:])
    print(f"frames stood still for {gaps[0]} to {gaps[-1]} ms, half of the times for at most {gaps[25]} ms")
    running.stop()


@pytest.mark.parametrize("features", RINGS.values(), ids=RINGS.keys())
def test_successor_may_have_other_workers(line, features):
    running = line("--port", "loopback:", "--queue-pairs", "2", "--workers", "direction")
    with ScriptedGuest.connect(running.path, features=features, queue_pairs=2) as guest, \
            Stream(guest, lambda: running.now) as stream:
        for workers in ("1", "direction", "pair", "device"):
            stream.advance(50)
            running.succeed("--workers", workers, "--poll-us", "always" if workers == "pair" else "50",
                            "--cpus", str(min(os.sched_getaffinity(0))))
        stream.advance(50)


def _held_by(daemon):
    """(descriptors, mappings of guest memory, threads) of the process. Its parent is gone from all of it."""
    proc = Path(f"/proc/{daemon.child.pid}")
    return (len(os.listdir(proc / "fd")), (proc / "maps").read_text().count("memfd"), len(os.listdir(proc / "task")))


def test_descriptors_mappings_and_threads_stay_the_same(line):
    running = line("--port", "responder")
    with ScriptedGuest.connect(running.path):
        first = _held_by(running.succeed())
        for _ in range(2):
            assert _held_by(running.succeed()) == first


# --------------------------------------------------------------------------------- what goes along


def test_paths_stay_and_go_with_the_last(line, tmp_path):
    running = line("--port", "loopback:")
    for _ in range(2):
        running.succeed()
        assert {Path(running.path), Path(running.upgrade)} <= set(tmp_path.iterdir())
        with ScriptedGuest.connect(running.path) as guest:
            assert guest.exchange(FRAME) == FRAME
    with pytest.raises(ProcessDied, match=f"in use: process {running.now.child.pid} listens there"):
        Daemon(["--socket-path", running.path, "--port", "null:"])
    running.stop()
    assert not {Path(running.path), Path(running.upgrade)} & set(tmp_path.iterdir())


def test_message_begun_with_the_old_is_completed_with_the_new(line):
    running = line("--port", "loopback:")
    call = os.eventfd(0, os.EFD_NONBLOCK)
    with ScriptedGuest.connect(running.path) as guest:
        assert guest.exchange(FRAME) == FRAME
        # SET_VRING_CALL of ring 0, its descriptor on the first of 20 bytes
        message = struct.pack("<IIIQ", 13, 1, 8, 0)
        for cut in (11, 19):
            guest.front_end.send_raw(message[:cut], [call])
            wait_until(lambda: not _unread(guest.front_end), running.now.child.log)
            running.succeed()
            guest.front_end.send_raw(message[cut:])
            # The notification that follows a new call descriptor comes on the one that was sent before.
            wait_until(lambda: _signalled(call), lambda cut=cut: f"no call for a message cut at {cut}")
        assert guest.front_end.get_features()
    os.close(call)
    running.stop()


def _unread(front_end):
    """Bytes of memory that what the back-end has not read takes (unix(7), SIOCOUTQ)."""
    return int.from_bytes(fcntl.ioctl(front_end.transport.fileno(), termios.TIOCOUTQ, bytes(4)), "little")


def _signalled(fd):
    with contextlib.suppress(BlockingIOError):
        return os.eventfd_read(fd) > 0
    return False


def test_frame_that_waits_for_buffers_goes_along(line):
    running = line("--port", "loopback:")
    with ScriptedGuest.connect(running.path, buffers=1) as guest:
        long = FRAME[:14] + bytes(range(256)) * 12
        guest.driver.transmit(long)
        assert guest.driver.reclaim_all(SECONDS)
        guest.driver.transmit(FRAME)
        assert guest.driver.reclaim_all(SECONDS)
        running.succeed()
        assert guest.driver.receive() is None
        guest.driver.fill(5)
        assert guest.driver.receive_within(SECONDS).frame == long
        assert guest.driver.receive_within(SECONDS).frame == FRAME
    running.stop()


def test_responder_knows_its_guest_afterwards(line):
    running = line("--port", "responder:10.1.2.1/24")
    with ScriptedGuest.connect(running.path) as guest:
        arp = bytes.fromhex("ffffffffffff 525400123456 0806 0001 0800 06 04 0001 525400123456 0a010202"
                            "000000000000 0a010201")
        assert guest.exchange(arp)[20:22] == b"\0\2"
        running.succeed()
        assert guest.exchange(arp)[20:22] == b"\0\2"
    running.stop()


@pytest.mark.parametrize("features", RINGS.values(), ids=RINGS.keys())
def test_successor_that_is_killed_can_be_restarted(line, features):
    """The journal was taken over and is written on: a packed ring needs it."""
    running = line("--port", "loopback:")
    with ScriptedGuest.connect(running.path, features=features) as guest:
        for _ in range(70):  # more than once around the ring
            assert guest.exchange(FRAME) == FRAME
            assert guest.driver.reclaim_all(SECONDS)
        running.succeed()
        for _ in range(3):
            assert guest.exchange(FRAME) == FRAME
            assert guest.driver.reclaim_all(SECONDS)
        running.now.child.kill()
        running.now = Daemon(running.options)
        running.all.append(running.now)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(running.path)
            guest.reconnect(socket.socket(fileno=sock.detach()))
        assert guest.exchange(FRAME) == FRAME
        taken_over = [event["ring"] for event in running.now.events("ring-taken-over")]
        assert taken_over == ([0, 1] if features >> Feature.RING_PACKED & 1 else [])
    running.stop()


def test_negotiated_state_and_positions_are_answered_by_the_new(line):
    running = line("--port", "loopback:")
    with ScriptedGuest.connect(running.path) as guest:
        for _ in range(5):
            assert guest.exchange(FRAME) == FRAME
        running.succeed()
        assert guest.exchange(FRAME) == FRAME
        assert guest.front_end.get_status() & 4
        assert guest.front_end.get_vring_base(1) == 6
    running.stop()


def test_several_devices_and_one_without_a_front_end(tmp_path):
    upgrade = str(tmp_path / "upgrade")
    paths = [str(tmp_path / name) for name in "abc"]
    options = [word for path, port in zip(paths, ("loopback:", "responder", "loopback:"), strict=True)
               for word in ("--device", f"socket={path},port={port}")]
    with contextlib.ExitStack() as cleanup:
        old = Daemon([*options, "--upgrade-path", upgrade])
        cleanup.callback(old.child.kill)
        first, last = (cleanup.enter_context(ScriptedGuest.connect(path)) for path in (paths[0], paths[2]))
        with Stream(first, lambda: old) as one, Stream(last, lambda: old) as two:
            one.advance()
            new = Daemon([*options, "--upgrade-from", upgrade])  # the same options may be given again
            cleanup.callback(new.child.kill)
            assert old.child.wait(SECONDS) == 0
            one.advance()
            two.advance()
        with FrontEnd.connect(paths[1]) as middle:
            assert middle.get_features()
        (event,) = new.events("taken-over")
        assert (event["devices"], event["sessions"]) == (3, 2)


def test_client_and_inherited_connection(tmp_path):
    upgrade = str(tmp_path / "upgrade")
    ours, theirs = socket.socketpair()
    with contextlib.ExitStack() as cleanup:
        listener = cleanup.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(tmp_path / "qemu"))
        listener.listen()
        listener.settimeout(SECONDS)
        with theirs:
            old = Daemon(["--device", f"socket={tmp_path}/qemu,client=on,port=loopback:",
                          "--device", f"fd={theirs.fileno()},port=loopback:", "--upgrade-path", upgrade],
                         pass_fds=[theirs.fileno()])
        cleanup.callback(old.child.kill)
        guests = [cleanup.enter_context(ScriptedGuest(sock)) for sock in (listener.accept()[0], ours)]
        new = Daemon(["--upgrade-from", upgrade])
        cleanup.callback(new.child.kill)
        assert old.child.wait(SECONDS) == 0
        for guest in guests:
            assert guest.exchange(FRAME) == FRAME
        guests[0].close()
        again = cleanup.enter_context(ScriptedGuest(listener.accept()[0]))
        assert again.exchange(FRAME) == FRAME
        guests[1].close()
        new.stop()


def test_tap_stays_as_it_is(tmp_path):
    if reason := why_no_tap():
        pytest.skip(reason)
    path, upgrade = str(tmp_path / "vm.sock"), str(tmp_path / "upgrade")
    with Namespace() as lan, contextlib.ExitStack() as cleanup:

        def link():
            (found,) = json.loads(lan.run(["ip", "-j", "addr", "show", "vdevup"]).stdout)
            addresses = [address["local"] for address in found["addr_info"] if address["family"] == "inet"]
            return found["ifindex"], found["operstate"], addresses

        def host_answers():
            guest.driver.transmit(arp)
            frames = iter(lambda: guest.driver.receive_within(SECONDS).frame, None)
            return any(frame[12:14] == arp[12:14] and frame[20:22] == b"\0\2" for frame in frames)

        daemon = Daemon(["--socket-path", path, "--port", "tap:vdevup,ip=10.9.0.1/24", "--upgrade-path", upgrade],
                        namespace=lan)
        cleanup.callback(daemon.child.kill)
        guest = cleanup.enter_context(ScriptedGuest.connect(path))
        arp = bytes.fromhex("ffffffffffff 525400123456 0806 0001 0800 06 04 0001 525400123456 0a090002"
                            "000000000000 0a090001")
        before = link()
        assert before[2] == ["10.9.0.1"]
        for _ in range(2):
            old, daemon = daemon, Daemon(["--upgrade-from", upgrade], namespace=lan)
            cleanup.callback(daemon.child.kill)
            assert old.child.wait(SECONDS) == 0
            assert link() == before
            assert host_answers()
        guest.close()
        daemon.stop()
        assert lan.run(["ip", "link", "show", "vdevup"], check=False).returncode


def test_service_manager_is_told_the_new_main_process(tmp_path, monkeypatch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(SECONDS)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        running = Line(tmp_path, ["--port", "null:"])
        try:
            assert manager.recv(100) == b"READY=1"
            running.succeed()
            assert {manager.recv(100), manager.recv(100)} == {b"READY=1", f"MAINPID={running.now.child.pid}".encode()}
            running.stop()
            assert manager.recv(100) == b"STOPPING=1"
        finally:
            running.kill()


# ------------------------------------------------------------------------------ what goes wrong


class Successor:
    """A process that begins to take over, played by the test."""

    def __init__(self, path):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(path)
        self.channel = Channel(self.sock)
        self.channel.budget(SECONDS)

    def hear(self, say):
        message, parcel = self.channel.expect(say)
        parcel.close()
        return message

    def up_to(self, step):
        """Behave until ``step`` was received."""
        if step != "nothing":
            self.channel.send("hello")
            self.hear("rehearsal")
        if step == "state":
            self.channel.send("prepared")
            self.hear("state")


def _fail(successor, how):
    if how == "garbage":
        successor.sock.send(struct.pack("<II", 1000, 0) + b"\xff" * 1000)
    elif how == "failed":
        successor.channel.send("failed", why="the test says so")
    elif how == "nonsense":
        successor.channel.send("please")
    else:
        successor.channel.close()


FAILURES = {"dies": "has gone", "garbage": "no message of a vdev", "failed": "the test says so",
            "nonsense": "said 'please'"}


def test_successor_that_fails_at_any_step_leaves_the_old_one_running(line):
    running = line("--port", "loopback:")
    with ScriptedGuest.connect(running.path) as guest, Stream(guest, lambda: running.now) as stream:
        before = _held_by(running.now)
        for count, (step, how) in enumerate(itertools.product(("nothing", "rehearsal", "state"), FAILURES), 1):
            successor = Successor(running.upgrade)
            successor.up_to(step)
            _fail(successor, how)
            wait_until(lambda count=count: len(running.now.events("upgrade-failed")) == count, running.now.child.log)
            said = running.now.events("upgrade-failed")[-1]["text"]
            assert FAILURES[how] in said and "going on as before" in said
            stream.advance(20)
        assert _held_by(running.now) == before
        running.succeed()
        stream.advance(20)
    running.stop()


def test_successor_that_says_nothing_while_frames_stand_still(line):
    running = line("--port", "loopback:")
    with ScriptedGuest.connect(running.path) as guest, Stream(guest, lambda: running.now) as stream:
        successor = Successor(running.upgrade)
        successor.up_to("state")
        stream.advance()  # after ANSWER_SECONDS
        (event,) = running.now.events("upgrade-failed")
        assert "does not answer in time" in event["text"]
        assert ANSWER_SECONDS <= 1
        # Too late: it cannot say so any more, and is told.
        with pytest.raises(HandoverError, match="has gone"):
            successor.channel.send("ready")
        assert successor.hear("withdrawn")
        stream.advance()
    running.stop()


def test_successor_of_another_format_is_told(line):
    running = line("--port", "null:")
    successor = Successor(running.upgrade)
    text = json.dumps({"vdev-upgrade": FORMAT + 1, "say": "hello"}).encode()
    successor.sock.send(struct.pack("<II", len(text), 0) + text)
    message, _ = successor.channel.receive()
    assert f"speaks format {FORMAT + 1} of the hand-over, this one {FORMAT}" in message["why"]
    running.stop()


def test_successor_of_another_user_is_refused(tmp_path):
    """The socket is only for its owner; should its mode be changed, the credentials of the peer still decide."""
    if os.geteuid() != 0:
        pytest.skip("only root can run a process as another user")
    running = Line(tmp_path, ["--port", "null:"])
    try:
        assert os.stat(running.upgrade).st_mode & 0o777 == 0o600
        os.chmod(running.upgrade, 0o666)
        os.chmod(tmp_path, 0o755)
        with socket.socket(socket.AF_UNIX) as sock:
            child = os.fork()
            if child == 0:
                os.chdir(tmp_path)  # the folders above are not open to others
                os.setresuid(65534, 65534, 65534)
                os._exit(sock.connect_ex("upgrade.sock"))
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            wait_until(lambda: running.now.events("upgrade-refused"), running.now.child.log)
            (event,) = running.now.events("upgrade-refused")
            assert "runs as user 65534, which is neither root nor this vdev's user" in event["text"]
        running.stop()
    finally:
        running.kill()


def test_second_successor_at_once_is_refused(line):
    running = line("--port", "null:")
    first = Successor(running.upgrade)
    first.up_to("rehearsal")
    second = Successor(running.upgrade)
    with pytest.raises(HandoverError, match=f"came while process {os.getpid()} is taking over"):
        second.hear("rehearsal")
    running.stop()


LESS = "import vdev.net.offer as o; o.ALWAYS &= ~(1 << 15); from vdev.cli import main; raise SystemExit(main())"


def test_successor_with_less_or_other_options_is_refused(line):
    running = line("--port", "loopback:")
    with ScriptedGuest.connect(running.path) as guest, Stream(guest, lambda: running.now) as stream:
        for options, why in [
            (["--socket-path", running.path, "--port", "null:"], "port is loopback: in the vdev that runs, null: here"),
            (["--socket-path", running.path, "--queue-pairs", "2"], "net0: queue-pairs is 1 in"),
            (["--socket-path", running.path, "--personality", "full"], "net0: personality is"),
            (["--upgrade-path", "/elsewhere"], "--upgrade-path is"),
            (["--device", "socket=a", "--device", "socket=b"], "1 devices run there, 2 are asked for here"),
        ]:
            _refused(running, why, options)
        _refused(running, "would offer the guest less than the one that runs (mrg_rxbuf)", [],
                 program=("-c", LESS, "run"))
        stream.advance(20)
    running.stop()


def _refused(running, why, options, **how):
    """A successor ends with one line that says ``why``, and the one that runs says so, too."""
    with pytest.raises(ProcessDied) as died:
        Daemon(["--upgrade-from", running.upgrade, *options], **how)
    (said,) = [text for text in str(died.value).splitlines() if text.startswith("vdev: ")]
    assert why in said
    assert why in running.now.events("upgrade-failed")[-1]["text"]


def test_nobody_to_take_over_from(tmp_path):
    with pytest.raises(ProcessDied, match=r"no vdev can be reached there: No such file or directory; it must run with "
                                          r"--upgrade-path"):
        Daemon(["--upgrade-from", str(tmp_path / "none")])
