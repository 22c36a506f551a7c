"""vdev/listen.py: sockets published by rename, and inherited ones."""

import fcntl
import grp
import multiprocessing
import os
import socket
import stat
import threading

import pytest

from vdev import listen
from vdev.errors import Failure
from vdev.listen import Listener, Publication, adopt, find_group, peer_pid


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "vdev.sock")


def connect(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    return sock


def published(path: str, **options) -> Listener:
    publication = Publication(path, **options)
    try:
        return publication.publish()
    finally:
        publication.close()


def dead_socket(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


# ------------------------------------------------------------------------------------ publication


def test_nothing_is_seen_before_publish_and_a_connectable_socket_after(path, tmp_path):
    publication = Publication(path)
    assert not os.path.exists(path)
    listener = publication.publish()
    assert os.listdir(tmp_path) == ["vdev.sock"]
    with connect(path), listener.accept() as accepted:
        assert not accepted.getblocking()
        assert not accepted.get_inheritable()
    assert listener.accept() is None
    listener.close()
    publication.close()
    assert os.listdir(tmp_path) == []


def test_unpublished_socket_leaves_nothing(path, tmp_path):
    before = open_fds()
    publication = Publication(path)
    publication.close()
    publication.close()
    assert os.listdir(tmp_path) == []
    assert open_fds() == before


def test_whoever_sees_the_path_can_connect(tmp_path):
    """No window between bind() and listen(): a client that tries without pause is never refused."""
    paths = [str(tmp_path / f"{number}.sock") for number in range(200)]
    refused, start = [], threading.Barrier(2)

    def hammer():
        start.wait()
        for path in paths:
            while True:
                try:
                    connect(path).close()
                    break
                except FileNotFoundError:
                    pass
                except ConnectionRefusedError:
                    refused.append(path)

    thread = threading.Thread(target=hammer)
    thread.start()
    start.wait()
    listeners = [published(path) for path in paths]
    thread.join()
    for listener in listeners:
        listener.close()
    assert not refused


def test_mode_is_set_before_the_path_appears(path):
    listener = published(path, mode=0o600)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    listener.close()


def test_default_mode_admits_the_group_only(path):
    mask = os.umask(0)
    try:
        listener = published(path)
    finally:
        os.umask(mask)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o660
    listener.close()


def test_temporary_name_is_private_whatever_the_umask(path, monkeypatch):
    modes = []
    chmod = os.chmod

    def spy(name, mode, **options):
        modes.append(stat.S_IMODE(os.stat(name, dir_fd=options["dir_fd"]).st_mode))
        chmod(name, mode, **options)

    monkeypatch.setattr(listen.os, "chmod", spy)
    mask = os.umask(0)
    try:
        Publication(path, mode=0o666).close()
    finally:
        os.umask(mask)
    assert modes == [0o600]


def test_group_by_name_and_number(path):
    own = grp.getgrgid(os.getgid())
    for group in (own.gr_name, str(own.gr_gid)):
        listener = published(path, group=group)
        assert os.stat(path).st_gid == own.gr_gid
        listener.close()


def test_unknown_group_is_named(path, tmp_path):
    with pytest.raises(Failure, match="--socket-group nosuchgroup: there is no such group"):
        Publication(path, group="nosuchgroup")
    assert os.listdir(tmp_path) == []


def test_group_one_may_not_give_names_the_way_out(path, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(listen.os, "chown", refuse)
    before = open_fds()
    with pytest.raises(Failure, match="to group 0: Operation not permitted; this user must be a member"):
        Publication(path, group="0")
    assert os.listdir(tmp_path) == []
    assert open_fds() == before


def test_auto_group_is_the_first_that_exists(monkeypatch):
    class Entry:
        gr_gid = 4242

    def lookup(name):
        if name != "qemu":
            raise KeyError(name)
        return Entry

    monkeypatch.setattr(listen.grp, "getgrnam", lookup)
    assert find_group("auto") == 4242


def test_auto_group_without_candidates_lists_them(monkeypatch):
    monkeypatch.setattr(listen, "AUTO_GROUPS", ("no-such-group-1", "no-such-group-2"))
    with pytest.raises(Failure, match="none of the groups no-such-group-1, no-such-group-2 exists"):
        find_group("auto")


def test_path_as_long_as_a_socket_address_may_be(tmp_path):
    name = "s" * (listen.PATH_MAX - len(str(tmp_path)) - 1)
    path = f"{tmp_path}/{name}"
    listener = published(path)
    with connect(path):
        pass
    listener.close()


def test_temporary_name_longer_than_an_address_may_be(tmp_path):
    directory = tmp_path / ("d" * (listen.PATH_MAX - len(str(tmp_path)) - 3))
    directory.mkdir()
    path = f"{directory}/s"
    assert len(path) == listen.PATH_MAX
    listener = published(path)
    with connect(path):
        pass
    listener.close()


def test_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    listener = published("vdev.sock")
    monkeypatch.chdir("/")
    listener.close()
    assert os.listdir(tmp_path) == []


# ------------------------------------------------------------------------------- what lies there


def test_F11_stale_socket_is_replaced_and_told(path):
    dead_socket(path)
    publication = Publication(path)
    assert publication.replaced
    listener = publication.publish()
    connect(path).close()
    listener.close()
    publication.close()


def test_F11_living_socket_is_refused_naming_its_owner(path, tmp_path):
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(path)
        other.listen()
        with pytest.raises(Failure, match=f"in use: process {os.getpid()} listens there"):
            Publication(path)
        connect(path).close()  # untouched
    assert os.listdir(tmp_path) == ["vdev.sock"]


def test_F11_living_socket_with_a_full_backlog_is_refused(path):
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(path)
        other.listen(0)
        waiting = [socket.socket(socket.AF_UNIX) for _ in range(3)]
        for sock in waiting:
            sock.setblocking(False)
            sock.connect_ex(path)
        with pytest.raises(Failure, match="in use: another process listens there"):
            Publication(path)
        for sock in waiting:
            sock.close()


def test_F11_living_socket_of_another_type_is_refused(path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(path)
        with pytest.raises(Failure, match="in use: another process"):
            Publication(path)


def test_F11_what_is_no_socket_is_never_removed(tmp_path):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "directory").mkdir()
    for name, kind in (("file", "a regular file"), ("link", "a symbolic link"), ("directory", "a directory")):
        with pytest.raises(Failure, match=f"exists and is {kind}, not a socket"):
            Publication(str(tmp_path / name))
    assert (tmp_path / "file").read_text() == "precious"


def test_F11_missing_directory_is_named(tmp_path):
    with pytest.raises(Failure, match=f"the directory {tmp_path}/none does not exist; create it"):
        Publication(f"{tmp_path}/none/vdev.sock")


def test_directory_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(Failure, match=f"cannot use the directory {tmp_path}/file: Not a directory"):
        Publication(f"{tmp_path}/file/vdev.sock")


def test_F34_directory_on_a_read_only_file_system(tmp_path):
    with pytest.raises(Failure, match="cannot create a socket there"):
        Publication("/proc/vdev.sock")


def test_F11_socket_that_came_to_life_in_between_is_not_replaced(path, tmp_path):
    publication = Publication(path)
    other = published(path)
    with pytest.raises(Failure, match="in use"):
        publication.publish()
    publication.close()
    connect(path).close()
    other.close()
    assert os.listdir(tmp_path) == []


def _race(path, barrier, results):
    barrier.wait()
    try:
        publication = Publication(path)
        publication.publish()
        results.put("published")
    except Failure:
        results.put("refused")
    barrier.wait()


def test_F11_of_instances_started_at_once_exactly_one_wins(path):
    context = multiprocessing.get_context("fork")
    for stale in (False, True) * 5:
        if stale:
            dead_socket(path)
        barrier, results = context.Barrier(4), context.Queue()
        workers = [context.Process(target=_race, args=(path, barrier, results)) for _ in range(4)]
        for worker in workers:
            worker.start()
        outcome = sorted(results.get(timeout=20) for _ in workers)
        for worker in workers:
            worker.join()
        assert outcome == ["published", "refused", "refused", "refused"]
        os.unlink(path)


def test_directory_lock_held_by_somebody_for_ever_does_not_stop_us(path, tmp_path, monkeypatch):
    monkeypatch.setattr(listen, "LOCK_PATIENCE", 0.05)
    held = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    published(path).close()
    os.close(held)


# ------------------------------------------------------------------------------------- at the end


def test_F31_path_taken_over_by_another_instance_is_left_alone(path):
    ours = published(path)
    os.unlink(path)
    theirs = published(path)
    ours.close()
    connect(path).close()
    theirs.close()
    assert not os.path.exists(path)


def test_close_after_the_path_was_removed(path):
    listener = published(path)
    os.unlink(path)
    listener.close()


# -------------------------------------------------------------------------------------- inherited


def test_inherited_connection():
    ours, theirs = socket.socketpair()
    with theirs:
        adopted = adopt(ours.detach())
        assert isinstance(adopted, socket.socket)
        assert not adopted.getblocking()
        assert not adopted.get_inheritable()
        assert peer_pid(adopted) == os.getpid()
        adopted.close()


def test_inherited_listener_is_not_unlinked(path):
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(path)
    sock.listen()
    adopted = adopt(sock.detach())
    assert isinstance(adopted, Listener)
    with connect(path), adopted.accept():
        pass
    adopted.close()
    assert os.path.exists(path)


@pytest.mark.parametrize("make, problem", [
    (lambda: os.open("/dev/null", os.O_RDWR), "is a character device, not a socket"),
    (lambda: os.pipe()[0], "is a pipe, not a socket"),
    (lambda: os.eventfd(0), "is something else, not a socket"),
    (lambda: socket.socket(socket.AF_INET).detach(), "is not a Unix stream socket"),
    (lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)[0].detach(), "is not a Unix stream socket"),
    (lambda: socket.socket(socket.AF_UNIX).detach(), "is neither connected nor listening"),
])
def test_inherited_descriptor_of_the_wrong_kind_is_named_and_left_open(make, problem):
    fd = make()
    with pytest.raises(Failure, match=f"--fd {fd}: descriptor {fd} {problem}"):
        adopt(fd)
    os.close(fd)


def test_inherited_descriptor_that_is_not_open():
    with pytest.raises(Failure, match="--fd 987: descriptor 987 is not open; whoever starts vdev must pass it on"):
        adopt(987)
