"""Rows of docs/conformance/faults.tsv about the process: signals, its log, its processor, its clock, what it throws.

Where a fault can be put into the real program it is: a daemon of its own with the fault beside it. What the program
itself would have to do wrong is put into a device on a thread of the test.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import pytest

from ring.build import lib
from ring.errors import ChainError, MemoryGone, QueueBusy, RingBroken, SetupError, TranslationMissing, named
from ring.guestmem import Owner
from vdev.backend import _HANDLERS
from vdev.connection import Connection
from vdev.engine import Engine
from vdev.net.features import Feature, mask
from vdev.session_rings import SessionRings
from vdev.testing.daemon import Daemon
from vdev.testing.faults import goes_round, processor_seconds
from vdev.testing.kept import FRAME, WAIT, assert_returned, holding
from vdev.testing.scripted import ScriptedGuest
from vdev.testing.served import ServedDevice, both_ways
from vhost_user.codec import encode
from vhost_user.errors import PeerError
from vhost_user.frontend import FrontEnd, NoAnswer, RequestRefused
from vhost_user.spec import Request
from vhost_user.transport import MESSAGE_DEADLINE

pytestmark = pytest.mark.timeout(120)

FEATURES = mask(Feature.VERSION_1, Feature.MRG_RXBUF, Feature.EVENT_IDX)

RUN = """
from vdev.cli import main
status = main(["run", *sys.argv[1:]])
"""

TICKING = f"""
import os, signal, sys
ticks = 0
def tick(*_):
    global ticks
    ticks += 1
signal.signal(signal.SIGALRM, tick)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
{RUN}
print(ticks, "signals", file=sys.stderr, flush=True)
os._exit(status)  # the sandbox does not let the timer be stopped
"""

HOGGED = f"""
import os, sys, threading
def hog():
    while True:
        pass
threading.Thread(target=hog, daemon=True).start()
{RUN}
os._exit(status)  # a thread cannot be ended inside the sandbox: that loads a library
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "vm.sock")


def loopback(path: str, *more: str, **options: object) -> Daemon:
    """A daemon with a loopback port on ``path`` and ``more`` arguments; ``options`` as for Daemon."""
    return Daemon(["--socket-path", path, "--port", "loopback:", *more], **options)


# For a process that does what vdev never does, and what the sandbox would end it for.
FREE = ("--sandbox", "off")


def sessions(path: str, count: int, frames: int) -> None:
    """``count`` guests after one another, ``frames`` frames each, in order and whole. Raises AssertionError."""
    for _ in range(count):
        with ScriptedGuest.connect(path, features=FEATURES, size=16) as guest:
            for number in range(frames):
                assert goes_round(guest, FRAME + number.to_bytes(2))


# ---------------------------------------------------------------------------------------------- signals


def test_F33_thousand_signals_a_second(path) -> None:
    with loopback(path, *FREE, program=("-c", TICKING)) as daemon:
        sessions(path, 10, 50)
        assert not daemon.events("refused-request")
        log = daemon.stop()
    assert int(log.split(" signals")[0].splitlines()[-1]) > 100


# ------------------------------------------------------------------------------------------------- log


def test_F34_disk_of_the_log_is_full(path) -> None:
    """/dev/full refuses every write as a full disk does."""
    with open("/dev/full", "w") as full:
        child = subprocess.Popen([sys.executable, "-m", "vdev", "--socket-path", path, "--port", "loopback:", "-v"],
                                 stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=full)
    with child:
        try:
            assert child.stdout.readline().startswith(b"ready")
            sessions(path, 5, 10)
            child.send_signal(signal.SIGTERM)
            assert child.wait(WAIT) == 0
        finally:
            child.kill()


# ------------------------------------------------------------------------------------------- processor


@contextlib.contextmanager
def throttled(pid: int, running: float, stopped: float) -> Iterator[None]:
    """Process ``pid`` runs ``running`` seconds and then not for ``stopped``, again and again. So does the kernel's
    bandwidth control (cpu.max of a control group), only that this needs no right over control groups."""
    over = threading.Event()

    def pulse() -> None:
        while not over.is_set():
            os.kill(pid, signal.SIGSTOP)
            over.wait(stopped)
            os.kill(pid, signal.SIGCONT)
            time.sleep(running)

    thread = threading.Thread(target=pulse)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("rounds", [40, pytest.param(400, marks=pytest.mark.long)])
