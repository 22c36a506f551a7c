"""vdev/sandbox.py: what is forbidden fails, one thing at a time in a process of its own, and all the rest works."""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from vdev import capabilities, landlock, sandbox
from vdev.config import DaemonConfig
from vdev.device import MEM_SLOTS
from vdev.net.features import Feature, mask
from vdev.testing.arrival import Arrival
from vdev.testing.daemon import Daemon
from vdev.testing.netns import Namespace, why_no_tap
from vdev.testing.scripted import ScriptedGuest
from vdev.testing.waiting import wait_until
from vdev.userfault import PATH, UserfaultSource

FRAME = bytes.fromhex("ffffffffffff 525400123456 88b5") + bytes(range(50))


def inside(body, *arguments, needs=""):
    """Run ``body`` in a new process that has entered the sandbox; -> (exit status, what it printed).

    The body may use the modules and ``libc`` of the program below. needs: a Needs, as text.
    """
    program = textwrap.dedent("""\
        import ctypes, os, resource, socket, subprocess, threading
        from vdev import capabilities, sandbox
        from vdev.ports.base import Needs
        libc = ctypes.CDLL(None, use_errno=True)
        status = open("/proc/self/status")
        print(sandbox.enter(1, 0, [NEEDS], []).missing, flush=True)
        """).replace("NEEDS", needs) + textwrap.dedent(body)
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60,
                          check=False)
    first, _, rest = done.stdout.partition("\n")
    assert first == "[]", f"this kernel lacks something: {first}{done.stderr}"
    return done.returncode, rest + done.stderr


@pytest.fixture(autouse=True)
def possible():
    """Skip where this machine's kernel cannot do it all; the daemon then says so in a line."""
    try:
        landlock.version()
    except OSError as error:
        pytest.skip(f"no Landlock on this machine: {error.strerror}")


# ------------------------------------------------------------------------------------- what is forbidden

KILLED = -signal.SIGSYS


@pytest.mark.parametrize("attempt", [
    "socket.socket(socket.AF_INET, socket.SOCK_STREAM)",
    "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "libc.mount(b'none', b'/mnt', b'tmpfs', 0, None)",
    "libc.unshare(0x10000000)",
    "libc.setns(0, 0)",
    "libc.ptrace(16, os.getppid(), 0, 0)",
    "libc.process_vm_readv(os.getppid(), None, 0, None, 0, 0)",
    "os.kill(os.getppid(), 0)",
    "os.kill(os.getpid(), 9)",
    "os.setuid(65534)",
    "os.chmod('/', 0o755)",
    "os.rename('/tmp/no', '/tmp/such')",
    "os.mkdir('/tmp/vdev-no-such-directory')",
    "os.symlink('a', '/tmp/vdev-no-such-link')",
    "os.chroot('/')",
    "libc.mmap(None, 4096, 4, 0x22, -1, 0)",
    "libc.mprotect(None, 4096, 4)",
    "libc.personality(0)",
    "libc.syscall(425, 1, None)",  # io_uring_setup
    "libc.syscall(321, 0, None, 0)",  # bpf on x86_64, and no call at all on aarch64
    "libc.prctl(4, 1, 0, 0, 0)",  # to be looked at again
    "resource.setrlimit(resource.RLIMIT_NOFILE, (1, 1))",
    "libc.ioctl(0, 0x400454ca, None)",  # TUNSETIFF, which only a TAP needs
    "libc.ioctl(0, 0x5412, None)",  # TIOCSTI: type into the terminal
])
def test_F42_call_outside_the_list_ends_the_process(attempt):
    assert inside(attempt) == (KILLED, "")


@pytest.mark.parametrize("attempt", ["os.execv('/bin/true', ['true'])", "os.fork()", "subprocess.run(['true'])",
                                     "os.posix_spawn('/bin/true', ['true'], {})"])
def test_F43_no_process_can_be_started(attempt):
    assert inside(attempt) == (KILLED, "")


@pytest.mark.parametrize("attempt", [
    "open('/etc/hostname')",
    "open('/dev/net/tun', 'r+b', buffering=0)",
    "open('/proc/self/mem', 'rb')",
    "open('/tmp/vdev-no-such-file', 'x')",
    "os.listdir('/')",
    "os.open('.', os.O_TMPFILE | os.O_WRONLY)",
])
def test_F42_no_file_can_be_opened(attempt):
    status, text = inside(attempt)
    assert status == 1
    assert "PermissionError: [Errno 13]" in text


