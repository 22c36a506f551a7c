"""Chains written by hand, in either ring format, and what has to become of them.

An honest driver (ring/driver.py) puts together no chain that breaks a rule. Here any fields go into the ring, and
what a rule asks for is asserted: a refused chain goes back with length 0 and the ring goes on, a broken ring stops
for good. A chain is a list of (addr, len, flags); NEXT is set in all but its last descriptor.

The specification's sections, virtio 1.2: 2.7.5 and 2.7.5.3 (split), 2.8.6 and 2.8.7 (packed).
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest

from ring.driver import Buffer, DriverQueue
from ring.driver_packed import PackedDescriptor, PackedDescriptors
from ring.driver_parts import DESC_F_NEXT, DESCRIPTOR_BYTES
from ring.driver_split import Descriptor, DescriptorTable
from ring.errors import ChainError, RingBroken
from ring.virtqueue import VirtQueue

# addr (gpa), len (bytes), flags
Fields = tuple[int, int, int]


class Offered(NamedTuple):
    """A chain as the device meets it. name: its head (split) or buffer id (packed). places: where in the ring its
    descriptors are, which is what an error is about."""

    name: int
    places: list[int]


def _linked(descriptors: tuple[Fields, ...]) -> list[Fields]:
    *linked, last = descriptors
    return [(addr, len_, flags | DESC_F_NEXT) for addr, len_, flags in linked] + [last]


def offer(driver: DriverQueue, *descriptors: Fields, name: int = 1) -> Offered:
    """Make one chain of these available. Split: from descriptor ``name`` on, whatever was there."""
    if driver.packed:
        first = driver.ring.offer(_linked(descriptors), name)
    else:
        first = name
        for i, fields in enumerate(_linked(descriptors), name):
            driver.ring.desc[i].set(*fields, i + 1)
        driver.ring.offer(name)
    driver.publish()
    return Offered(name, [(first + i) % driver.ring.size for i in range(len(descriptors))])


def table(driver: DriverQueue, *entries: Fields) -> tuple[int, int]:
    """An indirect table of these in new memory, as the ring's format has it -> (gpa, bytes).

    Packed: entries simply follow each other; their ids, which mean nothing, are not 0.
    """
    gpa = driver.memory.alloc(DESCRIPTOR_BYTES * len(entries))
    if driver.packed:
        for i, fields in enumerate(entries):
            PackedDescriptors(driver.memory, gpa)[i].set(*fields, 0xBEEF)
    else:
        for i, fields in enumerate(_linked(entries)):
            DescriptorTable(driver.memory, gpa)[i].set(*fields, i + 1)
    return gpa, DESCRIPTOR_BYTES * len(entries)


def add_spoiled(queue: DriverQueue, buffers: list[Buffer],
                spoil: Callable[[list[Descriptor | PackedDescriptor]], None], direct: int | None = None) -> int:
    """An honest driver's chain, spoiled before the device can see it -> its name.

    spoil: gets the chain's descriptors in the ring, in order. On a packed ring the first one's flags cannot be
    spoiled: they are written when the chain is published. buffers, direct: as DriverQueue.add has them.
    """
    ring = queue.ring
    first = ring.next_avail
    name = queue.add(buffers, direct=direct)
    if queue.packed:
        count = (ring.next_avail - first) % (2 * ring.size)
        spoil([ring.desc[(first + i) % ring.size] for i in range(count)])
        return name
    chain = [ring.desc[name]]
    while chain[-1].flags & DESC_F_NEXT:
        chain.append(ring.desc[chain[-1].next])
    spoil(chain)
    return name


def give_back(driver: DriverQueue, device: VirtQueue, chain: object, written: int = 0) -> None:
    """Use a popped chain, or the error it raised, and see it come back so."""
    device.push(chain, written)
    device.publish()
    assert driver.ring.next_completion() == (chain.head, written)


def assert_goes_on(driver: DriverQueue, device: VirtQueue) -> None:
    """The next good chain is served as if nothing had been."""
    assert device.state.broken is None
    offer(driver, (driver.memory.alloc(1), 1, 0), name=driver.ring.size - 1)
    chain = device.pop()
    assert (chain.head, chain.read()) == (driver.ring.size - 1, b"\0")
    give_back(driver, device, chain)


def assert_refused(driver: DriverQueue, device: VirtQueue, code: str, *descriptors: Fields, at: int = 0,
                   in_table: int | None = None) -> None:
    """The chain of ``descriptors`` breaks the rule ``code``, goes back whole with length 0, and the ring goes on.

    The one to blame is descriptor ``at`` of the chain, or the entry ``in_table`` of its indirect table.
    """
    offered = offer(driver, *descriptors)
    with pytest.raises(ChainError) as caught:
        device.pop()
    blamed = offered.places[at] if in_table is None else in_table
    error = caught.value
    assert (error.code, error.at, error.head) == (code, blamed, offered.name)
    assert error.slots == (len(descriptors) if driver.packed else 1)
    assert f"descriptor {blamed}" in str(error)
    give_back(driver, device, error)
    assert_goes_on(driver, device)


def assert_broken(driver: DriverQueue, device: VirtQueue, code: str, at: int | None = None) -> None:
    """The ring has stopped at rule ``code`` (about index ``at``) for good, says so whatever is asked of it, and is
    not written any more."""
    before = driver.memory.snapshot()
    for verb in (device.see, device.pop, device.take, device.arm, device.publish, device.decide):
        with pytest.raises(RingBroken) as caught:
            verb()
        assert caught.value.code == code
        assert at is None or caught.value.at == at
    assert device.state.broken.code == code
    assert driver.memory.snapshot() == before
