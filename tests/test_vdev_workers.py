"""Which worker serves what: every way to spread lanes, workers that several devices share, and one that gets stuck."""

import contextlib
import functools
import os
import re
import signal
import socket
import threading
from pathlib import Path

import pytest

from vdev import engine
from vdev.errors import Failure
from vdev.net.features import Feature, mask
from vdev.testing.daemon import Daemon
from vdev.testing.netns import Namespace, why_no_tap
from vdev.testing.netdriver import NetHeader
from vdev.testing.process import ProcessDied
from vdev.testing.scripted import ScriptedGuest
from vdev.testing.served import FRAME, ServedDevice, WirePort, both_ways
from vdev.testing.waiting import wait_until
from vdev.workers import Worker, Workers, check_cpus
from vhost_user.errors import Disconnected

PLAIN = mask(Feature.VERSION_1, Feature.MRG_RXBUF)
RINGS = {"split": PLAIN, "packed": PLAIN | mask(Feature.RING_PACKED)}
ALLOWED = sorted(os.sched_getaffinity(0))
PAIRS = 2


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """On a busy machine a worker that never sleeps may have to wait for its processor."""
    monkeypatch.setattr(engine, "PATIENCE", 1.0)


def threads() -> set[str]:
    """Those of workers: in them all signals are blocked but those of faults."""
    found = set()
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):  # it has ended
            status = Path("/proc/self/task", task, "status").read_text()
            blocked = int(re.search(r"^SigBlk:\s*([0-9a-f]+)$", status, re.MULTILINE)[1], 16)
            if blocked >> (signal.SIGTERM - 1) & 1:
                found.add(task)
    return found


def all_have_ended(before: set[str]) -> None:
    """A thread that was joined may be seen for a moment still."""
    wait_until(lambda: threads() <= before, "workers are left")


def place(task: Path) -> str:
    (line,) = [line for line in (task / "status").read_text().splitlines() if line.startswith("Cpus_allowed_list:")]
    return line.split()[1]


@pytest.fixture(autouse=True)
def one_at_a_time(monkeypatch):
    """A daemon has one control thread for all its devices. Each ServedDevice has one: let them take turns."""
    turn = threading.RLock()

    def in_turn(method):
        @functools.wraps(method)
        def run(*arguments):
            with turn:
                return method(*arguments)
        return run

    for name in ("start", "attach", "detach", "leave"):
        monkeypatch.setattr(Worker, name, in_turn(getattr(Worker, name)))


# ------------------------------------------------------------------------------------------- the pool


@pytest.mark.parametrize("spread, pattern", [("device", "aaaa"), ("pair", "abcd"), ("direction", "abcd"), (1, "aaaa"),
                                             (3, "abca")])
def test_lanes_of_one_device(spread, pattern):
    workers = Workers(spread).of_device(4)
    assert [workers.index(worker) for worker in workers] == [pattern.index(letter) for letter in pattern]


def test_devices_share_only_what_has_a_number():
    for spread in ("device", "pair", "direction"):
        pool = Workers(spread)
        assert not pool.shared and not set(pool.of_device(2)) & set(pool.of_device(2))
    pool = Workers(3)
    first, second = pool.of_device(2), pool.of_device(2)
    assert pool.shared and [*first, *second] == [*first, second[0], first[0]] and len({*first, *second}) == 3


@pytest.mark.parametrize("cpus", [(ALLOWED[0],), tuple(ALLOWED), tuple(reversed(ALLOWED))])
def test_workers_take_the_processors_in_turn(cpus):
    before = threads()
    workers = Workers("pair", cpus).of_device(3)
    for worker in workers:
        worker.join(print)
        worker.start()
    try:
        made = sorted(threads() - before, key=int)
        assert [place(Path("/proc/self/task", task)) for task in made] == [str(cpus[n % len(cpus)]) for n in range(3)]
    finally:
        for worker in workers:
            worker.leave(print)
    all_have_ended(before)


def test_thread_lives_as_long_as_somebody_has_joined():
    before, worker = threads(), Worker()
    first, second = object().__str__, object().__repr__
    worker.join(first)
    worker.join(second)
    worker.start()
    worker.start()
    assert len(threads() - before) == 1
    worker.leave(first)
    assert len(threads() - before) == 1
    worker.leave(second)
    all_have_ended(before)


def test_processor_that_this_process_cannot_have():
    check_cpus(ALLOWED)
    with pytest.raises(Failure, match=r"--cpus: this process cannot run on processor 8191; .* \d+"):
        check_cpus([ALLOWED[0], 8191])
    assert sorted(os.sched_getaffinity(0)) == ALLOWED


# ------------------------------------------------------------------------------------- frames both ways

