"""tools/bench: how samples are taken and summed up. The measurement itself is for people to run."""

import argparse
import importlib.machinery
import importlib.util
import os
import shutil
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

PROGRAM = Path(__file__).resolve().parent.parent / "tools" / "bench"
if not PROGRAM.exists():
    pytest.skip("no tools here: the package is installed, not checked out", allow_module_level=True)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(PROGRAM.parent))
    loader = importlib.machinery.SourceFileLoader("bench_program", str(PROGRAM))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("bench_program", loader))
    loader.exec_module(module)
    yield module
    sys.modules.pop("bootstrap", None)


class Side:
    """Measures what it is told to, and notes how often."""

    def __init__(self, *values: float) -> None:
        self.values = list(values)

    def throughput(self, _direction: str, _seconds: int) -> float:
        return self.values.pop(0)


def disturbed(monkeypatch: pytest.MonkeyPatch, bench: ModuleType, *shares: float) -> None:
    """Let the next samples be disturbed by so much of a processor."""
    answers = iter(shares)
    monkeypatch.setattr(bench.Foreign, "share", lambda _self: next(answers))


def test_ratio_is_that_of_the_medians_and_spread_that_of_the_rounds(bench: ModuleType) -> None:
    result = bench.summary([10.0, 30.0, 20.0], [10.0, 10.0, 40.0])
    assert (result["vdev"], result["peer"], result["ratio"]) == (20.0, 10.0, 2.0)
    assert result["ratio_quartiles"] == [0.5, 3.0]  # of 0.5, 1 and 3
    assert result["samples_vdev"] == [10.0, 30.0, 20.0]


def test_disturbed_samples_are_thrown_away(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    disturbed(monkeypatch, bench, 0.5, 0.06, 0.04)
    assert bench.sample(Side(1.0, 2.0, 3.0), [os.getpid()], "guest-to-host", 1) == (3.0, 2)


def test_a_machine_that_is_never_quiet_gives_the_last_sample_and_says_so(
        bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    disturbed(monkeypatch, bench, *[1.0] * bench.ATTEMPTS)
    value, spoilt = bench.sample(Side(*range(bench.ATTEMPTS)), [os.getpid()], "guest-to-host", 1)
    assert (value, spoilt) == (bench.ATTEMPTS - 1, bench.ATTEMPTS)


def test_own_work_is_not_foreign(bench: ModuleType) -> None:
    """What this process burns is seen as busy, and as its own."""
    busy, own = bench.busy_ticks()[0], bench.own_ticks([os.getpid()])
    until = time.process_time() + 0.3
    while time.process_time() < until:
        pass
    used = bench.own_ticks([os.getpid()]) - own
    assert used >= 0.2 * bench.TICKS
    assert bench.busy_ticks()[0] - busy >= used - 5


def test_a_process_that_is_gone_used_nothing(bench: ModuleType) -> None:
    assert bench.own_ticks([2**22 + 1]) == 0


def test_each_ring_format_is_held_against_split(bench: ModuleType) -> None:
    result = bench.against_split({"split": [100.0, 80.0, 120.0], "packed": [90.0, 88.0, 180.0]})
    assert result["split"]["ratio"] == 1 and result["packed"]["cycles"] == 90.0
    assert result["packed"]["ratio"] == 0.9 and result["packed"]["samples"] == 3
    assert result["packed"]["ratio_quartiles"] == [0.9, 1.5]  # of 0.9, 1.1 and 1.5


def test_rings_are_measured(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """That it runs and measures every format; what comes out is for a quiet machine."""
    if not shutil.which("gcc") or not shutil.which("taskset"):
        pytest.skip("the benchmark needs gcc and taskset (util-linux)")
    results = bench.rings(argparse.Namespace(rounds=20))
    bench.print_rings(results)
    assert list(results["shapes"]) == ["one-descriptor", "two-descriptors", "indirect-table"]
    for formats in results["shapes"].values():
        assert list(formats) == ["split", "packed", "split-in-order", "packed-in-order"]
        assert all(2 <= r["samples"] <= 20 and r["cycles"] > 0 for r in formats.values())
    assert capsys.readouterr().out.count("indirect-table") == 4
