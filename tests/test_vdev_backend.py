"""vdev/backend.py, connection.py, engine.py, memory.py, device.py together: what a front-end's requests do to
a running device. Everything is real but the network (a socket pair) and the guest (a driver in Python)."""

import dataclasses
import fcntl
import os
import select
import socket
import struct
import threading
import time

import pytest

from ring.driver import GuestMemory
from vdev.connection import RESUME_DELAY_QUIET
from vdev.net.features import Feature, mask
from vdev.testing.scripted import ScriptedGuest
from vdev.testing.served import FRAME, ServedDevice, WirePort, both_ways, receive
from vhost_user.errors import Disconnected
from vhost_user.frontend import FrontEnd, RequestRefused, RingSetup, SharedRegion
from vhost_user.handshake import QEMU_7_2, QEMU_10_0

RING = mask(Feature.VERSION_1, Feature.MRG_RXBUF, Feature.EVENT_IDX, Feature.INDIRECT_DESC)


@pytest.fixture
def served():
    with ServedDevice() as device:
        yield device


@pytest.fixture
def guest(served):
    with ScriptedGuest(served.connect(), features=RING) as scripted:
        yield scripted


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def mappings() -> int:
    with open("/proc/self/maps") as maps:
        return sum("memfd" in line for line in maps)


# --------------------------------------------------------------------------------------- life


@pytest.mark.parametrize("version", [QEMU_7_2, QEMU_10_0], ids=["qemu-7.2", "qemu-10.0"])
def test_frames_pass_both_ways_after_each_handshake(served, version) -> None:
    with ScriptedGuest(served.connect(), features=RING, version=version) as guest:
        both_ways(served, guest)


@pytest.mark.parametrize("version", [QEMU_7_2, QEMU_10_0], ids=["qemu-7.2", "qemu-10.0"])
def test_F17_reboot_resumes_at_the_new_base(served, version) -> None:
    """The driver is reset and starts again with fresh rings, while memory is not sent anew."""
    with ScriptedGuest(served.connect(), features=RING, version=version) as guest:
        for _ in range(3):
            both_ways(served, guest)
            bases = guest.qemu.stop()
            # rings that are gone on with: used.idx and base agree, as everything in hand was finished
            assert bases[1] == guest.driver.transmitq.ring.used.idx
            guest.qemu.rings = [_with_base(ring, base) for ring, base in zip(guest.qemu.rings, bases, strict=True)]
            guest.qemu.reset()
            guest.qemu.start([], RING & guest.qemu.offered)


def _with_base(ring: RingSetup, base: int) -> RingSetup:
    return dataclasses.replace(ring, base=base)


def test_F02_front_end_vanishes_and_the_next_one_is_served(served) -> None:
    files, maps = open_files(), mappings()
    for _ in range(3):
        with ScriptedGuest(served.connect(), features=RING) as guest:
            both_ways(served, guest)
        served.wait_for("session-end", _ + 1)
    assert (open_files(), mappings()) == (files, maps)


def test_F41_many_sessions_leave_nothing_behind(served) -> None:
    def cycle(number: int) -> None:
        with ScriptedGuest(served.connect(), features=RING, size=8) as guest:
            guest.driver.transmit(FRAME)
            assert receive(served.port.wire[0]) == FRAME
        served.wait_for("session-end", number)

    cycle(1)
    before = (open_files(), mappings(), threading.active_count(), len(os.listdir("/proc/self/task")))
    for number in range(2, 60):
        cycle(number)
    assert (open_files(), mappings(), threading.active_count(), len(os.listdir("/proc/self/task"))) == before


def test_driver_line_names_the_features(served, guest) -> None:
    line = served.wait_for("driver")
    for name in ("VERSION_1", "MRG_RXBUF", "EVENT_IDX", "INDIRECT_DESC"):
        assert name in line
    assert "PROTOCOL_FEATURES" not in line and "GUEST_TSO4" not in line


def test_session_end_counts_what_passed(served) -> None:
    with ScriptedGuest(served.connect(), features=RING) as guest:
        both_ways(served, guest)
        both_ways(served, guest)
    line = served.wait_for("session-end")
    assert f"from guest 2 frames, {2 * len(FRAME)} bytes, none dropped" in line
    assert f"to guest 2 frames, {2 * len(FRAME)} bytes, none dropped" in line


# ------------------------------------------------------------------------------- port and features