WAYS = {"device": ("device", 0), "pair": ("pair", 0), "direction": ("direction", 0), "shared": (2, 0),
        "device, polling": ("device", 50), "direction, polling": ("direction", 50), "shared, polling": (2, 50),
        "pair, always polling": ("pair", None)}


@pytest.mark.parametrize("features", RINGS.values(), ids=RINGS)
@pytest.mark.parametrize("spread, poll_us", WAYS.values(), ids=WAYS)
def test_frames_both_ways(spread, poll_us, features):
    before = threads()
    with ServedDevice(WirePort(PAIRS), workers=Workers(spread, ALLOWED[-1:], poll_us)) as served:
        made = threads() - before
        threads_of_workers = {"device": 1, "pair": PAIRS, "direction": 2 * PAIRS}.get(spread, spread)
        assert len(made) == threads_of_workers
        with ScriptedGuest(served.connect(), features=features, queue_pairs=PAIRS) as guest:
            for _ in range(3):
                for pair in range(PAIRS):
                    both_ways(served, guest, pair)
            bases = [guest.front_end.get_vring_base(ring) for ring in range(2 * PAIRS)]
            assert all(bases)
        text = served.wait_for("session-end")
        assert f"from guest {3 * PAIRS} frames" in text and f"to guest {3 * PAIRS} frames" in text
    all_have_ended(before)


# ------------------------------------------------------------------------------------------ sharing


def at_rest(served: ServedDevice) -> threading.Event:
    """Pause the device until the event is set."""
    paused, go_on = threading.Event(), threading.Event()

    def pause() -> None:
        with served.device.engine.paused():
            paused.set()
            go_on.wait(20)

    threading.Thread(target=lambda: served.call(pause), daemon=True).start()
    assert paused.wait(10)
    return go_on


@pytest.mark.parametrize("poll_us", [0, 50], ids=["sleeping", "polling"])
@pytest.mark.parametrize("features", RINGS.values(), ids=RINGS)
def test_device_that_is_paused_or_goes_leaves_the_others_running(features, poll_us):
    workers = Workers(1, poll_us=poll_us)
    with ServedDevice(workers=workers) as one, ServedDevice(workers=workers) as other, \
            ScriptedGuest(other.connect(), features=features) as guest:
        with ScriptedGuest(one.connect(), features=features) as quiet:
            both_ways(one, quiet)
            go_on = at_rest(one)
            quiet.driver.transmit(FRAME)
            both_ways(other, guest)
            go_on.set()
            assert quiet.driver.reclaim_all(10)
            one.port.wire[0].recv(1 << 16)
            one.call(one.device.engine.reset)
            both_ways(other, guest)
        one.wait_for("session-end")
        both_ways(other, guest)
        with ScriptedGuest(one.connect(), features=features) as quiet:
            both_ways(one, quiet)
            both_ways(other, guest)


def get_stuck(worker: str, served: ServedDevice, guest: ScriptedGuest) -> None:
    """The port blocks, as no port does, and takes no more: the worker sleeps though it has work."""
    os.set_blocking(served.port.ends(0).to_port, True)
    driver = guest.driver

    def full() -> bool:
        driver.reclaim()
        while driver.transmitq.outstanding < 32:
            driver.transmit(FRAME)
        asleep = "\nState:\tS" in Path("/proc/self/task", worker, "status").read_text()
        driver.reclaim()
        return asleep and driver.transmitq.outstanding == 32

    wait_until(full, "the port takes everything")


def free(served: ServedDevice) -> None:
    """The port blocks no more, and whoever waits for a frame of it gets one. What it takes is still to be drained."""
    os.set_blocking(served.port.ends(0).to_port, False)
    served.port.wire[0].send(NetHeader().pack() + FRAME)


def drain(wire: socket.socket) -> None:
    try:
        while wire.recv(1 << 16):
            pass
    except BlockingIOError:
        pass


@pytest.mark.parametrize("poll_us", [0, None], ids=["sleeping", "polling"])
@pytest.mark.parametrize("first", ["stuck", "innocent"])
def test_stuck_worker_ends_the_sessions_of_all_that_share_it(first, poll_us):
    """Whoever of them notices. Both may come back, are served by another worker, and the old one ends when it can."""
    before = threads()
    workers = Workers(1, poll_us=poll_us)
    with ServedDevice(workers=workers) as one, ServedDevice(workers=workers) as other:
        with ScriptedGuest(other.connect(), features=PLAIN) as guest, \
                ScriptedGuest(one.connect(), features=PLAIN, size=64) as culprit:
            both_ways(other, guest)
            (worker,) = threads() - before
            get_stuck(worker, one, culprit)
            notices, learns = (one, other) if first == "stuck" else (other, one)
            front_end = culprit.front_end if first == "stuck" else guest.front_end
            with pytest.raises(Disconnected):
                front_end.get_vring_base(1)
            assert "did not let go within 1000 ms" in notices.wait_for("session-end")
            assert "serves other devices, too (--workers), and is stuck" in learns.wait_for("session-end")
        assert one.device.engine.abandoned == other.device.engine.abandoned == 1
        with ScriptedGuest(other.connect(), features=PLAIN) as guest:
            both_ways(other, guest)
            assert worker in threads() and len(threads() - before) == 2
            free(one)
            wait_until(lambda: drain(one.port.wire[0]) or worker not in threads(), "it is still there")
            drain(one.port.wire[0])
            with ScriptedGuest(one.connect(), features=PLAIN) as culprit:
                both_ways(one, culprit)
                both_ways(other, guest)
    all_have_ended(before)


