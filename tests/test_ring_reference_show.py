"""A ring as text. docs/rings.md shows it at length, and is run; here is what does not come up there."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from ring.driver_memory import GuestMemory
from ring.driver_packed import PackedRing
from ring.driver_split import SplitRing
from ring.reference import PackedQueue, SplitQueue
from ring.reference.show import lines, show


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory(0x4000) as memory:
        yield memory


def device(memory: GuestMemory, ring: SplitRing | PackedRing) -> SplitQueue | PackedQueue:
    desc, avail, used = (memory.uva(area.gpa) for area in ring.areas)
    kind = PackedQueue if isinstance(ring, PackedRing) else SplitQueue
    return kind(memory, size=ring.size, desc=desc, avail=avail, used=used)


def test_split_every_field_is_shown(memory, capsys):
    ring = SplitRing(memory, 2, 0)
    ring.desc[0].set(0xFFFF_FFFF_FFFF_0000, 0xFFFF_FFFF, 0xFFFF, 65535)
    ring.avail.flags, ring.avail.idx, ring.avail.ring[1], ring.avail.used_event = 11, 12, 13, 14
    ring.used.flags, ring.used.idx, ring.used.avail_event = 21, 22, 25
    ring.used.ring[0].id, ring.used.ring[0].len = 23, 24
    show(device(memory, ring))
    assert capsys.readouterr().out.splitlines() == [
        "descriptor table (written by the driver)",
        "     0: addr 0xffffffffffff0000  len 4294967295  next 65535  flags NEXT WRITE INDIRECT 0xfff8",
        "     1: addr 0x00000000  len 0      next 0      flags 0",
        "available ring (written by the driver)  flags 11  idx 12  used_event 14",
        "     0: head 0",
        "     1: head 13",
        "used ring (written by the device)  flags 21  idx 22  avail_event 25",
        "     0: id 23  len 24",
        "     1: id 0  len 0",
        "the device knows  next_avail 0  known 0  next_used 22  published 22",
    ]


def test_packed_every_field_is_shown(memory, capsys):
    ring = PackedRing(memory, 3, 0)
    for slot, flags in enumerate((0x80, 0x8000, 0x8080)):
        ring.desc[slot].set(0x1000 + slot, 10 + slot, flags, 20 + slot)
    ring.driver_event.set(0x8002, 2)
    ring.device_event.set(0x0001, 0x1001)
    show(device(memory, ring))
    assert capsys.readouterr().out.splitlines() == [
        "descriptor ring (written by both)",
        "     0: addr 0x00001000  len 10     id 20     available in 1  flags AVAIL",
        "     1: addr 0x00001001  len 11     id 21     available in 0  flags USED",
        "     2: addr 0x00001002  len 12     id 22     used      in 1  flags AVAIL USED",
        "driver event suppression (written by the driver)  flags DESC  slot 2  counter 1",
        "device event suppression (written by the device)  flags 0x1001  slot 1  counter 0",
        "the device knows  next_avail 0  counter 1  next_used 0  counter 1  published 0",
    ]


def test_like_neighbours_share_a_line(memory):
    ring = SplitRing(memory, 256, 0)
    ring.avail.ring[100] = 7
    shown = list(lines(queue := device(memory, ring), queue.state))
    assert [line for line in shown if "head" in line] == ["  0-99: head 0", "   100: head 7", "101-255: head 0"]


def test_another_device_may_tell_where_it_stands(memory):
    queue = device(memory, PackedRing(memory, 4, 0))
    *_, last = lines(queue, replace(queue.state, next_avail=3, avail_wrap=False))
    assert "next_avail 3  counter 0  next_used 0  counter 1" in last


def test_nothing_is_written(memory):
    for ring in (SplitRing(memory, 4, 0), PackedRing(memory, 4, 0)):
        queue = device(memory, ring)
        before = memory.snapshot()
        list(lines(queue, queue.state))
        assert memory.snapshot() == before