def test_N22_offloads_are_set_from_what_was_negotiated_and_taken_back(served) -> None:
    offloads = mask(Feature.CSUM, Feature.GUEST_CSUM, Feature.GUEST_TSO4)
    assert not [told for told in served.port.told if told[0] == "offloads"]
    with ScriptedGuest(served.connect(), features=RING | offloads) as guest:
        told = [features for what, *rest in served.port.told if what == "offloads" for features in rest]
        assert told[-1] & offloads == offloads and told[-1] == guest.front_end.features
    served.wait_for("session-end")
    assert [told for told in served.port.told if told[0] == "offloads"][-1] == ("offloads", 0)


def test_port_that_carries_no_offload_offers_none() -> None:
    with ServedDevice(WirePort(offloads=0)) as served, FrontEnd(served.connect()) as front:
        offered = front.get_features()
        assert not offered & mask(Feature.CSUM, Feature.GUEST_CSUM, Feature.HOST_TSO4, Feature.GUEST_TSO6)
        assert not offered & mask(Feature.MQ) and offered & mask(Feature.VERSION_1)


def test_feature_taken_out_takes_what_depends_on_it() -> None:
    with ServedDevice(removed=mask(Feature.CSUM, Feature.MRG_RXBUF)) as served, FrontEnd(served.connect()) as front:
        offered = front.get_features()
        gone = mask(Feature.CSUM, Feature.HOST_TSO4, Feature.HOST_TSO6, Feature.HOST_ECN, Feature.HOST_UFO,
                    Feature.HOST_USO, Feature.MRG_RXBUF)
        assert not offered & gone
        assert offered & mask(Feature.GUEST_CSUM) and offered & mask(Feature.GUEST_TSO4)


def test_queue_pairs_are_enabled_at_the_port_one_by_one() -> None:
    with ServedDevice(WirePort(4)) as served, \
            ScriptedGuest(served.connect(), features=RING | mask(Feature.MQ), queue_pairs=4) as guest:
        for pair in range(4):
            both_ways(served, guest, pair)
        guest.qemu.enable_pairs(2)
        latest = {pair: on for what, pair, on in
                  [told for told in served.port.told if told[0] == "enable"] if what == "enable"}
        assert latest == {0: True, 1: True, 2: False, 3: False}


def test_link_stays_up_on_pair_0_without_a_guest() -> None:
    with ServedDevice(WirePort(2)) as served:
        with ScriptedGuest(served.connect(), features=RING | mask(Feature.MQ), queue_pairs=2):
            pass
        served.wait_for("session-end")
        assert served.port.told[-2:] == [("enable", 0, True), ("enable", 1, False)]


@pytest.mark.parametrize(("personality", "number"), [("qemu-net", 4), ("full", 9)])
def test_get_queue_num_counts_what_the_front_end_means(personality, number) -> None:
    with ServedDevice(WirePort(4), personality=personality) as served, FrontEnd(served.connect()) as front:
        front.negotiate()
        assert front.get_queue_num() == number


def test_F14_port_that_is_gone_drops_and_comes_back(served, guest) -> None:
    both_ways(served, guest)
    served.port.cut()
    served.wait_for("port-gone")
    guest.driver.transmit(FRAME)
    assert guest.driver.reclaim_all(5)
    assert served.device.stats()[0].dropped == {"no_port": 1}
    served.port.comes_back = True
    served.wait_for("port-back")
    both_ways(served, guest)


def test_P100_mtu_bounds_and_effect(served) -> None:
    with FrontEnd(served.connect()) as front:
        front.negotiate()
        for mtu in (0, 67, 65536, 1 << 63):
            with pytest.raises(RequestRefused):
                front.net_set_mtu(mtu)
        front.net_set_mtu(1500)
    served.wait_for("session-end")
    with ScriptedGuest(served.connect(), features=RING | mask(Feature.MTU)) as guest:
        guest.front_end.net_set_mtu(100, need_reply=True)
        fits, too_long = bytes(12) + b"\1\2" * 7, bytes(200)
        served.port.wire[0].send(bytes(12) + too_long)
        served.port.wire[0].send(bytes(12) + fits)
        assert guest.driver.receive_within(5).frame == fits
        assert served.device.stats()[1].dropped == {"bad_length": 1}


def test_P101_rarp_storm_is_limited(served, guest) -> None:
    mac = bytes.fromhex("525400123456")
    for _ in range(200):
        guest.front_end.send_rarp(mac, need_reply=True)
    announced = [told for told in served.port.told if told[0] == "announce"]
    assert announced[0] == ("announce", mac) and len(announced) < 200


