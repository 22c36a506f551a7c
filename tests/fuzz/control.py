"""The control plane under any bytes and any descriptors: socket, codec, session, device and engine of one front-end.

An input is a script for a front-end. Its first byte says how far the session has come; then come messages, well
framed or not, each with descriptors of chosen kinds, and between them events: a kick, a store to guest memory, a file
cut short, time that passes. An input that has ended goes on in zeroes, as those of the fuzzers in C do. What must hold
stands at ``Run``; whatever does not hold leaves as an exception.

    control.py --replay FILE...         run these inputs, and say how many there were
    control.py [LIBFUZZER OPTION]...    look for inputs that reach what was never reached (needs atheris)
"""

import contextlib
import errno
import fcntl
import os
import select
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path


class Clock:
    """time.monotonic, but that time can be made to pass."""

    def __init__(self) -> None:
        self._real = time.monotonic
        self.passed = 0.0

    def __call__(self) -> float:
        return self._real() + self.passed


REPLAY = sys.argv[1:2] == ["--replay"]
CLOCK = time.monotonic = Clock()  # before anything takes the real one

if REPLAY:
    instrumented = contextlib.nullcontext()
else:
    import atheris
    instrumented = atheris.instrument_imports(include=["vhost_user", "vdev", "ring.guestmem"])
with instrumented:
    from ring.pump import Pump
    from vdev.config import DeviceConfig
    from vdev.device import Device
    from vdev.logs import EventLog
    from vdev.ports.null import Null
    from vhost_user import wire
    from vhost_user.codec import Decoder, Message, encode
    from vhost_user.errors import PeerError
    from vhost_user.spec import HEADER_SIZE, ProtocolFeature, Request, VirtioBit, mask

# Guest memory of the later stages: one region. Ring n lies RING * n into it.
GPA, UVA, SIZE, RING, ENTRIES = 0x10000, 0x100000, 0x10000, 0x1000, 8
# The requests that may be answered though no acknowledgement was asked for ("Communication").
ANSWERED = {
    Request.GET_FEATURES, Request.GET_PROTOCOL_FEATURES, Request.GET_VRING_BASE, Request.GET_QUEUE_NUM,
    Request.GET_MAX_MEM_SLOTS, Request.GET_STATUS, Request.SET_LOG_BASE, Request.GET_CONFIG,
    Request.GET_INFLIGHT_FD, Request.POSTCOPY_ADVISE, Request.POSTCOPY_END, Request.SET_DEVICE_STATE_FD,
    Request.CHECK_DEVICE_STATE, Request.IOTLB_MSG,
}