def test_F42_files_can_be_removed_only_beside_the_socket(tmp_path):
    kept, removed = tmp_path / "elsewhere" / "file", tmp_path / "run" / "vm.sock"
    for file in kept, removed:
        file.parent.mkdir()
        file.touch()
    body = """
        import os, sys
        from vdev import sandbox
        assert not sandbox.enter(1, 0, [], [sys.argv[2]]).missing
        os.unlink(sys.argv[2])
        os.unlink(sys.argv[1])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(body), str(kept), str(removed)],
                          capture_output=True, text=True, timeout=60, check=False)
    assert f"PermissionError: [Errno 13] Permission denied: '{kept}'" in done.stderr
    assert kept.exists()
    assert not removed.exists()


def test_F42_landlock_alone_keeps_files_and_tcp_out_of_reach():
    # The second fence, seen with the first one open.
    body = """
        import ctypes, os, socket
        from vdev import landlock, seccomp
        seccomp.forbid_new_privileges()
        tcp = socket.socket()
        print(landlock.restrict([], abstract_sockets=False) >= 1)
        for attempt in (lambda: open("/etc/hostname"), lambda: open("/tmp/vdev-no-such-file", "x"),
                        lambda: os.listdir("/"), lambda: os.mkdir("/tmp/vdev-no-such-directory"),
                        lambda: os.execv("/bin/true", ["true"])):
            try:
                print(attempt())
            except PermissionError as error:
                print(error.errno)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(body)], capture_output=True, text=True, timeout=60,
                          check=False)
    assert done.stdout.split() == ["True", *5 * ["13"]], done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, which has capabilities to lose")
def test_capabilities_are_lost_but_those_a_port_needs():
    assert capabilities.effective() >= {capabilities.NET_ADMIN}
    body = "print(*[line.split()[1].lstrip('0') for line in status if line.startswith(('CapPrm', 'CapEff', 'CapAmb'))])"
    assert inside(body) == (0, "  \n")
    # The same bit twice: permitted and effective. Bit 12 is CAP_NET_ADMIN.
    assert inside(body, needs="Needs(frozenset({capabilities.NET_ADMIN}))") == (0, "1000 1000 \n")


def test_limits():
    body = "print(*map(resource.getrlimit, (resource.RLIMIT_NOFILE, resource.RLIMIT_CORE)))"
    assert inside(body) == (0, "(96, 96) (0, 0)\n")


def test_descriptors_that_were_passed_on_do_not_count():
    program = textwrap.dedent("""\
        import os, resource
        from vdev import sandbox
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
        while (last := os.dup(0)) < 300:
            pass
        print(sandbox.enter(1, 0, [], []).descriptors - last, len([os.dup(0) for _ in range(64)]))
        """)
    assert subprocess.check_output([sys.executable, "-c", program], text=True, timeout=60) == "98 64\n"


def test_a_limit_below_ours_is_kept():
    body = "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    program = textwrap.dedent(f"""\
        import resource
        resource.setrlimit(resource.RLIMIT_NOFILE, (50, 60))
        from vdev import sandbox
        sandbox.enter(1, 0, [], [])
        {body}
        """)
    assert subprocess.check_output([sys.executable, "-c", program], text=True, timeout=60) == "50\n"


def test_threads_can_be_started_and_are_inside_too():
    body = """
        def attempt():
            try:
                open("/etc/hostname")
            except PermissionError:
                print("refused")
        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()
    """
    assert inside(body) == (0, "refused\n")


# ------------------------------------------------------------------------------------- what a kernel does not have


def test_what_a_kernel_does_not_have_is_told_and_the_rest_is_in_force():
    program = textwrap.dedent("""\
        import errno
        from vdev import landlock, sandbox, seccomp
        def absent(*_, **__):
            raise OSError(errno.ENOSYS, "Function not implemented")
        landlock.restrict = seccomp.install = absent
        report = sandbox.enter(2, 0, [], [])
        print(*report.missing, report, sep="\\n")
        """)
    lines = subprocess.check_output([sys.executable, "-c", program], text=True, timeout=60).splitlines()
    assert lines == [
        "no Landlock: this kernel has none; files are kept out of reach by the system call filter only",
        "no system call filter: this kernel has none; any call can be made",
        "sandbox: no capabilities, no Landlock, no system call filter, at most 128 descriptors"]


# ------------------------------------------------------------------------------------- everything else works


def test_every_rule_has_a_reason():
    for area in sandbox.AREAS:
        assert area
        assert all(isinstance(reason, str) and reason for reason in area.values())


# A daemon that tells at its end which modules were loaded after it had closed itself in.
WATCHED = """
import atexit, sys
from vdev import sandbox
from vdev.cli import main
enter = sandbox.enter
def watch(*arguments):
    report = enter(*arguments)
    before = set(sys.modules)
    atexit.register(lambda: print("late:", sorted(set(sys.modules) - before), flush=True))
    return report