# ------------------------------------------------------------------------------------------ rings


def test_P86_chain_offered_before_the_ring_runs_needs_no_kick(served) -> None:
    with ScriptedGuest(served.connect(), features=RING) as guest:
        guest.qemu.stop()
        guest.driver.offer(FRAME)
        guest.driver.transmitq.publish()  # available, and nobody kicks
        guest.qemu.reset()
        guest.qemu.rings = [_with_base(ring, queue.ring.used.idx) for ring, queue in zip(
            guest.qemu.rings, (guest.driver.receiveq, guest.driver.transmitq), strict=True)]
        guest.qemu.start([], RING & guest.qemu.offered)
        assert receive(served.port.wire[0]) == FRAME


def test_ST_D_02_nothing_is_consumed_before_driver_ok(served) -> None:
    with ScriptedGuest(served.connect(), features=RING) as guest:
        guest.qemu.stop()
        guest.driver.offer(FRAME)
        guest.driver.transmitq.publish()
        guest.qemu.rings = [_with_base(ring, queue.ring.used.idx) for ring, queue in zip(
            guest.qemu.rings, (guest.driver.receiveq, guest.driver.transmitq), strict=True)]
        front = guest.front_end
        guest.qemu.reset()
        front.set_features(RING & guest.qemu.offered | mask(Feature.PROTOCOL_FEATURES), need_reply=True)
        for index, ring in enumerate(guest.qemu.rings):
            front.set_ring(index, ring)
        front.set_status(0xB, need_reply=True)
        with pytest.raises(TimeoutError):
            receive(served.port.wire[0], 0.1)
        front.set_status(0xF, need_reply=True)
        assert receive(served.port.wire[0]) == FRAME


def test_P77_base_is_answered_fast_under_load(served, guest) -> None:
    """A transmitq is stopped while its driver floods it; the answer agrees with what left."""
    for _ in range(50):
        for _ in range(32):
            guest.driver.offer(FRAME)
        guest.driver.transmitq.submit()
        base = guest.front_end.get_vring_base(1)
        assert base == guest.driver.transmitq.ring.used.idx
        guest.front_end.set_vring_base(1, base, need_reply=True)
        guest.front_end.set_vring_kick(1, guest.driver.transmitq.kick_fd, need_reply=True)
        assert guest.driver.reclaim_all(5)
        for _ in range(32):
            assert receive(served.port.wire[0]) == FRAME


def test_P76_base_of_a_ring_never_set_up(served) -> None:
    with FrontEnd(served.connect()) as front:
        front.negotiate()
        assert front.get_vring_base(0) == 0
        front.set_vring_base(0, 77)
        assert front.get_vring_base(0) == 77


def test_P102_status_zero_keeps_the_base(served, guest) -> None:
    both_ways(served, guest)
    guest.front_end.set_status(0, need_reply=True)
    assert guest.front_end.get_vring_base(1) == guest.driver.transmitq.ring.used.idx == 1
    assert guest.front_end.get_vring_base(0) == 1


def test_S_stop_means_stop(served, guest) -> None:
    """After the bases were answered no byte of guest memory changes, whatever the network sends."""
    both_ways(served, guest)
    guest.qemu.stop()
    before = guest.memory.snapshot()
    for _ in range(20):
        served.port.wire[0].send(bytes(12) + FRAME)
    time.sleep(0.05)
    assert guest.memory.snapshot() == before


def test_VU_RING_disabled_transmitq_is_drained_and_dropped(served, guest) -> None:
    both_ways(served, guest)
    guest.front_end.set_vring_enable(1, False, need_reply=True)
    for _ in range(5):
        guest.driver.transmit(FRAME)
    assert guest.driver.reclaim_all(5)
    assert served.device.stats()[0].dropped == {"disabled": 5}
    with pytest.raises(TimeoutError):
        receive(served.port.wire[0], 0.05)
    guest.front_end.set_vring_enable(1, True, need_reply=True)
    both_ways(served, guest)


def test_VU_RING_disabled_receiveq_gets_nothing(served, guest) -> None:
    guest.front_end.set_vring_enable(0, False, need_reply=True)
    served.port.wire[0].send(bytes(12) + FRAME)
    assert guest.driver.receive_within(0.1) is None
    guest.front_end.set_vring_enable(0, True, need_reply=True)
    assert guest.driver.receive_within(5).frame == FRAME


