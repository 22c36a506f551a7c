"""vdev/iommu.py: a running device whose guest's driver is behind an IOMMU. The front-end is scripted."""

import contextlib
import os
import select
import socket

import pytest

from ring.driver import Buffer
from vdev.net.features import Feature, mask
from vdev.testing.iommu import PAGE, READ, WRITE, IommuGuest
from vdev.testing.netdriver import NetHeader
from vdev.testing.served import FRAME, ServedDevice
from vhost_user.frontend import FrontEnd, RequestRefused
from vhost_user.handshake import QEMU_7_2, QEMU_10_0, QEMU_11_1
from vhost_user.spec import IotlbType, ProtocolFeature, Request

RING = mask(Feature.VERSION_1, Feature.MRG_RXBUF, Feature.EVENT_IDX, Feature.INDIRECT_DESC)
PACKED = mask(Feature.RING_PACKED)
FORMATS = pytest.mark.parametrize("ring", [0, PACKED], ids=["split", "packed"])


@pytest.fixture
def served():
    with ServedDevice() as device:
        yield device


@pytest.fixture
def guest(served):
    with IommuGuest(served.connect(), features=RING) as scripted:
        yield scripted


def arrived(wire) -> bool:
    return bool(select.select([wire], [], [], 0)[0])


def send(served, guest, frame=FRAME, **options) -> None:
    """One frame from the guest reaches the wire, and its chain comes back."""
    guest.driver.transmit(frame, **options)
    assert guest.serve(lambda: arrived(served.port.wire[0]))
    assert served.port.wire[0].recv(1 << 17)[NetHeader.SIZE:] == frame
    assert guest.serve(lambda: guest.driver.reclaim() or not guest.driver.transmitq.outstanding)


def get(served, guest, frame=FRAME) -> None:
    """One frame from the wire reaches the guest."""
    received = []
    served.port.wire[0].send(NetHeader().pack() + frame)
    assert guest.serve(lambda: (one := guest.driver.receive()) is not None and (received.append(one) or True))
    assert received[0].frame == frame


def own_page(guest, frame: bytes = FRAME) -> Buffer:
    """A frame to be sent, in a page that nothing else lies in."""
    data = NetHeader().pack() + frame
    page = guest.memory.alloc(PAGE, PAGE)
    guest.memory.write(page, data)
    return Buffer(page, len(data))


def send_buffer(served, guest, buffer: Buffer) -> bytes:
    """Send what lies in ``buffer`` -> the frame that reached the wire."""
    guest.driver.transmitq.add([buffer])
    guest.driver.transmitq.submit()
    assert guest.serve(lambda: arrived(served.port.wire[0]))
    assert guest.serve(lambda: guest.driver.reclaim() or not guest.driver.transmitq.outstanding)
    return served.port.wire[0].recv(1 << 17)[NetHeader.SIZE:]


# ------------------------------------------------------------------------------------------ frames


@FORMATS
@pytest.mark.parametrize("version", [QEMU_7_2, QEMU_10_0, QEMU_11_1], ids=["qemu-7.2", "qemu-10.0", "by-gpa"])
def test_VU_IOTLB_B_02_frames_pass_both_ways_with_addresses_that_are_iovas(served, ring, version) -> None:
    with IommuGuest(served.connect(), features=RING | ring, version=version) as guest:
        if guest.front_end.has(ProtocolFeature.GPA_ADDRESSES):
            guest.uva = lambda iova: iova + (1 << 40)
        for _ in range(100):  # around the ring, which has 64 entries
            send(served, guest)
            get(served, guest)
        assert len({miss.iova for miss in guest.misses()}) == len(guest.misses())


@FORMATS
def test_frame_over_many_pages_and_through_an_indirect_table(served, ring) -> None:
    long = bytes(range(256)) * 200
    with IommuGuest(served.connect(), features=RING | ring) as guest:
        for _ in range(3):
            send(served, guest, FRAME[:14] + long, cuts=(12, 500, 5000, 20000))
            get(served, guest, FRAME[:14] + long)
        assert served.device.stats()[0].bad_chains == 0


def test_frames_wait_in_order_for_their_translations(served, guest) -> None:
    """All are there before any answer is given; none is lost, none overtakes another."""
    frames = [FRAME + bytes([number]) * 3000 for number in range(20)]
    for frame in frames:
        guest.driver.offer(frame)
    guest.driver.transmitq.submit()
    seen = []
    for _ in frames:
        assert guest.serve(lambda: arrived(served.port.wire[0]))
        seen.append(served.port.wire[0].recv(1 << 17)[NetHeader.SIZE:])
    assert seen == frames


# ------------------------------------------------------------------------------- asking and answering


