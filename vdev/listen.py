"""Sockets that front-ends connect to: published under a path, or inherited.

Theory of operation
-------------------
A path must never name a socket that cannot be connected to. The socket is bound to a temporary name beside
the path, listened on, given its group and mode, and only then renamed onto the path. Whoever sees the path
can connect, with no window between bind() and listen() and none with the wrong permissions.

What lies at the path already decides: nothing, or a socket that refuses connections (its owner is dead), is
replaced; a socket that accepts is a living owner's and is never touched; anything else is not ours to remove.
The question is asked twice: first of all, so that a second instance fails for the right reason, and once more
just before the rename, under a lock on the directory, so that of two instances started at once one loses.

At the end the path is removed only if it still names our own socket.
"""

import contextlib
import errno
import fcntl
import grp
import os
import socket
import stat
import struct
import time
from dataclasses import dataclass

from vdev.errors import Failure
from vdev.handover import Put, Take

BACKLOG = 8
# sun_path is 108 bytes with its terminator (unix(7))
PATH_MAX = 107
# the groups VMMs run under, most specific first
AUTO_GROUPS = ("libvirt-qemu", "qemu", "kvm")
LOCK_PATIENCE = 1.0  # seconds to wait for another instance that publishes in the same directory

# Of a socket that listens; it is made before the sandbox is closed.
SYSCALLS = {
    "accept4": "a front-end connects",
    "listen": "a socket that was taken over shows who listens now",
    "getsockname": "Python asks what kind of socket it accepted",
    "getsockopt": "the same, and which process it is",
    "newfstatat": "does the path still name our socket",
    "lstat": "the same, of older libcs",
    "unlink": "then it is removed at the end",
    "unlinkat": "the same, on machines without unlink",
}


def peer_pid(sock: socket.socket) -> int | None:
    """The process at the other end of ``sock``; of a connection, who made it (unix(7), SO_PEERCRED).

    None when it cannot be told, e.g. because it lives in another PID namespace.
    """
    try:
        return _credentials(sock)[0] or None
    except OSError:
        return None


def peer_uid(sock: socket.socket) -> int:
    """The user of the process at the other end of ``sock``, as it was when the connection was made."""
    return _credentials(sock)[1]


def peer_is_trusted(sock: socket.socket) -> bool:
    """May that user have all that this process has? Its own user and root may."""
    return peer_uid(sock) in (0, os.geteuid())


def _credentials(sock: socket.socket) -> tuple[int, int, int]:
    """(pid, uid, gid)"""
    return struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("iII")))


def find_group(name: str) -> int:
    """The id of group ``name``: a name, a number, or ``auto`` for the first VMM group that exists.

    Raises Failure when there is no such group.
    """
    if name == "auto":
        for candidate in AUTO_GROUPS:
            with contextlib.suppress(KeyError):
                return grp.getgrnam(candidate).gr_gid
        raise Failure(f"--socket-group auto: none of the groups {', '.join(AUTO_GROUPS)} exists; name the "
                      "one the VMM runs under")
    if name.isdecimal():
        return int(name)
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise Failure(f"--socket-group {name}: there is no such group; `getent group` lists them") from None


@dataclass(frozen=True)
class ListenerPart:
    """A Listener as it is handed on."""

    socket: int
    path: str | None
    inode: tuple[int, int] | None


@dataclass
class Listener:
    """A listening Unix stream socket. ``path`` and ``inode`` are None unless we made and published it."""

    sock: socket.socket
    path: str | None = None
    inode: tuple[int, int] | None = None

    def fileno(self) -> int:
        return self.sock.fileno()

    def accept(self) -> socket.socket | None:
        """The next connection, non-blocking and close-on-exec; None when there is none after all.

        Raises OSError when the process or the machine has no room for it.
        """
        try:
            connection, _ = self.sock.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return None
        connection.setblocking(False)
        return connection

    def export(self, put: Put) -> ListenerPart:
        """What another process needs to go on listening here."""
        return ListenerPart(put(self.fileno()), self.path, self.inode)

    @classmethod
    def adopt(cls, part: ListenerPart, take: Take) -> "Listener":
        """The socket that another process exported."""
        return cls(socket.socket(fileno=take(part.socket)), part.path, part.inode)

    def take_credit(self) -> None:
        """Let those who connect to our path from now on be told that this process listens (SO_PEERCRED)."""
        if self.path is not None:
            self.sock.listen(BACKLOG)

    def close(self) -> None:
        """Stop listening; remove the path if it still names this socket."""
        if self.path is not None and _inode(self.path) == self.inode:
            with contextlib.suppress(OSError):
                os.unlink(self.path)
        self.sock.close()