def test_inspection_of_a_quiet_guests_ring_does_not_make_it_deaf(served, guest) -> None:
    """A guest that only waits for frames kicks nothing: the front-end's silence has to do."""
    both_ways(served, guest)
    guest.front_end.get_vring_base(0)
    served.port.wire[0].send(bytes(12) + FRAME)
    served.wait_for("ring-resumed")
    assert guest.driver.receive_within(5).frame == FRAME


def test_VU_RING_B_07_all_rings_stopped_stay_stopped(served, guest) -> None:
    both_ways(served, guest)
    bases = [guest.front_end.get_vring_base(index) for index in (0, 1)]
    guest.driver.offer(FRAME)
    guest.driver.transmitq.publish()
    guest.driver.transmitq.kick()
    with pytest.raises(TimeoutError):
        receive(served.port.wire[0], 2 * RESUME_DELAY_QUIET)
    assert not served.lines("ring-resumed")
    assert [guest.front_end.get_vring_base(index) for index in (0, 1)] == bases


def test_P79_a_second_kick_descriptor_replaces_the_first(served, guest) -> None:
    guest.front_end.get_features()
    files = open_files()
    for _ in range(10):
        fresh = os.eventfd(0)
        guest.front_end.set_vring_kick(1, fresh, need_reply=True)
        os.close(guest.driver.transmitq.kick_fd)
        guest.driver.transmitq.kick_fd = fresh
        both_ways(served, guest)
    assert open_files() == files


@pytest.mark.parametrize("kind", ["pipe", "socket", "file", "epoll"])
def test_P80_kick_that_is_no_eventfd_is_refused(served, guest, kind, tmp_path) -> None:
    made = {"pipe": lambda: os.pipe()[0], "socket": lambda: socket.socket().detach(),
            "file": lambda: os.open(tmp_path / "f", os.O_CREAT | os.O_RDWR), "epoll": lambda: select.epoll()}[kind]()
    with pytest.raises(RequestRefused):
        guest.front_end.set_vring_kick(1, made if isinstance(made, int) else made.fileno(), need_reply=True)
    both_ways(served, guest)
    assert "no eventfd" in served.wait_for("refused-request")
    os.close(made) if isinstance(made, int) else made.close()


def test_P82_P83_P84_strange_call_descriptors_hurt_nobody(served, guest) -> None:
    """A full blocking eventfd, a pipe nobody reads, and the ring's own kick as call."""
    driver, front = guest.driver, guest.front_end
    full = os.eventfd(0)
    os.eventfd_write(full, 0xFFFFFFFFFFFFFFFE)
    front.set_vring_call(1, full, need_reply=True)
    os.set_blocking(full, True)  # the peer changes its mind: it is the same open file
    read_end, write_end = os.pipe()
    for call in (full, write_end, driver.transmitq.kick_fd):
        front.set_vring_call(1, call, need_reply=True)
        if call == write_end:
            os.close(read_end)
        for _ in range(3):
            driver.transmit(FRAME)
            assert receive(served.port.wire[0]) == FRAME
    front.set_vring_call(1, driver.transmitq.call_fd, need_reply=True)
    both_ways(served, guest)
    kicks = served.device.stats()[0].kicks
    time.sleep(0.05)
    assert served.device.stats()[0].kicks == kicks  # no loop that feeds itself
    os.close(full)
    os.close(write_end)


def test_call_descriptor_that_changes_is_signalled_once(served, guest) -> None:
    both_ways(served, guest)
    fresh = os.eventfd(0, os.EFD_NONBLOCK)
    guest.front_end.set_vring_call(1, fresh, need_reply=True)
    assert os.eventfd_read(fresh) == 1
    os.close(fresh)


def test_kick_without_descriptor_is_polled(served, guest) -> None:
    guest.front_end.set_vring_kick(1, None, need_reply=True)
    guest.driver.offer(FRAME)
    guest.driver.transmitq.publish()
    assert receive(served.port.wire[0]) == FRAME


