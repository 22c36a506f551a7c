"""Every instant at which a thread could have been killed: it is run one machine instruction at a time.

A process that is killed has done all instructions before one and none after it. So whoever looks at shared memory
after each instruction sees every state that SIGKILL can leave behind - of the code as it is built for the product,
without a hook in it. The thread is a child's, held by ptrace(2).
"""

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterator
from types import TracebackType

_SINGLESTEP, _SEIZE, _INTERRUPT = 9, 0x4206, 0x4207
_WALL = 0x40000000  # waitpid(2): threads, too
_ASLEEP = 0.02  # seconds without an instruction, after which the thread is taken to wait for something
PATIENCE = 60.0

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


class CannotTrace(RuntimeError):
    """This machine does not let one process hold another; the text has the reason."""


def _ptrace(request: int, thread: int) -> None:
    if _libc.ptrace(request, thread, None, None) < 0:
        number = ctypes.get_errno()
        raise CannotTrace(f"ptrace is refused here: {os.strerror(number)}")


class Stepped:
    """A child process that makes a thread, and that thread under control; a context manager that ends both.

    start runs in the child and makes the thread; go, too, once the thread is held. Neither may touch what the parent
    uses but for shared memory. Raises CannotTrace.
    """

    def __init__(self, start: Callable[[], None], go: Callable[[], None]) -> None:
        said, say = os.pipe()
        told, tell = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                before = set(os.listdir("/proc/self/task"))
                start()
                (thread,) = set(os.listdir("/proc/self/task")) - before
                os.write(say, int(thread).to_bytes(8, "little"))
                os.read(told, 1)
                go()
                os.read(told, 1)
            finally:
                os._exit(1)
        os.close(say)
        os.close(told)
        self._tell = tell
        answer = os.read(said, 8)
        os.close(said)
        self._thread = int.from_bytes(answer, "little")
        try:
            if not answer:
                raise RuntimeError("the child made no thread")
            _ptrace(_SEIZE, self._thread)
            _ptrace(_INTERRUPT, self._thread)
            self._stopped(PATIENCE)
        except BaseException:
            self.close()
            raise
        os.write(tell, b"g")

    def _stopped(self, seconds: float) -> bool:
        """Wait for the thread to have done its instruction -> False when it takes longer."""
        for _ in range(50):
            if os.waitpid(self._thread, _WALL | os.WNOHANG)[0]:
                return True
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if os.waitpid(self._thread, _WALL | os.WNOHANG)[0]:
                return True
            time.sleep(0.0005)
        return False

    def instants(self, done: Callable[[], bool]) -> Iterator[None]:
        """Once after each instruction, until the thread waits for something and ``done()``.

        Raises AssertionError when that does not come about.
        """
        deadline = time.monotonic() + PATIENCE
        while True:
            _ptrace(_SINGLESTEP, self._thread)
            while not self._stopped(_ASLEEP):
                if done():
                    return
                assert time.monotonic() < deadline, "the thread waits and is not done"
            yield

    def close(self) -> None:
        """SIGKILL to the child, thread and all."""
        os.close(self._tell)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):  # whoever holds a thread has to take leave of it first
            os.waitpid(self._thread, _WALL)
        os.waitpid(self._pid, 0)

    def __enter__(self) -> "Stepped":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        self.close()