sandbox.enter = watch
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def start():
    """Start ``vdev.testing.daemon.Daemon(...)``; at the end each must stop well, with a clean log."""
    with contextlib.ExitStack() as daemons:
        yield lambda *arguments, **options: daemons.enter_context(Daemon(*arguments, **options))


def test_nothing_is_imported_once_the_sandbox_is_closed(start, tmp_path):
    path = str(tmp_path / "vm.sock")
    daemon = start(["--socket-path", path, "--port", "loopback:", "-v"], program=["-c", WATCHED])
    with ScriptedGuest.connect(path) as guest:
        assert guest.exchange(FRAME) == FRAME
    with socket.socket(socket.AF_UNIX) as sock:  # and one that is closed for its mistake
        sock.connect(path)
        sock.sendall(b"\xff" * 12)
        assert sock.recv(1) == b""
    (entered,) = daemon.events("sandbox")
    assert entered["text"].startswith("sandbox: no capabilities, Landlock")
    assert "late: []\n" in daemon.stop()


@pytest.fixture
def lan():
    """A network namespace in which TAP devices can be made."""
    reason = why_no_tap()
    if reason:
        pytest.skip(f"no TAP device to be had: {reason}")
    with Namespace() as namespace:
        yield namespace


def test_N18_tap_that_vdev_made_and_set_up_is_made_again_inside_and_taken_down_at_the_end(start, lan, tmp_path):
    lan.run(["ip", "link", "add", "br0", "type", "bridge"])
    path = str(tmp_path / "vm.sock")
    daemon = start(["--socket-path", path, "--port", "tap:vm1,ip=10.0.0.1/24,bridge=br0", "-v"], namespace=lan,
                   program=["-c", WATCHED])
    (entered,) = daemon.events("sandbox")
    assert entered["text"].startswith("sandbox: capability 12, ")
    with ScriptedGuest.connect(path):
        lan.run(["ip", "link", "del", "vm1"])
        wait_until(lambda: daemon.events("port-back"), daemon.child.log)
        assert "10.0.0.1/24" in lan.run(["ip", "-brief", "addr", "show", "vm1"]).stdout
        assert "vm1" in lan.run(["ip", "link", "show", "master", "br0"]).stdout
    assert "late: []\n" in daemon.stop()
    assert "vm1" not in lan.run(["ip", "link"]).stdout


def test_N18_persistent_tap_made_anew_is_attached_again_without_any_right(start, lan, tmp_path):
    make = ["ip", "tuntap", "add", "dev", "vm1", "mode", "tap", "multi_queue", "vnet_hdr"]
    lan.run(make)
    path = str(tmp_path / "vm.sock")
    daemon = start(["--socket-path", path, "--port", "tap:vm1", "-v"], namespace=lan, privileged=False,
                   program=["-c", WATCHED])
    (entered,) = daemon.events("sandbox")
    assert entered["text"].startswith("sandbox: no capabilities, ")
    with ScriptedGuest.connect(path):
        lan.run(["ip", "link", "del", "vm1"])
        wait_until(lambda: daemon.events("port-gone"), daemon.child.log)
        lan.run(make)
        wait_until(lambda: daemon.events("port-back"), daemon.child.log)
    assert "late: []\n" in daemon.stop()
    assert "vm1" in lan.run(["ip", "link"]).stdout


def test_client_connects_again_from_inside(start, tmp_path):
    path = str(tmp_path / "vm.sock")
    daemon = start(["--client", "--socket-path", path, "--port", "loopback:", "-v"], program=["-c", WATCHED])
    for _ in range(2):
        with socket.socket(socket.AF_UNIX) as front_end:
            front_end.bind(path)
            front_end.listen()
            front_end.settimeout(30)
            connection, _ = front_end.accept()
        os.unlink(path)
        with ScriptedGuest(connection) as guest:
            assert guest.exchange(FRAME) == FRAME
    assert "late: []\n" in daemon.stop()