def test_R02_broken_split_ring_is_reported_once_and_mended_by_a_restart(served, guest) -> None:
    both_ways(served, guest)
    error = os.eventfd(0, os.EFD_NONBLOCK)
    guest.front_end.set_vring_err(1, error, need_reply=True)
    queue = guest.driver.transmitq
    good = queue.ring.avail.idx
    queue.ring.avail.idx = good + 65
    os.eventfd_write(queue.kick_fd, 1)
    line = served.wait_for("ring-broken")
    assert "transmitq 0" in line and "available index" in line and "2.7.6" in line
    os.eventfd_write(queue.kick_fd, 1)
    time.sleep(0.05)
    assert os.eventfd_read(error) == 1 and len(served.lines("ring-broken")) == 1
    # the other ring goes on, and GET_VRING_BASE still answers
    served.port.wire[0].send(bytes(12) + FRAME)
    assert guest.driver.receive_within(5).frame == FRAME
    queue.ring.avail.idx = good
    base = guest.front_end.get_vring_base(1)
    assert base == good
    guest.front_end.set_vring_base(1, base, need_reply=True)
    guest.front_end.set_vring_kick(1, queue.kick_fd, need_reply=True)
    both_ways(served, guest)
    os.close(error)


def test_reset_device_forgets_rings_and_keeps_memory(served, guest) -> None:
    both_ways(served, guest)
    guest.front_end.get_features()
    files = open_files()
    guest.front_end.reset_device(need_reply=True)
    assert open_files() == files - 2  # both kick descriptors
    assert guest.front_end.get_vring_base(1) == 0
    with pytest.raises(RequestRefused):
        guest.front_end.set_vring_kick(1, guest.driver.transmitq.kick_fd, need_reply=True)


# ----------------------------------------------------------------------------------------- memory


def region(memory: GuestMemory) -> SharedRegion:
    r = memory.regions[0]
    return SharedRegion(r.fd, r.gpa, r.uva, r.size, r.offset)


def test_P59_removing_the_region_of_a_live_ring_breaks_the_ring(served, guest) -> None:
    both_ways(served, guest)
    guest.front_end.rem_mem_reg(region(guest.memory), need_reply=True)
    assert "receiveq 0" in served.wait_for("ring-broken") and "transmitq 0" in served.wait_for("ring-broken", 2)
    assert guest.front_end.get_vring_base(1) == 1
    guest.front_end.add_mem_reg(region(guest.memory), need_reply=True)
    guest.front_end.set_vring_kick(1, guest.driver.transmitq.kick_fd, need_reply=True)
    guest.driver.transmit(FRAME)
    assert receive(served.port.wire[0]) == FRAME


def test_P59_P82_broken_ring_whose_err_descriptor_blocks(served, guest) -> None:
    """A full eventfd that its owner made blocking: the control loop, which says that the ring broke, goes on."""
    full = os.eventfd(0)
    os.eventfd_write(full, 0xFFFFFFFFFFFFFFFE)
    guest.front_end.set_vring_err(1, full, need_reply=True)
    os.set_blocking(full, True)
    guest.front_end.rem_mem_reg(region(guest.memory), need_reply=True)
    served.wait_for("ring-broken", 2)
    assert guest.front_end.get_vring_base(1) == 0
    os.close(full)


def test_F24_memory_comes_and_goes_under_traffic(served, guest) -> None:
    guest.front_end.get_features()  # answered: so all before it is done
    files, maps = open_files(), mappings()
    with GuestMemory(1 << 20, gpa=1 << 40, uva=1 << 41) as more:
        for _ in range(20):
            guest.front_end.add_mem_reg(region(more), need_reply=True)
            both_ways(served, guest)
            guest.front_end.rem_mem_reg(region(more), need_reply=True)
            both_ways(served, guest)
    assert (open_files(), mappings()) == (files, maps)


@pytest.mark.parametrize("ring", [0, mask(Feature.RING_PACKED)], ids=["split", "packed"])
def test_R59_the_whole_table_is_replaced_under_traffic(served, ring) -> None:
    """SET_MEM_TABLE maps the same memory anew while frames are in flight; none is lost."""
    with ScriptedGuest(served.connect(), features=RING | ring) as guest:
        shared = region(guest.memory)
        for _ in range(30):
            for _ in range(16):
                guest.driver.offer(FRAME)
            guest.driver.transmitq.submit()
            guest.front_end.set_mem_table([shared], need_reply=True)
            for _ in range(16):
                assert receive(served.port.wire[0]) == FRAME
            assert guest.driver.reclaim_all(5)


