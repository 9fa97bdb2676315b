"""How the benchmarks measure: contenders in turn, the median of several rounds, one table with the machine's load."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from gru4recf_dist.config import LoaderConfig
from gru4recf_dist.data.batches import pack_training
from gru4recf_dist.data.streams import SessionLoader
from gru4recf_dist.measurements import peak_process_bytes
from gru4recf_dist.parallel import collectives
from gru4recf_dist.parallel.ranks import Ranks

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


class MemoryGrowth:
    """What a process has come to hold since this was made."""

    def __init__(self) -> None:
        self._peak, self._mapped = peak_process_bytes(), _mapped_bytes()

    def of_this_process(self, share: int) -> dict[str, int]:
        """Bytes: ``peak``; ``mapped``, of files; ``above``, what of the growth is neither these nor ``share``."""
        peak, mapped = peak_process_bytes(), _mapped_bytes() - self._mapped
        return {"peak": peak, "above": peak - self._peak - share - mapped, "mapped": mapped}

    def of_largest_rank(self, share: int, ranks: Ranks) -> dict[str, int]:
        """`of_this_process`, each figure the largest of all ranks."""
        found = self.of_this_process(share)
        largest = collectives.max_over_ranks(torch.tensor(list(found.values())), ranks.host)
        return dict(zip(found, largest.tolist(), strict=True))


def _mapped_bytes() -> int:
    """What this process has touched of files in memory: the system's cache, shared with all who map the same file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssFile:", "RssShmem:"))) * 1024
