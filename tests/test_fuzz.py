"""Fuzzing the C core, guided by coverage: walker, notification events, memory table, and software offloads
(tests/fuzz, libFuzzer).

The corpus, inputs that together reach all that was ever reached, is replayed in every run; new inputs are looked for
with --long. An input that ends a fuzzer is printed as hex: what was wrong becomes a test of its own, and the input
a file of the corpus.
"""

import re
import shutil
from pathlib import Path

import pytest

from ring import sources
from vdev.testing.cprograms import FUZZER, Builder, Fault

HERE = Path(__file__).resolve().parent / "fuzz"
RING = HERE.parent.parent / "ring"
if not sources.compiled(RING):
    pytest.skip("no C sources here: the package is installed, not checked out", allow_module_level=True)

FUZZERS = sorted(path.stem for path in HERE.glob("*.c"))
BYTES_MAX = 200
SECONDS = 60 // len(FUZZERS)


@pytest.fixture(scope="module")
def builder(shared_folder: Path) -> Builder:
    (shared_folder / "fuzz").mkdir(exist_ok=True)
    return Builder(HERE, RING, shared_folder / "fuzz", included=(HERE.parent / "c",))


def corpus(fuzzer: str) -> list[Path]:
    return sorted((HERE / "corpus" / fuzzer).iterdir())


def fuzz(builder: Builder, fuzzer: str, folder: Path, seconds: int, fault: Fault | None = None) -> tuple[int, str]:
    """Look for inputs from a copy of the corpus on, in ``folder``. -> (status, output); the
    output ends with what ended the fuzzer, in hex."""
    inputs = shutil.copytree(HERE / "corpus" / fuzzer, folder / "inputs")
    found = folder / "found-"
    done = builder.run(FUZZER, fuzzer, f"-max_total_time={seconds}", f"-max_len={BYTES_MAX}", "-timeout=30",
                       f"-artifact_prefix={found}", inputs, fault=fault, seconds=seconds + 200)
    hexes = "".join(f"{path.name}: {path.read_bytes().hex()}\n" for path in folder.glob("found-*"))
    return done.returncode, f"{done.stderr[-4000:]}\n{hexes}"


@pytest.mark.parametrize("fuzzer", FUZZERS)
def test_corpus_is_replayed(builder: Builder, fuzzer: str) -> None:
    files = corpus(fuzzer)
    first, *others = map(str, files)
    done = builder.run(FUZZER, fuzzer, first, *others)
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(re.findall(r"^Executed ", done.stderr, re.M)) == len(files)


def test_corpus_is_small() -> None:
    assert FUZZERS == ["events", "memory_table", "offload", "walker"]
    # tests/test_fuzz_control.py is about the fifth.
    assert sorted(path.name for path in (HERE / "corpus").iterdir()) == sorted([*FUZZERS, "control"])
    for fuzzer in FUZZERS:
        assert 10 < len(corpus(fuzzer)) < 150
        assert max(path.stat().st_size for path in corpus(fuzzer)) < BYTES_MAX


@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.parametrize("fuzzer", FUZZERS)
def test_fuzzing_finds_nothing(builder: Builder, fuzzer: str, tmp_path: Path) -> None:
    status, said = fuzz(builder, fuzzer, tmp_path, SECONDS)
    assert status == 0, said
    print(re.findall(r"^Done .*", said, re.M)[-1])


@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.parametrize("fuzzer, fault", [
    ("walker", Fault("core/split.inl", "split_walk", "d.next >= w->entries", "d.next > w->entries")),
    ("walker", Fault("core/packed.inl", "packed_next", "c->slots == q->size", "c->slots > q->size")),
    ("walker", Fault("core/walk.inl", "walk_enter", " || entries > q->table_limit", "")),
    ("walker", Fault("core/virtqueue.c", "adopt", "q->region_hint = 0", "(void)0")),
    ("events", Fault("core/split.inl", "split_decide", "< (uint16_t)(now - before)", "<= (uint16_t)(now - before)")),
    ("events", Fault("core/packed.inl", "packed_decide", "!= q->published_wrap", "== q->published_wrap")),
    ("events", Fault("core/split.inl", "split_arm", "known = q->avail_seen", "known = q->next_avail")),
    ("memory_table", Fault("core/guestmem.c", "wraps", "UINT64_MAX - size", "UINT64_MAX - (size - 1)")),
    ("memory_table", Fault("core/guestmem.c", "guestmem_uva", "len <= r->size - (uva - r->uva)", "len <= r->size")),
    ("memory_table", Fault("core/internal.h", "guestmem_find", "middle + 1", "middle + 2")),
    ("offload", Fault("plane/segment.c", "read_transport", "s->length > r->have ?", "s->length > OFFLOAD_HEADERS ?")),
    ("offload", Fault("plane/segment.c", "end_datagram", "length > s->end - s->network", "length > s->end")),
    ("offload", Fault("plane/segment.c", "plan", "s->size < in_first", "s->size == 0")),
    ("offload", Fault("plane/checksum.c", "plus_at", "odd ?", "odd && part > UINT32_MAX ?")),
], ids=lambda value: value if isinstance(value, str) else value.function)
def test_fuzzing_finds_a_mistake(builder: Builder, fuzzer: str, fault: Fault, tmp_path: Path) -> None:
    status, said = fuzz(builder, fuzzer, tmp_path, SECONDS, fault)
    assert status != 0 and "found-" in said, said
