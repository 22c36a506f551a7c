"""What the programs in tests/c are there to find, they find: each is built from sources into which a mistake was
put, and must fail, and for the right reason. Otherwise its silence would say nothing."""

import os
from pathlib import Path

import pytest

from ring import sources
from vdev.testing.cprograms import FAST, GCC, THREADS, Builder, Fault, found_fault, names_in

HERE = Path(__file__).resolve().parent / "c"
RING = HERE.parent.parent / "ring"
if not sources.compiled(RING):
    pytest.skip("no C sources here: the package is installed, not checked out", allow_module_level=True)

# Each is built anew, and some mistakes show after many rounds only.
pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]

INLINE = {"split": "core/split.inl", "packed": "core/packed.inl"}


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    return Builder(HERE, RING, tmp_path_factory.mktemp("c"))


def unordered(format: str, function: str, healthy: str, faulty: str) -> object:
    return pytest.param(format, Fault(INLINE[format], function, healthy, faulty), id=function)


@pytest.mark.parametrize("format, fault", [
    unordered("split", "split_see", "load16_acquire", "load16"),
    unordered("split", "split_publish", "store16_release", "store16"),
    unordered("packed", "packed_is_available", "load16_acquire", "load16"),
    unordered("packed", "packed_publish", "store16_release", "store16"),
])
def test_R39_access_without_its_order_is_a_data_race(builder: Builder, format: str, fault: Fault) -> None:
    """On x86-64 these mistakes do no harm; ThreadSanitizer knows what may be relied on, not the machine. Busy polling,
    for an eventfd between the threads would order them too."""
    done = builder.run(THREADS, "pump", f"R39_busy_poll_{format}", fault=fault)
    assert found_fault(done) and "ThreadSanitizer: data race" in done.stderr


