"""How the benchmarks measure: contenders in turn, the median of several rounds, one table with the machine's load."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping, Sequence


def interleaved(contenders: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median of what each contender gives. They take turns, so that a change of the machine's load meets them all."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, measure in contenders.items():
            found[name].append(measure())
    return {name: statistics.median(values) for name, values in found.items()}


def print_table(title: str, lines: Sequence[Sequence[str]]) -> None:
    """Print lines of cells, the first of each to the left, and the load that the machine is under."""
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{title} ({os.cpu_count()} cores, load averages {load})")
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for first, *others in lines:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]).rstrip())
