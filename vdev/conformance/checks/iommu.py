"""A driver behind an IOMMU, and the back-end's own channel."""

import select
import time
from collections.abc import Callable
from dataclasses import replace

from ring.driver import Buffer
from vdev.conformance import frames
from vdev.conformance.bench import Bench, Stage
from vdev.conformance.verdict import Checks, NotReachable, expect
from vdev.net.features import Feature as F
from vdev.testing.netdriver import NetHeader
from vdev.testing.scripted import ring_setup, shared_regions
from vhost_user.codec import encode
from vhost_user.frontend import RequestRefused
from vhost_user.spec import BackendRequest, IotlbType, ProtocolFeature
from vhost_user.wire import IOTLB, U64, U64_LAYOUT, Iotlb

CHECKS = Checks()
PAGE = 4096
SHIFT = 1 << 40  # from the driver's addresses to guest-physical ones
READ, WRITE = 1, 2
NEEDS = [F.ACCESS_PLATFORM, ProtocolFeature.BACKEND_REQ]


class Behind:
    """A session whose driver is behind an IOMMU, its rings started; a context manager.

    heard: what the back-end asked or told, in order. access: what may be done with a page, by its address, where it is
    not reading and writing. answers: whether misses are answered.
    """

    def __init__(self, bench: Bench) -> None:
        self.heard: list[Iotlb] = []
        self.others: list[int] = []
        self.access: dict[int, int] = {}
        self.answers = True
        self.session = session = bench.session(Stage.NEGOTIATED, needs=NEEDS)
        session.front_end.set_mem_table([replace(region, gpa=region.gpa + SHIFT)
                                         for region in shared_regions(session.memory)])
        for index, queue in enumerate(session.queues):
            ring = ring_setup(queue, as_driver=True)
            session.front_end.set_vring_num(index, ring.num)
            session.front_end.set_vring_base(index, ring.base)
            session.front_end.set_vring_addr(index, ring.desc, ring.avail, ring.used)
            session.front_end.set_vring_call(index, ring.call)
            session.start(index)
            session.enable(index)
        session.driver.fill()

    def serve(self, until: Callable[[], bool], seconds: float | None = None) -> bool:
        """Answer the back-end until ``until()`` -> False if that is not so after ``seconds`` (None: the bench's)."""
        channel = self.session.front_end.backend_channel
        poller = select.poll()
        poller.register(channel, select.POLLIN)
        deadline = time.monotonic() + (self.session.bench.seconds if seconds is None else seconds)
        while not until():
            if time.monotonic() > deadline:
                return False
            if poller.poll(5) and (message := channel.receive()) is not None:
                if message.request != BackendRequest.IOTLB_MSG:
                    self.others.append(message.request)
                    continue
                asked = IOTLB.decode(message.payload)
                self.heard.append(asked)
                self.session.note(f"it tells type {asked.kind}, iova {asked.iova:#x}, access {asked.access}")
                done = asked.kind == IotlbType.MISS and self.answers and self.translate(asked.iova)
                if message.need_reply:
                    answer = U64_LAYOUT.encode(U64(0 if done else 1))
                    channel.send(encode(BackendRequest.IOTLB_MSG, answer, reply=True))
        return True

    def translate(self, iova: int) -> bool:
        """Tell the translation of the page of ``iova``."""
        page = iova // PAGE * PAGE
        region = self.session.memory.regions[0]
        mine = region.gpa <= page < region.gpa + region.size
        access = self.access.get(page, READ | WRITE if mine else 0)
        if access:
            self.session.front_end.iotlb_update(page, PAGE, self.session.memory.uva(page), access)
        return bool(access)

    def transmits(self, mark: bytes | None = None) -> bool:
        """A frame is taken, with misses answered."""
        self.session.driver.offer(frames.plain(mark or frames.tag()))
        self.session.driver.transmitq.publish()
        self.session.driver.transmitq.kick()
        return self.serve(lambda: self.session.driver.reclaim() > 0)

    def misses(self) -> list[Iotlb]:
        """What translations were asked for."""
        return [message for message in self.heard if message.kind == IotlbType.MISS]

    def __enter__(self) -> "Behind":
        return self

    def __exit__(self, *_: object) -> None:
        self.session.close()


@CHECKS.row("VU-IOTLB-B-01")
def updates_are_answered(bench: Bench) -> None:
    """Sends an update and an invalidation, both of which are answered with zero, and an update of memory that was not
    shared, which is not."""
    with bench.session(Stage.SHARED, needs=NEEDS) as session:
        region = session.memory.regions[0]
        session.front_end.iotlb_update(region.gpa, PAGE, region.uva)
        session.front_end.iotlb_invalidate(region.gpa, PAGE)
        try:
            session.front_end.iotlb_update(region.gpa, PAGE, region.uva + (1 << 44))
        except RequestRefused:
            return
        expect(False, "an update to memory that was never shared was answered with zero")


@CHECKS.row("VU-IOTLB-B-02", both=True)
def addresses_are_translated(bench: Bench) -> None:
    """The driver's addresses lie elsewhere than guest memory was shared: frames go through by translation alone."""
    with Behind(bench) as behind:
        expect(behind.transmits(), "a frame was not taken, with translations told as they were asked for")
        if bench.wire is not None and bench.wire.reflects:
            mark = frames.tag()
            sent = frames.plain(mark, 700)
            behind.session.driver.offer(sent)
            behind.session.driver.transmitq.submit()
            got = []
            behind.serve(lambda: got.append(behind.session.driver.receive()) or got[-1] is not None
                         and mark in got[-1].frame)
            expect(got[-1] is not None and got[-1].frame == sent, "the frame did not come back whole")


