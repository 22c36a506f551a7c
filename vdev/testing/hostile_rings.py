"""What a hostile front-end does with rings and their descriptors (rows P62 to P86).

Every function is the ``act`` of a case, see vdev/testing/initiator.py."""

import os
import select
import socket
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

from vdev.testing.hostile_messages import base_is, u64
from vdev.testing.initiator import ANY, FRAME, REFUSED, SERVED, Attack, Cases, Outcome, Stage, Target
from vdev.testing.scripted import ring_setup
from vhost_user.frontend import RingSetup, SharedRegion
from vhost_user.spec import Request
from vhost_user.wire import VRING_ADDR, VringAddr

CASES = Cases()


def address(attack: Attack, ring: RingSetup, index: int = 1) -> Outcome:
    """SET_VRING_ADDR of ring ``index``."""
    addr = VringAddr(index, 0, desc=ring.desc, used=ring.used, avail=ring.avail, log=0)
    return attack.ask(Request.SET_VRING_ADDR, VRING_ADDR.encode(addr))


def started(attack: Attack, ring: RingSetup, index: int = 1) -> Outcome:
    """All that starts ring ``index`` -> what became of the first message that was not taken, else of the last."""
    attack.ready()
    for step in (lambda: attack.ring(Request.SET_VRING_NUM, index, ring.num), lambda: address(attack, ring, index),
                 lambda: attack.ask(Request.SET_VRING_KICK, u64(index), [ring.kick])):
        outcome = step()
        if outcome is not Outcome.TAKEN:
            break
    return outcome


def misplaced(target: Target, **changed: int) -> Iterator[Outcome]:
    """Ring 1 with one of its parts after the other ``changed`` by as many bytes, or at another place."""
    for part, where in changed.items():
        with target.attack(Stage.SHARED) as attack:
            ring = ring_setup(attack.queue(1))
            place = where if where >= 1 << 32 or where == 0 else getattr(ring, part) + where
            yield started(attack, replace(ring, **{part: place}))


@CASES.case("P62", "rings 0xFFFF, 0x10000, 0x10001 and 0xFFFFFFFF", REFUSED)
def no_such_ring(target: Target) -> Iterator[Outcome]:
    for index in 0xFFFF, 0x10000, 0x10001, 0xFFFFFFFF:
        with target.attack() as attack:
            yield attack.ring(Request.SET_VRING_NUM, index, 64)


@CASES.case("P63", "queue size 0", REFUSED)
def size_zero(target: Target) -> Iterator[Outcome]:
    with target.attack() as attack:
        yield attack.ring(Request.SET_VRING_NUM, 0, 0)


@CASES.case("P64", "queue sizes 32769 and 65536, and 3 for a split ring", REFUSED)
def impossible_size(target: Target) -> Iterator[Outcome]:
    for size in 3, 32769, 65536:
        with target.attack(Stage.SHARED) as attack:
            yield started(attack, replace(ring_setup(attack.queue(1)), num=size))


@CASES.case("P65", "another size for a ring that runs", REFUSED)
def size_of_a_running_ring(target: Target) -> Iterator[Outcome]:
    with target.attack(Stage.STARTED) as attack:
        yield attack.ring(Request.SET_VRING_NUM, 1, 128)


@CASES.case("P67", "each part of a ring in no region", REFUSED)
def unmapped(target: Target) -> Iterator[Outcome]:
    yield from misplaced(target, desc=0x7D00_0000_0000, avail=0x7D00_0000_0000, used=0x7D00_0000_0000)


@CASES.case("P68", "each part of a ring ending outside its region", REFUSED)
def half_mapped(target: Target) -> Iterator[Outcome]:
    for part in "desc", "avail", "used":
        with target.attack(Stage.SHARED) as attack:
            region = attack.memory.regions[0]
            yield started(attack, replace(ring_setup(attack.queue(1)), **{part: region.uva + region.size - 16}))


