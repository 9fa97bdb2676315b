"""Short runs of the real trainer inside a rank, and what they leave behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from gru4recf_dist import config as configuration
from gru4recf_dist.config import Config
from gru4recf_dist.parallel.ranks import Ranks
from gru4recf_dist.trainer import Trainer

# No dropout, small sizes, several windows a session: what equality tests need.
SMALL = [
    "batch_size=16",
    "max_epochs=null",
    "max_steps=20",
    "model.embedding_size=8",
    "model.hidden_size=8",
    "model.dropout=0",
    "loss.negatives=32",
    "loss.block_rows=16",
    "loader.max_length=6",
    "loader.context=2",
    "loader.shuffle_window=8",
    "evaluation.every_epochs=null",
    "evaluation.baselines=false",
    "evaluation.ks=[10]",
    "monitoring.log_every_steps=1",
    "monitoring.tensorboard=false",
    "monitoring.progress=false",
    "device=cpu",
]


def small_config(data: Any, run_dir: Any, *overrides: str) -> Config:
    """The configuration of a short run on ``data``."""
    return configuration.load(None, [f"data={data}", f"run_dir={run_dir}", *SMALL, *overrides])


def logged_lines(run_dir: Path) -> list[dict[str, Any]]:
    """What a run, which may be going on, has logged so far; a line that is being written is left out."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line, parse_constant=_refuse) for line in lines]


def _refuse(constant: str) -> None:
    """NaN and Infinity, which Python writes and reads but no other reader of JSON knows."""
    raise AssertionError(f"metrics.jsonl holds {constant}")


def train(ranks: Ranks, config: Config) -> dict[str, torch.Tensor]:
    """Train to the end on this rank; returns the final weights (see `final_state`)."""
    trainer = Trainer(config, ranks)
    trainer.train()
    return final_state(trainer)


def final_state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Encoder parameters whole and this rank's rows of each table, with every optimizer's state."""
    state = {name: tensor.clone() for name, tensor in trainer.engine.state_dict().items()}
    tables = trainer.model.tables.state_dict()
    return state | {name: tensor.to_local().clone() for name, tensor in tables.items()}


def whole(states: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The ranks' states put together: table rows concatenated, the rest from rank 0."""
    return {
        name: torch.cat([state[name] for state in states]) if name.startswith(("table.", "output")) else tensor
        for name, tensor in states[0].items()
    }
