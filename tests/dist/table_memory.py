"""One rank that trains, saves, loads and evaluates; prints the peak memory of each phase as JSON, the last line.

python -m tests.dist.table_memory FOLDER async|waiting    (FOLDER/data is the data set)
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch

from gru4recf_dist.parallel import ranks as process_ranks
from gru4recf_dist.trainer import Trainer
from tests.support.training import small_config

DIM = 16


def _begin() -> int:
    """Begin a new peak; the resident bytes now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> int:
    """Bytes that the kernel counts for this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def measure(folder: str, in_background: bool) -> dict[str, int]:
    """By phase, the most bytes that were resident above what was before there was a table."""
    overrides = (
        f"model.embedding_size={DIM}",
        "table.optimizer=rowwise_adagrad",
        "loss.sampler=log_uniform",
        "evaluation.baselines=true",
        f"checkpoint.async={str(in_background).lower()}",
        "max_steps=10",
    )
    config = small_config(f"{folder}/data", f"{folder}/run", *overrides)
    ranks = process_ranks.start("cpu")
    before, peaks = _begin(), {}

    def ends(phase: str) -> None:
        peaks[phase] = _status("VmHWM") - before
        _begin()

    trainer = Trainer(config, ranks)
    ends("init")
    trainer.train()
    ends("steps, checkpoints, evaluation, baselines")
    # All rows of the optimizer's state are memory from here on.
    trainer.checkpoints.load(trainer.progress.step, trainer.engine, trainer.model.encoder, trainer.model.tables)
    ends("load")
    trainer.checkpoints.load_smaller(trainer.progress.step, trainer.engine, trainer.model.tables, {})
    ends("warm start")
    process_ranks.stop()
    return peaks


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measure(sys.argv[1], sys.argv[2] == "async")))