@CASES.case("P69", "each part of a ring across the border of two regions", REFUSED)
def across_regions(target: Target) -> Iterator[Outcome]:
    for part in "desc", "avail", "used":
        with target.attack() as attack:
            region = attack.memory.regions[0]
            half = region.size // 2
            shared = SharedRegion(region.fd, region.gpa, region.uva, half)
            attack.front_end.set_mem_table([shared, replace(shared, gpa=region.gpa + half, uva=region.uva + half,
                                                            offset=half)])
            yield started(attack, replace(ring_setup(attack.queue(1)), **{part: region.uva + half - 16}))


@CASES.case("P70", "each part of a ring one byte further", REFUSED)
def unaligned(target: Target) -> Iterator[Outcome]:
    yield from misplaced(target, desc=1, avail=1, used=1)


@CASES.case("P71", "both queues at one address, and all parts of one ring at one address", ANY)
def shared_places(target: Target) -> Iterator[Outcome]:
    with target.attack(Stage.SHARED) as attack:
        ring = ring_setup(attack.queue(0))
        yield started(attack, ring, 0)
        yield started(attack, replace(ring_setup(attack.queue(1)), desc=ring.desc, avail=ring.avail, used=ring.used))
        yield kicked(attack)
    with target.attack(Stage.SHARED) as attack:
        attack.start(0)  # some back-ends serve a pair or nothing
        ring = ring_setup(attack.queue(1))
        yield started(attack, replace(ring, avail=ring.desc, used=ring.desc))
        yield kicked(attack)


@CASES.case("P72", "a used ring on the descriptors", ANY)
def used_on_descriptors(target: Target) -> Iterator[Outcome]:
    with target.attack(Stage.SHARED) as attack:
        attack.start(0)
        ring = ring_setup(attack.queue(1))
        yield started(attack, replace(ring, used=ring.desc))
        yield kicked(attack)


def kicked(attack: Attack) -> Outcome:
    """Something to do on ring 1, and is the back-end still there?"""
    attack.driver.offer(FRAME)
    attack.driver.transmitq.publish()
    os.eventfd_write(attack.queue(1).kick_fd, 1)
    return attack.alive()


@CASES.case("P73", "SET_VRING_ADDR before there is any memory", ANY)
def address_without_memory(target: Target) -> Iterator[Outcome]:
    with target.attack() as attack:
        yield address(attack, ring_setup(attack.queue(1)))


@CASES.case("P74", "the same addresses again for a ring that runs", SERVED)
def same_address(target: Target) -> Iterator[Outcome]:
    with target.attack(Stage.STARTED) as attack:
        yield address(attack, ring_setup(attack.queue(1)))
        yield attack.transmits()


@CASES.case("P74", "other addresses for a ring that runs", REFUSED)
def other_address(target: Target) -> Iterator[Outcome]:
    with target.attack(Stage.STARTED) as attack:
        yield address(attack, ring_setup(attack.queue(0)))


@CASES.case("P75", "a base of 65536 for a split ring, and another for one that runs", REFUSED)
def impossible_base(target: Target) -> Iterator[Outcome]:
    with target.attack(Stage.SHARED) as attack:
        yield attack.ring(Request.SET_VRING_BASE, 0, 65536)
    with target.attack(Stage.STARTED) as attack:
        yield attack.ring(Request.SET_VRING_BASE, 1, 5)


@CASES.case("P76", "GET_VRING_BASE of a ring that was never set up", SERVED)
def base_of_nothing(target: Target) -> Iterator[Outcome]:
    with target.attack() as attack:
        yield base_is(attack, 0)


@CASES.case("P77", "GET_VRING_BASE with frames in the ring", SERVED)
def base_under_load(target: Target) -> Iterator[Outcome]:
    with target.attack(Stage.STARTED) as attack:
        for _ in range(30):
            attack.driver.offer(FRAME)
        attack.driver.transmitq.submit()
        base = attack.front_end.get_vring_base(1)
        # What was taken is used, and what was not stays for whoever comes next.
        yield Outcome.ANSWERED if base == attack.driver.transmitq.ring.used.idx else Outcome.REFUSED


