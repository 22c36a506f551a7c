"""A guest that arrives by postcopy, without a virtual machine: the front-end's half, in Python.

What QEMU's destination does: the device is told where memory is while none of its pages is there, and each page is put
there when a fault asks for it, or with all the others at the end.
"""

import contextlib
import os
import select
import socket
import threading
from collections.abc import Sequence
from types import TracebackType

from ring.driver import GuestMemory, Region
from vdev.testing.netdriver import NetDriver
from vdev.testing.scripted import ring_setup
from vdev.userfault import Userfault
from vhost_user.frontend import FrontEnd, NoAnswer, SharedRegion
from vhost_user.handshake import QEMU_10_0, Qemu, QemuVersion
from vhost_user.spec import Request
from vhost_user.wire import MEM_TABLE, SINGLE_REGION, U64, U64_LAYOUT, MemTable

PAGE = 4096


class PostcopyFrontEnd(FrontEnd):
    """A front-end whose guest arrives by postcopy. addresses: gpa of a region -> where the back-end has it."""

    def __init__(self, sock: socket.socket, **options) -> None:
        super().__init__(sock, **options)
        self.addresses: dict[int, int] = {}

    def advise(self) -> Userfault:
        """POSTCOPY_ADVISE -> the back-end's userfaultfd, which is the caller's."""
        reply = self.request(Request.POSTCOPY_ADVISE, answered=True)
        if reply.payload or len(reply.fds) != 1:
            raise NoAnswer(f"{len(reply.payload)} bytes and {len(reply.fds)} descriptors answer POSTCOPY_ADVISE")
        return Userfault(reply.fds.take())

    def listen(self) -> None:
        """POSTCOPY_LISTEN."""
        self.request(Request.POSTCOPY_LISTEN, need_reply=True)

    def end(self) -> int:
        """POSTCOPY_END -> the answer, 0 for success."""
        return self._ask(Request.POSTCOPY_END)

    def set_mem_table(self, regions: Sequence[SharedRegion], need_reply: bool | None = None) -> None:
        """SET_MEM_TABLE, its answer, and the word that it was understood."""
        table = MemTable(tuple(shared.region for shared in regions))
        reply = self.request(Request.SET_MEM_TABLE, MEM_TABLE.encode(table), [shared.fd for shared in regions],
                             answered=True)
        for sent, told in zip(table.regions, MEM_TABLE.decode(reply.payload).regions, strict=True):
            self.addresses[sent.gpa] = told.uva
        self.say_known(Request.SET_MEM_TABLE)

    def add_mem_reg(self, shared: SharedRegion, need_reply: bool | None = None) -> None:
        """The same with ADD_MEM_REG."""
        self.tell_region(shared)
        self.say_known(Request.ADD_MEM_REG)

    def tell_region(self, shared: SharedRegion) -> None:
        """ADD_MEM_REG and its answer."""
        reply = self.request(Request.ADD_MEM_REG, SINGLE_REGION.encode(shared.region), [shared.fd], answered=True)
        self.addresses[shared.gpa] = SINGLE_REGION.decode(reply.payload).uva

    def say_known(self, kind: Request, value: int = 0) -> None:
        """The word that the addresses are known (0), which has no answer."""
        self.request(kind, U64_LAYOUT.encode(U64(value)), need_reply=False)


class Arrival:
    """The guest, connected and announced; its driver works on ``memory``, where it comes from.

    sock: a connected socket, from now on the guest's. size, features: of its one queue pair. ``missed`` counts the
    pages that the device waited for. While ``withheld`` is set none is put there.
    """

    def __init__(self, sock: socket.socket, features: int, *, size: int = 64,
                 version: QemuVersion = QEMU_10_0) -> None:
        self.memory = GuestMemory()
        self.driver = NetDriver(self.memory, size=size, features=features)
        self.driver.fill()
        self.features = features
        self.missed = 0
        self.withheld = threading.Event()
        self.waiting = threading.Event()  # a page was asked for
        self._here = [os.memfd_create("arriving") for _ in self.memory.regions]
        for fd, region in zip(self._here, self.memory.regions, strict=True):
            os.ftruncate(fd, region.offset + region.size)
        self.front_end = PostcopyFrontEnd(sock)
        queues = (self.driver.receiveq, self.driver.transmitq)
        self.qemu = Qemu(self.front_end, [ring_setup(queue) for queue in queues], version)
        self.qemu.connect()
        self.userfault = self.front_end.advise()
        self._stop = os.eventfd(0)
        self._resolver = threading.Thread(target=self._resolve, daemon=True)
        self._resolver.start()

    @property
    def regions(self) -> list[SharedRegion]:
        """Its memory here, as a front-end shares it."""
        return [SharedRegion(fd, region.gpa, region.uva, region.size, region.offset)
                for fd, region in zip(self._here, self.memory.regions, strict=True)]

    def start(self) -> None:
        """The guest goes on here: postcopy begins, and its rings run."""
        self.front_end.listen()
        self.qemu.start(self.regions, self.features, enabled_pairs=1)

    def come(self) -> int:
        """All the pages that are still missing come; POSTCOPY_END -> what it is answered with."""
        for region in self.memory.regions:
            for offset in range(0, region.size, PAGE):
                self._put(region, offset)
        answer = self.front_end.end()
        self._end_resolver()
        return answer

    def look(self) -> None:
        """Show the driver what the device has left in memory; all of it has to have come."""
        for fd, region in zip(self._here, self.memory.regions, strict=True):
            self.memory.write(region.gpa, os.pread(fd, region.size, region.offset))

    def there(self) -> int:
        """How many pages are in memory here."""
        return sum(os.fstat(fd).st_blocks * 512 // PAGE for fd in self._here)

    def _resolve(self) -> None:
        poll = select.poll()
        poll.register(self.userfault.fd, select.POLLIN)
        poll.register(self._stop, select.POLLIN)
        while all(fd != self._stop for fd, _ in poll.poll()):
            with contextlib.suppress(BlockingIOError):
                address = self.userfault.missed() // PAGE * PAGE
                self.waiting.set()
                while self.withheld.is_set():
                    if select.select([self._stop], [], [], 0.01)[0]:
                        return
                for region in self.memory.regions:
                    offset = address - self.front_end.addresses[region.gpa]
                    if 0 <= offset < region.size:
                        self.missed += 1
                        self._put(region, offset)

    def _put(self, region: Region, offset: int) -> None:
        with contextlib.suppress(FileExistsError):
            self.userfault.copy(self.front_end.addresses[region.gpa] + offset,
                                self.memory.read(region.gpa + offset, PAGE))

    def _end_resolver(self) -> None:
        os.eventfd_write(self._stop, 1)
        self._resolver.join()

    def close(self) -> None:
        """Hang up, as a QEMU that ends. Idempotent."""
        if self._stop < 0:
            return
        self._end_resolver()
        self.userfault.close()
        self.front_end.close()
        self.driver.close()
        self.memory.close()
        for fd in (*self._here, self._stop):
            os.close(fd)
        self._stop = -1

    def __enter__(self) -> "Arrival":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        self.close()