def test_F36_five_percent_of_a_processor(path, rounds) -> None:
    """In pieces that are shorter, and gaps that are longer, than what the device gives its own worker to let go of a
    ring (100 ms)."""
    with loopback(path) as daemon, ScriptedGuest.connect(path, features=FEATURES, size=32) as guest:
        assert goes_round(guest)
        guest.front_end.timeout = WAIT
        with throttled(daemon.child.pid, 0.005, 0.11):
            for number in range(rounds):
                guest.driver.transmit(FRAME + number.to_bytes(2))
                base = guest.front_end.get_vring_base(1)
                guest.front_end.set_vring_base(1, base, need_reply=True)
                guest.front_end.set_vring_kick(1, guest.driver.transmitq.kick_fd, need_reply=True)
                assert guest.driver.receive_within(WAIT).frame == FRAME + number.to_bytes(2)
                assert guest.driver.reclaim_all(WAIT)
        sessions_end = daemon.events("session-end")
    assert sessions_end == []


def test_F36_thread_that_keeps_the_interpreter_busy(path) -> None:
    with loopback(path, *FREE, program=("-c", HOGGED)):
        sessions(path, 3, 10)


# ----------------------------------------------------------------------------------------------- clock

STEPPING = """
#define _GNU_SOURCE
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

/* An hour ahead and an hour behind, by turns, each time somebody asks. */
static long step(void)
{
    static int asked;
    return __atomic_fetch_add(&asked, 1, __ATOMIC_RELAXED) % 2 ? 3600 : -3600;
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
    int result = (int)syscall(SYS_clock_gettime, clock, now);
    if (clock == CLOCK_REALTIME)
        now->tv_sec += step();
    return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone)
{
    struct timespec precise;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *now)
{
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    if (now)
        *now = precise.tv_sec;
    return precise.tv_sec;
}
"""


@pytest.fixture
def stepping(tmp_path: Path) -> str:
    """A library that, loaded into a program, steps its wall clock."""
    source, library = tmp_path / "stepping.c", tmp_path / "stepping.so"
    source.write_text(STEPPING)
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source], check=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("no C compiler on this machine: apt install gcc")
    return str(library)


