"""A run's test metrics beside its baselines: ``python -m gru4recf_dist.results_table RUN_DIR``."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from gru4recf_dist.data import storage
from gru4recf_dist.errors import UserError, exits_cleanly

METRICS = ("hit@10", "ndcg@10", "mrr@10")


def table(result: dict[str, Any]) -> str:
    """The test metrics of a run's ``result.json`` as aligned text; ``-`` where a metric was not computed."""
    baselines = result.get("baselines") or {}
    rows = {
        "model": result["test"],
        "popularity": baselines.get("popularity") or {},
        "first-order Markov chain": baselines.get("markov") or {},
    }
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"{metric:>10}" for metric in METRICS)]
    for name, metrics in rows.items():
        cells = (f"{metrics[metric]:.4f}" if metric in metrics else "-" for metric in METRICS)
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    """Print the table of a run, where the run lies and how to look at its curves."""
    parser = argparse.ArgumentParser(
        prog="python -m gru4recf_dist.results_table", description="print a run's test metrics beside its baselines"
    )
    parser.add_argument("run_dir", help="folder of a finished run (a path or an fsspec URL)")
    run_dir = parser.parse_args(arguments).run_dir
    path = storage.join(run_dir, "result.json")
    result = storage.read_json(path)
    if not isinstance(result, dict) or not isinstance(result.get("test"), dict):
        raise UserError(f"{path}: has no test metrics")
    # The environment need not be active, so its tensorboard is named by its path.
    program = os.path.relpath(os.path.join(os.path.dirname(sys.executable), "tensorboard"))
    print(f"\nTest split, every item a candidate:\n\n{table(result)}\n")
    print(f"The run lies in {run_dir}; its curves: {program} --logdir {storage.join(run_dir, 'tensorboard')}")


if __name__ == "__main__":
    raise SystemExit(main())
