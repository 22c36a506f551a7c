"""``rings``: what a frame costs the device in each ring format, against split; measured by rings.c."""

import statistics
import subprocess
from pathlib import Path

from benchmarks.figures import Figure
from benchmarks.parts import PROJECT, Run, processors
from benchmarks.results import Outcome

SOURCE = Path(__file__).with_name("rings.c")
BURSTS = 100  # in a sample


def rings(run: Run) -> Outcome:
    """A dropped frame in one thread, without any waiting: packed and in-order rings against split ones."""
    from ring import sources

    ring, program = PROJECT / "ring", run.folder / "rings"
    subprocess.run(["gcc", *sources.COMPILER_FLAGS, f"-I{ring}", SOURCE, *sources.compiled(ring), "-o", program],
                   check=True)
    groups = run.count(50, 20)
    command = ["taskset", "-c", str(processors()[0]), str(program), str(groups * BURSTS)]
    run.started(command)
    samples = parsed(subprocess.check_output(command, text=True, timeout=300))
    figures = [Figure(f"{shape}, {name} : split", "cost", "cycles/frame", gathered(values), gathered(of["split"]))
               for shape, of in samples.items() for name, values in of.items() if name != "split"]
    return Outcome("rings", "the same device on a split ring", tuple(figures))


def gathered(bursts: list[float]) -> tuple[float, ...]:
    """The medians of groups of successive bursts, of which one is too short a sample."""
    size = min(BURSTS, len(bursts))
    return tuple(statistics.median(bursts[at:at + size]) for at in range(0, len(bursts) - size + 1, size))


def parsed(output: str) -> dict[str, dict[str, list[float]]]:
    """Lines of SHAPE FORMAT CYCLES -> shape -> format -> samples. Raises SystemExit when there are none."""
    samples: dict[str, dict[str, list[float]]] = {}
    for line in output.splitlines():
        shape, ring_format, value = line.split()
        samples.setdefault(shape, {}).setdefault(ring_format, []).append(float(value))
    if not samples:
        raise SystemExit("tools/bench: every round was disturbed: the machine is too busy to measure")
    return samples
