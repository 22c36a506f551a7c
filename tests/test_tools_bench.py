"""tools/bench: how samples are taken, thrown away and summed up, and what is made of them. The measurement itself is
for people to run."""

import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether

from vdev.testing.measure import link_counters
from vdev.testing.testpmd import Counters, why_no_testpmd
from vdev.testing.waiting import wait_until

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "tools" / "bench"
if not PROGRAM.exists():
    pytest.skip("no tools here: the package is installed, not checked out", allow_module_level=True)

MODULES = ("catalogue", "chart", "figures", "guest", "lan", "machine", "paced", "parts", "polling", "quiet", "results",
           "ring_formats", "rounds", "table", "tap")


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    """The modules of tools/benchmarks."""
    sys.path.insert(0, str(PROGRAM.parent))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(f"benchmarks.{name}") for name in MODULES})
    finally:
        sys.path.remove(str(PROGRAM.parent))


# ------------------------------------------------------------------------------------------------- statistics


def figure(bench: SimpleNamespace, ours: tuple[float, ...] = (10.0, 30.0, 20.0),
           peer: tuple[float, ...] = (10.0, 10.0, 40.0), **about: object):
    return bench.figures.Figure("64 B, split", "cost", "ns/frame", ours, peer, **about)


def test_ratio_is_that_of_the_medians_and_spread_that_of_the_rounds(bench: SimpleNamespace) -> None:
    made = figure(bench)
    assert (made.median, made.peer_median, made.ratio) == (20.0, 10.0, 2.0)
    assert made.quartiles == (0.75, 2.0)  # of 0.5, 1 and 3


def test_target_is_at_least_or_at_most_as_the_quantity_asks(bench: SimpleNamespace) -> None:
    assert figure(bench).met is None
    assert figure(bench, target=2.0).met is True and figure(bench, target=1.9).met is False
    assert figure(bench, target=2.0, more_is_better=True).met is True
    assert figure(bench, target=2.1, more_is_better=True).met is False
    assert not figure(bench, kept=3).doubtful and figure(bench, kept=4).doubtful  # of six
    assert figure(bench, limit=20.0).met is True and figure(bench, limit=19.9, target=2.0).met is False


def test_a_peer_that_used_nothing_gives_no_ratio(bench: SimpleNamespace) -> None:
    made = figure(bench, peer=(0.0, 0.0, 0.0))
    assert made.ratio is None and made.quartiles is None


def test_percentile_is_a_sample_that_so_many_do_not_exceed(bench: SimpleNamespace) -> None:
    samples = [float(value) for value in range(100, 0, -1)]
    assert [bench.figures.percentile(samples, share) for share in (0.5, 0.99, 1.0)] == [50.0, 99.0, 100.0]
    assert bench.figures.percentile([7.0], 0.5) == 7.0
    with pytest.raises(ValueError):
        bench.figures.percentile([], 0.5)


def test_percentile_of_counted_values(bench: SimpleNamespace) -> None:
    counts = {300: 1, 100: 98, 200: 1, 50: 0}
    assert [bench.paced.weighted_percentile(counts, share) for share in (0.5, 0.99, 1.0)] == [100, 200, 300]
    with pytest.raises(ValueError):
        bench.paced.weighted_percentile({100: 0}, 0.5)


