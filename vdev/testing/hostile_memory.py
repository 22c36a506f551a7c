"""What a hostile front-end does with guest memory and the dirty log (rows P39 to P60 and P87 to P94).

Every function is the ``act`` of a case, see vdev/testing/initiator.py."""

import fcntl
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace

from vdev.testing.hostile_messages import u64
from vdev.testing.initiator import ANY, REFUSED, SERVED, Attack, Cases, Outcome, Stage, Target
from vhost_user.codec import encode
from vhost_user.spec import ProtocolFeature, Request
from vhost_user.wire import MEM_TABLE, SINGLE_REGION, MemTable, Region

CASES = Cases()
GPA, UVA, SIZE = 0x1000_0000, 0x7E00_0000_0000, 0x10000  # of memory beside that of the attack itself
END = 1 << 64


@contextmanager
def memfd(size: int, seals: int = 0) -> Iterator[int]:
    """A file of ``size`` bytes in memory."""
    fd = os.memfd_create("hostile", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        if seals:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        yield fd
    finally:
        os.close(fd)


def table(attack: Attack, *regions: Region, fds: list[int]) -> Outcome:
    """SET_MEM_TABLE of ``regions``."""
    return attack.ask(Request.SET_MEM_TABLE, MEM_TABLE.encode(MemTable(regions)), fds)


def tables(target: Target, *wrong: Region) -> Iterator[Outcome]:
    """Tables of one region each, with a file that suits it as far as possible."""
    for region in wrong:
        with target.attack() as attack, memfd(SIZE) as fd:
            yield table(attack, region, fds=[fd])


SOUND = Region(GPA, SIZE, UVA, 0)


# ----------------------------------------------------------------------------------------- the table itself


@CASES.case("P39", "a memory table of no regions", REFUSED)
def no_regions(target: Target) -> Iterator[Outcome]:
    with target.attack() as attack:
        yield table(attack, fds=[])


@CASES.case("P40", "a memory table of 9 and of 2^32-1 regions", REFUSED)
def too_many_regions(target: Target) -> Iterator[Outcome]:
    for count in 9, 0xFFFFFFFF:
        with target.attack() as attack, memfd(SIZE) as fd:
            regions = MEM_TABLE.encode(MemTable((SOUND,) * 8))[8:]
            yield attack.ask(Request.SET_MEM_TABLE, count.to_bytes(4, "little") + bytes(4) + regions, [fd] * 8)


@CASES.case("P42", "a memory table that announces two regions and has one", REFUSED)
def half_a_table(target: Target) -> Iterator[Outcome]:
    with target.attack() as attack, memfd(SIZE) as fd:
        payload = MEM_TABLE.encode(MemTable((SOUND, replace(SOUND, gpa=2 * GPA, uva=UVA + GPA))))
        yield attack.ask(Request.SET_MEM_TABLE, payload[:-32], [fd, fd])


@CASES.case("P43", "a region of size 0", REFUSED)
def empty_region(target: Target) -> Iterator[Outcome]:
    yield from tables(target, replace(SOUND, size=0))


@CASES.case("P44", "regions whose offset in the file and size overflow", REFUSED)
def overflowing_offset(target: Target) -> Iterator[Outcome]:
    yield from tables(target, *(replace(SOUND, offset=offset) for offset in (END - SIZE, END - 0x1000, END - 1,
                                                                             (1 << 63) - SIZE)))


@CASES.case("P45", "regions that reach beyond 64 bits of guest and of front-end addresses", REFUSED)
def overflowing_address(target: Target) -> Iterator[Outcome]:
    yield from tables(target, replace(SOUND, gpa=END - 0x1000), replace(SOUND, uva=END - 0x1000))


@CASES.case("P46", "two regions that overlap in guest addresses, and two in front-end addresses", REFUSED)
def overlap(target: Target) -> Iterator[Outcome]:
    for other in Region(GPA + 0x1000, SIZE, 2 * UVA, 0), Region(2 * GPA, SIZE, UVA + 0x1000, 0):
        with target.attack() as attack, memfd(SIZE) as fd:
            yield table(attack, SOUND, other, fds=[fd, fd])


@CASES.case("P47", "a file shorter than its region", REFUSED)
def short_file(target: Target) -> Iterator[Outcome]:
    for size in 0, SIZE - 1:
        with target.attack() as attack, memfd(size) as fd:
            yield table(attack, SOUND, fds=[fd])


@CASES.case("P48", "guest memory cut to nothing while rings run, then kicks", ANY)
def vanishing_memory(target: Target) -> Iterator[Outcome]:
    with target.attack(Stage.STARTED) as attack:
        yield attack.transmits()
        os.ftruncate(attack.memory.regions[0].fd, 0)  # our own mapping is not touched again
        for index in 0, 1:
            os.eventfd_write(attack.queue(index).kick_fd, 1)
        yield attack.alive()
        attack.memory.truncate(0)


@CASES.case("P49", "a region's descriptor that is a socket, pipe, eventfd, directory, /dev/zero or /dev/null", REFUSED)
def no_file(target: Target) -> Iterator[Outcome]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        fds = [*os.pipe(), os.eventfd(0), os.open("/", os.O_RDONLY), os.open("/dev/zero", os.O_RDWR),
               os.open("/dev/null", os.O_RDWR)]
        try:
            for fd in [ours.fileno(), *fds]:
                with target.attack() as attack:
                    yield table(attack, SOUND, fds=[fd])
        finally:
            for fd in fds:
                os.close(fd)


@CASES.case("P50", "a region's file that is read-only, and one sealed against writing", REFUSED)
def unwritable_file(target: Target) -> Iterator[Outcome]:
    with target.attack() as attack, memfd(SIZE) as fd:
        read_only = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
        try:
            yield table(attack, SOUND, fds=[read_only])
        finally:
            os.close(read_only)
    with target.attack() as attack, memfd(SIZE, fcntl.F_SEAL_WRITE) as fd:
        yield table(attack, SOUND, fds=[fd])


@CASES.case("P51", "a region's file on a disk, whose pages may never arrive", ANY)
def file_on_disk(target: Target) -> Iterator[Outcome]:
    with target.attack() as attack, tempfile.TemporaryFile() as file:
        file.truncate(SIZE)
        yield table(attack, SOUND, fds=[file.fileno()])


@CASES.case("P52", "a region of 64 TiB, none of it there yet", REFUSED)
def immense_region(target: Target) -> Iterator[Outcome]:
    with target.attack() as attack, memfd(1 << 46) as fd:
        yield table(attack, Region(0, 1 << 46, 0, 0), fds=[fd])


@CASES.case("P53", "a region 1 MiB into its file", SERVED)
def offset_in_the_file(target: Target) -> Iterator[Outcome]:
    with target.attack() as attack, memfd((1 << 20) + SIZE) as fd:
        yield table(attack, replace(SOUND, offset=1 << 20), fds=[fd])


@CASES.case("P53", "a region that begins in the middle of a page of its file", ANY)
def offset_in_a_page(target: Target) -> Iterator[Outcome]:
    with target.attack() as attack, memfd(2 * SIZE) as fd:
        yield table(attack, replace(SOUND, offset=0x123), fds=[fd])


@CASES.case("P54", "two regions of one file", SERVED)
def one_file(target: Target) -> Iterator[Outcome]:
    with target.attack() as attack, memfd(2 * SIZE) as fd:
        yield table(attack, SOUND, Region(2 * GPA, SIZE, UVA + GPA, SIZE), fds=[fd, fd])


@CASES.case("P57", "a table whose second region cannot be mapped", REFUSED)
def half_mapped(target: Target) -> Iterator[Outcome]:
    with target.attack(Stage.SHARED) as attack, memfd(SIZE) as fd, closing(socket.socket()) as sock:
        yield table(attack, SOUND, Region(2 * GPA, SIZE, UVA + GPA, 0), fds=[fd, sock.fileno()])


# ----------------------------------------------------------------------------------------- region by region


@CASES.case("P59", "REM_MEM_REG of a region that was never added", REFUSED)
def remove_nothing(target: Target) -> Iterator[Outcome]:
    with target.attack(Stage.SHARED) as attack:
        attack.needs(ProtocolFeature.CONFIGURE_MEM_SLOTS)
        yield attack.ask(Request.REM_MEM_REG, SINGLE_REGION.encode(SOUND))


@CASES.case("P59", "REM_MEM_REG of the memory that rings lie in, then kicks", ANY)
def remove_live_memory(target: Target) -> Iterator[Outcome]:
    with target.attack(Stage.STARTED) as attack:
        attack.needs(ProtocolFeature.CONFIGURE_MEM_SLOTS)
        region = attack.memory.regions[0]
        yield attack.ask(Request.REM_MEM_REG, SINGLE_REGION.encode(Region(region.gpa, region.size, region.uva, 0)))
        attack.driver.transmit(bytes(60))
        yield attack.alive()


@CASES.case("P60", "500 times ADD_MEM_REG and REM_MEM_REG", SERVED)
def add_and_remove(target: Target) -> Iterator[Outcome]:
    with target.attack(Stage.SHARED) as attack, memfd(SIZE) as fd:
        attack.needs(ProtocolFeature.CONFIGURE_MEM_SLOTS)
        payload = SINGLE_REGION.encode(SOUND)
        pair = [(encode(Request.ADD_MEM_REG, payload), [fd]), (encode(Request.REM_MEM_REG, payload), [])]
        yield attack.many(pair * 500)


# ------------------------------------------------------------------------------------------------ dirty log


def log(attack: Attack, size: int, offset: int, fd: int) -> Outcome:
    """SET_LOG_BASE. Raises NotOffered."""
    attack.needs(ProtocolFeature.LOG_SHMFD)
    return attack.ask(Request.SET_LOG_BASE, u64(size) + u64(offset), [fd])


@CASES.case("P87", "a dirty log of size 0, and two whose size and offset overflow", REFUSED)
def senseless_log(target: Target) -> Iterator[Outcome]:
    for size, offset in (0, 0), (0x1000, END - 0x800), (END - 0x1000, 0x1000):
        with target.attack(Stage.SHARED) as attack, memfd(SIZE) as fd:
            yield log(attack, size, offset, fd)


@CASES.case("P88", "a file shorter than the dirty log", REFUSED)
def short_log(target: Target) -> Iterator[Outcome]:
    with target.attack(Stage.SHARED) as attack, memfd(SIZE) as fd:
        yield log(attack, SIZE, 0x1000, fd)


@CASES.case("P92", "SET_LOG_BASE 50 times", ANY - {Outcome.CLOSED})
def log_after_log(target: Target) -> Iterator[Outcome]:
    with target.attack(Stage.STARTED) as attack, memfd(SIZE) as fd:
        for _ in range(50):
            yield log(attack, SIZE, 0, fd)


@CASES.case("P94", "SET_LOG_FD with a pipe nobody reads", ANY)
def log_pipe(target: Target) -> Iterator[Outcome]:
    read, write = os.pipe()
    try:
        with target.attack(Stage.STARTED) as attack:
            os.close(read)
            yield attack.ask(Request.SET_LOG_FD, fds=[write])
    finally:
        os.close(write)