@FORMATS
def test_VU_IOTLB_B_03_a_missing_translation_is_asked_for(served, ring) -> None:
    with IommuGuest(served.connect(), features=RING | ring) as guest:
        queues = (guest.driver.receiveq, guest.driver.transmitq)
        assert guest.serve(lambda: len(guest.heard) == 2)  # one a ring: its first part
        parts = {queue.ring.areas[0].gpa for queue in queues}
        assert {(miss.iova, miss.access) for miss in guest.misses()} == {
            (part, READ | WRITE if ring else READ) for part in parts}
        buffer = own_page(guest)
        assert send_buffer(served, guest, buffer) == FRAME
        assert [miss.access for miss in guest.misses() if miss.iova == buffer.gpa] == [READ]


def test_VU_IOTLB_B_05_what_was_invalidated_is_asked_for_again(served, guest) -> None:
    buffer = own_page(guest)
    for times in (1, 1, 2, 3):
        if times > 1:
            guest.front_end.iotlb_invalidate(buffer.gpa, PAGE)
        assert send_buffer(served, guest, buffer) == FRAME
        assert [miss.iova for miss in guest.misses()].count(buffer.gpa) == times


@FORMATS
def test_ring_whose_own_pages_are_taken_back_goes_on_where_it_was(served, ring) -> None:
    with IommuGuest(served.connect(), features=RING | ring) as guest:
        for _ in range(5):
            send(served, guest)
            get(served, guest)
            guest.front_end.iotlb_invalidate(0, 0)  # everything: 2^64 bytes
            assert not served.call(served.device.engine.running)
        send(served, guest)
        assert served.device.stats()[0].frames == 6 and served.device.stats()[1].frames == 5


@FORMATS
def test_ring_that_is_written_down_is_found_behind_the_iommu(tmp_path, ring) -> None:
    with (ServedDevice(journal=tmp_path / "journal") as served,
          IommuGuest(served.connect(), features=RING | ring) as guest):
        for _ in range(3):
            send(served, guest)
            get(served, guest)
            guest.front_end.iotlb_invalidate(0, 0)
        assert not served.lines("no-journal") and not served.lines("ring-taken-over")


def test_ring_that_waits_answers_its_base(served, guest) -> None:
    for _ in range(3):
        send(served, guest)
    guest.front_end.iotlb_invalidate(0, 0)
    assert guest.front_end.get_vring_base(1) == 3


def test_a_translation_that_moves_is_followed(served, guest) -> None:
    """The same iova is given other memory, without an invalidation: the update replaces what was there."""
    frames = [FRAME[:14] + fill * 100 for fill in (b"a", b"b")]
    buffers = [own_page(guest, frame) for frame in frames]
    send(served, guest)
    for buffer, frame in zip(buffers, frames, strict=True):
        guest.front_end.iotlb_update(buffers[0].gpa, PAGE, guest.uva(buffer.gpa))
        assert send_buffer(served, guest, buffers[0]) == frame


@FORMATS
def test_VU_IOTLB_B_04_what_the_iommu_does_not_allow_is_reported_and_dropped(served, ring) -> None:
    with IommuGuest(served.connect(), features=RING | ring, buffers=0) as guest:
        page = guest.memory.alloc(PAGE, PAGE)
        guest.access[page] = READ
        guest.driver.receiveq.add([Buffer(page, PAGE, writable=True)])
        guest.driver.fill(8)
        served.port.wire[0].send(NetHeader().pack() + FRAME)
        used = []
        assert guest.serve(lambda: used.extend(guest.driver.receiveq.collect_all()) or len(used) == 2)
        assert [len(completion.data) for completion in used] == [0, NetHeader.SIZE + len(FRAME)]
        assert guest.serve(lambda: any(message.kind == IotlbType.ACCESS_FAIL for message in guest.heard))
        (denied,) = [message for message in guest.heard if message.kind == IotlbType.ACCESS_FAIL]
        assert (denied.iova, denied.access) == (page, WRITE)
        line = served.wait_for("access-denied")
        assert line.startswith("receiveq 0: a chain was dropped") and f"write to its buffer at iova {page:#x}" in line
        assert served.device.stats()[1].bad_chains == 1
        assert guest.memory.read(page, PAGE) == bytes(PAGE)
        send(served, guest)


def test_what_has_no_translation_is_dropped_and_the_ring_goes_on(served, guest) -> None:
    buffer = own_page(guest)
    guest.access[buffer.gpa] = 0
    guest.driver.transmitq.add([buffer])
    send(served, guest)
    assert served.device.stats()[0].bad_chains == 1
    guest.access[buffer.gpa] = READ  # a driver may map a page without telling anybody: it is asked for anew
    assert send_buffer(served, guest, buffer) == FRAME
    assert [miss.iova for miss in guest.misses()].count(buffer.gpa) == 2