def test_each_ring_format_has_its_bursts(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = bench.ring_formats.parsed("one split 10\none packed 9\none split 20\n")
    assert samples == {"one": {"split": [10.0, 20.0], "packed": [9.0]}}
    monkeypatch.setattr(bench.ring_formats, "BURSTS", 3)
    assert bench.ring_formats.gathered([1.0, 9.0, 2.0, 5.0, 5.0, 8.0, 7.0]) == (2.0, 5.0)
    assert bench.ring_formats.gathered([1.0, 3.0]) == (2.0,)
    with pytest.raises(SystemExit, match="too busy"):
        bench.ring_formats.parsed("")


# ----------------------------------------------------------------------------------------- samples in turn


def side(bench: SimpleNamespace, name: str, *answers: tuple[float, float], calls: list[str] | None = None):
    """A side that answers so, and notes in ``calls`` that it was asked."""
    left = list(answers)

    class Prepared(bench.rounds.Side):
        def sample(self, _seconds: float):
            if calls is not None:
                calls.append(self.name)
            value, disturbance = left.pop(0)
            return {"rate": value}, disturbance

    made = Prepared()
    made.name = name
    return made


@pytest.fixture(autouse=True)
def at_once(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.rounds, "SETTLE", 0)


def test_sides_take_turns_and_in_beginning(bench: SimpleNamespace) -> None:
    calls: list[str] = []
    sides = [side(bench, name, *[(value, 0.0) for value in values], calls=calls)
             for name, values in (("vdev", (1.0, 2.0)), ("peer", (3.0, 4.0)))]
    samples = bench.rounds.interleave(sides, 2, 0)
    assert calls == ["peer", "vdev", "vdev", "peer"]
    made = samples.figure("64 B", "rate", "frames/s", "peer", 10, target=1.0)
    assert (made.ours, made.peer, made.target) == ((10.0, 20.0), (30.0, 40.0), 1.0)


def test_disturbed_samples_are_thrown_away_and_counted(bench: SimpleNamespace) -> None:
    sides = [side(bench, "vdev", (1.0, 0.1), (2.0, 1e-6), (3.0, 0.0)), side(bench, "peer", (4.0, 0.0))]
    samples = bench.rounds.interleave(sides, 1, 0)
    assert samples.of("vdev", "rate") == (3.0,)
    made = samples.figure("64 B", "rate", "frames/s", "peer")
    assert (made.thrown_away, made.kept) == (2, 0)


def test_a_machine_that_is_never_quiet_gives_the_best_sample_there_was_and_says_so(bench: SimpleNamespace) -> None:
    attempts = bench.rounds.Side.attempts
    disturbances = [0.5, 0.1, *[0.4] * (attempts - 2)]
    sides = [side(bench, "vdev", *[(float(number), disturbance) for number, disturbance in enumerate(disturbances)])]
    samples = bench.rounds.interleave(sides, 1, 0)
    assert samples.of("vdev", "rate") == (1.0,)
    assert (samples.thrown_away["vdev"], samples.kept["vdev"]) == (attempts - 1, 1)


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def program(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def test_a_side_that_is_not_measured_stands_still(bench: SimpleNamespace) -> None:
    with subprocess.Popen(["sleep", "100"]) as one, subprocess.Popen(["sleep", "100"]) as other:
        try:
            seen = []

            class Looking(bench.rounds.Side):
                def sample(self, _seconds: float):
                    still = {one.pid, other.pid}.difference(self.pids).pop()
                    wait_until(lambda: (state(self.pids[0]), state(still)) == ("S", "T"), f"{self.name} alone")
                    seen.append(self.name)
                    return {}, 0.0

            sides = [Looking(), Looking()]
            for made, name, child in zip(sides, ("one", "other"), (one, other), strict=True):
                made.name, made.pids = name, (child.pid,)
            bench.rounds.interleave(sides, 1, 0)
            assert sorted(seen) == ["one", "other"]
            wait_until(lambda: (state(one.pid), state(other.pid)) == ("S", "S"), "both going on")
        finally:
            one.kill()
            other.kill()


# ---------------------------------------------------------------------------------------- who was disturbed


STATUS = "Name:\tvdev\nRssAnon:\t   20480 kB\nvoluntary_ctxt_switches:\t17\nnonvoluntary_ctxt_switches:\t4\n"


def test_numbers_of_the_kernel_are_understood(bench: SimpleNamespace) -> None:
    assert bench.quiet.parse_involuntary(STATUS) == 4
    assert bench.quiet.parse_waited("2000000000 1500000000 7\n") == 1.5
    assert bench.guest.anonymous_megabytes(STATUS) == 20.0
    assert bench.quiet.processor_ticks("cpu  1 2 4 800 16 32 64 128 0 0\ncpu0 ...") == (7, 128)


def burn(seconds: float) -> None:
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


def test_a_thread_that_had_to_share_its_processor_was_disturbed(bench: SimpleNamespace) -> None:
    """Two that burn on one processor preempt each other; one that sleeps is left in peace."""
    cpu = min(os.sched_getaffinity(0))
    burner = ["taskset", "-c", str(cpu), sys.executable, "-c", "while True: pass"]
    if not shutil.which("taskset"):
        pytest.skip("no taskset on this machine: apt install util-linux")
    with subprocess.Popen(burner) as one, subprocess.Popen(burner) as other, subprocess.Popen(["sleep", "99"]) as calm:
        try:
            threads = [thread for child in (one, other) for thread in bench.quiet.thread_ids(child.pid)]
            before = bench.quiet.involuntary_switches(threads)
            # Until it sleeps it is a program being started, which others may well interrupt.
            wait_until(lambda: state(calm.pid) == "S" and program(calm.pid) == "sleep", "the calm one asleep")
            watch, quiet = bench.quiet.Watch(threads), bench.quiet.involuntary_switches([calm.pid])
            deadline = time.monotonic() + 20
            while bench.quiet.involuntary_switches(threads) < before + 3 and time.monotonic() < deadline:
                time.sleep(0.05)
            assert watch.disturbance() > 0.1  # each waits for half of the time
            assert bench.quiet.involuntary_switches([calm.pid]) == quiet
        finally:
            for child in (one, other, calm):
                child.kill()


def test_stolen_time_disturbs_everybody(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    stolen = iter([(10, 0), (11, 0), (12, 1)])
    monkeypatch.setattr(bench.quiet, "_processors", lambda: next(stolen))
    watch = bench.quiet.Watch([])
    assert watch.disturbance() == 0.0 and watch.disturbance() > 0.0


def test_own_work_is_not_foreign(bench: SimpleNamespace) -> None:
    """What this process burns is seen as its own."""
    own = bench.quiet.own_ticks([os.getpid()])
    exact = bench.quiet.cpu_seconds(os.getpid())
    burn(0.3)
    assert bench.quiet.own_ticks([os.getpid()]) - own >= 0.2 * bench.quiet.TICKS
    assert 0.3 <= bench.quiet.cpu_seconds(os.getpid()) - exact < 5


def test_a_process_that_is_gone_used_nothing(bench: SimpleNamespace) -> None:
    assert bench.quiet.own_ticks([2**22 + 1]) == 0
    assert bench.quiet.involuntary_switches([2**22 + 1]) == 0
    assert bench.quiet.thread_ids(2**22 + 1) == []


def test_pinned_threads_stay_where_they_are_put(bench: SimpleNamespace) -> None:
    cpu = max(os.sched_getaffinity(0))
    with subprocess.Popen(["sleep", "99"]) as child:
        try:
            bench.quiet.pin(child.pid, cpu)
            assert os.sched_getaffinity(child.pid) == {cpu}
        finally:
            child.send_signal(signal.SIGKILL)


# ------------------------------------------------------------------------------------------------ what is sent


def test_a_load_is_busy_with_what_gets_through(bench: SimpleNamespace) -> None:
    """One that sends as much in vain as not could do twice as much."""
    assert bench.parts.load_busy(Counters(0, 100, 100, 0.2), 0.2) == pytest.approx(0.5)
    assert bench.parts.load_busy(Counters(100, 100, 0, 0.1), 0.2) == pytest.approx(0.5)
    assert bench.parts.load_busy(Counters(100, 0, 0, 0.2), 0.2) == pytest.approx(1.0)


def test_a_rate_is_not_judged_where_the_load_was_saturated(bench: SimpleNamespace) -> None:
    samples = bench.rounds.Samples()
    for name, busy in (("vdev", 0.97), ("testpmd", 0.5)):
        samples.add(name, {"cost": 10.0, "rate": 1e6, "load_busy": busy})
    cost, rate = bench.polling.judged(samples, "64 B", "testpmd", 0.8, 2.0)
    assert (cost.target, cost.met) == (0.8, False)
    assert rate.target is None and "load of vdev was saturated" in rate.notes[0]
    samples.values["vdev"]["load_busy"] = [0.5]
    cost, rate = bench.polling.judged(samples, "64 B", "testpmd", 0.8, 2.0)
    assert (rate.target, rate.met, rate.notes) == (2.0, False, ())


def test_guests_are_addressed_in_pairs(bench: SimpleNamespace) -> None:
    assert bench.polling.addresses(4) == [f"02:00:00:00:00:{number:02x}" for number in (1, 0, 3, 2)]


def test_long_frames_have_headers_that_hold(bench: SimpleNamespace) -> None:
    ip = Ether(bytes.fromhex(bench.tap.long_prefix()))[IP]
    assert (ip.len, ip.proto, ip[TCP].dataofs) == (bench.tap.LONG - 14, 6, 5)
    told = ip.chksum
    del ip.chksum
    assert IP(bytes(ip)).chksum == told


@pytest.mark.parametrize("long", [False, True], ids=["64_B", "64_KB"])
def test_loop_on_a_tap_reads_what_was_fed_and_writes_what_it_says(bench: SimpleNamespace, tmp_path: Path,
                                                                 long: bool) -> None:
    if not shutil.which("gcc"):
        pytest.skip("no gcc on this machine: apt install gcc")
    size = bench.tap.LONG if long else 64
    asked = bench.parts.Run(tmp_path)
    try:
        lan = bench.lan.namespace()
    except bench.parts.NotHere as reason:
        pytest.skip(str(reason))
    with lan:
        for name in ("reading", "writing"):
            bench.lan.add_tap(lan, name)
        with (bench.lan.TapLoop(asked, lan, "read", "reading", size) as reader,
              bench.lan.TapLoop(asked, lan, "feed", "reading", size) as feed):
            assert feed.moved(7)[0] == 7
            frames, busy = reader.moved(0)
            assert frames == 7 and busy > 0
            assert reader.moved(0)[0] == 0
        with bench.lan.TapLoop(asked, lan, "write", "writing", size) as writer:
            frames, _ = writer.moved(1)
            counted = link_counters(lan, "writing")
        assert frames > 0 and (counted.from_guest_frames, counted.from_guest_bytes) == (frames, frames * size)


def test_huge_pages_are_given_back(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pages = tmp_path / "nr_hugepages"
    pages.write_text("3")
    monkeypatch.setattr(bench.machine, "NR_HUGEPAGES", pages)
    monkeypatch.setattr(bench.machine, "_free", lambda: int(pages.read_text()) - 1)
    with bench.machine.huge_pages(10) as there:
        assert there and pages.read_text() == "8"
    assert pages.read_text() == "3"
    monkeypatch.setattr(bench.machine, "_free", lambda: 2)  # the kernel found none
    with bench.machine.huge_pages(10) as there:
        assert not there
    assert pages.read_text() == "3"
    pages.unlink()
    with bench.machine.huge_pages(10) as there:
        assert not there
    assert not pages.exists()


# ---------------------------------------------------------------------------------------- what is made of it


def some_results(bench: SimpleNamespace):
    machine = {"date": "2026-01-02T03:04:05+00:00", "vdev": {"commit": "0123456789abcdef", "changed_since": False},
               "processor": "Some CPU", "processors": 2, "kernel": "6.1", "dpdk": "22.11", "mode": "quick",
               "load_average": 0.5}
    good = figure(bench, (10.0, 11.0, 12.0), (20.0, 22.0, 24.0), target=0.8, thrown_away=3)
    bad = bench.figures.Figure("64 KB <of> & more", "rate", "Mbit/s", (1.0, 1.0), (100.0, 100.0), True, 0.9, kept=3,
                               notes=("the load of testpmd was saturated: judge by cost",))
    outcome = bench.results.Outcome
    return bench.results.Results(machine, (outcome("drop", "testpmd", (good, bad), commands=("vdev run",)),
                                           outcome("many", "", missing="not in this build")))


def test_results_come_back_from_their_file(bench: SimpleNamespace, tmp_path: Path) -> None:
    results = some_results(bench)
    results.save(tmp_path / "results.json")
    assert bench.results.Results.load(tmp_path / "results.json") == results
    for text in ("", "{}", '{"format": 99}', '{"format": 1, "machine": {}, "comparisons": [{}]}'):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(bench.results.ResultsError, match="other.json"):
            bench.results.Results.load(tmp_path / "other.json")


def test_table_tells_what_was_wanted_and_what_is_missing(bench: SimpleNamespace) -> None:
    outcomes = some_results(bench).outcomes
    lines = list(bench.table.lines(outcomes[0]))
    assert re.search(r"cost, 64 B, split +11 +22 +ns/frame +0.50 +0.50 to 0.50 +at most 0.8 +yes$", lines[2])
    assert any("3 disturbed samples thrown away" in line for line in lines)
    assert any(line.endswith("NO?") for line in lines)
    assert list(bench.table.lines(outcomes[1])) == ["many: not measured: not in this build"]


def test_page_gets_its_table_and_keeps_the_rest(bench: SimpleNamespace) -> None:
    page = f"# Title\n\n{bench.table.BEGIN}\nold\n{bench.table.END}\n\nthe end\n"
    made = bench.table.with_table(page, some_results(bench))
    assert made.startswith("# Title\n") and made.endswith("the end\n") and "old" not in made
    assert "| drop | cost, 64 B, split | 11 | 22 | ns/frame | 0.50 | 0.50 to 0.50 | at most 0.8 | yes |  |" in made
    assert "| at least 0.9 | **no**? | 3 of 4 |" in made
    assert bench.table.with_table(made, some_results(bench)) == made
    with pytest.raises(bench.table.PageError):
        bench.table.with_table("no marks here", some_results(bench))


def test_chart_is_sound_and_bars_point_to_the_better_side(bench: SimpleNamespace) -> None:
    tree = ElementTree.fromstring(bench.chart.svg(some_results(bench)))
    svg = "{http://www.w3.org/2000/svg}"
    words = [text.text for text in tree.iter(f"{svg}text")]
    assert "rate, 64 KB <of> & more" in words and "drop, against testpmd" in words
    assert not any(text.startswith("many") for text in words)
    scale = bench.chart.Scale(list(some_results(bench).outcomes[0].figures))
    bars = [bar.attrib for bar in tree.iter(f"{svg}rect") if float(bar.get("x", 0)) >= bench.chart.LEFT]
    assert [bar["fill"] for bar in bars] == [bench.chart.COLOURS[True], bench.chart.COLOURS[False]]
    one, two = scale(1), scale(2)
    assert float(bars[0]["x"]) == pytest.approx(one, abs=0.1)  # half the cost: twice as good, to the right
    assert float(bars[0]["width"]) == pytest.approx(two - one, abs=0.1)
    assert float(bars[1]["x"]) + float(bars[1]["width"]) == pytest.approx(one, abs=0.1)
    assert scale(1000) == bench.chart.WIDTH - bench.chart.RIGHT


def test_chart_of_nothing_is_a_picture_too(bench: SimpleNamespace) -> None:
    empty = bench.results.Results({}, ())
    assert ElementTree.fromstring(bench.chart.svg(empty)).tag.endswith("svg")


def test_page_and_chart_in_the_tree_come_from_the_results_in_the_tree(bench: SimpleNamespace) -> None:
    results = bench.results.Results.load(ROOT / "docs/performance.json")
    page = (ROOT / "docs/performance.md").read_text()
    assert page == bench.table.with_table(page, results)
    assert (ROOT / "docs/performance.svg").read_text() == bench.chart.svg(results)


# ------------------------------------------------------------------------------------------------- the program


def run(*arguments: object, **options: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, PROGRAM, *map(str, arguments)], capture_output=True, text=True, timeout=100,
                          stdin=subprocess.DEVNULL, check=False, **options)


def needs_own_venv() -> None:
    if Path(sys.prefix) != ROOT / ".venv":
        pytest.skip("tools/bench runs in .venv, which it would make first")


def test_list_names_every_comparison_and_what_it_is(bench: SimpleNamespace) -> None:
    needs_own_venv()
    done = run("--list")
    assert done.returncode == 0, done.stderr
    listed = [line.split(None, 1) for line in done.stdout.splitlines()]
    assert [name for name, _ in listed] == list(bench.catalogue.COMPARISONS)
    assert all(about.strip() for _, about in listed)


def test_misuse_is_one_line(tmp_path: Path) -> None:
    needs_own_venv()
    for arguments, words in ((["fastest"], "no comparison fastest; there are start, drop"),
                             (["--from", tmp_path / "none.json"], "none.json: not written by tools/bench --json")):
        done = run(*arguments)
        assert done.returncode == 1 and words in done.stderr and len(done.stderr.splitlines()) == 1
    assert run("--rounds", "1").returncode == 2
    assert run("drop", "--from", tmp_path / "none.json").returncode == 2


def test_results_are_shown_and_drawn_again_without_measuring(bench: SimpleNamespace, tmp_path: Path) -> None:
    needs_own_venv()
    results = some_results(bench)
    results.save(tmp_path / "results.json")
    page = tmp_path / "page.md"
    page.write_text(f"{bench.table.BEGIN}\n{bench.table.END}\n")
    done = run("--from", tmp_path / "results.json", "--svg", tmp_path / "chart.svg", "--page", page)
    assert done.returncode == 0, done.stderr
    assert "cost, 64 B, split" in done.stdout
    assert (tmp_path / "chart.svg").read_text() == bench.chart.svg(results)
    assert "| drop | cost, 64 B, split |" in page.read_text()


def test_what_a_machine_lacks_is_said(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = bench.parts.Run(tmp_path)
    failing = bench.catalogue.Comparison("failing", lambda run: 1 // 0, testpmd=False)
    assert failing.outcome(asked).missing == "it failed: integer division or modulo by zero"
    monkeypatch.setattr(bench.catalogue, "why_no_testpmd", lambda: "no testpmd")
    assert bench.catalogue.COMPARISONS["drop"].outcome(asked).missing == "no testpmd"


def test_commands_are_told_without_what_belongs_to_the_machine(bench: SimpleNamespace, tmp_path: Path) -> None:
    asked = bench.parts.Run(tmp_path)
    for number in (7, 8):
        asked.started(["nsenter", "--net", "--", "setpriv", "--pdeathsig", "KILL", "--", sys.executable, "-m", "vdev",
                       "run", "--socket-path", f"{tmp_path}/1.sock", "--ready-fd", str(number)])
    assert asked.commands == ["python -m vdev run --socket-path 1.sock"]


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_comparison_runs(bench: SimpleNamespace, tmp_path: Path) -> None:
    """That it measures both sides; what comes out is for a quiet machine."""
    missing = why_no_testpmd()
    if missing:
        pytest.skip(missing)
    outcome = bench.catalogue.COMPARISONS["drop"].outcome(bench.parts.Run(tmp_path, quick=True, rounds=2))
    assert outcome.missing is None
    assert [(made.quantity, made.subject) for made in outcome.figures] == [
        (quantity, f"64 B, {rings}") for rings in ("split", "packed") for quantity in ("cost", "rate")]
    assert all(min(*made.ours, *made.peer) > 0 for made in outcome.figures)
    assert any("dpdk-testpmd" in command for command in outcome.commands)


def test_rings_are_measured(bench: SimpleNamespace, tmp_path: Path) -> None:
    if not shutil.which("gcc") or not shutil.which("taskset"):
        pytest.skip("the benchmark needs gcc and taskset (util-linux)")
    outcome = bench.catalogue.COMPARISONS["rings"].outcome(bench.parts.Run(tmp_path, rounds=2))
    subjects = [made.subject for made in outcome.figures]
    assert len(subjects) == 9 and subjects[0] == "one-descriptor, packed : split"
    assert all(min(*made.ours, *made.peer) > 0 for made in outcome.figures)