@CHECKS.row("VU-IOTLB-B-03")
def misses_are_told(bench: Bench) -> None:
    """Tells no translation: the back-end asks for those of ring and frame, with the access it wants."""
    with Behind(bench) as behind:
        expect(behind.serve(lambda: bool(behind.misses())), "no translation was asked for")
        expect(behind.transmits(), "a frame was not taken")
        region = behind.session.memory.regions[0]
        for miss in behind.misses():
            expect(region.gpa <= miss.iova < region.gpa + region.size, f"iova {miss.iova:#x} is none of the driver's")
            expect(miss.access in (1, 2, 3), f"a miss wants access {miss.access}")


@CHECKS.row("VU-IOTLB-B-04")
def denials_are_told(bench: Bench) -> None:
    """Lets the page of a frame be written only: the back-end tells a failed access."""
    with Behind(bench) as behind:
        expect(behind.transmits(), "a frame was not taken")
        gpa = behind.session.memory.alloc(PAGE, align=PAGE)
        behind.access[gpa] = WRITE
        behind.session.memory.write(gpa, NetHeader().pack() + frames.plain(frames.tag()))
        behind.session.driver.transmitq.add([Buffer(gpa, 72)])
        behind.session.driver.transmitq.submit()
        told = behind.serve(lambda: any(message.kind == IotlbType.ACCESS_FAIL for message in behind.heard))
        expect(told, "reading a page that may only be written was not told as a failed access")


@CHECKS.row("VU-IOTLB-B-05")
def invalidated_is_not_used(bench: Bench) -> None:
    """Invalidates everything: the next frame is taken after translations were asked for anew, and not before."""
    with Behind(bench) as behind:
        for _ in range(3):
            expect(behind.transmits(), "a frame was not taken")
        region = behind.session.memory.regions[0]
        behind.session.front_end.iotlb_invalidate(region.gpa, region.size)
        behind.heard.clear()
        behind.answers = False
        behind.session.driver.offer(frames.plain(frames.tag()))
        behind.session.driver.transmitq.publish()
        behind.session.driver.transmitq.kick()
        used = behind.serve(lambda: behind.session.driver.reclaim() > 0, bench.quiet * 2)
        expect(not used, "a frame was taken by a translation that had been invalidated")
        expect(bool(behind.misses()), "after an invalidation no translation was asked for")


@CHECKS.row("VU-IOTLB-B-06")
def misses_may_ask_for_an_answer(bench: Bench) -> None:
    """Answers misses that have need_reply, after the update: frames go on."""
    with Behind(bench) as behind:
        for _ in range(5):
            expect(behind.transmits(), "a frame was not taken")


@CHECKS.row("VU-BCH-B-01")
def requests_go_over_the_channel(bench: Bench) -> None:
    """Has the back-end ask for translations: its requests come over the channel it was given, and nothing but replies
    over the socket."""
    with Behind(bench) as behind:
        expect(behind.serve(lambda: bool(behind.misses())), "nothing came over the channel")
        expect(behind.transmits(), "a frame was not taken")
        behind.session.barrier()
        expect(behind.session.front_end.silent(bench.quiet), "a message came over the socket")


def told_without(bench: Bench, kind: BackendRequest) -> None:
    """No message of ``kind`` comes over the channel of a session that did not agree on it. Raises Broken."""
    bench.needs(ProtocolFeature.BACKEND_REQ)
    with bench.session(needs=[ProtocolFeature.BACKEND_REQ]) as session:
        for _ in range(5):
            session.transmit(frames.plain(frames.tag()))
        session.settle()
        while (message := session.front_end.backend_channel.receive()) is not None:
            expect(message.request != kind, f"{kind.name} came, which was not agreed on")


@CHECKS.row("VU-BCH-B-04")
def no_host_notifier(bench: Bench) -> None:
    """Without HOST_NOTIFIER sends frames: VRING_HOST_NOTIFIER_MSG does not come."""
    told_without(bench, BackendRequest.VRING_HOST_NOTIFIER_MSG)


@CHECKS.row("VU-BCH-B-05")
def no_iotlb_message(bench: Bench) -> None:
    """Without ACCESS_PLATFORM sends frames: IOTLB_MSG does not come."""
    told_without(bench, BackendRequest.IOTLB_MSG)


@CHECKS.row("VU-BCH-B-02")
def no_descriptors(bench: Bench) -> None:
    """Without BACKEND_SEND_FD has the back-end ask for translations: no descriptor comes with its requests."""
    if bench.protocol >> ProtocolFeature.BACKEND_SEND_FD & 1 and not bench.offers(F.ACCESS_PLATFORM):
        raise NotReachable("nothing that the suite does makes this back-end send a request")
    with Behind(bench) as behind:
        channel = behind.session.front_end.backend_channel
        poller = select.poll()
        poller.register(channel, select.POLLIN)
        expect(bool(poller.poll(bench.seconds * 1000)), "nothing came over the channel")
        message = channel.receive()
        with message.fds as fds:
            expect(len(fds) == 0, f"{len(fds)} descriptors came with {message.request}")