def test_device_that_is_kept_apart_shares_no_worker():
    """A guest arrives by postcopy there: its worker may wait for a page."""
    workers, before = Workers(1), threads()
    with ServedDevice(workers=workers) as one, ServedDevice(workers=workers) as other, \
            ScriptedGuest(one.connect(), features=PLAIN) as waiting, \
            ScriptedGuest(other.connect(), features=PLAIN) as guest:
        both_ways(one, waiting)
        shared = threads() - before
        one.call(lambda: one.device.engine.keep_apart(True))
        (own,) = threads() - before - shared
        both_ways(one, waiting)
        get_stuck(own, one, waiting)
        both_ways(other, guest)
        free(one)
        drain(one.port.wire[0])
        assert waiting.driver.reclaim_all(10)
        drain(one.port.wire[0])
        one.call(lambda: one.device.engine.keep_apart(False))
        assert threads() - before == shared
        both_ways(one, waiting)
        both_ways(other, guest)
    all_have_ended(before)


# ------------------------------------------------------------------------------------------ the daemon


@pytest.mark.parametrize("options, count", [
    ([], 1), (["--workers", "pair"], 3), (["--workers", "direction", "--poll-us", "20"], 6), (["--workers", "2"], 2),
])
def test_daemon_places_its_workers(tmp_path, options, count):
    path = str(tmp_path / "vm.sock")
    cpu = ALLOWED[-1]
    with Daemon(["--socket-path", path, "--port", "loopback:", "--queue-pairs", "3", "--cpus", str(cpu),
                 *options]) as daemon:
        pid = str(daemon.child.pid)
        tasks = [task for task in Path("/proc", pid, "task").iterdir() if task.name != pid]
        assert [place(task) for task in tasks] == [str(cpu)] * count
        with ScriptedGuest.connect(path, features=PLAIN, queue_pairs=3) as guest:
            assert guest.exchange(FRAME) == FRAME


def test_daemon_says_which_processor_is_not_there(tmp_path):
    with pytest.raises(ProcessDied, match="--cpus: this process cannot run on processor 8000; "):
        Daemon(["--socket-path", str(tmp_path / "vm.sock"), "--cpus", f"{ALLOWED[0]},8000", "--port", "null:"])
    assert not list(tmp_path.iterdir())


def test_front_end_is_heard_while_the_workers_always_poll(tmp_path):
    path = str(tmp_path / "vm.sock")
    with Daemon(["--socket-path", path, "--port", "loopback:", "--poll-us", "always"]), \
            ScriptedGuest.connect(path, features=PLAIN) as guest:
        for _ in range(10):
            assert guest.exchange(FRAME) == FRAME
            assert guest.front_end.get_features()


@pytest.mark.parametrize("options", [["--workers", "direction"], ["--workers", "direction", "--poll-us", "50"],
                                     ["--workers", "1", "--poll-us", "always"]])
def test_tap_with_a_worker_for_each_direction_comes_back(tmp_path, options):
    """Both have the same descriptor, and either may be the first to see it go."""
    if reason := why_no_tap():
        pytest.skip(reason)
    path = str(tmp_path / "vm.sock")
    arp = bytes.fromhex("ffffffffffff 525400123456 0806 0001 0800 06 04 0001 525400123456 0a090002"
                        "000000000000 0a090001")
    with Namespace() as lan, Daemon(["--socket-path", path, "--port", "tap:vdevw,ip=10.9.0.1/24", *options],
                                    namespace=lan) as daemon, ScriptedGuest.connect(path) as guest:
        def host_answers() -> bool:
            guest.driver.transmit(arp)
            frames = iter(lambda: guest.driver.receive_within(10).frame, None)
            return any(frame[12:14] == arp[12:14] and frame[20:22] == b"\0\2" for frame in frames)

        for times in range(3):
            wait_until(lambda: len(daemon.events("port-back")) == times, daemon.child.log)  # noqa: B023
            assert host_answers()
            lan.run(["ip", "link", "del", "vdevw"])
