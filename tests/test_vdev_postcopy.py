"""A guest that arrives by postcopy: pages that are missing, and front-ends that do not keep to the order."""

import contextlib
import json
import os
import select

import pytest

from vdev import postcopy, userfault
from vdev.errors import Failure
from vdev.handover import HandoverError, Parcel
from vdev.net.features import Feature, mask
from vdev.plain import from_plain, to_plain
from vdev.postcopy import Arrivals, ArrivalsPart
from vdev.testing.arrival import Arrival, PostcopyFrontEnd
from vdev.testing.netdriver import NetHeader
from vdev.testing.scripted import ScriptedGuest
from vdev.testing.served import FRAME, ServedDevice, both_ways, receive
from vdev.testing.waiting import wait_until
from vdev.userfault import PATH, UserfaultSource
from vdev.workers import Workers
from vhost_user.codec import encode
from vhost_user.errors import Disconnected
from vhost_user.frontend import FrontEnd, RequestRefused, SharedRegion
from vhost_user.handshake import QEMU_7_2, QEMU_10_0
from vhost_user.spec import ProtocolFeature, Request
from vhost_user.spec import mask as protocol_mask
from vhost_user.wire import VRING_STATE, VringState

FEATURES = mask(Feature.VERSION_1, Feature.MRG_RXBUF)
LONG = FRAME + bytes(range(256)) * 64  # over more pages than the rings lie in


@pytest.fixture
def pool():
    """One worker for all devices that are given it."""
    return Workers(1)


@pytest.fixture
def served(request, pool):
    """A device; in a test that uses ``pool``, one of its."""
    try:
        UserfaultSource().close()
    except OSError as error:
        pytest.skip(f"{PATH} cannot be used: {error.strerror}")
    shared = "pool" in request.function.__code__.co_varnames
    with ServedDevice(postcopy=True, workers=pool if shared else None) as device:
        yield device


@pytest.fixture
def connect(served):
    """``connect(**options)``: an Arrival at the device."""
    with contextlib.ExitStack() as cleanup:
        yield lambda features=FEATURES, **options: cleanup.enter_context(Arrival(served.connect(), features, **options))


