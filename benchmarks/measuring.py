"""How the benchmarks measure: contenders in turn, the median of several rounds, one table with the machine's load."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

from gru4recf_dist.config import LoaderConfig
from gru4recf_dist.data.batches import pack_training
from gru4recf_dist.data.streams import SessionLoader

# For runs of which only the steps are measured.
ONLY_STEPS = (
    "max_epochs=null",
    "evaluation.every_epochs=null",
    "evaluation.baselines=false",
    "checkpoint.every_epochs=null",
    "monitoring.progress=false",
    "monitoring.tensorboard=false",
)


def interleaved(contenders: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median of what each contender gives. They take turns, so that a change of the machine's load meets them all."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, measure in contenders.items():
            found[name].append(measure())
    return {name: statistics.median(values) for name, values in found.items()}


def packed_events(loader: SessionLoader, config: LoaderConfig) -> int:
    """Read the rest of the loader's epoch to packed batches; how many events that were."""
    return sum(pack_training(block, config.max_length, config.context).events for block in loader)


def launch(
    ranks: int, module: str, *arguments: str, python: str = sys.executable, **settings
) -> subprocess.CompletedProcess:
    """Run a module under torchrun, each rank on one thread; ``settings`` are those of `subprocess.run`."""
    command = [python, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, "-m", module, *arguments], env=environment, **settings)


def print_table(title: str, lines: Sequence[Sequence[str]]) -> None:
    """Print lines of cells, the first of each to the left, and the load that the machine is under."""
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{title} ({os.cpu_count()} cores, load averages {load})")
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for first, *others in lines:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]).rstrip())