def test_ring_without_a_translation_is_spoken_of(served, guest) -> None:
    guest.access = {area.gpa // PAGE * PAGE: 0 for area in guest.driver.transmitq.ring.areas}
    assert guest.serve(lambda: any("transmitq 0" in line for line in served.lines("ring-waits")))
    assert "no translation for its ring at iova" in served.lines("ring-waits")[0]


def test_device_does_not_wait_for_an_answer_that_does_not_come(served, guest) -> None:
    """Everything else is served while the front-end is silent, and a translation that comes by itself is taken."""
    guest.answers = False
    send(served, guest)
    guest.front_end.iotlb_invalidate(0, 0)
    guest.driver.transmit(FRAME)
    assert guest.front_end.get_status() == 0xF
    for page in range(guest.memory.regions[0].gpa, guest.memory.regions[0].gpa + (1 << 18), PAGE):
        guest.front_end.iotlb_update(page, PAGE, guest.uva(page))
    assert guest.serve(lambda: arrived(served.port.wire[0]), 5)


def test_without_a_channel_it_is_said_that_nobody_can_be_asked(served, guest) -> None:
    send(served, guest)
    guest.front_end.backend_channel.close()
    served.wait_for("channel-closed")
    guest.front_end.iotlb_invalidate(0, 0)
    guest.driver.transmit(FRAME)
    assert "no channel to ask the front-end" in served.wait_for("ring-waits")
    guest.front_end.set_backend_req_fd(need_reply=True)
    assert guest.serve(lambda: arrived(served.port.wire[0]))


# ------------------------------------------------------------------------------------------- hostile


def test_VU_IOTLB_F_01_updates_outside_guest_memory_are_refused(served, guest) -> None:
    front, region = guest.front_end, guest.memory.regions[0]
    for uva, size in ((region.uva - 1, 2), (region.uva + region.size, 1), (region.uva, region.size + 1),
                      (0, 1), ((1 << 64) - 1, 1), (region.uva + region.size - 1, 1 << 63)):
        with pytest.raises(RequestRefused):
            front.iotlb_update(0x5000, size, uva)
    front.iotlb_update((1 << 64) - PAGE, PAGE, region.uva)
    send(served, guest)


def test_memory_that_changes_takes_its_translations_along(served, guest) -> None:
    send(served, guest)
    for _ in range(3):
        guest.front_end.set_mem_table(guest.regions(), need_reply=True)
        send(served, guest)
        get(served, guest)


def test_answers_that_nobody_asked_for_close_the_channel_only(served, guest) -> None:
    send(served, guest)
    guest.serve(lambda: served.call(lambda: not served.device._reverse._waiting))
    guest.front_end.backend_channel.send(b"\1\0\0\0\5\0\0\0\x08\0\0\0" + bytes(8))
    assert "came where none was due" in served.wait_for("channel-closed")
    guest.front_end.set_backend_req_fd(need_reply=True)
    send(served, guest)


@pytest.mark.parametrize("kind", ["datagram", "unconnected", "listening", "pipe", "reading end", "closed"])
def test_channel_of_another_kind_harms_nobody(served, guest, kind, tmp_path) -> None:
    send(served, guest)
    with contextlib.ExitStack() as stack:
        if kind in ("pipe", "reading end"):
            ends = os.pipe()
            stack.callback(os.close, ends[0])
            stack.callback(os.close, ends[1])
            fd = ends[kind == "pipe"]
        else:
            one, other = socket.socketpair(type=socket.SOCK_DGRAM if kind == "datagram" else socket.SOCK_STREAM)
            if kind in ("unconnected", "listening"):
                one = socket.socket(socket.AF_UNIX)
            if kind == "listening":
                one.bind(str(tmp_path / "listening"))
                one.listen()
            stack.enter_context(one)
            if kind == "closed":
                other.close()
            else:
                stack.enter_context(other)
            fd = one.fileno()
        guest.front_end.request(Request.SET_BACKEND_REQ_FD, fds=[fd], need_reply=True)
        guest.front_end.iotlb_invalidate(0, 0)
        guest.driver.transmit(FRAME)
        assert guest.front_end.get_status() == 0xF
    guest.front_end.set_backend_req_fd(need_reply=True)
    assert guest.serve(lambda: arrived(served.port.wire[0]))


def test_channel_that_could_block_is_refused(served, guest, tmp_path) -> None:
    with open(tmp_path / "file", "w+") as file, pytest.raises(RequestRefused):
        guest.front_end.request(Request.SET_BACKEND_REQ_FD, fds=[file.fileno()], need_reply=True)
    assert "neither a socket nor a pipe" in served.wait_for("refused-request")
    send(served, guest)


@pytest.mark.parametrize("opening", ["GET_FEATURES", "SET_OWNER"])
def test_front_end_that_begins_with_its_owner_is_not_offered_an_iommu(served, opening) -> None:
    with FrontEnd(served.connect()) as front:
        if opening == "SET_OWNER":
            front.set_owner()
        offered = bool(front.get_features() & mask(Feature.ACCESS_PLATFORM))
    assert offered == (opening == "GET_FEATURES")