def test_F37_clock_steps_an_hour_and_back(path, stepping, monkeypatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", stepping)
    daemon = loopback(path)
    monkeypatch.delenv("LD_PRELOAD")
    with daemon:
        sessions(path, 3, 10)
        with FrontEnd.connect(path, timeout=2 * MESSAGE_DEADLINE) as half:
            half.send_raw(encode(Request.GET_FEATURES)[:7])
            assert half.silent(MESSAGE_DEADLINE / 4)  # an hour has passed many times by now
            assert half.closed()
        sessions(path, 1, 1)
        times = [datetime.fromisoformat(line["time"]) for line in daemon.events("session-end")]
        assert max(times).timestamp() - min(times).timestamp() > 3600  # the steps were seen


# ------------------------------------------------------------------------------- what nobody foresaw


@contextlib.contextmanager
def served() -> Iterator[ServedDevice]:
    """A device that leaves this process as it was and serves to the end."""
    with ServedDevice() as device:
        with ScriptedGuest(device.connect(), features=FEATURES, size=8) as guest:
            both_ways(device, guest)
        device.wait_for("session-end")
        before = holding(os.getpid())
        yield device
        assert_returned(os.getpid(), before)
        with ScriptedGuest(device.connect(), features=FEATURES, size=8) as guest:
            both_ways(device, guest)


def live(device: ServedDevice) -> None:
    """What a guest does: it starts, passes frames, stops and starts again."""
    with ScriptedGuest(device.connect(), features=FEATURES, size=8) as guest:
        guest.front_end.get_features()  # answered: the rings run
        both_ways(device, guest)
        guest.qemu.stop()
        guest.front_end.get_features()


def broken(*_: object, **__: object) -> None:
    """What throws what nobody foresaw."""
    raise RuntimeError("nobody foresaw this")


HANDLERS = sorted(set(_HANDLERS) & {Request.ADD_MEM_REG, Request.SET_VRING_BASE, Request.GET_VRING_BASE,
                                    Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_BACKEND_REQ_FD})


@pytest.mark.parametrize("request_kind", HANDLERS, ids=lambda kind: kind.name)
def test_F38_handler_of_a_request_fails(monkeypatch, request_kind) -> None:
    with served() as device, monkeypatch.context() as patch:
        patch.setitem(_HANDLERS, request_kind, broken)
        ends_with_a_bug(device)


@pytest.mark.parametrize("where", [(SessionRings, "settle"), (SessionRings, "_introduce"), (Engine, "build"),
                                   (Engine, "run"), (Engine, "stop"), (Engine, "forget"), (Owner, "table"),
                                   (Connection, "_serve")],
                         ids=lambda where: f"{where[0].__name__}.{where[1]}")
def test_F38_inside_of_a_request_fails(monkeypatch, where) -> None:
    with served() as device, monkeypatch.context() as patch:
        patch.setattr(*where, broken)
        ends_with_a_bug(device)


def ends_with_a_bug(device: ServedDevice) -> None:
    """See a guest's session end, and the log blame vdev. Raises AssertionError."""
    ended = len(device.lines("session-end"))
    with pytest.raises((PeerError, NoAnswer)):
        live(device)
    device.wait_for("session-end", ended + 1)
    assert "RuntimeError: nobody foresaw this; this is a bug" in device.wait_for("session-failed")


# ---------------------------------------------------------------------------------- every status of the C core

CODES = [name for name in dir(lib) if name.startswith("RING_E_")]
CONSEQUENCES = (ChainError, RingBroken, SetupError, QueueBusy, TranslationMissing)


def test_F39_every_status_has_its_consequence() -> None:
    """A chain goes back or waits, a ring stops, a request is refused, a queue is not touched; the base class alone
    says nothing of what follows."""
    assert len(CODES) > 20
    for code in CODES:
        assert isinstance(named(code), CONSEQUENCES), code


@pytest.mark.parametrize("code", [code for code in CODES if isinstance(named(code), SetupError)])
def test_F39_status_that_refuses_a_request(monkeypatch, code) -> None:
    with served() as device, ScriptedGuest(device.connect(), features=FEATURES, size=8) as guest:
        both_ways(device, guest)
        bases = [guest.front_end.get_vring_base(index) for index in (0, 1)]
        with monkeypatch.context() as patch:
            patch.setattr(Engine, "build", throwing(code))
            for index, queue in enumerate((guest.driver.receiveq, guest.driver.transmitq)):
                guest.front_end.set_vring_base(index, bases[index], need_reply=True)
                with pytest.raises(RequestRefused):
                    guest.front_end.set_vring_kick(index, queue.kick_fd, need_reply=True)
        for index, queue in enumerate((guest.driver.receiveq, guest.driver.transmitq)):
            guest.front_end.set_vring_kick(index, queue.kick_fd, need_reply=True)
        both_ways(device, guest)


@pytest.mark.parametrize("code", [code for code in CODES if type(named(code)) is RingBroken])
def test_F39_status_that_stops_a_ring(code) -> None:
    """The ring has it for good, whoever found it; a line names the rule, and the front-end can still stop it."""
    with served() as device, ScriptedGuest(device.connect(), features=FEATURES, size=8) as guest:
        both_ways(device, guest)

        def fail() -> None:
            with device.device.engine.paused():
                device.device.engine.rings[1].queue.fail(named(code))
            device.device._connection._backend.rings.report_broken()

        device.call(fail)
        assert "transmitq 0 stopped: " in device.wait_for("ring-broken")
        assert guest.front_end.get_vring_base(1) >= 0 and guest.front_end.get_features()


@pytest.mark.parametrize("code", [code for code in CODES if isinstance(named(code), MemoryGone)])
def test_F39_status_that_ends_the_session(monkeypatch, code) -> None:
    with served() as device, monkeypatch.context() as patch:
        patch.setattr(Engine, "build", throwing(code))
        with pytest.raises((PeerError, NoAnswer)):
            live(device)
        assert "vanished" in device.wait_for("session-end", 2)


def throwing(code: str) -> Callable[..., None]:
    """A function that fails as the C core does with status ``code``."""
    def throw(*_: object, **__: object) -> None:
        raise named(code)
    return throw


# ------------------------------------------------------------------------------------------ supervisor


def test_F44_started_again_and_again(tmp_path) -> None:
    """What a supervisor does until the cause is gone; a line each time, and who waits for the socket is served."""
    folder = tmp_path / "late"
    path = str(folder / "vm.sock")
    command = [sys.executable, "-m", "vdev", "--socket-path", path, "--port", "loopback:"]
    for _ in range(3):
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
                              check=False)
        assert done.returncode == 1 and done.stdout == ""
        assert done.stderr == f"vdev: {path}: the directory {folder} does not exist; create it: mkdir -p {folder}\n"
        with pytest.raises(FileNotFoundError):
            FrontEnd.connect(path)
    folder.mkdir()
    with loopback(path) as daemon:
        sessions(path, 1, 3)
        assert processor_seconds(daemon.child.pid) < 10