@CASES.case("P78", "SET_VRING_KICK of a ring of which nothing is known", ANY)
def kick_without_ring(target: Target) -> Iterator[Outcome]:
    with target.attack(Stage.SHARED) as attack:
        yield attack.ask(Request.SET_VRING_KICK, u64(1), [attack.queue(1).kick_fd])
        os.eventfd_write(attack.queue(1).kick_fd, 1)
        yield attack.alive()


@CASES.case("P79", "another kick descriptor for a ring that runs", ANY)
def kick_again(target: Target) -> Iterator[Outcome]:
    with target.attack(Stage.STARTED) as attack:
        for _ in range(20):
            yield attack.ask(Request.SET_VRING_KICK, u64(1), [attack.queue(1).kick_fd])


@CASES.case("P80", "kick descriptors that are a pipe, a file, a socket, an epoll and the connection itself", REFUSED)
def no_eventfd(target: Target) -> Iterator[Outcome]:
    ours, theirs = socket.socketpair()
    read, write = os.pipe()
    with ours, theirs, closing(select.epoll()) as epoll:
        try:
            for fd in read, write, ours.fileno(), epoll.fileno(), None, -1:
                with target.attack(Stage.SHARED) as attack:
                    own = {None: attack.front_end.transport.fileno(), -1: attack.memory.regions[0].fd}
                    yield started(attack, replace(ring_setup(attack.queue(1)), kick=own.get(fd, fd)))
        finally:
            os.close(read)
            os.close(write)


@CASES.case("P81", "a kick pipe whose writer is gone", ANY)
def dead_kick(target: Target) -> Iterator[Outcome]:
    read, write = os.pipe()
    os.close(write)
    try:
        with target.attack(Stage.SHARED) as attack:
            yield started(attack, replace(ring_setup(attack.queue(1)), kick=read))
            yield attack.alive()
    finally:
        os.close(read)


def called(attack: Attack, fd: int) -> Iterator[Outcome]:
    """Ring 1 gets ``fd`` to call the driver with, and something to call for."""
    yield attack.ask(Request.SET_VRING_CALL, u64(1), [fd])
    attack.driver.transmit(FRAME)
    yield attack.alive()


@CASES.case("P82", "a call eventfd that is full and blocks", ANY)
def full_call(target: Target) -> Iterator[Outcome]:
    fd = os.eventfd(0)
    os.eventfd_write(fd, (1 << 64) - 2)
    try:
        with target.attack(Stage.STARTED) as attack:
            yield from called(attack, fd)
            os.set_blocking(fd, True)  # the description is shared: whatever was set there can be unset
            attack.driver.transmit(FRAME)
            yield attack.alive()
    finally:
        os.close(fd)


@CASES.case("P83", "a call pipe that nobody reads", ANY)
def dead_call(target: Target) -> Iterator[Outcome]:
    read, write = os.pipe()
    os.close(read)
    try:
        with target.attack(Stage.STARTED) as attack:
            yield from called(attack, write)
    finally:
        os.close(write)


@CASES.case("P84", "one eventfd for kick and call of both rings", ANY)
def one_eventfd(target: Target) -> Iterator[Outcome]:
    with target.attack(Stage.SHARED) as attack:
        fd = attack.queue(1).kick_fd
        for index in 0, 1:
            yield started(attack, replace(ring_setup(attack.queue(index)), kick=fd), index)
            yield attack.ask(Request.SET_VRING_CALL, u64(index), [fd])
            yield attack.ring(Request.SET_VRING_ENABLE, index, 1)
        yield kicked(attack)


@CASES.case("P85", "SET_VRING_ERR 100 times", SERVED)
def err_again(target: Target) -> Iterator[Outcome]:
    with target.attack(Stage.STARTED) as attack:
        for _ in range(100):
            yield attack.ask(Request.SET_VRING_ERR, u64(1), [attack.queue(1).call_fd])


@CASES.case("P86", "a frame and a kick before the ring is enabled, and no kick after", SERVED)
def early_kick(target: Target) -> Iterator[Outcome]:
    with target.attack(Stage.SHARED) as attack:
        attack.start(0)
        attack.driver.transmit(FRAME)
        attack.start(1)
        yield Outcome.TAKEN if attack.driver.reclaim_all(target.seconds) else Outcome.SILENT
