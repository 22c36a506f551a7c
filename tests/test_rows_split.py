"""Rows of docs/conformance/split.tsv about chains; tests/test_rows_both.py has those that hold for packed rings
too."""

import pytest

from ring.driver_parts import DESC_F_INDIRECT, DESC_F_NEXT
from vdev.net.features import Feature, mask
from vdev.testing.netdriver import NetDriver, NetHeader
from vdev.testing.rig import assert_serves, table
from vdev.testing.watch import delivered, noise, placed, until

row = pytest.mark.row

PLAIN = mask(Feature.VERSION_1)
INDIRECT = PLAIN | mask(Feature.INDIRECT_DESC)
MERGEABLE = PLAIN | mask(Feature.MRG_RXBUF)
HEADER = NetHeader.SIZE


# ------------------------------------------------------------------------------------------------- chains


@row("VQ-SPLIT-D-01")
def test_header_and_data_may_be_cut_anywhere(engine):
    with engine(PLAIN) as (driver, device):
        for cuts in ((), (HEADER,), range(1, HEADER + 1), (5, 20), range(1, HEADER + 60)):
            driver.transmit(noise(), cuts=cuts)
            assert device.receive() == (NetHeader(), noise())
        for room in ([1] * (HEADER + 10) + [50], [5, 7, 60], [11, 2, 59], [HEADER, 60]):
            driver.receiveq.post(writable=room)
            driver.receiveq.submit()
            device.send(noise())
            assert delivered(driver, device).frame == noise()


@row("VQ-SPLIT-D-05")
def test_descriptor_tables_are_not_written(engine):
    with engine(INDIRECT | MERGEABLE, size=16, buffer_size=30) as (driver, device):
        tables = [queue.ring.areas.descriptor for queue in (driver.transmitq, driver.receiveq)]
        driver.fill()
        for direct in (None, 0, 1):
            driver.offer(noise(), cuts=(HEADER, 40), direct=direct)
        indirect = driver.transmitq.ring.desc[driver.offer(noise(), cuts=(HEADER, 40), direct=0)]
        tables.append((indirect.addr, indirect.len))
        before = [driver.memory.read(*table) for table in tables]
        driver.transmitq.submit()
        for _ in range(4):
            device.send(noise())
        assert until(device, lambda: driver.transmitq.ring.pending() == 4 and driver.receiveq.ring.pending() >= 12)
        assert [driver.memory.read(*table) for table in tables] == before


@row("VQ-SPLIT-D-07")
@pytest.mark.parametrize("direct", [0, 1, 2, 5])
def test_direct_descriptors_before_an_indirect_one(engine, direct):
    with engine(INDIRECT) as (driver, device):
        driver.transmit(noise(), cuts=(3, HEADER, 30, 31, 50), direct=direct)
        assert device.receive() == (NetHeader(), noise())
        driver.receiveq.post(writable=[4, 9, 20, 3, 8, 100], direct=direct)
        driver.receiveq.submit()
        device.send(noise())
        assert delivered(driver, device).frame == noise()


def indirect(driver: NetDriver, descriptors, length: int | None = None) -> int:
    """Offer a chain that is one indirect table -> its head. length: said to be so many bytes long."""
    gpa, bytes_ = table(driver.memory, *descriptors)
    head = driver.transmitq.post(readable=[b"x"])
    driver.transmitq.ring.desc[head].set(gpa, bytes_ if length is None else length, DESC_F_INDIRECT)
    return head


@row("VQ-SPLIT-D-08")
def test_entries_of_an_indirect_table_are_linked_by_next(engine):
    with engine(INDIRECT) as (driver, device):
        header, first, second = (placed(driver.memory, data).gpa
                                 for data in (bytes(HEADER), noise(30), noise(40, 1)))
        wild = (1 << 60, 1, DESC_F_NEXT, 0xFFFF)
        indirect(driver, [(header, HEADER, DESC_F_NEXT, 4), wild, (second, 40, 0, 1), wild,
                          (first, 30, DESC_F_NEXT, 2)])
        driver.transmitq.submit()
        assert device.receive() == (NetHeader(), noise(30) + noise(40, 1))


@row("VQ-SPLIT-D-08")
def test_indirect_table_of_a_wrong_length_or_with_a_wrong_next(engine):
    with engine(INDIRECT) as (driver, device):
        whole = placed(driver.memory, bytes(HEADER) + noise()).gpa
        heads = [indirect(driver, [(whole, HEADER + 60)], length) for length in (0, 15, 17)]
        heads += [indirect(driver, [(whole, HEADER + 60, DESC_F_NEXT, next), (whole, 1)]) for next in (2, 0xFFFF)]
        driver.transmitq.submit()
        assert until(device, lambda: driver.transmitq.ring.pending() == 5)
        assert [(done.head, done.written) for done in driver.transmitq.collect_all()] == [(head, 0) for head in heads]
        assert device.from_guest.frames == 0
        assert_serves(driver, device)