@pytest.mark.parametrize("by", ["by_flags", "by_events"])
@pytest.mark.parametrize("format", ["split", "packed"])
@pytest.mark.parametrize("verb", ["arm", "decide"])
def test_missing_full_barrier_loses_a_notification(builder: Builder, format: str, by: str, verb: str) -> None:
    """The compiler keeps the order, the processor does not; and one side without its barrier is enough."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("only one processor: two threads never run at once")
    fault = Fault(INLINE[format], f"{format}_{verb}", "full_barrier();", '__asm__ volatile("" ::: "memory");')
    done = builder.run(FAST, "litmus", f"{by}_{format}", 50_000_000, fault=fault, seconds=280)
    both_missed = {"arm": "driver_kicks || device_saw", "decide": "device_calls || driver_saw"}[verb]
    assert done.returncode == 1 and both_missed in done.stderr


@pytest.mark.parametrize("format", ["split", "packed"])
@pytest.mark.parametrize("fault", [
    pytest.param(Fault("plane/worker.c", "ask", "lanes[i], true", "lanes[i], false"), id="asks_for_no_kicks"),
    pytest.param(Fault("plane/worker.c", "ask", "p->lanes[i]->work != 0", "false"), id="does_not_look_again"),
])
def test_sleeping_after_polling_loses_a_notification(builder: Builder, fault: Fault, format: str) -> None:
    """A worker that does not ask for kicks before it sleeps, or does not look once more after it asked. The drivers
    stand still then, and say so."""
    done = builder.run(GCC, "workers", f"polling_for_20_us_{format}", fault=fault, seconds=200)
    assert done.returncode == 1 and "s.errors[i] is 1, not 0" in done.stderr


MISSING = {
    "region": Fault("core/internal.h", "guestmem_translate", "return RING_E_UNMAPPED", "r = mem->regions"),
    "table_limit": Fault("core/walk.inl", "walk_enter", " || entries > q->table_limit", ""),
    "head_range": Fault("core/split.inl", "split_take", "head >= q->size", "0"),
    "next_range": Fault("core/split.inl", "split_walk", "d.next >= w->entries", "0"),
}


@pytest.mark.parametrize("missing, program, name", [
    ("region", "mutate", "R28_R29_R31_R35_step_calls_split"),
    ("region", "mutate", "R28_R29_R31_R35_step_calls_packed"),
    ("region", "mutate", "R03_R26_R50_R51_pump_mergeable_indirect_split"),
    ("region", "mutate", "R03_R26_R50_R51_pump_mergeable_indirect_packed"),
    ("region", "rings", "any_ring_contents_packed"),
    ("table_limit", "rings", "R26_longest_indirect_table_fits_its_private_copy_split"),
    ("table_limit", "rings", "R26_longest_indirect_table_fits_its_private_copy_packed"),
    ("head_range", "rings", "any_ring_contents_split"),
    ("next_range", "rings", "any_ring_contents_split"),
])
def test_missing_check_is_found(builder: Builder, missing: str, program: str, name: str) -> None:
    done = builder.run(GCC, program, name, fault=MISSING[missing])
    assert found_fault(done), f"ended with {done.returncode}\n{done.stdout}{done.stderr}"


MARK = "or8_release(&log->bits[byte], (uint8_t)(((1u << count) - 1) << from));"


def marking(faulty: str) -> Fault:
    """``faulty`` sets the bits ``bits`` of the byte ``to``."""
    return Fault("core/dirty.c", "mark", MARK, "uint8_t *to = &log->bits[byte], bits = (uint8_t)(((1u << count) - 1) "
                                               f"<< from); {faulty}")


@pytest.mark.parametrize("program, faulty", [
    ("VU_LOG_B_06_bit_comes_after_the_data", "__atomic_fetch_or(to, bits, __ATOMIC_RELAXED);"),
    ("VU_LOG_B_06_two_threads_share_a_byte", "*to = (uint8_t)(*to | bits);"),
], ids=["unordered", "not_atomic"])
def test_VU_LOG_B_06_careless_mark_is_a_data_race(builder: Builder, program: str, faulty: str) -> None:
    done = builder.run(THREADS, "dirty", program, fault=marking(faulty))
    assert found_fault(done) and "ThreadSanitizer: data race" in done.stderr


def test_VU_LOG_B_06_mark_is_lost_if_the_bit_is_looked_at_first(builder: Builder) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("only one processor: two threads never run at once")
    looks = marking("if ((__atomic_load_n(to, __ATOMIC_RELAXED) & bits) != bits) or8_release(to, bits);")
    done = builder.run(FAST, "dirty", "VU_LOG_B_06_no_mark_is_lost", 50_000_000, fault=looks, seconds=280)
    assert done.returncode == 1 and "copy is " in done.stderr


# Every rule of the walkers, and what a sanitizer would not see: none of it may go unnoticed.
UNLAWFUL = [
    Fault("core/internal.h", "guestmem_translate", "return RING_E_UNMAPPED", "r = mem->regions"),
    Fault("core/internal.h", "guestmem_translate", "n == max", "n > max"),
    Fault("core/internal.h", "guestmem_translate", "len -= part", "len = 0"),
    Fault("core/internal.h", "guestmem_run", "len > r->size - offset", "len > r->size"),
    Fault("core/internal.h", "guestmem_find", "likely(gpa - r->gpa < r->size)", "likely(gpa >= r->gpa)"),
    Fault("core/walk.inl", "walk_buffer", "used >= max || ", ""),
    Fault("core/walk.inl", "walk_buffer", "w->writable_seen = true", "(void)0"),
    Fault("core/walk.inl", "walk_buffer", "> UINT32_MAX", "> UINT64_MAX - 1"),
    Fault("core/walk.inl", "walk_enter", "entries == 0 || ", ""),
    Fault("core/walk.inl", "walk_enter", "len % sizeof(struct vring_desc) || ", ""),
    Fault("core/walk.inl", "walk_enter", " || entries > q->table_limit", ""),
    Fault("core/walk.inl", "walk_enter", "!r", "0"),
    Fault("core/split.inl", "split_see", "ahead > q->size", "0"),
    Fault("core/split.inl", "split_take", "head >= q->size", "0"),
    Fault("core/split.inl", "split_walk", "w->steps_left == 0", "w->steps_left + 1 == 0"),
    Fault("core/split.inl", "split_walk", "d.next >= w->entries", "d.next >= q->size"),
    Fault("core/split.inl", "split_enter_indirect", "!q->indirect", "0"),
    Fault("core/split.inl", "split_enter_indirect", "w->indirect", "0"),
    Fault("core/split.inl", "split_enter_indirect", "d->flags & DESC_F_NEXT", "0"),
    Fault("core/packed.inl", "packed_is_available", " && !!(flags & PACKED_F_USED) != wrap", ""),
    Fault("core/packed.inl", "packed_next", "c->slots == q->size", "c->slots > q->size"),
    Fault("core/packed.inl", "packed_advance", "*wrap ^= next / q->size & 1", "*wrap ^= 0 * next"),
    Fault("core/packed.inl", "packed_bad", "goes_on ?", "goes_on && at ?"),
    Fault("core/packed.inl", "packed_walk", "d.flags & DESC_F_NEXT || c->slots > 1", "0"),
    Fault("core/packed.inl", "packed_walk", "++w->next == w->entries", "++w->next >= w->entries - 1"),
]


@pytest.mark.parametrize("fault", UNLAWFUL, ids=lambda fault: f"{fault.function}-{fault.healthy[:24]}")
def test_missing_rule_shows_in_some_small_ring(builder: Builder, fault: Fault) -> None:
    """In the format that the rule is about; where it is about both, in each."""
    formats = [name for name in names_in(HERE / "enumerate.c") if Path(fault.file).stem in name] \
        or names_in(HERE / "enumerate.c")
    for name in formats:
        done = builder.run(GCC, "enumerate", name, fault=fault)
        assert done.returncode == 1 and "enumerate.c:" in done.stderr or found_fault(done), \
            f"{name} ended with {done.returncode}\n{done.stdout}{done.stderr[-2000:]}"


# Calculations whose mistakes no small ring shows.
MISCALCULATED = {
    "many_slots_on_and_back_are_as_many_times_one": Fault(
        "core/packed.inl", "packed_unpop", "2 * q->size - slots", "2 * q->size - 1 - slots"),
    "one_slot_on_in_a_packed_ring_of_every_size": Fault(
        "core/packed.inl", "packed_advance", "uint32_t next = *slot + by", "uint32_t next = (*slot + by) & 0x7fff"),
    "packed_bases": Fault("core/virtqueue.c", "start_at", "(used & 0x7fff) >= q->size", "(used & 0x7fff) > q->size"),
    "split_bases": Fault("core/virtqueue.c", "start_at", "load16(&q->used->idx)", "q->next_avail"),
    "split_event_index": Fault(
        "core/split.inl", "split_decide", "(uint16_t)(now - event - 1) <", "(now - event - 1) <"),
    "packed_event_positions": Fault(
        "core/packed.inl", "packed_decide", "off = (uint16_t)(off - q->size)", "off = (uint16_t)(off + q->size)"),
    "packed_event_structures": Fault("core/packed.inl", "packed_decide", " & PACKED_EVENT_MASK", " & 7"),
}


@pytest.mark.parametrize("name", MISCALCULATED)
def test_miscalculation_is_found(builder: Builder, name: str) -> None:
    done = builder.run(FAST, "arithmetic", name, fault=MISCALCULATED[name])
    assert done.returncode == 1 and "arithmetic.c:" in done.stderr, f"{done.returncode}\n{done.stdout}{done.stderr}"


OFFLOADS = {
    "sum_of_any_length_from_anywhere": Fault("plane/checksum.c", "plus_at", "odd ?", "odd && part > UINT32_MAX ?"),
    "N01_N02_checksum_of_every_start_and_place": Fault(
        "plane/checksum.c", "offload_checksum", "csum_offset + 2 > given", "csum_offset + 1 > given"),
    "good_frames_are_cut": Fault("plane/segment.c", "segmenter_next", "s->part = s->size", "(void)0"),
    "N08_frames_of_every_length": Fault(
        "plane/segment.c", "read_transport", "s->transport + length > r->have", "0"),
    "N08_headers_longer_than_what_is_looked_at": Fault(
        "plane/segment.c", "segmenter_start", "smaller(smaller(given, length), OFFLOAD_HEADERS)",
        "smaller(given, length)"),
}


@pytest.mark.parametrize("name", OFFLOADS)
def test_careless_offload_is_found(builder: Builder, name: str) -> None:
    done = builder.run(GCC, "offload", name, fault=OFFLOADS[name])
    assert done.returncode == 1 and "/c/" in done.stderr or found_fault(done), \
        f"ended with {done.returncode}\n{done.stdout}{done.stderr}"


DOORS = {
    "two_inside": Fault("plane/fabric.c", "enter_alone", "__atomic_load_n(&d->users, __ATOMIC_RELAXED) == 0 &&\n"
                        "            __atomic_compare_exchange_n(&d->users, &nobody, 1, false, __ATOMIC_SEQ_CST, "
                        "__ATOMIC_RELAXED)", "__atomic_fetch_add(&d->users, 1, __ATOMIC_SEQ_CST) + nobody < 9"),
    "shut_too_soon": Fault("plane/fabric.c", "lane_shut", "__atomic_load_n(&d->users, __ATOMIC_SEQ_CST); i++",
                           "__atomic_load_n(&d->users, __ATOMIC_SEQ_CST) > 1; i++"),
}


@pytest.mark.parametrize("name, fault", [
    ("two_to_one_split", DOORS["two_inside"]),
    ("detached_under_traffic_packed", DOORS["shut_too_soon"]),
], ids=DOORS)
def test_a_door_that_does_not_hold_is_a_data_race(builder: Builder, name: str, fault: Fault) -> None:
    for _ in range(60):  # whether two meet there is chance
        done = builder.run(THREADS, "switch", name, fault=fault)
        if done.returncode:
            break
    assert found_fault(done) and "ThreadSanitizer: data race" in done.stderr