class Publication:
    """A socket made for ``path`` but not yet to be seen there; :attr:`replaced` tells of a stale one.

    group: see :func:`find_group`; None leaves it as it is. mode: permission bits. The constructor raises
    Failure and leaves nothing behind.
    """

    def __init__(self, path: str, group: str | None = None, mode: int = 0o660):
        self.path = path
        self.replaced = _is_stale(path)
        gid = find_group(group) if group is not None else None
        directory = os.path.dirname(path) or "."
        try:
            self._directory = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise Failure(f"{path}: the directory {directory} does not exist; create it: mkdir -p {directory}"
                          ) from None
        except OSError as error:
            raise Failure(f"{path}: cannot use the directory {directory}: {error.strerror}") from None
        # Begins with the name it will get, because `ss -xl` goes on showing what the socket was bound to.
        self._temporary = f"{os.path.basename(path)}.{os.getpid()}.{time.monotonic_ns()}"
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._bind(gid, group, mode)
        except BaseException:
            self.close()
            raise

    def _bind(self, gid: int | None, group: str | None, mode: int) -> None:
        # bind() takes the permissions of the file from those of the socket: never open to more than wanted
        os.fchmod(self._sock.fileno(), 0o600)
        address = os.path.join(os.path.dirname(self.path), self._temporary)
        if len(os.fsencode(address)) > PATH_MAX:  # the path may fit where the temporary name does not
            address = f"/proc/self/fd/{self._directory}/{self._temporary}"
        try:
            self._sock.bind(address)
        except OSError as error:
            raise Failure(f"{self.path}: cannot create a socket there: {error.strerror}; choose a directory "
                          "that this user may write to, e.g. $XDG_RUNTIME_DIR/vdev.sock") from None
        self._sock.listen(BACKLOG)
        self._sock.setblocking(False)
        if gid is not None:
            try:
                os.chown(self._temporary, -1, gid, dir_fd=self._directory, follow_symlinks=False)
            except OSError as error:
                raise Failure(f"{self.path}: cannot give the socket to group {group}: {error.strerror}; this "
                              f"user must be a member (usermod -aG {group} USER) or root") from None
        os.chmod(self._temporary, mode, dir_fd=self._directory)

    def publish(self) -> Listener:
        """Make the socket appear at its path, in one step and ready to be connected to. Raises Failure."""
        with _directory_lock(self._directory):
            _is_stale(self.path)
            try:
                os.rename(self._temporary, os.path.basename(self.path),
                          src_dir_fd=self._directory, dst_dir_fd=self._directory)
            except OSError as error:
                raise Failure(f"{self.path}: cannot publish the socket: {error.strerror}") from None
        os.close(self._directory)
        self._directory = -1
        return Listener(self._sock, os.path.abspath(self.path), _inode(self.path))

    def close(self) -> None:
        """Unless it was published, remove everything; the path was never touched."""
        if self._directory >= 0:
            with contextlib.suppress(OSError):
                os.unlink(self._temporary, dir_fd=self._directory)
            self._sock.close()
            os.close(self._directory)
            self._directory = -1


def adopt(fd: int) -> socket.socket | Listener:
    """An inherited Unix stream socket: a Listener if it listens, else the connection itself.

    Raises Failure when ``fd`` is not open, no such socket, or neither connected nor listening.
    """
    what = f"--fd {fd}: descriptor {fd}"
    try:
        mode = os.fstat(fd).st_mode
    except OSError:
        raise Failure(f"{what} is not open; whoever starts vdev must pass it on (not close it on exec)"
                      ) from None
    if not stat.S_ISSOCK(mode):
        raise Failure(f"{what} is {_kind(mode)}, not a socket; pass a connected or listening Unix socket")
    sock = socket.socket(fileno=fd)
    if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
        sock.detach()
        raise Failure(f"{what} is not a Unix stream socket, which is what vhost-user runs over")
    sock.set_inheritable(False)
    sock.setblocking(False)
    if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return Listener(sock)
    try:
        sock.getpeername()
    except OSError:
        sock.detach()
        raise Failure(f"{what} is neither connected nor listening; call connect() or listen() on it first"
                      ) from None
    return sock


def _is_stale(path: str) -> bool:
    """True for a socket whose owner is gone, False when there is nothing; Failure for anything else."""
    try:
        mode = os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise Failure(f"{path}: {error.strerror}; this user cannot look into the directory") from None
    if not stat.S_ISSOCK(mode):
        raise Failure(f"{path} exists and is {_kind(mode)}, not a socket; choose another path or remove it")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except FileNotFoundError:
            return False
        except BlockingIOError:
            owner = None  # alive, and its queue of connections is full
        except OSError as error:
            if error.errno != errno.EPROTOTYPE:
                raise Failure(f"{path} is a socket and cannot be tested: {error.strerror}; remove it if its "
                              "owner is gone") from None
            owner = None
        else:
            owner = peer_pid(probe)
    who = f"process {owner}" if owner else "another process"
    raise Failure(f"{path} is in use: {who} listens there; stop it or choose another --socket-path")


@contextlib.contextmanager
def _directory_lock(directory: int):
    """Hold other instances that publish in ``directory`` back. Anyone may hold that lock for ever, so that
    after a while we go on without it: it only decides between instances started at the same moment."""
    deadline = time.monotonic() + LOCK_PATIENCE
    while True:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError:
            if time.monotonic() > deadline:
                break
            time.sleep(0.005)
    try:
        yield
    finally:
        fcntl.flock(directory, fcntl.LOCK_UN)


def _inode(path: str) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


_KINDS = {stat.S_IFREG: "a regular file", stat.S_IFDIR: "a directory", stat.S_IFLNK: "a symbolic link",
          stat.S_IFCHR: "a character device", stat.S_IFBLK: "a block device", stat.S_IFIFO: "a pipe"}


def _kind(mode: int) -> str:
    return _KINDS.get(stat.S_IFMT(mode), "something else")
