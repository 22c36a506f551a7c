"""Rows of docs/conformance/packed.tsv about chains; tests/test_rows_both.py has those that hold for split rings
too."""

import pytest

from ring.driver_packed import DESC_F_AVAIL, DESC_F_USED
from ring.driver_parts import DESC_F_INDIRECT, DESC_F_NEXT
from vdev.net.features import Feature, mask
from vdev.testing.netdriver import NetDriver, NetHeader
from vdev.testing.watch import delivered, noise, on_wire, placed, settle, until, watching

row = pytest.mark.row

PACKED = mask(Feature.VERSION_1, Feature.RING_PACKED)
INDIRECT = PACKED | mask(Feature.INDIRECT_DESC)
HEADER = NetHeader.SIZE


@row("VQ-PACKED-D-01")
def test_frames_leave_in_the_order_of_the_ring(engine):
    with engine(PACKED, size=16) as (driver, device):
        for lap in range(3):
            frames = [noise(60, 16 * lap + i) for i in range(16)]
            for data in frames:
                driver.offer(data)
            driver.transmitq.submit()
            assert on_wire(device, len(frames)) == [(NetHeader(), data) for data in frames]
            assert until(device, lambda: driver.transmitq.ring.pending() == 16)
            driver.reclaim()


@row("VQ-PACKED-D-06")
def test_nothing_in_a_zeroed_ring_is_used(engine):
    with engine(PACKED, size=8) as (driver, device):
        for queue in (driver.transmitq, driver.receiveq):
            assert driver.memory.read(*queue.ring.areas.descriptor) == bytes(8 * 16)
            queue.kick()
        device.send(noise())
        assert device.receive(0.05) is None
        settle(device)
        for queue in (driver.transmitq, driver.receiveq):
            assert driver.memory.read(*queue.ring.areas.descriptor) == bytes(8 * 16)
        # after a lap what is left of the one before is no more available than zeros
        for _ in range(3):
            for _ in range(3):
                driver.transmit(noise())
                assert device.receive() == (NetHeader(), noise())
            assert until(device, lambda: driver.transmitq.ring.pending() == 3)
            driver.reclaim()
        driver.transmitq.kick()
        assert device.receive(0.05) is None
        assert driver.transmitq.ring.pending() == 0


@row("VQ-PACKED-D-15")
def test_bytes_keep_their_order_over_the_descriptors_of_a_chain(engine):
    with engine(PACKED, size=16) as (driver, device):
        for _ in range(5):  # the chain begins elsewhere each time, and twice goes over the end
            driver.transmit(noise(), cuts=(5, HEADER, 20, 50))
            assert device.receive() == (NetHeader(), noise())
            driver.receiveq.post(writable=[7, HEADER, 30, 1, 60])
            driver.receiveq.submit()
            device.send(noise())
            assert delivered(driver, device).frame == noise()
            assert until(device, driver.transmitq.ring.pending)
            driver.reclaim()


def entries_with_garbage(driver: NetDriver, slot: int) -> None:
    """Set all that does not count in the indirect table named by ``slot``."""
    entry = driver.transmitq.ring.desc[slot]
    for i in range(entry.len // 16):
        where = entry.addr + 16 * i
        driver.memory.store(where + 12, 2, 0xDEAD)  # id
        flags = DESC_F_INDIRECT | DESC_F_AVAIL | DESC_F_USED | DESC_F_NEXT * (i != 1) | 0x7F78
        driver.memory.store(where + 14, 2, flags)


@row("VQ-PACKED-D-17")
def test_flags_and_ids_in_an_indirect_table_mean_nothing(engine):
    with engine(INDIRECT) as (driver, device):
        for slot in range(3):
            id = driver.offer(noise(), cuts=(HEADER, 20, 50), direct=0)
            entries_with_garbage(driver, slot)
            driver.transmitq.submit()
            assert device.receive() == (NetHeader(), noise())
            assert until(device, driver.transmitq.ring.pending)
            assert driver.transmitq.collect().head == id


@row("VQ-PACKED-D-19")
@pytest.mark.parametrize("size", [1, 3, 5, 100, 32768])
def test_queue_of_any_size(engine, size):
    with engine(PACKED, size=size) as (driver, device):
        for number in range(min(3 * size, 320)):
            driver.transmit(noise(seed=number))
            driver.receiveq.post(writable=[200])
            driver.receiveq.submit()
            device.send(noise(seed=number))
            assert device.receive() == (NetHeader(), noise(seed=number))
            assert delivered(driver, device).frame == noise(seed=number)
            assert until(device, driver.transmitq.ring.pending)
            driver.reclaim()


@row("VQ-PACKED-DR-04")
def test_descriptor_that_changes_while_it_is_available_is_read_once(engine):
    """Each frame has one of the two lengths that the driver says by turns, and no chain is refused."""
    with engine(PACKED, size=512, attach=False) as (driver, device):
        buffer = placed(driver.memory, bytes(HEADER) + noise(1000))
        for _ in range(512):
            driver.transmitq.add([buffer])
        driver.transmitq.submit()

        def lie() -> None:
            for length in (HEADER + 20, HEADER + 1000):
                for slot in range(512):
                    driver.transmitq.ring.desc[slot].len = length

        with watching(lie):
            device.attach()
            frames = on_wire(device, 512)
        assert len(frames) == 512
        assert set(frames) <= {(NetHeader(), noise(1000)), (NetHeader(), noise(1000)[:20])}
        assert device.from_guest.dropped == {} and device.errors() == (0, 0)