class Input:
    """The bytes of one input, read front to back."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def left(self) -> bool:
        return self._at < len(self._data)

    def take(self, count: int) -> bytes:
        part = self._data[self._at:self._at + count]
        self._at += count
        return part + bytes(count - len(part))

    def number(self, width: int = 1) -> int:
        return int.from_bytes(self.take(width), "little")


# ---------------------------------------------------------------------------------------------- descriptors


def _memfd(size: int, seals: int = 0) -> int:
    fd = os.memfd_create("fuzz", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def _opened_again(flags: int) -> int:
    fd = _memfd(SIZE)
    try:
        return os.open(f"/proc/self/fd/{fd}", flags)
    finally:
        os.close(fd)


def _full_eventfd() -> int:
    fd = os.eventfd(0)  # blocking: who writes without looking waits for ever
    os.eventfd_write(fd, (1 << 64) - 2)
    return fd


def _end(ends: Sequence[int], kept: int) -> int:
    os.close(ends[1 - kept])
    return ends[kept]


def _disk_file() -> int:
    with tempfile.TemporaryFile() as file:
        file.truncate(SIZE)
        return os.dup(file.fileno())


def _epoll() -> int:
    with select.epoll() as epoll:
        return os.dup(epoll.fileno())


def _with_text(script: Input) -> int:
    """A pipe that somebody wrote to and left."""
    read, write = os.pipe()
    os.write(write, script.take(script.number()))
    os.close(write)
    return read


# What may come along with a message; each is made anew, one of the rest of the input.
KINDS: tuple[Callable[[Input], int], ...] = (
    lambda _: os.eventfd(0, os.EFD_NONBLOCK),
    lambda _: os.eventfd(0),
    lambda _: _full_eventfd(),
    lambda _: _memfd(SIZE),
    lambda _: _memfd(1),
    lambda _: _memfd(0),
    lambda _: _memfd(1 << 40),
    lambda _: _memfd(SIZE, seals=fcntl.F_SEAL_WRITE),
    lambda _: _opened_again(os.O_RDONLY),
    lambda _: _opened_again(os.O_PATH),
    lambda _: _disk_file(),
    lambda _: _end(os.pipe(), 0),
    lambda _: _end(os.pipe(), 1),
    lambda _: _end([end.detach() for end in socket.socketpair()], 0),
    lambda _: os.open("/dev/null", os.O_RDWR),
    lambda _: os.open("/dev/zero", os.O_RDWR),
    lambda _: os.open("/", os.O_RDONLY | os.O_DIRECTORY),
    lambda _: _epoll(),
    _with_text,
)


# ---------------------------------------------------------------------------------------------------- a run


class CheckedLog(EventLog):
    """Writes nothing. Raises for a line that is not one, and for one that speaks of a mistake of ours."""

    def peer(self, level: int, event: str, text: str, **fields: object) -> None:
        self._write(level, event, text, fields)

    def bug(self, event: str, doing: str, exception: BaseException) -> None:
        raise exception

    def _write(self, level: int, event: str, text: str, fields: dict) -> None:
        assert text and "\n" not in text, text


class Target:
    """The device, which outlives the inputs; each of them is a session of its own."""

    def __init__(self) -> None:
        # That a worker lets go is asked here, not how soon on a busy machine.
        Pump.detach.__defaults__ = (20_000,)
        self._device = Device("fuzz", Null(1), DeviceConfig("fuzz", fd=0, queue_pairs=1), CheckedLog())
        self._leaks: list[str] = []
        sys.unraisablehook = lambda leak: self._leaks.append(f"{leak.exc_value!r} in {leak.object!r}")
        with Run(self._device, Input(b"\x03")) as run:  # so that what is opened once, is open
            run.script()
        self._files = open_files()

    def session(self, data: bytes) -> None:
        """Run one input. Raises AssertionError, or whatever nobody foresaw."""
        with Run(self._device, Input(data)) as run:
            run.script()
        assert not self._leaks, self._leaks
        assert open_files() == self._files, f"{open_files() - self._files} descriptors were left open"
        assert "/memfd:fuzz" not in Path("/proc/self/maps").read_text(), "guest memory is still mapped"


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


class Run:
    """One session, and what must hold in it; a context manager.

    Only a PeerError leaves the connection, and it ends the session. A request that was refused changes nothing. An
    answer comes where it is due and nowhere else. The engine runs the rings that are started and no others. Nothing
    of the session outlives it: no ring, no descriptor, no mapping.
    """

    def __init__(self, device: Device, script: Input) -> None:
        self._device = device
        self._input = script
        self._ours, theirs = socket.socketpair()
        self._connection = device.open_session(theirs)
        self._session = self._connection._session
        self._replies = Decoder(replies=True)
        self._memory = _memfd(SIZE)
        self._kicks = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
        self._framed = True  # until bytes were sent that need not be a message
        self._over = False

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._ours.close()
        for fd in (self._memory, *self._kicks):
            os.close(fd)
        for ring in self._device.engine.rings:
            assert (ring.queue, ring.enabled, ring.kick, ring.call, ring.err) == (None, False, -1, -1, -1)
        assert self._device.engine.abandoned == 0, "a worker got stuck"

    def script(self) -> None:
        """All that the input asks for."""
        self._come_to(self._input.number() % 8)
        while self._input.left() and not self._over:
            operation = self._input.number()
            if operation < 0xC0:
                self._message(operation)
            else:
                self._event((operation - 0xC0) % 5)
            if not self._over:
                self._check_engine()

    def _come_to(self, stage: int) -> None:
        """0: nothing was said. 1: negotiated. 2: memory is shared too. 3: both rings run too. From 4 on the same with
        packed rings."""
        packed, stage = divmod(stage, 4)
        if stage >= 1:
            self._say(Request.SET_OWNER, b"")
            offer = self._session.offer
            # Without what would have rings wait for a log or for translations, or lie elsewhere.
            protocol = offer.protocol_features & ~mask(ProtocolFeature.GPA_ADDRESSES)
            features = offer.features & ~mask(VirtioBit.LOG_ALL, VirtioBit.ACCESS_PLATFORM,
                                              *([] if packed else [VirtioBit.RING_PACKED]))
            self._say(Request.SET_PROTOCOL_FEATURES, wire.U64_LAYOUT.encode(wire.U64(protocol)))
            self._say(Request.SET_FEATURES, wire.U64_LAYOUT.encode(wire.U64(features)))
            self._say(Request.SET_STATUS, wire.U64_LAYOUT.encode(wire.U64(0xF)))
        if stage >= 2:
            self._say(Request.ADD_MEM_REG, wire.SINGLE_REGION.encode(wire.Region(GPA, SIZE, UVA, 0)), self._memory)
        if stage >= 3:
            for index, kick in enumerate(self._kicks):
                at = UVA + RING * index
                self._say(Request.SET_VRING_NUM, wire.VRING_STATE.encode(wire.VringState(index, ENTRIES)))
                addr = wire.VringAddr(index, 0, desc=at, avail=at + 0x200, used=at + 0x400, log=0)
                self._say(Request.SET_VRING_ADDR, wire.VRING_ADDR.encode(addr))
                self._say(Request.SET_VRING_KICK, wire.VRING_FD.encode(wire.VringFd(index, True)), kick)
                self._say(Request.SET_VRING_ENABLE, wire.VRING_STATE.encode(wire.VringState(index, 1)))

    def _say(self, request: Request, payload: bytes, *fds: int) -> None:
        """A request that a stage is made of: it has to be taken."""
        acknowledged = self._session.state.has(ProtocolFeature.REPLY_ACK)
        self._send(encode(request, payload, need_reply=acknowledged), fds)
        assert [refused(answer) for answer in self._serve()] == [False] * acknowledged, request.name

    # ------------------------------------------------------------------------------------------- what comes

    def _message(self, operation: int) -> None:
        """One message. Bits 0-3: how many descriptors; bit 4: they come with its payload; bit 5: it wants an
        acknowledgement. From 0x80 on its header is the next 12 bytes, whatever they say."""
        fds = [KINDS[self._input.number() % len(KINDS)](self._input) for _ in range(operation & 0xF)]
        late = bool(operation & 0x10)
        need_reply = bool(operation & 0x20)
        try:
            if operation >= 0x80:
                head, payload = self._input.take(HEADER_SIZE), self._input.take(self._input.number())
                self._framed = False
                request = 0
            else:
                request, payload = self._input.number(), self._input.take(self._input.number())
                head = encode(request, payload, need_reply=need_reply)[:HEADER_SIZE]
            before = self._session.state
            self._send(head, () if late else fds)
            if payload:
                self._send(payload, fds if late else ())
            answers = self._serve()
        finally:
            for fd in fds:
                os.close(fd)
        if self._framed and not self._over:
            # The message that brings REPLY_ACK is answered, too.
            agreed = before if request != Request.SET_PROTOCOL_FEATURES else self._session.state
            acknowledged = before.has(ProtocolFeature.REPLY_ACK) or agreed.has(ProtocolFeature.REPLY_ACK)
            self._check_answers(request, answers, need_reply and acknowledged)
            if request not in ANSWERED and any(map(refused, answers)):
                assert self._session.state is before, "a request that was refused changed the session"

    def _event(self, kind: int) -> None:
        """0: a kick. 1: a store of two bytes to guest memory. 2: its file is cut short. 3: time passes. 4: the
        front-end hangs up."""
        if kind == 0:
            os.eventfd_write(self._kicks[self._input.number() % 2], 1)
        elif kind == 1:
            at, value = self._input.number(2), self._input.take(2)
            os.pwrite(self._memory, value, at % (SIZE - 1))
        elif kind == 2:
            os.ftruncate(self._memory, self._input.number() << 9)
        elif kind == 3:
            CLOCK.passed += self._input.number() / 16
        else:
            self._ours.shutdown(socket.SHUT_WR)
        self._serve()

    def _send(self, data: bytes, fds: Sequence[int]) -> None:
        """The peer may have stopped to listen, or the kernel to take descriptors that nobody receives."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            try:
                socket.send_fds(self._ours, [data], fds)
            except OSError as error:
                if error.errno != errno.ETOOMANYREFS:
                    raise

    # --------------------------------------------------------------------------------------- what happens then

    def _serve(self) -> list[Message]:
        """What the control loop does until nothing is left to do -> the answers."""
        try:
            while self._step():
                pass
        except PeerError as end:
            assert str(end) and "\n" not in str(end)
            self._over = True
        return self._answers()

    def _step(self) -> bool:
        """Whatever is due: a message, news of the worker, a deadline."""
        due = False
        for fd, action in [(self._connection.fileno(), self._connection.on_readable), *self._device.watches()]:
            if readable(fd):
                action()
                due = True
        if self._connection.deadline is not None and CLOCK() >= self._connection.deadline:
            self._connection.on_deadline()
            due = True
        return due

    def _answers(self) -> list[Message]:
        """What has come back; bytes that are no reply raise Close."""
        answers = []
        with contextlib.suppress(BlockingIOError, ConnectionResetError):
            while data := self._ours.recv(self._replies.needed, socket.MSG_DONTWAIT):
                if answer := self._replies.feed(data):
                    answers.append(answer)
        assert not self._replies.started, "half an answer"
        return answers

    def _check_answers(self, request: int, answers: list[Message], due: bool) -> None:
        assert [answer.request for answer in answers] == [request] * len(answers)
        assert due <= len(answers) <= (due or request in ANSWERED), f"{len(answers)} answers to request {request}"

    def _check_engine(self) -> None:
        state = self._session.state
        wanted = [index for index in range(len(state.rings)) if state.runnable(index)]
        assert self._device.engine.running() == wanted, (self._device.engine.running(), wanted)
        assert [ring.enabled for ring in self._device.engine.rings] == [ring.enabled for ring in state.rings]


def refused(answer: Message) -> bool:
    """Taken for an acknowledgement, the answer is no."""
    return any(answer.payload)


def readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def main() -> None:
    """Replay, or fuzz."""
    if REPLAY:
        target = Target()
        for name in sys.argv[2:]:
            print(f"Running: {name}", flush=True)
            target.session(Path(name).read_bytes())
        print(f"Executed {len(sys.argv) - 2} inputs")
        return
    # The guard of guest memory lives from SIGBUS and SIGSEGV; libFuzzer would take both for itself.
    target = Target()
    atheris.Setup([sys.argv[0], "-handle_bus=0", "-handle_segv=0", *sys.argv[1:]], target.session)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