def test_guest_arrives_by_postcopy_inside(start, tmp_path):
    try:
        UserfaultSource().close()
    except OSError as error:
        pytest.skip(f"{PATH} cannot be used: {error.strerror}")
    path = str(tmp_path / "vm.sock")
    daemon = start(["--socket-path", path, "--port", "loopback:", "--postcopy", "-v"], program=["-c", WATCHED])
    for ends_well in (True, False):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(path)
        with Arrival(sock, mask(Feature.VERSION_1, Feature.MRG_RXBUF)) as guest:
            guest.driver.transmit(FRAME)
            guest.start()
            assert select.select([guest.driver.receiveq.call_fd], [], [], 30)[0]
            if ends_well:
                assert guest.come() == 0
                guest.look()
                assert guest.driver.receive(refill=False).frame == FRAME
    wait_until(lambda: daemon.events("postcopy-cut-off"), daemon.child.log)
    assert "late: []\n" in daemon.stop()


def inside_now(daemon):
    """Are the filter in force and privileges forbidden, in every thread of ``daemon``?"""
    threads = [path.read_text() for path in Path(f"/proc/{daemon.child.pid}/task").glob("*/status")]
    return bool(threads) and all("NoNewPrivs:\t1\n" in thread and "Seccomp:\t2\n" in thread for thread in threads)


def test_successor_takes_over_from_inside_and_closes_itself_in(start, lan, tmp_path):
    path, upgrade = str(tmp_path / "vm.sock"), str(tmp_path / "upgrade.sock")
    options = ["--socket-path", path, "--port", "tap:vm1", "--queue-pairs", "1", "--upgrade-path", upgrade, "-v"]
    daemon = start(options, namespace=lan, program=["-c", WATCHED])
    entered = daemon.events("sandbox")
    with ScriptedGuest.connect(path):
        for _ in range(2):
            successor = start(["--upgrade-from", upgrade, "-v"], namespace=lan, program=["-c", WATCHED])
            assert daemon.child.wait(30) == 0
            assert "late: []\n" in daemon.child.log()
            daemon = successor
            entered += daemon.events("sandbox")
            assert inside_now(daemon)
        # It has what the first one had: the right to make the TAP again.
        lan.run(["ip", "link", "del", "vm1"])
        wait_until(lambda: daemon.events("port-back"), daemon.child.log)
    assert [event["text"] for event in entered] == 3 * [entered[0]["text"]]
    assert entered[0]["text"].startswith("sandbox: capability 12, ")
    assert entered[0]["text"].endswith(f"at most {64 + 32 + MEM_SLOTS} descriptors")
    assert "late: []\n" in daemon.stop()
    assert not {Path(path), Path(upgrade)} & set(tmp_path.iterdir())


def test_several_devices_share_one_sandbox(start, tmp_path):
    devices = [f"socket={tmp_path}/{name},port=responder,queue-pairs=2" for name in "abc"]
    options = [word for device in devices for word in ("--device", device)]
    daemon = start([*options, "-v"], program=["-c", WATCHED])
    assert daemon.events("sandbox")[0]["text"].endswith(f"at most {64 + 3 * 2 * 32} descriptors")
    for name in "ab":
        ScriptedGuest.connect(f"{tmp_path}/{name}", queue_pairs=2).close()
    assert sorted(os.listdir(tmp_path)) == ["a", "a.journal", "b", "b.journal", "c", "c.journal"]
    assert "late: []\n" in daemon.stop()
    # A guest that hung up without a word leaves a journal that is still of use; the rest is removed from inside.
    assert sorted(os.listdir(tmp_path)) == ["a.journal", "b.journal"]


def test_off_is_a_warning(start, tmp_path):
    daemon = start(["--socket-path", str(tmp_path / "vm.sock"), "--port", "null:", "--sandbox", "off"])
    assert "Seccomp:\t0\n" in Path(f"/proc/{daemon.child.pid}/status").read_text()
    (warning,) = daemon.events("sandbox-off")
    assert warning["level"] == "warning"


def test_on_is_the_default():
    assert DaemonConfig(()).sandbox