def test_P57_failed_table_keeps_the_old_one(served, guest) -> None:
    shared = region(guest.memory)
    guest.front_end.get_features()
    maps, files = mappings(), open_files()
    short = os.memfd_create("short")
    os.ftruncate(short, 4096)
    bad = SharedRegion(short, 1 << 40, 1 << 41, 1 << 20)
    with pytest.raises(RequestRefused):
        guest.front_end.set_mem_table([shared, bad], need_reply=True)
    assert "its file has 0x1000 bytes" in served.wait_for("refused-request")
    assert (mappings(), open_files()) == (maps, files + 1)
    both_ways(served, guest)
    os.close(short)


def test_P60_add_and_remove_leave_nothing(served) -> None:
    with FrontEnd(served.connect()) as front, GuestMemory(1 << 16) as memory:
        front.negotiate()
        front.add_mem_reg(region(memory))
        front.rem_mem_reg(region(memory))
        before = (open_files(), mappings())
        for _ in range(500):
            front.add_mem_reg(region(memory))
            front.rem_mem_reg(region(memory))
        assert (open_files(), mappings()) == before


@pytest.mark.parametrize("part", ["desc", "avail", "used"])
def test_P67_P68_ring_outside_shared_memory_cannot_start(served, part) -> None:
    with ScriptedGuest(served.connect(), features=RING) as guest:
        guest.qemu.stop()
        guest.qemu.reset()
        shared = region(guest.memory)
        last_page = shared.uva + shared.size - 64  # begins inside, ends outside
        ring = guest.qemu.rings[1]
        where = {"desc": ring.desc, "avail": ring.avail, "used": ring.used} | {part: last_page}
        front = guest.front_end
        front.set_features(RING & guest.qemu.offered | mask(Feature.PROTOCOL_FEATURES), need_reply=True)
        front.set_vring_num(1, ring.num, need_reply=True)
        front.set_vring_addr(1, where["desc"], where["avail"], where["used"], need_reply=True)
        front.set_status(0xF, need_reply=True)
        with pytest.raises(RequestRefused):
            front.set_vring_kick(1, ring.kick, need_reply=True)
        line = served.wait_for("refused-request")
        assert "transmitq 0 cannot start" in line and "share=on" in line


def test_ring_without_any_memory_says_what_qemu_needs(served) -> None:
    with FrontEnd(served.connect()) as front:
        front.negotiate(RING)
        front.set_status(0xF)
        front.set_vring_num(0, 8)
        front.set_vring_addr(0, 0, 0, 0)
        kick = os.eventfd(0)
        with pytest.raises(RequestRefused):
            front.set_vring_kick(0, kick)
        os.close(kick)
        assert "memory-backend-memfd,share=on" in served.wait_for("refused-request")


def test_F25_truncated_memory_ends_the_session_and_nothing_else() -> None:
    with (ServedDevice() as innocent, ServedDevice() as served,
          ScriptedGuest(innocent.connect(), features=RING) as bystander):
        with ScriptedGuest(served.connect(), features=RING) as guest:
            both_ways(served, guest)
            guest.memory.truncate()
            os.eventfd_write(guest.driver.transmitq.kick_fd, 1)
            assert "memory vanished" in served.wait_for("session-end")
            both_ways(innocent, bystander)
        with ScriptedGuest(served.connect(), features=RING) as guest:
            both_ways(served, guest)


# ------------------------------------------------------------------------------------- descriptors


def test_P18_descriptors_kept_are_close_on_exec(served, guest) -> None:
    ring = served.device.engine.rings[1]
    for fd in (ring.kick, ring.call):
        assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC


def test_P98_reverse_channel_is_replaced(served) -> None:
    with FrontEnd(served.connect()) as front:
        front.negotiate()
        front.set_backend_req_fd()
        files = open_files()
        for _ in range(20):
            front.set_backend_req_fd()
        assert open_files() == files


def test_P17_a_flood_of_descriptors_leaves_none_open(served) -> None:
    with FrontEnd(served.connect()) as front:
        front.negotiate()
        fd = os.eventfd(0)
        front.set_vring_err(0, fd)
        files = open_files()
        for _ in range(2000):
            front.set_vring_err(0, fd)
        assert open_files() == files
        os.close(fd)


def test_nack_without_need_reply_closes(served) -> None:
    front = FrontEnd(served.connect(), ack=False)
    front.negotiate()
    front.send_raw(struct.pack("=IIIII", 8, 1, 8, 0, 0))  # SET_VRING_NUM ring 0, size 0
    with pytest.raises(Disconnected):
        front.get_features()
    front.close()
    assert "SET_VRING_NUM ring 0: size 0" in served.wait_for("session-end")