def descriptors() -> set[str]:
    """What is open in this process, the device's included."""
    return {name for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")}


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("version", [QEMU_7_2, QEMU_10_0], ids=["qemu-7.2", "qemu-10.0"])
def test_VU_PC_B_02_B_05_missing_pages_are_waited_for(served, connect, version, packed):
    guest = connect(FEATURES | (mask(Feature.RING_PACKED) if packed else 0), version=version)
    for number in range(8):
        guest.driver.transmit(FRAME + bytes([number]))
    guest.start()
    assert [receive(served.port.wire[0]) for _ in range(8)] == [FRAME + bytes([number]) for number in range(8)]
    served.port.wire[0].send(NetHeader().pack() + LONG)
    assert select.select([guest.driver.receiveq.call_fd], [], [], 5)[0]
    assert guest.missed > 4  # those of the frame, and of the rings
    assert guest.come() == 0
    guest.look()
    assert guest.driver.reclaim_all(5)
    assert guest.driver.receive(refill=False).frame == LONG
    assert served.lines("postcopy-begins") and served.lines("postcopy-ends")


def test_VU_PC_B_03_answer_tells_where_memory_is_and_nothing_is_touched_before(served, connect):
    guest = connect()
    guest.driver.transmit(FRAME)
    guest.front_end.listen()
    share, guest.front_end.say_known = guest.front_end.say_known, lambda kind: None
    guest.qemu.start(guest.regions, FEATURES)
    assert guest.front_end.addresses.keys() == {region.gpa for region in guest.regions}
    assert guest.front_end.silent(0.2) and guest.there() == 0 and guest.missed == 0
    share(Request.ADD_MEM_REG)
    assert receive(served.port.wire[0]) == FRAME
    assert guest.missed > 0


def test_VU_PC_B_04_the_end_closes_what_was_opened(served, connect):
    guest = connect()
    guest.start()
    before = descriptors()
    assert guest.come() == 0
    assert served.call(lambda: served.device.engine.patience) < 1
    assert len(before - descriptors()) == 2  # the userfaultfd, and what would have taken the memory's place
    guest.look()
    assert guest.front_end.get_vring_base(1) == 0
    with pytest.raises(RequestRefused):
        guest.front_end.listen()
    guest.front_end.advise().close()  # it may come again


def worker_without_a_page(served: ServedDevice, guest: Arrival, page_of: str) -> None:
    """Start ``guest``, and let a worker wait for a page of its "ring" or of a "buffer" that does not come."""
    if page_of == "ring":
        guest.withheld.set()
        guest.start()
    else:
        guest.start()
        served.wait_for("driver")
        guest.withheld.set()
        guest.waiting.clear()
        served.port.wire[0].send(NetHeader().pack() + LONG)
    assert guest.waiting.wait(5)


@pytest.mark.parametrize("queue", [0, 1], ids=["receiveq", "transmitq"])
def test_GET_VRING_BASE_is_answered_when_the_page_has_come(served, connect, queue):
    guest = connect()
    worker_without_a_page(served, guest, "buffer")
    front_end = guest.front_end
    front_end.send_raw(encode(Request.GET_VRING_BASE, VRING_STATE.encode(VringState(queue, 0))))
    assert front_end.silent(0.3)  # longer than a worker takes otherwise
    guest.withheld.clear()
    assert VRING_STATE.decode(front_end.receive().payload).index == queue
    assert guest.come() == 0


@pytest.mark.parametrize("ends", ["well", "badly"])
def test_devices_with_the_same_worker_run_while_a_page_is_missing(served, connect, pool, ends):
    with ServedDevice(workers=pool) as other, ScriptedGuest(other.connect()) as quick:
        both_ways(other, quick)
        guest = connect()
        worker_without_a_page(served, guest, "buffer")
        both_ways(other, quick)
        if ends == "well":
            guest.withheld.clear()
            assert guest.come() == 0
            served.port.wire[0].send(NetHeader().pack() + FRAME)
            wait_until(lambda: served.device.stats()[1].frames == 2, "no frame arrives")
        else:
            guest.close()
            served.wait_for("session-end")
            with ScriptedGuest(served.connect()) as another:
                both_ways(served, another)
        both_ways(other, quick)
        assert served.device.engine.abandoned == other.device.engine.abandoned == 0


@pytest.mark.parametrize("page_of", ["ring", "buffer"])
def test_front_end_dies_while_a_page_is_missing(served, connect, page_of, monkeypatch):
    monkeypatch.setattr(postcopy, "PATIENCE", 1.0)
    guest = connect()
    worker_without_a_page(served, guest, page_of)
    pages = guest.there()
    files = [os.dup(region.fd) for region in guest.regions]
    guest.close()
    served.wait_for("session-end")
    assert sum(os.fstat(fd).st_blocks * 512 // 4096 for fd in files) == pages  # nobody filled one with zeros
    with PostcopyFrontEnd(served.connect()) as back:
        back.negotiate()
        with pytest.raises(RequestRefused):
            FrontEnd.add_mem_reg(back, SharedRegion(files[0], 0, 0x10000, 0x1000))
    assert "pages may be missing" in served.wait_for("refused-request")
    for fd in files:
        os.close(fd)
    with ScriptedGuest(served.connect()) as another:
        both_ways(served, another)
    assert served.device.engine.abandoned == 0


@pytest.mark.parametrize("page_of", ["ring", "buffer"])
def test_front_end_that_puts_no_page_there_loses_its_session_only(served, connect, page_of, monkeypatch):
    monkeypatch.setattr(postcopy, "PATIENCE", 0.5)
    guest = connect()
    worker_without_a_page(served, guest, page_of)
    if page_of == "buffer":
        guest.front_end.send_raw(encode(Request.GET_VRING_BASE, VRING_STATE.encode(VringState(0, 0))))
    pages = guest.there()
    reason = served.wait_for("session-end")
    assert ("did not come within 0.5 s" if page_of == "ring" else "did not let go within 500 ms") in reason
    assert guest.front_end.closed() and guest.there() == pages
    with ScriptedGuest(served.connect()) as another:
        both_ways(served, another)


@pytest.fixture
def front_end(served):
    """One that has negotiated all it can."""
    with PostcopyFrontEnd(served.connect()) as front_end:
        front_end.set_protocol_features(front_end.get_protocol_features())
        yield front_end


@pytest.fixture
def memory():
    fd = os.memfd_create("memory")
    os.ftruncate(fd, 0x1000)
    yield SharedRegion(fd, 0, 0x10000, 0x1000)
    os.close(fd)


def test_P61_postcopy_that_was_not_negotiated(served):
    with PostcopyFrontEnd(served.connect()) as front_end:
        offered = front_end.get_protocol_features()
        assert offered >> ProtocolFeature.PAGEFAULT & 1
        front_end.set_protocol_features(offered & ~protocol_mask(ProtocolFeature.PAGEFAULT))
        with pytest.raises(RequestRefused):
            front_end.listen()
        assert front_end.end() == 1
        with pytest.raises(Disconnected):
            front_end.advise()
    assert "PAGEFAULT was not negotiated" in served.wait_for("session-end")


def test_order_of_messages(served, front_end, memory):
    """Nothing of what is refused changes what is legal next."""
    with pytest.raises(RequestRefused):
        front_end.listen()
    assert front_end.end() == 1
    front_end.advise().close()
    assert front_end.end() == 1
    front_end.listen()
    with pytest.raises(RequestRefused):
        front_end.listen()
    front_end.add_mem_reg(memory)
    front_end.rem_mem_reg(memory)
    front_end.add_mem_reg(memory)
    assert front_end.end() == 0
    assert front_end.end() == 1
    lines = " ".join(served.lines("refused-request"))
    assert "POSTCOPY_LISTEN: POSTCOPY_ADVISE never came" in lines and "under way already" in lines


def test_memory_that_was_shared_before_cannot_be_listened_to(served, front_end, memory):
    FrontEnd.add_mem_reg(front_end, memory)
    front_end.advise().close()
    with pytest.raises(RequestRefused):
        front_end.listen()
    assert "guest memory was shared before" in served.wait_for("refused-request")


def test_POSTCOPY_ADVISE_twice_ends_the_session(served, front_end):
    """As QEMU does for a second queue pair: it is told before the guest has moved, not after."""
    front_end.advise().close()
    with pytest.raises(Disconnected):
        front_end.advise()
    assert "one queue pair" in served.wait_for("session-end")


def test_front_end_that_does_not_know_its_memory_loses_the_session(served, front_end, memory):
    front_end.advise().close()
    front_end.listen()
    front_end.tell_region(memory)
    front_end.say_known(Request.ADD_MEM_REG, 1)
    assert front_end.closed()
    assert "answers 1 to where its memory is" in served.wait_for("session-end")


def test_memory_in_one_table(served, memory):
    with PostcopyFrontEnd(served.connect()) as front_end:
        slots = protocol_mask(ProtocolFeature.CONFIGURE_MEM_SLOTS)
        front_end.set_protocol_features(front_end.get_protocol_features() & ~slots)
        userfault = front_end.advise()
        front_end.listen()
        front_end.set_mem_table([memory])
        assert list(front_end.addresses) == [memory.gpa] and front_end.end() == 0
        userfault.close()


def test_without_it_nothing_is_offered():
    with ServedDevice() as device, PostcopyFrontEnd(device.connect()) as front_end:
        assert not front_end.get_protocol_features() >> ProtocolFeature.PAGEFAULT & 1


def test_where_no_userfaultfd_can_be_had_it_is_said(monkeypatch):
    monkeypatch.setattr(userfault, "PATH", "/dev/null")
    with pytest.raises(Failure, match="--postcopy: no userfaultfd can be had"):
        postcopy.open_arrivals()


def test_another_process_can_go_on_with_the_source_but_not_in_the_middle(served, connect):
    guest = connect()
    parcel = Parcel()
    with pytest.raises(HandoverError, match="being migrated"):
        served.call(lambda: served.device._connection.export(parcel.put))
    guest.start()
    with pytest.raises(HandoverError, match="being migrated"):
        served.call(lambda: served.device._connection.export(parcel.put))
    assert guest.come() == 0
    arrivals = Arrivals(UserfaultSource(), {(1, 2)})
    part = arrivals.export(parcel.put)
    assert from_plain(ArrivalsPart, json.loads(json.dumps(to_plain(part)))) == part
    again = Arrivals.adopt(part, Parcel([os.dup(fd) for fd in parcel.fds]).take)
    assert again.cut_off == {(1, 2)}
    arrivals.close()
    again.source.new().close()
    again.close()
